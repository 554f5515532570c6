"""Reports: a page that parsers accept, of sound, running and damaged folders, written over none."""

import base64
import hashlib
import html.parser
import itertools
import json
import os
import re
import xml.etree.ElementTree as ET

import pytest

from jaxalign.commands import cli
from jaxalign.commands.report.runs import find_runs, make_page, read_metrics, write_report


def write_run(folder, rows, config="sft: {log_entropy: false}\n"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    (folder / "versions.json").write_text('{"jax": "0.10.2"}\n', encoding="utf-8")
    return folder


ROWS = [
    {"step": 0, "eval/loss/nll": 3.0, "eval/entropy": 1.0},
    {"step": 1, "loss": 2.5, "grad_norm": 1.25, "compiles": 1},
    {"step": 2, "loss": 2.125, "grad_norm": "inf", "compiles": 1},
    {"step": 2, "eval/loss/nll": 2.0625, "eval/entropy": 1.5},
]


# --- the page ------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """Checks that tags nest, and keeps what could run or load something."""

    def __init__(self):
        super().__init__()
        self.open, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.outside += [
            (tag, name, value)
            for name, value in attrs
            if name in ("src", "srcset", "style")
            or name.startswith("on")
            or (name == "href" and not value.startswith("#"))
        ]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.outside == []
    return ET.fromstring(page)


def cells(table):
    return [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]


def table(root, label):
    """The table of a region."""
    (found,) = [div for div in root.iter("div") if div.get("aria-label") == label]
    return cells(found)


def words(root):
    return "".join(root.find("body/main").itertext())


def captions(root):
    return [node.findtext("b") for node in root.iter("figcaption")]


def test_page_of_a_run(tmp_path):
    page = make_page(write_run(tmp_path / "mine", ROWS))
    root = parsed(page)
    assert root.findtext("head/title") == "mine – jaxalign"
    assert table(root, "overview of the runs")[1][:4] == [
        "mine", "SFT", "2 steps", "held-out loss 3 → 2.06 nats a token"
    ]  # fmt: skip
    assert table(root, "held-out figures of mine") == [
        ["figure", "key", "before", "after", "step"],
        ["Loss: nll", "loss/nll", "3", "2.062", "2"],
        ["Entropy", "entropy", "1", "1.5", "2"],
    ]
    # The held-out loss is drawn with the loss; `compiles` is no curve.
    assert captions(root) == ["Loss", "Entropy", "Gradient norm"]
    # Loss 2 … 3 over steps 0 … 2, ticks every 0.5 (2.0625 lies below 2.5, so from 2).
    lines = [(line.get("class"), line.get("points")) for line in root.iter("polyline")]
    assert lines[:2] == [("main", "207,88 368,146.5"), ("held", "46,10 368,156.2")]
    assert table(root, "all metrics as a table")[1] == [
        "Loss", "loss", "mine", "2.5", "2.125", "2.125", "2.5"
    ]  # fmt: skip
    assert '{"jax": "0.10.2"}' in words(root)
    assert "prefers-color-scheme:dark" in page
    for outside in ("http://", "https://", "url(", "@import"):
        assert outside not in page


def test_only_its_own_style_and_script_may_run(tmp_path):
    page = make_page(write_run(tmp_path / "mine", ROWS))
    root = ET.fromstring(page)
    (policy,) = [m.get("content") for m in root.iter("meta") if m.get("http-equiv")]
    assert policy.startswith("default-src 'none'; ")
    for kind in ("style", "script"):
        (content,) = [node.text for node in root.iter(kind)]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
        assert f"<{kind}>{content}</{kind}>" in page  # nothing in it had to be escaped


def test_every_chart_and_control_has_a_label(tmp_path):
    root = ET.fromstring(make_page([write_run(tmp_path / name, ROWS) for name in "ab"]))
    charts = list(root.iter("svg"))
    assert charts
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in charts)
    assert all(div.get("aria-label") for div in root.iter("div") if div.get("tabindex"))
    anchors = {node.get("id") for node in root.iter() if node.get("id")}
    assert {a.get("href")[1:] for a in root.iter("a")} <= anchors
    levels = [int(n.tag[1]) for n in root.iter() if re.fullmatch("h[1-6]", n.tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_several_runs_are_compared(tmp_path):
    for name, rate, loss in (("a", 1e-3, 2.5), ("b", 1e-4, 3.5)):
        rows = [row | {"loss": loss} if "loss" in row else row for row in ROWS]
        config = (
            f"sft: {{}}\noptimizer: {{learning_rate: {rate}, b1: 0.9}}\nrun: {{folder: {name}}}\n"
        )
        write_run(tmp_path / name, rows, config)
    root = parsed(make_page([tmp_path / "a", tmp_path / "b"]))
    assert root.findtext("head/title") == "2 runs – jaxalign"
    assert table(root, "options that differ") == [
        ["option", "a", "b"],
        ["optimizer.learning_rate", "0.001", "0.0001"],
    ]
    assert captions(root) == ["Loss", "Entropy", "Gradient norm"]  # a chart each, not two
    first = next(root.iter("svg"))
    assert [g.get("data-name") for g in first.iter("g")] == ["a", "a, held out", "b", "b, held out"]
    buttons = {b.get("value"): "".join(b.itertext()) for b in root.iter("button")}
    assert buttons == {"0": "a", "1": "b"}


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / name / "run", ROWS) for name in ("x", "y")]
    root = parsed(make_page(folders))
    assert [row[0] for row in table(root, "overview of the runs")[1:]] == ["x/run", "y/run"]
    assert words(root).count("The configurations are the same, but for the folders.") == 1


