"""Evaluations of a language model on files: loss, GSM8K, IFEval, multiple choice."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxalign.data import sft_batches
from jaxalign.data.chat import Encoded, encode_conversations
from jaxalign.data.examples import Conversation
from jaxalign.data.extent import Limits
from jaxalign.data.fields import fail, short
from jaxalign.data.sources import Row, read_rows
from jaxalign.data.tokens import plain_ids
from jaxalign.data.writers import Style
from jaxalign.losses.masked import weighted
from jaxalign.losses.sft import nll
from jaxalign.models.lm_head import target_logprobs
from jaxalign.rewards.gsm8k import EXTRACTS, final_number, right_number
from jaxalign.rewards.ifeval import follow, ifeval_accuracy
from jaxalign.run.evaluation.figures import Figure, Measured, share
from jaxalign.run.evaluation.language_model import EvalOptions, EvaluatedModel
from jaxalign.types import Params, TokenBatch, Weighted


def measure_loss(model: EvaluatedModel, files: Sequence[str], train_on: str = "all") -> Measured:
    """Mean loss over the answers' tokens in files, in nats per token, and the perplexity.

        perplexity = exp(−Σ log π(y_t | …) / Σ 1)

    Args:
      model: the model to evaluate.
      files: conversations or texts; with several files, each also has its own figures.
      train_on: which tokens count, see `jaxalign.data.train_on`.
    """
    options = model.options
    sources = list(files)
    batches = sft_batches(
        _first(sources, options.limit) if options.limit is not None else sources,
        model.tok,
        train_on=train_on,  # pyrefly: ignore[bad-argument-type]
        rows=options.batch,
        length=options.length,
        epochs=1,
        shuffle=False,
        packing=False,
        chat_template=options.chat_template,
        thinking=options.thinking,
    )
    batches.check_model(Limits.of(model.model))
    names = batches.sources

    @jax.jit
    def run(params: Params, tokens: TokenBatch) -> dict[str, Weighted]:
        hidden = model.model.apply(params, tokens.inputs, tokens.positions, tokens.segment_ids)
        mask = tokens.loss_mask
        losses = nll(target_logprobs(model.model, params, hidden, tokens.targets, mask=mask))
        sums = {"": weighted(losses, mask)}
        if tokens.source_ids is not None and len(names) > 1:
            for number, name in enumerate(names):
                sums[name] = weighted(losses, mask & (tokens.source_ids == number))
        return sums

    totals: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
    for batch in batches:
        for name, figure in jax.device_get(run(model.params, batch)).items():
            totals[name] += (float(figure.total), float(figure.weight))
    figures = {}
    for name, (total, count) in totals.items():
        ending = f"/{name}" if name else ""
        loss = total / count if count else 0.0
        figures[f"nll{ending}"] = Figure(loss, None, None, int(count), "tokens")
        perplexity = math.exp(loss) if loss < 700 else math.inf
        figures[f"perplexity{ending}"] = Figure(perplexity, None, None, int(count), "tokens")
    cut = batches.stats["cut"]
    # Rows that --limit leaves out do not count as missing.
    dropped = sum(
        number
        for reason, number in batches.stats["dropped"].items()
        if not (options.limit is not None and reason.startswith("not among the"))
    )
    notes = [f"{dropped} rows dropped, {cut} cut at {options.length} tokens"] * bool(dropped + cut)
    return Measured(figures, notes)


def measure_gsm8k(model: EvaluatedModel, files: Sequence[str]) -> Measured:
    """GSM8K: the share of answers whose final number is the row's (`jaxalign.rewards.gsm8k`)."""
    rows = rows_of(files, model.options)
    right = [right_number(row.data, "answer") for row in rows]
    prompts = [_question(row) for row in rows]
    answers = model.answers(prompts)
    figures = {
        extract: share([final_number(a, extract) == r for a, r in zip(answers, right, strict=True)])
        for extract in EXTRACTS
    }
    kept = [
        {"origin": row.origin, "answer": answer, "right": str(number)}
        for row, answer, number in zip(rows, answers, right, strict=True)
    ]
    return Measured(figures, (), kept)


