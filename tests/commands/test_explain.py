"""`explain`: planted faults are found, rows add up to the step, and the run stays as it is."""

import html.parser
import json
import math
import xml.etree.ElementTree as ET

import chatmodel
import jax
import numpy as np
import optax
import pytest
import tiny

from jaxalign import sft as sft_algorithm
from jaxalign.algorithms.state import init_state
from jaxalign.commands import cli
from jaxalign.commands.explain import measure, units
from jaxalign.commands.explain.explain import explain, pieces
from jaxalign.commands.explain.findings import findings
from jaxalign.commands.explain.page import make_page
from jaxalign.commands.explain.rows import Row
from jaxalign.commands.explain.units import Document
from jaxalign.parallel.mesh import make_mesh
from jaxalign.run import loop
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge

pytestmark = pytest.mark.usefixtures("kept_programs")

WRONG_MASK, POISONED, BONUS = 4, 8, 41  # lines of the data, from 1


def contents(folder):
    """All files below a folder, with bytes and times."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def train(algorithm, models, folder, changes=None, **options):
    values = chatmodel.settings(algorithm, models, folder, export=False, **options)
    return loop.train(load_config(algorithm, merge(values, changes or {}))).folder


def conversation(question, answer):
    turns = {"user": question, "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in turns.items()]}


@pytest.fixture(scope="module")
def sft(chat_models, tmp_path_factory):
    """An SFT run whose last batch has a row that trains its prompt, and a poisoned answer."""
    folder = tmp_path_factory.mktemp("sft")
    usual = [conversation(question, "ok") for question in chatmodel.QUESTIONS[:8]]
    last = list(usual)
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nok<|im_end|>"
    last[WRONG_MASK - 1] = {"text": text}
    last[POISONED - 1] = conversation("up", "Q~")
    data = chatmodel.write_rows(folder / "rows.jsonl", [*usual * 11, *last])
    changes = {
        "data": {"train": [data], "shuffle": False, "packing": False},
        "optimizer": {"learning_rate": 1e-2},
    }
    return train("sft", chat_models, folder / "run", changes, steps=12, save_every=5, keep=5)


@pytest.fixture(scope="module")
def last_step(sft):
    before = contents(sft)
    found = explain(sft, 12, show=3)
    assert contents(sft) == before
    return found


def of_kind(explanation, kind):
    return {
        explanation.rows[finding.row].origin: finding.message
        for finding in explanation.findings
        if finding.kind == kind and finding.row is not None
    }


def test_a_replay_from_the_checkpoint_before_has_the_same_bits(last_step):
    assert last_step.start == 10
    assert [step.step for step in last_step.replayed] == [11, 12]
    assert last_step.same
    assert last_step.notes == []
    assert all(step.compared > 8 for step in last_step.replayed)


def test_a_row_with_a_wrong_mask_is_found(last_step):
    found = of_kind(last_step, "mask")
    (origin,) = found
    assert origin.endswith(f"rows.jsonl:{88 + WRONG_MASK}")
    assert "targets are trained, prompt too" in found[origin]


def test_a_poisoned_row_is_found_by_its_loss(last_step):
    found = of_kind(last_step, "loss")
    assert any(origin.endswith(f"rows.jsonl:{88 + POISONED}") for origin in found)
    worst = max(last_step.rows, key=lambda row: row.figures["loss"])
    assert worst.origin.endswith(f"rows.jsonl:{88 + POISONED}")
    # What stands out is shown first.
    assert next(iter(last_step.texts)) in [f.row for f in last_step.findings]


def test_its_rows_add_up_to_the_recorded_loss(last_step, sft):
    recorded = chatmodel.lines(sft)[-1]
    trained = np.array([row.figures["trained"] for row in last_step.rows])
    losses = np.array([row.figures["loss"] for row in last_step.rows])
    assert trained.sum() == recorded["weight/nll"]
    assert (trained * losses).sum() / trained.sum() == pytest.approx(recorded["loss"], rel=1e-5)
    assert sum(row.figures["gradient share"] for row in last_step.rows) == pytest.approx(1)


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def handle_starttag(self, tag, attrs):
        self.seen |= {tag, *(name for name, _ in attrs)}


def test_the_command_writes_a_page_and_values(sft, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["explain", str(sft), "--step", "11", "--rows", "2"]) == 0
    said = capsys.readouterr().out
    assert "step 11, replayed from checkpoint 10: all" in said
    assert "metrics have the recorded bits" in said
    assert "Against step 10:" in said
    assert "⟦ok<|im_end|>⟧" in said
    page = (tmp_path / "run-step-11.html").read_text(encoding="utf-8")
    root = ET.fromstring(page)
    tags = Tags()
    tags.feed(page)
    assert not {"script", "src", "href"} & tags.seen
    for outside in ("http://", "https://", "url(", "@import"):
        assert outside not in page
    shown = [node.text for node in root.iter("span") if (node.get("class") or "").startswith("t")]
    assert {"o", "k", "<|im_end|>"} <= set(shown)
    values = json.loads((tmp_path / "run-step-11.json").read_text(encoding="utf-8"))
    assert values["same_bits"] is True
    assert values["replayed_from"] == 10
    assert values["metrics"]["loss"] == chatmodel.lines(sft)[10]["loss"]
    assert len(values["rows"]) == 8
    assert sum("documents" in row for row in values["rows"]) == 2
    # What a person has is kept.
    assert cli.main(["explain", str(sft), "--step", "11"]) == 2
    assert "run-step-11.html' exists" in capsys.readouterr().err


def test_everything_is_escaped(last_step):
    bad = '<script>alert("&")</script>'
    row = Row(bad, bad, {"loss": math.nan}, last_step.rows[0].documents)
    texts = {0: [[bad] * len(row.documents[0].ids)]}
    page = make_page(last_step._replace(run=bad, notes=[bad], rows=[row], texts=texts))
    ET.fromstring(page)
    assert "<script" not in page


# --- PPO ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ppo(chat_models, tmp_path_factory):
    """A PPO run over a reward that pays one row of the last batch a hundredfold."""
    folder = tmp_path_factory.mktemp("ppo")
    code = "def pay(prompt, completion, row):\n    return row['bonus'] + len(completion) / 10000\n"
    (folder / "pay.py").write_text(code, encoding="utf-8")
    questions = (chatmodel.QUESTIONS * 4)[:48]
    rows = [
        {"prompt": f"{q}{n}"[:4], "bonus": 100.0 if n == BONUS - 1 else 0.0}
        for n, q in enumerate(questions)
    ]
    data = chatmodel.write_rows(folder / "prompts.jsonl", rows)
    changes = {
        "reward_model": None,
        "rewards": [{"kind": "function", "path": f"{folder / 'pay.py'}:pay", "timeout": None}],
        "critic": "policy",
        "data": {"train": [data], "shuffle": False},
        "ppo_epochs": 2,
        "optimizer": {"learning_rate": 1e-2},
    }
    return train("ppo", chat_models, folder / "run", changes, steps=6, save_every=5)


def test_a_reward_that_jumps_is_found_with_its_row(ppo):
    before = contents(ppo)
    found = explain(ppo, 6)
    assert contents(ppo) == before
    assert (found.start, found.same) == (5, True)
    jumps = [finding.message for finding in found.findings if finding.kind == "jump"]
    assert any(message.startswith("objective/scores is 12.5") for message in jumps)
    (origin,) = of_kind(found, "score")
    assert origin.endswith(f"prompts.jsonl:{BONUS}")

    recorded = chatmodel.lines(ppo)[5]
    rows = found.rows
    assert len(rows) == 8
    assert [row.figures["updates"] for row in rows] == [2] * 8
    figures = {name: np.array([row.figures[name] for row in rows]) for name in rows[0].figures}
    assert figures["score"].mean() == pytest.approx(recorded["objective/scores"], rel=1e-5)
    assert figures["kl"].mean() == pytest.approx(recorded["objective/kl"], rel=1e-3, abs=1e-4)
    assert figures["length"].mean() == recorded["response/length"]
    # The last of the two updates is the one that moved away from the rollout.
    assert found.updates[0]["policy/clipfrac_avg"] == 0
    share = figures["clipped"].sum() / figures["length"].sum()
    assert share == pytest.approx(found.updates[1]["policy/clipfrac_avg"], abs=1e-6)
    assert share > 0
    page = make_page(found)
    ET.fromstring(page)
    assert "log_ratio" in page


# --- the other algorithms: their rows' figures are those that the step recorded -------------------

GRPO = {"ppo": {"advantage_estimator": "grpo", "samples": 2, "max_new_tokens": 4}}
SHARED = {"data": {"packing": True, "shared_prefix": True, "length": 64}}
GRPO_MEANS = {"score": "objective/scores", "length": "response/length"}


def same(*names):
    return {name: name for name in names}


@pytest.mark.parametrize(
    ("algorithm", "changes", "means"),
    [
        pytest.param("dpo", {}, same("loss", "rewards/margins", "logps/chosen"), id="dpo"),
        pytest.param(
            *("dpo", SHARED, same("loss", "rewards/margins")), id="shared", marks=pytest.mark.slow
        ),
        pytest.param(
            *("dpo", {"dpo": {"loss_type": "aot"}}, same("rewards/margins")),
            id="aot",
            marks=pytest.mark.slow,
        ),
        pytest.param("reward", {}, same("loss", "margin", "scores/chosen"), id="reward"),
        pytest.param("kto", {}, same("loss"), id="kto"),
        pytest.param("ppo", GRPO, GRPO_MEANS, id="grpo", marks=pytest.mark.slow),
    ],
)
def test_rows_average_to_what_was_recorded(chat_models, tmp_path, algorithm, changes, means):
    folder = train(algorithm, chat_models, tmp_path / "run", changes, steps=2, checkpoint=False)
    found = explain(folder, 2)
    assert (found.start, found.same, found.notes) == (0, True, [])
    recorded = chatmodel.lines(folder)[1]
    assert len(found.rows) >= 8
    for name, metric in means.items():
        values = [row.figures[name] for row in found.rows]
        assert np.mean(values) == pytest.approx(recorded[metric], rel=1e-4, abs=1e-5), name
    assert all(row.origin for row in found.rows)
    assert ("loss" in found.rows[0].figures) == ("loss" in means)
    sides = ["chosen", "rejected"] if algorithm in ("dpo", "reward") else [""]
    for row in found.rows:
        assert [document.name for document in row.documents] == sides
        assert row.figures["gradient"] > 0 or algorithm == "ppo"
    ET.fromstring(make_page(found))


# --- gradients and texts, against plain numpy -----------------------------------------------------


def test_gradients_are_those_of_numpy():
    rng = np.random.default_rng(0)
    documents = [tiny.document(rng, length, prompt=3) for length in (9, 6, 7)]
    batch = tiny.token_batch(tiny.lay(documents, [[0, 1], [2]], 16))
    params = tiny.random_params(tiny.DECODER)
    kind = measure.Kind(tiny.DECODER, sft_algorithm.make_loss, by_row=False)
    mesh = make_mesh(devices=jax.devices()[:1])
    state = init_state(params, optax.sgd(1.0))
    seen = measure.Measure(kind, mesh)(state, batch, units.units_of(batch))

    hidden = tiny.DECODER.apply(params, batch.inputs, batch.positions, batch.segment_ids)
    hidden, head = np.asarray(hidden, np.float64), np.asarray(params["head"]["kernel"], np.float64)
    logits = hidden @ head
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    wrong = probabilities - np.eye(tiny.VOCAB)[batch.targets]
    want = np.linalg.norm(wrong @ head.T, axis=-1) * batch.loss_mask / batch.loss_mask.sum()
    np.testing.assert_allclose(seen.values["gradient"], want, rtol=2e-4, atol=1e-7)
    picked = np.take_along_axis(probabilities, batch.targets[..., None], -1)[..., 0]
    losses = np.where(batch.loss_mask, -np.log(picked), 0)
    np.testing.assert_allclose(seen.values["loss"], losses, rtol=1e-4, atol=1e-6)
    assert seen.loss == pytest.approx(losses.sum() / batch.loss_mask.sum(), rel=1e-5)

    # The second document of the first row, token by token.
    (found,) = units.documents_of(batch, (0, 2), seen.tokens, seen.values, targets=True)
    assert found.ids.tolist() == documents[1]["inputs"].tolist()
    assert found.trained.tolist() == [False] * 3 + [True] * 3
    np.testing.assert_allclose(found.values["loss"][3:], losses[0, 11:14], rtol=1e-4)
    assert np.isnan(found.values["loss"][:3]).all()


def test_a_character_of_several_tokens_is_shown_once():
    tok = chatmodel.make_tokenizer()
    ids = np.array(tok("aé<|im_end|>€")["input_ids"])
    assert pieces(tok, ids) == ["a", "", "é", "<|im_end|>", "", "", "€"]
    assert pieces(tok, ids[:2]) == ["a", "\ufffd"]


# --- what stands out, by hand ---------------------------------------------------------------------


def row(loss, trained=(0, 0, 1, 1), share=0.1, **figures):
    mask = np.array(trained, bool)
    document = Document("", np.arange(len(mask)), mask, {})
    return Row("", "row", {"loss": loss, "gradient share": share} | figures, [document])


def kinds(rows=(), metrics=None, step=9):
    metrics = {step: {}} if metrics is None else metrics
    return [(finding.kind, finding.row) for finding in findings(step, metrics, list(rows))]


def test_ordinary_rows_do_not_stand_out():
    steps = {n: {"loss": 2 + 0.1 * (n % 3), "objective/scores": 0.01 * n} for n in range(1, 10)}
    assert kinds([row(2.0), row(2.4), row(1.8), row(2.1), row(2.2)], steps) == []


def test_what_stands_out():
    usual = [row(2.0), row(2.1), row(1.9), row(2.0)]
    assert kinds([*usual, row(3.1)]) == [("loss", 4)]
    assert kinds([*usual, row(0.1)]) == []  # a small loss is no fault
    assert kinds([*usual, row(math.inf)]) == [("not finite", 4)]
    spoilt = {9: {"loss": "nan"}}
    assert kinds([*usual, row(math.nan)], spoilt) == [("not finite", 4)]
    assert kinds([*usual, row(math.nan)]) == []  # nothing of it counts
    assert kinds([*usual, row(2.0, (0, 0, 0, 0))]) == [("mask", 4)]
    assert kinds([*usual, row(2.0, (0, 1, 1, 1))]) == [("mask", 4)]
    assert kinds([row(2.0, (0, 1, 1, 1))] * 4) == [("mask", None)]
    assert kinds([*usual, row(2.0, share=0.6)]) == [("share", 4)]
    scored = [row(math.nan, score=score) for score in (1.0, 1.1, 0.9, 1.0, -4.0)]
    assert kinds(scored) == [("score", 4)]


def test_a_step_is_compared_with_those_before():
    calm = {n: {"grad_norm": 1.0 + 0.01 * n, "epoch": float(n)} for n in range(1, 9)}
    assert kinds(metrics=calm | {9: {"grad_norm": 1.2, "epoch": 90.0}}) == []
    assert kinds(metrics=calm | {9: {"grad_norm": 4.0}}) == [("jump", None)]
    assert kinds(metrics=calm | {9: {"grad_norm": "nan"}}) == [("not finite", None)]
    assert kinds(metrics={8: {"loss": 1.0}, 9: {"loss": 50.0}}) == []  # too few to tell
    assert kinds(metrics={9: {"loss": "inf", "bad_steps": 1.0}}) == [("left out", None)]
