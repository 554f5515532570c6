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
from jaxalign.run import bucket_lock, loop
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
    """A SIGTERM arrives while a step is computed."""
    plain = loop.run_step

    def run_step(*args):
        result = plain(*args)
        if args[5] == step:
            os.kill(os.getpid(), signal.SIGTERM)
            while args[6].signal is None:
                time.sleep(0.01)
        return result

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
    assert "resuming after step 2 of 4" in capsys.readouterr().out
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
from jaxalign.run import remote
from jaxalign.commands.cli import main

plain = remote.Mirror._upload_one
def upload(self, name):
    if name.startswith("checkpoints/3/") and name.endswith(os.environ["KILLED_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, name)
remote.Mirror._upload_one = upload
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
    paths = [info.parent, here.parent, here.parents[2], os.environ.get("PYTHONPATH", "")]
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
