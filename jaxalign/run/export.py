"""Writes checkpoints as model folders (`jaxalign export`), and models as Orbax (`import`)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxalign.algorithms.optim import averages_for
from jaxalign.data.chat import NONE as NO_TEMPLATE
from jaxalign.data.chat import resolve_chat_template
from jaxalign.data.ends import united_ends
from jaxalign.data.paths import check_free, local_path
from jaxalign.data.render import Renderer
from jaxalign.hf import load_model, load_pretrained, load_tokenizer, save_pretrained
from jaxalign.hf.save import check_replaceable, plan_tensors
from jaxalign.hf.special_tokens import set_padding
from jaxalign.hf.tensor_table import tensor_table
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import dequantize_base, merge_lora, sharing_base, trained_base
from jaxalign.models.scorer import Scorer
from jaxalign.parallel import distributed
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.run.best import best_of_run
from jaxalign.run.checkpoint import Checkpoints
from jaxalign.run.config.runs import RUNS, ModelConfig, RewardRun, load_config
from jaxalign.run.config.yaml import read_yaml
from jaxalign.run.formats import save_orbax
from jaxalign.run.inputs import source_paths
from jaxalign.run.remote import fetch_run
from jaxalign.types import Params

_PARTS = ("policy", "critic")


class Exported(NamedTuple):
    """What was written.

    Attributes:
      step: number of batches after which the checkpoint was saved; 0 for an import.
      table: the tensors, for display.
    """

    step: int
    table: str


class Loaded(NamedTuple):
    """A model to export, as it was in training.

    Attributes:
      model: a `Decoder` or `Scorer`, with its adapters.
      params: all of its parameters.
      tokenizer: with the template of the training.
      exported: the tokenizer to write, see `exported_tokenizer`.
      step: number of batches after which the checkpoint was saved; 0 without one.
      sources: the paths it was made from, which must not be replaced.
      base: source of the base under adapters; None without adapters.
      note: a remark for display.
    """

    model: Any
    params: Params
    tokenizer: Any
    exported: Any
    step: int
    sources: tuple[str, ...]
    base: str | None = None
    note: str = ""


def export_run(
    folder: str,
    out: str,
    step: int | None = None,
    *,
    best: bool = False,
    part: str | None = None,
    dtype: str | None = "source",
    dequantize: bool = False,
) -> Exported:
    """Writes a checkpoint of a run as a Hugging Face folder.

    It reads only the exported parameters from the checkpoint, not the optimizer state. With
    adapters it also reads the source's weights, to merge the adapters into them. If the optimizer
    keeps an average of the weights for export (`optimizer.ema_for`), the average is written.

    Args:
      folder: the run's folder, with `config.yaml` and `checkpoints/`.
      out: folder to make, see `save_pretrained`.
      step: the checkpoint's step; by default the newest.
      best: use the checkpoint with the best `run.keep_best` value, instead of `step`.
      part: "policy" or "critic", for runs that train both; the policy by default.
      dtype: dtype of the tensors, see `save_pretrained`; "source": the dtypes of the model that the
        run started from; None: the checkpoint's dtypes.
      dequantize: for a run with `model.quantize`: merge adapters into the base as it was in
        training, with rounded values, instead of the source's floats.

    Raises:
      ValueError: no run, no such checkpoint or part, or a checkpoint that does not fit the run's
        config.
    """
    out = str(local_path(out, "out"))
    loaded = load_run(folder, step, best=best, part=part, outs=[out], dequantize=dequantize)
    model, params = whole_model(loaded.model, loaded.params)
    save_pretrained(model, params, out, tokenizer=loaded.exported, dtype=dtype)
    return Exported(loaded.step, tensor_table(plan_tensors(model, params, dtype)))


def load_run(
    folder: str,
    step: int | None = None,
    *,
    best: bool = False,
    part: str | None = None,
    outs: Sequence[str] = (),
    dequantize: bool = False,
) -> Loaded:
    """A model from a checkpoint of a run; see `export_run`.

    Args:
      folder: the run's folder.
      step: the checkpoint's step; by default the newest.
      best: use the checkpoint with the best `run.keep_best` value, instead of `step`.
      part: "policy" or "critic", for runs that train both; the policy by default.
      outs: the paths to write, which must not be inputs of the run.
      dequantize: whether to use the quantised base of the training.

    Raises:
      ValueError: as `export_run`.
    """
    place = fetch_run(folder, "folder")
    path = place / "config.yaml"
    if not path.is_file():
        lacks = f"no {path.name} in it" if place.is_dir() else "no such folder"
        raise ValueError(f"{folder}: {lacks}; wanted a run's folder, or a model")
    values = read_yaml(path)
    algorithm = next((name for name in RUNS if name in values), None)
    if algorithm is None:
        raise ValueError(f"{path}: no config of a run, wanted a section {', '.join(RUNS)}")
    config = load_config(algorithm, values)
    if dequantize and config.model.quantize is None:
        raise ValueError(
            f"dequantize: the run in {folder} has no quantised base (model.quantize is null); "
            "leave it out"
        )
    sources = source_paths(config)
    for out in outs:
        check_free(out, "out", overwrite=True, sources=sources)
    store = Checkpoints(place / "checkpoints", keep=None)
    try:
        if best:
            step = best_of_run(place, config.run.keep_best, store.steps)
        found, shapes = store.param_shapes(step)
        parts = [name for name in _PARTS if name in shapes]
        if part is not None and part not in (parts or ["policy"]):
            raise ValueError(
                f"part={part!r}: checkpoint {found} of {folder} has "
                f"{', '.join(parts) if parts else 'one model only'}; leave it out"
            )
        chosen = (part or "policy") if parts else None
        shapes = shapes if chosen is None else shapes[chosen]
        mesh = _mesh(config.mesh)
        # A critic has one output, whatever its reward model had.
        attributes = config.reward.attributes if isinstance(config, RewardRun) else ()
        source = _source(config, chosen)
        with config.mesh.use_rules():
            options = config.model
            if chosen == "critic" and options.lora is not None:
                options = dataclasses.replace(options, lora=sharing_base(options.lora))
            if not dequantize:
                options = dataclasses.replace(options, quantize=None)
            model, frozen = _model(source, options, shapes, mesh, attributes)
            layout = _layout(model, shapes, mesh)
        wanted = layout if chosen is None else {chosen: layout}
        optimizer = config.optimizer
        if chosen == "critic":
            optimizer = config.critic_optimizer or optimizer
        averaged = "export" in averages_for(optimizer)
        params, loop = store.restore_params(found, wanted, averaged=averaged)
    finally:
        store.close()
    params = params if chosen is None else params[chosen]
    if frozen and config.model.quantize is not None and not dequantize:
        say_floats(config.model)
    tok = run_tokenizer(config.model)
    return Loaded(
        model,
        combine(params, frozen),
        tok,
        exported_tokenizer(tok),
        int(loop["done"]),
        tuple(sources),
        source if frozen else None,
    )


def load_source(source: str) -> Loaded:
    """A model from a folder, a `.gguf` file or the hub, to be written in another format.

    Raises:
      ValueError: as `load_pretrained` and `load_tokenizer`.
    """
    tok = load_tokenizer(source)
    model, params = load_pretrained(source, mesh=_mesh(None), dtype="source")
    return Loaded(model, params, tok, tok, 0, (source,))


def import_model(source: str, out: str, *, dtype: str = "source") -> Exported:
    """Writes a model as an Orbax folder, which loads without conversion on any number of hosts.

    The folder holds `config.json`, `generation_config.json` and the tokenizer as a Hugging Face
    folder does, and under `params/` an Orbax checkpoint of the parameter tree. It is written
    atomically, and is a source for `load_pretrained`, `load_tokenizer` and `model.source`.

    Args:
      source: folder, `.gguf` file or hub id.
      out: folder to make, see `save_pretrained`.
      dtype: dtype of the parameters: float32, bfloat16, float16, or "source" for the source's
        dtypes.

    Raises:
      ValueError: as `load_pretrained`, `load_tokenizer` and `save_pretrained`.
    """
    target = local_path(out, "out").resolve()
    check_replaceable(target)
    tok = load_tokenizer(source)
    model, params = load_pretrained(source, mesh=_mesh(None), dtype=dtype)
    return Exported(0, save_orbax(model, params, target, tokenizer=tok))


def run_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of a run, with the template that it trains under.

    So the exported model gets the prompts that it was trained on.
    """
    tok = load_tokenizer(config.source if config.tokenizer is None else config.tokenizer)
    template = resolve_chat_template(tok, config.chat_template)
    if template != NO_TEMPLATE:
        tok.chat_template = template
        set_padding(tok, template)
    return tok


