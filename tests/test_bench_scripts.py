"""The parts of the benchmark scripts that can be checked without a peer or a large model."""

import gzip
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts" / "bench"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    """The scripts import one another by their bare names, as they do when they are run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def some_pairs():
    from _job import Pairs

    chosen = [np.array([5, 6, 7, 8]), np.array([9, 10]), np.array([11, 12, 13])]
    rejected = [np.array([5, 6, 20]), np.array([9, 21, 22, 23]), np.array([11, 12])]
    return Pairs(chosen, rejected, np.array([2, 1, 1]))


def a_job(**changes):
    from _job import Job

    values = {
        "algorithm": "dpo",
        "model": "m",
        "train": "t",
        "steps": 3,
        "pairs": 2,
        "length": 8,
        "peer_pairs": 2,
        "layout": "packed",
        "row_length": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
    }
    return Job(**values | changes)


def test_pairs_survive_their_file(tmp_path):
    from _job import load_pairs, save_pairs

    pairs = some_pairs()
    save_pairs(tmp_path / "pairs.npz", pairs)
    loaded = load_pairs(tmp_path / "pairs.npz")
    for ours, theirs in zip(loaded[:2], pairs[:2], strict=True):
        assert [a.tolist() for a in ours] == [a.tolist() for a in theirs]
    assert loaded.prompts.tolist() == [2, 1, 1]
    assert loaded.tokens == 18


def test_a_job_hands_out_whole_updates_in_order(tmp_path):
    from _job import save_pairs

    save_pairs(tmp_path / "pairs.npz", some_pairs())
    train = str(tmp_path / "pairs.npz")
    assert [u.chosen[0][0] for u in a_job(train=train, pairs=1).updates()] == [5, 9, 11]
    # The third pair makes no whole update of two.
    assert [len(u.chosen) for u in a_job(train=train, pairs=2).updates()] == [2]


def test_a_folder_takes_one_job_only(tmp_path):
    from _job import read_job, write_job

    write_job(tmp_path / "case", a_job())
    write_job(tmp_path / "case", a_job())
    assert read_job(tmp_path / "case") == a_job()
    with pytest.raises(ValueError, match="another job"):
        write_job(tmp_path / "case", a_job(learning_rate=2e-3))


def test_a_step_done_twice_counts_once(tmp_path):
    from _job import append, read_steps

    for step, loss in ((1, 0.7), (2, 0.6), (2, 0.5), (3, 0.4)):
        append(tmp_path / "steps.jsonl", {"step": step, "loss": loss})
    assert [row["loss"] for row in read_steps(tmp_path / "steps.jsonl")] == [0.7, 0.5, 0.4]


def test_wilson_interval():
    from _job import accuracy, wilson

    # 81 of 263 at 95 %: 0.2553 to 0.3662 (Newcombe 1998, Statistics in Medicine 17, table I).
    np.testing.assert_allclose(wilson(81, 263), (0.2553, 0.3662), atol=5e-5)
    np.testing.assert_allclose(wilson(0, 20), (0.0, 0.1611), atol=5e-5)
    got = accuracy(np.array([1.0, 2.0, 0.0, 0.0]), np.array([0.0, 1.0, 1.0, 0.0]))
    assert got["accuracy"] == 0.5  # a tie is not right


def test_curves_of_different_length_are_not_compared():
    from _job import curve_difference

    assert curve_difference([1.0, 2.0], [1.0, 2.5]) == 0.5
    with pytest.raises(ValueError, match="2 and 3 steps"):
        curve_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def the_updates(tmp_path, **changes):
    from _job import save_pairs
    from _ours import make_batch, updates

    save_pairs(tmp_path / "pairs.npz", some_pairs())
    job = a_job(train=str(tmp_path / "pairs.npz"), **changes)
    plan = updates(job)
    return [make_batch(update, job) for update in plan], [update.tokens for update in plan]


def test_packed_pairs_keep_their_row_and_segment(tmp_path):
    (batch,), tokens = the_updates(tmp_path, pairs=3)
    # The longer sides have 4, 4 and 3 tokens: the first two share a row of 8.
    assert batch.chosen.inputs.shape == (2, 8)
    assert batch.mask.tolist() == [[True, True, False], [True, False, False]]
    assert batch.chosen.inputs[0, :6].tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.rejected.inputs[0, :7].tolist() == [5, 6, 20, 9, 21, 22, 23]
    assert batch.rejected.segment_ids[0].tolist() == [1, 1, 1, 2, 2, 2, 2, 0]
    # Trained are the tokens after the prompt: of the first pair (prompt 2) the targets 7, 8.
    assert batch.chosen.loss_mask[0].tolist() == [False, True, True, False, True] + [False] * 3
    assert tokens == [18]


