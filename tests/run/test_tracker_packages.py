"""The packages themselves, offline: each holds what `metrics.jsonl` holds, after a resume too."""

import json
import pathlib
import shutil
import struct
import time

import chatmodel
import pytest

from jaxalign.run import loop
from jaxalign.run.config.runs import load_config
from jaxalign.run.metrics import JsonlWriter
from jaxalign.run.trackers import hub

EDGES, COUNTS = [0.0, 1.0, 2.0], [3, 1]
CONFIG = {"data.rows": 8, "data.train[0].path": "a b.jsonl", "model.source": "m"}
NAMES = ("loss", "rewards/margins", "eval/accuracy/source one")


def answer(step):
    return {
        "step": step,
        "prompt": f"question {step}?",
        "answer": f"<b>answer</b> {step}\nends",
        "score": step / 4,
        "finished": True,
        "trained": True,
        "kl": [0.5, 0.25],
        "rewards": [0.0, step / 4],
    }


def append(path, row):
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def start(folder, name, done, steps, *, keep_samples):
    """One start of a run; samples as `RolloutDump` leaves them."""
    options = {"folder": folder, "project": "project", "config": CONFIG, "optional": False}
    trackers = hub.open_trackers([name], done=done, **options)
    file = JsonlWriter(folder / "metrics.jsonl", done or None)
    samples, bins = folder / "rollouts.jsonl", folder / "histograms.jsonl"
    for path in (samples, bins):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(lines[:keep_samples]))
    for step in steps:
        append(samples, answer(step))
        append(bins, {"step": step, "lengths": {"edges": EDGES, "counts": COUNTS}})
        row = {"loss": 1 / step, "rewards/margins": -float(step)}
        file.write(step, row)
        trackers.write(step, row)
        if step == 3:
            held_out = {"eval/accuracy/source one": 0.75}
            file.write(step, held_out)
            trackers.write_evaluation(step, held_out, None)
    file.close()
    trackers.close()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Steps 1 to 3, then a resume after 2 that does 3 again, and 4."""
    monkeypatch.chdir(tmp_path)  # nothing is written beside the tests
    for key in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(key, raising=False)

    def both(name):
        folder = tmp_path / "my-run"
        folder.mkdir()
        start(folder, name, 0, [1, 2, 3], keep_samples=0)
        start(folder, name, 2, [3, 4], keep_samples=2)
        return folder, json.loads((folder / "trackers.json").read_text())[name]["identity"]

    return both


def written(folder):
    """`metrics.jsonl` as {name: [(step, value)]}."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            found.setdefault(name, []).append((step, value))
    assert set(found) == set(NAMES)
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    return found


def held_by_tensorboard(folder):
    """What its files hold of a run, in order: (step, value) as TensorBoard takes them in."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):  # a record: length, its checksum, bytes, their checksum
            (size,) = struct.unpack_from("<Q", data, place)
            events.append(Event.FromString(data[place + 12 : place + 12 + size]))
            place += 12 + size + 4
    held = []
    for event in events:  # as TensorBoard reads them: a start drops what it does again
        if event.HasField("session_log"):
            held = [(step, value) for step, value in held if step < event.step]
        held += [(event.step, value) for value in event.summary.value]
    return held


def test_tensorboard(run):
    pytest.importorskip("tensorboardX")
    folder, _ = run("tensorboard")
    held = held_by_tensorboard(folder)
    scalars = {}
    for step, value in held:
        if value.WhichOneof("value") == "simple_value":
            scalars.setdefault(value.tag, []).append((step, value.simple_value))
    expected = written(folder)
    # A tag holds no blanks.
    expected["eval/accuracy/source_one"] = expected.pop("eval/accuracy/source one")
    for name, pairs in expected.items():
        assert [step for step, _ in scalars[name]] == [step for step, _ in pairs]
        values = [value for _, value in pairs]
        assert [value for _, value in scalars[name]] == pytest.approx(values)
    assert set(scalars) == set(expected)
    bins = [(step, value.histo) for step, value in held if value.HasField("histo")]
    assert [step for step, _ in bins] == [1, 2, 3, 4]
    assert list(bins[0][1].bucket) == COUNTS
    assert list(bins[0][1].bucket_limit) == EDGES[1:]
    assert bins[0][1].sum == 3 * 0.5 + 1 * 1.5
    texts = {
        (step, value.tag.split("/")[0]): value.tensor.string_val[0].decode()
        for step, value in held
        if value.HasField("tensor")
    }
    assert {step for step, tag in texts if tag == "samples"} == {1, 2, 3, 4}
    assert "    <b>answer</b> 3\n    ends" in texts[3, "samples"]
    assert "score 0.75" in texts[3, "samples"]
    assert "data.rows: 8" in texts[0, "config"]


def test_trackio(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    storage = sqlite_storage.SQLiteStorage
    folder, name = run("trackio")
    assert name.startswith("my-run-")
    assert storage.get_runs("project") == [name]
    logs = storage.get_logs("project", name)
    scalars, bins = {}, []
    for row in logs:
        for key, value in row.items():
            if key in NAMES:
                scalars.setdefault(key, []).append((row["step"], value))
            elif key == "lengths":
                bins.append((row["step"], value["bins"], value["values"]))
    assert {key: sorted(pairs) for key, pairs in scalars.items()} == written(folder)
    assert sorted(bins) == [(step, EDGES, COUNTS) for step in (1, 2, 3, 4)]
    traces = storage.get_traces("project", name)
    by_step = {trace["step"]: trace for trace in traces}
    assert len(traces) == 4
    assert set(by_step) == {1, 2, 3, 4}
    assert by_step[3]["messages"] == [
        {"role": "user", "content": "question 3?"},
        {"role": "assistant", "content": "<b>answer</b> 3\nends"},
    ]
    assert by_step[3]["metadata"]["score"] == 0.75
    assert storage.get_run_config("project", name)["data.rows"] == 8


def wandb_records(path):
    """The records of an offline run: blocks of 32 KiB, with headers of checksum, length, kind."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def test_wandb(run, monkeypatch):
    pytest.importorskip("wandb")
    for key, value in (("MODE", "offline"), ("SILENT", "true"), ("CONSOLE", "off")):
        monkeypatch.setenv(f"WANDB_{key}", value)
    folder, identity = run("wandb")
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    # Another process writes them; the timeout of every test guards against one that never ends.
    while any(wandb_records(file)[-1].WhichOneof("record_type") != "exit" for file in files):
        time.sleep(0.05)
    records = [record for file in files for record in wandb_records(file)]
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    scalars, bins, tables = {}, [], []
    for row in rows:
        for key in set(row) & set(NAMES):
            scalars.setdefault(key, []).append((row["step"], row[key]))
        if "lengths/bins" in row:
            bins.append((row["step"], row["lengths/bins"], row["lengths/values"]))
        if "samples/path" in row:
            tables.append((row["step"], row["samples/path"]))
    assert scalars == written(folder)
    assert bins == [(step, EDGES, COUNTS) for step in (1, 2, 3, 4)]
    assert [step for step, _ in tables] == [1, 2, 3, 4]
    paths = {path.name: path for path in (folder / "wandb").rglob("*.table.json")}
    table = json.loads(paths[pathlib.Path(tables[2][1]).name].read_text())
    assert table["columns"][:3] == ["prompt", "answer", "score"]
    assert table["data"][0][:3] == ["question 3?", "<b>answer</b> 3\nends", 0.75]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {identity}
    assert {run.project for run in runs} == {"project"}


