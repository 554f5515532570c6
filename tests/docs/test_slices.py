"""docs/launching.md's meshes for slices fill the chips, divide model and rows, and fit."""

import pathlib
import re

import pytest

from jaxalign.parallel.chips import CHIPS
from jaxalign.plan.loader import known_shape
from jaxalign.plan.topology import parse_topology
from jaxalign.run.config.runs import load_config

PAGE = (pathlib.Path(__file__).parents[2] / "docs/launching.md").read_text("utf-8")
ROWS = re.findall(r"^\| (v5e-\d+) \| `(mesh\.data[^`]+)` \|$", PAGE, re.MULTILINE)


def test_they_are_found():
    assert [slice_ for slice_, _ in ROWS] == ["v5e-64", "v5e-256"]
    assert f"  {ROWS[-1][1]}\n" in PAGE  # the commands below use the same


@pytest.mark.parametrize(("slice_", "overrides"), ROWS)
def test_a_mesh(slice_, overrides):
    config = load_config("sft", "recipe:llama-3.1-8b/sft", overrides.split())
    topology, mesh = parse_topology(slice_), config.mesh
    assert mesh.data * mesh.fsdp == topology.devices
    assert config.data.rows % (mesh.data * mesh.fsdp * config.run.micro_batches) == 0
    shape = known_shape(config.model.source)
    for name in ("hidden_size", "intermediate_size", "vocab_size"):
        assert shape[name] % mesh.fsdp == 0
    # Weights, two moments and gradients in float32: 16 bytes a parameter, over fsdp alone.
    assert 16 * 8.03e9 / mesh.fsdp < 0.5 * CHIPS[topology.family].memory
