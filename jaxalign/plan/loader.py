"""A run's models as shapes, from `config.json` or a GGUF file's metadata alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.resources
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxalign.algorithms.moving_reference import reference_of
from jaxalign.algorithms.state import opt_state_shardings
from jaxalign.hf import families, load_adapter
from jaxalign.hf.gguf_file import GGUFFile
from jaxalign.hf.peft_read import Adapted
from jaxalign.hf.source import (
    ADAPTER_CONFIG,
    base_of,
    is_adapter,
    locate,
    read_json,
    without_revision,
)
from jaxalign.models.backend import backend
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import adapters_of, sharing_base
from jaxalign.models.lora_config import LoraConfig
from jaxalign.models.quantized import map_floats
from jaxalign.models.scorer import Scorer
from jaxalign.parallel.host_memory import HOST, is_offloaded
from jaxalign.parallel.sharding import mesh_of, param_shardings, replicated
from jaxalign.run.config.base import ModelConfig
from jaxalign.run.tasks.loader import Loader
from jaxalign.run.tasks.models import place
from jaxalign.types import Params, TrainState


class HostArray(jax.ShapeDtypeStruct):
    """The shape of an array in the host's memory.

    Its sharding has that memory kind too, if the compiler supports it. Ahead-of-time compilers for
    GPUs do not: a program that reads such an array is then counted as having all of it on the
    device.
    """


class ShapeLoader(Loader):
    """A loader that returns `ShapeDtypeStruct`s with the shardings of a run's arrays."""

    def load(
        self, source: str, config: ModelConfig, mesh: Mesh, *, remat: str
    ) -> tuple[Decoder | Scorer, Params]:
        """Reads `config.json`, or the metadata of a GGUF file; weights are not needed."""
        model = read_model(source, config, mesh, remat)
        return model, _param_shapes(model, config, mesh)

    def load_scorer(
        self, source: str, config: ModelConfig, mesh: Mesh, attributes: tuple[str, ...] = ()
    ) -> tuple[Decoder | Scorer, Params]:
        """One that is not there is taken to be shaped like the policy, where that is not either."""
        if known_shape(config.source) is None or pathlib.Path(source).exists():
            return self.load(source, config, mesh, remat=config.remat)
        self.notes.append(
            f"reward model {source!r} is not there: taken to be shaped like the policy"
        )
        model = read_model(config.source, config, mesh, config.remat)
        base = model.base if isinstance(model, Scorer) else model
        scorer = Scorer(base, attributes)
        return scorer, _param_shapes(scorer, config, mesh)

    def find_adapter(self, source: str, *, assume: bool) -> pathlib.Path | None:
        """A folder that is there, or whatever is not."""
        path = pathlib.Path(source).expanduser()
        taken = is_adapter(path) if path.exists() else assume
        return path if taken else None

    def load_adapter(
        self, source: str, model: Decoder, params: Params, like: LoraConfig,
        attributes: tuple[str, ...] = (),
    ) -> Adapted:  # fmt: skip
        """A missing adapter is assumed to be like the policy's adapters, with a head."""
        path, mesh = pathlib.Path(source).expanduser(), mesh_of(params)
        assert mesh is not None
        if path.exists():
            # Only the base's shapes are read; a single zero replaces each of its arrays.
            zeros = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), params)
            adapted, trained, frozen = load_adapter(model, zeros, path)
        else:
            self.notes.append(
                f"reward model {source!r} is not there: taken to be an adapter like the policy's"
            )
            lora = sharing_base(like)
            base = dataclasses.replace(model, lora=lora)
            adapted = Scorer(base, attributes)
            trained = adapters_of(adapted.shapes) | {"score": adapted.shapes["score"]}
            frozen = {name: value for name, value in params.items() if name != "head"}
        own = place(trained, adapted, mesh, self)
        return Adapted(adapted, own, _part_of(params, frozen))

    def make(self, function: Callable[..., Any], *args: Any) -> Any:
        """The shapes of the function's result."""
        return jax.eval_shape(function, *args)

    def place(self, params: Params, shardings: Any) -> Params:
        """The same shapes with these shardings."""
        return jax.tree.map(_shape, params, shardings)

    def to_host(self, params: Params) -> Params:
        """The same shapes in the host's memory."""
        return jax.tree.map(
            lambda x: HostArray(x.shape, x.dtype, sharding=x.sharding.with_memory_kind(HOST)),
            params,
        )

    def init_state(
        self, params: Params, tx: optax.GradientTransformation, frozen: Params
    ) -> TrainState:
        """The train state as `algorithms.step.init_state` lays it out."""
        mesh = mesh_of(params)
        assert mesh is not None
        params = jax.tree.map(lambda x: _shape(x, x.sharding), params)  # copies, as in a run

        def moment(path: Any, x: Any, sharding: Any) -> Any:
            make = HostArray if is_offloaded(path, x) else jax.ShapeDtypeStruct
            return make(x.shape, x.dtype, sharding=sharding)

        opt_state = jax.tree_util.tree_map_with_path(
            moment, jax.eval_shape(tx.init, params), opt_state_shardings(params, tx)
        )
        counter: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
        return TrainState(counter, params, frozen, opt_state)

    def start_reference(self, state: TrainState, params: Params) -> TrainState:
        """The state, which already has a place for the reference."""
        shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (reference_of(state), params)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "the reference has another shape than the policy, so that it cannot follow it; use "
                "the model that the policy started from, or no reference_sync"
            )
        return state


def _shape(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _part_of(params: Params, tree: Params) -> Params:
    """The subset of parameters that a tree has, as the same objects."""
    return {
        name: _part_of(params[name], value) if isinstance(value, dict) else params[name]
        for name, value in tree.items()
    }


def _param_shapes(model: Decoder | Scorer, config: ModelConfig, mesh: Mesh) -> Params:
    dtype = jnp.dtype(config.dtype)
    shapes = map_floats(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model.shapes)
    return jax.tree.map(_shape, shapes, param_shardings(model.axes, mesh, shapes))


def read_model(source: str, config: ModelConfig, mesh: Mesh, remat: str) -> Decoder | Scorer:
    """A model's shape: from the package, else from its `config.json` or GGUF file."""
    hf, path = known_shape(source), source
    if hf is None:
        path = locate(source, ("config.json", ADAPTER_CONFIG))
        if is_adapter(path):
            return read_model(base_of(path), config, mesh, remat)
        if path.is_dir():
            hf = read_json(path / "config.json")
        else:
            with contextlib.closing(GGUFFile(path)) as file:
                hf = file.config
    try:
        shape, scorer = families.config_from_hf(hf), families.is_scorer(hf)
        attributes = families.attributes_of(hf) if scorer else ()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    compute = config.compute_dtype
    if compute is None:
        compute = backend(mesh.devices.flat[0]).default_dtype
    model = Decoder(
        shape,
        compute_dtype=compute,
        remat=remat,
        attention=config.attention,
        quantize=config.quantize,
    )
    return Scorer(model, attributes) if scorer else model


def known_shape(source: str) -> dict[str, Any] | None:
    """The `config.json` of a hub id, if the package contains it, so that planning works offline."""
    if pathlib.Path(source).exists():
        return None
    return _known_shapes().get(without_revision(source))


@functools.lru_cache
def _known_shapes() -> dict[str, dict[str, Any]]:
    found = {}
    for file in (importlib.resources.files("jaxalign.plan") / "shapes").iterdir():
        shape = json.loads(file.read_text(encoding="utf-8"))
        found |= dict.fromkeys(shape.pop("_names"), shape)
    return found