def test_padded_pairs_are_a_row_each(tmp_path):
    (batch,), _ = the_updates(tmp_path, pairs=3, layout="rows", row_length=4)
    assert batch.mask is None
    assert batch.rejected.segment_ids.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]


def test_pooled_pairs_make_as_many_updates_of_one_shape(tmp_path):
    batches, tokens = the_updates(tmp_path, pairs=1, layout="pooled", row_length=8, threads=1)
    # Two rows in all (4 + 4 and 3), three updates wished for: one row each, none for the third.
    assert [batch.chosen.inputs.shape for batch in batches] == [(1, 8), (1, 8)]
    assert [batch.mask.tolist() for batch in batches] == [[[True, True]], [[True, False]]]
    assert tokens == [4 + 2 + 3 + 4, 3 + 2]


def test_shared_prompts_stand_once(tmp_path):
    (batch,), tokens = the_updates(tmp_path, pairs=3, shared=True, row_length=16)
    # p p' c c' p' r: prompt 5 6 is held once but for its last token, which both answers follow.
    row = batch.tokens.inputs[batch.tokens.segment_ids > 0].tolist()
    assert len(row) == 18 - 1  # the other two prompts are of one token, which both answers need
    assert sorted(row) == sorted([5, 6, 7, 8, 6, 20, 9, 10, 9, 21, 22, 23, 11, 12, 13, 11, 12])
    assert int(batch.tokens.loss_mask.sum()) == 10
    assert tokens == [18]


def test_hh_split_is_fixed_and_keeps_the_end(tmp_path):
    from hh_reward import LENGTH, split

    rows = [{"chosen": f"{i} " + "a" * 300, "rejected": f"{i} b"} for i in range(7)]
    path = tmp_path / "pairs.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

    def encode(text):
        return [*map(ord, text), 0]

    train, held_out = split(path, 4, 3, encode)
    assert len(train.chosen) == 4
    assert len(held_out.chosen) == 3
    numbers = [chr(ids[0]) for ids in (*held_out.rejected, *train.rejected)]
    assert sorted(numbers) == list("0123456")
    assert numbers == list("0156342")
    assert all(len(ids) == LENGTH and ids[-1] == 0 for ids in train.chosen)
    with pytest.raises(ValueError, match="has 7 pairs, wanted 3 \\+ 5"):
        split(path, 5, 3, encode)


def test_ragged_lengths_are_uniform_and_prompts_shared():
    from preference_speed import draw

    pairs = draw("ragged", 500, vocab=64, prompt_share=0.25)
    lengths = np.array([[len(c), len(r)] for c, r in zip(*pairs[:2], strict=True)])
    assert lengths.min() >= 32
    assert lengths.max() <= 256
    assert abs(lengths.mean() - 144) < 6  # 4 standard errors of a uniform draw
    for chosen, rejected, prompt in zip(*pairs, strict=True):
        assert prompt == min(len(chosen), len(rejected)) // 4
        assert chosen[:prompt].tolist() == rejected[:prompt].tolist()
    full = draw("full", 3, vocab=64, prompt_share=0.25)
    assert [len(ids) for ids in full.chosen + full.rejected] == [256] * 6


def test_speed_leaves_out_the_first_steps():
    from preference_speed import speed, summary

    steps = [{"tokens": 100, "seconds": s} for s in (9.0, 9.0, 1.0, 3.0)]
    assert speed(steps, warm=2) == 50.0
    found = {
        "ours": {"tokens_a_second": [30.0, 20.0, 25.0], "peak_mib": [10, 10, 40], "versions": {}},
        "trl": {"tokens_a_second": [10.0, 10.0, 90.0], "peak_mib": [20, 20, 20], "versions": {}},
    }
    got = summary(found)
    assert got["speed_ratio"] == 2.5
    assert got["memory_ratio"] == 0.5


def test_only_pairs_that_differ_are_kept_and_held_out_ones_are_fixed():
    from polite import polite, split

    rows = [
        {"instruction": f"Question {i}", "input": "", "chosen": "Kindly.", "rejected": rejected}
        for i, rejected in enumerate(["No.", "Kindly. ", "Go away.", "Duh."])
    ]
    train, held_out, equal = split(rows, 1)
    assert (len(train), len(held_out), equal) == (2, 1, 1)
    assert split(rows[::-1], 1) == (train, held_out, equal)  # whatever the order of the file
    assert polite("I'd be happy to help!")
    assert not polite("Duh, it's Paris.")


