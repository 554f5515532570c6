"""What Q8_0 costs a model in log-probs, tensor by tensor, and what else the format allows.

    python scripts/bench/gguf_rounding.py [--model FILE] [--out docs/results/gguf_rounding.jsonl]

A block of Q8_0 is 32 numbers of 8 bits and a float16 scale, the largest of them over 127. Measured
are the differences of log-probs, in nats a token, between a model and its rounded copy, over the 16
prompts of `jaxalign export --verify` and over conversations of the example data:

- all matrices, as PyPI's gguf rounds them, and each kind of matrix alone;
- `nearest`: numbers are rounded by the scale that is stored, not by the one before it is float16;
- `search`: of 16 scales from 127 to 119.5 steps, the one with the least squared error in the block;
- `+F16 …`: these kinds are F16 instead, as files may mix types.

The files of all of them are valid: readers ask only for d and the numbers.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _job import append, machine

import jaxalign as ja
from jaxalign.commands.quickstart.example_model import find_example_model
from jaxalign.data import read_rows
from jaxalign.hf import families
from jaxalign.run import verify
from jaxalign.run.pipeline import EXAMPLES

KINDS = ("embed", "query", "key", "value", "out", "gate", "up", "down")
STEPS = 127 - 0.5 * np.arange(16)


def as_gguf(blocks: jax.Array) -> jax.Array:
    """Rounded as PyPI's gguf does; blocks `[…, 32]`."""
    scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / 127
    steps = jnp.round(blocks / jnp.where(scale == 0, 1, scale))
    return steps * scale.astype(jnp.float16).astype(jnp.float32)


def by_stored_scale(blocks: jax.Array, steps: float | jax.Array = 127.0) -> jax.Array:
    """Rounded by the scale of float16 that is stored."""
    scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / steps
    scale = scale.astype(jnp.float16).astype(jnp.float32)
    return scale * jnp.clip(jnp.round(blocks / jnp.where(scale == 0, 1, scale)), -127, 127)


def by_search(blocks: jax.Array) -> jax.Array:
    """Rounded by whichever of several scales has the least squared error."""
    best, least = as_gguf(blocks), jnp.inf
    for steps in STEPS:
        tried = by_stored_scale(blocks, float(steps))
        error = jnp.sum(jnp.square(tried - blocks), axis=-1, keepdims=True)
        best, least = jnp.where(error < least, tried, best), jnp.minimum(error, least)
    return best


ROUNDINGS = {"gguf": as_gguf, "nearest": by_stored_scale, "search": by_search}


@functools.partial(jax.jit, static_argnames=("how", "transposed"))
def rounded(x: jax.Array, how: str, transposed: bool) -> jax.Array:
    """A leaf as a file holds it."""
    if how == "F16":
        return x.astype(jnp.float16).astype(jnp.float32)
    rows = x.swapaxes(-1, -2) if transposed else x  # blocks lie along the stored rows
    blocks = rows.reshape(*rows.shape[:-1], -1, 32)
    done = ROUNDINGS[how](blocks).reshape(rows.shape)
    return done.swapaxes(-1, -2) if transposed else done


def round_all(model: Any, params: Any, how: str, kinds: dict[str, str]) -> Any:
    """Parameters whose matrices are rounded: `kinds` says how where it is not `how`; "": not."""
    flat = dict(families.flatten(params))
    for leaf in families.leaves(model.config, model.shapes):
        if len(leaf.tensor_shape) < 2:
            continue
        kind = next(kind for kind in KINDS if kind in leaf.path.split("/"))
        chosen = kinds.get(kind, how)
        if chosen:
            flat[leaf.path] = rounded(flat[leaf.path], chosen, leaf.transpose)
    return families.unflatten(flat)


def probes(model: Any, tok: Any) -> dict[str, verify.Probe]:
    """The 16 prompts, and the first 48 held-out conversations."""
    prompts = verify.make_probe(tok, model.config.vocab_size, model.config.max_positions)
    rows = read_rows([str(EXAMPLES / "en" / "conversations_heldout.jsonl")])[:48]
    texts = [tok.apply_chat_template(row.data["messages"], tokenize=False) for row in rows]
    ids = [tok(text, add_special_tokens=False).input_ids[:128] for text in texts]
    width = max(map(len, ids))
    table = np.zeros((len(ids), width), np.int32)
    for row, text in enumerate(ids):
        table[row, : len(text)] = text
    lengths = np.array(list(map(len, ids)))
    return {"prompts": prompts, "conversations": verify.Probe(table, lengths, ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Llama; by default the example model")
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines are appended here")
    arguments = parser.parse_args()
    source = arguments.model or find_example_model()
    tok = ja.load_tokenizer(source)
    model, params = ja.load_pretrained(source)
    tried: dict[str, tuple[str, dict[str, str]]] = {"gguf": ("gguf", {})}
    tried |= {f"{kind} alone": ("", {kind: "gguf"}) for kind in KINDS}
    tried |= {how: (how, {}) for how in ("nearest", "search")}
    for how in ("gguf", "search"):
        for wide in (("embed",), ("embed", "down"), ("embed", "value", "out"), KINDS):
            if wide != KINDS or how == "gguf":
                tried[f"{how} +F16 {' '.join(wide)}"] = (how, dict.fromkeys(wide, "F16"))
    asked = probes(model, tok)
    exact = {name: verify.measure(model, params, probe) for name, probe in asked.items()}
    for name, (how, kinds) in tried.items():
        row: dict[str, Any] = {"benchmark": "gguf_rounding", "what": name}
        copy = round_all(model, params, how, kinds)
        for asked_of, probe in asked.items():
            got = verify.measure(model, copy, probe)
            apart = verify.compare(exact[asked_of], got, probe)
            ends = probe.lengths - 1
            inside = np.arange(got.shape[1])[None] < ends[:, None]
            signed = float((got - exact[asked_of])[inside].mean())
            row[asked_of] = {"mean": apart.mean, "signed": signed, "largest": apart.largest}
            row[asked_of]["tokens"] = apart.tokens
        print(json.dumps(row), flush=True)
        if arguments.out is not None:
            append(arguments.out, row | machine())


if __name__ == "__main__":
    main()
