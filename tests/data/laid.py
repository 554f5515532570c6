"""Rows of data, and what batches are to hold of them, worked out without the code under test."""

import numpy as np

from jaxalign.data import to_conversation
from jaxalign.data.sources import Row

WORDS = ["hello", "there", "you", "how", "are", "fine", "the", "lazy", "dog", "你好", "世界"]


def text(rng, least=1, most=25):
    return " ".join(rng.choice(WORDS, int(rng.integers(least, most))))


def talks(count=37, seed=1):
    """Rows of one to three turns, of uneven lengths, all different."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        turns = []
        for _ in range(int(rng.integers(1, 4))):
            turns.append({"role": "user", "content": f"{n} {text(rng)}"})
            turns.append({"role": "assistant", "content": text(rng)})
        rows.append({"messages": turns})
    return rows


def pairs(count=23, seed=2):
    """Preference rows of uneven lengths, all different, with a margin."""
    rng = np.random.default_rng(seed)
    return [
        {"prompt": f"{n} {text(rng)}", "chosen": text(rng), "rejected": text(rng), "margin": n}
        for n in range(count)
    ]


def documents(batch):
    """(ids, mask over targets) of each document, read position by position."""
    found = []
    for inputs, targets, positions, segments, mask in zip(*batch[:5], strict=True):
        for segment in range(1, segments.max() + 1):
            where = np.flatnonzero(segments == segment)
            assert (np.diff(where) == 1).all()
            assert positions[where].tolist() == list(range(len(where)))
            assert targets[where[:-1]].tolist() == inputs[where[1:]].tolist()
            assert not mask[where[-1]]
            found.append((tuple(inputs[where].tolist()), tuple(mask[where].tolist())))
        assert not mask[segments == 0].any()
    return found


def expected(tok, rows):
    """(ids, mask over targets) of each row under ChatML, put together piece by piece."""
    found = []
    for row in rows:
        ids, trained = [], []
        for message in to_conversation(Row(row, "x")).messages:
            header, said = f"<|im_start|>{message['role']}\n", message["content"]
            answer = message["role"] == "assistant"
            pieces = [(header, False), (said, True)] if answer else [(header + said, False)]
            for text, counts in [*pieces, ("<|im_end|>", answer), ("\n", False)]:
                tokens = tok.encode(text, add_special_tokens=False)
                ids += tokens
                trained += [counts] * len(tokens)
        # The newline after the last answer is left out: a row ends where a rollout would.
        ids, trained = ids[:-1], trained[:-1]
        assert ids[-1] == tok.convert_tokens_to_ids("<|im_end|>")
        found.append((tuple(ids), (*trained[1:], False)))
    return sorted(found)


def same(a, b):
    leaves = [(x, y) for x, y in zip(a, b, strict=True) if x is not None]
    return all(same(x, y) if isinstance(x, tuple) else np.array_equal(x, y) for x, y in leaves)
