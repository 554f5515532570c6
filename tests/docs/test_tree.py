"""README's tree of the package: whole, true, and short enough to read."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "jaxalign"


def shown(*options):
    command = [sys.executable, str(ROOT / "scripts/dev/tree.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def in_readme():
    text = (ROOT / "README.md").read_text("utf-8")
    return text.partition("<!-- tree:begin -->\n```\n")[2].partition("```\n<!-- tree:end -->")[0]


def test_readme_has_the_tree_of_today():
    assert in_readme() == shown(), "python scripts/dev/tree.py --write"


def names(text):
    """Files as paths, read from the tree by its indentation alone."""
    found, folders = set(), []
    for line in text.splitlines()[1:]:
        depth = (len(line) - len(line.lstrip())) // 2
        if depth < 4:
            name = line.split()[0]
            folders = [*folders[: depth - 1], name.rstrip("/")]
            if not name.endswith("/"):
                found.add("/".join(folders))
    return found


def modules():
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    return {str(path) for path in files if not path.name.startswith("__")}


def test_the_long_form_has_every_file():
    assert names(shown("--files")) == modules()


def test_the_short_form_names_every_file():
    words = set(in_readme().split())
    for module in modules():
        path = pathlib.PurePath(module)
        assert path.stem in words or path.name in words
        assert all(f"{folder}/" in words for folder in path.parent.parts)


def test_it_can_be_read():
    lines = in_readme().splitlines()
    assert len(lines) < 110
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("module", sorted(modules()))
def test_first_lines_stand_alone(module):
    """A first line is what the tree shows of a file."""
    line = (PACKAGE / module).read_text("utf-8").splitlines()[0]
    assert line.lstrip("r").startswith('"""')
    assert len(line) > 20
