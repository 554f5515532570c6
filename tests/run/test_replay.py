"""Replays: the options of then, what has changed since, read-only stores; and `verify`."""

import json
import math
import shutil

import chatmodel
import pytest

from jaxalign.commands import cli
from jaxalign.commands.verify import verify
from jaxalign.run import loop
from jaxalign.run.checkpoint import Checkpoints
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge
from jaxalign.run.lock import LOCK, FolderLock
from jaxalign.run.past import read_past
from jaxalign.run.replay import open_replay

pytestmark = pytest.mark.usefixtures("kept_programs")

RATE = {"optimizer": {"learning_rate": 1e-2}}


def train(models, folder, changes=None, **options):
    values = chatmodel.settings("sft", models, folder, export=False, **options)
    return loop.train(load_config("sft", merge(values, changes or {}))).folder


@pytest.fixture(scope="module")
def made(chat_models, tmp_path_factory):
    """Four steps, and from the second on a larger learning rate; all checkpoints are kept."""
    folder = tmp_path_factory.mktemp("replay") / "run"
    options = {"save_every": 1, "keep": 9}
    train(chat_models, folder, steps=2, **options)
    train(chat_models, folder, RATE, steps=4, resume=True, allow_changes=True, **options)
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy, whose files may be changed."""
    return shutil.copytree(made, tmp_path / "run")


def rewrite(folder, step, **values):
    """Records other metrics."""
    rows = chatmodel.lines(folder)
    for row in rows:
        if row["step"] == step:
            row |= values
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def test_a_step_is_replayed_with_the_options_of_then(run, capsys):
    first, second = read_past(run, 2), read_past(run, 3)
    assert first.config.optimizer.learning_rate == 3e-3
    assert second.config.optimizer.learning_rate == 1e-2
    assert first.inputs == second.inputs != {}
    assert first.environment_changes() == []

    assert cli.main(["verify", str(run), "--steps", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[-5:-1]] == [
        "step 1, from the initial state",
        "step 2, from checkpoint 1",
        "step 3, from checkpoint 2",
        "step 4, from checkpoint 3",
    ]
    assert said[-1] == "The same bits."
    # A part ends where the options change.
    found = verify(str(run), 9)
    assert [(part["from"], part["steps"][-1]) for part in found["parts"]] == [
        *((0, 2), (1, 2), (2, 4), (3, 4)),
    ]
    assert found["same_bits"]


def test_one_bit_that_is_another_is_found(run, capsys):
    loss = next(row["loss"] for row in chatmodel.lines(run) if row["step"] == 3)
    other = math.nextafter(loss, math.inf)
    rewrite(run, 3, loss=other)
    assert cli.main(["verify", str(run), "--steps", "1", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["same_bits"] is False
    (part,) = [part for part in found["parts"] if part["differences"]]
    assert part["from"] == 2
    assert part["differences"] == [{"step": 3, "name": "loss", "recorded": other, "replayed": loss}]


def test_other_versions_are_said(run, capsys):
    path = run / "versions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"jax": "0.1"}), encoding="utf-8")
    shutil.rmtree(run / "checkpoints")
    assert cli.main(["verify", str(run), "--steps", "1"]) == 0
    assert "Bits cannot be promised: jax: 0.1 → " in capsys.readouterr().out
    path.unlink()
    (note,) = read_past(run).environment_changes()
    assert note.startswith("versions.json is missing")


def test_another_row_is_refused_and_named(run, chat_models, tmp_path):
    own = tmp_path / "own"
    folder = train(chat_models, own / "run", steps=1, checkpoint=False)
    data = own / "run-sft.jsonl"
    data.write_text(data.read_text().replace("ok", "no"), encoding="utf-8")
    message = r"data\.train\[0\]\.path \(contents\): \w+… → \w+….*--allow-changes"
    with pytest.raises(ValueError, match=f"(?s){message}"):
        verify(str(folder))
    found = verify(str(folder), allow_changes=True)
    assert not found["same_bits"]
    assert "data.train[0].path (contents)" in found["notes"][0]


def test_damaged_checkpoints_are_passed_over_and_stay(run, capsys):
    shutil.rmtree(run / "checkpoints/3/loop")
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    with open_replay(run, 4) as replay:
        assert replay.start_before(4) == 2
        assert "checkpoints/3 is passed over: loop missing" in capsys.readouterr().out
        replayed = replay.run(2, 4)
    assert [step.differences for step in replayed] == [(), ()]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    shutil.rmtree(run / "checkpoints/1")
    shutil.rmtree(run / "checkpoints/2")
    with (
        open_replay(run, 4) as replay,
        pytest.raises(ValueError, match=r"optimizer\.learning_rate changed between step 0, where"),
    ):
        replay.start_before(4)


def test_a_run_that_goes_on_is_left_alone(run):
    def times():  # the owner renews its lock
        return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != LOCK}

    with FolderLock(run):
        before = times()
        with open_replay(run, 2) as replay:
            (step,) = replay.run(replay.start_before(2), 2)
        assert step.differences == ()
        assert times() == before
    # Its checkpoint was removed meanwhile.
    store = Checkpoints(run / "checkpoints", keep=None, read_only=True)
    assert store.sound_before(2) == 1
    shutil.rmtree(run / "checkpoints/1/state")
    with pytest.raises(ValueError, match="1 changed while it was read: state missing; try again"):
        store.check_again(1)
    store.close()


@pytest.mark.parametrize("command", [["verify"], ["explain", "--step", "1"]])
def test_what_is_no_run_is_refused_with_a_remedy(made, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported/config.json").write_text("{}")

    def error(folder):
        name, *rest = command
        assert cli.main([name, str(folder), *rest]) == 2
        return capsys.readouterr().err

    assert "neither run.json nor config.yaml; wanted the folder of a run" in error("exported")
    assert "it holds the runs run: give one of these" in error(made.parent)
    assert "neither run.json nor config.yaml" in error("absent")
    shutil.copytree(made, tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0, "eval/loss": 1}\n{"step": 1, "lo')
    assert "no step is recorded yet" in error("run")
    (tmp_path / "run/metrics.jsonl").unlink()
    assert "metrics.jsonl: no such file" in error("run")


def test_steps_that_are_not_recorded_are_refused(made):
    for step in (0, 5):
        with pytest.raises(ValueError, match=rf"step={step}: .*has the steps 1 to 4; wanted one"):
            read_past(made, step)
