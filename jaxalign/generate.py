"""Sampling: prefill, then one jitted decode loop over a donated key-value cache.

Temperature, top-k and top-p are traced: changing them compiles nothing. The loop stops early when
every row has produced a stop token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.attention import Cache
from jaxalign.models.decoder import Decoder
from jaxalign.sampling import Sampling, choose
from jaxalign.sharding import mesh_of, on_mesh, row_shards, shard_batch
from jaxalign.types import Array, Params, PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Generation(NamedTuple):
    """Sampled answers.

    Attributes:
      tokens: int32 `[B, R]`; the pad token after the stop token.
      logprobs: float32 `[B, R]`, log-probability of each token under the temperature-scaled
        distribution over the whole vocabulary; 0 on padding.
      mask: bool `[B, R]`, True up to and including the stop token.
      finished: bool `[B]`, whether a stop token was produced.
    """

    tokens: jax.Array
    logprobs: jax.Array
    mask: jax.Array
    finished: jax.Array


class _State(NamedTuple):
    cache: Cache
    hidden: jax.Array  # [B, D] of the last token read
    position: jax.Array  # [B] of the next token
    live: jax.Array  # [B] still writing
    tokens: jax.Array  # [B, R]
    logprobs: jax.Array  # [B, R]
    mask: jax.Array  # [B, R]
    count: jax.Array  # columns written


def sample(
    model: Decoder,
    params: Params,
    prompts: PromptBatch,
    key: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float | Array = 1.0,
    top_k: int | Array = 0,
    top_p: float | Array = 1.0,
    stop_tokens: Sequence[int] = (),
    pad_token: int = 0,
) -> Generation:
    """Samples an answer to every prompt.

    Args:
      model: the language model.
      params: its parameters, used where they lie; on a mesh the rows are split over it.
      prompts: padded on the left.
      key: PRNG key; the same key gives the same answers on any mesh.
      max_new_tokens: R, static.
      temperature: divides the logits; 0 means greedy.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
      stop_tokens: ids that end an answer.
      pad_token: id written after the end.

    Raises:
      ValueError: a value out of its range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: wanted a positive integer")
    for name, value, low, high in (
        ("temperature", temperature, 0.0, np.inf),
        ("top_k", top_k, 0, np.inf),
        ("top_p", top_p, 1e-6, 1.0),
    ):
        if not isinstance(value, jax.Array) and not low <= value <= high:
            raise ValueError(f"{name}={value}: wanted a value from {low} to {high}")
    mesh = mesh_of(params)
    if mesh is not None:
        prompts = shard_batch(prompts, mesh)
    sampling = Sampling(
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray(top_k, jnp.int32),
        jnp.asarray(top_p, jnp.float32),
        jnp.asarray(list(stop_tokens), jnp.int32),
        jnp.asarray(pad_token, jnp.int32),
    )
    with on_mesh(mesh):
        state = _prefill(model, params, prompts.tokens, prompts.mask, max_new_tokens, pad_token)
        state = _decode(model, params, state, key, sampling)
    finished = jnp.any(state.mask, axis=1) & ~state.live
    return Generation(state.tokens, state.logprobs, state.mask, finished)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def _prefill(
    model: Decoder, params: Params, tokens: Array, mask: Array, max_new_tokens: int, pad_token: Any
) -> _State:
    rows, length = tokens.shape
    mask = jnp.asarray(mask)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    cache = model.init_cache(rows, length + max_new_tokens)
    hidden, cache = model.extend(params, cache, tokens, positions, mask.astype(jnp.int32))
    return _State(
        cache=cache,
        hidden=hidden[:, -1],
        position=jnp.sum(mask, axis=1),
        live=jnp.any(mask, axis=1),
        tokens=jnp.full((rows, max_new_tokens), pad_token, jnp.int32),
        logprobs=jnp.zeros((rows, max_new_tokens), jnp.float32),
        mask=jnp.zeros((rows, max_new_tokens), bool),
        count=jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def _decode(
    model: Decoder, params: Params, state: _State, key: jax.Array, sampling: Sampling
) -> _State:
    def unfinished(state: _State) -> jax.Array:
        return (state.count < state.tokens.shape[1]) & jnp.any(state.live)

    def write_one(state: _State) -> _State:
        logits = model.logits(params, state.hidden[:, None])[:, 0]
        draw = jax.random.fold_in(key, state.count)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(draw, jnp.arange(logits.shape[0]))
        token, logprob = choose(keys, logits, sampling)
        token = jnp.where(state.live, token, sampling.pad_token)
        column = (0, state.count)
        hidden, cache = model.extend(
            params,
            state.cache,
            token[:, None],
            state.position[:, None],
            state.live[:, None].astype(jnp.int32),
        )
        stopped = jnp.any(token[:, None] == sampling.stop_tokens[None, :], axis=1)
        put = jax.lax.dynamic_update_slice
        return _State(
            cache=cache,
            hidden=hidden[:, 0],
            position=state.position + 1,
            live=state.live & ~stopped,
            tokens=put(state.tokens, token[:, None], column),
            logprobs=put(state.logprobs, jnp.where(state.live, logprob, 0.0)[:, None], column),
            mask=put(state.mask, state.live[:, None], column),
            count=state.count + 1,
        )

    # The whole state is returned so that the donated cache is updated where it lies.
    return jax.lax.while_loop(unfinished, write_one, state)


def generate(
    model: Decoder,
    params: Params,
    tok: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    chat_template: str | None = None,
    rows: int = 16,
) -> list[str]:
    """Answers prompts in text.

    Args:
      model: the language model.
      params: its parameters.
      tok: its tokenizer.
      prompts: what the user says, or whole conversations as lists of messages; rendered by the chat
        template.
      max_new_tokens: longest answer, tokens.
      temperature: 0 is greedy.
      top_k: 0 is off.
      top_p: 1 is off.
      key: PRNG key; `jax.random.key(0)` by default.
      chat_template: as in `sft_batches`; None is the tokenizer's own, "none" continues the text
        of the prompt as it stands.
      rows: prompts decoded at a time.

    Returns:
      One answer a prompt, special tokens removed.
    """
    from jaxalign.data.chat import encode_prompt, stop_token_ids
    from jaxalign.data.packing import prompt_rows

    if not prompts:
        return []
    encoded = [
        np.asarray(encode_prompt(tok, prompt, chat_template), np.int32) for prompt in prompts
    ]
    stops = stop_token_ids(tok, chat_template)
    key = jax.random.key(0) if key is None else key
    # One shape for all groups: the longest prompt, up to a multiple of 16.
    length = -(-max(map(len, encoded)) // 16) * 16
    rows = min(rows, len(encoded))
    mesh = mesh_of(params)
    if mesh is not None:
        rows = -(-rows // row_shards(mesh)) * row_shards(mesh)
    pad = tok.pad_token_id if isinstance(tok.pad_token_id, int) else 0
    answers: list[str] = []
    for start in range(0, len(encoded), rows):
        group = range(start, min(start + rows, len(encoded)))
        out = sample(
            model,
            params,
            prompt_rows(encoded, list(group), rows, length, pad),
            jax.random.fold_in(key, start),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stops,
            pad_token=pad,
        )
        tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
        answers += [
            str(tok.decode(tokens[row][mask[row]], skip_special_tokens=True))
            for row in range(len(group))
        ]
    return answers
