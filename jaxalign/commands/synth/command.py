"""The command `synth`."""

from __future__ import annotations

import argparse

from jaxalign.commands.command import Command, config_arguments


def _arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser, "YAML file (see configs/synth_instruct.yaml)")


def _run(parsed: argparse.Namespace) -> None:
    from jaxalign.commands.synth.config import load_synth
    from jaxalign.commands.synth.run import run_synth

    run_synth(load_synth(parsed.config, parsed.overrides))


COMMAND = Command(
    "synth", "make tasks or preference pairs with a model", _arguments, _run, compiles=True
)
from jaxalign.commands.synth.options import want
from jaxalign.commands.synth.preferences import TOO_LONG
from jaxalign.commands.synth.prompts import LANGUAGES
from jaxalign.data.chat import encode_conversations, encode_prompts, stop_token_ids
from jaxalign.data.packing import prompt_rows, token_rows
from jaxalign.data.rows import Conversation
from jaxalign.hf import load_language_model, load_reward_model, load_tokenizer
from jaxalign.models.scorer import pooled_scores
from jaxalign.parallel.sharding import row_shards, shard_batch, use_mesh
from jaxalign.run.config.mesh import MeshConfig
from jaxalign.run.config.yaml import build, override, read_yaml
from jaxalign.run.pipeline import EXAMPLES
from jaxalign.sampling.generate import sample