def test_mlflow(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    folder, identity = run("mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("project").experiment_id
    (found,) = client.search_runs([experiment])
    assert found.info.run_id == identity
    assert (found.info.run_name, found.info.status) == ("my-run", "FINISHED")
    scalars = {
        name: sorted((m.step, m.value) for m in client.get_metric_history(identity, name))
        for name in found.data.metrics
    }
    assert scalars == written(folder)
    assert found.data.params["data.rows"] == "8"
    assert found.data.params["data.train_5b_0_5d_.path"] == "a b.jsonl"
    paths = [file.path for file in client.list_artifacts(identity, "samples")]
    assert paths == [f"samples/{step:07d}.json" for step in (1, 2, 3, 4)]

    def artifact(path):
        local = client.download_artifacts(identity, path, str(tmp_path))
        return json.loads(pathlib.Path(local).read_text())

    (sample,) = artifact(paths[2])["samples"]
    assert (sample["prompt"], sample["score"], sample["kl"]) == ("question 3?", 0.75, 0.75)
    bins = artifact("histograms/lengths/0000004.json")
    assert bins == {"edges": EDGES, "counts": COUNTS}


@pytest.mark.slow
def test_a_whole_run_of_ppo_and_its_resume_in_tensorboard(chat_models, tmp_path):
    pytest.importorskip("tensorboardX")
    folder = tmp_path / "run"
    options = {"save_every": 2, "keep": 9, "eval_every": 2, "export": False}
    options |= {"trackers": ["tensorboard"]}
    values = chatmodel.settings("ppo", chat_models, folder, steps=3, **options)
    values["dump_every"] = 1
    values["data"]["eval"] = values["data"]["train"]
    loop.train(load_config("ppo", values))
    shutil.rmtree(folder / "checkpoints" / "3")  # as if killed before its checkpoint
    loop.train(load_config("ppo", values, ["run.resume=true", "run.steps=5"]))

    held, texts, scalars = held_by_tensorboard(folder), set(), {}
    for step, value in held:
        if value.WhichOneof("value") == "simple_value":
            scalars.setdefault(value.tag, []).append((step, value.simple_value))
        elif value.HasField("tensor") and value.tag.startswith("samples"):
            texts.add(step)
    wanted = {}
    for row in chatmodel.lines(folder):
        step = row.pop("step")
        for name, value in row.items():
            wanted.setdefault(name, []).append((step, value))
    assert set(scalars) == set(wanted)
    for name, pairs in wanted.items():
        assert [step for step, _ in scalars[name]] == [step for step, _ in pairs], name
        values = [value for _, value in pairs]
        assert [value for _, value in scalars[name]] == pytest.approx(values, nan_ok=True), name
    assert texts == {1, 2, 3, 4, 5}
