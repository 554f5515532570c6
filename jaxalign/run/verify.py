"""Verifies written models: compares their log-probs on 16 prompts with the trainer's.

Both run in float32. They may differ by the rounding of the files' element type; rounding the merged
weights in memory measures this difference.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.chat import NONE, encode_prompts
from jaxalign.data.messages import read_messages
from jaxalign.hf import families, load_pretrained, load_tokenizer
from jaxalign.hf.source import read_json
from jaxalign.models.decoder import Decoder
from jaxalign.models.lm_head import target_logprobs
from jaxalign.models.scorer import Scorer
from jaxalign.parallel.sharding import mesh_of, replicated, row_shards, use_mesh
from jaxalign.types import Params

FLOOR = 1e-3
"""In nats or units of the score: the difference that the order of float32 sums can cause."""
ROUNDING = 2.0
"""The bound, as a multiple of the difference caused by rounding alone."""

_LONGEST = 128  # tokens to compare in each prompt
_BLOCK = 32  # elements of a block of Q8_0

_PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "def add(a, b):\n    return",
    "12 + 30 = ? Think, then answer.",
    "Translate 'good morning' to German.",
    "Who wrote Hamlet, and when?",
    "Почему небо голубое?",
    "今天天气怎么样？",
)
_LATER = (  # asked after a question and an answer, so that an assistant turn is rendered too
    "And of Italy?",
    "Shorter, please.",
    "Now in Python.",
    "Are you sure?",
    "¿Por qué?",
    "كيف حالك؟",
    "नमस्ते, आप कौन हैं?",
    "감사합니다!",
)


class Probe(NamedTuple):
    """Token ids of the prompts.

    Attributes:
      ids: int32 `[16, T]`, padded with 0 on the right.
      lengths: int `[16]`.
      texts: the ids of each prompt in full, to compare tokenizers.
    """

    ids: np.ndarray
    lengths: np.ndarray
    texts: list[list[int]]


class Difference(NamedTuple):
    """How two models differ on the prompts, in nats or units of the score.

    Attributes:
      largest: the largest absolute difference of a token.
      mean: the mean absolute difference.
      tokens: the number of tokens compared.
    """

    largest: float
    mean: float
    tokens: int


def make_probe(tok: Any, rows: int, longest: int) -> Probe:
    """The prompts under a tokenizer's chat template, or as plain text without one.

    Args:
      tok: the trainer's tokenizer.
      rows: the rows of the model's embedding; a prompt with an id beyond them is left out.
      longest: the model's positions.

    Raises:
      ValueError: no prompt is left.
    """
    texts = prompt_ids(tok)
    kept = [text for text in texts if text and max(text) < rows]
    if not kept:
        raise ValueError("none of the prompts can be written with ids that the model has rows for")
    width = min(_LONGEST, longest, -(-max(map(len, kept)) // 16) * 16)
    ids = np.zeros((len(kept), width), np.int32)
    lengths = np.array([min(len(text), width) for text in kept])
    for row, text in enumerate(kept):
        ids[row, : lengths[row]] = text[: lengths[row]]
    return Probe(ids, lengths, texts)


def prompt_ids(tok: Any) -> list[list[int]]:
    """The token ids of the 16 prompts."""
    first = [{"role": "user", "content": _PROMPTS[0]}, {"role": "assistant", "content": "Paris."}]
    chats = [[{"role": "user", "content": text}] for text in _PROMPTS]
    chats += [[*first, {"role": "user", "content": text}] for text in _LATER]
    try:
        if not tok.chat_template:
            raise ValueError(NONE)
        turns = [read_messages(chat, "messages", "prompt") for chat in chats]
        return [ids.tolist() for ids in encode_prompts(tok, turns)]
    except ValueError:  # no template, or a template for other conversations
        plain = [[{"role": "user", "content": text}] for text in (*_PROMPTS, *_LATER)]
        turns = [read_messages(chat, "messages", "prompt") for chat in plain]
        return [ids.tolist() for ids in encode_prompts(tok, turns, NONE)]


def measure(model: Any, params: Params, probe: Probe) -> np.ndarray:
    """A model's outputs for the prompts, in float32.

    Returns:
      For a `Decoder` the log-probs of each next token, `[16, T − 1]`, in nats; for a `Scorer` its
      outputs at each token, `[16, T, A]`.
    """
    mesh = mesh_of(params)
    count = len(probe.ids)
    shards = 1 if mesh is None else row_shards(mesh)
    ids = probe.ids[np.arange(-(-count // shards) * shards) % count]
    placed = jnp.asarray(ids) if mesh is None else jax.device_put(ids, replicated(mesh))
    with use_mesh(mesh), jax.default_matmul_precision("highest"):
        values = _program(_plain(model), mesh)(params, placed)
    return np.asarray(values)[:count]


@functools.lru_cache(maxsize=4)
def _program(model: Decoder | Scorer, mesh: Any) -> Any:
    def values(params: Params, ids: jax.Array) -> jax.Array:
        hidden = model.apply(params, ids)
        if isinstance(model, Scorer):
            return model.outputs(params, hidden)
        return target_logprobs(model, params, hidden[:, :-1], ids[:, 1:])

    return jax.jit(values, out_shardings=None if mesh is None else replicated(mesh))


def _plain(model: Any) -> Any:
    """A model without fields that do not affect its program, so that equal models share it."""
    base = model.base if isinstance(model, Scorer) else model
    base = dataclasses.replace(
        base,
        config=dataclasses.replace(base.config, family="llama", source_config=""),
        compute_dtype="float32",
        remat="none",
        attention="xla",
    )
    return dataclasses.replace(model, base=base) if isinstance(model, Scorer) else base


def compare(expected: np.ndarray, got: np.ndarray, probe: Probe) -> Difference:
    """The differences at the prompts' own tokens; NaN if either is not a number."""
    ends = probe.lengths - (probe.ids.shape[1] - expected.shape[1])
    inside = np.arange(expected.shape[1])[None, :] < ends[:, None]
    apart = np.abs(expected - got)[inside].astype(np.float64)
    return Difference(float(apart.max()), float(apart.mean()), int(inside.sum()))


