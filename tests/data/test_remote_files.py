"""Files in buckets: what is fetched, what is kept, and what is said where that fails."""

import importlib
import os
import re

import fsspec
import pytest

from jaxalign.data import remote
from jaxalign.data.remote import check_address, fetch, fetch_matches, is_address, list_files
from jaxalign.data.sources import read_rows, split_path
from jaxalign.hf.source import locate
from jaxalign.run.digests import data_digest, weights_digest


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """An empty bucket in memory."""
    monkeypatch.setenv(remote.FOLDER, str(tmp_path / "stage"))
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture
def fetched(monkeypatch, store):
    """The paths that were copied from the bucket."""
    paths, plain = [], type(store).get_file

    def get_file(self, path, *args, **kwargs):
        paths.append(path)
        return plain(self, path, *args, **kwargs)

    monkeypatch.setattr(type(store), "get_file", get_file)
    return paths


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("gs://bucket/x", True), ("s3://bucket/x", True), ("memory://x", True),
        ("az://box/x", True), ("ftp://host/x", False), ("S3://bucket/x", True), ("runs/x", False),
        ("org/name", False), ("https://host/x", False), ("file:///tmp/x", False),
        ("hf://org/name", False), ("unheard-of://x", False), ("C:\\x", False),
        ("simplecache::s3://bucket/x", False),
    ],
)  # fmt: skip
def test_what_counts_as_a_bucket(text, answer):
    assert is_address(text) is answer


def test_a_file_is_fetched_once_until_it_changes(store, fetched):
    store.pipe_file("/b/m/config.json", b"{}")
    store.pipe_file("/b/m/sub/w.bin", b"123")
    first = fetch("memory://b/m", "x")
    assert first.name == "m"
    assert (first / "sub/w.bin").read_bytes() == b"123"
    assert sorted(fetched) == ["/b/m/config.json", "/b/m/sub/w.bin"]
    assert fetch("memory://b/m/", "x") == first
    assert len(fetched) == 2
    store.pipe_file("/b/m/sub/w.bin", b"4567")
    again = fetch("memory://b/m", "x")
    assert (again / "sub/w.bin").read_bytes() == b"4567"
    assert (first / "sub/w.bin").read_bytes() == b"123"  # of whoever still reads it
    assert fetched[2:] == ["/b/m/sub/w.bin"]


def test_only_what_is_asked_for_is_fetched(store, fetched):
    for name in ("config.json", "a.safetensors", "params/x/y", "params/z", "training.log"):
        store.pipe_file(f"/b/m/{name}", name.encode())
    place = fetch("memory://b/m", "x", ("*.safetensors", "params/**/*"))
    names = {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}
    assert names == {"a.safetensors", "params/x/y", "params/z"}
    assert len(fetched) == 3


def test_one_file_keeps_its_name(store):
    store.pipe_file("/b/rows.jsonl", b'{"a": 1}\n')
    assert fetch("memory://b/rows.jsonl", "x").read_text() == '{"a": 1}\n'
    assert [row.data for row in read_rows("memory://b/rows.jsonl")] == [{"a": 1}]


def test_a_file_that_changes_meanwhile_is_listed_again(store, monkeypatch):
    store.pipe_file("/b/x", b"old")
    plain, times = type(store).get_file, []

    def get_file(self, path, local, **kwargs):
        times.append(path)
        if len(times) < 3:
            store.pipe_file("/b/x", b"longer" * len(times))
        return plain(self, path, local, **kwargs)

    monkeypatch.setattr(type(store), "get_file", get_file)
    assert fetch("memory://b/x", "x").read_bytes() == b"longerlonger"
    times.clear()
    monkeypatch.setattr(
        type(store), "get_file", lambda self, path, local, **kwargs: open(local, "wb").close()
    )
    store.pipe_file("/b/x", b"new")
    with pytest.raises(ValueError, match=r"x='memory://b/x': files changed while they were read"):
        fetch("memory://b/x", "x")


