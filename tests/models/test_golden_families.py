"""Logits of a few families against numbers recorded from transformers, without torch."""

import json

import golden_families
import numpy as np
import pytest

from jaxalign.hf import load_pretrained

GOLDEN = np.load(golden_families.FILE)


@pytest.mark.parametrize("kind", golden_families.KINDS)
def test_golden_logits(kind, tmp_path):
    golden_families.write(tmp_path, kind, json.loads(str(GOLDEN["shapes"]))[kind])
    model, params = load_pretrained(tmp_path)
    got = model.logits(params, model.apply(params, GOLDEN["tokens"]))
    np.testing.assert_allclose(got, GOLDEN[kind], atol=1e-4, rtol=0)
    assert np.abs(GOLDEN[kind]).max() > 0.3
