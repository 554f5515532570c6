"""The decode loop: slots that generate, a queue of prompts, and their key-value cache.

`slots` answers are generated at a time. A slot whose answer has finished takes the next one from
the queue inside the running loop (Yu et al. 2022, Orca), so that answers of different lengths leave
no slot idle. Prompts are prefilled one group at a time, once for all their samples. A slot gets a
copy of its prompt's keys and values.

A slot's cache has P columns for its prompt, then a ring of R columns, where R is the longest
answer.

Invariant: an overwritten ring column always belongs to a finished answer. In each step all slots
write the same column, (step mod R), so a column is overwritten R steps after it was written. An
answer has at most R tokens, and a slot writes one each step: by then the answer has finished.

All slots share one column so that a step is one `dynamic_update_slice` in place. Separate columns
for each slot would need a scatter. Tokens and log-probabilities go to rings of the same kind, `[S,
R]`; an answer is copied out of them when its slot is reassigned.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.attention.kv_cache import Cache, resize_cache
from jaxalign.models.backend import backend
from jaxalign.models.decoder import Decoder
from jaxalign.sampling.draw import Sampling, answer_keys, sample_tokens
from jaxalign.types import Array, Params


class Prompts(NamedTuple):
    """A group of Q prefilled prompts.

    Attributes:
      cache: their keys and values, P columns.
      last_hidden: `[Q, D]`, hidden state of each prompt's last token.
      length: int32 `[Q]`, tokens of each prompt; 0: an empty row, which gets no answer.
      first: int32 scalar, the index of the group's first prompt.
    """

    cache: Cache
    last_hidden: jax.Array
    length: jax.Array
    first: jax.Array


class Slots(NamedTuple):
    """The state of the decode loop: S slots, N answers.

    Attributes:
      cache: P + R columns per slot.
      last_hidden: `[S, D]`, hidden state of the last token read.
      position: int32 `[S]`, the position of the next token.
      live: bool `[S]`, whether the slot's answer is unfinished.
      row: int32 `[S]`, the index of the answer in the slot; N: none yet.
      count: int32 `[S]`, the answer's tokens so far.
      start_column: int32 `[S]`, its first column in the rings.
      token_ring: int32 `[S, R]`, the slots' tokens, one column per step.
      logprob_ring: float32 `[S, R]`.
      tokens: int32 `[N, R]`, answers that have left their slots.
      logprobs: float32 `[N, R]`.
      lengths: int32 `[N]`, their tokens.
      limits: int32 `[N]`, the most tokens of each answer.
      experts: integers `[N, P + R, L, k]`, for answers that have left their slots, the experts that
        the tokens of prompt and answer took. None: not kept.
      next_row: int32 scalar, the first answer that no slot has taken.
      steps: int32 scalar, decode steps done.
    """

    cache: Cache
    last_hidden: jax.Array
    position: jax.Array
    live: jax.Array
    row: jax.Array
    count: jax.Array
    start_column: jax.Array
    token_ring: jax.Array
    logprob_ring: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    limits: jax.Array
    next_row: jax.Array
    steps: jax.Array
    experts: jax.Array | None = None


@functools.partial(jax.jit, static_argnames=("model", "cache_dtype", "keep_experts"))
def read_prompts(
    model: Decoder, params: Params, tokens: Array, mask: Array, first: Array, cache_dtype: Any,
    *, keep_experts: bool = False,
) -> Prompts:  # fmt: skip
    """Prefills a group of prompts `[Q, P]`, padded on the left."""
    mask = jnp.asarray(mask, bool)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    segments = mask.astype(jnp.int32)
    hidden, cache = model.prefill(
        params, tokens, positions, segments, cache_dtype, keep_experts=keep_experts
    )
    lengths = jnp.sum(mask.astype(jnp.int32), axis=1)
    return Prompts(cache, hidden[:, -1], lengths, jnp.asarray(first))


@functools.partial(
    jax.jit,
    static_argnames=(
        "model", "slots", "prompt_length", "max_new_tokens", "cache_dtype", "keep_experts",
    ),
)  # fmt: skip
def empty_slots(
    model: Decoder, pad_token: Array, limits: Array, *, slots: int, prompt_length: int,
    max_new_tokens: int, cache_dtype: Any, keep_experts: bool = False,
) -> Slots:  # fmt: skip
    """Empty slots, for as many answers as there are limits."""
    zeros = jnp.zeros(slots, jnp.int32)
    answers = limits.shape[0]
    ring, columns = (slots, max_new_tokens), prompt_length + max_new_tokens
    cache = model.init_cache(slots, columns, cache_dtype, keep_experts=keep_experts)
    experts = None
    if cache.experts is not None:
        shape = (answers, columns, len(cache.experts), cache.experts[0].shape[2])
        experts = jnp.zeros(shape, cache.experts[0].dtype)
    return Slots(
        cache=cache,
        last_hidden=jnp.zeros((slots, model.config.hidden_size), model.compute_dtype),
        position=zeros,
        live=zeros.astype(bool),
        row=zeros + answers,
        count=zeros,
        start_column=zeros,
        token_ring=jnp.zeros(ring, jnp.int32),
        logprob_ring=jnp.zeros(ring, jnp.float32),
        tokens=jnp.full((answers, max_new_tokens), pad_token, jnp.int32),
        logprobs=jnp.zeros((answers, max_new_tokens), jnp.float32),
        lengths=jnp.zeros(answers, jnp.int32),
        limits=jnp.asarray(limits, jnp.int32),
        next_row=jnp.zeros((), jnp.int32),
        steps=jnp.zeros((), jnp.int32),
        experts=experts,
    )


@functools.partial(jax.jit, static_argnames=("model", "samples"), donate_argnames="slots")
def decode(
    model: Decoder, params: Params, slots: Slots, prompts: Prompts, key: jax.Array,
    sampling: Sampling, last_group: Array, *, samples: int,
) -> Slots:  # fmt: skip
    """Generates until a slot is free and the group has no answer left for it.

    For the last group, it generates until every answer has finished.

    Args:
      model: the language model.
      params: its parameters.
      slots: donated; the returned state replaces it.
      prompts: the group from which slots are filled.
      key: PRNG key. Token i of answer r is sampled with `fold_in(fold_in(key, r), i)`, whichever
        slot the answer is in. Or the keys of all answers, `[N]`, in place of `fold_in(key, r)`.
      sampling: how tokens are sampled.
      last_group: bool scalar, whether this is the last group.
      samples: answers per prompt.
    """
    end = (prompts.first + prompts.length.shape[0]) * samples
    if backend().decode_weights_by_layer:
        # Once per call, not per token: on some platforms a slice of the stacked weights is a copy.
        params = model.by_layer(params)

    def generating(slots: Slots) -> jax.Array:
        needs_group = (slots.next_row >= end) & jnp.any(~slots.live) & ~last_group
        return jnp.any(slots.live) & ~needs_group

    def fill(slots: Slots) -> Slots:
        return jax.lax.while_loop(
            lambda s: (s.next_row < end) & jnp.any(~s.live),
            functools.partial(_fill_one, prompts=prompts, sampling=sampling, samples=samples),
            slots,
        )

    # The whole state is returned so that the donated cache is updated in place.
    ring_start = prompts.cache.segment_ids.shape[1]  # P
    write = functools.partial(
        decode_step, model, params, key=key, sampling=sampling, ring_start=ring_start
    )
    if slots.row.shape[0] == slots.tokens.shape[0] == prompts.length.shape[0] * samples:
        # With a slot for every answer, all slots are filled at once, and each device copies its own
        # rows. Filling them one by one would make every device gather all prompts' keys and values:
        # 32 GiB per device for 256 prompts of an 8B model.
        stage_ends = stages(slots.tokens.shape[1])
        slots = slots._replace(cache=resize_cache(slots.cache, ring_start + stage_ends[0]))
        slots = fill_all(slots, prompts, samples)
        for stage_end in stage_ends:
            slots = slots._replace(cache=resize_cache(slots.cache, ring_start + stage_end))
            slots = jax.lax.while_loop(
                lambda s, stage_end=stage_end: generating(s) & (s.steps < stage_end), write, slots
            )
    else:
        slots = jax.lax.while_loop(generating, lambda s: fill(write(s)), fill(slots))
    return collect_answers(slots, jnp.arange(slots.row.shape[0]), sampling.pad_token)


@functools.partial(jax.jit, static_argnames="model")
def split_layers(model: Decoder, params: Params) -> Params:
    """The parameters by layer, for loops that start more than once with them."""
    return model.by_layer(params)


def collect_answers(slots: Slots, which: jax.Array, pad_token: Array) -> Slots:
    """Copies the answers of slots `which`, int32 `[n]`, from the rings to their rows."""
    longest = slots.tokens.shape[1]  # R
    number = jnp.arange(longest)[None]  # [1, R]
    column = (slots.start_column[which, None] + number) % longest  # [n, R]
    row, count = slots.row[which], slots.count[which]  # [n]
    written = number < count[:, None]  # [n, R]

    def unroll(ring: jax.Array, fill: Any) -> jax.Array:
        found = jnp.where(written, jnp.take_along_axis(ring[which], column, axis=1), fill)
        # Without the barrier, libtpu 0.0.42 fuses this gather into the scatter below, and its
        # compiler aborts where rings have 128 columns.
        return jax.lax.optimization_barrier(found)

    experts = slots.experts
    if experts is not None and slots.cache.experts is not None:
        taken = jnp.stack([layer[which] for layer in slots.cache.experts], axis=2)
        prompt, ring = jnp.split(taken, [taken.shape[1] - longest], axis=1)  # [n, P + R, L, k]
        answer = jnp.take_along_axis(ring, column[..., None, None], axis=1)
        answer = jnp.where(written[..., None, None], answer, jnp.zeros((), answer.dtype))
        experts = experts.at[row].set(jnp.concatenate([prompt, answer], axis=1), mode="drop")
    # A slot without an answer yet has row N, which is out of range and dropped.
    return slots._replace(
        experts=experts,
        tokens=slots.tokens.at[row].set(unroll(slots.token_ring, pad_token), mode="drop"),
        logprobs=slots.logprobs.at[row].set(unroll(slots.logprob_ring, 0.0), mode="drop"),
        lengths=slots.lengths.at[row].set(count, mode="drop"),
    )


def repeat_prompts(prompts: Prompts, samples: int) -> Prompts:
    """Every prompt `samples` times, one copy for each of its answers."""

    def repeat(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, samples, axis=0)  # [Q, …] → [Q · samples, …]

    # `used`, the only scalar, is the same for all rows.
    cache = jax.tree.map(lambda x: repeat(x) if x.ndim else x, prompts.cache)
    return Prompts(cache, repeat(prompts.last_hidden), repeat(prompts.length), prompts.first)


def fill_all(slots: Slots, prompts: Prompts, samples: int) -> Slots:
    """Fills all slots if there is one for every answer: slot r takes answer r."""

    def repeat(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, samples, axis=0)  # [Q, …] → [Q · samples, …]

    def copy(into: jax.Array, prompt: jax.Array) -> jax.Array:
        new = repeat(prompt).astype(into.dtype)
        return jax.lax.dynamic_update_slice(into, new, (0,) * into.ndim)

    cache, answers = slots.cache, slots.row.shape[0]
    # Segment 0 marks ring columns as empty.
    segment_ids = jnp.pad(prompts.cache.segment_ids, ((0, 0), (0, slots.tokens.shape[1])))
    return slots._replace(
        cache=Cache(
            keys=jax.tree.map(copy, cache.keys, prompts.cache.keys),
            values=jax.tree.map(copy, cache.values, prompts.cache.values),
            segment_ids=repeat(segment_ids),
            positions=copy(cache.positions, prompts.cache.positions),
            used=cache.used,
            experts=jax.tree.map(copy, cache.experts, prompts.cache.experts),
        ),
        last_hidden=repeat(prompts.last_hidden).astype(slots.last_hidden.dtype),
        position=repeat(prompts.length),
        live=repeat(prompts.length) > 0,
        row=jnp.arange(answers, dtype=slots.row.dtype),
        next_row=jnp.asarray(answers, slots.next_row.dtype),
    )


def _fill_one(slots: Slots, prompts: Prompts, sampling: Sampling, samples: int) -> Slots:
    """Assigns the next answer to the first free slot."""
    slot, row = jnp.argmin(slots.live), slots.next_row
    slots = collect_answers(slots, slot[None], sampling.pad_token)
    prompt = row // samples - prompts.first
    cache = slots.cache

    def copy(into: jax.Array, prompts: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(prompts, prompt, 1)  # [1, …]
        at = (slot,) + (0,) * (into.ndim - 1)
        return jax.lax.dynamic_update_slice(into, part.astype(into.dtype), at)

    ring = slots.tokens.shape[1]  # R
    # The prompt's segments, and 0 for the ring: the last answer's columns are masked from here on.
    segment_ids = jnp.pad(prompts.cache.segment_ids, ((0, 0), (0, ring)))
    length = prompts.length[prompt]
    return slots._replace(
        cache=Cache(
            keys=jax.tree.map(copy, cache.keys, prompts.cache.keys),
            values=jax.tree.map(copy, cache.values, prompts.cache.values),
            segment_ids=copy(cache.segment_ids, segment_ids),
            positions=copy(cache.positions, prompts.cache.positions),
            used=cache.used,
            experts=jax.tree.map(copy, cache.experts, prompts.cache.experts),
        ),
        last_hidden=copy(slots.last_hidden, prompts.last_hidden),
        position=slots.position.at[slot].set(length),
        live=slots.live.at[slot].set(length > 0),
        row=slots.row.at[slot].set(row),
        count=slots.count.at[slot].set(0),
        start_column=slots.start_column.at[slot].set(slots.steps % ring),
        next_row=row + 1,
    )


def stages(longest: int) -> list[int]:
    """The steps at which the cache grows, if all answers begin together.

    An empty column costs as much to read as a full one. On a CPU there are therefore several loops,
    each with only the columns it fills; between loops the cache is copied. On accelerators there is
    one loop, since the copy would need memory for a second cache (`Backend.decode_stages`).

    Args:
      longest: R, the longest answer.
    """
    platform = backend()
    stage = max(platform.decode_stage_columns, -(-longest // platform.decode_stages))
    if longest < 2 * stage:
        return [longest]
    return [*range(stage, longest, stage), longest]


def decode_step(
    model: Decoder, params: Params, slots: Slots, key: jax.Array, sampling: Sampling,
    ring_start: int,
) -> Slots:  # fmt: skip
    """Generates a token in every live slot; the ring starts at the cache's column `ring_start`."""
    longest = slots.tokens.shape[1]  # R
    column = slots.steps % longest
    logits = model.logits(params, slots.last_hidden[:, None])[:, 0]  # [S, D] → [S, V]
    keys = jax.vmap(jax.random.fold_in)(answer_keys(key, slots.row), slots.count)  # [S]
    token, logprob = sample_tokens(keys, logits, sampling)  # [S]
    stopped = jnp.any(token[:, None] == sampling.stop_tokens[None, :], axis=1)
    hidden, cache = model.extend(
        params,
        slots.cache._replace(used=ring_start + column),
        token[:, None],
        slots.position[:, None],
        slots.live[:, None].astype(jnp.int32),
    )

    def put(ring: jax.Array, new: jax.Array) -> jax.Array:
        # A finished answer keeps its tokens: its slot may wait R steps or more for the next answer.
        old = jax.lax.dynamic_slice_in_dim(ring, column, 1, axis=1)
        new = jnp.where(slots.live[:, None], new[:, None], old)
        return jax.lax.dynamic_update_slice_in_dim(ring, new, column, axis=1)

    live = slots.live
    count = slots.count + live
    return slots._replace(
        cache=cache,
        last_hidden=hidden[:, 0],
        position=slots.position + live,
        live=live & ~stopped & (count < slots.limits[slots.row]),
        count=count,
        token_ring=put(slots.token_ring, token),
        logprob_ring=put(slots.logprob_ring, logprob),
        steps=slots.steps + 1,
    )
