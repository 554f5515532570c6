"""What PPO saves where only the upper layers have adapters.

    python scripts/bench/lower_states.py [--sizes S M] [--processes 3] [--out FILE]

`every layer` has adapters in all layers, `upper half` in the upper ones, and `kept` also keeps the
hidden states below them (`ppo.keep_lower_states`). For each: the experience of a rollout (policy,
reference, critic of adapters on the same base) and one update of policy and critic. Rows of 128
tokens, half of them the answer. Each form has a process of its own, and they take turns;
milliseconds are medians of the processes' medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from _job import machine  # noqa: E402
from _start import random_llama  # noqa: E402

import jaxalign as ja  # noqa: E402
from jaxalign import ppo  # noqa: E402
from jaxalign.models.lora import LoraConfig, add_lora, make_adapters  # noqa: E402

LENGTH, ROUNDS = 128, 8
FORMS = ("every layer", "upper half", "kept")


def rollout_tokens(rows: int, vocab: int) -> ja.TokenBatch:
    """Full rows of a prompt and an answer of the same length, and a column after them."""
    ids = np.random.default_rng(0).integers(2, vocab, (rows, LENGTH + 1)).astype(np.int32)
    column = np.broadcast_to(np.arange(LENGTH + 1, dtype=np.int32), ids.shape)
    answer = (column >= LENGTH // 2 - 1) & (column < LENGTH - 1)
    return ja.TokenBatch(ids, np.roll(ids, -1, 1), column, np.ones_like(ids), answer)


def prepared(size: str, rows: int, lora: LoraConfig, keep: bool) -> dict[str, Callable[[], Any]]:
    """Functions that run the experience, and an update."""
    base, params = random_llama(size)
    policy, adapters, frozen = add_lora(base, params, jax.random.key(1), lora)
    critic = ja.Scorer(dataclasses.replace(base, lora=lora))
    head = {"kernel": jnp.zeros((base.config.hidden_size, 1))}
    trunk = {name: value for name, value in frozen.items() if name != "head"}
    trained = ppo.init_params(
        adapters, make_adapters(base, frozen, jax.random.key(2), lora)[0] | {"score": head}
    )
    tx = ppo.make_optimizer(optax.adam(1e-4), optax.adam(1e-4))
    state = ja.init_state(trained, tx, {"policy": frozen, "critic": trunk})
    config = ppo.Config(keep_lower_states=keep, max_new_tokens=LENGTH // 2)
    experience = ppo.make_experience(policy, critic, config, reference=base)
    scores, ended = np.arange(rows, dtype=np.float32), np.ones(rows, bool)
    tokens = rollout_tokens(rows, base.config.vocab_size)
    rollout = experience(state, state.frozen["policy"], tokens, scores, ended)
    step = jax.jit(ppo.make_step(policy, critic, tx, config))
    return {
        "experience": functools.partial(
            experience, state, state.frozen["policy"], tokens, scores, ended
        ),
        "update": functools.partial(step, state, rollout),
    }


def measure(form: str, size: str, rows: int) -> dict[str, float]:
    """Milliseconds of a form's parts, in this process."""
    layers = random_llama(size)[0].config.num_layers
    upper = "|".join(str(layer) for layer in range(layers // 2, layers))
    half = LoraConfig(targets=(rf"layers\.(?:{upper})\..*",))
    lora = LoraConfig() if form == "every layer" else half
    found = {}
    for part, run in prepared(size, rows, lora, keep=form == "kept").items():
        seconds = []
        for _ in range(1 + ROUNDS):
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds.append(time.perf_counter() - began)
        found[part] = 1e3 * statistics.median(seconds[1:])
    return found


def in_turns(size: str, rows: int, processes: int) -> dict[str, dict[str, float]]:
    """Medians over processes, by form and part."""
    found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    for _ in range(processes):
        for form in FORMS:
            own = [sys.executable, __file__, "--form", form, "--sizes", size, "--rows", str(rows)]
            done = subprocess.run(own, check=True, capture_output=True, text=True)
            found[form].append(json.loads(done.stdout))
    return {
        form: {part: round(statistics.median(x[part] for x in all_), 1) for part in all_[0]}
        for form, all_ in found.items()
    }


def main() -> None:
    """Measures; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["S", "M"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.form is not None:
        print(json.dumps(measure(arguments.form, arguments.sizes[0], arguments.rows)))
        return
    found = {size: in_turns(size, arguments.rows, arguments.processes) for size in arguments.sizes}
    print(json.dumps(found))
    if arguments.out is not None:
        record = {"benchmark": "lower_states", "rows": arguments.rows, "length": LENGTH}
        record |= {"milliseconds": found} | machine()
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
