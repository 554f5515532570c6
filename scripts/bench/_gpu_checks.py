"""Every step's numbers on the accelerator beside a CPU's: python _gpu_checks.py; prints JSON.

Float32 with full precision of matrix products must agree closely; bfloat16 with the attention
kernel of the device, beside float32 on the CPU, within what bfloat16 rounds. Weights are drawn on
the CPU.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxalign as ja
from jaxalign import dpo, ppo, reward, sft
from jaxalign.commands.bench.case import Case
from jaxalign.commands.bench.rows import pair_batches, prompt_batch, token_batches
from jaxalign.commands.bench.sizes import SIZES
from jaxalign.parallel.sharding import param_shardings

STEPS = 3
TOLERANCES = {"float32": 2e-4, "bfloat16": 5e-2}
"""Largest difference, relative to numbers above 1. (Loss and gradient norm are of order 1 here.)"""


class Place(NamedTuple):
    """Where and how a step is computed."""

    mesh: Any
    dtype: str
    precision: str | None


def put(model: Any, params: Any, place: Place) -> Any:
    return jax.device_put(params, param_shardings(model.axes, place.mesh))


def optimizer() -> Any:
    return ja.make_optimizer(ja.OptimizerConfig(learning_rate=1e-3))


def updates(what: str, place: Place, start: dict[str, Any], case: Case) -> list[dict[str, float]]:
    """Loss, gradient norm and the like of the first steps."""
    model: Any = ja.Decoder(SIZES[case.size], compute_dtype=place.dtype)
    params = put(model, start["policy"], place)
    tx, prepare = optimizer(), None
    if what == "sft":
        step, batches = sft.make_step(model, tx), token_batches(case)
    elif what == "dpo":
        step, batches = dpo.make_step(model, tx), pair_batches(case)
        prepare = dpo.make_prepare(model)
    else:
        model = ja.Scorer(model)
        params = put(model, start["scorer"], place)
        step, batches = reward.make_step(model, tx), pair_batches(case)
    reference, state = params, ja.init_state(params, tx)
    compiled = ja.compile_step(step, state, place.mesh)
    found = []
    for _ in range(STEPS):
        batch = ja.shard_batch(next(batches), place.mesh)
        if prepare is not None:
            batch = prepare(reference, batch)
        state, metrics = compiled(state, batch)
        found.append({k: float(v) for k, v in jax.device_get(metrics).items()})
    return found


def iteration(place: Place, start: dict[str, Any], case: Case) -> list[dict[str, float]]:
    """What a rollout says, and the update after it."""
    model = ja.Decoder(SIZES[case.size], compute_dtype=place.dtype)
    critic = ja.Scorer(model)
    params, values = put(model, start["policy"], place), put(critic, start["scorer"], place)
    config = ppo.Config(max_new_tokens=case.new_tokens)
    tx = ppo.make_optimizer(optimizer(), optimizer())
    state = ja.init_state(ppo.init_params(params, values), tx)
    prepare = ppo.make_prepare(model, critic, ja.model_reward(critic, values), config)
    rollout = prepare(jax.random.key(0), state, params, prompt_batch(case))
    step = ja.compile_step(ppo.make_step(model, critic, tx, config), state, place.mesh)
    figures = ppo.rollout_metrics(rollout)
    _, metrics = step(state, rollout)
    names = ("objective/scores", "objective/entropy", "logprobs/mean_difference")
    kept = {name: figures[name] for name in names} | metrics
    return [{k: float(v) for k, v in jax.device_get(kept).items()}]


def written(place: Place, start: dict[str, Any], case: Case) -> list[dict[str, float]]:
    """The likelihood that sampling gave its own greedy answers, and that of the CPU's model."""
    model = ja.Decoder(SIZES[case.size], compute_dtype=place.dtype)
    params = put(model, start["policy"], place)
    prompts = prompt_batch(case)
    out = ja.sample(
        model, params, prompts, jax.random.key(0), max_new_tokens=case.new_tokens, temperature=0.0
    )
    ids = np.concatenate([prompts.tokens, np.asarray(out.tokens)], axis=1)
    plain = ja.Decoder(SIZES[case.size])
    home = put(plain, start["policy"], Place(cpu_mesh(), "float32", None))
    with jax.default_device(jax.devices("cpu")[0]), jax.set_mesh(cpu_mesh()):
        at = prompts.tokens.shape[1] - 1
        hidden = jax.jit(plain.apply)(home, ids[:, :-1])
        logits = np.asarray(plain.logits(home, hidden))[:, at:]
    best = logits.max(-1)
    chosen = np.take_along_axis(logits, ids[:, at + 1 :, None], axis=-1)[..., 0]
    # A greedy token may be another where two are as likely: then hardly anything is lost.
    return [{"mean_loss_of_greedy": float(np.mean(best - chosen))}]


