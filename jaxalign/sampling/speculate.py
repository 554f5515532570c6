"""Speculative decoding with drafts from the text itself (prompt lookup).

If the last few tokens of a row occurred before, in its prompt or its answer, what followed them
there is a draft of what comes next. One step reads the pending token and k draft tokens together,
so the weights are read once for up to k + 1 new tokens (Leviathan et al. 2023,
https://arxiv.org/abs/2211.17192; drafts by lookup: Saxena 2023,
https://github.com/apoorvumang/prompt-lookup-decoding).

The answers are those of `engine.decode`, not only their distribution: token i of answer r is
sampled from its own logits with its own key, `fold_in(fold_in(key, r), i)`, and a draft token
counts only if it is the token sampled. That happens with the draft token's probability, the best
that any rule can do for a draft without a distribution. (Logits of k + 1 tokens at once may round
otherwise than those of one.)

A wrong draft costs arithmetic. A step therefore uses drafts only if, at the rate at which drafts
were accepted so far, it gives more tokens for its cost than a step without: see `_worthwhile`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.attention.kv_cache import Cache, resize_cache
from jaxalign.models.backend import backend
from jaxalign.models.decoder import Decoder
from jaxalign.sampling.draw import Sampling, answer_keys, sample_tokens
from jaxalign.sampling.engine import Prompts, repeat_prompts, split_layers, stages
from jaxalign.sampling.stream import CHUNK, Watch
from jaxalign.types import Array, Params

MATCHED = (3, 2)
"""How many last tokens are looked up; the first number that occurs before is used."""

OPTIMISM = 0.01
"""How far a step without drafts moves the expected rate towards "all accepted", so that drafts are
tried again later in a text that begins to repeat."""


class Answers(NamedTuple):
    """N answers in progress, each with cache columns of its own: P of the prompt, then its tokens.

    Attributes:
      cache: P + R + k columns; `used` is int32 `[N]`. The pending token is not in it yet.
      text: int32 `[N, P + R + k + 1]`, prompts, padded on the left, and answers.
      logprobs: float32 `[N, R + k + 1]`.
      position: int32 `[N]`, tokens of each prompt.
      count: int32 `[N]`, tokens of each answer, the pending one included.
      live: bool `[N]`, whether it is unfinished.
      limits: int32 `[N]`, its most tokens.
      rate: float32 scalar, draft tokens that a row with a draft is expected to accept.
      steps: int32 scalar, decode steps done.
    """

    cache: Cache
    text: jax.Array
    logprobs: jax.Array
    position: jax.Array
    count: jax.Array
    live: jax.Array
    limits: jax.Array
    rate: jax.Array
    steps: jax.Array


def decode_speculative(
    model: Decoder, params: Params, prompts: Prompts, tokens: Array, limits: Array, key: jax.Array,
    sampling: Sampling, *, samples: int, max_new_tokens: int, speculate: int,
    watch: Watch | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Generates all answers to a group of prompts.

    Args:
      model: the language model.
      params: its parameters.
      prompts: the Q prompts, prefilled.
      tokens: int `[Q, P]`, their tokens.
      limits: int `[N]`, the most tokens of each answer, for N = Q · samples.
      key: PRNG key.
      sampling: how tokens are sampled.
      samples: answers per prompt.
      max_new_tokens: R, the longest answer.
      speculate: k, the draft tokens of a step.
      watch: called every `CHUNK` steps with the tokens so far.

    Returns:
      Tokens int32 `[N, R]`, their log-probabilities float32 `[N, R]`, lengths int32 `[N]`, and the
      number of decode steps.
    """
    if backend().decode_weights_by_layer:
        params = split_layers(model, params)
    prompt_length = tokens.shape[1]
    answers = begin(
        model, params, prompts, tokens, limits, key, sampling,
        samples=samples, longest=max_new_tokens, speculate=speculate,
    )  # fmt: skip
    for stage_end in stages(max_new_tokens):
        answers = widen(answers, columns=prompt_length + stage_end + speculate)
        going = True
        while going:
            until = np.int32(np.iinfo(np.int32).max if watch is None else answers.steps + CHUNK)
            answers, more = advance_until(
                model, params, answers, key, sampling, until,
                prompt_length=prompt_length, stage_end=stage_end, speculate=speculate,
            )  # fmt: skip
            going = watch is not None and bool(more)
            if watch is not None:
                written = np.asarray(answers.text[:, prompt_length:][:, :max_new_tokens])
                watch(written, np.asarray(answers.count))
    return _finish(answers, sampling.pad_token, prompt_length, max_new_tokens)


