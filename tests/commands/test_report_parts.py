"""Parts of a report: what stands out, sampled tokens, KL against reward, cost."""

import json
import pathlib
import xml.etree.ElementTree as ET

import pytest

from jaxalign.commands.report.advice import NOTABLE, SERIOUS, warnings_of
from jaxalign.commands.report.compare import costs, differences, duration
from jaxalign.commands.report.frontier import frontier_section, paths_of
from jaxalign.commands.report.load import Run, load_runs
from jaxalign.commands.report.metrics import Metrics
from jaxalign.commands.report.samples import samples_section


def run(curves=None, number=0, algorithm="ppo", **fields):
    """A run with curves of (1, …), (2, …), …"""
    curves = {k: list(enumerate(map(float, v), start=1)) for k, v in (curves or {}).items()}
    values = {
        "number": number,
        "name": f"run{number}",
        "folder": pathlib.Path("absent"),
        "algorithm": algorithm,
        "metrics": Metrics(curves, False),
        "options": {},
        "state": "finished",
        "total": None,
        "evaluation": None,
        "rollouts": [],
        "memory": {},
        "missing": [],
    }
    return Run(**(values | fields))


def tree(section):
    return ET.fromstring(f"<div>{section}</div>")


def cells(root):
    return [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]


# --- what stands out -----------------------------------------------------------------------------

FLAT = [1.0] * 30


@pytest.mark.parametrize(
    ("curves", "level", "told", "remedy"),
    [
        ({"loss": [1, float("nan"), 1]}, SERIOUS, "loss was not a finite number in 1 steps",
         "jaxalign explain"),
        ({"bad_steps": [0, 2, 1]}, SERIOUS, "3 updates were skipped", "jaxalign explain"),
        ({"grad_norm": [*FLAT, 21]}, NOTABLE, "21 times its median, at step 31", "skip_spikes"),
        ({"compiles": [1, 2, 4]}, NOTABLE, "compiled 4 times", "data.buckets"),
        ({"time/data": FLAT, "time/step": [4] * 30}, NOTABLE, "25% of a step", "data.prefetch"),
        ({"eval/loss/nll": [3, 2, 2.5]}, NOTABLE,
         "eval/loss/nll was lowest at step 2 (2) and ended at 2.5", "run.keep_best: eval/loss/nll"),
        ({"objective/kl": range(60)}, SERIOUS, "56 nats an answer", "ppo.kl_coef"),
        ({"objective/scores": range(20), "eval/objective/scores": [3, 2, 1]}, SERIOUS,
         "fell on held-out prompts (3 → 1)", "More prompts"),
        ({"response/finished": [0.4] * 9}, NOTABLE, "Only 40% of the last", "max_new_tokens"),
        ({"response/length": [10] * 9 + [21]}, NOTABLE, "from 10 to 21 tokens", "jaxalign eval"),
        ({"policy/entropy_avg": [2] * 9 + [0.3]}, NOTABLE, "fell from 2 to 0.3", "entropy_coef"),
        ({"groups/equal": [0.6] * 9}, NOTABLE, "in 60% of the groups", "prompt_draws"),
        ({"policy/clipfrac_avg": [0.4] * 9}, NOTABLE, "acted on 40% of the tokens", "target_kl"),
        ({"critic/explained_variance": [-0.5] * 9}, NOTABLE, "variance -0.5", "critic_warmup"),
        ({"logprobs/mean_difference": [0.1] * 9}, SERIOUS, "differ by 0.1 nats", "cache_dtype"),
        ({"rewards/accuracies": [0.5] * 9}, NOTABLE, "50% of the pairs", "jaxalign data"),
        ({"logps/chosen": [-50] * 9 + [-70]}, NOTABLE, "lost probability (-50 → -70", "dpo.beta"),
    ],
)  # fmt: skip
def test_what_stands_out_has_a_figure_and_a_remedy(curves, level, told, remedy):
    (found,) = warnings_of(run(curves))
    assert found.level == level
    assert told in found.message
    assert remedy in found.remedy


def test_a_sound_run_has_no_warning():
    curves = {
        "loss": FLAT, "grad_norm": [*FLAT, 19], "bad_steps": [0] * 30, "compiles": FLAT,
        "time/data": [0.1] * 30, "time/step": FLAT, "data/fill": [0.9] * 30,
        "eval/loss/nll": [3, 2, 2.01], "objective/kl": [5] * 30, "response/finished": FLAT,
        "response/length": [10] * 29 + [19], "policy/clipfrac_avg": [0.1] * 30,
        "critic/explained_variance": [0.2] * 30, "rewards/accuracies": [0.7] * 30,
        "logps/chosen": [-50] * 29 + [-54],
    }  # fmt: skip
    assert warnings_of(run(curves)) == []


def test_padding_of_prompts_is_no_fault_and_buckets_compile_each():
    half = {"data/fill": [0.4] * 9}
    assert warnings_of(run(half)) == []
    assert "Only 40% of the token slots" in warnings_of(run(half, algorithm="sft"))[0].message
    options = {"data.buckets": "[8, 16]"}
    assert warnings_of(run({"compiles": [1, 2]}, options=options)) == []


# --- KL against reward ---------------------------------------------------------------------------