def test_the_polite_recipe_fits_the_pipeline(tmp_path):
    from argparse import Namespace

    from polite import stages

    arguments = Namespace(work=tmp_path, model="m", overrides=["dpo.dpo.beta=0.2"])
    (first, dpo), (second, reward) = stages(arguments, {"train": "a", "held_out": "b"})
    assert (first, second) == ("dpo", "reward")
    assert dpo.dpo.beta == 0.2
    assert dpo.reference_cache == str(tmp_path / "reference")
    assert reward.data.train == ("a",)
    assert reward.data.eval == ("b",)


def test_the_choice_of_four_is_compared_with_dpo():
    from polite import choose

    scores = np.array([[0.0, 3.0, 1.0, 0.0], [2.0, 0.0, 1.0, 1.0]])
    implicit = np.array([[0.0, 1.0, 0.0, -1.0], [0.0, 2.0, 0.0, 0.0]])
    assert choose(scores, implicit) == {
        "score_all": 1.0,
        "score_best": 2.5,
        "implicit_all": 0.25,
        "implicit_best": 0.5,
        "same_choice": 0.5,
    }


@pytest.mark.parametrize("name", ["hh_reward", "loss_curves", "preference_speed", "polite"])
def test_help_says_what_a_script_wants(name):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{name}.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--work" in done.stdout


def test_speed_of_ppo_is_a_ratio_of_medians_over_all_repeats():
    from _ppo import draw_lengths
    from ppo_speed import summary

    lengths = np.array(draw_lengths("ragged", 50, 16, 64))
    assert (lengths.min(), lengths.max()) == (4, 64)
    assert set(np.ravel(draw_lengths("full", 2, 3, 64))) == {64}
    found = {
        "ppo_trl": {"seconds": [[6.0, 4.0], [5.0]], "peak_mib": [200.0, 100.0]},
        "ppo_ours": {"seconds": [[2.0, 2.0], [9.0]], "peak_mib": [300.0, 300.0]},
    }
    got = summary(found, written=1000)
    assert (got["speed_ratio"], got["memory_ratio"]) == (2.5, 2.0)
    assert got["median"]["ppo_ours"]["new_tokens_a_second"] == 500


def texts(kind):
    from _sft import Texts

    return Texts(kind=kind, size="S", shape=(64, 8, 1, 1, 8), model="m", row_length=512)


def test_texts_have_the_lengths_of_their_kind_and_lose_none_when_packed():
    from _sft_ours import batches

    full = [len(ids) for ids in texts("full").documents()]
    assert (len(full), set(full)) == (32, {256})
    assert [len(rows) for rows in batches(texts("full"))] == [8] * 4
    ragged = [len(ids) for ids in texts("ragged").documents()]
    assert len(ragged) == 64
    assert 32 <= min(ragged) < max(ragged) <= 256
    plan = batches(texts("ragged"))
    assert {len(rows) for rows in plan} == {4}
    assert sorted(i for rows in plan for row in rows for i in row) == list(range(64))
    assert max(sum(ragged[i] for i in row) for rows in plan for row in rows) <= 512


def test_sft_is_compared_with_each_peer_and_with_the_limit():
    from sft_speed import flops_of, summary

    # S: 4 layers of 4·256² + 3·256·688 weights, 256 · 8192 of the head, no target for the last.
    weights = 4 * (4 * 256**2 + 3 * 256 * 688)
    forward = 2 * 3 * weights + 2 * 256 * 8192 * 2 + 4 * 4 * 256 * (1 + 2 + 3)
    assert flops_of(texts("full"), [3]) == 3 * forward
    found = {
        "trl_padded": {"tokens_a_second": [10.0], "flops_a_second": [2e9], "peak_mib": [50]},
        "sft_ours": {
            "tokens_a_second": [10.0, 40.0, 30.0],
            "flops_a_second": [6e9, 6e9, 7e9],
            "peak_mib": [20, 20, 30],
        },
        "matmul_flops": [9e9, 1e10],
    }
    got = summary(found)
    assert got["ratios"] == {"trl_padded": {"speed": 3.0, "memory": 0.4}}
    assert got["median"]["sft_ours"]["of_limit"] == 0.6
    assert got["matmul_gflops"] == 10.0


def a_part(name, *programs):
    from gpu import Part

    commands = tuple(({"try": n}, [sys.executable, "-c", p]) for n, p in enumerate(programs))
    return Part(name=name, commands=commands, seconds=3600.0)


