"""Sharding rules: valid overrides, their effect on programs, and rules in YAML."""

import chatmodel
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import yaml
from jax.sharding import PartitionSpec

from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.state import init_state
from jaxalign.commands import cli
from jaxalign.models.attention.kv_cache import split
from jaxalign.models.lm_head import target_logprobs
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.rules import RULES, current_rules, use_rules
from jaxalign.parallel.shard_map import map_row_shards
from jaxalign.parallel.sharding import (
    constrain,
    mesh_of,
    param_shardings,
    partition_spec,
    reshard_by_rules,
    shard_batch,
)
from jaxalign.rewards.model_spec import ModelReward
from jaxalign.run import loop
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge
from jaxalign.run.tasks.loader import FileLoader
from jaxalign.run.tasks.models import Scorers, load_critic, load_policy
from jaxalign.run.tasks.reference import reference_in_memory
from jaxalign.types import TrainState

pytestmark = pytest.mark.usefixtures("kept_programs")


def test_overrides_nest_and_end_with_the_context():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    axes = tiny.DECODER.axes["blocks"]["mlp"]["up"]["kernel"]
    assert partition_spec(axes) == PartitionSpec(None, "fsdp", "tensor")
    with use_rules({"embed": ["data", "fsdp"], "rows": "data"}):
        assert partition_spec(axes) == PartitionSpec(None, ("data", "fsdp"), "tensor")
        with use_rules({"mlp": None}):
            layout = param_shardings(tiny.DECODER.axes, mesh, tiny.DECODER.shapes)
            kernel = layout["blocks"]["mlp"]["up"]["kernel"]
            assert kernel.spec == PartitionSpec(None, ("data", "fsdp"), None)
            assert kernel.shard_shape((2, 16, 24)) == (2, 4, 24)
            assert current_rules()["rows"] == ("data",)
        with use_rules(None):
            assert partition_spec(axes) == PartitionSpec(None, ("data", "fsdp"), "tensor")
    assert current_rules() is RULES


def test_jit_retraces_under_other_rules():
    mesh, traced = make_mesh(data=2, fsdp=4), []

    @jax.jit
    def spread(x):
        traced.append(1)
        return constrain(x, "rows length")

    x = jnp.ones((8, 4))
    with jax.set_mesh(mesh):
        for over, parts in ((None, 8), ({"rows": "data"}, 2), (None, 8), ({"rows": "data"}, 2)):
            with use_rules(over):
                assert spread(x).sharding.shard_shape((8, 4)) == (8 // parts, 4)
    assert len(traced) == 2


def test_compiled_step_keeps_its_rules():
    mesh = make_mesh(data=2, fsdp=4)

    def step(state, batch):
        rows = constrain(batch, "rows")
        return TrainState(state.step + 1, {"sum": jnp.sum(rows)}, {}, state.opt_state), {}

    state = init_state({"sum": jnp.zeros(())}, optax.sgd(0.0))
    with use_rules({"rows": "data"}):
        compiled = compile_step(step, state, mesh)
    state, _ = compiled(state, np.ones(2, np.float32))  # 2 rows on 8 devices
    assert float(state.params["sum"]) == 2


def test_cache_axes_default_to_rows_and_kv_heads():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    keys = jnp.ones((8, 2, 4, 8))  # rows, heads, columns, width
    with jax.set_mesh(mesh):
        assert jax.jit(split)(keys).sharding.shard_shape(keys.shape) == (2, 1, 4, 8)
        with use_rules({"cache_heads": None, "cache_length": "tensor"}):
            assert jax.jit(split)(keys).sharding.shard_shape(keys.shape) == (2, 2, 2, 8)
        with use_rules({"kv_heads": None, "rows": "data"}):  # the cache axes follow
            assert jax.jit(split)(keys).sharding.shard_shape(keys.shape) == (4, 2, 4, 8)


def test_reshard_by_rules():
    mesh = make_mesh(fsdp=8)
    model = tiny.DECODER
    params = jax.device_put(tiny.random_params(model), param_shardings(model.axes, mesh))
    assert reshard_by_rules(params, model.axes, None) is params
    whole = reshard_by_rules(params, model.axes, {"embed": None})
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(whole))
    jax.tree.map(np.testing.assert_array_equal, whole, params)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"heds": "tensor"}, r"rule heds='tensor': no such logical axis, did you mean 'heads'\?"),
        ({"hidden": "tensor"}, r"rule hidden=.*no such logical axis"),
        ({"mlp": "tenser"}, r"rule mlp='tenser': no such mesh axis 'tenser', did you mean 'tensor"),
        ({"mlp": ("fsdp", "fsdp")}, r"rule mlp=.*wanted each mesh axis once"),
    ],
    ids=str,
)
def test_invalid_rules_are_refused(rules, message):
    with pytest.raises(ValueError, match=message), use_rules(rules):
        pass


