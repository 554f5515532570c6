"""Checksums: whatever happens to a file after it was written is found, and named."""

import json

import pytest

from jaxalign.hf import checksums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "state" / "d").mkdir(parents=True)
    (tmp_path / "state" / "d" / "0a").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "state" / "commit_success.txt").write_text("yes")
    checksums.write(tmp_path, ["commit_success.txt"])
    return tmp_path


def found(folder):
    return [str(damage) for damage in checksums.check(folder)]


def test_an_untouched_folder_is_sound(folder):
    assert checksums.check(folder) == []
    listed = json.loads((folder / "checksums.json").read_text())["files"]
    assert sorted(listed) == ["config.json", "empty", "state/d/0a"]
    assert listed["state/d/0a"]["bytes"] == 10240
    assert not list(folder.glob(".*"))


def test_a_known_checksum(tmp_path):
    # xxHash's own test vector for no bytes at all.
    (tmp_path / "nothing").write_bytes(b"")
    checksums.write(tmp_path)
    listed = json.loads((tmp_path / "checksums.json").read_text())["files"]
    assert listed["nothing"]["sum"] == "99aa06d3014798d86001c324468d497f"


@pytest.mark.parametrize("bit", [0, 7, 40_000, 81_919])
def test_a_flipped_bit_is_found(folder, bit):
    path = folder / "state" / "d" / "0a"
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    assert found(folder) == ["state/d/0a has other bytes than were written"]


def test_cut_grown_and_missing_files_are_found(folder):
    (folder / "config.json").write_text('{"a"')
    (folder / "empty").write_text("something")
    (folder / "state" / "d" / "0a").unlink()
    assert found(folder) == [
        "config.json is cut: 4 of 8 bytes",
        "empty has grown: 9 of 0 bytes",
        "state/d/0a is missing",
    ]


def test_what_is_not_listed_does_not_matter(folder):
    (folder / "README.md").write_text("mine")
    (folder / "state" / "commit_success.txt").write_text("no")
    assert checksums.check(folder) == []


def test_a_folder_without_checksums_says_nothing(tmp_path):
    assert checksums.check(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"files": 3}', '{"files": {"a": 1}}', '{"files": {"a": {"bytes": "x"}}}'],
)
def test_damaged_checksums_are_damage(folder, text):
    (folder / "checksums.json").write_text(text)
    assert found(folder) == ["checksums.json is damaged: it is no list of checksums"]


def test_checksums_of_another_kind_are_not_taken_for_these(folder):
    path = folder / "checksums.json"
    path.write_text(path.read_text().replace("xxh3_128", "md5"))
    assert found(folder) == ["checksums.json has algorithm='md5', wanted 'xxh3_128'"]
