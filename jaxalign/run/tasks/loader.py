"""The source of a run's arrays: files here; shapes in `plan`, random numbers in `bench`."""

from __future__ import annotations

import abc
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxalign.algorithms import moving_reference
from jaxalign.algorithms.state import init_state
from jaxalign.hf import load_adapter, load_pretrained
from jaxalign.hf.peft_read import Adapted
from jaxalign.hf.quantized_base import quantize_params, with_quantized_base
from jaxalign.hf.source import ADAPTER_CONFIG, is_adapter, locate
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora_config import LoraConfig
from jaxalign.models.scorer import Scorer
from jaxalign.parallel.host_memory import to_host_memory
from jaxalign.parallel.sharding import mesh_of, param_shardings
from jaxalign.run.config.base import ModelConfig
from jaxalign.types import Params, TrainState


class Loader(abc.ABC):
    """Everything a builder does with arrays; `run.tasks.models` uses only these methods.

    Attributes:
      notes: assumptions made while loading, one sentence each.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []

    @abc.abstractmethod
    def load(
        self, source: str, config: ModelConfig, mesh: Mesh, *, remat: str
    ) -> tuple[Decoder | Scorer, Params]:
        """A model and its parameters on a mesh, whatever kind of model it is.

        Args:
          source: folder, `.gguf` file or hub id.
          config: dtypes, attention, and quantisation.
          mesh: the mesh for the parameters.
          remat: what the backward pass keeps; "none" for models that are not trained.
        """

    @abc.abstractmethod
    def load_scorer(
        self, source: str, config: ModelConfig, mesh: Mesh, attributes: tuple[str, ...] = ()
    ) -> tuple[Decoder | Scorer, Params]:
        """Like `load`, if a reward model or a critic is expected.

        Args:
          source: as in `load`.
          config: as in `load`; also the remat policy, because a critic is trained.
          mesh: the mesh for the parameters.
          attributes: the attributes that the run weighs, for loaders that read no files.
        """

    @abc.abstractmethod
    def find_adapter(self, source: str, *, assume: bool) -> pathlib.Path | None:
        """The folder of an adapter; None for a whole model.

        Args:
          source: folder or hub id.
          assume: treat a missing source as an adapter, in loaders that read no files.
        """

    @abc.abstractmethod
    def load_adapter(
        self, source: str, model: Decoder, params: Params, like: LoraConfig,
        attributes: tuple[str, ...] = (),
    ) -> Adapted:  # fmt: skip
        """Loads a reward model's adapter on a base that is already in memory.

        Args:
          source: folder or hub id.
          model: the base.
          params: its parameters, which the adapter's model shares.
          like: the options of other adapters on the base, for loaders that read no files.
          attributes: as in `load_scorer`.
        """

    @abc.abstractmethod
    def make(self, function: Callable[..., Any], *args: Any) -> Any:
        """The arrays that a function returns; `place` shards them."""

    @abc.abstractmethod
    def place(self, params: Params, shardings: Any) -> Params:
        """Shards parameters by a tree of shardings."""

    @abc.abstractmethod
    def to_host(self, params: Params) -> Params:
        """Copies arrays to host memory."""

    @abc.abstractmethod
    def init_state(
        self, params: Params, tx: optax.GradientTransformation, frozen: Params
    ) -> TrainState:
        """The initial train state, with copies of `params`."""

    @abc.abstractmethod
    def start_reference(self, state: TrainState, params: Params) -> TrainState:
        """The state whose moving reference starts as `params`."""


class ArrayLoader(Loader):
    """A loader of real arrays; subclasses define their source."""

    def load_scorer(
        self, source: str, config: ModelConfig, mesh: Mesh, attributes: tuple[str, ...] = ()
    ) -> tuple[Decoder | Scorer, Params]:
        """Same as `load`, because files tell their kind of model."""
        return self.load(source, config, mesh, remat=config.remat)

    def find_adapter(self, source: str, *, assume: bool) -> pathlib.Path | None:
        """The folder, if it exists and holds an adapter."""
        path = pathlib.Path(source).expanduser()
        return path if is_adapter(path) else None

    def load_adapter(
        self, source: str, model: Decoder, params: Params, like: LoraConfig,
        attributes: tuple[str, ...] = (),
    ) -> Adapted:  # fmt: skip
        """See `jaxalign.hf.load_adapter`."""
        return load_adapter(model, params, source)

    def make(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls the function."""
        return function(*args)

    def place(self, params: Params, shardings: Any) -> Params:
        """Moves arrays that are not yet in place."""
        return jax.device_put(params, shardings)

    def to_host(self, params: Params) -> Params:
        """See `to_host_memory`."""
        return to_host_memory(params)

    def init_state(
        self, params: Params, tx: optax.GradientTransformation, frozen: Params
    ) -> TrainState:
        """See `algorithms.step.init_state`."""
        return init_state(params, tx, frozen)

    def start_reference(self, state: TrainState, params: Params) -> TrainState:
        """See `algorithms.moving_reference.start_reference`."""
        return moving_reference.start_reference(state, params)


class FileLoader(ArrayLoader):
    """Loads arrays from model files; runs use this loader."""

    def load(
        self, source: str, config: ModelConfig, mesh: Mesh, *, remat: str
    ) -> tuple[Decoder | Scorer, Params]:
        """See `load_pretrained`."""
        return load_pretrained(
            source,
            mesh=mesh,
            dtype=config.dtype,
            compute_dtype=config.compute_dtype,
            remat=remat,
            attention=config.attention,
            quantize=config.quantize,
        )

    def find_adapter(self, source: str, *, assume: bool) -> pathlib.Path | None:
        """A local folder, or a download from the hub."""
        path = locate(source, (ADAPTER_CONFIG, "config.json"))
        return path if is_adapter(path) else None


class KeepingLoader(FileLoader):
    """Loads from files, except for models that this process has made, which it passes on.

    The stages of a pipeline use it so that weights need not be written and read between them.
    Models are shared, never copied; steps only donate copies (`init_state`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, tuple[Decoder | Scorer, Params]] = {}

    def keep(self, source: str, model: Decoder | Scorer, params: Params) -> None:
        """Stores a model under the name `source`.

        Args:
          source: the folder that the model was, or will be, written to.
          model: without adapters.
          params: its parameters on the mesh of the runs to come, in their `model.dtype`.
        """
        self._kept[source] = model, params

    def forget(self, source: str) -> None:
        """Releases a model; `source` is then an ordinary folder again."""
        self._kept.pop(source, None)

    def load(
        self, source: str, config: ModelConfig, mesh: Mesh, *, remat: str
    ) -> tuple[Decoder | Scorer, Params]:
        """The model stored under `source`, else as `FileLoader`."""
        if source not in self._kept:
            return super().load(source, config, mesh, remat=remat)
        model, params = self._kept[source]
        decoder = model.base if isinstance(model, Scorer) else model
        decoder = dataclasses.replace(decoder, remat=remat, attention=config.attention)
        kept = dataclasses.replace(model, base=decoder) if isinstance(model, Scorer) else decoder
        if config.quantize is not None:
            kept = with_quantized_base(kept, config.quantize)
            params = quantize_params(params, kept)
        elif mesh_of(params) is not None:
            return kept, params
        return kept, self.place(params, param_shardings(kept.axes, mesh, params))

    def find_adapter(self, source: str, *, assume: bool) -> pathlib.Path | None:
        """None for a stored model, else as `FileLoader`."""
        return None if source in self._kept else super().find_adapter(source, assume=assume)
