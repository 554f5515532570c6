"""A held-out figure that no longer gets better ends the run, and a resumed one too."""

import math

import chatmodel
import pytest

from jaxalign.run import loop
from jaxalign.run.config.early_stopping import EarlyStopping
from jaxalign.run.config.runs import load_config
from jaxalign.run.early_stopping import EarlyStopper

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.mark.parametrize(
    ("options", "values", "ends_at"),
    [
        ({"patience": 2}, [3.0, 2.0, 2.0, 1.9, 1.95, 1.9], 5),
        ({"patience": 1}, [3.0, 2.0, 2.0], 2),
        ({"patience": 2, "min_delta": 0.5}, [3.0, 2.4, 2.0, 1.95], 3),
        ({"patience": 2, "mode": "max"}, [0.5, 0.7, 0.6, 0.7, 0.9], 3),
        ({"patience": 2}, [math.nan, 2.0, math.nan, 3.0, 1.0], 3),
        ({"patience": 9}, [3.0, 4.0, 5.0], None),
    ],
    ids=["min", "at once", "delta", "max", "nan", "patient"],
)
def test_it_ends_after_so_many_evaluations_without_a_better_one(options, values, ends_at):
    stopper = EarlyStopper(EarlyStopping(metric="eval/x", **options))
    ended = None
    for step, value in enumerate(values):
        # Every evaluation of a resumed run goes on from what the checkpoint says.
        stopper = EarlyStopper(EarlyStopping(metric="x", **options), stopper.state())
        stopper.add(step, {"x": value, "y": 0.0})
        if stopper.ends and ended is None:
            ended = step
    assert ended == ends_at


def test_without_the_option_it_never_ends():
    stopper = EarlyStopper(None)
    for step in range(9):
        stopper.add(step, {})
    assert not stopper.ends


def test_a_figure_that_is_not_measured_is_named():
    stopper = EarlyStopper(EarlyStopping(metric="eval/loss"))
    with pytest.raises(ValueError, match=r"'eval/loss': wanted one of .* accuracy, loss/nll"):
        stopper.add(0, {"loss/nll": 1.0, "accuracy": 0.5})


def test_a_run_ends_early_is_exported_and_stays_ended(chat_models, tmp_path, capsys):
    """At a rate of 0 nothing gets better: the start is the best, and 2 evaluations follow."""
    values = chatmodel.settings("sft", chat_models, tmp_path / "run", steps=9, eval_every=1)
    held_out = chatmodel.write_rows(tmp_path / "held.jsonl", chatmodel.CONVERSATIONS[:3])
    values["data"]["eval"] = [held_out]
    values["optimizer"]["learning_rate"] = 0.0
    values["run"]["early_stopping"] = {"metric": "eval/loss/nll", "patience": 2}
    result = loop.train(load_config("sft", values))
    rows = chatmodel.lines(result.folder)
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2]
    assert "eval/loss/nll has not been better than" in capsys.readouterr().out
    assert chatmodel.weights(result.model)
    assert [path.name for path in (result.folder / "checkpoints").iterdir()] == ["2"]
    again = loop.train(load_config("sft", values, ["run.resume=true", "run.export=false"]))
    assert again.history == []
    assert chatmodel.lines(result.folder) == rows
    # With more patience it goes on.
    more = ["run.resume=true", "run.export=false", "run.early_stopping.patience=3"]
    assert len(loop.train(load_config("sft", values, more)).history) == 1
