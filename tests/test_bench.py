"""`jaxalign bench`: what it counts, and that it measures the library's own steps."""

import dataclasses
import json

import chatmodel
import jax
import numpy as np
import pytest
import tiny
import yaml

from jaxalign.commands.bench import SIZES, Case, measure, show
from jaxalign.commands.bench.case import Runner, Sample, cached_rows, make_case, row_parts
from jaxalign.commands.bench.machine import Limit
from jaxalign.commands.bench.rows import pair_batches, prompt_batch, token_batches
from jaxalign.commands.bench.runs import case_runner
from jaxalign.commands.cli import main
from jaxalign.models.backend import recorded_choices
from jaxalign.models.decoder import Decoder
from jaxalign.models.flops import (
    Work,
    decode_flops,
    forward_flops,
    ppo_flops,
    row_flops,
    update_flops,
    work_of,
)
from jaxalign.models.lora_config import LoraConfig
from jaxalign.run.metrics import Stopwatch, rates
from jaxalign.types import PairBatch, PromptBatch

TINY = tiny.CONFIG  # V 64, D 32, F 48, 2 layers, 4 heads of 8, 2 of them for keys and values


def by_hand(lengths, trained):
    """FLOPs of a forward pass of TINY, every matrix and every pair of tokens by itself."""
    query, keys, values, out = 32 * 32, 32 * 16, 32 * 16, 32 * 32
    gate, up, down = 32 * 48, 32 * 48, 48 * 32
    total = 0
    for n in lengths:
        for token in range(n):
            total += 2 * 2 * (query + keys + values + out + gate + up + down)  # 2 layers
            total += 2 * 4 * 2 * 8 * 2 * (token + 1)  # scores and sums, 4 heads of 8
    return total + trained * 2 * 32 * 64


def rows_of(lengths, groups, length):
    rng = np.random.default_rng(0)
    documents = [tiny.document(rng, n, prompt=1) for n in lengths]
    return tiny.token_batch(tiny.lay(documents, groups, length))


def test_flops_are_those_counted_by_hand_whatever_the_layout():
    lengths = [5, 3, 7]
    trained = sum(lengths) - 3  # a document's last token has no target
    padded = rows_of(lengths, [[0], [1], [2]], 9)
    packed = rows_of(lengths, [[0, 1], [2], []], 8)
    for batch in (padded, packed):
        assert forward_flops(TINY, work_of(batch)) == by_hand(lengths, trained)
        assert forward_flops(TINY, work_of(batch), head=False) == by_hand(lengths, 0)
    assert row_flops(TINY, 3, 5, head=True) == by_hand([5, 5, 5], 15)
    both = work_of(PairBatch(padded, packed))
    assert both == Work(*(2 * x for x in work_of(padded)))
    assert update_flops(tiny.DECODER, padded) == 3 * by_hand(lengths, trained)
    assert update_flops(tiny.DECODER, padded, frozen=True) == 2 * by_hand(lengths, trained)


def test_decoding_costs_what_reading_costs_but_for_the_head():
    prompts = PromptBatch(np.ones((3, 4), int), np.ones((3, 4), bool), np.arange(3))
    whole = decode_flops(TINY, work_of(prompts), 3, 4, 6)
    assert whole == by_hand([10] * 3, 3 * 6)


def test_an_iteration_of_ppo_reads_the_answers_with_every_model():
    tokens = rows_of([5, 5], [[0], [1]], 6)
    one, headless = by_hand([5, 5], 8), by_hand([5, 5], 0)
    scorer = tiny.SCORER
    got = ppo_flops(tokens, tiny.DECODER, scorer, [scorer], epochs=4)
    assert got.scoring == 2 * one + 2 * headless  # policy and reference; critic and reward model
    assert got.update == 4 * 3 * (one + headless)
    assert got.rollout == one
    # With two answers to a prompt, what no answer's token is chosen from counts once for both: here
    # the last token of each row, which sees 5.
    shared = ppo_flops(tokens, tiny.DECODER, None, [], epochs=1, samples=2)
    twice = forward_flops(TINY, Work(1.0, 5.0))
    assert shared.rollout == one - twice
    assert shared.update == 3 * one
    passes = ppo_flops(
        tokens, tiny.DECODER, None, [], epochs=1, samples=2, shared_prompts=True
    )  # of policy and reference, and of the update
    assert (passes.scoring, passes.update) == (2 * (one - twice), 3 * (one - twice))


