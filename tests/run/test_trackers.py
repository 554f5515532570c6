"""Trackers get what `metrics.jsonl` gets, once, and never stop a run. No package is needed here."""

import json
import threading
from typing import ClassVar

import chatmodel
import pytest

from jaxalign.run import loop
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge
from jaxalign.run.metrics import JsonlWriter
from jaxalign.run.trackers import hub, sender, table
from jaxalign.run.trackers.base import TrackedRun
from jaxalign.run.trackers.table import TRACKERS, Entry, usable

pytestmark = pytest.mark.usefixtures("kept_programs")


class Recording:
    """A tracker whose service is a dict: run → entries."""

    service: ClassVar[dict] = {}
    rewinds = False

    def __init__(self, run: TrackedRun):
        self.identity = run.identity or f"run {len(self.service)}"
        self.entries = self.service.setdefault(self.identity, [])

    def scalars(self, step, values):
        self.entries.append((step, dict(values)))

    def histogram(self, step, name, edges, counts):
        self.entries.append((step, name, edges, counts))

    def samples(self, step, rows):
        self.entries.append((step, rows))

    def close(self, *, failed):
        self.entries.append("failed" if failed else "ended")


class Rewinding(Recording):
    service: ClassVar[dict] = {}
    rewinds = True

    def __init__(self, run):
        super().__init__(run)
        self.entries[:] = [e for e in numbers(self.entries) if e[0] <= run.done]


class Breaking(Recording):
    """Refuses what comes after step 2."""

    service: ClassVar[dict] = {}

    def scalars(self, step, values):
        if step > 2:
            raise ConnectionError("no route to host")
        super().scalars(step, values)


@pytest.fixture(autouse=True)
def services(monkeypatch):
    for cls in (Recording, Rewinding, Breaking):
        monkeypatch.setattr(cls, "service", {})
        name = cls.__name__.lower()
        monkeypatch.setitem(TRACKERS, name, Entry(name, "json", f"{__name__}:{cls.__name__}"))


def begin(folder, names=("recording",), done=0, config=None):
    """Trackers and `metrics.jsonl` of a start, in the order of `loop.train`."""
    opened = hub.open_trackers(
        names, folder=folder, project="p", config=config or {}, done=done, optional=False
    )
    return opened, JsonlWriter(folder / "metrics.jsonl", done or None)


def write(start, *steps):
    trackers, file = start
    for step in steps:
        metrics = {"loss": 1 / step, "time/step": float(step)}
        file.write(step, metrics)
        trackers.write(step, metrics)


def end(start):
    for part in start:
        part.close()


def numbers(entries):
    return [entry for entry in entries if entry not in ("ended", "failed")]


def losses(*steps):
    return [(step, {"loss": 1 / step, "time/step": float(step)}) for step in steps]


# --- each number once -----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Recording, Rewinding])
def test_a_resumed_run_goes_on_with_the_same_one_and_sends_each_step_once(tmp_path, cls):
    names = [cls.__name__.lower()]
    first = begin(tmp_path, names)
    write(first, 1, 2, 3)
    end(first)
    again = begin(tmp_path, names, done=2)  # step 3 is done again
    write(again, 3, 4)
    end(again)
    assert list(cls.service) == ["run 0"]
    assert numbers(cls.service["run 0"]) == losses(1, 2, 3, 4)


def test_a_run_that_starts_over_in_its_folder_rewinds_to_nothing(tmp_path):
    first = begin(tmp_path, ["rewinding", "recording"])
    first[0].write_evaluation(0, {"eval/loss": 3.0}, None)
    first[1].write(0, {"eval/loss": 3.0})
    write(first, 1)
    end(first)
    Rewinding.service["run 0"].clear()
    again = begin(tmp_path, ["rewinding", "recording"])  # killed before its first checkpoint
    again[0].write_evaluation(0, {"eval/loss": 3.0}, None)
    write(again, 1)
    end(again)
    for cls in (Rewinding, Recording):
        assert numbers(cls.service["run 0"]) == [(0, {"eval/loss": 3.0}), *losses(1)]


def test_a_tracker_that_is_new_at_a_resume_gets_what_was_before(tmp_path):
    first = begin(tmp_path)
    write(first, 1)
    first[0].write_evaluation(1, {"eval/loss": float("inf")}, None)
    first[1].write(1, {"eval/loss": float("inf")})  # a string in the file
    write(first, 2, 3)
    end(first)
    again = begin(tmp_path, ["recording", "rewinding"], done=2)
    write(again, 3)
    end(again)
    expected = [*losses(1), (1, {"eval/loss": float("inf")}), *losses(2, 3)]
    for cls in (Recording, Rewinding):
        assert numbers(cls.service["run 0"]) == expected


