"""From rows to examples: the common forms of alignment data, recognised by their columns.

Each `to_*` reads the forms of its table below into one type of `jaxalign.data.examples`, trying
them from top to bottom. docs/data.md shows them with examples. A row that fits no form is an error,
never skipped; every error is a `RowError` that names `file:line`, the column and a remedy.

Arguments of all `to_*`: `row`; `columns`, a map from our column names to the data set's
(`{"prompt": "query", "completion": "reply"}`); `form`, the name of a form if several would fit.
"""

from __future__ import annotations

import functools
from typing import Any

from jaxalign.data.columns import (
    Columns,
    Form,
    read_form,
    template_kwargs_of,
    tools_of,
    with_system,
)
from jaxalign.data.conversation_forms import CONVERSATIONS, PROMPT
from jaxalign.data.examples import (
    Conversation,
    Graded,
    Messages,
    Preference,
    Prompt,
    Ranked,
    Steps,
    Text,
    Unpaired,
)
from jaxalign.data.fields import fail, fail_with, items, number, parsed, short, text, truth, untyped
from jaxalign.data.files import Row
from jaxalign.data.meaning import ANSWERS
from jaxalign.data.messages import is_messages, read_messages, same_turn
from jaxalign.data.transcripts import is_transcript, read_transcript, split_messages, split_texts
from jaxalign.data.turns import answer_of, check_last, check_trained, has_prompt, pick, prompt_of

SIDES = ("chosen", "rejected")
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""Attributes that are recognised as scores by their names (HelpSteer, arXiv:2311.09528)."""


def to_conversation(row: Row, columns: Columns = None, form: str | None = None) -> Conversation:
    """Reads a row for SFT: messages, prompt and completion, Alpaca, GSM8K, ….

    Raises:
      ValueError: the row has none of these forms, a column is missing, of the wrong type or empty,
        or no assistant turn is left to train. It names `file:line` and the column.
    """
    hint = ""
    if "chosen" in row.data:
        hint = " (this is a preference pair: train a reward model or DPO with it, or its chosen "
        hint += "answers by `columns: {completion: chosen}`)"
    elif "text" in row.data:
        hint = " (plain text is read by to_text)"
    return read_form(row, CONVERSATIONS, columns, form, hint, trained=True)


def to_preference(row: Row, columns: Columns = None, form: str | None = None) -> Preference:
    """Reads a preference row.

    The prompt is a separate column (`prompt`, `instruction` + `input`, `question`, `conversations`
    or `messages`), or else the common prefix of `chosen` and `rejected`: whole turns for lists and
    HH-RLHF transcripts, whole words for other text. Lists may repeat the given prompt at their
    start.

    Raises:
      ValueError: a column is missing, of the wrong type or empty. It names `file:line` and column.
    """
    missing = [repr(key) for key in ("chosen", "rejected") if key not in row.data]
    hint = f" (missing: {', '.join(missing)})" if len(missing) == 1 else ""
    return read_form(row, _PREFERENCES, columns, form, hint)


def to_prompt(row: Row, columns: Columns = None, form: str | None = None) -> Prompt:
    """Reads the prompt of a row; its other columns stay available in `Prompt.row`.

    Raises:
      ValueError: the prompt column is missing, empty or of the wrong type, or the last turn is the
        assistant's.
    """
    prompt: Prompt = read_form(row, _PROMPTS, columns, form)
    if prompt.messages[-1]["role"] == "assistant":
        fail_with(
            row.origin,
            "prompt",
            "the last message is the assistant's, wanted messages that await an answer",
            "remove the answer",
        )
    return prompt._replace(row=dict(getattr(row.data, "source", row.data)))


def to_text(row: Row, columns: Columns = None, form: str | None = None) -> Text:
    """Reads plain text: the column `text`."""
    return read_form(row, _TEXTS, columns, form)


def to_unpaired(row: Row, columns: Columns = None, form: str | None = None) -> Unpaired:
    """Reads an answer labelled good or bad (`label` or `kto_tag`: true, false, 1, 0).

    In `messages`, the last assistant turn is the answer.
    """
    return read_form(row, _UNPAIRED, columns, form)


def to_ranked(row: Row, columns: Columns = None, form: str | None = None) -> Ranked:
    """Reads several answers with `scores` (larger is better) or `ranks` (1 is the best).

    A preference row counts as two answers, ranked 1 and 0.
    """
    return read_form(row, _RANKED, columns, form)


def to_graded(row: Row, columns: Columns = None, form: str | None = None) -> Graded:
    """Reads an answer with scores: an object `scores`, or HelpSteer's columns.

    For columns with other names: `columns={"scores": "helpful, honest"}`. Null scores are absent.
    """
    return read_form(row, _GRADED, columns, form)


def to_steps(row: Row, columns: Columns = None, form: str | None = None) -> Steps:
    """Reads steps of reasoning (`completions` or `steps`) with their `labels` in [0, 1]."""
    return read_form(row, _STEPS, columns, form)


# Preferences


def _v1(row: Row) -> Preference:
    """LLaMA-Factory's `chosen_messages` and `rejected_messages`."""
    data: Any = row.data
    return _preference(
        Row(data.changed({side: data[f"{side}_messages"] for side in SIDES}), row.origin)
    )


