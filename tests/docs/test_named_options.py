"""Options that pages name as `section.option` exist."""

import pathlib
import re

import pytest

from jaxalign.commands.options.table import all_sections

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])
SECTIONS = all_sections()
OPTIONS = {option.name for section in SECTIONS.values() for option in section.options}

# What looks like an option: `run.json` is a file, `reward.make_step` a function of Python, and
# `ppo.run.steps` a key of the quickstart's stages.
OTHER = re.compile(
    r"(run|data|config)\.(json|txt|yaml|html|jsonl)$|.*\.(md|py|yaml)$|model\.safetensors.*"
    r"|(sft|reward|dpo|kto|ppo)\.([A-Z]\w*|make_\w+|minibatches|init_params|join_tokens|next_\w+)$"
    r"|(sft|reward|dpo|kto|ppo)\.(run|data|ppo|calibrate|loss_type)\b.*"
    r"|mesh\.rules(_of)?\..*|run\.config\..*"
)


def named(text):
    """`section.option`, alone or with a value, in backticks or as an override of a command."""
    found = re.findall(r"[`\s]([a-z_]+(?:\.[a-zA-Z_0-9]+)+)(?=`|=|: )", text)
    sections = {name.split(".")[0] for name in SECTIONS}
    return {name for name in found if name.split(".")[0] in sections and not OTHER.match(name)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_they_exist(path):
    assert not named(path.read_text("utf-8")) - OPTIONS - set(SECTIONS)


def test_there_are_many_and_a_wrong_one_is_seen():
    every = set().union(*(named(path.read_text("utf-8")) for path in PAGES))
    assert len(every) > 100
    assert named("set `ppo.kl_coeff` to 0, data.rowz=4 and `run.json`") == {
        *("ppo.kl_coeff", "data.rowz")
    }
