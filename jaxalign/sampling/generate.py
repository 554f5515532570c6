"""Answers to prompts: `sample` on arrays, `generate` on text.

Prompts are prefilled; then one jitted decode loop runs over a donated key-value cache, until every
row has a stop token. Temperature, top-k and top-p are traced: changing them does not recompile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.models.decoder import Decoder
from jaxalign.parallel.rules import Rules, use_rules
from jaxalign.parallel.sharding import (
    mesh_of,
    reshard,
    reshard_by_rules,
    row_shards,
    rows_sharding,
    shard_batch,
    use_mesh,
)
from jaxalign.sampling.draw import Sampling
from jaxalign.sampling.engine import decode, empty_slots, read_prompts
from jaxalign.sampling.speculate import decode_speculative
from jaxalign.sampling.stream import TextPieces, Watch, decode_watched
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
      steps: int32 scalar, decode steps; None for answers from another sampler.
      experts: integers `[B, P + R, L, k]`, the experts that each token of prompt and answer took in
        each layer; None: not kept.
    """

    tokens: jax.Array
    logprobs: jax.Array
    mask: jax.Array
    finished: jax.Array
    steps: jax.Array | None = None
    experts: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The static options of sampling: each new value compiles another program.

    Attributes:
      max_new_tokens: R, the longest answer.
      samples: answers to each prompt.
      slots: answers generated at a time.
      cache_dtype: dtype of keys and values.
      keep_experts: whether the experts that tokens take are kept.
      speculate: draft tokens of a step; 0: no drafts.
    """

    max_new_tokens: int
    samples: int
    slots: int
    cache_dtype: str
    keep_experts: bool = False
    speculate: int = 0


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
    samples: int = 1,
    slots: int | None = None,
    cache_dtype: Any = None,
    lengths: Array | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    watch: Watch | None = None,
    keep_experts: bool = False,
    speculate: int = 0,
) -> Generation:
    """Samples answers to every prompt.

    Args:
      model: the language model.
      params: its parameters; the rows are split over their mesh.
      prompts: padded on the left.
      key: PRNG key; the same key gives the same answers on any mesh. Answer r uses `fold_in(key,
        r)`; or pass the keys of all answers, `[B·samples]`.
      max_new_tokens: R, static.
      temperature: divides the logits; 0 means greedy.
      top_k: only the k most likely tokens; 0: all.
      top_p: only the smallest set of tokens with at least this probability; 1: all.
      stop_tokens: ids that end an answer.
      pad_token: id written after the end.
      samples: answers per prompt; the answers to prompt b are rows b·samples, b·samples + 1, … Each
        prompt is prefilled once for all its answers.
      slots: answers generated at a time; a finished one makes room for the next. None: all. Fewer
        slots need a smaller cache, and short answers waste no steps. Results do not depend on
        `slots`.
      cache_dtype: dtype of keys and values, e.g. "bfloat16"; None: the model's compute dtype.
      lengths: int `[B·samples]`, the most tokens of each answer, 1 to `max_new_tokens`; None:
        `max_new_tokens` for all.
      mesh: where to generate; the parameters are resharded to it, and the answers return to the
        parameters' mesh. Weights that are sharded for training (fsdp) are all-gathered for every
        token; replicated weights and weights sharded over `tensor` are not. None: the parameters'
        mesh.
      rules: sharding rules (`jaxalign.parallel.rules`) that apply while generating. Parameters are
        resharded by them; activations and the cache (`cache_rows`, `cache_heads`, `cache_length`)
        follow them. None: the current rules.
      watch: called every few steps with the tokens so far; it does not change the answers. It
        requires a slot for every answer. None: no call.
      keep_experts: also return the experts that tokens take; for mixtures of experts only.
      speculate: up to this many tokens of a step are drafted by looking up the newest tokens in
        the prompt and the answer so far (`jaxalign.sampling.speculate`). The answers stay the same;
        text that repeats takes fewer steps. It requires a slot for every answer. 0: no drafts.

    Raises:
      ValueError: a value out of its range, or `keep_experts` for a model without experts.
    """
    expect_decoder(model, "sample")
    for name, value in (("max_new_tokens", max_new_tokens), ("samples", samples), ("slots", slots)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: wanted a positive integer")
    if watch is not None and slots is not None:
        raise ValueError(f"slots={slots} with watch: wanted None, a slot for every answer")
    if watch is not None and keep_experts:
        raise ValueError("keep_experts=True with watch: wanted one of them")
    if speculate and (slots is not None or keep_experts or speculate < 0):
        raise ValueError(
            f"speculate={speculate} with slots={slots} and keep_experts={keep_experts}: wanted a "
            "positive integer, slots=None (a slot for every answer) and keep_experts=False"
        )
    if keep_experts and not model.config.num_experts:
        raise ValueError("keep_experts=True: the model is no mixture of experts; leave it out")
    sampling = _sampling(temperature, top_k, top_p, stop_tokens, pad_token)
    answers = prompts.tokens.shape[0] * samples
    limits = _limits(lengths, answers, max_new_tokens)
    options = EngineOptions(
        max_new_tokens=max_new_tokens,
        samples=samples,
        slots=answers if slots is None else min(slots, answers),
        cache_dtype=jnp.dtype(model.compute_dtype if cache_dtype is None else cache_dtype).name,
        keep_experts=keep_experts,
        speculate=speculate,
    )
    home = mesh_of(params)
    with use_rules(rules):
        if mesh is not None and mesh != home:
            params = reshard(params, model.axes, mesh)
        else:
            mesh, params = home, reshard_by_rules(params, model.axes, rules)
        generation = _run(model, params, prompts, key, sampling, limits, options, mesh, watch)
    steps = generation.steps
    if home is not None:
        generation = shard_batch(generation._replace(steps=None), home)
    return generation._replace(steps=steps)


_RANGES = {
    "temperature": (0.0, np.inf),
    "top_k": (0, np.inf),
    "top_p": (1e-6, 1.0),
    "max_new_tokens": (1, np.inf),
}


def check_sampling(**options: float | Array) -> None:
    """Checks the ranges of sampling options; arrays, which may be traced, pass.

    Args:
      **options: any of `temperature`, `top_k`, `top_p`, `max_new_tokens`.

    Raises:
      ValueError: a value out of its range.
    """
    for name, value in options.items():
        low, high = _RANGES.get(name, (-np.inf, np.inf))
        if not isinstance(value, jax.Array) and not low <= value <= high:
            raise ValueError(f"{name}={value}: wanted a value from {low} to {high}")


def _sampling(
    temperature: float | Array, top_k: int | Array, top_p: float | Array,
    stop_tokens: Sequence[int], pad_token: int,
) -> Sampling:  # fmt: skip
    """Checks the options and makes them arrays, so that new values do not recompile."""
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    return Sampling(
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray(top_k, jnp.int32),
        jnp.asarray(top_p, jnp.float32),
        jnp.asarray(list(stop_tokens), jnp.int32),
        jnp.asarray(pad_token, jnp.int32),
    )


def _run(
    model: Decoder, params: Params, prompts: PromptBatch, key: jax.Array, sampling: Sampling,
    limits: np.ndarray, options: EngineOptions, mesh: Mesh | None, watch: Watch | None,
) -> Generation:  # fmt: skip
    """Prefills group by group and decodes; `limits` `[N]`, the most tokens of each answer."""
    filled = _filled(prompts, options)
    if mesh is not None:
        prompts = shard_batch(prompts, mesh)
    count, slots, samples = prompts.tokens.shape[0], options.slots, options.samples
    # Prefill together as many prompts as the slots can take.
    group = min(count, slots)
    if mesh is not None and (slots % row_shards(mesh) or group % row_shards(mesh)):
        raise ValueError(
            f"slots={slots} and {group} prompts at a time do not divide over the mesh's "
            f"{row_shards(mesh)} shards of rows; use a multiple"
        )
    dtype = options.cache_dtype
    if options.speculate:
        with use_mesh(mesh):
            prefilled = read_prompts(model, params, *prompts[:2], jnp.int32(0), dtype)
            tokens, logprobs, ends, steps = decode_speculative(
                model, params, prefilled, prompts.tokens, limits, key, sampling, samples=samples,
                max_new_tokens=options.max_new_tokens, speculate=options.speculate, watch=watch,
            )  # fmt: skip
            mask, finished = _ends(tokens, ends, sampling.stop_tokens)
        return Generation(tokens, logprobs, mask, finished, steps)
    with use_mesh(mesh):
        state = empty_slots(
            model,
            sampling.pad_token,
            limits,
            slots=slots,
            prompt_length=prompts.tokens.shape[1],
            max_new_tokens=options.max_new_tokens,
            cache_dtype=dtype,
            keep_experts=options.keep_experts,
        )
        for first in range(0, filled, group):
            # The last group starts earlier instead of being shorter, so that all groups have one
            # shape.
            start = min(first, count - group)
            tokens, mask = (jnp.asarray(x)[start : start + group] for x in prompts[:2])
            prefilled = read_prompts(
                model, params, tokens, mask, jnp.int32(start), dtype,
                keep_experts=options.keep_experts,
            )  # fmt: skip
            if watch is not None:
                state = decode_watched(
                    model, params, state, prefilled, key, sampling, samples=samples, watch=watch
                )
                continue
            last_group = jnp.asarray(first + group >= filled)
            state = decode(
                model, params, state, prefilled, key, sampling, last_group, samples=samples
            )
        mask, finished = _ends(state.tokens, state.lengths, sampling.stop_tokens)
    return Generation(state.tokens, state.logprobs, mask, finished, state.steps, state.experts)


def _filled(prompts: PromptBatch, options: EngineOptions) -> int:
    """The number of rows up to the last prompt of a queue: empty rows after it are not prefilled.

    All rows where there is no queue, or where the prompts are on devices already.
    """
    count = prompts.tokens.shape[0]
    if options.slots >= count * options.samples or not isinstance(prompts.mask, np.ndarray):
        return count
    rows = np.flatnonzero(prompts.mask.any(axis=1))
    return int(rows[-1]) + 1 if len(rows) else 1


@jax.jit
def _ends(tokens: Array, lengths: Array, stop_tokens: Array) -> tuple[jax.Array, jax.Array]:
    """Which tokens belong to answers, `[B, R]`, and which answers have a stop token, `[B]`."""
    mask = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    stops = jnp.any(tokens[..., None] == stop_tokens[None, None], axis=-1)
    return mask, jnp.any(stops & mask, axis=1)


def _limits(lengths: Array | None, answers: int, max_new_tokens: int) -> np.ndarray:
    if lengths is None:
        return np.full(answers, max_new_tokens, np.int32)
    limits = np.asarray(lengths)
    if limits.shape != (answers,) or not np.issubdtype(limits.dtype, np.integer):
        raise ValueError(
            f"lengths: got {limits.dtype} {limits.shape}, wanted an integer for each answer, "
            f"({answers},)"
        )
    if limits.min() < 1 or limits.max() > max_new_tokens:
        raise ValueError(
            f"lengths: got {limits.min()} to {limits.max()}, wanted 1 to "
            f"max_new_tokens={max_new_tokens}"
        )
    return limits.astype(np.int32)


def _group_keys(key: jax.Array, count: int, rows: int) -> jax.Array:
    """The keys of so many answers, as if groups of `rows` were sampled one after the other."""
    number = jnp.arange(count)
    groups = jax.vmap(jax.random.fold_in, (None, 0))(key, number // rows * rows)
    return jax.vmap(jax.random.fold_in)(groups, number % rows)


def expect_decoder(model: Any, what: str) -> None:
    """Raises ValueError for a user's own model, which has no cache to sample with.

    Raises:
      ValueError: it is not a `Decoder`.
    """
    if isinstance(model, Decoder) or hasattr(model, "axes"):  # or a stand-in for one
        return
    raise ValueError(
        f"{what}: got a model of type {type(model).__name__}, wanted a Decoder, as "
        "ja.load_pretrained gives one: sampling reads its key-value cache. With a model of your "
        "own, sample with its own code; ppo.make_experience accepts such answers"
    )


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
    thinking: str = "auto",
    chat_template_kwargs: dict[str, Any] | None = None,
    rows: int = 16,
    speculate: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Answers prompts in text.

    Args:
      model: the language model.
      params: its parameters.
      tok: its tokenizer.
      prompts: user messages, or whole conversations as lists of messages. The chat template renders
        them.
      max_new_tokens: longest answer, tokens.
      temperature: 0 is greedy.
      top_k: 0 is off.
      top_p: 1 is off.
      key: PRNG key; `jax.random.key(0)` by default.
      chat_template: a built-in name ("chatml"), a jinja file, or "none", which continues the
        prompt's text as it is; None: the tokenizer's template.
      thinking: for templates with two generation prompts: "on" lets the model reason; "off" and
        "auto" close the reasoning block, as in training on answers without reasoning.
      chat_template_kwargs: further variables of the template, as a JSON object.
      rows: answers written at a time; a finished one makes room for the next prompt.
      speculate: draft up to this many tokens of a step from the text so far; the answers stay the
        same, and text that repeats takes fewer steps. 0 is off.
      on_text: called with pieces of the answer to a single prompt, while it is sampled. A piece
        never ends inside a character, and the joined pieces equal the returned answer.

    Returns:
      One answer per prompt, without special tokens.

    Raises:
      ValueError: one prompt instead of a list, a model that is not a `Decoder`, prompts beyond the
        model's learned positions or with tokens outside its embedding, or parameters on several
        processes. On several processes use `sample` with each process's rows.
    """
    from jaxalign.data.chat import encode_prompt, stop_token_ids
    from jaxalign.data.extent import Limits, extent_of
    from jaxalign.data.packing import prompt_rows

    if isinstance(prompts, str):
        raise ValueError(
            f"prompts: got one text, {prompts[:40]!r}, wanted a list of prompts; write "
            "generate(model, params, tok, [text])"
        )
    expect_decoder(model, "generate")
    if not len(prompts):
        return []
    if on_text is not None and len(prompts) > 1:
        raise ValueError(f"on_text with {len(prompts)} prompts: wanted one, whose answer is shown")
    if isinstance(prompts[0], Mapping):
        raise ValueError(
            "prompts: got one conversation, wanted a list of prompts; write "
            "generate(model, params, tok, [messages])"
        )
    variables: Any = {"thinking": thinking, "chat_template_kwargs": chat_template_kwargs}
    encoded = [
        np.asarray(encode_prompt(tok, prompt, chat_template, **variables), np.int32)
        for prompt in prompts
    ]
    Limits.of(model, max_new_tokens, tok).check(extent_of(encoded), "prompts")
    stops = stop_token_ids(tok, chat_template, model)
    key = jax.random.key(0) if key is None else key
    # One length for all: the longest prompt, up to a multiple of 16.
    length = -(-max(map(len, encoded)) // 16) * 16
    rows = min(rows, len(encoded))
    mesh = mesh_of(params)
    if mesh is not None and not rows_sharding(mesh).is_fully_addressable:
        raise ValueError(
            f"generate with parameters on {jax.process_count()} processes: wanted one; load the "
            "model in one process, or use sample with this host's rows"
        )
    if mesh is not None:
        rows = -(-rows // row_shards(mesh)) * row_shards(mesh)
    pad = tok.pad_token_id if isinstance(tok.pad_token_id, int) else 0
    pieces = None if on_text is None else TextPieces(tok, on_text)
    # On one shard of rows all prompts wait in one queue, and a finished answer makes room for the
    # next prompt. With several, or with drafts, which need a slot for every answer, groups of
    # `rows` prompts follow each other. Both use the same keys, so the answers are the same.
    queued = not speculate and (mesh is None or row_shards(mesh) == 1)
    together = rows
    while queued and together < len(encoded):
        together *= 2  # few shapes, whatever the number of prompts
    answers: list[str] = []
    for start in range(0, len(encoded), together):
        group = range(start, min(start + together, len(encoded)))
        out = sample(
            model,
            params,
            prompt_rows(encoded, list(group), together, length, pad),
            jax.random.fold_in(key, start)
            if together == rows
            else _group_keys(key, together, rows),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stops,
            pad_token=pad,
            slots=rows if together > rows else None,
            speculate=speculate,
            watch=None if pieces is None else pieces.watch,
        )
        tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
        if pieces is not None:
            return [pieces.end(tokens[0][mask[0]])]
        answers += [
            str(tok.decode(tokens[row][mask[row]], skip_special_tokens=True))
            for row in range(len(group))
        ]
    return answers
