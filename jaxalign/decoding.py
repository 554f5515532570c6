"""The decode loop: slots that write, a queue of prompts, and a cache in which both meet.

`slots` rows of the batch are written at a time. A slot whose answer has ended takes the next one
from the queue inside the running loop (Yu et al. 2022, Orca), so that ragged answers do not leave
slots idle. Prompts are read (prefilled) a group at a time, once for all their samples; a slot gets
a copy of its prompt's keys and values.

The cache of a slot is its prompt's P columns and a ring of R columns, R the longest answer. In a
step all slots write the same column of the ring, the step's number modulo R: an answer has at most
R tokens, so what a column loses belongs to an answer that has ended. One column for all is one
plain update in place, where a column a slot would be a scatter.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.attention import Cache
from jaxalign.models.decoder import Decoder
from jaxalign.sampling import Sampling, choose
from jaxalign.sharding import constrain, divides, row_shards
from jaxalign.types import Array, Params


class Prompts(NamedTuple):
    """A group of prompts that have been read.

    Attributes:
      cache: their keys and values, P columns.
      hidden: `[Q, D]`, of each prompt's last token.
      length: int32 `[Q]`, tokens of each prompt; 0: an empty row, which gets no answer.
      first: int32 scalar, the number of the group's first prompt.
    """

    cache: Cache
    hidden: jax.Array
    length: jax.Array
    first: jax.Array


class Slots(NamedTuple):
    """The state of the decode loop. N answers are wanted, S slots write them.

    Attributes:
      cache: P + R columns a slot.
      hidden: `[S, D]`, of the last token read.
      position: int32 `[S]`, of the next token.
      live: bool `[S]`, still writing.
      row: int32 `[S]`, which answer the slot writes.
      count: int32 `[S]`, tokens written of it.
      tokens, logprobs, mask: `[N, R]`, the answers so far.
      next_row: int32 scalar, the first answer that no slot has taken.
      steps: int32 scalar, decode steps done.
    """

    cache: Cache
    hidden: jax.Array
    position: jax.Array
    live: jax.Array
    row: jax.Array
    count: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    mask: jax.Array
    next_row: jax.Array
    steps: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "cache_dtype"))
def read_prompts(
    model: Decoder, params: Params, tokens: Array, mask: Array, first: Array, cache_dtype: Any
) -> Prompts:
    """Reads a group of prompts, `[Q, P]`, padded on the left."""
    rows, length = tokens.shape
    mask = jnp.asarray(mask, bool)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    cache = model.init_cache(rows, length, cache_dtype)
    hidden, cache = model.extend(params, cache, tokens, positions, mask.astype(jnp.int32))
    lengths = jnp.sum(mask.astype(jnp.int32), axis=1)
    return Prompts(cache, hidden[:, -1], lengths, jnp.asarray(first))


@functools.partial(
    jax.jit,
    static_argnames=(
        "model", "slots", "answers", "prompt_length", "max_new_tokens", "cache_dtype",
    ),
)  # fmt: skip
def empty_slots(
    model: Decoder, pad_token: Array, *, slots: int, answers: int, prompt_length: int,
    max_new_tokens: int, cache_dtype: Any,
) -> Slots:  # fmt: skip
    """Slots of which none is taken yet."""
    zeros = jnp.zeros(slots, jnp.int32)
    cache = model.init_cache(slots, prompt_length + max_new_tokens, cache_dtype)
    return Slots(
        cache=cache._replace(keys=_spread(cache.keys), values=_spread(cache.values)),
        hidden=jnp.zeros((slots, model.config.hidden_size), model.compute_dtype),
        position=zeros,
        live=zeros.astype(bool),
        row=zeros,
        count=zeros,
        tokens=jnp.full((answers, max_new_tokens), pad_token, jnp.int32),
        logprobs=jnp.zeros((answers, max_new_tokens), jnp.float32),
        mask=jnp.zeros((answers, max_new_tokens), bool),
        next_row=jnp.zeros((), jnp.int32),
        steps=jnp.zeros((), jnp.int32),
    )


def _spread(x: jax.Array) -> jax.Array:
    """Splits an empty cache `[L, B, S, K, head_dim]` over the mesh: nothing else would say where it
    lies, and all of it would be made on one device."""
    if x.shape[1] % row_shards():
        return x
    heads = "kv_heads" if divides("kv_heads", x.shape[3]) else "hidden"
    return constrain(x, f"layers rows length {heads}")


@functools.partial(jax.jit, static_argnames=("model", "samples"), donate_argnames="slots")
def decode(
    model: Decoder, params: Params, slots: Slots, prompts: Prompts, key: jax.Array,
    sampling: Sampling, last: Array, *, samples: int,
) -> Slots:  # fmt: skip
    """Writes until the group's answers are all taken and a slot is free, or, at last, all done.

    Args:
      model: the language model.
      params: its parameters.
      slots: donated; the state that comes back takes its place.
      prompts: the group from which slots are filled.
      key: PRNG key; answer r draws its i-th token from it, r and i, whichever slot it is in.
      sampling: how tokens are chosen.
      last: bool scalar, whether this is the last group.
      samples: answers a prompt.
    """
    end = (prompts.first + prompts.length.shape[0]) * samples

    def writing(slots: Slots) -> jax.Array:
        hungry = (slots.next_row >= end) & jnp.any(~slots.live) & ~last
        return jnp.any(slots.live) & ~hungry

    def fill(slots: Slots) -> Slots:
        return jax.lax.while_loop(
            lambda s: (s.next_row < end) & jnp.any(~s.live),
            functools.partial(_fill_one, prompts=prompts, samples=samples),
            slots,
        )

    # The whole state is returned so that the donated cache is updated where it lies.
    return jax.lax.while_loop(
        writing, lambda s: fill(_write_one(model, params, s, key, sampling)), fill(slots)
    )


def _fill_one(slots: Slots, prompts: Prompts, samples: int) -> Slots:
    """Gives the first free slot the next answer to write."""
    slot, row = jnp.argmin(slots.live), slots.next_row
    prompt = row // samples - prompts.first
    cache = slots.cache

    def copy(mine: jax.Array, theirs: jax.Array, axis: int) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(theirs, prompt, 1, axis)
        at = tuple(slot if i == axis else 0 for i in range(mine.ndim))
        return jax.lax.dynamic_update_slice(mine, part.astype(mine.dtype), at)

    ring = slots.cache.segment_ids.shape[1] - prompts.cache.segment_ids.shape[1]
    fresh = jnp.pad(prompts.cache.segment_ids, ((0, 0), (0, ring)))
    length = prompts.length[prompt]
    return slots._replace(
        cache=Cache(
            keys=copy(cache.keys, prompts.cache.keys, 1),
            values=copy(cache.values, prompts.cache.values, 1),
            segment_ids=copy(cache.segment_ids, fresh, 0),
            positions=copy(cache.positions, prompts.cache.positions, 0),
            used=cache.used,
        ),
        hidden=copy(slots.hidden, prompts.hidden, 0),
        position=slots.position.at[slot].set(length),
        live=slots.live.at[slot].set(length > 0),
        row=slots.row.at[slot].set(row),
        count=slots.count.at[slot].set(0),
        next_row=row + 1,
    )


def _write_one(
    model: Decoder, params: Params, slots: Slots, key: jax.Array, sampling: Sampling
) -> Slots:
    """One token in every live slot."""
    answers, longest = slots.tokens.shape
    logits = model.logits(params, slots.hidden[:, None])[:, 0]
    of_row = jax.vmap(jax.random.fold_in, (None, 0))(key, slots.row)
    token, logprob = choose(jax.vmap(jax.random.fold_in)(of_row, slots.count), logits, sampling)
    token = jnp.where(slots.live, token, sampling.pad_token)
    stopped = jnp.any(token[:, None] == sampling.stop_tokens[None, :], axis=1)
    column = slots.cache.segment_ids.shape[1] - longest + slots.steps % longest
    hidden, cache = model.extend(
        params,
        slots.cache._replace(used=column),
        token[:, None],
        slots.position[:, None],
        slots.live[:, None].astype(jnp.int32),
    )
    # What a free slot "writes" falls outside and is dropped.
    place = jnp.where(slots.live, slots.row, answers), slots.count
    return slots._replace(
        cache=cache,
        hidden=hidden[:, 0],
        position=slots.position + 1,
        live=slots.live & ~stopped & (slots.count + 1 < longest),
        count=slots.count + 1,
        tokens=slots.tokens.at[place].set(token, mode="drop"),
        logprobs=slots.logprobs.at[place].set(logprob, mode="drop"),
        mask=slots.mask.at[place].set(True, mode="drop"),
        steps=slots.steps + 1,
    )