@pytest.mark.parametrize(
    ("sizes", "rules", "message"),
    [
        # A device would sum parts of different rows.
        ({"fsdp": 8}, {"mlp": "fsdp"}, "'rows length mlp' map to mesh axis 'fsdp' twice"),
        # A device would send tokens to holders of other rows.
        ({"expert": 2}, {"rows": "fsdp"}, r"rule expert=.*expert is not among rows="),
    ],
    ids=["summed", "shared"],
)
def test_rules_that_experts_cannot_use_are_refused(sizes, rules, message):
    x, weights = jnp.ones((8, 4, 16)), {"up": jnp.ones((2, 16, 8))}
    with (
        jax.set_mesh(make_mesh(**sizes)),
        use_rules(rules),
        pytest.raises(ValueError, match=message),
    ):
        map_row_shards(
            lambda x, weights, first: x, [x], weights, {"up": "expert hidden mlp"},
            contracted="mlp", sharded="expert",
        )  # fmt: skip


def test_vocabulary_sharded_over_the_row_axis():
    """The devices hold different rows, so shards of the vocabulary must be all-gathered."""
    model, rng = tiny.DECODER, np.random.default_rng(0)
    params = tiny.random_params(model)
    hidden = rng.normal(size=(8, 4, model.config.hidden_size)).astype(np.float32)
    targets = rng.integers(0, tiny.VOCAB, (8, 4)).astype(np.int32)
    read = jax.jit(lambda params, x, y: target_logprobs(model, params, x, y))
    expected = read(params, hidden, targets)
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh), use_rules({"vocab": "fsdp", "embed": None}):
        placed = jax.device_put(params, param_shardings(model.axes, mesh))
        np.testing.assert_allclose(
            read(placed, *shard_batch((hidden, targets), mesh)), expected, 1e-5
        )


# Rules in YAML

RULES_OF = {
    "reference": {"embed": None},
    "reward": {"mlp": ["fsdp", "tensor"], "embed": None},
    "critic": {"embed": ["data", "fsdp"]},
    "rollout": {"embed": None, "cache_heads": None},
}
SPREAD = {"data": 2, "fsdp": 2, "tensor": 2}


def parts_of(params):
    """Shards of the MLP's first matrix: (width, columns)."""
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    whole, part = kernel.shape, kernel.sharding.shard_shape(kernel.shape)
    return whole[1] // part[1], whole[2] // part[2]


