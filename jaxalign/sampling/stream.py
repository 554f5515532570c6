"""Streams answers while they are sampled: the decode loop in chunks, and the text so far.

The chunks run the loop of `engine.decode` over the same cache, stage by stage, and token i uses the
same key. So streaming does not change the answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.attention.kv_cache import resize_cache
from jaxalign.models.backend import backend
from jaxalign.models.decoder import Decoder
from jaxalign.sampling.draw import Sampling
from jaxalign.sampling.engine import (
    Prompts,
    Slots,
    collect_answers,
    decode_step,
    fill_all,
    split_layers,
    stages,
)
from jaxalign.types import Array, Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 4
"""Tokens per chunk: enough to be worth starting a loop."""

Watch = Callable[[np.ndarray, np.ndarray], None]
"""(tokens `[N, R]`, number of tokens of each answer `[N]`) → None, called after every chunk, while
the next one is computed. An answer with as many tokens as at the last call has ended."""

_HALF = "\ufffd"  # a tokenizer's replacement for an incomplete character


def decode_watched(
    model: Decoder, params: Params, slots: Slots, prompts: Prompts, key: jax.Array,
    sampling: Sampling, *, samples: int, watch: Watch,
) -> Slots:  # fmt: skip
    """Like `engine.decode` with a slot for every answer, in chunks of `CHUNK` tokens.

    Args:
      model: the language model.
      params: its parameters.
      slots: donated; the returned state replaces it.
      prompts: the prompts of all answers.
      key: PRNG key.
      sampling: how tokens are sampled.
      samples: answers per prompt.
      watch: called with the tokens so far.
    """
    ends = stages(slots.tokens.shape[1])
    ring_start = prompts.cache.segment_ids.shape[1]
    if backend().decode_weights_by_layer:
        params = split_layers(model, params)
    slots = fill(slots, prompts, columns=ring_start + ends[0], samples=samples)
    done, live, written = 0, True, None
    for end in ends:
        if live:
            slots = widen(slots, columns=ring_start + end)
        while live and done < end:
            done = min(done + CHUNK, end)
            until = jnp.int32(done)
            slots = decode_until(model, params, slots, key, sampling, until, ring_start=ring_start)
            if written is not None:  # by the chunk before, while this one is computed
                watch(*written)
            # Copies: the next chunk is computed in the same memory.
            written = np.array(slots.token_ring), np.array(slots.count)
            live = bool(np.any(slots.live))
    if written is not None:
        watch(*written)
    return collect(slots, sampling.pad_token)


@functools.partial(jax.jit, static_argnames=("columns", "samples"))
def fill(slots: Slots, prompts: Prompts, *, columns: int, samples: int) -> Slots:
    """Fills all slots; the cache gets so many columns, enough for the first stage."""
    slots = slots._replace(cache=resize_cache(slots.cache, columns))
    return fill_all(slots, prompts, samples)


@functools.partial(jax.jit, static_argnames="columns")
def widen(slots: Slots, *, columns: int) -> Slots:
    """Gives the cache so many columns."""
    return slots._replace(cache=resize_cache(slots.cache, columns))


@functools.partial(jax.jit, static_argnames=("model", "ring_start"), donate_argnames="slots")
def decode_until(
    model: Decoder, params: Params, slots: Slots, key: jax.Array, sampling: Sampling,
    until: Array, *, ring_start: int,
) -> Slots:  # fmt: skip
    """Decodes until `until` steps are done, or every answer has ended."""
    write = functools.partial(
        decode_step, model, params, key=key, sampling=sampling, ring_start=ring_start
    )
    return jax.lax.while_loop(lambda s: jnp.any(s.live) & (s.steps < until), write, slots)


@jax.jit
def collect(slots: Slots, pad_token: Array) -> Slots:
    """Copies all answers out of the rings."""
    return collect_answers(slots, jnp.arange(slots.row.shape[0]), pad_token)


class TextPieces:
    """Turns the tokens of an answer into pieces of text as they arrive.

    A piece ends with a complete character; the bytes of an incomplete one wait for the rest. If the
    tokenizer cleans up spaces afterwards, a piece ends with a complete word.

    Args:
      tok: the tokenizer.
      on_text: called with each piece.
    """

    def __init__(self, tok: PreTrainedTokenizerBase, on_text: Callable[[str], None]):
        self._tok, self._on_text = tok, on_text
        self._tidies = bool(getattr(tok, "clean_up_tokenization_spaces", False))
        self._shown = ""

    def watch(self, tokens: np.ndarray, counts: np.ndarray) -> None:
        """A `Watch` for the first answer only."""
        text = self._decode(tokens[0][: counts[0]]).rstrip(_HALF)
        if self._tidies:
            text = text[: max(text.rfind(" "), text.rfind("\n"), 0)]
        self._show(text)

    def end(self, ids: np.ndarray) -> str:
        """Shows the rest of the answer and returns it whole."""
        text = self._decode(ids)
        if not text.startswith(self._shown):  # the tokenizer changed earlier text
            self._on_text("\n")
            self._shown = ""
        self._show(text)
        return text

    def _show(self, text: str) -> None:
        new = text[len(self._shown) :]
        if new and text.startswith(self._shown):
            self._on_text(new)
            self._shown = text

    def _decode(self, ids: np.ndarray) -> str:
        return str(self._tok.decode(ids, skip_special_tokens=True))