def test_too_many_runs_are_counted(tmp_path):
    for number in range(26):
        write_run(tmp_path / f"{number:02d}", ROWS[1:2])
    root = parsed(make_page(tmp_path))
    assert len(table(root, "overview of the runs")) == 1 + 24
    assert "2 more runs are left out: a page takes 24." in words(root)


def test_the_page_of_a_long_run_is_no_larger(tmp_path):
    def rows(count):
        return [
            {"step": i} | {f"metric_{n}": (i * n * 7919 % 101) / 101 for n in range(12)}
            for i in range(1, count + 1)
        ]

    sizes = [
        len(make_page(write_run(tmp_path / f"run{n}", rows(n))).encode()) for n in (1000, 3000)
    ]
    assert sizes[1] < 1.1 * sizes[0] < 120_000


# --- running and damaged folders -----------------------------------------------------------------


def test_a_stopped_run_has_no_after(tmp_path):
    folder = write_run(tmp_path, ROWS[:2])
    (folder / "run.json").write_text('{"total": 5}')
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    root = parsed(make_page(folder))
    assert table(root, f"held-out figures of {tmp_path.name}")[1][2:4] == ["3", "not yet"]
    assert "The last line of metrics.jsonl is cut off and left out." in words(root)
    assert "The run stopped at step 1 of 5.Go on with run.resume=auto" in words(root)