_STEP = 64  # prompts and answers are padded to a multiple of this, so that few shapes are compiled


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
    """What `jaxalign synth` does; exactly one of `instruct` and `preferences` is given.

    Attributes:
      out: the JSONL file to write; replies are kept in `<out>.journal`, so that the same command
        goes on where it was stopped.
      writer: who writes.
      judge: who grades or compares; None: the writer.
      reward_model: what scores, with `preferences.ranker: reward`.
      instruct: write tasks.
      preferences: write preference pairs.
      language: "en" or "zh": of the prompts, and of `${examples}` in sources.
      seed: of every random choice.
      mesh: devices of models that are loaded here; None: the first device.
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


class SynthResult(NamedTuple):
    """What a run came to.

    Attributes:
      out: the file of rows.
      rows: how many it has of this run.
      asked: replies asked for; the others were in the journal.
      dropped: how much was dropped, by reason.
      notes: what was counted besides.
    """

    out: pathlib.Path
    rows: int
    asked: int
    dropped: dict[str, int]
    notes: dict[str, int]


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
            # Said here, without the value: the general message would show it.
            raise ValueError(f"{name}.server.key: wanted text; put it in quotes")
    return build(SynthRun, values)


def run_synth(
    config: SynthRun, writer: Writer | None = None, judge: Writer | None = None
) -> SynthResult:
    """Runs it, or goes on with it; prints what was kept and what was dropped.

    Args:
      config: from `load_synth`.
      writer: in place of the one that the configuration describes.
      judge: likewise; for `ranker: reward` one whose replies are numbers.

    Raises:
      ValueError: wrong sources or settings, or a writer that brings nothing.
      ServerError: a server that does not answer. What came before is kept.
    """
    with contextlib.nullcontext() if config.mesh is None else config.mesh.use_rules():
        return _run_synth(config, writer, judge)


def _run_synth(config: SynthRun, writer: Writer | None, judge: Writer | None) -> SynthResult:
    method = _instruct if config.instruct is not None else _preferences
    prepared = method(config, writer, judge)
    journal = Journal(config.out)
    try:
        replies, rows, repaired = journal.found
        if replies or rows:
            cut = "; a line that was cut off was taken off" if repaired else ""
            print(f"{config.out}: going on after {replies} replies and {rows} rows{cut}")
        run = prepared(journal)
        try:
            run.run()
        finally:
            result = SynthResult(
                pathlib.Path(config.out),
                journal.rows,
                journal.asked,
                dict(run.dropped.most_common()),
                dict(run.notes.most_common()),
            )
            _tell(result)
        if rows > journal.rows:
            print(f"  the file has {rows} rows, more than this run wants; none was removed")
        return result
    finally:
        journal.close()


def _tell(result: SynthResult) -> None:
    print(f"{result.out}: {result.rows} rows; {result.asked} replies asked for")
    for reason, count in result.dropped.items():
        print(f"  dropped {count}: {reason}")
    for note, count in result.notes.items():
        print(f"  {count} {note}")


Prepared = Callable[[Journal], SelfInstruct | Preferences]


def _instruct(config: SynthRun, writer: Writer | None, judge: Writer | None) -> Prepared:
    options = config.instruct
    assert options is not None
    seeds = read_seed_tasks(_places(options.seeds, config.language))
    made = _writer(config.writer, config) if writer is None else writer
    asker = _asker(config.writer, config.seed)
    return lambda journal: SelfInstruct(options, seeds, made, asker, journal, config.language)


def _preferences(config: SynthRun, writer: Writer | None, judge: Writer | None) -> Prepared:
    options = config.preferences
    assert options is not None
    places = tuple(_places(options.prompts, config.language))
    prompts = read_prompts(dataclasses.replace(options, prompts=places))
    made = _writer(config.writer, config) if writer is None else writer
    asker = _asker(config.writer, config.seed)
    judge_asker = asker if config.judge is None else _asker(config.judge, config.seed)
    if judge is None and config.reward_model is not None:
        judge = score_writer(config.reward_model, config.mesh)
    elif judge is None:
        judge = made if config.judge is None else _writer(config.judge, config)
    ranker = judge
    return lambda journal: Preferences(
        options, prompts, made, ranker, asker, judge_asker, journal, config.language
    )


def _places(sources: Sequence[str], language: str) -> list[str]:
    return [source.replace("${examples}", str(EXAMPLES / language)) for source in sources]


def _asker(config: WriterConfig, seed: int) -> Asker:
    return Asker(seed, Sampling(config.temperature, config.top_p, config.max_tokens))


def _writer(config: WriterConfig, run: SynthRun) -> Writer:
    if config.local is not None:
        return local_writer(config, run.mesh)
    server = ServerConfig() if config.server is None else config.server
    return ServerWriter(config.model, server, config.concurrency)


def _mesh(config: MeshConfig | None) -> Mesh | None:
    if config is None:
        return None
    return config.make()


def _rows(wanted: int, mesh: Mesh | None) -> int:
    """Rows of a batch: a multiple of what the mesh splits them into."""
    parts = 1 if mesh is None else row_shards(mesh)
    return -(-wanted // parts) * parts


def local_writer(config: WriterConfig, mesh_config: MeshConfig | None = None) -> FunctionWriter:
    """A writer around a model that is loaded here, through our own sampler."""
    template = None if config.local is None else config.local.chat_template
    mesh = _mesh(mesh_config)
    tok = load_tokenizer(config.model)
    model, params = load_language_model(config.model, option="writer.model", mesh=mesh)
    stops = stop_token_ids(tok, template)
    pad = tok.pad_token_id if isinstance(tok.pad_token_id, int) else 0
    rows = _rows(config.concurrency, mesh)

    def write(requests: Sequence[Request]) -> list[tuple[str, str]]:
        first = requests[0]
        said = [tuple(request.messages) for request in requests]
        encoded = encode_prompts(tok, said, template, [request.name for request in requests])
        length = -(-max(map(len, encoded)) // _STEP) * _STEP
        out = sample(
            model,
            params,
            prompt_rows(encoded, range(len(encoded)), rows, length, pad),
            jax.random.key(first.seed),
            max_new_tokens=first.sampling.max_tokens,
            temperature=first.sampling.temperature,
            top_p=first.sampling.top_p,
            stop_tokens=stops,
            pad_token=pad,
        )
        tokens, mask, finished = map(np.asarray, (out.tokens, out.mask, out.finished))
        return [
            (
                str(tok.decode(tokens[row][mask[row]], skip_special_tokens=True)),
                "stop" if finished[row] else "length",
            )
            for row in range(len(requests))
        ]

    return FunctionWriter(config.model, write, rows)


def score_writer(
    config: RewardModelConfig, mesh_config: MeshConfig | None = None
) -> FunctionWriter:
    """A writer whose replies are a reward model's scores of the conversations it is sent."""
    mesh = _mesh(mesh_config)
    tok = load_tokenizer(config.source)
    model, params = load_reward_model(config.source, option="reward_model.source", mesh=mesh)
    pad = tok.pad_token_id if isinstance(tok.pad_token_id, int) else 0
    rows = _rows(config.rows, mesh)
    scores = jax.jit(lambda params, batch: pooled_scores(model, params, batch))

    def score(requests: Sequence[Request]) -> list[tuple[str, str]]:
        documents = []
        conversations = [Conversation(tuple(r.messages), r.name) for r in requests]
        for document in encode_conversations(tok, conversations, config.chat_template):
            end = int(np.flatnonzero(document.trained)[-1]) + 1  # where a rollout would stop
            ids, trained = document.ids[:end], document.trained[:end]
            documents.append(document._replace(ids=ids, trained=trained))
        fits = [n for n, document in enumerate(documents) if len(document.ids) <= config.length]
        found: dict[int, str] = {}
        if fits:
            longest = max(len(documents[n].ids) for n in fits)
            length = min(-(-longest // _STEP) * _STEP, config.length)
            batch = token_rows(documents, [[n] for n in fits], rows, length, pad)
            with use_mesh(mesh):
                placed = batch if mesh is None else shard_batch(batch, mesh)
                values = np.asarray(scores(params, placed), np.float64)
            found = {n: repr(float(value)) for n, value in zip(fits, values, strict=False)}
        return [(found[n], "stop") if n in found else ("", TOO_LONG) for n in range(len(requests))]

    return FunctionWriter(config.source, score, rows)