def test_rule_from_the_command_line(chat_models, tmp_path, monkeypatch):
    kept, make = [], loop.make_task

    def spying(config):
        kept.append(make(config))
        return kept[-1]

    monkeypatch.setattr(loop, "make_task", spying)
    values = chatmodel.settings("sft", chat_models, tmp_path / "run", steps=2, checkpoint=False)
    values = merge(values, {"mesh": SPREAD | {"rules": {"mlp": None}}, "run": {"export": False}})
    file = tmp_path / "sft.yaml"
    lines = {}
    for name, more in (("plain", ["mesh.rules={}"]), ("ruled", ["mesh.rules.embed=[fsdp, data]"])):
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        folder = tmp_path / name
        assert cli.main(["sft", str(file), f"run.folder={folder}", *more]) == 0
        lines[name] = chatmodel.timeless(chatmodel.lines(folder))
    plain, ruled = (task.state for task in kept)
    assert parts_of(plain.params) == (2, 2)
    assert parts_of(ruled.params) == (4, 1)
    moments = [x for x in jax.tree.leaves(ruled.opt_state) if x.shape == (2, 32, 48)]
    assert moments
    assert all(x.sharding.shard_shape(x.shape) == (2, 8, 48) for x in moments)
    for ours, theirs in zip(lines["ruled"], lines["plain"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    again = load_config("sft", tmp_path / "ruled/config.yaml")  # the resolved config has the rules
    assert again.mesh.rules == {"mlp": None, "embed": ("fsdp", "data")}
    assert cli.main(["sft", str(file), "mesh.rules.embd=fsdp"]) == 2


def test_rules_per_model(chat_models, tmp_path):
    values = chatmodel.settings("ppo", chat_models, tmp_path / "run")
    values |= {"mesh": SPREAD | {"rules_of": RULES_OF}}
    config = load_config("ppo", values)
    mesh, loader, tok = config.mesh.make(), FileLoader(), chatmodel.make_tokenizer()
    policy = load_policy(config, mesh, loader, tok)
    scorers = Scorers(config, mesh, loader, tok)
    assert parts_of(policy.params) == (2, 2)
    assert parts_of(reference_in_memory(config, policy, mesh, loader, tok).held) == (1, 2)
    _, critic = load_critic(config, policy, scorers, mesh, loader)
    assert parts_of(critic) == (4, 2)
    spec = ModelReward(source=str(chat_models / "scorer"))
    assert parts_of(scorers.reward(spec)[1]) == (1, 4)
    named = load_config(
        "ppo", values | {"critic": "policy", "reference": values["model"]["source"]}
    )
    assert parts_of(reference_in_memory(named, policy, mesh, loader, tok).held) == (1, 2)
    assert parts_of(load_critic(named, policy, scorers, mesh, loader)[1]) == (4, 2)

    alone = {"mesh": {"tensor": 2, "apart": {"reference": 2, "reward": 2}}}
    config = load_config("ppo", values | alone)
    mesh = config.mesh.make()
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2}
    policy = load_policy(config, mesh, loader, tok)
    scorers = Scorers(config, mesh, loader, tok)
    reference = reference_in_memory(config, policy, mesh, loader, tok)
    held = (policy.params, reference.held, scorers.reward(spec)[1])
    numbers = [{d.id for d in mesh_of(params).devices.flat} for params in held]
    assert numbers == [{0, 1, 2, 3}, {4, 5}, {6, 7}]
    _, critic = load_critic(config, policy, scorers, mesh, loader)
    assert mesh_of(critic) == mesh  # from the reward model, but at home

    values = chatmodel.settings("dpo", chat_models, tmp_path / "dpo")
    values |= {"mesh": SPREAD | {"rules_of": {"reference": {"embed": None}}}}
    config = load_config("dpo", values)
    reference = reference_in_memory(config, policy, mesh, loader, tok)
    assert parts_of(reference.params(None)) == (1, 2)


@pytest.mark.parametrize(
    ("algorithm", "changes", "message"),
    [
        ("sft", {"rules": {"embd": "fsdp"}}, r"mesh: rule embd='fsdp'.*did you mean 'embed'"),
        ("sft", {"rules": {"embed": 3}}, r"mesh\.rules\.embed: wanted"),
        ("sft", {"rules_of": {"reference": {}}}, r"rules_of\.reference=.*none of it"),
        ("dpo", {"apart": {"reference": 2}}, r"apart\.reference=.*none of it in this algorithm"),
        ("dpo", {"rules_of": {"critic": {}}}, r"rules_of\.critic=.*one of reference"),
        ("ppo", {"rules_of": {"reward": {"mlp": "x"}}}, r"rule mlp='x': no such mesh axis"),
    ],
    ids=str,
)
def test_invalid_rules_in_a_config_are_refused(chat_models, tmp_path, algorithm, changes, message):
    values = chatmodel.settings(algorithm, chat_models, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        load_config(algorithm, values | {"mesh": changes})


def test_moving_reference_has_no_rules(chat_models, tmp_path):
    values = chatmodel.settings("dpo", chat_models, tmp_path / "run")
    values |= {"reference_sync": {}, "mesh": {"rules_of": {"reference": {"embed": None}}}}
    with pytest.raises(ValueError, match=r"reference_sync=.*null with mesh\.rules_of\.reference"):
        load_config("dpo", values)
