"""Runs whose folder is in a bucket: trained, killed, resumed and exported, as on a disk."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import bucketfs
import chatmodel
import fsspec
import pytest
import yaml

from jaxalign.commands import cli
from jaxalign.data import remote as addresses
from jaxalign.parallel import distributed
from jaxalign.run import bucket_lock, loop, remote, storage
from jaxalign.run import mirror as mirroring
from jaxalign.run.config.runs import load_config

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.fixture(autouse=True)
def stage(tmp_path, monkeypatch):
    """A machine of its own, and a bucket."""
    monkeypatch.setenv(addresses.FOLDER, str(tmp_path / "stage"))
    monkeypatch.setenv(bucketfs.FOLDER, str(tmp_path / "bucket"))
    monkeypatch.setattr(bucket_lock, "_SETTLE_SECONDS", 0.0)
    fsspec.register_implementation("bucket", bucketfs.BucketFileSystem, clobber=True)
    yield tmp_path / "stage"
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def settings(chat_models, folder, tmp_path, **run):
    values = chatmodel.settings("sft", chat_models, tmp_path / "local", **run)
    values["run"]["folder"] = folder
    values["run"]["save_every"] = 1
    return values


@pytest.fixture(scope="module")
def local(chat_models, tmp_path_factory):
    """The uninterrupted run in a folder of this machine."""
    folder = tmp_path_factory.mktemp("on a disk") / "run"
    values = chatmodel.settings("sft", chat_models, folder, save_every=1)
    loop.train(load_config("sft", values))
    return folder


def objects(address):
    """Name → bytes of all files below an address."""
    fs, path = fsspec.core.url_to_fs(address)
    return {name.removeprefix(path + "/"): fs.cat_file(name) for name in fs.find(path)}


def check_equal(address, local):
    """Metrics, weights, names of checkpoints and their files, bit for bit."""
    there = objects(address)
    lines = [json.loads(line) for line in there["metrics.jsonl"].splitlines()]
    assert chatmodel.timeless(lines) == chatmodel.timeless(chatmodel.lines(local))
    model = {p.relative_to(local).as_posix(): p for p in (local / "model").rglob("*")}
    assert {name for name in there if name.startswith("model/")} == set(model)
    assert all(there[name] == path.read_bytes() for name, path in model.items())
    steps = {name.split("/")[1] for name in there if name.startswith("checkpoints/")}
    assert steps == {path.name for path in (local / "checkpoints").iterdir()}
    assert not any(".lock" in name or "tmp" in name for name in there)


def stop_after(monkeypatch, step):
    """A SIGTERM arrives before a step is computed."""
    plain = loop.run_step

    def run_step(*args):
        if args[5] == step:
            os.kill(os.getpid(), signal.SIGTERM)
            while args[6].signal is None:
                time.sleep(0.01)
        return plain(*args)

    monkeypatch.setattr(loop, "run_step", run_step)


@pytest.mark.parametrize("scheme", ["memory", "bucket"])
def test_stopped_and_resumed_elsewhere_a_run_is_the_one_on_a_disk(
    chat_models, local, tmp_path, stage, monkeypatch, capsys, scheme
):
    address = f"{scheme}://store/runs/one"
    values = settings(chat_models, address, tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(distributed.Preempted, match="stopped after step 2"):
            loop.train(load_config("sft", values))
    assert max(int(n.split("/")[1]) for n in objects(address) if n.startswith("checkpoints/")) == 2
    shutil.rmtree(stage)  # another machine goes on
    result = loop.train(load_config("sft", values, ["run.resume=true"]))
    said = capsys.readouterr().out
    assert f"resuming after step 2 of 4, from {address}/checkpoints/2" in said
    check_equal(address, local)
    assert chatmodel.weights(result.model) == chatmodel.weights(local / "model")
    assert yaml.safe_load(objects(address)["config.yaml"])["run"]["folder"] == address
    # Exported from the bucket, its checkpoint is what the one on the disk is.
    shutil.rmtree(stage)
    for folder, out in ((address, "there"), (str(local), "here")):
        assert cli.main(["export", folder, "--out", str(tmp_path / out)]) == 0
    assert chatmodel.weights(tmp_path / "there") == chatmodel.weights(tmp_path / "here")


PLUGIN = """
import os, signal
from jaxalign.run import mirror
from jaxalign.commands.cli import main

