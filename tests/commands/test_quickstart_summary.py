"""The quickstart's summary: what got worse, sentences for people, the page with marked words."""

import json
import pathlib
import xml.etree.ElementTree as ET

import pytest

from jaxalign.commands.quickstart import story
from jaxalign.commands.quickstart.judge import Rate
from jaxalign.commands.quickstart.summary import make_page, what_got_worse
from jaxalign.commands.report.quickstart import changed_words, summary_sections
from jaxalign.run.loop import Result


def form(warm, answers, repeats):
    return {"warm": warm, "answers": answers, "repeats": repeats}


def test_what_got_worse_names_each_thing_and_the_share():
    forms = {
        "sft": form(0.3, 1.0, 0.0),
        "ppo": form(1.0, 0.75, 0.125),
        "dpo": form(0.9, 1.0, 0.0),
    }
    content = {"sft": 10.0, "ppo": 6.25, "dpo": 10.5}
    wins = {"ppo_vs_sft": Rate.of(18, 24), "dpo_vs_sft": Rate.of(24, 24)}
    assert what_got_worse(forms, content, wins) == [
        "PPO: 75% of the answers still answer, after SFT 100%.",
        "PPO: 12% of the answers say a sentence twice, after SFT 0%.",
        "PPO: without its courtesies an answer has 6.2 words, after SFT 10.0.",
        "PPO: in 25% of the prompts the judge prefers the SFT answer.",
        "Nothing here measures whether an answer is true; small models are often wrong.",
    ]


def result(before, after, history):
    return Result(pathlib.Path("run"), None, before, after, history, 1.0)


def test_stages_say_what_their_figures_mean():
    told = story.sft(result({"loss/nll": 3.0}, {"loss/nll": 2.0}, []))
    assert "from 3.00 to 2.00 nats a token: each of their words is 2.7 times as likely" in told
    assert "no held-out conversations" in story.sft(result({}, {}, []))
    assert "90% of 20 held-out pairs right" in story.judge(Rate.of(18, 20))
    assert "ranks 88% of the held-out pairs" in story.reward(result({}, {"accuracy": 0.875}, []))
    history = [
        {"objective/scores": -1.0, "objective/kl": 0.0},
        {"objective/scores": 2.0, "objective/kl": 3.0},
    ]
    told = story.ppo(result({}, {"objective/kl": 3.5}, history), 7, "its KL came to 4.1 nats")
    assert "from -1.00 to 2.00 on training prompts" in told
    assert "; it ended after 2 of 7 iterations, since its KL came to 4.1 nats." in told
    assert "Its answers are now 3.5 nats from the SFT model's" in told
    assert "ended" not in story.ppo(result({}, {}, history), 2, "")
    last = {"rewards/accuracies": 0.75, "rewards/margins": 1.25}
    assert "in 75% of pairs that it had not seen, by 1.25 nats" in story.dpo(result({}, {}, [last]))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("Sew it.", "Sew it.", [("Sew it.", False)]),
        ("Cut it.", "Of course! Cut it.", [("Of course! ", True), ("Cut it.", False)]),
        ("a b c", "a x c d", [("a ", False), ("x ", True), ("c d", True)]),
        ("", "new", [("new", True)]),
        ("gone", "", []),
        ("看瓜脐", "好！看瓜", [("好！", True), ("看瓜", False)]),
    ],
)  # fmt: skip
def test_changed_words(before, after, expected):
    found = changed_words(before, after)
    assert "".join(piece for piece, _ in found) == after
    merged = []
    for piece, new in found:
        if merged and merged[-1][1] == new:
            merged[-1] = (merged[-1][0] + piece, new)
        else:
            merged.append((piece, new))
    joined = []
    for piece, new in expected:
        if joined and joined[-1][1] == new:
            joined[-1] = (joined[-1][0] + piece, new)
        else:
            joined.append((piece, new))
    assert merged == joined


SUMMARY = {
    "model": "models/small.gguf",
    "language": "en",
    "figures": [
        {"stage": "sft", "figure": "SFT loss", "before": 3.5, "after": 2.5},
        {"stage": "reward", "figure": "pairs ranked right", "before": None, "after": 0.9},
    ],
    "judge": {"accuracy": Rate.of(45, 48)._asdict(), "by_kind": {"cold": [16, 16]}},
    "win_rates": {"ppo_vs_sft": Rate.of(21, 24)._asdict()},
    "forms": {"sft": form(0.25, 1.0, 0.0), "ppo": form(1.0, 0.96, 0.0)},
    "kl": 2.34,
    "length": {"sft": 14.0, "ppo": 18.5},
    "worse": ["PPO: longer.", "Nothing here measures truth."],
    "ppo": [{"iteration": 1, "objective/scores": 1.5, "objective/kl": 0.0}],
    "ppo_stopped": "the judge said so",
    "answers": [{"prompt": "Hem?", "base": "A & B.", "sft": "Sew it.", "ppo": "Sure! Sew it."}],
    "seconds": {"sft": 12.3, "total": 200.4},
    "cpu_seconds": {"total": 388.8},
    "peak_gib": 2.49,
}


def test_the_page_has_every_figure_and_answer():
    page = make_page(SUMMARY)
    for line in (
        "| SFT loss | 3.500 | 2.500 |",
        "| pairs ranked right | – | 0.900 |",
        "| ppo against sft | 88% | 69% to 96% |",
        "| ppo | 100% | 96% | 0% | 18.5 |",
        "What got worse: PPO: longer. Nothing here measures truth.",
        "it ended early, since the judge said so:",
        "| 1 | 1.500 | – | 0.000 | – | – | – |",
        "- ppo: Sure! Sew it.",
        "Seconds: sft 12, total 200; processor seconds 389; peak memory 2.5 GiB.",
    ):
        assert line in page, line


def test_the_report_marks_changed_words(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(SUMMARY), encoding="utf-8")
    root = ET.fromstring(f"<div>{summary_sections(path)}</div>")
    text = "".join(root.itertext())
    assert "PPO is 2.3 nats an answer from the SFT model" in text
    assert "What got worse: PPO: longer." in text
    assert [mark.text for mark in root.iter("mark")] == ["Sew it.", "Sure! "]
    cells = [cell.text for cell in next(root.iter("table")).iter("td")]
    assert cells == ["SFT loss", "3.500", "2.500", "pairs ranked right", "not measured", "0.900"]
