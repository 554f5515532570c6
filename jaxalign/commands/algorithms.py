"""The algorithms for commands: their names, and the algorithm of a configuration."""

from __future__ import annotations

import argparse
from typing import Any


def algorithms() -> dict[str, str]:
    """The name of each algorithm, which is its command, and one line of help."""
    from jaxalign.run.tasks import ALGORITHMS

    return {name: algorithm.help for name, algorithm in ALGORITHMS.items()}


def load_any_config(parsed: argparse.Namespace) -> tuple[str, Any]:
    """The algorithm and the configuration of a YAML file.

    The algorithm's name may precede the file; otherwise the file's sections determine it.

    Raises:
      ValueError: a wrong file, or one that fits several algorithms.
    """
    from jaxalign.run.config.runs import algorithm_of, load_config
    from jaxalign.run.config.yaml import override, read_yaml

    path, overrides, algorithm = parsed.config, parsed.overrides, None
    if path in algorithms():
        if not overrides:
            raise ValueError(f"{parsed.command} {path}: wanted a YAML file behind it")
        algorithm, (path, *overrides) = path, overrides
    values = override(read_yaml(path), overrides)
    if algorithm is None:
        remedy = f"write it before the file: {parsed.command} sft FILE"
        algorithm = algorithm_of(values, remedy)
    return algorithm, load_config(algorithm, values)
