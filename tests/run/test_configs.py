"""configs/: every option stands in some YAML, and commented lines show the defaults."""

import dataclasses
import pathlib
import re
import typing

import pytest

from jaxalign.commands.synth.config import SynthRun, load_synth
from jaxalign.run.config.runs import RUNS, load_config

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
TEXT = "\n".join(path.read_text("utf-8") for path in FILES)

# `  # option: value   # what it means`, in the place where the option would stand
COMMENTED = re.compile(r"^( *)# ([a-z_0-9]+: (?:[\w.]+|\[\]|\{\}))(?: +#.*)?$", re.MULTILINE)


def config_classes():
    """All dataclasses that a configuration may hold."""
    found, todo = {}, [*RUNS.values(), SynthRun]
    while todo:
        cls = todo.pop()
        todo += typing.get_args(cls)
        if dataclasses.is_dataclass(cls) and cls not in found:
            found[cls] = [field.name for field in dataclasses.fields(cls)]
            todo += cls.kinds().values() if hasattr(cls, "kinds") else ()
            for hint in typing.get_type_hints(cls).values():
                todo += [hint, *typing.get_args(hint)]
    return found


@pytest.mark.parametrize(
    "cls", config_classes(), ids=lambda cls: f"{cls.__module__}.{cls.__name__}"
)
def test_every_option_is_shown(cls):
    names = set(re.findall(r"\b([a-z_0-9]+):", TEXT))
    assert not set(config_classes()[cls]) - names


def load(path, text, folder):
    """The configuration that a file with this text would hold."""
    algorithm, copy = path.stem.partition("_")[0], folder / path.name
    copy.write_text(text, encoding="utf-8")
    return load_synth(copy) if algorithm == "synth" else load_config(algorithm, copy)


@pytest.mark.parametrize(
    "path", [p for p in FILES if COMMENTED.search(p.read_text("utf-8"))], ids=lambda p: p.stem
)
def test_commented_lines_are_the_defaults(path, tmp_path):
    text = path.read_text("utf-8")
    plain, shown = (load(path, t, tmp_path) for t in (text, COMMENTED.sub(r"\1\2", text)))
    assert shown == plain


def test_lines_are_found(tmp_path):
    found = [name for _, name in COMMENTED.findall(TEXT)]
    assert "train_on: all" in found
    assert "offload_frozen: false" in found
    assert len(found) > 25
    text = (FOLDER / "sft.yaml").read_text("utf-8")
    wrong = text.replace("# window: 1024", "# window: 1025")
    assert wrong != text
    path = FOLDER / "sft.yaml"
    assert load(path, COMMENTED.sub(r"\1\2", wrong), tmp_path) != load(path, wrong, tmp_path)
