"""Makes a rollout's batch of prompts and answers from texts."""

import chatmodel
import numpy as np

from jaxalign.algorithms.ppo import join_tokens
from jaxalign.sampling.generate import Generation
from jaxalign.types import PromptBatch

TOK = chatmodel.make_tokenizer()
"""One token a byte, after the special tokens."""


def answered(pairs, tok=TOK, width=40, room=40, index=None):
    """(tokens, prompts) with a row per (prompt, answer); an empty answer is a padding row."""
    count = len(pairs)
    tokens, mask = (np.zeros((count, room), kind) for kind in (np.int32, bool))
    prompts = PromptBatch(
        np.zeros((count, width), np.int32),
        np.zeros((count, width), bool),
        np.array([i if a else -1 for i, (_, a) in enumerate(pairs)], np.int32),
    )
    for row, (prompt, answer) in enumerate(pairs):
        ids = tok.encode(prompt)
        prompts.tokens[row, width - len(ids) :] = ids
        prompts.mask[row, width - len(ids) :] = True
        ids = tok.encode(answer)
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    if index is not None:
        prompts = prompts._replace(index=np.asarray(index, np.int32))
    finished = np.zeros(count, bool)
    return join_tokens(prompts, Generation(tokens, np.zeros(mask.shape), mask, finished)), prompts
