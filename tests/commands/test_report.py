"""Reports: coordinates by hand, a page that parsers accept, and messages about broken input."""

import html.parser
import json
import math
import os
import xml.etree.ElementTree as ET

import pytest

from jaxalign.commands import cli
from jaxalign.commands.report.charts import bar_chart, line_chart, step_ticks, thin, value_ticks
from jaxalign.commands.report.runs import find_runs, make_page, read_metrics, write_report

# The plot is 280 wide from x = 70 and 160 high, from y = 176 (bottom) to 16.
SVG = "{http://www.w3.org/2000/svg}"


def polylines(svg):
    return [line.get("points") for line in ET.fromstring(svg).iter("polyline")]


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


# --- charts --------------------------------------------------------------------------------------


def test_three_points_by_hand():
    svg = line_chart([[(1, 0.0), (2, 10.0), (3, 5.0)]], "loss", "step", "nats")
    # Ticks 0, 5, 10 and 1, 2, 3: thirds of the box at its edges and middle.
    assert polylines(svg) == ["70,176 210,16 350,96"]
    texts = [node.text for node in ET.fromstring(svg).iter("text")]
    assert texts == ["0", "5", "10", "1", "2", "3", "step", "nats"]
    tips = [node.text for node in ET.fromstring(svg).iter("title")]
    assert tips == ["step 1: 0", "step 2: 10", "step 3: 5"]


def test_series_share_the_axes():
    svg = line_chart([[(0, 0.0), (4, 20.0)], [(2, 5.0), (4, 10.0)]], "x", "step", "y")
    assert polylines(svg) == ["70,176 350,16", "210,136 350,96"]
    assert [line.get("class") for line in ET.fromstring(svg).iter("polyline")] == ["s0", "s1"]


def test_what_is_no_number_leaves_a_gap():
    values = [0.0, 5.0, math.nan, 5.0, 10.0, math.inf, 10.0]
    svg = line_chart([list(enumerate(values, start=1))], "x", "step", "y")
    assert [len(line.split()) for line in polylines(svg)] == [2, 2]
    assert len(list(ET.fromstring(svg).iter("circle"))) == 5
    empty = line_chart([[(1, math.nan)]], "x", "step", "y")
    assert polylines(empty) == []
    assert "nan" not in empty


def test_one_point_is_a_dot_in_the_middle():
    circle = next(ET.fromstring(line_chart([[(5, 2.0)]], "x", "step", "y")).iter("circle"))
    # Ticks 1, 1.5, 2, 2.5, 3.
    assert (circle.get("cx"), circle.get("cy")) == ("210", "96")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 5, 10]),
        (0.12, 0.31, [0.1, 0.15, 0.2, 0.25, 0.3, 0.35]),
        (-0.3, 0.9, [-0.5, 0, 0.5, 1]),
        (1000, 4000, [1000, 2000, 3000, 4000]),
        (0, 0, [-1, -0.5, 0, 0.5, 1]),
        (-4, -4, [-6, -5, -4, -3, -2]),
        (1e-7, 3e-7, [1e-7, 1.5e-7, 2e-7, 2.5e-7, 3e-7]),
    ],
)
def test_ticks_are_round_and_cover(low, high, expected):
    assert value_ticks(low, high) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (1, 3, [1, 2, 3]),
        (0, 100, [0, 50, 100]),
        (7, 7, [7]),
        (1, 1000, [500, 1000]),
        (3, 9, [4, 6, 8]),
    ],
)
def test_steps_are_whole(first, last, expected):
    assert step_ticks(first, last) == expected


def test_long_curves_keep_their_spikes():
    points = [(i, math.sin(i / 50)) for i in range(10_000)]
    points[1234], points[7777] = (1234, 9.0), (7777, -9.0)
    points[5000] = (5000, math.nan)
    kept = thin(points)
    assert len(kept) <= 320
    assert kept == sorted(kept)
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert {points[1234], points[7777]} <= set(kept)
    assert 5000 in [x for x, _ in kept]
    assert thin(points[:300]) == points[:300]


# --- the page ------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """Checks that tags nest."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in tags.seen
    return ET.fromstring(page)


def cells(table):
    return [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]


def captions(root):
    return ["".join(node.itertext()) for node in root.iter("figcaption")]


