"""Charts of a report: coordinates by hand, thinning, curves of several runs, the frontier."""

import math
import xml.etree.ElementTree as ET

import pytest

from jaxalign.commands.report.axes import short, step_ticks, value_ticks
from jaxalign.commands.report.charts import bar_chart, line_chart, thin
from jaxalign.commands.report.curves import Line, curve_chart, figure
from jaxalign.commands.report.frontier import Path, best_so_far
from jaxalign.commands.report.names import Name, name_of

# The plot of a plain chart is 280 wide from x = 70 and 160 high, from y = 176 (bottom) to 16; that
# of curves 322 wide from x = 46 and 156 high, from y = 166 to 10.
PLAIN = Name("Loss", "nats", "Results")


def polylines(svg):
    return [line.get("points") for line in ET.fromstring(svg).iter("polyline")]


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


def test_values_whose_difference_is_no_number_leave_gaps():
    values = [0.0, 5.0, 1.7e308, 5.0, 10.0, -1.7e308, 10.0]
    svg = line_chart([list(enumerate(values, start=1))], "x", "step", "y")
    assert [len(line.split()) for line in polylines(svg)] == [2, 2]
    alone = line_chart([[(1, 1.7e308), (2, -1.7e308)]], "x", "step", "y")
    assert polylines(alone) == []
    assert "inf" not in alone
    assert "nan" not in alone


# --- curves of several runs ----------------------------------------------------------------------


def drawn(*lines, most=240):
    return ET.fromstring(curve_chart(PLAIN, lines, "step", most))


def test_runs_are_overlaid_in_their_colours():
    root = drawn(
        Line("a", 0, [(0, 0.0), (4, 20.0)]),
        Line("b", 1, [(2, 5.0), (4, 10.0)]),
        Line("b", 1, [(2, 0.0), (4, 5.0)], held_out=True),
        Line("ninth", 9, [(0, 20.0), (4, 0.0)]),
    )
    groups = [(g.get("class"), g.get("data-name")) for g in root.iter("g")]
    assert groups == [("s0", "a"), ("s1", "b"), ("s1", "b, held out"), ("s1 dash", "ninth")]
    lines = [(line.get("class"), line.get("points")) for line in root.iter("polyline")]
    assert lines == [
        ("main", "46,166 368,10"),
        ("main", "207,127 368,88"),
        ("held", "207,166 368,127"),
        ("main", "46,10 368,166"),
    ]
    # A dot for each held-out figure, none for the steps of training.
    assert [(c.get("cx"), c.get("cy")) for c in root.iter("circle")] == [
        ("207", "166"),
        ("368", "127"),
    ]
    assert root.get("data-axes") == "0 4 0 20"


def test_a_chart_says_what_it_shows():
    label = drawn(Line("a", 0, [(1, 3.0), (2, 1.0), (3, 2.0)]), Line("b", 1, [(1, math.nan)])).get(
        "aria-label"
    )
    assert label == (
        "Loss (nats). a: 3 at step 1, 2 at 3, lowest 1 at 2, highest 3 at 1; b: no finite value."
    )


def test_a_noisy_curve_is_faint_under_its_mean_and_a_smooth_one_is_alone():
    noisy = [(i, i + 10 * (-1) ** i) for i in range(1, 401)]
    root = drawn(Line("a", 0, noisy))
    noise, mean = root.iter("polyline")
    assert (noise.get("class"), mean.get("class")) == ("noise", "main")
    # The mean over 11 of them differs from the slope by at most 10/11; a unit is 156/500 high.
    ticks = [float(x) for x in root.get("data-axes").split()]
    assert ticks == [1, 400, -200, 600]
    for point in mean.get("points").split()[1:-1]:
        x, y = map(float, point.split(","))
        step = 1 + (x - 46) / 322 * 399
        assert (166 - y) / 156 * 800 - 200 == pytest.approx(step, abs=2.5)
    smooth = drawn(Line("a", 0, [(i, i**0.5) for i in range(400)]))
    assert [line.get("class") for line in smooth.iter("polyline")] == ["main"]


def test_a_spike_does_not_flatten_the_rest():
    points = [(i, 1 + i / 1000 + (1e6 if i == 70 else 0)) for i in range(300)]
    root = drawn(Line("a", 0, points))
    high = float(root.get("data-axes").split()[3])
    assert 1.3 <= high <= 2e4
    assert "Spikes up to 1M are cut at the edge." in root.get("aria-label")
    every = [
        float(p.split(",")[1]) for line in root.iter("polyline") for p in line.get("points").split()
    ]
    assert min(every) >= 10
    calm = drawn(Line("a", 0, [(i, float(i % 7)) for i in range(300)]))
    assert "Spikes" not in calm.get("aria-label")


def test_a_long_curve_has_few_points():
    points = [(i, math.sin(i / 9) + i % 3) for i in range(20_000)]
    root = drawn(Line("a", 0, points), most=100)
    assert all(len(line.get("points").split()) <= 104 for line in root.iter("polyline"))


def test_a_figure_has_a_human_name_a_key_and_last_values():
    line = Line("run <1>", 0, [(1, 2.0), (2, 1.23456)])
    root = ET.fromstring(figure(name_of("objective/kl"), "objective/kl", [line], "step", 100))
    caption = root.find("figcaption")
    assert caption.findtext("b") == "KL from the reference"
    assert caption.findtext("code") == "objective/kl"
    assert "1.235" in "".join(caption.itertext())
    five = [Line(f"r{i}", i, [(1, 1.0)]) for i in range(5)]
    many = ET.fromstring(figure(PLAIN, "loss", five, "step", 100))
    assert "r3" not in "".join(many.find("figcaption").itertext())


@pytest.mark.parametrize(
    ("key", "title", "section"),
    [
        ("loss", "Loss", "Results"),
        ("eval/objective/scores", "Score of the answers", "Results"),
        ("rewards/model", "Reward: model", "Results"),
        ("weight/policy", "Counted in policy", "Other metrics"),
        ("time/mfu", "Model FLOPs utilisation", "Throughput"),
        ("my_own/figure", "My own, figure", "Other metrics"),
        ("eval/gsm8k/strict", "Gsm8k, strict", "Results"),
    ],
)
def test_names_for_people(key, title, section):
    assert name_of(key)[::2] == (title, section)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1234"), (12345.0, "12.35k"), (4e9, "4G"), (-2.5e6, "-2.5M"),
     (1.5e-6, "1.5e-06"), (math.inf, "inf"), (3e20, "3e+20")],
)  # fmt: skip
def test_values_are_short(value, text):
    assert short(value) == text


def test_the_frontier_is_the_best_score_within_a_kl():
    one = Path(None, True, [(0.0, 1.0, 0), (2.0, 3.0, 1), (4.0, 2.5, 2)])
    two = Path(None, True, [(1.0, 1.0, 0), (3.0, 2.0, 1), (5.0, 4.0, 2)])
    assert best_so_far([one, two]) == [(0.0, 1.0), (2.0, 3.0), (5.0, 4.0)]
