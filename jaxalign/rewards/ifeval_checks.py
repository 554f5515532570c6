"""Checkers of the 25 instructions of IFEval.

Zhou et al. 2023, https://arxiv.org/abs/2311.07911, table 1, and the authors' published checker
define them. This implementation needs none of that checker's libraries. It differs as follows:

- A sentence ends at `.`, `!` or `?` before whitespace, unless a lower-case letter follows or the
  dot belongs to a common abbreviation, an initial or a list number. The original uses a trained
  splitter.
- A word in capitals is a run of letters and digits with inner hyphens, dots and slashes. The
  original uses a word tokenizer.
- Keywords are literal. The original treats them as regular expressions.
- English in capitals or in lower case means the right case, and that 9 in 10 letters are a to z.
  The original also uses a language detector.

A check takes the answer and the instruction's arguments by name, and returns whether the answer
follows the instruction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

Detect = Callable[[str], str]
"""Text → language code, e.g. `en`, `de`, `hi`."""

_ABBREVIATIONS = re.compile(
    r"mr|mrs|ms|dr|prof|st|jr|sr|rev|hon|gen|col|lt|vs|etc|e\.g|i\.e|a\.m|p\.m|no|fig|inc|ltd|co",
    re.IGNORECASE,
)
_ENDING = re.compile(r"[.!?]+[\"'”’)\]*_]*(?=\s|$)")
_CAPITAL_WORD = re.compile(r"\w+(?:[-./&]\w+)*")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def count_sentences(text: str) -> int:
    """Number of sentences; words after the last end mark count as one."""
    count = start = 0
    for end in _ENDING.finditer(text):
        before = text[start : end.start()].split()
        after = text[end.end() :].lstrip()
        if end.group()[0] == "." and len(end.group()) == 1:
            last = before[-1].lstrip("(\"'“‘*") if before else ""
            number = last.isdigit() and len(before) == 1
            initial = len(last) == 1 and last.isalpha() and last.isupper() and last != "I"
            short = _ABBREVIATIONS.fullmatch(last) is not None
            if after and (number or initial or short or after[0].islower()):
                continue
        elif after[:1].islower():
            continue
        if any(letter.isalnum() for letter in text[start : end.end()]):
            count, start = count + 1, end.end()
    return count + any(letter.isalnum() for letter in text[start:])


def _compare(count: int, relation: str, number: int) -> bool:
    if relation not in ("less than", "at least"):
        raise ValueError(f"relation {relation!r}: wanted 'less than' or 'at least'")
    return count < number if relation == "less than" else count >= number


def _times(part: str, text: str) -> int:
    return text.lower().count(part.lower())


# keywords


def _existence(text: str, keywords: Sequence[str]) -> bool:
    return all(_times(word, text) for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(_times(keyword, text), relation, frequency)


def _forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
        for word in forbidden_words
    )


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(_times(letter, text), let_relation, let_frequency)


# language


def _language(text: str, language: str, detect: Detect) -> bool:
    return detect(text) == language


# length constraints


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(count_sentences(text), relation, num_sentences)


def _words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs separated by `***`; only the first and the last may be empty."""
    parts = [part.strip() for part in text.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs separated by an empty line; the n-th begins with a given word."""
    parts = [part.strip() for part in text.split("\n\n")]
    if sum(map(bool, parts)) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    words = parts[nth_paragraph - 1].split()
    start = re.match(r"[^.,?!'\"]*", words[0].lstrip("'\"")) if words else None
    return start is not None and start.group().lower() == first_word.lower()


# detectable content


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    """The marker, in any case; P.S. and P.P.S. may have spaces between the letters."""
    letters = postscript_marker.lower().strip().rstrip(".").split(".")
    if letters in (["p", "s"], ["p", "p", "s"]):
        last = r"\." if len(letters) == 2 else ""
        return re.search(r"\.\s?".join(letters) + last, text.lower()) is not None
    return postscript_marker.lower().strip() in text.lower()


# detectable format


def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*[^*\n]|-).*$", text, re.MULTILINE)) == num_bullets


def _constrained(text: str) -> bool:
    return any(answer in text for answer in _ANSWERS)


def _highlights(text: str, num_highlights: int) -> bool:
    """Non-empty sections `*like this*` or `**like this**`."""
    single = re.findall(r"\*[^\n*]*\*", text)
    double = re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(part.strip("*").strip()) for part in single + double) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(re.escape(section_spliter) + r"\s?\d+", text)) >= num_sections


def _json(text: str) -> bool:
    bare = re.sub(r"\A\s*```(?:json)?|```\s*\Z", "", text, flags=re.IGNORECASE)
    try:
        json.loads(bare.strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(part.strip("<> \t") for part in re.findall(r"<<[^\n]+>>", text))


# combinations


def _two_responses(text: str) -> bool:
    """Two different answers separated by six asterisks."""
    parts = [part.strip() for part in text.split("******")]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


# start and end, case, punctuation


def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(word.isupper() for word in _CAPITAL_WORD.findall(text))
    return _compare(count, capital_relation, capital_frequency)


def _english(text: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    return sum(letter.isascii() for letter in letters) >= 0.9 * len(letters)


def _upper(text: str) -> bool:
    return text.isupper() and _english(text)


def _lower(text: str) -> bool:
    return text.islower() and _english(text)


def _no_comma(text: str) -> bool:
    return "," not in text


class Check(NamedTuple):
    """The check of an instruction.

    Attributes:
      follows: `(text, **arguments)` → whether the text follows the instruction.
      arguments: names of the arguments.
    """

    follows: Callable[..., bool]
    arguments: tuple[str, ...] = ()


CHECKS: dict[str, Check] = {
    "keywords:existence": Check(_existence, ("keywords",)),
    "keywords:frequency": Check(_frequency, ("keyword", "frequency", "relation")),
    "keywords:forbidden_words": Check(_forbidden, ("forbidden_words",)),
    "keywords:letter_frequency": Check(_letters, ("letter", "let_frequency", "let_relation")),
    "language:response_language": Check(_language, ("language",)),
    "length_constraints:number_sentences": Check(_sentences, ("num_sentences", "relation")),
    "length_constraints:number_paragraphs": Check(_paragraphs, ("num_paragraphs",)),
    "length_constraints:number_words": Check(_words, ("num_words", "relation")),
    "length_constraints:nth_paragraph_first_word": Check(
        _nth_paragraph, ("num_paragraphs", "nth_paragraph", "first_word")
    ),
    "detectable_content:number_placeholders": Check(_placeholders, ("num_placeholders",)),
    "detectable_content:postscript": Check(_postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": Check(_bullets, ("num_bullets",)),
    "detectable_format:constrained_response": Check(_constrained),
    "detectable_format:number_highlighted_sections": Check(_highlights, ("num_highlights",)),
    "detectable_format:multiple_sections": Check(_sections, ("section_spliter", "num_sections")),
    "detectable_format:json_format": Check(_json),
    "detectable_format:title": Check(_title),
    "combination:two_responses": Check(_two_responses),
    "combination:repeat_prompt": Check(_repeat, ("prompt_to_repeat",)),
    "startend:end_checker": Check(_end, ("end_phrase",)),
    "startend:quotation": Check(_quotation),
    "change_case:capital_word_frequency": Check(
        _capital_words, ("capital_frequency", "capital_relation")
    ),
    "change_case:english_capital": Check(_upper),
    "change_case:english_lowercase": Check(_lower),
    "punctuation:no_comma": Check(_no_comma),
}
"""Instruction id → its check."""

LANGUAGE = "language:response_language"
