"""Recipes by name: `recipe:llama-3.1-8b/ppo` is a YAML that comes with the package."""

from __future__ import annotations

import difflib
import os
import pathlib

from jaxalign.data.bounds import check_plain
from jaxalign.data.paths import local_path

PREFIX = "recipe:"

# In a checkout this links to `configs/`; a wheel holds the files themselves.
FOLDER = pathlib.Path(__file__).parents[1] / "configs"


def recipes() -> dict[str, pathlib.Path]:
    """Name → file of every recipe: `sft`, `ppo_grpo`, …, and `qwen3-8b/dpo`, … of the models."""
    found = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    for path in sorted((FOLDER / "recipes").glob("*/*.yaml")):
        found[f"{path.parent.name}/{path.stem}"] = path
    return found


def recipe_path(name: str) -> pathlib.Path:
    """The file of a recipe.

    Args:
      name: with or without `recipe:`.

    Raises:
      ValueError: there is none of this name.
    """
    name, known = name.removeprefix(PREFIX), recipes()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise ValueError(f"recipe {name!r}: there is none; {hint}known: {', '.join(known)}")


def find_config(path: str | os.PathLike[str]) -> pathlib.Path:
    """Finds a configuration: `recipe:NAME`, or a file.

    Raises:
      ValueError: no such recipe or file, or a pipe or device.
    """
    text = os.fspath(path)
    if text.startswith(PREFIX):
        return recipe_path(text)
    file = local_path(path, "config")
    check_plain(file)
    if file.is_file():
        return file
    if file.is_dir():
        inside = file / "config.yaml"
        hint = f"; did you mean {inside}?" if inside.is_file() else ""
        raise ValueError(f"config {text!r}: this is a folder, wanted a YAML file{hint}")
    name = _recipe_of(file)
    if name is not None:
        raise ValueError(
            f"config {text!r}: no such file; the package has this one as {PREFIX}{name}, and "
            f"`jaxalign init {name}` writes a copy to change"
        )
    raise ValueError(
        f"config {text!r}: no such file; `jaxalign init sft` writes one to start from, and "
        f"{PREFIX}sft names one that comes with the package"
    )


def _recipe_of(file: pathlib.Path) -> str | None:
    """The recipe that a path such as `configs/recipes/qwen3-8b/sft.yaml` stands for."""
    if "configs" not in file.parts or file.suffix not in (".yaml", ".yml"):
        return None
    below = file.with_suffix("").parts[file.parts.index("configs") + 1 :]
    name = "/".join(below).removeprefix("recipes/")
    return name if name in recipes() else None
