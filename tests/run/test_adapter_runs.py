"""Runs with every kind of adapter: exports, checkpoints, references, and adapters as sources."""

import chatmodel
import jax
import numpy as np
import pytest

import jaxalign
from jaxalign.hf import save_adapter
from jaxalign.models.base import combine
from jaxalign.models.lora import LoraConfig, add_lora
from jaxalign.run import loop
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge
from jaxalign.run.export import export_run

pytestmark = pytest.mark.usefixtures("kept_programs")


def train(algorithm, models, folder, changes, **run):
    values = merge(chatmodel.settings(algorithm, models, folder, **run), changes)
    return loop.train(load_config(algorithm, values))


RICH = {
    "rank": 2,
    "targets": ["query", "embed", "lm_head"],
    "rank_pattern": {r"layers\.0\..*": 1},
    "rslora": True,
    "dora": True,
    "modules_to_save": ["norm"],
}
PRINCIPAL = {"rank": 2, "targets": ["down"], "init": "pissa"}


@pytest.mark.parametrize("lora", [RICH, PRINCIPAL], ids=["rich", "principal"])
def test_a_checkpoint_is_exported_as_the_run_exports(chat_models, tmp_path, lora):
    result = train("sft", chat_models, tmp_path / "run", {"model": {"lora": lora}}, steps=2)
    export_run(str(result.folder), str(tmp_path / "out"))
    assert chatmodel.weights(tmp_path / "out") == chatmodel.weights(result.model)
    _, start = jaxalign.load_pretrained(chat_models / "chat")
    _, end = jaxalign.load_pretrained(result.model)
    start, end = chatmodel.leaves(start), chatmodel.leaves(end)
    moved = {name for name in start if np.abs(start[name] - end[name]).max() > 1e-4}
    wanted = {"['blocks']['mlp']['down']['kernel']"}
    if lora is RICH:
        wanted = {"['blocks']['attention']['query']['kernel']", "['embed']['embedding']",
                  "['head']['kernel']", "['norm']['scale']"}  # fmt: skip
    assert moved == wanted


def test_a_reference_is_the_whole_base(chat_models, tmp_path):
    """At the start policy and reference agree, though the policy trains a part of the base."""
    changes = {"model": {"lora": {"rank": 2, "modules_to_save": ["embed"]}}}
    result = train("dpo", chat_models, tmp_path / "run", changes, steps=2, checkpoint=False)
    first = chatmodel.lines(result.folder)[0]
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-5)


def test_what_pissa_leaves_is_no_reference(chat_models, tmp_path):
    changes = {"model": {"lora": PRINCIPAL}}
    with pytest.raises(ValueError, match=r"init=pissa: the base without adapters is not the model"):
        train("dpo", chat_models, tmp_path / "run", changes)
    changes["reference"] = str(chat_models / "chat")
    result = train("dpo", chat_models, tmp_path / "named", changes, steps=1, checkpoint=False)
    first = chatmodel.lines(result.folder)[0]
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-4)


def test_a_reward_model_has_no_output_matrix(chat_models, tmp_path):
    changes = {"model": {"lora": {"rank": 2, "targets": ["lm_head", "query"]}}}
    with pytest.raises(ValueError, match="lm_head, which a reward model does not have"):
        train("reward", chat_models, tmp_path / "run", changes)


def test_an_adapter_is_a_source(chat_models, tmp_path):
    model, params = jaxalign.load_pretrained(chat_models / "chat")
    config = LoraConfig(rank=2, init="pissa", targets=("query",))
    model, trained, frozen = add_lora(model, params, jax.random.key(0), config)
    trained = jax.tree.map(lambda x: 1.5 * x, trained)
    together = combine(trained, frozen)
    base = str(chat_models / "chat")
    save_adapter(model, together, tmp_path / "adapter", base=base)
    merged = jaxalign.merge_lora(model, together)
    jaxalign.save_pretrained(
        *merged, tmp_path / "merged", tokenizer=jaxalign.load_tokenizer(chat_models / "chat")
    )
    losses = []
    for name in ("adapter", "merged"):
        changes = {"model": {"source": str(tmp_path / name), "lora": {"rank": 2}}}
        result = train("sft", chat_models, tmp_path / f"run-{name}", changes, steps=1)
        losses.append(chatmodel.lines(result.folder)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # Its files decide the run, as those of a whole model would.
    again = train("sft", chat_models, tmp_path / "run-adapter", changes={
        "model": {"source": str(tmp_path / "adapter"), "lora": {"rank": 2}},
    }, steps=2, resume=True)  # fmt: skip
    assert len(chatmodel.lines(again.folder)) == 2


def test_policy_and_critic_share_a_base(chat_models, tmp_path, monkeypatch):
    """Four roles of PPO, one base: each trains its own adapters, and the reference has none."""
    kept = {}
    make = loop.make_task

    def spying(config):
        task = make(config)
        kept["frozen"] = task.state.frozen
        kept["trained"] = {
            name: set(chatmodel.leaves(value)) for name, value in task.state.params.items()
        }
        return task

    monkeypatch.setattr(loop, "make_task", spying)
    changes = {
        "model": {"lora": {"rank": 2, "targets": ["down"], "modules_to_save": ["norm"]}},
        "critic": "adapter",
        "optimizer": {"learning_rate": 0.03},
    }
    result = train("ppo", chat_models, tmp_path / "run", changes, steps=2)
    policy, critic = (arrays_of(kept["frozen"][name]) for name in ("policy", "critic"))
    shared = policy.keys() & critic.keys()
    assert len(shared) == 10
    assert all(policy[name] is critic[name] for name in shared)
    # The policy trains its own norm; the critic reads that of the base.
    assert critic.keys() - policy.keys() == {"['norm']['scale']"}
    assert policy.keys() - critic.keys() == {"['head']['kernel']"}
    adapters = {f"['blocks']['mlp']['down']['lora_{side}']" for side in "ab"}
    assert kept["trained"] == {
        "policy": adapters | {"['norm']['scale']"},
        "critic": adapters | {"['score']['kernel']"},
    }
    first = chatmodel.lines(result.folder)[0]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)  # the reference is the base

    export_run(str(result.folder), str(tmp_path / "critic"), part="critic")
    scorer, params = jaxalign.load_pretrained(tmp_path / "critic")
    _, start = jaxalign.load_pretrained(chat_models / "chat")
    moved = chatmodel.leaves(params)
    for name, value in chatmodel.leaves(start).items():
        if "down" in name:
            assert np.abs(moved[name] - value).max() > 1e-3
        elif "head" not in name:
            np.testing.assert_array_equal(moved[name], value, name)
    assert scorer.scores(params, np.ones((1, 1, 32), np.float32)).shape == (1, 1)


def arrays_of(params):
    """Flat `{path: array}`, the arrays themselves."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def test_a_critic_of_adapters_wants_a_base(chat_models, tmp_path):
    with pytest.raises(ValueError, match=r"critic='adapter': wanted model\.lora with it"):
        train("ppo", chat_models, tmp_path / "run", {"critic": "adapter"})
