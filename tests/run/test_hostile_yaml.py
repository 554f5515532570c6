"""Hostile YAML: one clear error with file, line and remedy, whatever the text holds."""

import os
import re

import pytest

from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import override, read_yaml

# 10^10 values in 400 bytes, of which every level is a list or a section.
LISTS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
SECTIONS = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(10))}}}\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 10)
)

HOSTILE = [
    (LISTS, r"more than 100000 values, with those of aliases; correct it.*line 5"),
    (LISTS + "model: {source: *a9}\n", "more than 100000 values"),
    (SECTIONS, "more than 100000 values"),
    (MERGES, "more than 100000 values"),
    ("a: &a {x: *a}\n", "an alias stands for a value that holds it.*line 1, column 11"),
    ("&a [*a]\n", "an alias stands for a value that holds it"),
    ("a: *b\n", "found undefined alias"),
    ("[" * 5000, "nested more than 50 deep.*line 1, column 51"),
    ("a: " + "{a: " * 5000, "nested more than 50 deep"),
    ("x: 1\n? [a, b]\n: 1\n", "a key is a sequence, wanted a name.*line 2, column 3"),
    ("? {a: b}\n: 1\n", "a key is a mapping, wanted a name"),
    ("? !!binary [a]\n: 1\n", "a key is a sequence, wanted a name"),
    ("a: !!bool x\n", r"'x' is no bool; correct it.*line 1, column 4"),
    ("a: !!int ''\n", "'' is no int"),
    ("a: !!int x\n", "'x' is no int"),
    ("a: !!float ''\n", "'' is no float"),
    ("a: !!timestamp x\n", "'x' is no timestamp"),
    ("a: 2026-02-31\n", "'2026-02-31' is no timestamp"),
    ("a: !!map x\n", "a scalar is no section"),
    ("a: !!set [x]\n", "a sequence is no section"),
    ("a: !!omap {x: 1}\n", "expected a sequence, but found mapping"),
    ("a: !!binary 'é'\n", "failed to convert base64 data into ascii"),
    ("a: !!python/object:os.system x\n", "could not determine a constructor"),
    ("a: !!python/name:os.system\n", "could not determine a constructor"),
    ("a: " + "9" * 400, "a number of more than 300 digits.*line 1, column 4"),
    ("a: " + "9" * 5000, "a number of more than 300 digits"),
    ("a: " + "1" + ":1" * 5000, "a number of more than 300 digits"),
    ("a: 0x" + "f" * 290, "a number beyond what a float holds"),
    ("a: 1\na: 2\n", "the key 'a' is given twice; correct it"),
    ("a: 1\n- b\n", "expected <block end>"),
    ("a: \x00\n", "unacceptable character"),
    ("--- {a: 1}\n--- {a: 2}\n", "expected a single document"),
    ("[1, 2]\n", "wanted 'key: value' lines, got"),
    ("", "wanted 'key: value' lines|the file is empty"),
]


@pytest.mark.parametrize(("text", "message"), HOSTILE)
def test_hostile_text(tmp_path, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is matched below)
        read_yaml(file)
    assert f"config {file}: " in str(caught.value)
    assert re.search(message, str(caught.value), re.DOTALL)
    assert len(str(caught.value)) < 1000


def test_a_file_that_is_none(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match=r"pipe\.yaml is a named pipe, wanted a file"):
        read_yaml(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match="/dev/zero is a device, wanted a file"):
        read_yaml("/dev/zero")
    (tmp_path / "a.yaml").write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(ValueError, match=r"config .*a\.yaml:2: invalid UTF-8 \(byte 0xff\); save"):
        read_yaml(tmp_path / "a.yaml")
    monkeypatch.setattr("jaxalign.run.config.yaml_loader.MAX_BYTES", 8)
    with pytest.raises(ValueError, match=r"a\.yaml: 10 bytes, wanted at most 8"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["a=&a [*a]", "a=" + "[" * 5000, "a=!!bool x", "a=" + "9" * 400])
def test_hostile_overrides(text):
    with pytest.raises(ValueError, match=r"override 'a=.*correct it"):
        override({}, [text])


def test_aliases_and_numbers_within_the_bounds(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: &a [1, 1e-5]\nb: [*a, *a]\nc: {x: 0x1f, y: -1_000}\nd: 2026-11-28\n")
    values = read_yaml(file)
    assert values["b"] == [[1, 1e-5], [1, 1e-5]]
    assert values["c"] == {"x": 31, "y": -1000}
    names = [f"shard-{n}.jsonl" for n in range(2000)]
    file.write_text("data: {train: [" + ", ".join(names) + "]}\n")
    assert read_yaml(file)["data"]["train"] == names


@pytest.mark.parametrize(
    "text",
    ["1: x", "null: x", "true: {a: 1}", "model: 2026-11-28", "model: {source: !!set {a}}",
     "run: {steps: " + "9" * 300 + "}", "data: {train: [[[]]]}",
     "optimizer: {learning_rate: .nan}"],
)  # fmt: skip
def test_wrong_values_are_problems_of_the_configuration(tmp_path, text):
    file = tmp_path / "a.yaml"
    file.write_text(text + "\n")
    with pytest.raises(ValueError, match="config:\n  "):
        load_config("sft", file)
