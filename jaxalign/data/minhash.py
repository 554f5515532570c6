"""Near-duplicate texts: MinHash signatures, bands, and an exact check of the candidates.

The Jaccard similarity of two sets is the probability that a random hash has its minimum over both
at the same element (Broder 1997). A signature holds 128 such minima, split into bands. Texts that
agree in a whole band become candidates, and only a candidate whose sets really are that similar
counts. So there are no false positives. A near-duplicate is missed with probability (1 − s^r)^b for
similarity s and b bands of r minima: for a threshold of 0.8 (16 bands of 8) that is 0.05 at s = 0.8
and 0.006 at s = 0.85.
"""

from __future__ import annotations

import numpy as np

_MINIMA = 128
_SHINGLE = 5


class NearCopies:
    """Remembers texts and tells whether a new one is a near-duplicate of one of them.

    Args:
      threshold: the Jaccard similarity of character 5-grams (of the case-folded text with single
        spaces), in (0, 1], at or above which two texts are near-duplicates.
    """

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._band = _band_size(threshold)
        rng = np.random.default_rng(20240601)
        self._scale = rng.integers(0, 2**64, (_MINIMA, 1), np.uint64) | np.uint64(1)
        self._shift = rng.integers(0, 2**64, (_MINIMA, 1), np.uint64)
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(_MINIMA // self._band)]
        self._kept: list[np.ndarray] = []

    def add(self, text: str) -> bool:
        """Remembers a text unless it is a near-duplicate; returns whether it was remembered."""
        grams = shingles(text)
        minima = self._signature(grams)
        keys = [
            minima[at : at + self._band].tobytes()
            for at in range(0, len(self._bands) * self._band, self._band)
        ]
        candidates = {
            number
            for band, key in zip(self._bands, keys, strict=True)
            for number in band.get(key, ())
        }
        if any(jaccard(grams, self._kept[c]) >= self._threshold for c in candidates):
            return False
        for band, key in zip(self._bands, keys, strict=True):
            band.setdefault(key, []).append(len(self._kept))
        self._kept.append(grams)
        return True

    def _signature(self, grams: np.ndarray) -> np.ndarray:
        """uint32 `[128]`: the minimum of each hash over the shingles."""
        least = np.full(_MINIMA, np.iinfo(np.uint32).max, np.uint32)
        for at in range(0, len(grams), 4096):  # bounds the memory of long texts
            values = grams[None, at : at + 4096] * self._scale + self._shift
            np.minimum(least, (values >> np.uint64(32)).astype(np.uint32).min(axis=1), out=least)
        return least


def shingles(text: str) -> np.ndarray:
    """Hashes of the distinct character 5-grams of a text, uint64, sorted.

    A shorter text is one shingle.
    """
    points = np.frombuffer(" ".join(text.casefold().split()).encode("utf-32-le"), np.uint32)
    points = points.astype(np.uint64) + np.uint64(1)
    size = min(_SHINGLE, max(len(points), 1))
    count = max(len(points) - size + 1, 0)
    value = np.zeros(count, np.uint64)
    for at in range(size):  # a polynomial of the code points; arithmetic wraps at 2⁶⁴
        value = value * np.uint64(0x9E3779B97F4A7C15) + points[at : at + count]
    value ^= value >> np.uint64(29)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(32)
    return np.unique(value)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sets given as arrays of distinct values; 1 for two empty sets."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    either = len(a) + len(b) - both
    return both / either if either else 1.0


def _band_size(threshold: float) -> int:
    """The longest band that still finds a pair at the threshold 9 times in 10."""
    sizes = [r for r in range(1, _MINIMA + 1) if _MINIMA % r == 0]
    found = [r for r in sizes if 1 - (1 - threshold**r) ** (_MINIMA // r) >= 0.9]
    return max(found, default=1)
