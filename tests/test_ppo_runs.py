"""PPO runs beyond the plain one: no critic, adapters, a critic on the policy, dumps."""

import json

import chatmodel
import jax
import numpy as np
import pytest

import jaxalign
from jaxalign.algorithms import ppo
from jaxalign.parallel.host_memory import to_host_memory
from jaxalign.run import loop, tasks
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge
from jaxalign.run.trackers.hub import sample_of

pytestmark = pytest.mark.usefixtures("kept_programs")


def settings(models, folder, changes, **options):
    return load_config("ppo", merge(chatmodel.settings("ppo", models, folder, **options), changes))


GRPO = {"advantage_estimator": "grpo", "samples": 2, "loss_aggregation": "sequence"}


@pytest.fixture(scope="module")
def run(chat_models, tmp_path_factory):
    """GRPO on adapters, with early stop and dumps."""
    folder = tmp_path_factory.mktemp("grpo") / "run"
    changes = {
        "ppo": GRPO,
        "model": {"lora": {"rank": 2, "targets": ["query", "down"]}},
        "data": {"rows": 8},
        "ppo_epochs": 3,
        "minibatches": 2,
        "target_kl": 1e-9,
        "dump_every": 2,
        "dump_samples": 3,
        "optimizer": {"learning_rate": 0.03},
    }
    return loop.train(settings(chat_models, folder, changes, steps=3, checkpoint=False))