def test_a_part_that_fails_leaves_the_others_alone():
    import time

    from gpu import carry_out, compared, told

    later = time.perf_counter() + 3600
    full = "import sys; print('RESOURCE_EXHAUSTED: out of memory', file=sys.stderr); sys.exit(1)"
    good = """print('noise'); print('{"tokens_per_second": 30.0, "step_seconds": 1.0}')"""
    fits = carry_out(a_part("sft", full, good), later)
    assert fits["tokens_per_second"] == 30.0
    assert fits["case"] == {"try": 1}
    assert "RESOURCE_EXHAUSTED" in fits["attempts"][0]["error"]
    broken = carry_out(a_part("dpo", "raise ValueError('no such thing')", good), later)
    assert broken["error"] == "ValueError: no such thing"  # another try would fail in the same way
    assert carry_out(a_part("ppo", good), float("-inf"))["skipped"] == "no time left"
    peer = {"part": "trl-sft", "tokens_per_second": 20.0}
    assert compared([fits, broken, peer]) == {"sft": 1.5}
    assert told(broken).startswith("dpo") and "no such thing" in told(broken)  # noqa: PT018


def test_a_package_that_the_peer_lacks_is_no_failure():
    import dataclasses
    import time

    from gpu import carry_out, is_done

    part = a_part("trl-sft", "import no_such_package")
    later = time.perf_counter() + 3600
    assert "error" in carry_out(part, later)
    record = carry_out(dataclasses.replace(part, optional=True), later)
    assert record["skipped"] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert not is_done(record)


def test_the_gpu_script_measures_what_was_asked_for_most_wanted_first():
    from _gpu_parts import parts

    names = [part.name for part in parts(tiny=False, peer="python3")]
    assert names[:4] == ["checks", "sft-8k", "sft-16k", "lora-8b"]
    wanted = {"dpo", "ppo-split", "trl-sft-8k", "trl-sft-16k", "trl-dpo"}
    wanted |= {f"decode-{slots}" for slots in (1, 8, 64, 256)}
    assert wanted <= set(names)
    assert names == [part.name for part in parts(tiny=True, peer="python3")]
    by_name = {part.name: part for part in parts(tiny=False, peer="python3")}
    for name, length in (("sft-8k", 8192), ("sft-16k", 16384)):
        case = by_name[name].commands[0][0]
        assert (case["layout"], 2 * case["length"], case["size"]) == (
            "packed",
            length,
            "Qwen3-0.6B",
        )
    lora = by_name["lora-8b"].commands[0][0]
    assert (lora["size"], lora["lora"], lora["param_dtype"]) == ("8B", 16, "bfloat16")


def test_a_call_runs_what_lacks_and_writes_after_every_part(tmp_path, monkeypatch, capsys):
    import gpu

    out = tmp_path / "gpu.json"
    fails, seen = {"dpo"}, []

    def carry_out(part, deadline):
        there = json.loads(out.read_text())["parts"] if out.exists() else []
        seen.append((part.name, [record["part"] for record in there]))
        if part.name in fails:
            return {"part": part.name, "error": "broken", "attempts": []}
        return {"part": part.name, "tokens_per_second": 1.0, "step_seconds": 2.0}

    monkeypatch.setattr(gpu, "carry_out", carry_out)
    monkeypatch.setattr(gpu, "parts", lambda **_: [a_part(n) for n in ("sft-8k", "dpo", "trl-dpo")])

    def call(*given):
        seen.clear()
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), *given])
        gpu.main()
        return [name for name, _ in seen]

    assert call() == ["sft-8k", "dpo", "trl-dpo"]
    assert seen[2] == ("trl-dpo", ["sft-8k", "dpo"])  # on disk before the next one begins
    fails.clear()
    assert call() == ["dpo"]
    assert json.loads(out.read_text())["ratios"] == {"dpo": 1.0}
    fails.add("sft-8k")
    assert call("--part", "sft", "trl-dpo") == ["sft-8k", "trl-dpo"]
    kept = {part["part"]: part for part in json.loads(out.read_text())["parts"]}
    assert kept["sft-8k"]["tokens_per_second"] == 1.0  # a failure takes nothing away
    with pytest.raises(SystemExit, match=r"--part absent: wanted one or more of sft-8k, dpo"):
        call("--part", "absent")
    with pytest.raises(SystemExit, match="without --tiny; give another file"):
        call("--tiny")
    out.write_text("{}")
    with pytest.raises(SystemExit, match="holds no results of this script"):
        call()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_gpu_script_runs_to_its_end_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPTS / "gpu.py"), "--tiny", "--out", str(out)]
    done = subprocess.run(
        [*command, "--budget", "1500"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    parts = {part["part"]: part for part in json.loads(out.read_text())["parts"]}
    assert parts["checks"]["agree"], parts["checks"]["wrong"] + parts["checks"]["errors"]
    measured = {name for name, part in parts.items() if "tokens_per_second" in part}
    assert {name for name in parts if not name.startswith(("trl-", "checks"))} <= measured
    assert parts["ppo-split"]["parts"].keys() >= {"rollout", "update"}