def test_held_out_figures_that_a_resume_measures_are_sent_for_a_step_that_is_known(tmp_path):
    first = begin(tmp_path)
    write(first, 1, 2)
    end(first)
    again = begin(tmp_path, done=2)
    again[0].write_evaluation(2, {"eval/loss": 0.5}, None)
    end(again)
    assert numbers(Recording.service["run 0"]) == [*losses(1, 2), (2, {"eval/loss": 0.5})]


def test_a_tracker_left_out_for_a_while_gets_what_it_missed(tmp_path):
    first = begin(tmp_path)
    write(first, 1, 2)
    end(first)
    without = begin(tmp_path, [], done=2)
    write(without, 3, 4)
    end(without)
    again = begin(tmp_path, done=4)
    write(again, 5)
    end(again)
    assert numbers(Recording.service["run 0"]) == losses(1, 2, 3, 4, 5)


# --- histograms and samples of the folder ---------------------------------------------------------


def append(folder, name, *rows):
    with (folder / name).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def answer(step, text):
    return {
        "step": step,
        "row": 0,
        "prompt": "q",
        "answer": text,
        "score": 0.5,
        "finished": True,
        "trained": True,
        "kl": [0.25, 0.5],
        "rewards": [0.0, 0.5],
        "tokens": ["a", "b"],
    }


def sample(text):
    figures = {"score": 0.5, "finished": True, "trained": True, "kl": 0.75, "rewards": 0.5}
    return {"prompt": "q", "answer": text} | figures


BINS = {"edges": [0.0, 1.0, 2.0], "counts": [3, 1]}


def test_histograms_and_samples_follow_the_numbers_of_their_step(tmp_path):
    start = begin(tmp_path)
    append(tmp_path, "rollouts.jsonl", answer(1, "a"), answer(1, "b"))
    append(tmp_path, "histograms.jsonl", {"step": 1, "scores": BINS})
    # Step 2 was sampled before the numbers of step 1 were read.
    append(tmp_path, "rollouts.jsonl", answer(2, "c"))
    write(start, 1)
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 2, "answ')  # under way
    write(start, 2)
    end(start)
    assert Recording.service["run 0"] == [
        *losses(1),
        (1, "scores", BINS["edges"], BINS["counts"]),
        (1, [sample("a"), sample("b")]),
        *losses(2),
        (2, [sample("c")]),
        "ended",
    ]


def test_samples_that_a_resumed_run_makes_again_are_not_sent_again(tmp_path):
    start = begin(tmp_path)
    append(tmp_path, "rollouts.jsonl", answer(1, "a"), answer(2, "b"))
    write(start, 1, 2)
    end(start)
    again = begin(tmp_path, done=1)
    write(again, 2)  # reads the whole file
    append(tmp_path, "rollouts.jsonl", answer(3, "c"))
    write(again, 3)
    end(again)
    found = [entry[1][0]["answer"] for entry in Recording.service["run 0"] if entry[1:] and
             isinstance(entry[1], list)]  # fmt: skip
    assert found == ["a", "b", "c"]


def test_histograms_of_an_evaluation_are_sent(tmp_path):
    start = begin(tmp_path)
    details = {"histogram": {"edges": [0.0, 1.0], "counts": {"chosen": [2], "rejected": [1]}}}
    start[0].write_evaluation(4, {"eval/accuracy": 1.0}, details)
    end(start)
    assert Recording.service["run 0"][1:3] == [
        (4, "eval/scores/chosen", [0.0, 1.0], [2]),
        (4, "eval/scores/rejected", [0.0, 1.0], [1]),
    ]


# --- failures -------------------------------------------------------------------------------------


def test_a_tracker_that_fails_is_reported_once_and_gets_the_rest_at_a_resume(
    tmp_path, capsys, monkeypatch
):
    start = begin(tmp_path, ["breaking", "recording"])
    write(start, 1, 2, 3, 4, 5)
    end(start)
    said = capsys.readouterr().out
    assert said.count("run.trackers: breaking failed at step 3 (ConnectionError: no route to") == 1
    assert said.count("breaking") == 1
    assert numbers(Breaking.service["run 0"]) == losses(1, 2)
    assert numbers(Recording.service["run 0"]) == losses(1, 2, 3, 4, 5)
    monkeypatch.setattr(Breaking, "scalars", Recording.scalars)
    again = begin(tmp_path, ["breaking", "recording"], done=4)
    write(again, 5)
    end(again)
    assert numbers(Breaking.service["run 0"]) == losses(1, 2, 3, 4, 5)


