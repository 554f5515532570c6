"""The configuration of `jaxalign synth`: the run, its writers, and the two methods.

out: data/tasks.jsonl
writer: {model: some-model, server: {address: "http://localhost:8000/v1"}}
instruct: {seeds: ["${examples}/seed_tasks.jsonl"], count: 1000}   # or preferences: {…}
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.commands.synth.prompts import LANGUAGES
from jaxalign.data.options import THINKING
from jaxalign.run.config.mesh import MeshConfig
from jaxalign.run.config.yaml import build, override, read_yaml

FORMS = ("messages", "prompt_completion", "alpaca")
RANKERS = ("reward", "grade", "pairwise")
PAIRS = ("best_worst", "all")

KEYWORDS = (
    *("image", "images", "picture", "pictures", "photo", "photos", "graph", "graphs"),
    *("map", "maps", "draw", "plot", "file", "files", "video", "audio"),
    *("图片", "图像", "照片", "画", "视频", "音频", "文件", "地图"),
)
"""Words of tasks that a text-only model cannot do."""


def want(ok: bool, name: str, got: Any, wanted: str) -> None:
    """Raises ValueError for a value that an option does not accept."""
    if not ok:
        raise ValueError(f"{name}={got!r}: wanted {wanted}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """An HTTP server that speaks OpenAI's chat completions.

    Attributes:
      address: base address such as `http://localhost:8000/v1`; None: from the environment.
      address_variable: the environment variable that holds the address.
      key: sent as bearer token; None: taken from the environment, if set there. The environment is
        safer, because configurations get shared.
      key_variable: the environment variable that holds the key.
      limit_field: the name under which `max_tokens` is sent; newer OpenAI models require
        "max_completion_tokens".
      send_seed: send a different seed with each request. It makes servers that support it
        reproducible; servers that reject it need false.
      timeout: seconds without an answer before a request is sent again.
      retries: how often a request is sent again after a status of 408, 409, 425, 429 or 5xx, a
        broken connection, a timeout, or an unreadable answer. Then the run stops.
      backoff: seconds before the first retry; doubled each time, with jitter, up to 60. A longer
        `Retry-After` of the server is followed, up to 10 minutes.
      max_refusals: consecutive refused requests (400, 413, 422: the server rejects this prompt)
        before the run stops.
    """

    address: str | None = None
    address_variable: str = "OPENAI_BASE_URL"
    key: str | None = dataclasses.field(default=None, repr=False)
    key_variable: str = "OPENAI_API_KEY"
    limit_field: str = "max_tokens"
    send_seed: bool = True
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0
    max_refusals: int = 5

    def __post_init__(self):
        fields = ("max_tokens", "max_completion_tokens")
        want(self.limit_field in fields, "limit_field", self.limit_field, " or ".join(fields))
        want(self.timeout > 0, "timeout", self.timeout, "positive seconds")
        want(self.retries >= 0, "retries", self.retries, "0 or more")
        want(self.backoff >= 0, "backoff", self.backoff, "seconds, 0 or more")
        want(self.max_refusals > 0, "max_refusals", self.max_refusals, "positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """A model that this process loads.

    Attributes:
      chat_template: None (the tokenizer's own), a built-in name, or a jinja file. Not "none".
      thinking: "on" lets the model reason, if the template has a prompt for that; "off" and "auto"
        close the reasoning block.
      chat_template_kwargs: more variables of the template.
    """

    chat_template: str | None = None
    thinking: str = "auto"
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self):
        want(self.thinking in THINKING, "thinking", self.thinking, " or ".join(THINKING))
        want(self.chat_template != "none", "chat_template", "none", "a template with turns")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriterConfig:
    """The model that writes, or judges.

    Attributes:
      model: its name at the server; with `local` a folder, a `.gguf` file or a hub id.
      server: its server; None without `local`: a server named by the environment.
      local: set (to `{}`) for a model that this process loads.
      temperature: 0 is greedy. Questions with one right answer (whether a task is a
        classification; verdicts of a judge) always use 0.
      top_p: 1 is off.
      max_tokens: the most tokens of a reply.
      concurrency: simultaneous requests; for a local model, replies decoded at a time.
    """

    model: str
    server: ServerConfig | None = None
    local: LocalConfig | None = None
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 1024
    concurrency: int = 4

    def __post_init__(self):
        want(bool(self.model.strip()), "model", self.model, "a name")
        want(self.server is None or self.local is None, "local", self.local, "null with a server")
        want(0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 or more")
        want(0 < self.top_p <= 1, "top_p", self.top_p, "a part in (0, 1]")
        want(self.max_tokens > 0, "max_tokens", self.max_tokens, "positive")
        want(self.concurrency > 0, "concurrency", self.concurrency, "positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructConfig:
    """Self-Instruct; see docs/synthesis.md.

    Attributes:
      seeds: seed tasks: files, folders, globs or hub ids with the columns `instruction` and
        `instances` (or `input`, `output`).
      count: the number of rows to write.
      form: the form of the rows: "messages", "prompt_completion" or "alpaca".
      human_examples: seed tasks shown in a request for new tasks.
      machine_examples: earlier machine-written tasks also shown, once there are any.
      tasks_per_prompt: new tasks that one request asks for.
      prompts_per_round: such requests sent at once; the next round may show the resulting tasks.
      classification_check: ask which tasks are classifications and write their labels first.
      max_labels: the most labels, one row each, of a classification task; the rest are dropped.
      rouge_threshold: a new instruction is dropped if its ROUGE-L with any other reaches this; 1
        drops only repetitions.
      min_words: the fewest words of an instruction. A Chinese or Japanese character counts as a
        word.
      max_words: the most words of an instruction.
      max_output_words: the most words of an output.
      keywords: drop instructions with these words (or phrases).
      patience: rounds in a row without a new row before the run stops.
    """

    seeds: tuple[str, ...]
    count: int = 100
    form: str = "messages"
    human_examples: int = 6
    machine_examples: int = 2
    tasks_per_prompt: int = 8
    prompts_per_round: int = 4
    classification_check: bool = True
    max_labels: int = 4
    rouge_threshold: float = 0.7
    min_words: int = 4
    max_words: int = 150
    max_output_words: int = 1000
    keywords: tuple[str, ...] = KEYWORDS
    patience: int = 10

    def __post_init__(self):
        want(bool(self.seeds), "seeds", self.seeds, "at least one file of seed tasks")
        want(self.form in FORMS, "form", self.form, f"one of {', '.join(FORMS)}")
        for name in ("count", "human_examples", "tasks_per_prompt", "prompts_per_round"):
            want(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name in ("max_labels", "min_words", "max_output_words", "patience"):
            want(getattr(self, name) > 0, name, getattr(self, name), "positive")
        want(self.machine_examples >= 0, "machine_examples", self.machine_examples, "0 or more")
        want(0 < self.rouge_threshold <= 1, "rouge_threshold", self.rouge_threshold, "in (0, 1]")
        want(self.max_words >= self.min_words, "max_words", self.max_words, "min_words or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Preference pairs; see docs/synthesis.md.

    Attributes:
      prompts: files, folders, globs or hub ids of prompts.
      count: use only the first prompts; None: all.
      answers: k, answers sampled per prompt.
      ranker: "reward" (scores of a reward model), "grade" (a judge's grades from 1 to 10) or
        "pairwise" (a judge compares every two answers, in both orders).
      pairs: "best_worst", one pair per prompt, or "all" pairs.
      min_margin: smallest difference of scores (grades; wins, if pairwise) in a pair. Equal scores
        never make a pair.
      write_margin: write the difference as the column `margin`, which the reward model's loss
        subtracts. The scores are in every row's provenance in any case.
      prompts_per_round: prompts answered at once.
    """

    prompts: tuple[str, ...]
    count: int | None = None
    answers: int = 4
    ranker: str = "grade"
    pairs: str = "best_worst"
    min_margin: float = 0.0
    write_margin: bool = False
    prompts_per_round: int = 8

    def __post_init__(self):
        want(bool(self.prompts), "prompts", self.prompts, "at least one file of prompts")
        want(self.count is None or self.count > 0, "count", self.count, "positive or null")
        want(self.answers > 1, "answers", self.answers, "2 or more")
        want(self.ranker in RANKERS, "ranker", self.ranker, f"one of {', '.join(RANKERS)}")
        want(self.pairs in PAIRS, "pairs", self.pairs, " or ".join(PAIRS))
        want(self.min_margin >= 0, "min_margin", self.min_margin, "0 or more")
        want(self.prompts_per_round > 0, "prompts_per_round", self.prompts_per_round, "positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """The reward model that ranks.

    Attributes:
      source: folder or hub id of a reward model with its tokenizer.
      chat_template: None (the tokenizer's own), a built-in name, or a jinja file.
      length: tokens of prompt and answer; longer answers are dropped and counted.
      rows: answers scored at a time.
    """

    source: str
    chat_template: str | None = None
    length: int = 2048
    rows: int = 16

    def __post_init__(self):
        want(self.length > 1, "length", self.length, "at least 2")
        want(self.rows > 0, "rows", self.rows, "positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthRun:
    """A run of `jaxalign synth`: exactly one of `instruct` and `preferences`.

    Attributes:
      out: the JSONL file to write; `<out>.journal` keeps the replies, so that the same command
        resumes a run that was stopped.
      writer: the model that writes.
      judge: the model that grades or compares; None: the writer.
      reward_model: the model that scores, with `preferences.ranker: reward`.
      instruct: write tasks.
      preferences: write preference pairs.
      language: "en" or "zh": of the prompts, and of `${examples}` in sources.
      seed: of every random choice.
      mesh: the devices of models loaded here; None: the first device.
    """

    out: str
    writer: WriterConfig
    judge: WriterConfig | None = None
    reward_model: RewardModelConfig | None = None
    instruct: InstructConfig | None = None
    preferences: PreferenceConfig | None = None
    language: str = "en"
    seed: int = 0
    mesh: MeshConfig | None = None

    def __post_init__(self):
        for option in ("rules_of", "apart"):
            given = {} if self.mesh is None else getattr(self.mesh, option)
            want(
                not given, f"mesh.{option}", given, "nothing: that is for models of a training run"
            )
        want(self.out.endswith(".jsonl"), "out", self.out, "a file name that ends with .jsonl")
        want(self.language in LANGUAGES, "language", self.language, " or ".join(LANGUAGES))
        want(0 <= self.seed < 2**32, "seed", self.seed, "0 or more, less than 2**32")
        if (self.instruct is None) == (self.preferences is None):
            raise ValueError("instruct, preferences: wanted one section of the two")
        ranker = None if self.preferences is None else self.preferences.ranker
        judged = ranker in ("grade", "pairwise")
        want(
            judged or self.judge is None,
            "judge",
            None if self.judge is None else self.judge.model,
            "null, unless preferences.ranker is grade or pairwise",
        )
        scored = self.reward_model is not None
        if scored != (ranker == "reward"):
            raise ValueError(
                f"reward_model: {'given' if scored else 'missing'} with preferences.ranker="
                f"{ranker}; wanted with ranker=reward, and only there"
            )
        local = self.writer.local is not None or scored
        local = local or (self.judge is not None and self.judge.local is not None)
        want(self.mesh is None or local, "mesh", "given", "null, since no model is loaded here")


def load_synth(
    source: str | pathlib.Path | Mapping[str, Any], assignments: Sequence[str] = ()
) -> SynthRun:
    """The checked configuration.

    Args:
      source: YAML file, or nested values.
      assignments: `key=value` overrides.

    Raises:
      ValueError: all problems at once.
    """
    values = override(source if isinstance(source, Mapping) else read_yaml(source), assignments)
    for name in ("writer", "judge"):
        node: Any = values
        for part in (name, "server", "key"):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node is not None and not isinstance(node, str):
            # Rejected here, because the general message would show the key.
            raise ValueError(f"{name}.server.key: wanted text; put it in quotes")
    return build(SynthRun, values)