def exported_tokenizer(tok: Any) -> Any:
    """A run's tokenizer as it is exported: its eos is where the run's template ends a turn.

    It stays as it is where the source lists that end already, or the template writes eos itself.
    """
    template = tok.chat_template
    if not isinstance(template, str) or "eos_token" in template:
        return tok
    end = Renderer(tok, template).end_of_turn
    listed = {str(tok.convert_ids_to_tokens(i)) for i in getattr(tok, "source_stops", ())}
    if end is None or end == tok.eos_token or end in listed:
        return tok
    changed = copy.deepcopy(tok)
    changed.source_stops = united_ends(tok, ())  # the old eos remains a stop token
    changed.eos_token = end
    return changed


def whole_model(model: Any, params: Params) -> tuple[Any, Params]:
    """A model without adapters: unchanged, or with its adapters merged.

    Args:
      model: a `Decoder` or `Scorer`.
      params: all of its parameters.
    """
    base = model.base if isinstance(model, Scorer) else model
    if base.lora is None:
        return model, params
    plain, params = merge_lora(base, params)
    whole = dataclasses.replace(model, base=plain) if isinstance(model, Scorer) else plain
    return whole, params


def say_floats(config: ModelConfig) -> None:
    """Prints that adapters of a quantised base are exported with the unquantised base."""
    if distributed.is_main():
        print(
            f"adapters were trained over {config.source} in {config.quantize}, and are exported "
            "with its floats: log-probs differ a little from those of the training. `jaxalign "
            "export RUN --dequantize` writes the base as it was trained",
            flush=True,
        )


