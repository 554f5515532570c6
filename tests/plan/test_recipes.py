"""The recipes in configs/recipes: valid, of the right size, and abstractly a step."""

import pathlib
import re

import jax
import numpy as np
import pytest

from jaxalign.parallel.chips import CHIPS
from jaxalign.parallel.mesh import make_mesh
from jaxalign.plan import parse_topology, resident_bytes, run_shapes, step_shapes
from jaxalign.plan.loader import known_shape
from jaxalign.run.config.runs import algorithm_of, load_config
from jaxalign.run.config.yaml import read_yaml

FOLDER = pathlib.Path(__file__).parents[2] / "configs/recipes"
RECIPES = sorted(FOLDER.glob("*/*.yaml"))

# Parameters as the models' cards give them, billions.
SIZES = {
    "qwen3-4b": 4.0, "qwen3-8b": 8.2, "llama-3.1-8b": 8.03, "gemma-3-27b": 27.0,
    "qwen3-30b-a3b": 30.5, "qwen3-32b": 32.8, "llama-3.1-70b": 70.6,
}  # fmt: skip


def load(path):
    return load_config(path.stem, path, ["model.compute_dtype=bfloat16"])


def test_there_is_one_for_every_model_and_algorithm():
    names = {(path.parent.name, path.stem) for path in RECIPES}
    assert names == {(m, a) for m in SIZES for a in ("sft", "reward", "dpo", "ppo")}
    for path in RECIPES:
        assert algorithm_of(read_yaml(path), "") == path.stem
        assert "arXiv" in path.read_text("utf-8")  # where its numbers come from


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_it_is_of_the_right_size(path):
    """Parameters by the card; what stays in memory fits its topologies, rows divide over them."""
    config, mesh = load(path), make_mesh(1, 8, 1)
    state, parts = run_shapes(path.stem, config, mesh)
    model = parts.policy
    params = state.params["policy"] if path.stem == "ppo" else state.params
    count = sum(x.size for x in jax.tree.leaves(params))
    tied = model.config.tie_embeddings
    if path.stem == "reward" and not tied:  # no vocabulary head
        count += model.config.hidden_size * model.config.vocab_size
    assert count / 1e9 == pytest.approx(SIZES[path.parent.name], rel=0.01)
    held = 8 * sum(resident_bytes(state, parts).values())
    line = re.search(r"^# topologies: (.*)$", path.read_text("utf-8"), re.M)
    for name in line[1].split():
        topology = parse_topology(name)
        # Gradients take four bytes a parameter, and something must be left for activations.
        gradients = 4 * sum(x.size for x in jax.tree.leaves(state.params))
        assert held + gradients < 0.85 * topology.devices * CHIPS[topology.family].memory
        assert config.data.rows % (topology.devices * config.run.micro_batches) == 0


@pytest.mark.parametrize("name", ["qwen3-30b-a3b/sft", "gemma-3-27b/dpo", "llama-3.1-8b/ppo"])
def test_its_step_can_be_evaluated_abstractly(name):
    path = FOLDER / f"{name}.yaml"
    config, mesh = load(path), make_mesh(1, 8, 1)
    state, parts = run_shapes(path.stem, config, mesh)
    batch = step_shapes(path.stem, config, mesh, state, parts)
    after, metrics = parts.step.lower(state, batch).out_info
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after)
    assert all(jax.tree.leaves(same))
    assert (metrics["loss"].shape, metrics["loss"].dtype) == ((), np.float32)


def test_shapes_are_known_by_hub_id_only():
    assert known_shape("Qwen/Qwen3-8B")["num_hidden_layers"] == 36
    assert known_shape("Qwen/Qwen3-8B-unknown") is None