def test_held_out_figures_are_the_path_where_there_are_three():
    curves = {"objective/kl": [1, 2, 3, 4], "objective/scores": [0, 1, 2, 3]}
    few = run(curves | {"eval/objective/kl": [0, 9], "eval/objective/scores": [0, 9]})
    many = run(curves | {"eval/objective/kl": [0, 5, 9], "eval/objective/scores": [0, 1, 2]}, 1)
    other = run({"objective/kl": [1]}, 2)
    paths = paths_of([few, many, other])
    assert [(path.run.number, path.held_out) for path in paths] == [(0, False), (1, True)]
    assert paths[0].points == [(1, 0, 1), (2, 1, 2), (3, 2, 3), (4, 3, 4)]
    root = tree(frontier_section([few, many, other]))
    # Budgets: the round numbers up to 9 nats. Run 0 ends at 4 nats with 3, run 1 at 9 with 2.
    assert cells(root) == [
        ["best score within", "5 nats", "10 nats", "last", "at nats"],
        ["run0", "3", "3", "3", "4"],
        ["run1", "1", "2", "2", "9"],
    ]
    label = next(root.iter("svg")).get("aria-label")
    assert "run1: score 2 at 9 nats after iteration 3" in label
    assert frontier_section([other]) == ""


# --- samples -------------------------------------------------------------------------------------


def row(step, ratios, **more):
    return {
        "step": step,
        "prompt": f"prompt {step}",
        "score": 0.5,
        "finished": False,
        "trained": True,
        "tokens": [f" w{i}" for i in range(len(ratios))],
        "kl": ratios,
        "rewards": [0.0] * (len(ratios) - 1) + [-2.0],
    } | more


def test_tokens_are_coloured_by_what_was_measured():
    # The scale is the value below which 19 of 20 are: of 4, the third largest.
    root = tree(samples_section([run(rollouts=[row(1, [0.0, 0.5, -1.0, 1.0])])]))
    spans = [span for span in root.iter("span") if span.get("title")]
    # Log-ratio levels 0, 2, −4, 4; k3 = exp(−r) − 1 + r: 0, 0.1065, 0.7183, 0.3679; its scale is
    # the third, 0.3679, so levels 0, 1, 4, 4. Rewards 0, 0, 0, −2 have a scale of 0: no colour.
    assert [span.get("class") for span in spans] == [None, "lp2 kp1", "ln4 kp4", "lp4 kp4"]
    assert spans[1].get("title") == "log-ratio 0.5, KL 0.107, reward 0"
    assert "".join(span.text for span in spans) == " w0 w1 w2 w3"
    radios = [(i.get("value"), i.get("checked")) for i in root.iter("input")]
    assert radios == [("l", "checked"), ("k", None), ("r", None)]
    text = "".join(root.itertext())
    assert "score 0.5 · 4 tokens · cut off: no stop token" in text
    assert "prompt 1" in text


def test_samples_are_spread_over_time_and_bounded():
    rollouts = [row(step, [0.1] * 4) for step in range(1, 101) for _ in range(5)]
    root = tree(samples_section([run(rollouts=rollouts)]))
    shown = [h.text.removeprefix("Iteration ") for h in root.iter("h4")]
    assert shown == ["1", "21", "41", "60", "80", "100"]
    assert len(list(root.iter("article"))) == 6 * 3
    long = [row(step, [0.1] * 5000) for step in range(1, 7)]
    section = samples_section([run(rollouts=long)])
    assert section.count("title=") == 6 * 300
    assert "… 4700 more tokens" in section


@pytest.mark.parametrize("broken", [{"tokens": 3}, {"kl": [1.0]}, {"score": "x"}, {"tokens": []}])
def test_samples_that_cannot_be_read_are_said(broken):
    section = samples_section([run(rollouts=[row(1, [0.1, 0.2], **broken)])])
    assert "run0: its samples cannot be read." in section
    assert samples_section([run()]) == ""


# --- side by side --------------------------------------------------------------------------------


def test_cost_is_a_median_without_the_first_step(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    rows = [
        {"step": i, "time/step": time, "time/data": 1, "time/tokens_per_second": 12345}
        for i, time in ((1, 99), (2, 2), (3, 2))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "usage.json").write_text(json.dumps({"host_bytes": 3 * 2**29}))
    (one,) = load_runs([folder])
    assert cells(tree(costs([one, run(number=1)]))) == [
        ["run", "tokens/s", "seconds a step", "waiting for data", "MFU",
         "peak memory of a device", "of the host"],
        ["one", "12.3k", "2", "50%", "–", "–", "1.50 GiB"],
        ["run1", "–", "–", "–", "–", "–", "–"],
    ]  # fmt: skip
    assert costs([run()]) == ""


def test_options_that_one_run_lacks_differ():
    one, two = (
        run(options={"a": "1", "b": "2"}),
        run(number=1, options={"b": "2", "run.folder": "x"}),
    )
    assert cells(tree(differences([one, two]))) == [["option", "run0", "run1"], ["a", "1", "–"]]
    assert differences([one, run(number=2)]) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.2 s"), (59.9, "59.9 s"), (61, "1 min"), (3599, "1 h 00 min"), (7260, "2 h 01 min")],
)
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text
