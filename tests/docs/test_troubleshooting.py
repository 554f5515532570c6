"""docs/troubleshooting.md quotes messages that the package really gives."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text("utf-8")


def messages():
    """The quoted messages: first cells in backticks."""
    return re.findall(r"^\| `([^`]+)` \| ", PAGE, re.MULTILINE)


def texts():
    """Every text of the package, with … for what is filled in."""
    for path in (ROOT / "jaxalign").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                yield "".join(parts)


TEXTS = "\0".join(re.sub(r"\s+", " ", text) for text in texts())


def is_given(message):
    """Whether the pieces between dots follow one another in one text."""
    pieces = [re.escape(piece.strip()) for piece in message.split("…") if piece.strip(" ;:.,")]
    return re.search("[^\0]*?".join(pieces), TEXTS) is not None


def test_there_are_many():
    assert len(messages()) > 30
    assert len(set(messages())) == len(messages())


@pytest.mark.parametrize("message", messages())
def test_a_message_is_given(message):
    assert is_given(message)
    assert max(len(piece.strip()) for piece in message.split("…")) > 8, "quote enough to find it"


def test_one_that_is_not_is_seen():
    assert not is_given("run.folder=… is occupied by …")
