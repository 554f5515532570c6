"""The decode loop: slots that write, a queue of prompts, and a cache in which both meet.

`slots` rows of the batch are written at a time. A slot whose answer has ended takes the next one
from the queue inside the running loop (Yu et al. 2022, Orca), so that ragged answers do not leave
slots idle. Prompts are read (prefilled) a group at a time, once for all their samples; a slot gets
a copy of its prompt's keys and values.

The cache of a slot is its prompt's P columns and a ring of R columns, R the longest answer. In a
step all slots write the same column of the ring, the step's number modulo R: an answer has at most
R tokens, so what a column loses belongs to an answer that has ended. One column for all is one
plain update in place, where a column a slot would be a scatter. Tokens and their log-probabilities
go to a ring of the same kind, from which an answer is taken whole when its slot is given away.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.attention.kv_cache import Cache, with_columns
from jaxalign.models.backend import backend
from jaxalign.models.decoder import Decoder
from jaxalign.sampling.draw import Sampling, choose
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
      row: int32 `[S]`, which answer the slot writes; N: none yet.
      count: int32 `[S]`, tokens written of it.
      begin: int32 `[S]`, the column of the rings where it begins.
      token_ring: int32 `[S, R]`, what the slots wrote, a column a step.
      logprob_ring: float32 `[S, R]`.
      tokens: int32 `[N, R]`, the answers that slots have given away.
      logprobs: float32 `[N, R]`.
      lengths: int32 `[N]`, their tokens.
      limits: int32 `[N]`, the most tokens each answer may have.
      next_row: int32 scalar, the first answer that no slot has taken.
      steps: int32 scalar, decode steps done.
    """

    cache: Cache
    hidden: jax.Array
    position: jax.Array
    live: jax.Array
    row: jax.Array
    count: jax.Array
    begin: jax.Array
    token_ring: jax.Array
    logprob_ring: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    limits: jax.Array
    next_row: jax.Array
    steps: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "cache_dtype"))
def read_prompts(
    model: Decoder, params: Params, tokens: Array, mask: Array, first: Array, cache_dtype: Any
) -> Prompts:
    """Reads a group of prompts, `[Q, P]`, padded on the left."""
    mask = jnp.asarray(mask, bool)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    segments = mask.astype(jnp.int32)
    hidden, cache = model.prefill(params, tokens, positions, segments, cache_dtype)
    lengths = jnp.sum(mask.astype(jnp.int32), axis=1)
    return Prompts(cache, hidden[:, -1], lengths, jnp.asarray(first))


@functools.partial(
    jax.jit,
    static_argnames=("model", "slots", "prompt_length", "max_new_tokens", "cache_dtype"),
)
def empty_slots(
    model: Decoder, pad_token: Array, limits: Array, *, slots: int, prompt_length: int,
    max_new_tokens: int, cache_dtype: Any,
) -> Slots:  # fmt: skip
    """Slots of which none is taken yet, for as many answers as there are limits."""
    zeros = jnp.zeros(slots, jnp.int32)
    answers = limits.shape[0]
    ring = (slots, max_new_tokens)
    return Slots(
        cache=model.init_cache(slots, prompt_length + max_new_tokens, cache_dtype),
        hidden=jnp.zeros((slots, model.config.hidden_size), model.compute_dtype),
        position=zeros,
        live=zeros.astype(bool),
        row=zeros + answers,
        count=zeros,
        begin=zeros,
        token_ring=jnp.zeros(ring, jnp.int32),
        logprob_ring=jnp.zeros(ring, jnp.float32),
        tokens=jnp.full((answers, max_new_tokens), pad_token, jnp.int32),
        logprobs=jnp.zeros((answers, max_new_tokens), jnp.float32),
        lengths=jnp.zeros(answers, jnp.int32),
        limits=jnp.asarray(limits, jnp.int32),
        next_row=jnp.zeros((), jnp.int32),
        steps=jnp.zeros((), jnp.int32),
    )


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
    if backend().decode_weights_by_layer:
        # Once a call, not once a token: on this platform a slice of the stacked weights is a copy.
        params = model.by_layer(params)

    def writing(slots: Slots) -> jax.Array:
        hungry = (slots.next_row >= end) & jnp.any(~slots.live) & ~last
        return jnp.any(slots.live) & ~hungry

    def fill(slots: Slots) -> Slots:
        return jax.lax.while_loop(
            lambda s: (s.next_row < end) & jnp.any(~s.live),
            functools.partial(_fill_one, prompts=prompts, sampling=sampling, samples=samples),
            slots,
        )

    # The whole state is returned so that the donated cache is updated where it lies.
    first = prompts.cache.segment_ids.shape[1]
    write = functools.partial(_write_one, model, params, key=key, sampling=sampling, first=first)
    if slots.row.shape[0] == slots.tokens.shape[0] == prompts.length.shape[0] * samples:
        # A slot for every answer: filled at once, where each device has its own rows. To copy them
        # one by one, all devices would gather all prompts' keys and values.
        ends = stages(slots.tokens.shape[1])
        slots = slots._replace(cache=with_columns(slots.cache, first + ends[0]))
        slots = _fill_all(slots, prompts, samples)
        for end in ends:
            slots = slots._replace(cache=with_columns(slots.cache, first + end))
            slots = jax.lax.while_loop(
                lambda s, end=end: writing(s) & (s.steps < end), write, slots
            )
    else:
        slots = jax.lax.while_loop(writing, lambda s: fill(write(s)), fill(slots))
    return _hand_in(slots, jnp.arange(slots.row.shape[0]), sampling.pad_token)


