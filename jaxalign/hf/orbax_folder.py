"""Orbax folders: the configs and tokenizer of a Hugging Face folder, with weights under `params/`.

The weights are our parameter tree. Orbax reads and writes each device's shards directly, so such a
folder loads fast on any number of hosts: no tensor is renamed, transposed or converted.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxalign.hf import families
from jaxalign.hf.source import dtypes_to_remember, read_json
from jaxalign.types import Params

PARAMS = "params"


def is_orbax_folder(folder: pathlib.Path) -> bool:
    """Whether a folder holds an Orbax checkpoint of parameters."""
    return (folder / PARAMS / "_METADATA").is_file()


class OrbaxFolder:
    """A model's parameters, as `jaxalign import` writes them.

    Attributes:
      folder: the folder.
      config: `config.json`.
      dtypes: leaf of the parameter tree → dtype.
    """

    def __init__(self, folder: pathlib.Path):
        import orbax.checkpoint as ocp

        self.folder = folder
        self.config = read_json(folder / "config.json")
        self._checkpointer = ocp.StandardCheckpointer()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        try:
            metadata: Any = self._checkpointer.metadata((folder / PARAMS).absolute())
            for path, leaf in families.flatten(metadata.item_metadata.tree).items():
                self._shapes[path] = tuple(leaf.shape)
                self.dtypes[path] = np.dtype(leaf.dtype)
        except Exception as error:  # Orbax and TensorStore raise many types
            raise self._damaged(error) from error

    def load(self, shapes: Params, shardings: Mapping[str, Any], dtype: np.dtype | None) -> Params:
        """Loads the parameters.

        Args:
          shapes: `model.shapes`.
          shardings: leaf path → sharding; a leaf without one goes to the default device.
          dtype: the result's dtype; None: the stored dtype of each leaf.

        Raises:
          ValueError: the parameters do not fit the model, or the folder is damaged.
        """
        expected = {path: tuple(leaf.shape) for path, leaf in families.flatten(shapes).items()}
        wrong = [
            f"{path}: {self._shapes.get(path, 'missing')}, wanted {expected.get(path, 'none')}"
            for path in sorted(expected | self._shapes)
            if expected.get(path) != self._shapes.get(path)
        ]
        if wrong:
            raise ValueError(
                f"{self.folder}: the weights do not fit config.json. {'; '.join(wrong[:12])} "
                f"({len(wrong)} in all); import the model again"
            )
        default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        tree = {
            path: jax.ShapeDtypeStruct(
                shape,
                self.dtypes[path] if dtype is None else dtype,
                sharding=shardings.get(path, default),
            )
            for path, shape in expected.items()
        }
        try:
            return self._checkpointer.restore(
                (self.folder / PARAMS).absolute(), families.unflatten(tree)
            )
        except Exception as error:  # Orbax and TensorStore raise many types
            raise self._damaged(error) from error

    @property
    def source_dtypes(self) -> dict[str, str]:
        """The dtypes to remember, by HF name; see `jaxalign.hf.source.SOURCE_DTYPES`."""
        config = families.config_from_hf(self.config)
        shapes = {
            path: jax.ShapeDtypeStruct(s, self.dtypes[path]) for path, s in self._shapes.items()
        }
        leaves = families.leaves(config, families.unflatten(shapes))
        return dtypes_to_remember(
            {n: self.dtypes[leaf.path] for leaf in leaves for n in leaf.names}
        )

    def close(self) -> None:
        """Closes the checkpointer."""
        self._checkpointer.close()

    def _damaged(self, error: Exception) -> ValueError:
        lines = str(error).strip().splitlines() or [""]
        return ValueError(
            f"{self.folder / PARAMS} is not a readable Orbax checkpoint of parameters "
            f"({type(error).__name__}: {lines[0]}); import the model again"
        )


def write_params(params: Params, folder: pathlib.Path) -> None:
    """Writes `folder/params`; every process writes its own shards.

    Args:
      params: nested dict of arrays.
      folder: an existing folder on a file system that all processes share.
    """
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / PARAMS).absolute(), params)