def test_a_run_waits_neither_for_a_tracker_that_hangs_nor_for_ever_at_its_end(monkeypatch):
    released = threading.Event()

    class Hanging(Recording):
        def scalars(self, step, values):
            released.wait(60)

    monkeypatch.setattr(sender, "CAPACITY", 3)
    run = TrackedRun(None, "p", "n", {})
    behind = sender.Sender("hanging", Hanging(run), {})
    for step in range(1, 9):
        behind.scalars(step, {"loss": 1.0})
    assert "3 entries behind" in behind.failure.cause
    late = sender.Sender("hanging", Hanging(run), {})
    late.scalars(1, {"loss": 1.0})
    late.scalars(2, {"loss": 1.0})
    late.close(failed=False, patience=0.05)
    assert "not sent after 0.05 s" in late.failure.cause
    released.set()


def test_an_error_at_the_end_is_reported(tmp_path, capsys, monkeypatch):
    def close(self, *, failed):
        raise OSError("disk full")

    monkeypatch.setattr(Recording, "close", close)
    start = begin(tmp_path)
    write(start, 1)
    end(start)
    assert "recording failed at step 1 (OSError: disk full)" in capsys.readouterr().out


def test_a_tracker_that_does_not_begin_is_an_error_unless_told(tmp_path, capsys, monkeypatch):
    def refuse(self, run):
        raise PermissionError("not logged in")

    monkeypatch.setattr(Breaking, "__init__", refuse)
    with pytest.raises(ValueError, match=r"breaking does not begin: PermissionError: not logged"):
        begin(tmp_path, ["breaking"])
    options = {"folder": tmp_path, "project": "p", "config": {}, "done": 0, "optional": True}
    hub.open_trackers(["breaking", "recording"], **options).close()
    assert "breaking does not begin" in capsys.readouterr().out
    assert Recording.service == {"run 0": ["ended"]}


def test_a_missing_package_names_the_extra_unless_told(capsys, monkeypatch):
    monkeypatch.setitem(TRACKERS, "absent", Entry("the-absent", "no_such_module", "x:y"))
    with pytest.raises(ValueError, match=r"jaxalign\[track\].*the-absent.*trackers_optional=true"):
        usable(["recording", "absent"], optional=False)
    assert usable(["recording", "absent"], optional=True) == ["recording"]
    assert 'pip install "jaxalign[track]"' in capsys.readouterr().out
    monkeypatch.setattr(table.distributed, "is_main", lambda: False)
    assert usable(["recording", "absent"], optional=False) == []


# --- whole runs -----------------------------------------------------------------------------------


def config(models, folder, *assignments, **options):
    values = chatmodel.settings("sft", models, folder, **{"export": False} | options)
    values = merge(values, {"data": {"eval": values["data"]["train"]}})
    return load_config("sft", values, assignments)


def test_a_run_and_its_resume_send_what_metrics_jsonl_holds(chat_models, tmp_path, capsys):
    folder = tmp_path / "run"
    trackers = "run.trackers=[recording, breaking]"
    options = {"steps": 4, "save_every": 2, "keep": 9, "eval_every": 2}
    loop.train(config(chat_models, folder, trackers, **options))
    assert "breaking failed at step 3" in capsys.readouterr().out
    identities = json.loads((folder / "trackers.json").read_text())
    assert identities["breaking"]["lacks_from"] == 3
    again = config(chat_models, folder, "run.resume=true", "run.trackers=recording",
                   **options | {"steps": 5})  # fmt: skip
    loop.train(again)
    (entries,) = Recording.service.values()
    assert entries.count("ended") == 2
    rows = {}
    for step, values in numbers(entries):
        rows.setdefault(step, []).append(values)
    written = {}
    for row in chatmodel.lines(folder):
        written.setdefault(row.pop("step"), []).append(row)
    assert rows == written
    assert sorted(rows) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("run.trackers=[tensorbord]", "run.trackers='tensorbord': wanted one or several of tens"),
        ("run.trackers=[wandb, wandb]", "each tracker once"),
        ("run.tracker_project=''", "run.tracker_project=''"),
    ],
)
def test_a_wrong_option_is_named(assignment, message):
    least = {"model": {"source": "m"}, "data": {"train": ["r.jsonl"]}, "run": {"folder": "f"}}
    with pytest.raises(ValueError, match="tracker") as caught:
        load_config("sft", least, [assignment])
    assert message in str(caught.value)