def test_a_running_run_says_so(tmp_path):
    folder = write_run(tmp_path / "mine", ROWS[:2])
    (folder / "run.json").write_text('{"total": 5}')
    (folder / ".lock").write_text("{}")
    states = [table(parsed(make_page(folder)), "overview of the runs")[1][2]]
    os.utime(folder / ".lock", (1, 1))  # nobody has renewed it since 1970
    states.append(table(parsed(make_page(folder)), "overview of the runs")[1][2])
    (folder / "model").mkdir()
    states.append(table(parsed(make_page(folder)), "overview of the runs")[1][2])
    (folder / "run.json").write_text('{"total": 1}')
    states.append(table(parsed(make_page(folder)), "overview of the runs")[1][2])
    assert states == [
        "running, step 1 of 5",
        "stopped at step 1 of 5",
        "ended early, at step 1 of 5",
        "finished",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "metrics.jsonl has no metrics yet"),
        ('{"step": 1}\n', "metrics.jsonl has no metrics yet"),
        ('{"step": 1, "lo', "cut off and left out.metrics.jsonl has no metrics yet"),
        ('{"loss": 1}\n{"step": 1, "loss": 4}\n', "1 damaged lines of metrics.jsonl are"),
        ('{"step": 1, "loss": 2}\n[3]\nx\n{"step": 3, "loss": 9}\n', "are left out: 2, 3."),
    ],
)  # fmt: skip
def test_damaged_metrics_are_shown_as_far_as_they_go(text, told, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(text)
    root = parsed(make_page(tmp_path))
    assert told in words(root)
    assert "config.yaml is missing." in words(root)
    assert ("There are no curves yet." in words(root)) == ("no metrics yet" in told)


@pytest.mark.parametrize("name", ["config.yaml", "versions.json", "run.json", "evaluation.json"])
def test_other_damaged_files_are_named(name, tmp_path):
    folder = write_run(tmp_path / "mine", ROWS)
    (folder / name).write_text("[1, 2")
    root = parsed(make_page(folder))
    assert f"{name} cannot be read: " in words(root)
    assert captions(root)[0] == "Loss"


def test_a_run_that_has_just_begun(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "run.json").write_text('{"total": 5}')
    root = parsed(make_page(folder))
    assert "metrics.jsonl is missing: no step is done yet" in words(root)
    assert table(root, "overview of the runs")[1][2] == "stopped at step 0 of 5"


def test_everything_is_escaped(tmp_path):
    bad = '<script>alert("&")</script>'
    folder = write_run(
        tmp_path / "a&b",
        [{"step": 1, "loss": 1.0, bad: 2.0}],
        f"run: {{folder: '{bad}\x85'}}\n",
    )
    summary = {
        "figures": [{"stage": "sft", "figure": bad, "before": 1.0, "after": 2.0}],
        "answers": [{"prompt": bad, "base": "a\x00b\ud800c", "sft": "]]>\n&amp;"}],
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    rollout = {"step": 1, "prompt": bad, "score": 1.0, "tokens": [bad], "kl": [1.0]}
    (folder / "rollouts.jsonl").write_text(json.dumps(rollout) + "\n", encoding="utf-8")
    page = write_report(folder).read_text(encoding="utf-8")
    root = parsed(page)
    assert page.count("<script") == 1
    assert table(root, "held-out figures")[1] == [bad, "1.000", "2.000"]
    assert table(root, "answers") == [["prompt", "base", "sft"], [bad, "a�b�c", "]]>\n&amp;"]]
    assert bad in [node.findtext("code") for node in root.iter("figcaption")]
    assert [node.text for node in root.iter("span") if node.get("title")] == [bad]


def test_a_pipeline_shows_its_stages_in_order(tmp_path, capsys):
    for age, name in enumerate(["zeta", "alpha", "mid"]):
        folder = write_run(tmp_path / name, ROWS, "ppo: {}\n" if name == "mid" else "sft: {}\n")
        os.utime(folder / "config.yaml", (1000 + age, 1000 + age))
    (tmp_path / "alpha" / "model").mkdir()
    assert [run.name for run in find_runs(tmp_path)] == ["zeta", "alpha", "mid"]
    out = tmp_path / "pages" / "all.html"
    assert cli.main(["report", str(tmp_path), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    root = parsed(out.read_text(encoding="utf-8"))
    assert [row[:2] for row in table(root, "overview of the runs")[1:]] == [
        ["zeta", "SFT"], ["alpha", "SFT"], ["mid", "PPO"]
    ]  # fmt: skip
    titles = [node.text for node in root.iter("h2")]
    assert titles == [
        "What stands out",
        "SFT",
        "PPO",
        "Throughput and memory",
        "Configuration",
        "Tables",
    ]


def test_without_config_and_versions(tmp_path):
    folder = write_run(tmp_path, ROWS[1:2])
    (folder / "config.yaml").unlink()
    (folder / "versions.json").unlink()
    content = words(parsed(make_page(folder)))
    assert content.count("the run's folder has none.") == 2
    assert list(read_metrics(folder / "metrics.jsonl").curves) == ["loss", "grad_norm", "compiles"]


# --- where it is written -------------------------------------------------------------------------


def test_an_earlier_report_is_replaced_and_nothing_else(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = (str(write_run(tmp_path / name, ROWS)) for name in ("one", "two"))
    assert cli.main(["report", one]) == 0
    assert cli.main(["report", one]) == 0
    assert cli.main(["report", one, two]) == 0  # of several runs, here
    assert "<title>2 runs" in (tmp_path / "report.html").read_text(encoding="utf-8")
    mine = tmp_path / "mine.html"
    mine.write_text("<p>my notes on jaxalign report</p>")
    capsys.readouterr()
    assert cli.main(["report", one, "--out", str(mine)]) == 2
    error = capsys.readouterr().err
    assert f"{mine} is there already and is no page of `jaxalign report`" in error
    assert "another file with --out, remove it first, or replace it with --overwrite" in error
    assert mine.read_text() == "<p>my notes on jaxalign report</p>"
    assert cli.main(["report", one, "--out", str(tmp_path)]) == 2
    assert "is a folder; give a file" in capsys.readouterr().err
    assert cli.main(["report", one, "--out", str(mine), "--overwrite"]) == 0
    assert "<title>one" in mine.read_text(encoding="utf-8")


# --- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no metrics in it yet"),
        ('{"step": 1}\n', "no metrics in it yet"),
        ('{"step": 1, "lo', "no metrics in it yet"),
        ('{"loss": 1}\n{"step": 1}\n', r"metrics.jsonl:1: wanted a JSON object of numbers"),
        ('{"step": 1, "loss": 2}\n[3]\n{"step": 3}\n', r"metrics.jsonl:2: wanted .* got '\[3\]'"),
        ('{"step": 1, "loss": "high"}\n{"step": 2}\n', r"metrics.jsonl:1: wanted"),
    ],
)
def test_broken_metrics(text, message, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path / "metrics.jsonl")


def test_no_run_there(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"jaxalign report: error: {tmp_path / 'absent'}: no metrics.jsonl")
    assert len(error.splitlines()) == 1


def test_a_summary_and_an_evaluation_of_something_else_are_named(tmp_path):
    write_run(tmp_path, ROWS)
    (tmp_path / "summary.json").write_text('{"figures": 3}')
    (tmp_path / "evaluation.json").write_text('{"step": 1, "histogram": 3}')
    root = parsed(make_page(tmp_path))
    assert "summary.json: not a summary as `jaxalign quickstart` writes it" in words(root)
    assert "evaluation.json is damaged: not what a run of `jaxalign reward` writes" in words(root)


# --- hostile files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"step": ' + "9" * 400 + "}",
        '{"step": Infinity, "loss": 1}',
        '{"step": "nan", "loss": 1}',
        '{"step": 1, "loss": ' + "9" * 400 + "}",
        '{"step": 1, "loss": {"a": 1}}',
        "[1]",
    ],
)
def test_metrics_beyond_the_bounds(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + '\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: wanted a JSON object of numbers"):
        read_metrics(path)


@pytest.mark.parametrize("name", ["evaluation.json", "summary.json"])
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"step": ' + "9" * 400 + "}",
        '{"step": 1, "calibration": 3, "objective": "pairs"}',
        '{"step": 1, "histogram": {"edges": [0, 1e308, -1e308], "counts": {"a": [1, 2]}}}',
        '{"step": 1, "histogram": {"edges": [0, 0], "counts": {"a": [NaN]}}}',
        '{"step": 1, "histogram": {"edges": [], "counts": {}}}',
        '{"step": 1, "sources": [[]], "figures": [], "answers": [[]]}',
        '{"step": 1, "sources": [{"a": 1}, {"b": 1}], "figures": [[]]}',
    ],
)
def test_evaluations_and_summaries_beyond_the_bounds(tmp_path, name, text):
    """A page, which says that the file is damaged if nothing can be made of it."""
    run = write_run(tmp_path / "run", ROWS)
    (run / "evaluation.json").write_text(text) if name == "evaluation.json" else None
    (tmp_path / "summary.json").write_text(text) if name == "summary.json" else None
    root = parsed(make_page(tmp_path if name == "summary.json" else run))
    assert captions(root)[0] == "Loss" or name in words(root)
