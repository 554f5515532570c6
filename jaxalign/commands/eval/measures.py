"""What is measured of one model: loss, KL, reward accuracy, GSM8K, IFEval, multiple choice."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxalign.commands.eval.figures import Figure, Measured, mean, share
from jaxalign.commands.eval.language_model import EvalOptions, EvaluatedModel
from jaxalign.data import sft_batches
from jaxalign.data.chat import Encoded, encode_conversations
from jaxalign.data.examples import Conversation
from jaxalign.data.extent import Limits
from jaxalign.data.fields import fail, short
from jaxalign.data.rows import to_prompt
from jaxalign.data.sources import Row, read_rows
from jaxalign.data.tokens import plain_ids
from jaxalign.data.writers import Style
from jaxalign.losses.masked import weighted
from jaxalign.losses.sft import nll
from jaxalign.models.lm_head import target_logprobs
from jaxalign.rewards.gsm8k import EXTRACTS, final_number, right_number
from jaxalign.rewards.ifeval import follow, ifeval_accuracy
from jaxalign.rewards.scoring import load_scorer, score_rows
from jaxalign.types import Params, TokenBatch, Weighted


def measure_loss(model: EvaluatedModel, files: Sequence[str], train_on: str = "all") -> Measured:
    """Mean loss over the answers' tokens of files, in nats a token, and its perplexity.

        perplexity = exp(−Σ log π(y_t | …) / Σ 1)

    Args:
      model: what is measured.
      files: conversations or texts; with several, each has figures of its own too.
      train_on: which tokens count, as `jaxalign.data.train_on` says.
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
    # Rows that --limit leaves out are not missing.
    dropped = sum(
        number
        for reason, number in batches.stats["dropped"].items()
        if not (options.limit is not None and reason.startswith("not among the"))
    )
    notes = [f"{dropped} rows dropped, {cut} cut at {options.length} tokens"] * bool(dropped + cut)
    return Measured(figures, notes)


def measure_kl(model: EvaluatedModel, reference: EvaluatedModel, files: Sequence[str]) -> Measured:
    """The distance to a reference, on answers that the model samples at temperature 1.

        d_t = log π(y_t) − log π_ref(y_t),   KL ≈ E Σ_t d_t (k1),   E exp(−d_t) − 1 + d_t (k3)

    `kl` is k1, summed over an answer, in nats an answer; `kl_token` is k3, in nats a token
    (http://joschu.net/blog/kl-approx.html).

    Raises:
      ValueError: the models have other tokens.
    """
    if model.tok.get_vocab() != reference.tok.get_vocab():
        raise ValueError(
            "--reference: its tokenizer has another vocabulary than the model's, so their "
            "probabilities cannot be compared; give the model that the tuned one started from"
        )
    prompts = [to_prompt(row).messages for row in _rows(files, model.options)]
    samples = model.samples([list(prompt) for prompt in prompts])
    documents = [sampled.document for sampled in samples]
    gaps = [p - q for p, q in zip(model.logprobs(documents), reference.logprobs(documents),
                                  strict=True)]  # fmt: skip
    tokens = np.concatenate(gaps)
    k3 = np.expm1(-tokens) + tokens
    unfinished = sum(not sampled.finished for sampled in samples)
    notes = [f"{unfinished} answers were cut at {model.options.max_new_tokens} tokens"]
    return Measured(
        {
            "kl": mean([gap.sum() for gap in gaps], "answers"),
            "kl_token": Figure(float(k3.mean()), None, None, len(tokens), "tokens"),
            "length": mean([len(gap) for gap in gaps], "answers"),
        },
        notes * bool(unfinished),
    )


def measure_reward(
    source: str, files: Sequence[str], options: EvalOptions, by: str | None = None
) -> Measured:
    """Accuracy of a reward model: how often the chosen answer scores above the rejected one.

    Args:
      source: the reward model.
      files: pairs, such as RewardBench's.
      options: how it is asked.
      by: column that names the source of a row; None: `subset` where rows have it.

    Raises:
      ValueError: a row that is no pair, or lacks the column.
    """
    rows = _rows(files, options)
    column = ("subset" if all("subset" in row.data for row in rows) else None) if by is None else by
    for row in rows:
        if column is not None and column not in row.data:
            fail(row.origin, column, "no such column", "the source of the row", "see --by")
    scorer, params, tok = load_scorer(source)
    scored = score_rows(
        scorer,
        params,
        tok,
        rows,
        batch=options.batch,
        length=options.length,
        chat_template=options.chat_template,
        thinking=options.thinking,
    )
    wins: dict[str, list[float]] = collections.defaultdict(list)
    ties, kept = 0, []
    for row, result in zip(rows, scored.results, strict=True):
        margin = result.get("margin") if isinstance(result, dict) else None
        if not isinstance(margin, float):
            fail(row.origin, "chosen", "no pair with one score", "chosen and rejected answers",
                 "evaluate a reward model with one score on pairs")  # fmt: skip
        ties += margin == 0
        for name in ("", *(() if column is None else (str(row.data[column]),))):
            wins[name].append(float(margin > 0))
        kept.append({"origin": row.origin} | result)
    figures = {f"accuracy/{name}" if name else "accuracy": share(w, "pairs")
               for name, w in wins.items()}  # fmt: skip
    parts = [np.mean(w) for name, w in wins.items() if name]
    if parts:
        average = Figure(float(np.mean(parts)), None, None, len(parts), "sources")
        figures["accuracy_by_source"] = average
    notes = [f"{ties} pairs have equal scores and count as wrong"] * bool(ties)
    notes += [f"{scored.cut} answers cut at {options.length} tokens"] * bool(scored.cut)
    return Measured(figures, notes, kept)


def measure_gsm8k(model: EvaluatedModel, files: Sequence[str]) -> Measured:
    """GSM8K: the share of answers whose final number is the row's (`jaxalign.rewards.gsm8k`)."""
    rows = _rows(files, model.options)
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
    rows = _rows(files, model.options)
    for row in rows:
        follow("", row.data)  # a wrong row is an error before anything is sampled
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

    `accuracy` compares log π(choice | question), `accuracy_norm` the same divided by the choice's
    bytes. Rows have a question, `choices` (texts, or ARC's `{"text": […], "label": […]}`) and
    `answer`, `answerKey`, `label` or `gold`: a number from 0, a letter, or the choice's text. Under
    the template "none" a choice follows its question after a blank, as in few-shot prompts.
    """
    rows = _rows(files, model.options)
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
    """The choices of a row and the place of the right one."""
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


def _rows(files: Sequence[str], options: EvalOptions) -> list[Row]:
    rows = read_rows(list(files))
    return rows if options.limit is None else rows[: options.limit]


def _first(files: Sequence[str], limit: int) -> list[Any]:
    """So many rows of each file, drawn by the seed."""
    from jaxalign.data import Source

    return [Source(path=file, rows=min(limit, len(read_rows(file)))) for file in files]
