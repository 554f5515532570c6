"""PPO whose four roles lie on one base: the reward model too is an adapter."""

import gc

import chatmodel
import jax
import numpy as np
import pytest

import jaxalign
from jaxalign.hf import save_adapter
from jaxalign.models.base import combine
from jaxalign.models.lora import LoraConfig, add_lora
from jaxalign.models.scorer import with_scalar_head
from jaxalign.plan.make import resident_bytes, run_shapes
from jaxalign.run import loop
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge
from jaxalign.run.tasks.loader import FileLoader
from jaxalign.run.tasks.parts import unread_data
from jaxalign.run.tasks.ppo import build_ppo
from jaxalign.types import TokenBatch

pytestmark = pytest.mark.usefixtures("kept_programs")

LORA = LoraConfig(rank=3, alpha=12.0, targets=("query", "up"))
ADAPTERS = 4 * 3 * 2 * ((32 + 32) + (32 + 48))  # bytes of A and B in two layers


@pytest.fixture(scope="module")
def reward(chat_models, tmp_path_factory):
    """A reward model as an adapter (`adapter`), and merged into its base (`merged`)."""
    folder = tmp_path_factory.mktemp("reward")
    base = chat_models / "chat"
    model, params = jaxalign.load_pretrained(base)
    model, trained, frozen = add_lora(model, params, jax.random.key(5), LORA)
    trained = jax.tree.map(lambda x: x + 0.05, trained)
    scorer, whole = with_scalar_head(model, combine(trained, frozen), jax.random.key(6))
    save_adapter(scorer, whole, folder / "adapter", base=str(base))
    tok = chatmodel.make_tokenizer()
    merged = jaxalign.load_pretrained(folder / "adapter")
    jaxalign.save_pretrained(*merged, folder / "merged", tokenizer=tok)
    return folder


def config_of(chat_models, tmp_path, reward, **changes):
    values = chatmodel.settings("ppo", chat_models, tmp_path / "run", steps=1, checkpoint=False)
    values |= {"reward_model": str(reward), "critic": "adapter"}
    values["model"]["lora"] = {"rank": 2, "targets": ["down"]}
    return load_config("ppo", merge(values, changes))


def build(config):
    """(train state, parts) and the bytes of all arrays that they brought into memory."""
    gc.collect()
    before = {id(x) for x in jax.live_arrays()}
    state, parts = build_ppo(config, config.mesh.make(), FileLoader(), unread_data(config))
    gc.collect()
    return state, parts, sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_four_roles_take_one_base_and_adapters(chat_models, tmp_path, reward):
    _, params = jaxalign.load_pretrained(chat_models / "chat")
    base, trunk = size(params), size({k: v for k, v in params.items() if k != "head"})
    del params
    scores, total = {}, {}
    rng = np.random.default_rng(0)
    ids = rng.integers(4, chatmodel.VOCAB, (8, 12)).astype(np.int32)
    where = np.arange(12)[None] < rng.integers(3, 12, (8, 1))
    tokens = TokenBatch(ids, ids, np.tile(np.arange(12), (8, 1)), where.astype(np.int32), where)
    for name in ("adapter", "merged"):
        config = config_of(chat_models, tmp_path, reward / name)
        state, parts, total[name] = build(config)
        (scorer,) = parts.reward_models
        scores[name] = np.asarray(scorer.reward()(tokens, None))
        if name == "adapter":
            policy = jax.tree.leaves(state.frozen["policy"])
            kept = [x for x in jax.tree.leaves(scorer.params) if any(x is y for y in policy)]
            assert size(kept) == trunk
            assert size(scorer.params) == trunk + ADAPTERS + 4 * 32
        plan = resident_bytes(*run_shapes("ppo", config, config.mesh.make()))
        counted = sum(plan.values())
        del state, parts, scorer
        # On one of 8 devices; norms and adapters are whole on each, so that sums are not 8 times.
        assert plan["models"] < counted
    assert np.std(scores["merged"]) > 0.01
    np.testing.assert_allclose(scores["adapter"], scores["merged"], atol=1e-6, rtol=1e-6)
    # The merged one is another trunk; both have a head.
    assert total["merged"] - total["adapter"] == trunk - ADAPTERS
    own = 4 * 2 * 2 * (48 + 32)  # A and B of `down`: policy's and critic's, each with two moments
    assert total["adapter"] <= base + ADAPTERS + 2 * 3 * own + 4 * 4 * 32 + 64


