"""Evaluation of reward models by hand: intervals, calibration, histograms, figures by source."""

import math

import numpy as np
import pytest

from jaxalign.rewards import evaluation
from jaxalign.rewards.evaluation import calibration, histogram, wilson

RNG = np.random.default_rng(5)


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [
        # Agresti and Coull 1998 give 0 and 0.161 for 0 of 20; 8 of 10 is in many textbooks.
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
        (8, 10, 0.4902, 0.9433),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_by_table(wins, count, low, high):
    assert wilson(wins, count) == pytest.approx((low, high), abs=1e-4)


def test_wilson_inverts_the_normal_test():
    for wins, count in ((3, 17), (95, 100), (1, 2)):
        share = wins / count
        for p in wilson(wins, count):
            z = abs(share - p) / math.sqrt(p * (1 - p) / count)
            assert z == pytest.approx(evaluation.Z95, rel=1e-6)


def test_calibration_by_hand():
    predicted = np.array([0.05, 0.15, 0.15, 0.95, 1.0, 0.5])
    happened = np.array([0, 1, 0, 1, 1, 0.5])
    error, table = calibration(predicted, happened)
    # Bins 0, 1, 5 and 9: |0 − .05|, |.5 − .15| (two), |.5 − .5|, |1 − .975| (two).
    assert error == pytest.approx((0.05 + 2 * 0.35 + 0 + 2 * 0.025) / 6)
    assert [row["count"] for row in table] == [1, 2, 1, 2]
    assert [(row["from"], row["to"]) for row in table][2] == pytest.approx((0.5, 0.6))
    assert table[1]["observed"] == 0.5
    assert (table[3]["low"], table[3]["high"]) == pytest.approx(wilson(2, 2))


def test_calibrated_predictions_have_low_ece():
    predicted = RNG.uniform(size=20000)
    happened = RNG.uniform(size=20000) < predicted
    assert calibration(predicted, happened)[0] < 0.02
    assert calibration(predicted, np.ones(20000))[0] == pytest.approx(0.5, abs=0.02)
    assert calibration(np.zeros(0), np.zeros(0)) == (0.0, [])


def test_histogram_counts_everything_once_in_common_bins():
    made = histogram({"a": np.array([0.0, 1.0, 1.0]), "b": np.array([10.0])}, bins=10)
    assert len(made["edges"]) == 11
    assert made["counts"]["a"] == [1, 2] + [0] * 8
    assert made["counts"]["b"] == [0] * 9 + [1]


def test_pairs():
    examples = {
        "chosen": np.array([[1.0, 2.0], [3.0, 9.0]], np.float32),
        "rejected": np.array([[0.0, 2.5], [3.0, 0.0]], np.float32),
        "mask": np.array([[True, True], [True, False]]),
        "source": np.array([[0, 1], [1, 0]]),
    }
    figures, details = evaluation.evaluate_pairs(examples, ["ours", "theirs", "empty"])
    assert figures["accuracy"] == pytest.approx(1 / 3)
    assert (figures["accuracy_low"], figures["accuracy_high"]) == pytest.approx(wilson(1, 3))
    # σ(1) won, σ(½) lost, ½ was even.
    won, lost = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-0.5))
    assert figures["ece"] == pytest.approx(((1 - won) + lost + 0) / 3, rel=1e-5)
    assert figures["accuracy/ours"] == 1
    assert figures["accuracy/theirs"] == 0
    assert "accuracy/empty" not in figures
    assert [row["count"] for row in details["sources"]] == [1, 2]
    assert sum(details["histogram"]["counts"]["chosen"]) == 3
    widths = [row["to"] - row["from"] for row in details["calibration"]]
    assert widths == pytest.approx([0.05] * 3)
    assert "count" not in figures


def test_rankings():
    examples = {
        "scores": np.array([[3.0, 1.0, 0.0], [0.0, 1.0, 0.0], [5.0, 5.0, 0.0]], np.float32),
        "ranks": np.array([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 1.0, 0.0]], np.float32),
        "mask": np.array([[True, True, True], [True, True, False], [True, True, False]]),
        "best": np.array([1.0, 0.0, 1.0]),
        "says": np.array([True, True, False]),
        "source": np.array([0, 1, 1]),
    }
    figures, details = evaluation.evaluate_rankings(examples, ["a", "b"])
    assert figures["best"] == 0.5
    assert (figures["best_low"], figures["best_high"]) == pytest.approx(wilson(1, 2))
    assert (figures["best/a"], figures["best/b"]) == (1, 0)
    counts = details["histogram"]["counts"]
    assert sum(counts["best"]) == 4
    assert sum(counts["others"]) == 3


def test_grades():
    grades = RNG.uniform(0, 4, (50, 2))
    scores = grades + RNG.normal(size=(50, 2))
    mask = RNG.random((50, 2)) < 0.7
    source = np.arange(50) % 2
    scores[~mask], grades[~mask] = 99.0, 0.0
    examples = {"scores": scores, "grades": grades, "mask": mask, "source": source}
    figures, details = evaluation.evaluate_grades(examples, ["a", "b"], ["help", "length"])
    for column, name in enumerate(("help", "length")):
        there = mask[:, column]
        expected = np.corrcoef(scores[there, column], grades[there, column])[0, 1]
        assert figures[f"pearson/{name}"] == pytest.approx(expected)
        assert details["attributes"][column]["count"] == there.sum()
    errors = np.square(scores - grades)
    first = mask & (source == 0)[:, None]
    assert figures["mse/a"] == pytest.approx(errors[first].mean())
    constant = examples | {"scores": np.zeros((50, 2))}
    assert evaluation.evaluate_grades(constant, [], ["help", "length"]).figures["pearson/help"] == 0


def test_steps():
    examples = {
        "scores": np.array([[2.0, -1.0, 0.0, 3.0], [-2.0, 0.5, 0.0, 0.0]], np.float32),
        "labels": np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.8, 0.0, 0.0]], np.float32),
        "mask": np.array([[True, True, False, True], [True, True, False, False]]),
    }
    figures, details = evaluation.evaluate_steps(examples, [])
    assert figures["accuracy"] == pytest.approx(4 / 5)
    # Right: 2 found of 2, one too many. Wrong: 2 found of 3.
    assert figures["f1/right"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 0))
    assert figures["f1/wrong"] == pytest.approx(2 * 2 / (2 * 2 + 0 + 1))
    assert sum(row["count"] for row in details["calibration"]) == 5
    assert sum(details["histogram"]["counts"]["wrong"]) == 3