def cpu_mesh() -> Any:
    return ja.make_mesh(devices=jax.devices("cpu")[:1])


def compare(what: str, dtype: str, here: list[dict], there: list[dict]) -> list[dict[str, Any]]:
    """One row a number that both have."""
    names = tuple(here[0])
    if dtype == "bfloat16":
        # A rollout in bfloat16 has other tokens: only that trainer and sampler agree is the same.
        narrow = {"ppo": ("logprobs/mean_difference",), "generate": names}
        names = narrow.get(what, ("loss", "grad_norm"))
    rows = []
    for number, (one, other) in enumerate(zip(here, there, strict=True)):
        for name in names:
            gap = abs(one[name] - other[name]) / max(1.0, abs(other[name]))
            row = {"what": what, "dtype": dtype, "step": number, "number": name}
            row |= {"device": one[name], "cpu": other[name], "difference": gap}
            rows.append(row | {"ok": bool(gap <= TOLERANCES[dtype])})
    return rows


def main() -> None:
    device = jax.devices()[0]
    case = Case(what="ppo", size="XS", layout="full", rows=8, length=128, new_tokens=32)
    model = ja.Decoder(SIZES["XS"])
    with jax.default_device(jax.devices("cpu")[0]):
        policy = jax.device_get(model.init(jax.random.key(0)))
        _, whole = ja.with_scalar_head(model, policy, jax.random.key(1))
        start = {"policy": policy, "scorer": jax.device_get(whole)}
    reference = Place(cpu_mesh(), "float32", None)
    mesh = ja.make_mesh(devices=[device])
    places = [Place(mesh, "float32", "highest"), Place(mesh, "bfloat16", None)]
    packed = Case(what="sft", size="XS", layout="packed", rows=8, length=128)
    jobs: dict[str, Any] = {
        name: lambda place, name=name: updates(name, place, start, packed)
        for name in ("sft", "reward", "dpo")
    }
    jobs |= {
        "ppo": lambda place: iteration(place, start, case),
        "generate": lambda place: written(place, start, case),
    }
    rows, errors = [], []
    for what, job in jobs.items():
        try:
            with jax.default_device(jax.devices("cpu")[0]):
                there = job(reference)
            for place in places:
                with jax.default_matmul_precision(place.precision or "default"):
                    here = job(place)
                if what == "generate":
                    there = [dict.fromkeys(row, 0.0) for row in here]
                rows += compare(what, place.dtype, here, there)
        except Exception as error:  # the others are to be checked all the same
            errors.append({"what": what, "error": f"{type(error).__name__}: {error}"[:500]})
    with jax.set_mesh(mesh):
        kinds = {
            d: str(ja.Decoder(SIZES["XS"], compute_dtype=d).attention_kind(128)) for d in TOLERANCES
        }
    wrong = [row for row in rows if not row["ok"]]
    print(json.dumps({
        "device": device.device_kind, "attention": kinds, "numbers": len(rows),
        "agree": not wrong and not errors, "wrong": wrong, "errors": errors,
        "largest": {
            dtype: max((r["difference"] for r in rows if r["dtype"] == dtype), default=None)
            for dtype in TOLERANCES
        },
        "checks": rows,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
