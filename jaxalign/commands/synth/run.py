"""A run of `jaxalign synth`: its writers, its journal, and one of the two methods."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxalign.commands.synth.config import ServerConfig, SynthRun, WriterConfig
from jaxalign.commands.synth.instruct import SelfInstruct, read_seed_tasks
from jaxalign.commands.synth.journal import Journal
from jaxalign.commands.synth.models import local_writer, score_writer
from jaxalign.commands.synth.preferences import Preferences, read_prompts
from jaxalign.commands.synth.server import ServerWriter
from jaxalign.commands.synth.writer import RequestFactory, Sampling, Writer
from jaxalign.data.paths import local_path
from jaxalign.run.pipeline import EXAMPLES


class SynthResult(NamedTuple):
    """What a run wrote.

    Attributes:
      out: the file of rows.
      rows: how many it has of this run.
      requested: replies from the writers; the others were in the journal.
      dropped: how much was dropped, by reason.
      notes: other counts.
    """

    out: pathlib.Path
    rows: int
    requested: int
    dropped: dict[str, int]
    notes: dict[str, int]


def run_synth(
    config: SynthRun, writer: Writer | None = None, judge: Writer | None = None
) -> SynthResult:
    """Runs it or resumes it; prints how many rows it wrote and what it dropped.

    Args:
      config: from `load_synth`.
      writer: replaces the one that the configuration describes.
      judge: replaces that one; for `ranker: reward`, its replies are numbers.

    Raises:
      ValueError: wrong sources or settings, or a writer that yields no row.
      ServerError: a server that does not answer. Earlier replies are kept.
    """
    with contextlib.nullcontext() if config.mesh is None else config.mesh.use_rules():
        return _run_synth(config, writer, judge)


def _run_synth(config: SynthRun, writer: Writer | None, judge: Writer | None) -> SynthResult:
    local_path(config.out, "out")  # before a model is loaded
    method = _instruct if config.instruct is not None else _preferences
    prepared = method(config, writer, judge)
    journal = Journal(config.out)
    try:
        replies, rows, repaired = journal.resumed
        if replies or rows:
            cut = "; a cut-off line was removed" if repaired else ""
            print(f"{config.out}: going on after {replies} replies and {rows} rows{cut}")
        run = prepared(journal)
        try:
            run.run()
        finally:
            result = SynthResult(
                pathlib.Path(config.out),
                journal.rows,
                journal.requested,
                dict(run.dropped.most_common()),
                dict(run.notes.most_common()),
            )
            _print_result(result)
        if rows > journal.rows:
            print(f"  the file has {rows} rows, more than this run wants; none was removed")
        return result
    finally:
        journal.close()


def _print_result(result: SynthResult) -> None:
    print(f"{result.out}: {result.rows} rows; {result.requested} replies asked for")
    for reason, count in result.dropped.items():
        print(f"  dropped {count}: {reason}")
    for note, count in result.notes.items():
        print(f"  {count} {note}")


Prepared = Callable[[Journal], SelfInstruct | Preferences]


def _instruct(config: SynthRun, writer: Writer | None, judge: Writer | None) -> Prepared:
    options = config.instruct
    assert options is not None
    seeds = read_seed_tasks(_sources(options.seeds, config.language))
    author = _writer(config.writer, config) if writer is None else writer
    factory = _factory(config.writer, config.seed)
    return lambda journal: SelfInstruct(options, seeds, author, factory, journal, config.language)


def _preferences(config: SynthRun, writer: Writer | None, judge: Writer | None) -> Prepared:
    options = config.preferences
    assert options is not None
    sources = tuple(_sources(options.prompts, config.language))
    prompts = read_prompts(dataclasses.replace(options, prompts=sources))
    author = _writer(config.writer, config) if writer is None else writer
    factory = _factory(config.writer, config.seed)
    judge_factory = factory if config.judge is None else _factory(config.judge, config.seed)
    if judge is None and config.reward_model is not None:
        judge = score_writer(config.reward_model, config.mesh)
    elif judge is None:
        judge = author if config.judge is None else _writer(config.judge, config)
    ranker = judge  # the lambda captures one type, not an optional
    return lambda journal: Preferences(
        options, prompts, author, ranker, factory, judge_factory, journal, config.language
    )


def _sources(sources: Sequence[str], language: str) -> list[str]:
    return [source.replace("${examples}", str(EXAMPLES / language)) for source in sources]


def _factory(config: WriterConfig, seed: int) -> RequestFactory:
    return RequestFactory(seed, Sampling(config.temperature, config.top_p, config.max_tokens))


def _writer(config: WriterConfig, run: SynthRun) -> Writer:
    if config.local is not None:
        return local_writer(config, run.mesh)
    server = ServerConfig() if config.server is None else config.server
    return ServerWriter(config.model, server, config.concurrency)
