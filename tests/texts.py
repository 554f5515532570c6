"""Texts of six scripts, to compare tokenizers with."""

import random

SCRIPTS = {
    "latin": (0x41, 0x17F),
    "cyrillic": (0x400, 0x45F),
    "arabic": (0x620, 0x64A),
    "devanagari": (0x905, 0x94D),
    "han": (0x4E00, 0x4FFF),
    "hangul": (0xAC00, 0xADFF),
}
BETWEEN = (
    *(" ", "  ", "\n", "\t", "\r\n\n", "12", "3.5", "'s", "'LL", ", ", "…", "_", "👍🏽"),
    "\u0301",  # an accent on whatever stands before it
)


def strings(count, seed=0):
    """Texts of six scripts in turn, with digits, punctuation, blanks and marks in between."""
    drawn = random.Random(seed)
    made = []
    for number in range(count):
        first, last = list(SCRIPTS.values())[number % len(SCRIPTS)]
        parts = []
        for _ in range(drawn.randrange(1, 12)):
            size = drawn.randrange(1, 9)
            parts.append("".join(chr(drawn.randint(first, last)) for _ in range(size)))
            parts.append(drawn.choice(BETWEEN))
        made.append("".join(parts))
    return made
