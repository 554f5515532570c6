"""ROUGE-L between short texts, and a pool of texts that finds the most similar one exactly."""

from __future__ import annotations

import array
import re
from collections.abc import Sequence

import numpy as np

# Han, kana and their extensions are written without spaces: there every character is a word.
_CHARACTER = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CHARACTER}]|[^\W_{_CHARACTER}]+")


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters and digits, single Chinese characters.

    >>> words("Don't panic: 42 towels!")
    ['don', 't', 'panic', '42', 'towels']
    >>> words("写一首诗 now")
    ['写', '一', '首', '诗', 'now']
    """
    return _WORD.findall(text.lower())


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence.

    A whole column of the usual table is one integer, a bit a word of `a` (Hyyrö 2004, "Bit-parallel
    LCS-length computation revisited"), so that instructions take a few microseconds.

    >>> common_subsequence("ABCBDAB", "BDCABA")
    4
    """
    places: dict[str, int] = {}
    for at, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << at
    full = (1 << len(a)) - 1
    column = full
    for word in b:
        hits = column & places.get(word, 0)
        column = ((column + hits) | (column - hits)) & full
    return len(a) - column.bit_count()


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004): 2 · LCS / (|a| + |b|), the F-measure with β = 1; 0 if either is empty.

    >>> rouge_l("the cat sat".split(), "the cat is here".split())
    0.5714285714285714
    """
    if not a or not b:
        return 0.0
    return 2 * common_subsequence(a, b) / (len(a) + len(b))


class Pool:
    """Texts to which the greatest ROUGE-L of another one is found without comparing all.

    The words that two texts share, each as often as in both, bound their longest common
    subsequence. That number is counted for all texts at once; texts are then compared in falling
    order of the bound until it falls to the best score found.
    """

    def __init__(self) -> None:
        self._texts: list[list[str]] = []
        self._lengths = array.array("i")
        # (word, n) → the texts that hold the word n times or more.
        self._holders: dict[tuple[str, int], array.array[int]] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: Sequence[str]) -> None:
        """Adds the words of a text."""
        for key in _numbered(text):
            self._holders.setdefault(key, array.array("i")).append(len(self._texts))
        self._texts.append(list(text))
        self._lengths.append(len(text))

    def most_similar(self, text: Sequence[str]) -> tuple[float, int | None]:
        """The greatest ROUGE-L to a text of the pool, and its place; (0, None) if nothing is alike.

        Of equally similar ones the first.
        """
        lists = [self._holders[key] for key in _numbered(text) if key in self._holders]
        if not lists:
            return 0.0, None
        holders = np.concatenate([np.frombuffer(found, np.int32) for found in lists])
        shared = np.bincount(holders, minlength=len(self._texts))
        bounds = 2.0 * shared / (len(text) + np.frombuffer(self._lengths, np.int32))
        best, where = 0.0, None
        for place in np.argsort(-bounds, kind="stable").tolist():
            if bounds[place] < best or bounds[place] == 0:
                break
            score = rouge_l(text, self._texts[place])
            if score > best or (score == best and where is not None and place < where):
                best, where = score, place
        return best, where


def _numbered(text: Sequence[str]) -> list[tuple[str, int]]:
    """Each word with how often it has come so far: the n-th occurrence as a key of its own."""
    seen: dict[str, int] = {}
    keys = []
    for word in text:
        seen[word] = seen.get(word, 0) + 1
        keys.append((word, seen[word]))
    return keys