def round_params(model: Any, params: Params, kinds: Mapping[str, str]) -> None:
    """Rounds parameters in place, leaf by leaf, to the values that the files' element types hold.

    Args:
      model: their model.
      params: nested dict; its leaves are replaced.
      kinds: leaf path → float32, bfloat16, float16 or Q8_0.
    """
    for leaf in families.leaves(model.config, model.shapes):
        *above, last = leaf.path.split("/")
        node = functools.reduce(lambda node, name: node[name], above, params)
        if kinds[leaf.path] != node[last].dtype.name:
            node[last] = _round(node[last].astype(jnp.float32), kinds[leaf.path], leaf.transpose)


def rounds(params: Params, kinds: Mapping[str, str]) -> bool:
    """Whether files of these element types round the parameters."""
    return any(kinds[path] != leaf.dtype.name for path, leaf in families.flatten(params).items())


def _round(x: jax.Array, kind: str, transposed: bool) -> jax.Array:
    if kind != "Q8_0":
        return x.astype(kind).astype(jnp.float32)
    # Blocks run along the columns of the stored matrix.
    rows = x.swapaxes(-1, -2) if transposed else x
    blocks = rows.reshape(*rows.shape[:-1], -1, _BLOCK)
    scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / 127
    steps = jnp.round(blocks / jnp.where(scale == 0, 1, scale))
    rounded = (steps * scale.astype(jnp.float16).astype(jnp.float32)).reshape(rows.shape)
    return rounded.swapaxes(-1, -2) if transposed else rounded


def read_back(
    path: str | os.PathLike[str],
    probe: Probe,
    mesh: Any,
    dtype: str = "float32",
    base: str | None = None,
) -> np.ndarray:
    """The outputs of a model's files for the prompts, loaded by `load_pretrained` as `dtype`.

    Args:
      path: the files' path.
      probe: the prompts.
      mesh: the mesh for the parameters.
      dtype: the parameters' dtype.
      base: the base of an adapter that names none and has no tokenizer either.

    Raises:
      ValueError: the files cannot be read, or their tokenizer gives different ids for a prompt.
    """
    ids = probe.texts if base is not None else prompt_ids(load_tokenizer(path))
    for number, (ours, theirs) in enumerate(zip(probe.texts, ids, strict=True), start=1):
        if ours != theirs:
            raise ValueError(
                f"its tokenizer or chat template makes other ids of prompt {number}: {theirs[:8]} "
                f"…, the trainer's makes {ours[:8]} …"
            )
    model, params = load_pretrained(path, mesh=mesh, dtype=dtype, base=base)
    return measure(model, params, probe)


def has_torch() -> bool:
    """Whether transformers can run models here."""
    return importlib.util.find_spec("torch") is not None


def read_back_by_transformers(path: str | os.PathLike[str], probe: Probe) -> np.ndarray:
    """The same for a Hugging Face folder, with transformers and torch in float32."""
    import torch
    import transformers

    scorer = families.is_scorer(read_json(pathlib.Path(path) / "config.json"))
    kind: Any = transformers.AutoModelForCausalLM
    if scorer:
        kind = transformers.AutoModelForSequenceClassification
    theirs = kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.from_numpy(probe.ids.astype(np.int64))
    with torch.no_grad():
        if scorer:
            hidden = theirs.base_model(ids, use_cache=False).last_hidden_state
            return theirs.score(hidden).numpy()
        logits = theirs(ids, use_cache=False).logits[:, :-1]
        return torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0].numpy()