def test_plan_counts_the_base_once(chat_models, tmp_path, reward):
    mesh = jaxalign.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    sizes = {
        name: resident_bytes(
            *run_shapes("ppo", config_of(chat_models, tmp_path, reward / name), mesh)
        )
        for name in ("adapter", "merged")
    }
    assert sizes["adapter"]["models"] == ADAPTERS + 4 * 32
    assert sizes["merged"]["models"] > 10 * sizes["adapter"]["models"]
    for kind in ("params", "frozen", "optimizer"):
        assert sizes["adapter"][kind] == sizes["merged"][kind]
    # What is not there yet is taken to be like the policy's adapters, where that is said.
    absent = {"rewards": [{"kind": "model", "source": "runs/absent", "adapter": True}]}
    config = config_of(chat_models, tmp_path, reward / "adapter", reward_model=None, **absent)
    state, parts = run_shapes("ppo", config, mesh)
    assert resident_bytes(state, parts)["models"] == 4 * (2 * 2 * (48 + 32) + 32)
    assert "runs/absent" in parts.notes[0]


def test_a_run_scores_with_it(chat_models, tmp_path, reward):
    lines = []
    for name in ("adapter", "merged"):
        config = config_of(chat_models, tmp_path / name, reward / name)
        result = loop.train(config)
        lines.append(chatmodel.lines(result.folder)[0])
    one, other = lines
    assert one["objective/scores"] == pytest.approx(other["objective/scores"], abs=1e-5)
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


def test_what_cannot_share_the_base_has_its_own_or_is_refused(
    chat_models, tmp_path, reward, capsys
):
    model, params = jaxalign.load_pretrained(chat_models / "chat")
    other = tmp_path / "other"
    changed = jax.tree.map(lambda x: 1.01 * x, params)
    jaxalign.save_pretrained(model, changed, other, tokenizer=chatmodel.make_tokenizer())
    config = config_of(chat_models, tmp_path, reward / "adapter", model={"source": str(other)})
    _, parts, _ = build(config)
    said = capsys.readouterr().err
    assert "has a base of its own in memory: its base is" in said
    assert f"with other weights than model.source='{other}'" in said
    # It is the adapter on its own base, whatever the policy is.
    _, merged = jaxalign.load_pretrained(reward / "merged")
    got = chatmodel.leaves(parts.reward_models[0].params)
    for name, value in chatmodel.leaves(merged).items():
        np.testing.assert_allclose(got[name], value, atol=1e-6, err_msg=name)
    for source, changes, message in (
        (reward / "adapter", {"model": {"source": str(other)}}, "with other weights than"),
        (reward / "merged", {}, "it is a whole model"),
        (reward / "adapter", {"model": {"lora": None}, "critic": "policy"}, "model.lora is null"),
    ):
        spec = {"kind": "model", "source": str(source), "adapter": True}
        changes = {"reward_model": None, "rewards": [spec]} | changes
        config = config_of(chat_models, tmp_path, reward / "adapter", **changes)
        with pytest.raises(ValueError, match="adapter=true of .*" + message):
            build(config)


def test_the_same_weights_elsewhere_are_the_same_base(chat_models, tmp_path, reward, capsys):
    import shutil

    shutil.copytree(chat_models / "chat", tmp_path / "copy")
    config = config_of(
        chat_models, tmp_path, reward / "adapter", model={"source": str(tmp_path / "copy")}
    )
    state, parts, _ = build(config)
    policy = jax.tree.leaves(state.frozen["policy"])
    scorer = jax.tree.leaves(parts.reward_models[0].params)
    assert sum(any(x is y for y in policy) for x in scorer) > 5
    assert capsys.readouterr().err == ""