def test_the_layer_below_all_adapters_takes_one_pass_or_none():
    policy = Decoder(TINY, lora=LoraConfig(targets=(r"layers\.1\..*",)))
    tokens = rows_of([5, 5], [[0], [1]], 6)
    one, below = by_hand([5, 5], 8), by_hand([5, 5], 0) / 2
    assert update_flops(policy, tokens, frozen=True) == 2 * one - below

    def iteration(**options):
        return ppo_flops(tokens, policy, None, [], epochs=3, frozen=True, **options)

    assert iteration()[1:] == (2 * one, 3 * (2 * one - below))
    # Kept: once for policy and reference, and not in the updates.
    kept = iteration(keep_lower_states=True, shared_reference=True)
    assert kept[1:] == (2 * one - below, 3 * 2 * (one - below))
    assert iteration(keep_lower_states=True).scoring == 2 * one


def test_rates():
    assert rates(10, 8e9, 2.0, None) == {
        "time/tokens_per_second": 5.0,
        "time/model_flops_per_second": 4e9,
    }
    assert rates(10, 8e9, 2.0, 16e9)["time/mfu"] == 0.25


def test_a_stopwatch_tells_its_parts():
    watch = Stopwatch()
    watch.start()
    assert watch.around(lambda x: x + 1, "before", "within")(1) == 2
    parts = watch.stop("after")
    assert list(parts) == ["time/before", "time/within", "time/after"]
    assert min(parts.values()) >= 0


@pytest.mark.parametrize("layout", ["full", "padded", "packed"])
def test_random_batches_have_the_documents_that_a_layout_says(layout):
    case = Case(what="sft", size="XS", layout=layout, rows=4, length=64)
    batches = [next(token_batches(case))] if layout == "full" else []
    stream = token_batches(case)
    batches += [next(stream) for _ in range(3)]
    for batch in batches:
        assert batch.inputs.shape == ((2, 128) if layout == "packed" else (4, 64))
        lengths = [np.sum(r == s) for r in batch.segment_ids for s in np.unique(r[r > 0])]
        assert max(lengths) <= 64
        assert min(lengths) >= (64 if layout == "full" else 8)
        assert batch.loss_mask.sum() == sum(lengths) - len(lengths)
    pairs = next(pair_batches(dataclasses.replace(case, what="dpo")))
    assert (pairs.mask is not None) == (layout == "packed")
    assert pairs.chosen.inputs[0, 0] == pairs.rejected.inputs[0, 0]  # they share their prompt
    prompts = prompt_batch(make_case("ppo", "XS", layout, {"rows": 4, "length": 64}))
    assert prompts.mask[:, -1].all()


def test_micro_batches_are_the_fewest_that_fit():
    assert row_parts(8, 2, 2) == 4
    assert row_parts(8, 2, 1) == 4
    assert row_parts(64, 2, 2) == 32
    assert row_parts(2, 2, 2) == 1
    assert row_parts(6, 4, 2) == 3
    assert row_parts(8, 1, 4) == 2  # less than a row a device cannot be


def test_rows_that_a_cpu_computes_at_a_time_are_about_1024_tokens():
    assert [cached_rows(n) for n in (127, 256, 576, 1024, 4096)] == [8, 4, 2, 1, 1]


def test_medians_leave_out_what_came_before(monkeypatch):
    seconds = iter([9.0, 8.0, 1.0, 3.0, 2.0])
    runner = Runner(lambda: Sample(s := next(seconds), 10.0, 6e9, {"data": s / 10}), lambda: 1)
    record = measure(lambda: runner, Limit(1e10, "made up"), repeats=3)
    assert record["tokens_per_second"] == 5.0
    assert record["fraction_of_limit"] == 0.3
    assert record["parts"] == {"data": 0.2}
    assert record["all_seconds"] == [1.0, 3.0, 2.0]
    assert record["choices"] == []
    case = {"what": "sft", "size": "S", "layout": "full"}
    table = show([{"case": case} | record, {"case": case, "error": "it broke"}])
    assert "30.0 %" in table.splitlines()[1]
    assert table.splitlines()[2] == "sft S full: it broke"
    record["choices"] = ["attention of 256 tokens: xla", "head: 512 of 2,048 positions at a time"]
    table = show([{"case": case} | record])
    assert table.splitlines()[2] == "sft S full: " + "; ".join(record["choices"])