def measure_ifeval(model: EvaluatedModel, files: Sequence[str]) -> Measured:
    """IFEval's four accuracies (`jaxalign.rewards.ifeval`)."""
    rows = rows_of(files, model.options)
    for row in rows:
        follow("", row.data)  # raise for a bad row before sampling anything
    answers = model.answers([_question(row) for row in rows])
    data = [row.data for row in rows]
    checks = sum(len(row["instruction_id_list"]) for row in data)
    figures = {}
    for name, value in ifeval_accuracy(answers, data).items():
        count, unit = (len(rows), "rows") if name.startswith("prompt") else (checks, "instructions")
        trials = np.arange(count) < round(value * count)
        figures[name] = share(trials, unit)
    kept = [{"origin": row.origin, "answer": a} for row, a in zip(rows, answers, strict=True)]
    return Measured(figures, (), kept)


def measure_choice(model: EvaluatedModel, files: Sequence[str]) -> Measured:
    """Multiple choice: how often the right choice has the largest log-probability.

    `accuracy` compares log π(choice | question); `accuracy_norm` divides it by the choice's number
    of bytes. Rows have a question, `choices` (texts, or ARC's `{"text": […], "label": […]}`) and
    `answer`, `answerKey`, `label` or `gold`: a number from 0, a letter, or the choice's text. With
    the template "none", a space separates question and choice, as in few-shot prompts.
    """
    rows = rows_of(files, model.options)
    documents, sizes, golds = [], [], []
    for row in rows:
        choices, gold = _choices(row)
        documents += _encode_choices(model, row, choices)
        sizes.append([len(choice.encode()) for choice in choices])
        golds.append(gold)
    totals = iter([logprobs.sum() for logprobs in model.logprobs(documents)])
    plain, normed, kept = [], [], []
    for row, lengths, gold in zip(rows, sizes, golds, strict=True):
        scores = np.array([next(totals) for _ in lengths])
        plain.append(int(np.argmax(scores)) == gold)
        normed.append(int(np.argmax(scores / np.array(lengths))) == gold)
        kept.append({"origin": row.origin, "logprobs": scores.tolist(), "right": gold})
    return Measured({"accuracy": share(plain), "accuracy_norm": share(normed)}, (), kept)


def _encode_choices(model: EvaluatedModel, row: Row, choices: Sequence[str]) -> list[Encoded]:
    question, options = _question(row), model.options
    if options.chat_template != "none":
        conversations = [
            Conversation(
                ({"role": "user", "content": question}, {"role": "assistant", "content": choice}),
                row.origin,
            )
            for choice in choices
        ]
        style = Style(None, thinking=options.thinking)
        return encode_conversations(model.tok, conversations, options.chat_template, style=style)
    texts = [question, *(f"{question} {choice}" for choice in choices)]
    prompt, *whole = plain_ids(model.tok, texts)
    return [Encoded(np.asarray(ids, np.int32), np.arange(len(ids)) >= len(prompt)) for ids in whole]


def _choices(row: Row) -> tuple[list[str], int]:
    """A row's choices and the index of the right one."""
    choices = row.data.get("choices")
    labels = [chr(ord("A") + i) for i in range(26)]
    if isinstance(choices, Mapping):
        choices, labels = choices.get("text"), [str(x) for x in choices.get("label", labels)]
    if not isinstance(choices, list) or len(choices) < 2 or not all(
        isinstance(choice, str) and choice for choice in choices
    ):  # fmt: skip
        fail(row.origin, "choices", short(choices), "a list of two texts or more")
    names = ("answer", "answerKey", "label", "gold")
    name = next((name for name in names if row.data.get(name) is not None), "answer")
    gold = row.data.get(name)
    if isinstance(gold, str) and gold in choices:
        return choices, choices.index(gold)
    if isinstance(gold, str) and gold.strip() in labels[: len(choices)]:
        return choices, labels.index(gold.strip())
    if type(gold) is int and 0 <= gold < len(choices):
        return choices, gold
    fail(
        row.origin, name, short(gold), "the right choice: its place from 0, its letter or its text"
    )


def _question(row: Row) -> str:
    """The text of a row's one user message."""
    for name in ("prompt", "question", "query"):
        value = row.data.get(name)
        if isinstance(value, str) and value.strip():
            return value
    fail(row.origin, "prompt", "no question", "a text in prompt, question or query")


def rows_of(files: Sequence[str], options: EvalOptions) -> list[Row]:
    """The rows of files, the first `limit` of them."""
    rows = read_rows(list(files))
    return rows if options.limit is None else rows[: options.limit]


def _first(files: Sequence[str], limit: int) -> list[Any]:
    """A number of rows of each file, sampled with the seed."""
    from jaxalign.data import Source

    return [Source(path=file, rows=min(limit, len(read_rows(file)))) for file in files]
