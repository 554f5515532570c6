"""Learning rate, epoch, tokens and samples of every step, and what happens once an epoch."""

import shutil

import chatmodel
import numpy as np
import pytest

from jaxalign.algorithms.optim import OptimizerConfig, make_schedule
from jaxalign.data import count_samples, prompt_batches, sft_batches
from jaxalign.run import loop
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge
from jaxalign.types import PairBatch, RankedBatch, TokenBatch

pytestmark = pytest.mark.usefixtures("kept_programs")


def run(algorithm, models, folder, changes=None, **options):
    values = chatmodel.settings(algorithm, models, folder, **{"export": False} | options)
    return loop.train(load_config(algorithm, merge(values, changes or {})))


def column(result, name):
    return [row[name] for row in chatmodel.lines(result.folder) if "loss" in row]


# 12 rows in batches of 8: 1.5 batches are an epoch. A row has 20 tokens of ChatML up to its last
# end token, and the letters of its words.
TOKENS = [
    20 + len(row["messages"][0]["content"]) + len(row["messages"][1]["content"])
    for row in chatmodel.CONVERSATIONS
]


def test_a_run_counts_what_it_has_seen_and_goes_on_counting(chat_models, tmp_path):
    changes = {
        "optimizer": {"schedule": "linear", "warmup_ratio": 0.25, "learning_rate": 8e-3},
    }
    whole = run("sft", chat_models, tmp_path / "whole", changes, steps=6)
    assert column(whole, "epoch") == pytest.approx([2 / 3, 4 / 3, 2, 8 / 3, 10 / 3, 4])
    assert column(whole, "samples_seen") == [8, 16, 24, 32, 40, 48]
    # After 2 epochs, all rows twice.
    assert column(whole, "tokens_seen")[2::3] == [2 * sum(TOKENS), 4 * sum(TOKENS)]
    # ⌈0.25 · 6⌉ = 2 updates of warm-up from 0, then a line from the peak to 0 over 4.
    rates = [0, 4e-3, 8e-3, 6e-3, 4e-3, 2e-3]
    assert column(whole, "learning_rate") == pytest.approx(rates)
    moved = [row["grad_norm"] for row in whole.history]
    assert len(set(moved)) == 6

    folder = tmp_path / "parts"
    values = chatmodel.settings("sft", chat_models, folder, steps=6, export=False, save_every=4)
    values = merge(values, changes)
    stopped = loop.train(load_config("sft", values, [f"run.folder={folder}"]))
    shutil.rmtree(folder / "checkpoints/6")
    resumed = loop.train(load_config("sft", values, ["run.resume=true"]))
    assert len(resumed.history) == 2
    ours, theirs = (chatmodel.lines(result.folder) for result in (resumed, whole))
    assert chatmodel.timeless(ours) == chatmodel.timeless(theirs)
    assert stopped.folder == resumed.folder


def test_passes_may_be_fractions_and_end_with_things_to_do(chat_models, tmp_path, capsys):
    """2.5 passes are 3.75 batches, so 4; passes end with the batches 2, 3 and (the third) 5."""
    held_out = chatmodel.write_rows(tmp_path / "held.jsonl", chatmodel.CONVERSATIONS[:3])
    changes = {"data": {"eval": [held_out], "epochs": 1}}
    options = {"steps": None, "epochs": 2.5, "eval_every": "epoch", "save_every": "epoch"}
    result = run("sft", chat_models, tmp_path / "run", changes, keep=9, **options)
    assert column(result, "epoch") == pytest.approx([2 / 3, 4 / 3, 2, 8 / 3])
    evaluated = [row["step"] for row in chatmodel.lines(result.folder) if "loss" not in row]
    assert evaluated == [0, 2, 3, 4]
    saved = sorted(path.name for path in (result.folder / "checkpoints").iterdir())
    assert saved == ["2", "3", "4"]
    capsys.readouterr()


def test_a_run_that_wants_more_than_there_is_says_so_before_it_starts(
    chat_models, tmp_path, capsys
):
    changes = {"data": {"epochs": 2}}
    result = run("sft", chat_models, tmp_path / "run", changes, steps=100, checkpoint=False)
    said = capsys.readouterr().out
    assert "run.steps=100: the data ends after 3 steps" in said
    assert column(result, "epoch") == pytest.approx([2 / 3, 4 / 3, 2])
    assert column(result, "samples_seen") == [8, 16, 24]


def test_a_stream_that_ends_before_the_run_ends_it(chat_models, tmp_path, capsys):
    changes = {"data": {"epochs": 1, "streaming": True}}
    result = run("sft", chat_models, tmp_path / "run", changes, steps=100)
    assert "the data ended after step 2 of 100" in capsys.readouterr().out
    assert column(result, "samples_seen") == [8, 12]
    assert "epoch" not in chatmodel.lines(result.folder)[0]
    assert [path.name for path in (result.folder / "checkpoints").iterdir()] == ["2"]