def _hand_in(slots: Slots, which: jax.Array, pad_token: Array) -> Slots:
    """Copies the answers of the slots `which`, `[n]`, from the rings to their rows."""
    longest = slots.tokens.shape[1]
    number = jnp.arange(longest)[None]
    column = (slots.begin[which, None] + number) % longest
    row, count = slots.row[which], slots.count[which]
    there = number < count[:, None]

    def unroll(ring: jax.Array, fill: Any) -> jax.Array:
        return jnp.where(there, jnp.take_along_axis(ring[which], column, axis=1), fill)

    # A slot that holds no answer yet has a row outside, which is dropped.
    return slots._replace(
        tokens=slots.tokens.at[row].set(unroll(slots.token_ring, pad_token), mode="drop"),
        logprobs=slots.logprobs.at[row].set(unroll(slots.logprob_ring, 0.0), mode="drop"),
        lengths=slots.lengths.at[row].set(count, mode="drop"),
    )


def _fill_all(slots: Slots, prompts: Prompts, samples: int) -> Slots:
    """Gives each of as many slots as there are answers its own."""

    def each(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, samples, axis=0)

    def copy(mine: jax.Array, theirs: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(mine, each(theirs).astype(mine.dtype), (0,) * mine.ndim)

    cache, answers = slots.cache, slots.row.shape[0]
    fresh = jnp.pad(prompts.cache.segment_ids, ((0, 0), (0, slots.tokens.shape[1])))
    return slots._replace(
        cache=Cache(
            keys=jax.tree.map(copy, cache.keys, prompts.cache.keys),
            values=jax.tree.map(copy, cache.values, prompts.cache.values),
            segment_ids=each(fresh),
            positions=copy(cache.positions, prompts.cache.positions),
            used=cache.used,
        ),
        hidden=each(prompts.hidden).astype(slots.hidden.dtype),
        position=each(prompts.length),
        live=each(prompts.length) > 0,
        row=jnp.arange(answers, dtype=slots.row.dtype),
        next_row=jnp.asarray(answers, slots.next_row.dtype),
    )


def _fill_one(slots: Slots, prompts: Prompts, sampling: Sampling, samples: int) -> Slots:
    """Gives the first free slot the next answer to write."""
    slot, row = jnp.argmin(slots.live), slots.next_row
    slots = _hand_in(slots, slot[None], sampling.pad_token)
    prompt = row // samples - prompts.first
    cache = slots.cache

    def copy(mine: jax.Array, theirs: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(theirs, prompt, 1)
        at = (slot,) + (0,) * (mine.ndim - 1)
        return jax.lax.dynamic_update_slice(mine, part.astype(mine.dtype), at)

    ring = slots.tokens.shape[1]
    fresh = jnp.pad(prompts.cache.segment_ids, ((0, 0), (0, ring)))
    length = prompts.length[prompt]
    return slots._replace(
        cache=Cache(
            keys=jax.tree.map(copy, cache.keys, prompts.cache.keys),
            values=jax.tree.map(copy, cache.values, prompts.cache.values),
            segment_ids=copy(cache.segment_ids, fresh),
            positions=copy(cache.positions, prompts.cache.positions),
            used=cache.used,
        ),
        hidden=copy(slots.hidden, prompts.hidden),
        position=slots.position.at[slot].set(length),
        live=slots.live.at[slot].set(length > 0),
        row=slots.row.at[slot].set(row),
        count=slots.count.at[slot].set(0),
        begin=slots.begin.at[slot].set(slots.steps % ring),
        next_row=row + 1,
    )


def stages(longest: int) -> list[int]:
    """The steps at which the cache of answers that all begin together gets more columns.

    An empty column costs as much to read as a full one. On a CPU one loop after another therefore
    has as many columns as it fills; between loops the cache is copied. On accelerators there is one
    loop, since the copy would need memory for a second cache (`Backend.decode_stages`).

    Args:
      longest: R, the longest answer.
    """
    platform = backend()
    stage = max(platform.decode_stage_columns, -(-longest // platform.decode_stages))
    if longest < 2 * stage:
        return [longest]
    return [*range(stage, longest, stage), longest]


def _write_one(
    model: Decoder, params: Params, slots: Slots, key: jax.Array, sampling: Sampling, first: int
) -> Slots:
    """One token in every live slot; the ring begins at the cache's column `first`."""
    longest = slots.tokens.shape[1]
    column = slots.steps % longest
    logits = model.logits(params, slots.hidden[:, None])[:, 0]
    of_row = jax.vmap(jax.random.fold_in, (None, 0))(key, slots.row)
    token, logprob = choose(jax.vmap(jax.random.fold_in)(of_row, slots.count), logits, sampling)
    stopped = jnp.any(token[:, None] == sampling.stop_tokens[None, :], axis=1)
    hidden, cache = model.extend(
        params,
        slots.cache._replace(used=first + column),
        token[:, None],
        slots.position[:, None],
        slots.live[:, None].astype(jnp.int32),
    )

    def put(ring: jax.Array, new: jax.Array) -> jax.Array:
        # An answer that has ended keeps what it wrote: its slot may wait for a whole round.
        old = jax.lax.dynamic_slice_in_dim(ring, column, 1, axis=1)
        new = jnp.where(slots.live[:, None], new[:, None], old)
        return jax.lax.dynamic_update_slice_in_dim(ring, new, column, axis=1)

    live = slots.live
    count = slots.count + live
    return slots._replace(
        cache=cache,
        hidden=hidden[:, 0],
        position=slots.position + live,
        live=live & ~stopped & (count < slots.limits[slots.row]),
        count=count,
        token_ring=put(slots.token_ring, token),
        logprob_ring=put(slots.logprob_ring, logprob),
        steps=slots.steps + 1,
    )
