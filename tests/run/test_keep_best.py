"""`run.keep_best`: which checkpoint is the best, that it is kept, and that export finds it."""

import json
import shutil

import chatmodel
import pytest

from jaxalign.commands import cli
from jaxalign.run import loop
from jaxalign.run.best import BestStep, best_of_run, parse_metric
from jaxalign.run.config.runs import load_config

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.mark.parametrize(
    ("text", "name", "lower"),
    [
        ("eval/loss/nll", "loss/nll", True),
        ("loss/nll/chat", "loss/nll/chat", True),
        ("eval/objective/kl", "objective/kl", True),
        ("eval/accuracy", "accuracy", False),
        ("eval/rewards/margins", "rewards/margins", False),
        ("eval/lossless", "lossless", False),  # another word
        ("eval/my_error", "my_error", True),
        ("eval/response/length:min", "response/length", True),
        ("eval/loss/x:max", "loss/x", False),
    ],
)
def test_the_name_says_what_is_better(text, name, lower):
    assert parse_metric(text) == (name, lower)


@pytest.mark.parametrize("text", ["", "eval/", "eval/loss:up", "eval/loss:"])
def test_other_texts_are_errors(text):
    with pytest.raises(ValueError, match=r"run\.keep_best=.*eval/loss/nll"):
        parse_metric(text)


def test_the_first_of_equal_values_stays_and_nan_is_never_the_best():
    best = BestStep("eval/loss")
    for step, value in ((1, float("nan")), (2, 3.0), (3, 2.0), (4, float("nan")), (5, 2.0)):
        best.add(step, {"loss": value})
    assert (best.step, best.value) == (3, 2.0)
    best = BestStep("eval/accuracy")
    for step, value in ((1, 0.5), (2, 0.75), (3, 0.625)):
        best.add(step, {"accuracy": value})
    assert best.step == 2
    assert not BestStep(None).is_better({"loss": 0.0})
    with pytest.raises(ValueError, match=r"eval/loss: .*held-out figures eval/accuracy, eval/kl"):
        BestStep("eval/loss").is_better({"kl": 1.0, "accuracy": 1.0})


def test_a_resumed_run_counts_the_checkpoints_that_are_there():
    figures = {2: {"loss": 1.0}, 4: {"loss": 2.0}, 6: {"loss": 3.0}, 8: {"other": 0.0}}
    best = BestStep("loss")
    best.resume(figures, [4, 6, 8, 10])
    assert (best.step, best.value) == (4, 2.0)


@pytest.fixture(scope="module")
def worse_and_worse(chat_models, tmp_path_factory):
    """A run of six steps whose loss on held-out answers grows from the first evaluation on."""
    folder = tmp_path_factory.mktemp("best") / "run"
    values = chatmodel.settings(
        "sft", chat_models, folder, steps=6, eval_every=1, save_every=1, keep_best="eval/loss/nll"
    )
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "~{}~"}]}
        for q in chatmodel.QUESTIONS[:4]
    ]
    values["data"]["eval"] = [chatmodel.write_rows(folder.parent / "held.jsonl", rows)]
    values["optimizer"]["learning_rate"] = 0.05
    return loop.train(load_config("sft", values))


def best_in(folder):
    """By hand: the step with the lowest held-out loss after the start."""
    rows = [row for row in chatmodel.lines(folder) if "eval/loss/nll" in row and row["step"]]
    return min(rows, key=lambda row: row["eval/loss/nll"])["step"]


def checkpoints(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def test_the_best_checkpoint_is_kept_beside_the_newest(worse_and_worse):
    best = best_in(worse_and_worse.folder)
    assert best < 4  # else the newest two hold it anyway
    assert worse_and_worse.best == best
    assert checkpoints(worse_and_worse.folder) == [best, 5, 6]


def test_it_survives_a_resume_and_is_exported(worse_and_worse, tmp_path, capsys):
    folder, best = tmp_path / "run", best_in(worse_and_worse.folder)
    shutil.copytree(worse_and_worse.folder, folder)
    shutil.rmtree(folder / "checkpoints/6")
    options = [f"run.folder={folder}", "run.resume=true", "run.steps=7", "run.save_every=0"]
    result = loop.train(load_config("sft", worse_and_worse.folder / "config.yaml", options))
    assert checkpoints(folder) == [best, 5, 7]  # 6 was not saved again
    assert result.best == best
    value = next(row["eval/loss/nll"] for row in chatmodel.lines(folder)
                 if row["step"] == best and "eval/loss/nll" in row)  # fmt: skip
    said = f"best by eval/loss/nll (lower is better): {value:.6g} at step {best}; jaxalign export"
    assert said in capsys.readouterr().out
    for name, given in (("best", ["--best"]), ("step", ["--step", str(best)]), ("newest", [])):
        assert cli.main(["export", str(folder), "--out", str(tmp_path / name), *given]) == 0
    wanted = chatmodel.weights(tmp_path / "step")
    assert chatmodel.weights(tmp_path / "best") == wanted != chatmodel.weights(tmp_path / "newest")


def test_a_better_evaluation_is_saved_whatever_save_every_says(worse_and_worse, tmp_path):
    """Under `:max` every evaluation of this run is better than the one before."""
    options = [f"run.folder={tmp_path / 'run'}", "run.keep_best=eval/loss/nll:max", "run.steps=4"]
    options += ["run.save_every=0", "run.save_minutes=null", "run.keep=1", "run.export=false"]
    result = loop.train(load_config("sft", worse_and_worse.folder / "config.yaml", options))
    rows = [row for row in chatmodel.lines(tmp_path / "run") if "eval/loss/nll" in row]
    values = {row["step"]: row["eval/loss/nll"] for row in rows if row["step"]}
    assert result.best == max(values, key=values.get)
    assert checkpoints(tmp_path / "run") == sorted({result.best, 4})


def test_export_of_a_run_without_a_best_one_says_so(worse_and_worse, tmp_path):
    with pytest.raises(ValueError, match=r"runs with run\.keep_best.*there are: 3, 5"):
        best_of_run(worse_and_worse.folder, None, [5, 3])
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    with pytest.raises(ValueError, match=r"none of its checkpoints \(there are: 1\)"):
        best_of_run(tmp_path, "eval/loss", [1])


def test_a_figure_that_is_not_measured_is_an_error_before_the_first_step(worse_and_worse, tmp_path):
    options = [f"run.folder={tmp_path / 'run'}", "run.keep_best=eval/accuracy"]
    with pytest.raises(ValueError, match=r"run\.keep_best=eval/accuracy: .*eval/loss/nll"):
        loop.train(load_config("sft", worse_and_worse.folder / "config.yaml", options))
    assert [row["step"] for row in chatmodel.lines(tmp_path / "run")] == [0]