@functools.partial(jax.jit, static_argnames=("model", "samples", "longest", "speculate"))
def begin(
    model: Decoder, params: Params, prompts: Prompts, tokens: Array, limits: Array,
    key: jax.Array, sampling: Sampling, *, samples: int, longest: int, speculate: int,
) -> Answers:  # fmt: skip
    """Copies each prompt for its answers, and samples their first tokens."""
    prompts = repeat_prompts(prompts, samples)
    rows = prompts.length.shape[0]  # N
    zeros = jnp.zeros(rows, jnp.int32)
    text = jnp.repeat(jnp.asarray(tokens, jnp.int32), samples, axis=0)
    answers = Answers(
        cache=prompts.cache._replace(used=zeros),
        text=jnp.pad(text, ((0, 0), (0, longest + speculate + 1))),
        logprobs=jnp.zeros((rows, longest + speculate + 1), jnp.float32),
        position=prompts.length,
        count=zeros,
        live=prompts.length > 0,
        limits=jnp.asarray(limits, jnp.int32),
        rate=jnp.float32(speculate),
        steps=jnp.int32(0),
    )
    drafts = jnp.zeros((rows, 0), jnp.int32)
    hidden = prompts.last_hidden[:, None]  # [N, 1, D]
    return _take(model, params, answers, hidden, drafts, key, sampling, tokens.shape[1])[0]


@functools.partial(jax.jit, static_argnames="columns")
def widen(answers: Answers, *, columns: int) -> Answers:
    """The answers with a cache of so many columns."""
    return answers._replace(cache=resize_cache(answers.cache, columns))


@functools.partial(
    jax.jit,
    static_argnames=("model", "prompt_length", "stage_end", "speculate"),
    donate_argnames="answers",
)
def advance_until(
    model: Decoder, params: Params, answers: Answers, key: jax.Array, sampling: Sampling,
    until: Array, *, prompt_length: int, stage_end: int, speculate: int,
) -> tuple[Answers, jax.Array]:  # fmt: skip
    """Steps until `until` of them are done, the stage's columns are full or all answers finished.

    Returns:
      The answers, and whether only `until` ended the loop.
    """
    # A row of `count` tokens writes k + 1 columns from P + count − 1 on.
    step = functools.partial(
        _step, model, params, key=key, sampling=sampling, prompt_length=prompt_length,
        speculate=speculate,
    )  # fmt: skip

    def more(a: Answers) -> jax.Array:
        return jnp.any(a.live) & (jnp.max(jnp.where(a.live, a.count, 0)) <= stage_end)

    answers = jax.lax.while_loop(lambda a: more(a) & (a.steps < until), step, answers)
    return answers, more(answers)


def _step(
    model: Decoder, params: Params, answers: Answers, *, key: jax.Array, sampling: Sampling,
    prompt_length: int, speculate: int,
) -> Answers:  # fmt: skip
    """One pass over the weights, with drafts or without."""
    drafts, found = look_up(
        answers.text, prompt_length - answers.position, prompt_length + answers.count, speculate
    )
    found &= answers.live

    def read(answers: Answers, drafts: jax.Array) -> tuple[Answers, jax.Array]:
        at = prompt_length + answers.count - 1  # [N], where the pending token is written
        pending = jnp.take_along_axis(answers.text, at[:, None], axis=1)
        inputs = jnp.concatenate([pending, drafts], axis=1)  # [N, T]
        new = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
        hidden, cache = model.extend(
            params,
            answers.cache._replace(used=at),
            inputs,
            (answers.position + answers.count - 1)[:, None] + new,
            jnp.broadcast_to(answers.live[:, None], inputs.shape).astype(jnp.int32),
        )
        answers = answers._replace(cache=cache)
        return _take(model, params, answers, hidden, drafts, key, sampling, prompt_length)

    def with_drafts(answers: Answers) -> Answers:
        answers, accepted = read(answers, drafts)
        mean = jnp.sum(jnp.where(found, accepted, 0)) / jnp.maximum(jnp.sum(found), 1)
        return answers._replace(rate=0.9 * answers.rate + 0.1 * mean)

    def without(answers: Answers) -> Answers:
        answers, _ = read(answers, drafts[:, :0])
        more = answers.rate + OPTIMISM * (speculate - answers.rate)
        return answers._replace(rate=jnp.where(jnp.any(found), more, answers.rate))

    use = _worthwhile(answers.live, found, answers.rate, speculate)
    answers = jax.lax.cond(use, with_drafts, without, answers)
    return answers._replace(steps=answers.steps + 1)


def _worthwhile(live: jax.Array, found: jax.Array, rate: jax.Array, speculate: int) -> jax.Array:
    """Whether a step with drafts gives more tokens for its cost.

    A step of n tokens costs n₀ + n in units of a token's arithmetic, where n₀ is what reading the
    weights costs (`Backend.decode_free_tokens`). L live rows, of which F have a draft, give L
    tokens without drafts and L + F · rate with them.
    """
    rows, free = live.shape[0], backend().decode_free_tokens
    cost = (free + rows * (speculate + 1)) / (free + rows)
    count = jnp.sum(live)
    return jnp.any(found) & (count + jnp.sum(found) * rate > cost * count)


