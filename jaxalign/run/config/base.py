"""The sections that every run has, and the checks that concern several of them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from jaxalign.algorithms.guard import SpikeConfig
from jaxalign.algorithms.optim import OptimizerConfig
from jaxalign.models.attention.dispatch import KINDS
from jaxalign.models.decoder import REMAT
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
      tokenizer: where the tokenizer is; None: with the model.
      chat_template: None (the tokenizer's own), the name of a built-in template ("chatml"), "none"
        (plain text), or a jinja file.
      dtype: of the master weights.
      compute_dtype: of activations; None: bfloat16 on GPU and TPU, float32 on CPU.
      remat: "none", "dots", "block" or "offload": what the backward pass recomputes, see
        `jaxalign.models.decoder.REMAT`.
      lora: adapters; None trains all weights.
      quantize: with `lora`, how the frozen base keeps the projections of its blocks: "nf4",
        "nf4-double" or "int8" (QLoRA); None: in `dtype`, as embeddings, norms and heads always are.
      attention: "auto" (by backend), "xla", "splash" (TPU), "cudnn" or "pallas" (NVIDIA); a kernel
        gives way to "xla" where it does not cover the case.
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
      folder: the run's folder: `metrics.jsonl`, `config.yaml`, `versions.json`, `data.txt` (what
        became of rows and columns), `checkpoints/`, and the final weights in `model/`. One in a
        bucket (`gs://…`, `s3://…`) has a copy on this machine, see `jaxalign.run.remote`.
      seed: of every random choice.
      steps: batches to train on (iterations, in PPO); None: until the data ends. The data repeats
        if `data.epochs` is null; else the run ends with the data, and says so before it starts.
      epochs: passes over the training data, in place of `steps` and `data.epochs`; fractions such
        as 1.5 end within a pass.
      micro_batches: parts of a batch that are computed one after the other.
      log_every: steps between lines on the terminal; every step is in `metrics.jsonl`.
      eval_every: batches between evaluations, or "epoch": after each pass over the data; 0: at the
        start and end only.
      eval_tasks: what else is measured at an evaluation, as by `jaxalign eval`: a list of names of
        lm-eval's tasks, or of sections such as {task: gsm8k, files: [test.jsonl]}. The figures are
        `eval/<task>/<figure>`.
      save_every: batches between checkpoints, or "epoch"; 0: by `save_minutes` and at the end only.
      save_minutes: minutes between checkpoints, whatever `save_every` says; None: none by the
        clock.
      keep: checkpoints kept.
      keep_best: a held-out figure, such as eval/loss/nll; the checkpoint with its best value is
        saved when it is measured, and kept. Lower is better where a word of the name is loss, nll,
        kl, perplexity, ppl, entropy, error, mse or brier, else higher; `:min` or `:max` behind the
        name overrules that. None: no checkpoint is kept for its figures.
      time_limit: minutes from the start of the command; the run saves a checkpoint and ends, with
        status 75, before a step that could exceed them. None: no limit.
      early_stopping: ends the run once a held-out figure no longer improves; None: never.
      resume: true: resumes from the newest checkpoint in `folder`; without one it is an error.
        "auto": the same, but without a checkpoint a new run starts.
      allow_changes: resumes although settings, models or data have changed (the flag
        `--allow-changes`).
      overwrite: replaces what an earlier run left in `folder` (the flag `--overwrite`).
      bad_steps: skipped updates in a row that end the run. An update is skipped if a loss, gradient
        or weight is not finite or the gradient's norm is a spike.
      skip_spikes: skip updates whose gradient norm is above `factor` times the median of the last
        `window`; None: none.
      trackers: also write metrics to "tensorboard", "trackio", "wandb" or "mlflow", one or several;
        `metrics.jsonl` is always written.
      trackers_optional: go on without a tracker whose package is missing or that does not begin;
        false: that is an error.
      tracker_project: what trackers group runs by; MLflow calls it an experiment.
      export: write the final weights in Hugging Face form to `folder/model`.
      checkpoint: write checkpoints at all.
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
    """What the configurations of all algorithms have in common; each adds its own section.

    Attributes:
      model: the model to train.
      data: what is read, and the shape of a batch.
      run: where a run writes, and when.
      optimizer: of the trained weights.
      mesh: how arrays are placed on devices.
    """

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    algorithm: ClassVar[str]
    """Its name: the command, and the section of its own options."""

    data_options: ClassVar[tuple[str, ...]] = ()
    """Which of `_SOME_READ` it reads."""

    # Models besides the one that is trained, which these options of `mesh` may name.
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
        """Option → model whose files decide every step, for its weights are in no checkpoint."""
        return {} if self.model.lora is None else {"model.source": self.model.source}

    @property
    def sequences(self) -> int:
        """Rows that a step's batch is cut from: pairs, answers or documents."""
        return self.data.rows

    @property
    def sampled(self) -> int:
        """Tokens that are sampled after a row of data, at most."""
        return 0

    @property
    def row_parts(self) -> dict[str, int]:
        """Into how many parts the rows are cut, by the option that says so."""
        return {"run.micro_batches": self.run.micro_batches}

    @property
    def text_sections(self) -> dict[str, tuple[DataConfig, int]]:
        """Name → (section of data, parts that its rows are cut into)."""
        return {"data": (self.data, 1)}


_SOME_READ: dict[str, Any] = {"train_on": "all", "shared_prefix": False}
"""Options of `data` that only some algorithms read, with their defaults."""
