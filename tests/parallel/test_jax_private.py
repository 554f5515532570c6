"""Private names of JAX are used in one file only, and only until JAX has public ones."""

import ast
import importlib
import pathlib
import pkgutil
import re
import subprocess
import sys

import jax
import pytest

from jaxalign.parallel import jax_private

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOME = ROOT / "jaxalign/parallel/jax_private.py"
FILES = sorted(
    path for name in ("jaxalign", "scripts", "tests") for path in (ROOT / name).rglob("*.py")
)

# Attributes with an underscore that Python documents.
DOCUMENTED = {"_replace", "_asdict", "_fields", "_make", "_exit"}


# --- they are there ------------------------------------------------------------------------------


def test_what_the_private_names_give():
    assert {"client", "coordinator_address"} <= set(dir(jax_private.coordination()))
    assert isinstance(jax_private.on_cloud_tpu_vm(), bool)
    assert isinstance(jax_private.has_cuda(), bool)
    double = jax.jit(lambda x: 2 * x)
    assert jax_private.count_compiled(double) == 0
    double(1), double(2), double(1.0)
    assert jax_private.count_compiled(double) == 2


# --- when they may go ----------------------------------------------------------------------------


def public_names(*modules):
    return {
        f"{module}.{name}"
        for module in modules
        for name in dir(importlib.import_module(module))
        if not name.startswith("_")
    }


def extensions():
    """JAX's extension modules."""
    package = importlib.import_module("jax.extend")
    return ["jax.extend", *(f"jax.extend.{m.name}" for m in pkgutil.iter_modules(package.__path__))]


# Function → (public names to search, pattern of the name that would replace it).
REPLACED = {
    "coordination": (
        lambda: public_names("jax.distributed", *extensions()),
        ("coordinat", "key_value", "global_state", "distributed_client"),
    ),
    "on_cloud_tpu_vm": (
        lambda: public_names("jax", "jax.distributed", *extensions()),
        ("cloud_tpu", "tpu_vm"),
    ),
    "has_cuda": (lambda: public_names("jax", *extensions()), ("cuda",)),
    "count_compiled": (
        lambda: {f"jit(f).{n}" for n in dir(jax.jit(lambda x: x)) if not n.startswith("_")},
        ("cache_size", "cache_info", "num_compil", "compilations"),
    ),
}


def test_every_function_says_when_it_may_go():
    tree = ast.parse(HOME.read_text("utf-8"))
    assert {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} == set(REPLACED)


@pytest.mark.parametrize("name", list(REPLACED))
def test_jax_has_no_public_name_for_it_yet(name):
    names, words = REPLACED[name]
    there = [public for public in sorted(names()) if any(word in public for word in words)]
    assert not there, (
        f"jax {jax.__version__} has {', '.join(there)}: if that does what jax_private.{name} does, "
        "use it once the oldest JAX of pyproject.toml has it; if not, narrow the words in this test"
    )


# --- nobody else uses any ------------------------------------------------------------------------


def private_modules(tree):
    """Modules with an underscore inside another package: `jax._src`; `_thread` is Python's own."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if any(part.startswith("_") for part in name.split(".")[1:]):
                yield node.lineno, name


# Names with an underscore that our own files define.
OWN = re.compile(r"\b(?:self|cls)\.(_\w+)|(?:def|class) (_\w+)|^ *(_\w+)\b", re.MULTILINE)


def test_no_other_file_uses_private_names():
    texts = {path: path.read_text("utf-8") for path in FILES if path != HOME}
    own = {name for text in texts.values() for names in OWN.findall(text) for name in names}
    used = []
    for path, text in texts.items():
        # Parsing is slow: skip files without a match.
        names = set(re.findall(r"\._[a-zA-Z]\w*", text)) - {f".{x}" for x in own | DOCUMENTED}
        if not names and not re.search(r"^\s*(?:from|import) .*\b_", text, re.MULTILINE):
            continue
        tree = ast.parse(text)
        for line, name in private_modules(tree):
            package = name.split(".")[0]
            if package != "jaxalign" and not package.startswith("_"):
                used.append(f"{path}:{line}: {name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and f".{node.attr}" in names:
                used.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert not used, "move these into jaxalign/parallel/jax_private.py:\n" + "\n".join(used)


def test_importing_it_loads_nothing():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('alone', {str(HOME)!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
