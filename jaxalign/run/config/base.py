"""The sections that every run has, and checks across sections."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from jaxalign.algorithms.guard import SpikeConfig
from jaxalign.algorithms.optim import OptimizerConfig
from jaxalign.models.attention.dispatch import KINDS
from jaxalign.models.layer_loop import REMAT
from jaxalign.models.lora import LoraConfig
from jaxalign.models.quantized import QUANTIZED
from jaxalign.run.best import parse_metric
from jaxalign.run.config.data import DataConfig, want
from jaxalign.run.config.early_stopping import EarlyStopping
from jaxalign.run.config.eval_tasks import EvalTask
from jaxalign.run.config.mesh import MeshConfig
from jaxalign.run.remote import check_folder
from jaxalign.run.trackers.table import TRACKERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and its dtypes and implementation.

    Attributes:
      source: folder in Hugging Face form, `.gguf` file, either of them in a bucket (`gs://…`), or
        hub id; "owner/name@revision" takes a branch, tag or commit of it.
      tokenizer: the tokenizer's source; None: the model's.
      chat_template: None (the tokenizer's own), the name of a built-in template ("chatml"), "none"
        (plain text), or a jinja file.
      dtype: dtype of the master weights.
      compute_dtype: dtype of activations; None: bfloat16 on GPU and TPU, float32 on CPU.
      remat: "none", "dots", "block" or "offload": what the backward pass recomputes, see
        docs/memory.md.
      lora: adapters; None trains all weights.
      quantize: with `lora`, how to quantise the projections of the frozen base's blocks: "nf4",
        "nf4-double" or "int8" (QLoRA); None: they stay in `dtype`, as embeddings, norms and heads
        always do.
      attention: "auto" (by backend), "xla", "splash" (TPU), "cudnn" or "pallas" (NVIDIA). If a
        kernel does not cover the case, "xla" runs instead.
    """

    source: str
    tokenizer: str | None = None
    chat_template: str | None = None
    dtype: str = "float32"
    compute_dtype: str | None = None
    remat: str = "none"
    lora: LoraConfig | None = None
    attention: str = "auto"
    quantize: str | None = None

    def __post_init__(self):
        floats, names = ("float32", "bfloat16", "float16"), ", ".join
        want(self.dtype in floats, "model.dtype", self.dtype, f"one of {names(floats)}")
        want(
            self.compute_dtype is None or self.compute_dtype in floats,
            "model.compute_dtype",
            self.compute_dtype,
            f"one of {names(floats)}, or null",
        )
        want(self.remat in REMAT, "model.remat", self.remat, f"one of {names(REMAT)}")
        kinds = f"one of {names(KINDS)}"
        want(self.attention in KINDS, "model.attention", self.attention, kinds)
        kinds = f"one of {names(QUANTIZED)}, or null"
        known = self.quantize is None or self.quantize in QUANTIZED
        want(known, "model.quantize", self.quantize, kinds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes, and when.

    Attributes:
      folder: the run's folder: `metrics.jsonl`, `config.yaml`, `versions.json`, `data.txt` (how
        rows and columns were used), `checkpoints/`, and the final weights in `model/`. A folder in
        a bucket (`gs://…`, `s3://…`) has a local copy, see docs/launching.md.
      seed: the seed of every random choice.
      steps: batches to train on (iterations, in PPO); None: until the data ends. If `data.epochs`
        is null, the data repeats. Otherwise the run ends with the data, and prints so before it
        starts.
      epochs: passes over the training data, instead of `steps` and `data.epochs`; a fraction such
        as 1.5 ends within a pass.
      micro_batches: how many parts of a batch to compute one after the other (gradient
        accumulation).
      log_every: steps between lines on the terminal; `metrics.jsonl` has every step.
      eval_every: batches between evaluations, or "epoch": after each pass over the data; 0: only at
        the start and end.
      eval_tasks: further tasks to run at an evaluation, as in `jaxalign eval`: a list of lm-eval
        task names, or of sections such as {task: gsm8k, files: [test.jsonl]}. The metrics are named
        `eval/<task>/<figure>`.
      save_every: batches between checkpoints, or "epoch"; 0: only by `save_minutes` and at the end.
      save_minutes: minutes between checkpoints, in addition to `save_every`; None: off.
      keep: how many checkpoints to keep.
      keep_best: a held-out metric, such as eval/loss/nll. The checkpoint with the best value is
        saved when it is measured, and always kept. Lower is better if a word of the name is loss,
        nll, kl, perplexity, ppl, entropy, error, mse or brier, otherwise higher; `:min` or `:max`
        after the name overrides this. None: off.
      time_limit: minutes from the start of the command; the run saves a checkpoint and ends, with
        exit status 75, before a step that could exceed the limit. None: no limit.
      early_stopping: ends the run once a held-out metric no longer improves; None: never.
      resume: true: resume from the newest checkpoint in `folder`; it is an error if there is none.
        "auto": resume if there is a checkpoint, otherwise start a new run.
      allow_changes: resume even if settings, models or data have changed (the flag
        `--allow-changes`).
      overwrite: replace an earlier run's files in `folder` (the flag `--overwrite`).
      bad_steps: the number of skipped updates in a row that ends the run. An update is skipped if a
        loss, gradient or weight is not finite or the gradient's norm is a spike.
      skip_spikes: skip updates whose gradient norm is above `factor` times the median of the last
        `window` norms; None: never.
      trackers: also write metrics to "tensorboard", "trackio", "wandb" or "mlflow", one or several;
        `metrics.jsonl` is always written.
      trackers_optional: continue without a tracker whose package is missing or that fails to start;
        false: that is an error.
      tracker_project: the project under which trackers group runs; MLflow calls it an experiment.
      export: write the final weights in Hugging Face form to `folder/model`.
      checkpoint: whether to write checkpoints.
    """

    folder: str
    seed: int = 0
    steps: int | None = None
    epochs: float | None = None
    micro_batches: int = 1
    log_every: int = 10
    eval_every: int | str = 0
    eval_tasks: tuple[str | EvalTask, ...] = ()
    save_every: int | str = 0
    save_minutes: float | None = 10.0
    keep: int = 2
    keep_best: str | None = None
    time_limit: float | None = None
    early_stopping: EarlyStopping | None = None
    resume: bool | str = False
    allow_changes: bool = False
    overwrite: bool = False
    bad_steps: int = 3
    skip_spikes: SpikeConfig | None = None
    trackers: tuple[str, ...] = ()
    trackers_optional: bool = False
    tracker_project: str = "jaxalign"
    export: bool = True
    checkpoint: bool = True

    def __post_init__(self):
        object.__setattr__(self, "folder", check_folder(self.folder, "run.folder"))
        for name in ("steps", "epochs", "save_minutes", "time_limit"):
            value = getattr(self, name)
            want(value is None or value > 0, f"run.{name}", value, "positive or null")
        want(
            self.steps is None or self.epochs is None,
            "run.epochs",
            self.epochs,
            "null beside steps",
        )
        want(self.micro_batches > 0, "run.micro_batches", self.micro_batches, "positive")
        want(self.log_every > 0, "run.log_every", self.log_every, "positive")
        for name in ("eval_every", "save_every"):
            value = getattr(self, name)
            ok = value == "epoch" if isinstance(value, str) else value >= 0
            want(ok, f"run.{name}", value, "a number of batches, 0, or epoch")
        want(self.keep > 0, "run.keep", self.keep, "positive")
        resumes = ("auto", True, False)
        want(self.resume in resumes, "run.resume", self.resume, "true, false or auto")
        want(not self.resume or not self.overwrite, "run.overwrite", True, "false with run.resume")
        want(
            self.early_stopping is None or bool(self.eval_every),
            "run.early_stopping",
            self.early_stopping,
            "run.eval_every with it, which says when the figure is measured",
        )
        want(
            self.keep_best is None or (bool(self.eval_every) and self.checkpoint),
            "run.keep_best",
            self.keep_best,
            "run.eval_every with it, which says when the figure is measured, and "
            "run.checkpoint=true",
        )
        if self.keep_best is not None:
            parse_metric(self.keep_best)
        tasks = tuple(EvalTask(task=t) if isinstance(t, str) else t for t in self.eval_tasks)
        object.__setattr__(self, "eval_tasks", tasks)
        titles = [task.title for task in tasks]
        once = len(set(titles)) == len(titles)
        want(once, "run.eval_tasks", titles, "each task once, or names that tell them apart")
        known = ", ".join(TRACKERS)
        for name in self.trackers:
            want(name in TRACKERS, "run.trackers", name, f"one or several of {known}")
        once = len(set(self.trackers)) == len(self.trackers)
        want(once, "run.trackers", list(self.trackers), "each tracker once")
        want(bool(self.tracker_project), "run.tracker_project", self.tracker_project, "a name")
        want(self.bad_steps > 0, "run.bad_steps", self.bad_steps, "positive")
        for name in ("resume", "save_every"):
            value = getattr(self, name)
            want(self.checkpoint or not value, f"run.{name}", value, "run.checkpoint=true with it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The base of all algorithms' configurations; each adds its own section.

    Attributes:
      model: the model to train.
      data: the data, and the shape of a batch.
      run: where and when the run writes.
      optimizer: the optimizer of the trained weights.
      mesh: how arrays are placed on devices.
    """

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    algorithm: ClassVar[str]
    """The algorithm's name: its command, and the section of its options."""

    data_options: ClassVar[tuple[str, ...]] = ()
    """The options of `_SOME_READ` that it reads."""

    # The models, besides the trained one, that these options of `mesh` may name.
    models_with_rules: ClassVar[tuple[str, ...]] = ()
    models_apart: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        quantize, lora = self.model.quantize, self.model.lora
        wanted = "null without model.lora: few bits cannot be trained, adapters over them can"
        want(quantize is None or lora is not None, "model.quantize", quantize, wanted)
        wanted = "null with model.lora.init=pissa, which changes the base; or init: gaussian"
        pissa = lora is not None and lora.init == "pissa"
        want(quantize is None or not pissa, "model.quantize", quantize, wanted)
        for option, known in (("rules_of", self.models_with_rules), ("apart", self.models_apart)):
            for name, value in getattr(self.mesh, option).items():
                wanted = f"one of {', '.join(known)}" if known else "none of it in this algorithm"
                want(name in known, f"mesh.{option}.{name}", value, wanted)
        self._check_data()
        held_out = bool(self.data.eval) or self.data.validation is not None
        want(
            held_out or bool(self.run.eval_tasks) or not self.run.eval_every,
            "run.eval_every",
            self.run.eval_every,
            "0 without data.eval, data.validation or run.eval_tasks",
        )

    def _check_data(self) -> None:
        run = self.run
        want(
            self.data.epochs is not None or run.steps is not None or run.epochs is not None,
            "run.steps",
            None,
            "a number of steps when data.epochs is null",
        )
        want(
            run.epochs is None or self.data.epochs in (1, None),
            "data.epochs",
            self.data.epochs,
            "1 or null with run.epochs, which stands for it",
        )
        for name, uses in (
            ("epochs", run.epochs is not None),
            ("eval_every", run.eval_every == "epoch"),
            ("save_every", run.save_every == "epoch"),
        ):
            wanted = "numbers of steps with data.streaming, where no epoch is known"
            want(not (uses and self.data.streaming), f"run.{name}", getattr(run, name), wanted)
        want(
            not self.data.streaming or self.run.steps is not None,
            "run.steps",
            None,
            "a number of steps with data.streaming, where the number of rows is unknown",
        )
        for name, default in _SOME_READ.items():
            value = getattr(self.data, name)
            want(
                value == default or name in self.data_options,
                f"data.{name}",
                value,
                f"{default!r}: this algorithm has no use for it",
            )
        want(
            self.data.packing not in ("wrapped", "best_fit_split")
            or "packing=pieces" in self.data_options,
            "data.packing",
            self.data.packing,
            "true or false: only SFT's rows may be cut where a row ends",
        )

    @property
    def frozen_models(self) -> dict[str, str]:
        """Option → model whose weights affect every step but are not in checkpoints."""
        return {} if self.model.lora is None else {"model.source": self.model.source}

    @property
    def sequences(self) -> int:
        """The rows of a step's batch before it is split: pairs, answers or documents."""
        return self.data.rows

    @property
    def sampled(self) -> int:
        """The most tokens that are sampled after a row of data."""
        return 0

    @property
    def row_parts(self) -> dict[str, int]:
        """Option → the number of parts into which it splits the rows."""
        return {"run.micro_batches": self.run.micro_batches}

    @property
    def text_sections(self) -> dict[str, tuple[DataConfig, int]]:
        """Name → (data section, number of parts into which its rows are split)."""
        return {"data": (self.data, 1)}


_SOME_READ: dict[str, Any] = {"train_on": "all", "shared_prefix": False}
"""Options of `data` that only some algorithms read, with their defaults."""