def _preference(row: Row) -> Preference:
    data, origin = row
    if has_prompt(row):
        prompt = _shared_prompt(row, prompt_of(row))
        chosen = answer_of(data["chosen"], "chosen", origin, prompt)
        rejected = answer_of(data["rejected"], "rejected", origin, prompt)
    else:
        prompt, chosen, rejected = _apart(row)
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        check_last(answer, key, origin)
        check_trained(answer, key, origin)
    kwargs = template_kwargs_of(row)
    return Preference(prompt, chosen, rejected, _margin(row), origin, tools_of(row), kwargs)


def _shared_prompt(row: Row, prompt: Messages) -> Messages:
    """The prompt, or the sides' common prefix if it contains the prompt and more before it.

    If the sides are whole conversations, a prompt given as text may lack their system turn.
    """
    sides = [dict.get(row.data, side) for side in SIDES]
    if len(prompt) != 1 or not all(is_messages(side) for side in sides):
        return prompt
    chosen, rejected = (read_messages(x, k, row.origin) for x, k in zip(sides, SIDES, strict=True))
    start = 0
    for a, b in zip(chosen[:-1], rejected[:-1], strict=False):
        if not same_turn(a, b):
            break
        start += 1
    common = chosen[:start]
    if common and same_turn(common[-1], prompt[0]) and common[-1]["role"] == "user":
        return common
    return prompt


