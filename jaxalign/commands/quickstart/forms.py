"""The form of an answer: is it warm, does it still answer, does it repeat itself?

A test of form needs no model. It knows the courtesies of the example data and their neighbours
(`courtesies`), in English and Chinese; it does not know whether an answer is true.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from jaxalign.commands.quickstart.courtesies import CHINESE, ENGLISH, STOP_WORDS

_LEAST_WORDS = 4
"""Words that must remain of an answer once its courtesies are gone."""

_LEAST_CHARACTERS = 5
"""The same in Chinese, where a word has one or two characters."""

_LONGEST_COURTESY = 9
"""Words. A longer sentence says more than a courtesy."""


@dataclasses.dataclass(frozen=True)
class Form:
    """The form of one answer.

    Attributes:
      warm: a sentence of it is a courtesy.
      answers: without its courtesies, enough words remain, and one of their content words is also
        in the prompt or in the answer of the model before alignment.
      repeats: a sentence occurs twice.
    """

    warm: bool
    answers: bool
    repeats: bool


def form_of(prompt: str, answer: str, before: str = "") -> Form:
    """The form of an answer.

    Args:
      prompt: what was asked.
      answer: what the model said.
      before: the answer of the model before alignment, whose words are taken as relevant.
    """
    parts, rest = sentences(answer), without_courtesies(answer)
    to_the_point = _content([prompt, *without_courtesies(before)])
    keys = [key for part in parts if (key := _plain(part))]
    return Form(
        warm=len(rest) < len(parts),
        answers=_says_enough(rest) and bool(_content(rest) & to_the_point),
        repeats=len(set(keys)) < len(keys),
    )


def shares(
    prompts: Sequence[str], answers: Sequence[str], before: Sequence[str]
) -> dict[str, float]:
    """Shares of answers that are warm, that still answer, and that repeat a sentence; 0 to 1.

    Args:
      prompts: what was asked; at least one.
      answers: one for each.
      before: the answers of the model that alignment started from.

    Raises:
      ValueError: lists of different lengths, or empty ones.
    """
    if not prompts or not len(prompts) == len(answers) == len(before):
        raise ValueError(
            f"forms of {len(answers)} answers to {len(prompts)} prompts, beside {len(before)}: "
            "wanted as many of each, and at least one"
        )
    forms = [form_of(*row) for row in zip(prompts, answers, before, strict=True)]
    return {
        name: sum(getattr(form, name) for form in forms) / len(forms)
        for name in ("warm", "answers", "repeats")
    }


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the marks that end them; quotation marks stay."""
    parts = re.split(r"[.!?…]+(?=[\s\"”')]|$)|[。！？]+|\n+", text)
    return [part.strip() for part in parts if re.search(r"\w", part)]


def without_courtesies(text: str) -> list[str]:
    """The sentences of a text that say more than a courtesy."""
    return [part for part in sentences(text) if not is_courtesy(part)]


def is_courtesy(sentence: str) -> bool:
    """Whether a sentence is a courtesy and nothing else."""
    plain = _plain(sentence)
    if _is_chinese(sentence):
        return any(pattern.fullmatch(plain) for pattern in CHINESE)
    if len(plain.split()) > _LONGEST_COURTESY:
        return False
    return any(pattern.fullmatch(plain) for pattern in ENGLISH)


def _is_chinese(text: str) -> bool:
    return bool(re.search(r"[\u4e00-\u9fff]", text))


def _plain(text: str) -> str:
    """Lower case, words and apostrophes only."""
    return " ".join(re.findall(r"[\w']+", text.lower().replace("’", "'"))).strip("' ")


def _says_enough(parts: Sequence[str]) -> bool:
    text = " ".join(parts)
    if _is_chinese(text):
        return len(re.findall(r"\w", text)) >= _LEAST_CHARACTERS
    return len(_plain(text).split()) >= _LEAST_WORDS


def _content(texts: Sequence[str]) -> set[str]:
    """Content words, ignoring plurals; for Chinese, pairs of adjacent characters."""
    text = " ".join(texts)
    found = {"".join(pair) for pair in re.findall(r"(?=([\u4e00-\u9fff])([\u4e00-\u9fff]))", text)}
    for word in _plain(re.sub(r"[\u4e00-\u9fff]", " ", text)).split():
        word = word.removesuffix("'s")
        if word not in STOP_WORDS:
            found.add(word[:-1] if len(word) > 3 and word.endswith("s") else word)
    return found