def _mesh(config: Any) -> Mesh:
    """The run's mesh if there are as many devices, else the largest part of it that fits."""
    if config is not None:
        try:
            return config.make()
        except ValueError:
            pass  # trained on another number of devices
    return make_mesh(1, -1, 1)


def _source(config: Any, part: str | None) -> str:
    """The model that a part of a run started from."""
    if part != "critic":
        return config.model.source
    return config.critic_start()[0]


def _model(
    source: str, config: ModelConfig, shapes: Params, mesh: Mesh, attributes: tuple[str, ...]
) -> tuple[Decoder | Scorer, Params]:
    """The model of a checkpoint's parameters, and the base under its adapters."""
    adapted = config.lora is not None and _has_adapters(shapes)
    if adapted:
        loaded, frozen = load_pretrained(
            source, mesh=mesh, dtype=config.dtype, quantize=config.quantize
        )
    else:
        loaded, frozen = load_model(source), {}
    base = loaded.base if isinstance(loaded, Scorer) else loaded
    if adapted and config.quantize is not None:
        base, frozen = dequantize_base(base, frozen, config.dtype)
    if adapted and config.lora is not None:
        frozen = trained_base(base, frozen, config.lora)
        base = dataclasses.replace(base, lora=config.lora)
    if "score" not in shapes:
        return base, frozen
    kept = {name: value for name, value in frozen.items() if name not in ("head", "score")}
    return Scorer(base, attributes), kept


def _has_adapters(node: Params) -> bool:
    return any(
        _has_adapters(value) if isinstance(value, dict) else name.startswith("lora_")
        for name, value in node.items()
    )


def _layout(model: Any, shapes: Params, mesh: Mesh) -> Params:
    """The checkpoint's parameters as shapes with the model's shardings.

    Raises:
      ValueError: the model has no such parameters.
    """

    def place(shapes: Params, axes: Params, sizes: Params, at: str) -> Params:
        wrong = [name for name in shapes if name not in sizes]
        wrong += [
            name
            for name, value in shapes.items()
            if name in sizes and not isinstance(value, dict)
            if tuple(value.shape) != tuple(sizes[name].shape)
        ]
        if wrong:
            raise ValueError(
                f"the checkpoint does not fit its run's model: it has {at}{wrong[0]}, which the "
                f"model does not have, or in another shape; is model.source still the same?"
            )
        placed = {}
        for name, value in shapes.items():
            if isinstance(value, dict):
                placed[name] = place(value, axes[name], sizes[name], f"{at}{name}/")
            else:
                one = param_shardings({name: axes[name]}, mesh, {name: value})[name]
                placed[name] = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=one)
        return placed

    return place(shapes, model.axes, model.shapes, "")
