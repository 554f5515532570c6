"""scripts/examples: each program runs a step on the tiny model, and says what it should."""

import dataclasses
import importlib.util
import math
import pathlib
import re

import chatmodel
import jax
import numpy as np
import pytest
import tiny

import jaxalign as ja
from jaxalign.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("kept_programs")

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "scripts/examples").glob("*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(
        f"example_{name}", ROOT / f"scripts/examples/{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A chat model of one layer: it compiles faster than one of two."""
    folder = tmp_path_factory.mktemp("one_layer")
    model = Decoder(dataclasses.replace(chatmodel.DECODER.config, num_layers=1))
    params = tiny.random_params(model, seed=3)
    ja.save_pretrained(model, params, folder / "chat", tokenizer=chatmodel.make_tokenizer())
    return str(folder / "chat")


@pytest.fixture
def one_device(monkeypatch):
    """A machine with a single device, as most who start with an example have."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)
    return monkeypatch


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short_and_listed(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) < 60
    assert f"python scripts/examples/{path.name}" in text.partition('"""\n\nimport')[0]
    assert f"| `{path.name}` |" in (ROOT / "docs/research.md").read_text("utf-8")
    assert re.search(r"\[B, T\]|\[\d+, \d+\]|`\[B\]`", text), "it names shapes"


def test_no_example_escapes():
    tested = set(re.findall(r"load\(\"(\w+)\"\)", pathlib.Path(__file__).read_text("utf-8")))
    assert tested == {path.stem for path in EXAMPLES}


def test_sft(source, one_device, capsys):
    metrics = load("sft").main(source, steps=1)
    # "I like tea." and its end token, 12 tokens of this tokenizer a row. Random weights give every
    # one of the 260 tokens a chance: the loss lies around log 260 = 5.6.
    assert metrics["weight/nll"] % 12 == 0
    assert 4.0 < metrics["loss"] < 8.0
    assert "step 0: loss" in capsys.readouterr().out


def test_reward(source, one_device, capsys):
    metrics = load("reward").main(source, steps=1)
    assert 0.0 <= metrics["accuracy"] <= 1.0
    # −log σ(margin) is convex: its mean is at least that of the mean margin; centring adds to it.
    assert metrics["loss"] >= math.log1p(math.exp(-float(metrics["margin"])))
    assert re.search(r"scores: \[ *-?\d\S* +-?\d\S*\]", capsys.readouterr().out)


def test_dpo_starts_at_log_2(source, one_device):
    metrics = load("dpo").main(source, steps=1)
    np.testing.assert_allclose(metrics["loss"], math.log(2), rtol=1e-5)


def test_ppo(source, one_device, capsys):
    metrics = load("ppo").main(source, steps=1)
    assert np.isfinite(metrics["loss"])
    score = float(re.search(r"iteration 0: score ([\d.]+)", capsys.readouterr().out)[1])
    assert 1 / 9 <= score <= 1.0  # 1 / (1 + characters), and 8 tokens of a byte each


def test_own_loss_and_sharded_see_the_same_rows(source, one_device):
    """The smoothed loss logs the plain one, which the step on 8 devices computes by itself."""
    smoothed = load("own_loss").main(source, steps=1)
    one_device.undo()
    plain = load("sharded").main(source, steps=1)
    np.testing.assert_allclose(smoothed["nll"], plain["loss"], rtol=1e-4)
    assert smoothed["loss"] != pytest.approx(float(smoothed["nll"]), rel=1e-4)


def test_own_preference_loss_starts_at_the_square_of_the_gap(source, one_device):
    metrics = load("own_preference_loss").main(source, steps=1)
    np.testing.assert_allclose(metrics["loss"], 4.0, rtol=1e-5)  # max(0, 2 − β · 0)²


def test_export(source, one_device, tmp_path):
    answer = load("export").main(str(tmp_path / "out"), source, steps=1)
    assert isinstance(answer, str)
    assert (tmp_path / "out/model.safetensors").exists()
    assert "adapter" not in (tmp_path / "out/config.json").read_text("utf-8")