def test_a_step_is_measured_and_compiled_once():
    case = Case(what="sft", size="XS", layout="packed", rows=16, length=16).resolved()
    mesh = case.mesh()
    with recorded_choices() as choices:
        runner = case_runner(case, mesh)
        first, second = runner.run(), runner.run()
    assert runner.compiles() == 1
    # A step of 8 rows of 32 on 8 devices; the head takes all that each one has.
    assert choices == {
        "attention of 32 tokens: xla (cpu has no kernel here)",
        "head: 256 of 256 positions at a time",
    }
    assert second.seconds >= second.parts["data"] > 0
    batch = next(token_batches(case))
    assert first.tokens == np.count_nonzero(batch.segment_ids)
    assert first.flops == 3 * forward_flops(SIZES["XS"], work_of(batch))
    assert 0 <= first.padding < 0.3
    assert mesh.size == jax.device_count()


def test_adapters_alone_are_trained_where_a_case_has_them():
    case = Case(what="sft", size="XS", lora=4, rows=8, length=16).resolved()
    first = case_runner(case, case.mesh()).run()
    # Forward, and backward to the activations: frozen weights have no gradient.
    assert first.flops == 2 * forward_flops(SIZES["XS"], work_of(next(token_batches(case))))


def test_unknown_things_are_refused(capsys):
    with pytest.raises(ValueError, match="layout='wide': wanted one of full, padded, packed"):
        Case(what="sft", layout="wide")
    with pytest.raises(ValueError, match="prompts are not packed"):
        Case(what="generate", layout="packed")
    with pytest.raises(ValueError, match="generate, lora=4: wanted 0, or a rank where it trains"):
        Case(what="generate", lora=4)
    assert main(["bench", "--what", "sfd"]) == 2
    assert "what='sfd'" in capsys.readouterr().err
    assert main(["bench", "configs/sft.yaml", "--rows", "4"]) == 2
    assert "wanted key=value overrides" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_measures_everything_in_processes_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    out = tmp_path / "records.jsonl"
    small = ["--sizes", "XS", "--rows", "8", "--length", "16", "--new-tokens", "8"]
    small += ["--repeats", "2", "--layouts", "full", "packed", "--out", str(out)]
    assert main(["bench", *small]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 10  # generation has no packed rows, nor has KTO
    for record in records:
        assert record["tokens_per_second"] > 0
        assert record["recompiles"] == 0 or record["case"]["what"] == "ppo"
        assert 0 < record["fraction_of_limit"] < 1
    parts = {r["case"]["what"]: set(r["parts"]) for r in records}
    assert parts["ppo"] == {"data", "rollout", "reward", "experience", "update"}
    assert parts["dpo"] == parts["kto"] == {"data", "reference", "update"}


@pytest.mark.parametrize("algorithm", ["sft", pytest.param("ppo", marks=pytest.mark.slow)])
def test_a_run_of_ones_own_is_measured_on_its_data(algorithm, chat_models, tmp_path, capsys):
    values = chatmodel.settings(algorithm, chat_models, tmp_path / "run")
    (tmp_path / "run.yaml").write_text(yaml.dump(values))
    out = tmp_path / "records.jsonl"
    asked = ["bench", algorithm, str(tmp_path / "run.yaml"), "--repeats", "2", "--out", str(out)]
    assert main(asked) == 0
    record = json.loads(out.read_text())
    assert record["case"]["what"] == algorithm
    # 8 conversations of at least 19 tokens, or prompts with answers of at most 6.
    assert record["tokens_per_second"] * record["step_seconds"] > 8 * 12
    wanted = {"data", "update"} | (
        {"rollout", "reward", "experience"} if algorithm == "ppo" else set()
    )
    assert set(record["parts"]) == wanted
    assert record["step_compiles"] == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert algorithm in capsys.readouterr().out