def test_page_of_a_run(tmp_path):
    page = make_page(write_run(tmp_path / "mine", ROWS))
    root = parsed(page)
    assert root.findtext("head/title") == "mine – jaxalign"
    assert cells(next(root.iter("table"))) == [
        ["figure", "before", "after", "step"],
        ["loss/nll", "3", "2.062", "2"],
        ["entropy", "1", "1.5", "2"],
    ]
    # The held-out loss is drawn with the loss; `compiles` is no curve.
    assert captions(root) == [
        "loss last training 2.125held out 2.062",
        "grad_norm last inf",
        "eval/entropy last 1.5",
    ]
    # Loss 2 … 3 over steps 0 … 2, ticks every 0.5 (2.0625 lies below 2.5, so from 2).
    assert [line.get("points") for line in root.iter("polyline")][:2] == [
        "210,96 350,156",
        "70,16 350,166",
    ]
    assert "prefers-color-scheme:dark" in page
    assert '{"jax": "0.10.2"}' in "".join(root.itertext())
    for outside in ("http://", "https://", "url(", "@import"):
        assert outside not in page


def test_a_stopped_run_has_no_after(tmp_path):
    folder = write_run(tmp_path, ROWS[:2])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    root = parsed(make_page(folder))
    assert cells(next(root.iter("table")))[1] == ["loss/nll", "3", "not yet", "0"]
    assert "last line of metrics.jsonl is cut off" in "".join(root.itertext())


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
    page = write_report(folder).read_text(encoding="utf-8")
    root = parsed(page)
    assert "<script" not in page
    tables = [cells(table) for table in root.iter("table")]
    assert tables[0][1] == [bad, "1.000", "2.000"]
    assert tables[1] == [["prompt", "base", "sft"], [bad, "a�b�c", "]]>\n&amp;"]]
    assert f"{bad} last 2" in captions(root)


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
    assert [node.text for node in root.iter("h2")] == ["zeta", "alpha", "mid"]
    assert "ppo, 2 iterations" in [node.text for node in root.iter("p")]


def test_without_config_and_versions(tmp_path):
    folder = write_run(tmp_path, ROWS[1:2])
    (folder / "config.yaml").unlink()
    (folder / "versions.json").unlink()
    content = "".join(parsed(make_page(folder)).itertext())
    assert content.count("The run's folder has none.") == 2
    assert list(read_metrics(folder / "metrics.jsonl").curves) == ["loss", "grad_norm", "compiles"]


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
        make_page(tmp_path)


def test_no_run_there(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"jaxalign report: error: {tmp_path / 'absent'}: no metrics.jsonl")
    assert len(error.splitlines()) == 1


def test_a_summary_of_something_else(tmp_path):
    write_run(tmp_path, ROWS)
    (tmp_path / "summary.json").write_text('{"figures": 3}')
    with pytest.raises(ValueError, match=r"summary.json: not a summary"):
        make_page(tmp_path)


def test_no_points_no_chart():
    with pytest.raises(ValueError, match="no points"):
        line_chart([[]], "loss", "step", "nats")


def test_bars_stand_side_by_side_and_are_as_high_as_their_counts():
    svg = bar_chart([0.0, 1.0, 2.0], [[2, 4], [0, 1]], "scores", "score", "answers")
    bars = [
        {key: float(bar.get(key)) for key in ("x", "width", "height")} | {"of": bar.get("class")}
        for bar in ET.fromstring(svg).iter("rect")
    ]
    assert [bar["of"] for bar in bars] == ["s0", "s0", "s1"]  # a count of 0 has no bar
    first, second, other = bars
    assert second["height"] == pytest.approx(2 * first["height"], abs=0.2)
    assert second["height"] == pytest.approx(4 * other["height"], abs=0.4)
    assert other["x"] == pytest.approx(second["x"] + second["width"], abs=0.02)
    with pytest.raises(ValueError, match=r"chart 'scores': \[1\] bars, 2 bins"):
        bar_chart([0.0, 1.0, 2.0], [[1]], "scores", "score", "answers")


def test_a_broken_evaluation_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "evaluation.json").write_text('{"step": 1, "histogram": 3}\n')
    with pytest.raises(ValueError, match=r"evaluation\.json: not what a run"):
        make_page(tmp_path)


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


def test_values_whose_difference_is_no_number_leave_gaps():
    values = [0.0, 5.0, 1.7e308, 5.0, 10.0, -1.7e308, 10.0]
    svg = line_chart([list(enumerate(values, start=1))], "x", "step", "y")
    assert [len(line.split()) for line in polylines(svg)] == [2, 2]
    alone = line_chart([[(1, 1.7e308), (2, -1.7e308)]], "x", "step", "y")
    assert polylines(alone) == []
    assert "inf" not in alone
    assert "nan" not in alone


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
    """A page, or a ValueError that names the file."""
    run = write_run(tmp_path / "run", ROWS)
    (run / "evaluation.json").write_text(text) if name == "evaluation.json" else None
    (tmp_path / "summary.json").write_text(text) if name == "summary.json" else None
    try:
        made = make_page(tmp_path if name == "summary.json" else run)
    except ValueError as error:
        made = str(error)
    assert name in made or "</html>" in made
