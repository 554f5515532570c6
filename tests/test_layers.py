"""The rooms of the package: a file imports from its own and from lower ones, and in no circle."""

import ast
import pathlib
import re

import pytest

import jaxalign

PACKAGE = pathlib.Path(jaxalign.__file__).parent

# Room → layer, in the order of the flow; CONTRIBUTING has the same table.
LAYERS = {
    "types": 0,
    "losses": 1,
    "data": 1,
    "parallel": 1,
    "models": 2,
    "hf": 3,
    "sampling": 3,
    "rewards": 4,
    "algorithms": 4,
    "run": 5,
    "plan": 6,
    "commands": 7,
}

ALGORITHMS = ("sft", "reward", "dpo", "kto", "ppo")

# Names for users, and `python -m jaxalign`: what lies above the rooms.
FRONT = ("__init__.py", "__main__.py")

FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path not in {PACKAGE / name for name in FRONT}
)


def room(module):
    """The room of `a.b` below the package."""
    return module.split(".")[0]


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Modules of this package that a file imports as `a.b`, wherever in the file.

    Imports under `TYPE_CHECKING` count: a reader follows them too.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            # `from jaxalign.losses import ppo` names a module, `from jaxalign.types import X` not.
            for alias in node.names:
                inner = PACKAGE.joinpath(*module.split(".")[1:], alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                found.add(f"{module}.{alias.name}" if is_module else module)
    return {name.partition(".")[2] for name in found if name.split(".")[0] == "jaxalign"}


def test_the_top_of_the_package_is_the_rooms():
    names = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    rooms = {name if name != "types" else "types.py" for name in LAYERS}
    assert names == rooms | set(FRONT)


def test_contributing_has_the_same_table():
    """Rows such as `| 1 | `losses/` | …`: the layer, the room, what it is for."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)` \|", text, re.MULTILINE)
    assert [(room, int(layer)) for layer, room in rows] == list(LAYERS.items())


def test_there_is_something_to_check():
    assert len(FILES) > 20
    assert "losses.ppo" in imports(PACKAGE / "algorithms/ppo/loss.py")
    assert "types" in imports(PACKAGE / "losses/masked.py")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_come_from_lower_layers(path):
    here = room(name_of(path))
    assert here in LAYERS, f"{path}: name its layer in this test and in the design"
    for module in imports(path):
        there = room(module)
        if not there:  # the package itself, as users see it: for the top layer only
            assert here == "commands", f"{path} imports the package's front"
            continue
        assert there in LAYERS, f"{path} imports {module}, whose layer is unknown"
        assert there == here or LAYERS[there] < LAYERS[here], (
            f"{path} (layer {LAYERS[here]}) imports {module} (layer {LAYERS[there]})"
        )


def test_no_import_goes_round_in_a_circle():
    """Files of one room may import one another, but not each other."""
    graph = {name_of(path): imports(path) for path in FILES}
    done: set[str] = set()

    def visit(module, trail):
        assert module not in trail, " → ".join([*trail, module])
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, [*trail, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def file_of(algorithm):
    path = PACKAGE / f"algorithms/{algorithm}.py"
    return path if path.exists() else PACKAGE / f"algorithms/{algorithm}/__init__.py"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_do_not_import_one_another(name):
    others = {f"algorithms.{other}" for other in ALGORITHMS if other != name}
    assert not imports(file_of(name)) & others


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_have_the_same_sections_in_the_same_order(name):
    tree = ast.parse(file_of(name).read_text("utf-8"))
    names = []  # of what the file defines, or as a package imports from its files
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
    sections = [x for x in names if x in ("Config", "make_prepare", "make_loss", "make_step")]
    want = ["Config", "make_prepare", "make_loss", "make_step"]
    if name in ("sft", "reward"):
        want.remove("make_prepare")
    assert sections == want
    assert ast.get_docstring(tree)


def test_shared_parts_of_algorithms_know_no_algorithm():
    for part in ("loss", "step", "state", "prepare", "pairs", "moving_reference", "objectives"):
        names = {f"algorithms.{name}" for name in ALGORITHMS}
        assert not imports(PACKAGE / f"algorithms/{part}.py") & names


def test_mesh_axis_names_live_in_one_file():
    axes = {"fsdp", "tensor"}
    for path in FILES:
        module = name_of(path)
        if room(module) in ("parallel", "run", "plan", "commands"):
            continue  # the home, and the rooms where users write mesh sizes
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in axes, f"{path}:{node.lineno} names a mesh axis"


# Platforms are told apart in `parallel`, `plan`, and the two tables of `models`.
PLATFORMS = {"cpu", "gpu", "tpu", "cuda", "rocm"}
ASKING = {"current_device", "platform_dependent", "default_backend"}


def platform_words(path):
    """Platforms, and ways to find out about them, that a file names: (line, word)."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and node.value in PLATFORMS:
            yield node.lineno, node.value
        elif isinstance(node, ast.Name) and node.id in ASKING:
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and node.attr in ASKING:
            yield node.lineno, node.attr


def test_platforms_are_named_in_few_files():
    tables = ("models.backend", "models.attention.dispatch")
    assert list(platform_words(PACKAGE / "models/backend.py"))
    for path in FILES:
        module = name_of(path)
        if room(module) not in ("parallel", "plan") and module not in tables:
            assert not list(platform_words(path)), f"{path}: ask `models.backend.backend()` instead"


def test_no_function_is_longer_than_a_page():
    """80 lines of code at most, without signature, docstring, comments and blank lines."""
    long = {}
    for path in PACKAGE.rglob("*.py"):
        lines = path.read_text("utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if not isinstance(node, ast.FunctionDef):
                continue
            first = node.body[0]
            told = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            body = lines[first.end_lineno if told else first.lineno - 1 : node.end_lineno]
            code = [line for line in body if line.strip() and not line.strip().startswith("#")]
            if len(code) > 80:
                long[f"{path.relative_to(PACKAGE)}: {node.name}"] = len(code)
    assert not long