def test_policy_and_critic_have_rates_of_their_own(chat_models, tmp_path):
    changes = {
        "ppo_epochs": 2,
        "critic_warmup": 1,
        "optimizer": {"schedule": "linear"},
        "critic_optimizer": {"learning_rate": 0.5, "schedule": "linear"},
    }
    result = run("ppo", chat_models, tmp_path / "run", changes, steps=3, checkpoint=False)
    # Of the last of 2 updates: the policy's line has 4 updates after the critic's first 2.
    policy = [0, 3e-3 * 3 / 4, 3e-3 * 1 / 4]
    assert column(result, "learning_rate") == pytest.approx(policy)
    assert column(result, "critic/learning_rate") == pytest.approx([0.5 * n / 6 for n in (5, 3, 1)])
    assert column(result, "samples_seen") == [8, 16, 24]


def rows_of(segments):
    ids = np.asarray(segments, np.int32)
    return TokenBatch(ids, ids, ids, ids, ids > 0)


def test_samples_are_documents_pairs_rankings_or_prompts():
    packed = rows_of([[1, 1, 2, 3, 0], [1, 2, 2, 2, 2], [0, 0, 0, 0, 0]])
    assert count_samples(packed) == 5
    assert count_samples(PairBatch(packed, packed)) == 5
    ranked = rows_of([[[1, 1], [1, 0]], [[1, 1], [0, 0]], [[0, 0], [0, 0]]])
    assert count_samples(RankedBatch(ranked, None, None)) == 2
    tok = chatmodel.make_tokenizer()
    prompts = list(prompt_batches(chatmodel.PROMPTS, tok, rows=8, length=32))
    assert [count_samples(batch) for batch in prompts] == [8, 4]


@pytest.mark.parametrize(
    ("options", "per_epoch"),
    [({"packing": False}, 1.5), ({"packing": False, "buckets": (16,)}, 2)],
    ids=["one width", "several"],
)
def test_how_many_batches_an_epoch_is(options, per_epoch):
    tok = chatmodel.make_tokenizer()
    batches = sft_batches(chatmodel.CONVERSATIONS, tok, rows=8, length=32, **options)
    assert batches.per_epoch == per_epoch
    streamed = sft_batches(
        chatmodel.CONVERSATIONS, tok, rows=8, length=32, packing=False, streaming=True
    )
    assert streamed.per_epoch is None


def test_warm_up_by_ratio_is_warm_up_by_steps():
    common = {"schedule": "cosine", "total_steps": 7, "learning_rate": 1.0}
    ratio = make_schedule(OptimizerConfig(warmup_ratio=0.3, **common))
    steps = make_schedule(OptimizerConfig(warmup_steps=3, **common))  # ⌈2.1⌉
    assert [float(ratio(n)) for n in range(8)] == [float(steps(n)) for n in range(8)]
    with pytest.raises(ValueError, match=r"warmup_ratio=0\.3: wanted 0 beside warmup_steps"):
        OptimizerConfig(warmup_ratio=0.3, warmup_steps=1)
    with pytest.raises(ValueError, match=r"warmup_ratio=0\.3 wants total_steps"):
        make_schedule(OptimizerConfig(warmup_ratio=0.3))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"run": {"epochs": 1.5}}, r"run\.epochs=1\.5: wanted null beside steps"),
        ({"run": {"steps": None, "epochs": 0}}, r"run\.epochs=0\.0: wanted positive"),
        ({"run": {"steps": None, "epochs": 2}, "data": {"epochs": 3}},
         r"data\.epochs=3: wanted 1 or null"),
        ({"run": {"steps": None, "epochs": 2}, "data": {"streaming": True}},
         r"run\.epochs=2\.0: wanted numbers of steps with data\.streaming"),
        ({"run": {"save_every": "epoch"}, "data": {"streaming": True}},
         r"run\.save_every='epoch': wanted numbers of steps"),
        ({"run": {"save_every": "hour"}}, r"run\.save_every='hour': wanted .*epoch"),
        ({"run": {"save_minutes": 0}}, r"run\.save_minutes=0\.0: wanted positive or null"),
        ({"run": {"resume": "yes"}}, r"run\.resume='yes': wanted true, false or auto"),
        ({"run": {"early_stopping": {"metric": "loss"}}}, r"wanted run\.eval_every with it"),
        ({"run": {"early_stopping": {"metric": "x", "mode": "up"}}}, r"mode='up': wanted min or"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(chat_models, tmp_path, values, told):
    settings = chatmodel.settings("sft", chat_models, tmp_path / "run")
    with pytest.raises(ValueError, match=told):
        load_config("sft", merge(settings, values))