def _apart(row: Row) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected of a row without a column for the prompt."""
    data, origin = row
    values = {key: data[key] for key in ("chosen", "rejected")}
    if all(isinstance(v, str) and not is_messages(v) for v in values.values()):
        chosen, rejected = (text(values[key], key, origin) for key in values)
        if not (is_transcript(chosen) and is_transcript(rejected)):
            at = split_texts(chosen, rejected, origin)
            return (
                with_system(row, ({"role": "user", "content": chosen[:at]},)),
                ({"role": "assistant", "content": chosen[at:]},),
                ({"role": "assistant", "content": rejected[at:]},),
            )
        sides = [read_transcript(values[key], key, origin) for key in values]
    else:
        sides = [read_messages(values[key], key, origin) for key in values]
    common = split_messages(sides[0], sides[1], origin)
    prompt = with_system(row, sides[0][:common])
    return prompt, sides[0][common:], sides[1][common:]


def _hh(row: Row) -> Preference:
    for key in ("chosen", "rejected"):
        if not is_transcript(row.data[key]):
            fail(row.origin, key, short(row.data[key]), "a transcript that starts with 'Human:'")
    return _preference(row)


def _margin(row: Row) -> float | None:
    """`margin`, or the difference of two columns that `columns` named."""
    value = row.data.get("margin")
    if isinstance(value, tuple):
        first, second = (number(each, "margin", row.origin) for each in value)
        return number(first - second, "margin", row.origin)
    return None if value is None else number(value, "margin", row.origin)


_PREFERENCES = (
    Form("preference", ("chosen", "rejected"), _preference),
    Form("preference", ("chosen_messages", "rejected_messages"), _v1),
    Form("hh", ("chosen", "rejected"), _hh),
)


# Prompts


def _prompt_or_task(row: Row) -> Prompt:
    """Beside an instruction and its output, `prompt` is both of them in a template."""
    data: Any = row.data
    return (_alpaca_task if data.has("instruction") and data.has("output") else _prompt)(row)


def _prompt(row: Row) -> Prompt:
    prompt = _shared_prompt(row, prompt_of(row))
    return Prompt(prompt, row.origin, row.data, tools_of(row), template_kwargs_of(row))


def _alpaca_task(row: Row) -> Prompt:
    prompt = prompt_of(row, "instruction")
    return Prompt(prompt, row.origin, row.data, tools_of(row), template_kwargs_of(row))


def _prompt_of_pair(row: Row) -> Prompt:
    prompt, kwargs = to_preference(row).prompt, template_kwargs_of(row)
    return Prompt(prompt, row.origin, row.data, tools_of(row), kwargs)


_PROMPTS = (
    Form("prompt", ("prompt",), _prompt, by_name=True),
    Form("prompt", ("prompt",), _prompt_or_task),
    Form("alpaca", ("instruction",), _alpaca_task),
    Form("gsm8k", ("question", "answer"), _prompt),
    Form("prompt", ("question", "|".join(ANSWERS)), _prompt),
    Form("sharegpt", ("conversations",), _prompt),
    Form("messages", ("messages",), _prompt),
    Form("preference", ("chosen", "rejected"), _prompt_of_pair),
)


# Text


def _text(row: Row) -> Text:
    return Text(text(row.data["text"], "text", row.origin), row.origin)


_TEXTS = (Form("text", ("text",), _text),)


# Unpaired answers


def _unpaired(row: Row, form: Form) -> Unpaired:
    data, origin = row
    mark = pick(data, "label", "kto_tag")
    desirable = truth(data[mark], mark, origin)
    found: Conversation = form.read(row)
    last = found.trained_turns()[-1]
    if last != len(found.messages) - 1:
        fail_with(origin, "messages", "the last turn is not the assistant's answer")
    first = last if found.trained_from == 0 else found.trained_from
    turns = found.messages
    return Unpaired(
        turns[:first], turns[first:], desirable, origin, found.tools, found.template_kwargs
    )


_UNPAIRED = tuple(
    Form(each.name, (*each.needs, "label|kto_tag"), functools.partial(_unpaired, form=each))
    for each in CONVERSATIONS
    if not each.by_name
)


# Several answers


def _ranked(row: Row) -> Ranked:
    data, origin = row
    key, order = pick(data, "answers", "completions"), pick(data, "scores", "ranks")
    prompt = prompt_of(row)
    given = items(data[key], key, origin, "answers")
    answers = [answer_of(each, f"{key}[{n}]", origin, prompt) for n, each in enumerate(given)]
    for n, answer in enumerate(answers):
        check_trained(answer, f"{key}[{n}]", origin)
    ranks = [
        number(each, f"{order}[{n}]", origin)
        for n, each in enumerate(items(data[order], order, origin, "numbers"))
    ]
    if len(answers) < 2:
        fail(origin, key, "one answer", "two or more")
    if len(answers) != len(ranks):
        fail(origin, order, f"{len(ranks)} numbers", f"one for each of {len(answers)} answers")
    better = tuple(rank if order == "scores" else -rank for rank in ranks)
    kwargs = template_kwargs_of(row)
    return Ranked(prompt, tuple(answers), better, origin, tools_of(row), kwargs)


def _ranked_pair(row: Row) -> Ranked:
    pair = to_preference(row)
    answers = (pair.chosen, pair.rejected)
    return Ranked(pair.prompt, answers, (1.0, 0.0), pair.origin, pair.tools, pair.template_kwargs)


_RANKED = (
    Form("ranked", (PROMPT, "answers|completions", "scores|ranks"), _ranked),
    Form("preference", ("chosen", "rejected"), _ranked_pair),
)


# Graded answers


def _graded(row: Row) -> Graded:
    data, origin = row
    key = pick(data, "response", "completion", "output", "answer")
    prompt = prompt_of(row)
    answer = answer_of(data[key], key, origin, prompt)
    given = data.get("scores")
    if given is None:
        given = {name: data.get(name) for name in HELPSTEER if name in data}
    given = untyped(given)
    if not isinstance(given, dict):
        fail(origin, "scores", short(given), "an object of attribute: number")
    scores = {
        str(name): number(value, f"scores.{name}", origin)
        for name, value in given.items()
        if value is not None
    }
    if not scores:
        fail(origin, "scores", "none", "at least one number", "give a score or remove the row")
    return Graded(prompt, answer, scores, origin, tools_of(row), template_kwargs_of(row))


_GRADED = (
    Form("graded", (PROMPT, "response|completion|output|answer", "scores"), _graded),
    Form("graded", (PROMPT, "response|completion|output|answer", "|".join(HELPSTEER)), _graded),
)


# Steps


def _steps(row: Row) -> Steps:
    data, origin = row
    key = pick(data, "completions", "steps")
    given = items(data[key], key, origin, "texts")
    steps = tuple(text(each, f"{key}[{n}]", origin) for n, each in enumerate(given))
    labels = items(data["labels"], "labels", origin, "numbers")
    if len(labels) != len(steps):
        fail(origin, "labels", f"{len(labels)} labels", f"one for each of {len(steps)} steps")
    read = tuple(_label(value, f"labels[{n}]", origin) for n, value in enumerate(labels))
    return Steps(prompt_of(row), steps, read, origin, template_kwargs_of(row))


def _label(value: object, key: str, origin: str) -> float:
    """A label as a number in [0, 1]."""
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and value.strip() in ("+", "-"):
        return float(value.strip() == "+")
    found = number(parsed(value) if isinstance(value, str) else value, key, origin)
    if not 0 <= found <= 1:
        fail(origin, key, short(value), "a number in [0, 1], true or false")
    return found


_STEPS = (Form("steps", (PROMPT, "completions|steps", "labels"), _steps),)