def test_folders_splits_and_globs_of_data(store, tmp_path):
    local = tmp_path / "d"
    local.mkdir()
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        text = f'{{"from": "{name}"}}\n'
        store.pipe_file(f"/b/d/{name}", text.encode())
        (local / name).write_text(text)
    for tail in ("", ":test", "/train-*.jsonl", "/test.jsonl", "/**/*.jsonl"):
        here = [row.data for row in read_rows(f"{local}{tail}")]
        assert [row.data for row in read_rows(f"memory://b/d{tail}")] == here, tail
    assert split_path("memory://b/d:test")[1] == "test"
    # A run that goes on elsewhere, or with a copy of the files, has the same data.
    for tail in ("", "/test.jsonl"):
        digest = data_digest(f"memory://b/d{tail}", whole=True)
        assert digest == data_digest(f"{local}{tail}", whole=True) is not None
    digest = data_digest("memory://b/d/train-*.jsonl", whole=True)
    os.environ[remote.FOLDER] = str(tmp_path / "another machine")
    assert data_digest("memory://b/d/train-*.jsonl", whole=True) == digest
    with pytest.raises(ValueError, match=r"\*\.csv: no file matches"):
        fetch_matches("memory://b/d/*.csv", "data")
    with pytest.raises(ValueError, match="a bucket's name cannot be a pattern"):
        fetch_matches("memory://*/d.csv", "data")


def test_a_model_is_found_and_digested_as_on_a_disk(store, chat_models):
    for path in (chat_models / "chat").iterdir():
        store.pipe_file(f"/b/chat/{path.name}", path.read_bytes())
    assert weights_digest("memory://b/chat") == weights_digest(str(chat_models / "chat"))
    found = locate("memory://b/chat", ("tokenizer.json",))
    assert {path.name for path in found.iterdir()} == {"config.json", "tokenizer.json"}
    store.pipe_file("/b/run/config.yaml", b"sft: {}\n")
    store.pipe_file("/b/run/model/config.json", b"{}")
    with pytest.raises(ValueError, match=r"is the folder of a run; its model is .*run/model"):
        locate("memory://b/run", ("*.safetensors",))


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"model='memory://b/absent': no such file or folder in"):
        locate("memory://b/absent", ("*.safetensors",))
    with pytest.raises(ValueError, match=r"wanted memory://BUCKET/FOLDER"):
        check_address("memory://", "model")


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gcs"), ("s3", "s3"), ("az", None)])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, scheme, extra):
    error = "Install the package for it"
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.delitem(vars(registry)["_registry"], scheme, raising=False)
    known = {"class": "no_such_package.FileSystem", "err": error}
    monkeypatch.setitem(registry.known_implementations, scheme, known)
    remedy = rf"pip install 'jaxalign\[{extra}\]'" if extra else error
    with pytest.raises(ValueError, match=rf"run\.folder='{scheme}://b/x': .*{remedy}; or mount"):
        check_address(f"{scheme}://b/x", "run.folder")


class HttpError(Exception):
    code = 403


class NoCredentialsError(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("Access Denied"),
        HttpError("b does not have storage.objects.list access"),
        NoCredentialsError("Unable to locate credentials"),
        OSError("An error occurred (AccessDenied) when calling ListObjectsV2"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_bucket_without_rights_gives_one_message(store, monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(type(store), "find", refuse)
    told = re.escape(f"model='memory://b/m': no right to use it ({type(error).__name__}: {error})")
    with pytest.raises(ValueError, match=told):
        fetch("memory://b/m", "model")
    place = remote.place_of("memory://b/m", "model")
    with pytest.raises(ValueError, match=r"roles/storage\.objectUser"):
        list_files(place._replace(address="gs://b/m"))
    with pytest.raises(ValueError, match=r"s3:GetObject"):
        list_files(place._replace(address="s3a://b/m"))


def test_other_errors_are_left_alone(store, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("the wire was cut")

    monkeypatch.setattr(type(store), "find", fail)
    with pytest.raises(OSError, match="the wire was cut"):
        fetch("memory://b/m", "model")