def test_answers_are_compared_with_one_another_without_a_critic(run):
    assert len(run.history) == 3
    for row in run.history:
        assert row["compiles"] == 1
        assert row["weight/policy"] <= 16
        assert not any(name.startswith(("critic/", "loss/value")) for name in row)
        assert 0 <= row["groups/equal"] <= 1
    # Under adapters the reference is the base: at first there is no distance.
    assert run.history[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert abs(run.history[2]["objective/kl"]) > 1e-5


def test_places_of_equal_answers_are_filled_from_further_prompts(chat_models, tmp_path):
    """DAPO's dynamic sampling; stopped and resumed, it goes on with the same prompts."""
    changes = {
        "ppo": GRPO | {"skip_equal_groups": True},
        "prompt_draws": 3,
        "reward_model": None,
        "rewards": [{"kind": "regex", "pattern": "[a-m]"}],
    }

    def train(name, **options):
        return loop.train(settings(chat_models, tmp_path / name, changes, export=False, **options))

    whole = train("whole", steps=4, checkpoint=False)
    for row in whole.history:
        assert row["groups/equal"] > 0 or row["groups/draws"] == 1
        assert row["groups/draws"] == 3 or row["groups/left_equal"] == 0
        # Of 8 prompts; what one batch had is filled by what the next ones have.
        assert row["groups/left_equal"] < 8 * row["groups/equal"] or not row["groups/equal"]
    assert {row["groups/draws"] for row in whole.history} & {2, 3}
    train("parts", steps=2, save_every=2)
    parts = train("parts", steps=4, save_every=2, resume=True)
    assert chatmodel.timeless(chatmodel.lines(parts.folder)) == chatmodel.timeless(
        chatmodel.lines(whole.folder)
    )


def test_an_iteration_ends_after_the_update_that_measured_too_much(run):
    # The first update measures none, as nothing has moved; the second does.
    assert [row["updates"] for row in run.history] == [2, 2, 2]
    assert all(row["policy/approxkl_avg"] > 1e-9 / 2 for row in run.history)


def test_adapters_are_merged_on_export(run, chat_models):
    _, start = jaxalign.load_pretrained(chat_models / "chat")
    _, end = jaxalign.load_pretrained(run.model)
    start, end = chatmodel.leaves(start), chatmodel.leaves(end)
    assert start.keys() == end.keys()
    moved = {name for name in start if not np.array_equal(start[name], end[name])}
    assert moved == {
        "['blocks']['attention']['query']['kernel']",
        "['blocks']['mlp']['down']['kernel']",
    }


def test_dumps_are_aligned_with_tokens(run):
    rows = [json.loads(x) for x in (run.folder / "rollouts.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1] * 3 + [3] * 3
    tok = chatmodel.make_tokenizer()
    for row in rows:
        size = len(row["ids"])
        for name in ("tokens", "logprobs", "ref_logprobs", "kl", "rewards", "advantages"):
            assert len(row[name]) == size
        assert "values" not in row
        assert tok.decode(row["ids"]) == row["answer"]
        sample = sample_of(row)
        assert list(sample) == [
            *("prompt", "answer", "score", "finished", "trained"),
            *("kl", "rewards"),
        ]
        assert sample["kl"] == pytest.approx(sum(row["kl"]), abs=1e-5)
        assert row["tokens"] == [tok.decode([one]) for one in row["ids"]]
        gap = np.array(row["logprobs"]) - np.array(row["ref_logprobs"])
        np.testing.assert_allclose(row["kl"], gap, atol=3e-6)
        np.testing.assert_allclose(sum(row["rewards"]), row["score"] - 0.05 * gap.sum(), atol=1e-4)
        assert len(set(row["advantages"])) == 1
        assert "<|im_start|>assistant" in row["prompt"]
    lines = (run.folder / "histograms.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]
    for line in map(json.loads, lines):
        for name in ("scores", "lengths"):
            assert sum(line[name]["counts"]) == 16
            assert len(line[name]["edges"]) == len(line[name]["counts"]) + 1


def test_updates_are_packed_where_the_option_says_so(chat_models, tmp_path, monkeypatch):
    """Packed rows hold several answers, so that what an answer has once is gone."""
    parts = []
    cut = ppo.minibatches

    def see(*args, **options):
        for part in cut(*args, **options):
            parts.append(part)
            yield part

    monkeypatch.setattr(ppo, "minibatches", see)
    changes = {"ppo": GRPO, "pack_updates": 8, "ppo_epochs": 1, "minibatches": 1}
    options = {"steps": 1, "checkpoint": False, "export": False}
    result = loop.train(settings(chat_models, tmp_path / "run", changes, **options))
    assert len(parts) == 1
    assert parts[0].scores is None
    assert int(parts[0].tokens.loss_mask.sum()) > 0
    assert np.isfinite(result.history[0]["loss"])


def test_shared_prompts_change_no_figure(chat_models, tmp_path, monkeypatch):
    """Of the first iteration: log-probabilities, KL, advantages, update."""
    shapes = []
    cut = ppo.minibatches

    def see(*args, **options):
        for part in cut(*args, **options):
            shapes.append((part.tokens.inputs.size, part.tokens.branch_ids is not None))
            yield part

    monkeypatch.setattr(ppo, "minibatches", see)

    def first(name, packed, **more):
        changes = {"ppo": GRPO | packed, "ppo_epochs": 1, "minibatches": 1} | more
        options = {"steps": 1, "checkpoint": False, "export": False}
        return loop.train(settings(chat_models, tmp_path / name, changes, **options)).history[0]

    alone = first("alone", {})
    both = {"shared_prompts": True, "pack_experience": 8}
    shared = first("shared", both, pack_updates=8)
    assert [branches for _, branches in shapes] == [False, True]
    assert shapes[1][0] < shapes[0][0]
    for name, value in alone.items():
        if not name.startswith(("time/", "logprobs/", "throughput/")) and name != "compiles":
            assert shared[name] == pytest.approx(value, rel=1e-3, abs=2e-5), name


def test_frozen_models_wait_in_host_memory(chat_models, tmp_path, monkeypatch):
    moved = []

    def see(tree):
        moved.append(to_host_memory(tree))
        return moved[-1]

    monkeypatch.setattr(tasks.loader, "to_host_memory", see)
    changes = {"ppo": GRPO, "offload_frozen": True}
    task = tasks.make_task(settings(chat_models, tmp_path / "run", changes))
    reference, scorer = moved
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(moved)}
    assert kinds == {"pinned_host"}
    assert ("score" in reference, "score" in scorer) == (False, True)
    batch = next(iter(task.batches))
    task.batches.close()
    _, metrics = task.prepare_updates(jax.random.key(0), task.state, batch, task.loop, iter(()))
    # The reference is what the policy starts from; the scorer has read the answers.
    assert metrics["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert metrics["objective/scores_std"] > 0


@pytest.mark.parametrize(
    ("changes", "critic"),
    [
        ({"critic": "policy"}, "whole"),
        ({"critic": "policy", "critic_head": "zero"}, "whole"),
        ({"ppo": {"shared_critic": True}}, "head"),
        ({"ppo": GRPO}, None),
    ],
    ids=["policy", "zero", "shared", "none"],
)
def test_where_the_critic_starts(chat_models, tmp_path, changes, critic):
    task = tasks.make_task(settings(chat_models, tmp_path / "run", changes))
    params = task.state.params
    assert set(params) == ({"policy"} if critic is None else {"policy", "critic"})
    if critic is None:
        return
    head = np.asarray(params["critic"]["score"]["kernel"])
    assert head.shape == (32, 1)
    assert bool(head.any()) == (changes.get("critic_head") != "zero")
    if critic == "head":
        assert set(params["critic"]) == {"score"}
    else:
        trunk = {k: v for k, v in params["policy"].items() if k != "head"}
        same = jax.tree.map(
            np.array_equal, trunk, {k: v for k, v in params["critic"].items() if k != "score"}
        )
        assert all(jax.tree.leaves(same))


def test_answers_that_do_not_divide_are_refused(chat_models, tmp_path):
    changes = {"ppo": GRPO, "data": {"rows": 12}}
    with pytest.raises(ValueError, match=r"data\.rows=12"):
        tasks.make_task(settings(chat_models, tmp_path / "run", changes))


def test_lower_states_are_kept_through_a_run(chat_models, tmp_path):
    """Every metric but the model's FLOPs and the times is that of whole passes."""
    changes = {
        "model": {"lora": {"rank": 2, "targets": [r"layers\.1\..*"]}},
        "critic": "adapter",
        "ppo_epochs": 2,
        "minibatches": 2,
        "pack_updates": 8,
        "dump_every": 1,
        "data": {"rows": 16},
    }

    def history(keep):
        kept = merge(changes, {"ppo": {"keep_lower_states": keep}})
        config = settings(
            chat_models, tmp_path / str(keep), kept, steps=2, checkpoint=False, export=False
        )
        return [
            {k: v for k, v in row.items() if not k.startswith("time/")}
            for row in loop.train(config).history
        ]

    whole, kept = history(False), history(True)
    assert abs(whole[1]["objective/kl"]) > 1e-5
    for want, got in zip(whole, kept, strict=True):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-4)
