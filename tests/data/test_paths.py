"""Paths from people: where they lead, and what is there already."""

import pathlib

import pytest

from jaxalign.data import paths
from jaxalign.data.paths import check_free, local_path, replace_text


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert local_path("~/runs/one", "out") == pathlib.Path("/home/someone/runs/one")
    assert local_path("runs/~", "out") == pathlib.Path("runs/~")
    with pytest.raises(ValueError, match=r"out='~no-such-user/x': .*give the whole path"):
        local_path("~no-such-user/x", "out")


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://b/k", "https://a/b", "file:///tmp/x"])
def test_addresses_are_refused(address):
    scheme = address.partition(":")[0]
    with pytest.raises(ValueError, match=rf"run\.folder='{address}': .*{scheme}:// is neither"):
        local_path(address, "run.folder")


def test_what_is_there_stays_unless_it_may_go(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "blank").touch()
    for name in ("absent", "empty", "blank"):
        assert check_free(tmp_path / name, "--out") == tmp_path / name
    with pytest.raises(ValueError, match=r"--out=.*full' holds mine\.txt; .*--overwrite"):
        check_free(tmp_path / "full", "--out")
    with pytest.raises(ValueError, match=r"--out=.*file' exists; .*--overwrite"):
        check_free(tmp_path / "file", "--out")
    for name in ("full", "file"):
        assert check_free(tmp_path / name, "--out", overwrite=True) == tmp_path / name
    # Of a folder that is written into, only what would be replaced counts.
    assert check_free(tmp_path / "full", "--out", names=("model",)) == tmp_path / "full"
    for number in range(7):
        (tmp_path / "full" / f"{number}").write_text("x")
    with pytest.raises(ValueError, match=r"holds 0, 1, 2, 3 and 4 more;"):
        check_free(tmp_path / "full", "--out")


@pytest.mark.parametrize("source", ["run/model", "run/model/part", "link"])
def test_what_is_read_is_never_replaced(tmp_path, source):
    (tmp_path / "run/model/part").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run/model")
    for target, names in (("run", ("model",)), ("run/model", None)):
        with pytest.raises(ValueError, match=r"is read from there, and would be replaced"):
            check_free(
                tmp_path / target,
                "out",
                overwrite=True,
                sources=["org/name", "hf://x", tmp_path / source],
                names=names,
            )
    check_free(tmp_path / "run", "out", overwrite=True, sources=[tmp_path / source], names=("x",))


def test_a_text_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(self, text, encoding):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_text", full)
        with pytest.raises(OSError, match="full"):
            replace_text(path, "new")
    assert path.read_text() == "old"
    replace_text(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert paths.is_empty(tmp_path / "absent")
