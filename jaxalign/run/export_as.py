"""Exports a run or a model in one or more formats, verifies the files, and records the result."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.paths import check_free, local_path, replace_text
from jaxalign.data.remote import is_address
from jaxalign.hf import families
from jaxalign.models.scorer import Scorer
from jaxalign.parallel import distributed
from jaxalign.parallel.sharding import mesh_of
from jaxalign.run import verify
from jaxalign.run.export import Loaded, load_run, load_source, whole_model
from jaxalign.run.export_adapters import extracted_adapter, with_weighted_adapters
from jaxalign.run.formats import FORMATS, GGUF_ADAPTER, Adapted, Format, Whole, reject
from jaxalign.run.record import versions
from jaxalign.run.remote import is_remote_run

RECORD = "export.json"
"""The file beside an export that records what was written and how far it differs."""


class ExportOptions(NamedTuple):
    """What to write.

    Attributes:
      formats: keys of `FORMATS`. With one format, `out` is its folder; with several, each has a
        folder of its name in `out`.
      step: the checkpoint's step; by default the newest.
      best: use the run's best checkpoint, by `run.keep_best`, instead of `step`.
      part: "policy" or "critic", for a run that trains both.
      dtype: dtype of tensors in Hugging Face and Orbax folders, see `save_pretrained`.
      gguf_dtype: dtype of the matrices in a GGUF file.
      verify: whether to read the files back and compare with the trainer's log-probs.
      transformers: whether to verify a Hugging Face folder with transformers too, if torch is
        installed.
      record: whether to write `export.json`.
      adapters: (source, weight) of adapters to add to a model, as their weighted sum.
      base: the model that `source` was tuned from; an adapter of rank `rank` is then extracted.
      rank: rank of an extracted adapter.
      public: whether the files leave this machine; a local folder then cannot be an adapter's base.
      dequantize: whether to use the quantised base of the training, see `export_run`.
    """

    formats: tuple[str, ...] = ("hf",)
    step: int | None = None
    best: bool = False
    part: str | None = None
    dtype: str | None = "source"
    gguf_dtype: str = "F16"
    verify: bool = True
    transformers: bool = False
    record: bool = True
    adapters: tuple[tuple[str, float], ...] = ()
    base: str | None = None
    rank: int = 16
    public: bool = False
    dequantize: bool = False


class Written(NamedTuple):
    """The result of an export.

    Attributes:
      step: of the checkpoint; 0 for a model.
      places: format → its folder.
      tables: the contents of each, for display.
      checks: how far each differs from the trainer, for display.
      notes: format → its entry in `export.json`.
      names: format → patterns of its files in its folder, which may hold other files; None: all
        files.
      scorer: whether the model is a reward model or critic.
    """

    step: int
    places: dict[str, pathlib.Path]
    tables: list[str]
    checks: list[str]
    notes: dict[str, dict[str, Any]]
    names: dict[str, tuple[str, ...] | None]
    scorer: bool


def is_run(source: str | os.PathLike[str], formats: Sequence[str] = ("hf",)) -> bool:
    """Whether a path is a run's folder rather than a model.

    A missing path without a named format is treated as a mistyped run.
    """
    if is_address(source):
        return is_remote_run(os.fspath(source))
    path = local_path(source, "folder")
    if path.exists():
        models = ("config.json", "adapter_config.json")
        return path.is_dir() and not any((path / name).is_file() for name in models)
    return tuple(formats) == ("hf",)


def places_of(out: str | os.PathLike[str], formats: Sequence[str]) -> dict[str, pathlib.Path]:
    """Format → the folder that it is written to."""
    folder = local_path(out, "out")
    if len(formats) == 1:
        return {formats[0]: folder}
    return {name: folder / name for name in formats}


def check_out(
    out: str, options: ExportOptions, sources: Sequence[str], *, overwrite: bool = False
) -> None:
    """Raises ValueError if an existing file would be overwritten, as the commands do.

    Raises:
      ValueError: something exists there, a source would be replaced, or `out` is not a folder.
    """
    if out.lower().endswith(".gguf"):
        raise ValueError(
            f"--out={out!r}: wanted a folder; the file in it will be model-{options.gguf_dtype}"
            f".gguf, or {GGUF_ADAPTER} of adapters alone"
        )
    names: tuple[str, ...] | None = None
    if options.formats == ("gguf",):
        names = (f"model-{options.gguf_dtype}.gguf", RECORD)
    elif options.formats == ("gguf-lora",):
        names = (GGUF_ADAPTER, RECORD)
    elif len(options.formats) > 1:
        names = (*options.formats, RECORD)
    check_free(out, "--out", overwrite=overwrite, sources=sources, names=names)


def export(source: str, out: str, options: ExportOptions) -> Written:
    """Writes a run's checkpoint or a model in each of the formats, and verifies them.

    With several processes all call this with the same arguments, on a file system that they share.

    Args:
      source: a run's folder; or a model's folder, `.gguf` file or hub id.
      out: the target, see `ExportOptions.formats`.
      options: what to write.

    Raises:
      ValueError: an unknown format; a model that a format cannot hold (before anything is written);
        a file that differs from the trainer by more than its element type explains (its weights are
        renamed to `.rejected`); or as `export_run`.
    """
    unknown = [name for name in options.formats if name not in FORMATS]
    if unknown or not options.formats or len(set(options.formats)) < len(options.formats):
        raise ValueError(
            f"--to {' '.join(options.formats)}: wanted one or more of "
            f"{', '.join(name for name in FORMATS if name != 'gguf-lora')}, each once, and "
            "gguf-lora, a run's adapters for llama.cpp"
        )
    alone = [name for name in options.formats if FORMATS[name].counts is not None]
    if options.dequantize and alone:
        raise ValueError(
            f"--dequantize --to {alone[0]}: adapters alone hold no base, and whoever loads them "
            "gets the unquantised base; leave one of the two out"
        )
    places = places_of(out, options.formats)
    loaded = _load(source, options, [str(place) for place in places.values()])
    model, params = whole_model(loaded.model, loaded.params)
    whole = Whole(model, params, loaded.exported, options.dtype, options.gguf_dtype, _name(source))
    if loaded.base is not None:
        whole = whole._replace(adapted=Adapted(loaded.model, loaded.params, loaded.base))
    for name in options.formats:
        FORMATS[name].check(whole)
    if options.public and "peft" in options.formats:
        _check_public(loaded.base)
    checker = _Checker.of(loaded, whole) if options.verify else None
    tables, checks = [loaded.note] if loaded.note else [], []
    loaded = loaded._replace(model=None, params={})
    notes: dict[str, dict[str, Any]] = {}
    for name, place in sorted(places.items(), key=lambda item: not FORMATS[item[0]].counts):
        if FORMATS[name].counts is None:
            whole = whole._replace(adapted=None)  # unmerged weights are no longer needed
        tables.append(FORMATS[name].write(whole, place))
        notes[name] = {"weights": _counts(FORMATS[name], whole, place)}
    whole = whole._replace(adapted=None)
    failures = []
    if checker is not None:
        failures = checker.run(whole, places, options, notes, checks)
    if options.record:
        _record(local_path(out, "out"), source, loaded.step, notes)
    if failures:
        raise ValueError("; ".join(failures))
    ggufs = ("gguf", "gguf-lora")
    names = {name: FORMATS[name].weights(whole) if name in ggufs else None for name in places}
    scorer = isinstance(model, Scorer)
    return Written(loaded.step, places, tables, checks, notes, names, scorer)


def _load(source: str, options: ExportOptions, outs: list[str]) -> Loaded:
    changes_model = bool(options.adapters) or options.base is not None
    if not changes_model and is_run(source, options.formats):
        return load_run(
            source, options.step, best=options.best, part=options.part, outs=outs,
            dequantize=options.dequantize,
        )  # fmt: skip
    if options.step is not None or options.part is not None or options.best:
        raise ValueError(
            f"--step, --best and --part choose among a run's checkpoints, and {source!r} is a "
            "model; leave them out"
        )
    if options.dequantize:
        raise ValueError(
            f"--dequantize is of a run with model.quantize, and {source!r} is a model; leave it out"
        )
    for out in outs:
        sources = [source, *(adapter for adapter, _ in options.adapters)]
        check_free(out, "out", overwrite=True, sources=sources)
    loaded = load_source(source)
    if options.adapters:
        return with_weighted_adapters(loaded, options.adapters)
    return loaded if options.base is None else extracted_adapter(loaded, options.base, options.rank)


def _name(source: str) -> str:
    """A name of the model, for display."""
    path = pathlib.Path(source).expanduser()
    return path.resolve().name if path.exists() else source.rpartition("/")[2]


class _Checker(NamedTuple):
    """The trainer's outputs for the prompts, to compare the files with.

    Attributes:
      probe: the prompts.
      trained: outputs of the model with its adapters.
      exact: outputs of the model merged in memory, in float32.
      merged: whether there were adapters; their sum with the base is rounded to the base's dtype.
      unit: "nats", or "score".
      base: source of the base under adapters, for files that do not name it; None without adapters.
    """

    probe: verify.Probe
    trained: np.ndarray
    exact: np.ndarray
    merged: bool
    unit: str
    base: str | None

    @classmethod
    def of(cls, loaded: Loaded, whole: Whole) -> _Checker:
        config = whole.model.config
        probe = verify.make_probe(loaded.tokenizer, config.vocab_size, config.max_positions)
        trained = verify.measure(loaded.model, loaded.params, probe)
        merged = loaded.params is not whole.params
        exact = trained
        if merged:
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), loaded.params)
            exact = verify.measure(*whole_model(loaded.model, wide), probe)
        unit = "score" if isinstance(whole.model, Scorer) else "nats"
        return cls(probe, trained, exact, merged, unit, loaded.base)

    def run(
        self,
        whole: Whole,
        places: dict[str, pathlib.Path],
        options: ExportOptions,
        notes: dict[str, dict[str, Any]],
        checks: list[str],
    ) -> list[str]:
        """Verifies all formats; adds to `notes` and `checks`.

        Returns:
          The errors of rejected formats, whose files are renamed.
        """
        mesh, failures = mesh_of(whole.params), []
        dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(whole.params)}
        roundings = self._roundings(whole, list(places))
        for name, place in places.items():
            bound = verify.FLOOR + verify.ROUNDING * roundings[name]
            path = FORMATS[name].source(place, whole)
            # An adapter's base in the trainer's precision, whatever its own files have.
            alone = FORMATS[name].counts is not None
            dtype = next(iter(dtypes)) if alone and len(dtypes) == 1 else "float32"
            base = self.base if name == "gguf-lora" else None
            readers: dict[str, Callable[[], np.ndarray]] = {
                "jaxalign": lambda path=path, dtype=dtype, base=base: verify.read_back(
                    path, self.probe, mesh, dtype, base
                )
            }
            if options.transformers and name == "hf" and _alone() and verify.has_torch():
                readers["transformers"] = lambda path=path: verify.read_back_by_transformers(
                    path, self.probe
                )
            results = {}
            for reader, read in readers.items():
                line, result = self._compare(read, bound)
                checks.append(f"{name}, read by {reader}: {line}")
                results[reader] = result
                if result["rejected"]:
                    renamed = _reject(name, whole, place)
                    failures.append(
                        f"the {name} export in {place} is wrong: read by {reader}, {line}; "
                        f"{', '.join(renamed)} must not be used"
                    )
                    break
            notes[name] |= {
                "verified": results,
                "rounding": roundings[name],
                "bound": bound,
                "unit": self.unit,
                "prompts": len(self.probe.ids),
            }
        return failures

    def _roundings(self, whole: Whole, names: list[str]) -> dict[str, float]:
        """The largest difference that the element types of each format cause by themselves.

        The parameters are destroyed: the last format rounds them in place, so that a model exported
        in one format is never in memory twice.
        """
        found = {}
        for name in names:
            kinds = FORMATS[name].kinds(whole)
            found[name] = 0.0
            if self.merged or verify.rounds(whole.params, kinds):
                params = whole.params
                if name != names[-1]:
                    params = jax.tree.map(lambda leaf: leaf, params)
                verify.round_params(whole.model, params, kinds)
                got = verify.measure(whole.model, params, self.probe)
                found[name] = verify.compare(self.exact, got, self.probe).largest
        whole.params.clear()
        return found

    def _compare(self, read: Any, bound: float) -> tuple[str, dict[str, Any]]:
        try:
            apart = verify.compare(self.trained, read(), self.probe)
        except ValueError as error:
            return str(error), {"rejected": True, "error": str(error)}
        rejected = not apart.largest <= bound  # NaN too
        line = (
            f"largest difference {apart.largest:.3g} {self.unit} of {apart.tokens} tokens in "
            f"{len(self.probe.ids)} prompts, mean {apart.mean:.3g}; bound {bound:.3g}"
        )
        return line, {"rejected": rejected, **apart._asdict()}


def _alone() -> bool:
    return jax.process_count() == 1


def _reject(name: str, whole: Whole, place: pathlib.Path) -> list[str]:
    with distributed.fail_together("renaming a rejected export"):
        if distributed.is_main():
            return reject(name, whole, place)
    return []


def _check_public(base: str | None) -> None:
    if base is not None and pathlib.Path(base).expanduser().exists():
        raise ValueError(
            f"--to peft --push: the adapter's base is model.source={base!r}, a folder of this "
            "machine, which nobody else can load; start the run from the base's hub id, or push "
            "the merged model (--to hf)"
        )


def _counts(format: Format, whole: Whole, place: pathlib.Path) -> dict[str, int]:
    """Element type → how many weights of a format have it."""
    if format.counts is not None:
        return format.counts(place)
    kinds = format.kinds(whole)
    sizes = {path: leaf.size for path, leaf in families.flatten(whole.params).items()}
    counts: dict[str, int] = {}
    for path, kind in kinds.items():
        counts[kind] = counts.get(kind, 0) + sizes[path]
    return counts


def _record(out: pathlib.Path, source: str, step: int, notes: dict[str, Any]) -> None:
    """Writes `export.json`."""
    with distributed.fail_together("noting an export"):
        if distributed.is_main():
            record = {"source": _name(source), "step": step, "formats": notes}
            record["versions"] = versions()
            out.mkdir(parents=True, exist_ok=True)
            replace_text(out / RECORD, json.dumps(record, indent=2, sort_keys=True) + "\n")
