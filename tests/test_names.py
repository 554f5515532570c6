"""The package's names: lazy, complete, and the same for programs as for type checkers."""

import ast
import importlib
import inspect
import pathlib
import subprocess
import sys
import tomllib
import types

import pytest

import jaxalign

HEAVY = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers", "datasets", "orbax", "grain")
READERS = ("transformers", "datasets", "grain", "orbax", "gguf", "torch", "safetensors")


def loaded(code, names):
    """Which of the modules are loaded after a program."""
    code += f"\nimport sys; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


def test_importing_the_package_loads_nothing():
    assert loaded("import jaxalign", HEAVY) == []
    code = "import sys, jaxalign; print([m for m in sys.modules if m.startswith('jaxalign')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == ["jaxalign"]


def test_steps_load_no_reader_of_files():
    code = (
        "import jaxalign\n"
        "from jaxalign import dpo, losses, ppo, reward, sft\n"
        "assert jaxalign.make_mesh and jaxalign.target_logprobs and jaxalign.compile_step"
    )
    assert loaded(code, READERS) == []


@pytest.mark.parametrize("name", jaxalign.__all__)
def test_every_public_name_is_there(name):
    value = getattr(jaxalign, name)
    assert value is getattr(jaxalign, name)
    is_module = name in ("losses", "sft", "reward", "dpo", "kto", "ppo")
    assert isinstance(value, types.ModuleType) == is_module
    if is_module:
        assert value.__name__.split(".")[-1] == name
    elif name != "Weighted":  # a class without a docstring of its own would still have one of tuple
        assert value.__name__ == name
    assert inspect.getdoc(value)


def test_the_public_names_do_not_change_by_accident():
    assert dir(jaxalign) == sorted(set(jaxalign.__all__)) == jaxalign.__all__
    assert len(jaxalign.__all__) == 65


def test_a_module_of_the_same_name_does_not_hide_generate():
    import jaxalign.sampling.generate

    assert inspect.isfunction(jaxalign.generate)
    code = (
        "import inspect, jaxalign.sampling.generate\n"
        "from jaxalign import generate, sft\n"
        "assert inspect.isfunction(generate) and inspect.ismodule(sft)"
    )
    assert loaded(code, ("torch",)) == []


def test_rooms_are_reached_as_attributes():
    code = (
        "import jaxalign as ja\n"
        "assert ja.types.TokenBatch is ja.TokenBatch and ja.data.sft_batches is ja.sft_batches"
    )
    assert loaded(code, ("torch",)) == []


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'jaxalign' has no attribute 'sftt'"):
        jaxalign.sftt  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse(pathlib.Path(jaxalign.__file__).read_text("utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        homes |= {alias.name: node.module for alias in node.names}
    assert sorted(homes) == jaxalign.__all__
    for name, module in homes.items():
        home = jaxalign._HOME.get(name)
        if home is not None:
            assert module == f"jaxalign.{home}"
        else:
            assert f"{module}.{name}" == f"jaxalign.{jaxalign._MODULES[name]}"


def test_the_command_starts_at_the_entry_point():
    """Read from the project's file: an editable installation keeps the entry point of its day."""
    pyproject = pathlib.Path(__file__).parents[1] / "pyproject.toml"
    script = tomllib.loads(pyproject.read_text("utf-8"))["project"]["scripts"]["jaxalign"]
    module, _, function = script.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