plain = mirror.Mirror._upload_one
def upload(self, name):
    if name.startswith("checkpoints/3/") and name.endswith(os.environ["KILLED_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, name)
mirror.Mirror._upload_one = upload
raise SystemExit(main())
"""


def test_killed_within_an_upload_it_goes_on_from_the_checkpoint_before(
    chat_models, local, tmp_path, stage, capsys
):
    """Files of a checkpoint are in the bucket then, but not what says that they are all there."""
    address = "bucket://store/run"
    values = settings(chat_models, address, tmp_path)
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(values))
    # fsspec finds the stand-in as it finds gcsfs: by an entry point of an installed package.
    info = tmp_path / "plugins" / "bucketfs-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bucketfs\nVersion: 1.0\n")
    entry = "[fsspec.specs]\nbucket = bucketfs:BucketFileSystem\n"
    (info / "entry_points.txt").write_text(entry)
    here = pathlib.Path(__file__).resolve()
    paths = [info.parent, here.parents[1], here.parents[2], os.environ.get("PYTHONPATH", "")]
    killed = subprocess.run(
        [sys.executable, "-c", PLUGIN, "sft", str(tmp_path / "sft.yaml")],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "KILLED_AT": "checksums.json"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = objects(address)
    cut = {name for name in there if name.startswith("checkpoints/3/")}
    assert cut
    assert "checkpoints/3/checksums.json" not in cut
    assert "checkpoints/2/checksums.json" in there
    assert ".lock" in there
    shutil.rmtree(stage)
    assert cli.main(["sft", str(tmp_path / "sft.yaml"), "run.resume=auto"]) == 0
    said = capsys.readouterr().out
    assert "is gone; its lock is taken over" in said
    assert f"{address}/checkpoints: the upload of 3 was cut off" in said
    assert "resuming after step 2 of 4" in said
    assert f"run folder: {address}\nmodel: {address}/model" in said
    check_equal(address, local)


# --- the copy and the bucket, without training anything -------------------------------------------


@pytest.fixture
def mirror(stage):
    """A folder in a bucket that holds a whole checkpoint, and notes of somebody else."""
    fs = fsspec.filesystem("memory")
    for name, text in {
        "metrics.jsonl": '{"step": 1}\n',
        "checkpoints/1/state/a": "1",
        "checkpoints/1/checksums.json": "{}",
        "notes/thesis.tex": "precious",
    }.items():
        fs.pipe_file(f"/b/run/{name}", text.encode())
    with mirroring.Mirror("memory://b/run", ("metrics.jsonl", "checkpoints", "model")) as opened:
        yield opened


def write(name, text):
    path = remote.local_folder("memory://b/run") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def names():
    return {name for name in objects("memory://b/run") if not name.startswith(".")}


def checkpoint(step):
    write(f"checkpoints/{step}/state/a", str(step))
    write(f"checkpoints/{step}/checksums.json", "{}")


def test_the_copy_is_published_and_what_it_lost_is_removed(mirror):
    mirror.pull(everything=True)
    copy = remote.local_folder("memory://b/run")
    assert (copy / "checkpoints/1/state/a").read_text() == "1"
    mirror.start()
    checkpoint(2)
    write("checkpoints/3.orbax-checkpoint-tmp-7/state/a", "half")
    write(".metrics.jsonl.tmp", "half")
    write("metrics.jsonl", '{"step": 1}\n{"step": 2}\n')
    shutil.rmtree(copy / "checkpoints/1")
    mirror.publish()
    assert names() == {
        "metrics.jsonl",
        "checkpoints/2/state/a",
        "checkpoints/2/checksums.json",
        "notes/thesis.tex",
    }
    assert objects("memory://b/run")["metrics.jsonl"] == (copy / "metrics.jsonl").read_bytes()
    (copy / "notes/thesis.tex").unlink()  # the run's, as it was in the copy
    mirror.publish()
    assert "notes/thesis.tex" not in names()


def test_a_checkpoint_is_sent_with_what_says_that_it_is_whole_last(mirror, monkeypatch):
    sent, plain = [], mirroring.Mirror._upload_one

    def upload(self, name):
        sent.append(name)
        plain(self, name)

    monkeypatch.setattr(mirroring.Mirror, "_upload_one", upload)
    mirror.pull(everything=True)
    mirror.start()
    with mirror._mutex:
        for letter in "bcdefgh":
            write(f"checkpoints/2/state/{letter}", letter)
        checkpoint(2)
        write("model/config.json", "{}")
        write("model/model.safetensors", "weights")
    mirror.publish()
    of_two = [name for name in sent if name.startswith("checkpoints/2/")]
    assert len(of_two) == 9
    assert of_two[-1] == "checkpoints/2/checksums.json"
    # What tells of its steps is there before it, and a model's weights before its config.json.
    assert sent.index("model/model.safetensors") < sent.index("model/config.json")
    assert sent.index("model/config.json") < sent.index(of_two[0])
    shutil.rmtree(remote.local_folder("memory://b/run") / "checkpoints/2")
    removed, plain_remove = [], type(fsspec.filesystem("memory")).rm_file

    def rm_file(self, path):
        removed.append(path)
        plain_remove(self, path)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "rm_file", rm_file)
    mirror.publish()
    assert removed[0] == "/b/run/checkpoints/2/checksums.json"
    assert len(removed) == 9


def test_another_checkpoint_of_a_step_takes_the_place_of_the_first(mirror):
    """A run that goes back behind a damaged one reaches its step again."""
    mirror.pull(everything=True)
    mirror.start()
    with mirror._mutex:
        write("checkpoints/1/state/b", "new")
        write("checkpoints/1/checksums.json", '{"new": 1}')
    mirror.publish()
    there = objects("memory://b/run")
    assert there["checkpoints/1/state/b"] == b"new"
    assert there["checkpoints/1/checksums.json"] == b'{"new": 1}'


def test_a_copy_that_somebody_removed_takes_nothing_out_of_the_bucket(mirror):
    mirror.pull(everything=True)
    mirror.start()
    with mirror._mutex:
        shutil.rmtree(remote.local_folder("memory://b/run"))
    before = names()
    with pytest.raises(OSError, match="the copy of memory://b/run on this machine is gone"):
        mirror.publish()
    assert names() == before
    (remote.local_folder("memory://b/run")).mkdir()
    write(".mirror", "")  # else the end of the test would raise it too
    mirror._failure, mirror._sent, mirror._steps = None, {}, {}


def test_an_upload_that_was_cut_off_is_no_checkpoint_and_goes(mirror, capsys):
    fsspec.filesystem("memory").pipe_file("/b/run/checkpoints/5/state/a", b"5")
    mirror.pull(everything=True)
    assert not (remote.local_folder("memory://b/run") / "checkpoints/5").exists()
    mirror.start()
    mirror.publish()
    assert "checkpoints/5/state/a" not in names()
    assert "the upload of 5 was cut off; its files are removed" in capsys.readouterr().out


def test_a_copy_of_this_machine_is_made_the_buckets(mirror, fetched):
    mirror.pull(everything=True)
    fetched.clear()
    checkpoint(7)  # was never published, and the run may have gone on elsewhere
    write("evaluation.json", "{}")
    mirror.pull(everything=True)
    copy = remote.local_folder("memory://b/run")
    assert not (copy / "checkpoints/7").exists()
    assert not (copy / "evaluation.json").exists()
    assert "/b/run/checkpoints/1/state/a" not in fetched  # it is here, with the same checksums


def test_a_fresh_start_reads_only_names_and_keeps_what_is_not_its_own(mirror, fetched):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/b/run/model/model.safetensors", bytes(mirroring._SMALL + 1))
    fs.pipe_file("/b/run/model/config.json", b"{}")
    mirror.pull(everything=False)
    copy = remote.local_folder("memory://b/run")
    assert (copy / "checkpoints/1").is_dir()
    assert (copy / "model/config.json").is_file()
    large = {"/b/run/checkpoints/1/state/a", "/b/run/model/model.safetensors"}
    assert large.isdisjoint(fetched)
    shutil.rmtree(copy / "checkpoints")  # as --overwrite does
    shutil.rmtree(copy / "model")
    (copy / "metrics.jsonl").unlink()
    assert len(names()) == 6  # nothing happens before the run starts
    mirror.start()
    mirror.publish()
    assert names() == {"notes/thesis.tex"}


@pytest.fixture
def fetched(monkeypatch):
    paths, kind = [], type(fsspec.filesystem("memory"))
    plain = kind.get_file

    def get_file(self, path, *args, **kwargs):
        paths.append(path)
        return plain(self, path, *args, **kwargs)

    monkeypatch.setattr(kind, "get_file", get_file)
    return paths


def fail_with(monkeypatch, error, times):
    """The bucket fails so often; returns the calls."""
    calls, kind = [], type(fsspec.filesystem("memory"))
    plain = kind.put_file

    def put_file(self, local, path, **kwargs):
        calls.append(path)
        if len(calls) <= times:
            raise error
        return plain(self, local, path, **kwargs)

    monkeypatch.setattr(kind, "put_file", put_file)
    monkeypatch.setattr(storage, "_sleep", lambda seconds: None)
    return calls


def test_a_bucket_that_fails_for_a_while_is_waited_for(mirror, monkeypatch, capsys):
    mirror.pull(everything=True)
    calls = fail_with(monkeypatch, RuntimeError("503 Service Unavailable"), times=2)
    write("metrics.jsonl", "x\n")
    mirror.publish()
    assert len(calls) == 3
    assert objects("memory://b/run")["metrics.jsonl"] == b"x\n"
    assert "metrics.jsonl: RuntimeError: 503 Service Unavailable" in capsys.readouterr().out


def test_one_that_fails_for_long_says_what_is_safe(mirror, monkeypatch):
    mirror.pull(everything=True)
    fail_with(monkeypatch, RuntimeError("503"), times=10**6)
    write("metrics.jsonl", "x\n")
    with pytest.raises(
        storage.StorageError,
        match=r"memory://b/run/metrics\.jsonl could not be written: .*; tried 7 times.*"
        r"The checkpoint of step 1 is whole in the bucket",
    ):
        mirror.publish()
    monkeypatch.undo()


def test_a_refusal_is_not_tried_again(mirror, monkeypatch):
    mirror.pull(everything=True)
    calls = fail_with(monkeypatch, PermissionError("Access Denied"), times=10**6)
    write("metrics.jsonl", "x\n")
    with pytest.raises(ValueError, match=r"run\.folder='memory://b/run': no right to use it"):
        mirror.publish()
    assert len(calls) == 1


def test_what_fails_in_the_background_is_raised_at_the_next_save(mirror, monkeypatch):
    mirror.pull(everything=True)
    fail_with(monkeypatch, PermissionError("Access Denied"), times=1)
    monkeypatch.setattr(mirroring, "_POLL_SECONDS", 0.001)
    mirror.start()
    checkpoint(2)
    mirror._thread.join(60)
    with pytest.raises(ValueError, match="no right to use it"):
        mirror.publish()
    mirror._failure = None  # else the end of the test would raise it too


def test_several_processes_need_a_file_system_that_all_see(monkeypatch):
    monkeypatch.setattr(remote.jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"each of 2 processes writes a part .* mount the bucket"):
        remote.check_processes("memory://b/run")
    remote.check_processes("runs/mine")


# --- whole runs, briefly --------------------------------------------------------------------------


def test_what_is_there_stays_in_a_bucket_too(chat_models, tmp_path, stage):
    address = "memory://b/one"
    values = settings(chat_models, address, tmp_path, steps=1)
    loop.train(load_config("sft", values))
    before = objects(address)
    with pytest.raises(ValueError, match=rf"run\.folder='{address}' holds checkpoints, model, run"):
        loop.train(load_config("sft", values))
    inside = {"model.source": f"{address}/model", "data.train": f"[{address}/metrics.jsonl]"}
    for option, source in inside.items():
        given = [f"{option}={source}", "run.overwrite=true"]
        with pytest.raises(ValueError, match=r"is read from there, and would be replaced"):
            loop.train(load_config("sft", values, given))
    assert objects(address) == before
    fsspec.filesystem("memory").pipe_file("/b/one/notes.txt", b"mine")
    loop.train(load_config("sft", values, ["run.seed=3", "run.steps=2", "run.overwrite=true"]))
    after = objects(address)
    assert after["notes.txt"] == b"mine"
    assert {n.split("/")[1] for n in after if n.startswith("checkpoints/")} == {"1", "2"}
    assert after["metrics.jsonl"] != before["metrics.jsonl"]


def test_a_pipeline_in_a_bucket_from_models_and_data_there(chat_models, tmp_path, stage, capsys):
    fs = fsspec.filesystem("memory")
    for path in (chat_models / "chat").iterdir():
        fs.pipe_file(f"/b/chat/{path.name}", path.read_bytes())
    values = settings(chat_models, "unused", tmp_path, steps=1)
    fs.pipe_file("/b/rows.jsonl", pathlib.Path(values["data"]["train"][0]).read_bytes())
    values["data"]["train"] = ["memory://b/rows.jsonl"]
    values["model"]["source"] = "memory://b/chat"
    del values["run"]["folder"]
    first = values | {"name": "first", "algorithm": "sft"}
    second = first | {"name": "second", "model": {"source": "${first}"}}
    pipeline = {"folder": "memory://b/all", "stages": [first, second]}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    assert cli.main(["pipeline", str(tmp_path / "pipeline.yaml")]) == 0
    assert "second: memory://b/all/second (" in capsys.readouterr().out
    there = objects("memory://b/all")
    assert {name.split("/")[0] for name in there} == {"first", "second"}
    model = yaml.safe_load(there["second/config.yaml"])["model"]["source"]
    assert model == "memory://b/all/first/model"
    assert there["first/model/model.safetensors"] != there["second/model/model.safetensors"]
    # Read where it lies: the page of both, and one run's step once more.
    page = tmp_path / "page.html"
    assert cli.main(["report", "memory://b/all", "--out", str(page)]) == 0
    assert "second" in page.read_text()
    assert cli.main(["report", "memory://b/all"]) == 2
    assert "name a file: --out" in capsys.readouterr().err
    assert cli.main(["verify", "memory://b/all/first"]) == 0