def look_up(
    text: jax.Array, begin: jax.Array, end: jax.Array, speculate: int
) -> tuple[jax.Array, jax.Array]:
    """Drafts k tokens of each row from the last place where its newest tokens occurred before.

    If fewer than k tokens follow that place, they are repeated: a row that ends in a loop is
    drafted as going on in it.

    Args:
      text: int32 `[N, W]`.
      begin: int32 `[N]`, the first column of each row's text.
      end: int32 `[N]`, the column after its last token.
      speculate: k.

    Returns:
      Drafts int32 `[N, k]`, and bool `[N]`, whether anything was found.
    """
    column = jnp.arange(text.shape[1], dtype=jnp.int32)[None]  # [1, W]
    source = jnp.zeros_like(end) - 1  # [N], the column after the match; −1: none yet
    for size in MATCHED:
        newest = end[:, None] - size + jnp.arange(size, dtype=jnp.int32)[None]  # [N, size]
        newest = jnp.take_along_axis(text, newest, axis=1, mode="clip")
        match = (column >= begin[:, None]) & (column + size < end[:, None])  # [N, W]
        for i in range(size):
            match &= jnp.roll(text, -i, axis=1) == newest[:, i : i + 1]
        last = jnp.max(jnp.where(match, column + size, -1), axis=1)
        source = jnp.where(source < 0, last, source)
    found = source >= 0
    period = jnp.maximum(end - source, 1)[:, None]
    ahead = jnp.arange(speculate, dtype=jnp.int32)[None] % period  # [N, k]
    return jnp.take_along_axis(text, source[:, None] + ahead, axis=1, mode="clip"), found


def _take(
    model: Decoder, params: Params, answers: Answers, hidden: jax.Array, drafts: jax.Array,
    key: jax.Array, sampling: Sampling, prompt_length: int,
) -> tuple[Answers, jax.Array]:  # fmt: skip
    """Samples T tokens of every row, and keeps them up to the first that differs from its draft.

    Args:
      model: the language model.
      params: its parameters.
      answers: the answers so far.
      hidden: `[N, T, D]`, hidden states of the pending token and of T − 1 draft tokens.
      drafts: int32 `[N, T − 1]`.
      key: PRNG key.
      sampling: how tokens are sampled.
      prompt_length: P.

    Returns:
      The answers, and int32 `[N]`, how many draft tokens each row accepted.
    """
    rows, new, _ = hidden.shape
    number = answers.count[:, None] + jnp.arange(new, dtype=jnp.int32)[None]  # [N, T]
    row_keys = answer_keys(key, jnp.arange(rows))  # [N]
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(row_keys, number)  # [N, T]
    logits = model.logits(params, hidden)  # [N, T, V]
    sampled, logprobs = sample_tokens(keys.reshape(-1), logits.reshape(rows * new, -1), sampling)
    sampled, logprobs = sampled.reshape(rows, new), logprobs.reshape(rows, new)
    # Token j is right if all drafts before it were: its logits then belong to the answer's text.
    agree = jnp.cumprod((sampled[:, :-1] == drafts).astype(jnp.int32), axis=1)  # [N, T − 1]
    accepted = jnp.sum(agree, axis=1)  # [N]
    stops = jnp.any(sampled[..., None] == sampling.stop_tokens[None, None], axis=-1)  # [N, T]
    before_stop = jnp.cumprod(1 - stops.astype(jnp.int32), axis=1)
    until_stop = jnp.sum(before_stop, axis=1) + 1  # [N]; T + 1: no stop token
    kept = jnp.minimum(jnp.minimum(accepted + 1, until_stop), answers.limits - answers.count)
    kept = jnp.where(answers.live, kept, 0)
    count = answers.count + kept
    last = jnp.take_along_axis(stops, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
    # What is written beyond `kept` is overwritten by the next step or cut off at the end.
    return answers._replace(
        text=_write(answers.text, sampled, prompt_length + answers.count),
        logprobs=_write(answers.logprobs, logprobs, answers.count),
        count=count,
        live=answers.live & ~last & (count < answers.limits),
    ), accepted


def _write(into: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """Writes `[N, T]` into `[N, W]`, from column `at` `[N]` of each row on."""
    return jax.vmap(lambda row, part, i: jax.lax.dynamic_update_slice(row, part, (i,)))(
        into, new, at
    )


@functools.partial(jax.jit, static_argnames=("prompt_length", "longest"))
def _finish(
    answers: Answers, pad_token: Array, prompt_length: int, longest: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    written = jnp.arange(longest)[None] < answers.count[:, None]  # [N, R]
    tokens = jnp.where(written, answers.text[:, prompt_length:][:, :longest], pad_token)
    logprobs = jnp.where(written, answers.logprobs[:, :longest], 0.0)
    return tokens, logprobs, answers.count, answers.steps
