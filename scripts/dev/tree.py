"""The package's rooms and their files, from the first lines of their docstrings.

python scripts/dev/tree.py             # rooms, and the names of their files
python scripts/dev/tree.py --files     # every file with its first line
python scripts/dev/tree.py --write     # puts the first form into README.md
"""

import argparse
import ast
import pathlib
import textwrap

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "jaxalign"
README = ROOT / "README.md"
BEGIN, END = "<!-- tree:begin -->\n```\n", "```\n<!-- tree:end -->"
ORDER = (
    *("types", "losses", "data", "parallel", "models", "hf", "sampling", "rewards"),
    *("algorithms", "run", "plan", "commands"),
)
"""The rooms in the order in which data flows through them."""

_WIDTH, _INDENT = 100, 18


def summary(path):
    """The first line of a module's docstring, or of a package's."""
    file = path / "__init__.py" if path.is_dir() else path
    docstring = ast.get_docstring(ast.parse(file.read_text("utf-8")))
    if not docstring:
        raise ValueError(f"{file}: no docstring; its first line describes it in README.md")
    return docstring.splitlines()[0]


def rooms():
    """The rooms, in order.

    Raises:
      ValueError: a room that `ORDER` does not have.
    """
    found = {path.stem: path for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    if set(found) != set(ORDER):
        raise ValueError(f"{PACKAGE}: rooms {sorted(set(found) ^ set(ORDER))} differ from ORDER")
    return [found[name] for name in ORDER]


def modules(folder):
    """The modules of a package, then its packages."""
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("__"))
    return files, sorted(path.parent for path in folder.glob("*/__init__.py"))


def tree(with_files):
    """The tree as text."""
    lines = ["jaxalign/"]

    def add(path, depth):
        name = "  " * depth + path.name + ("/" if path.is_dir() else "")
        margin = " " * _INDENT
        text = textwrap.wrap(summary(path), _WIDTH - _INDENT)
        lines.append(f"{name:<{_INDENT - 1}} {text[0]}")
        lines.extend(margin + line for line in text[1:])
        if not path.is_dir():
            return
        files, packages = modules(path)
        if with_files:
            for file in files:
                add(file, depth + 1)
        elif files:
            names = " ".join(file.stem for file in files)
            lines.extend(
                textwrap.wrap(names, _WIDTH, initial_indent=margin, subsequent_indent=margin)
            )
        for package in packages:
            add(package, depth + 1)

    for room in rooms():
        add(room, 1)
    return "\n".join(lines) + "\n"


def in_readme(text, shown):
    """README.md with the tree in its place."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{README}: no {BEGIN!r} … {END!r} in it")
    return before + BEGIN + shown + END + after


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", action="store_true", help="a line for every file")
    parser.add_argument("--write", action="store_true", help="update README.md")
    parsed = parser.parse_args()
    if parsed.write:
        README.write_text(in_readme(README.read_text("utf-8"), tree(False)), encoding="utf-8")
    else:
        print(tree(parsed.files), end="")


if __name__ == "__main__":
    main()
