"""Explains a device's out-of-memory error: each part's size, by the plan, and how to reduce it."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

_MARK = "RESOURCE_EXHAUSTED"
_ASKED = re.compile(r"allocat\w*\s+(\d+)\s*(?:bytes|B)\b", re.IGNORECASE)
_SHOWN = 200


@contextlib.contextmanager
def explain_out_of_memory(config: Any) -> Iterator[None]:
    """Turns a device's "out of memory" into a message with sizes and options.

    Args:
      config: the run's config.

    Raises:
      ValueError: replaces JAX's error; see `message`.
    """
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _MARK not in str(error):
            raise
        raise ValueError(message(config, str(error))) from error


def message(config: Any, error: str) -> str:
    """What takes the memory, and how to reduce each part.

    It makes the run's plan for the present devices: programs are compiled or come from the cache.
    With several processes, or if programs do not compile, only the resident memory is known.

    Args:
      config: the run's config.
      error: JAX's error.
    """
    import jax

    from jaxalign.parallel.chips import GIB
    from jaxalign.plan.table import human

    asked = _ASKED.search(error)
    first = error.strip().splitlines()[0][:_SHOWN]
    lines = [
        f"out of memory on {jax.devices()[0].device_kind}"
        + (f", when {human(int(asked[1]))} more were wanted" if asked else "")
        + f" ({first})"
    ]
    print("out of memory: working out what takes it …", file=sys.stderr, flush=True)
    sizes, when, note = _sizes(config)
    if not sizes:
        return f"{lines[0]}\n{note}"
    lines.append(f"on each device, {when}:")
    for name, size in sizes.items():
        options = ", ".join(_remedies(name, config))
        less = f"   less with {options}" if options else ""
        lines.append(f"  {name:<12} {human(size):>11}{less}")
    total = sum(sizes.values())
    lines.append(f"  {'in all':<12} {human(total):>11}")
    largest = max(sizes, key=lambda name: sizes[name])
    lines.append(
        f"{largest} take most ({sizes[largest] / GIB:.2f} GiB); begin there. A resumed run may "
        "change run.micro_batches, model.remat, mesh and offloading"
    )
    return "\n".join([*lines, note]).rstrip()


def _sizes(config: Any) -> tuple[dict[str, int], str, str]:
    """(kind → bytes on a device, at which moment, remarks)."""
    import jax

    from jaxalign.plan import make_plan

    note = ""
    if jax.process_count() == 1:
        try:
            plan = make_plan(config.algorithm, config)
            return _parts(plan, config), f"while “{plan.peak}” runs, by the plan", ""
        except ValueError as error:  # the compiler itself reports the excess
            note = str(error)
        except jax.errors.JaxRuntimeError:  # compiling also needs device memory
            note = "the programs could not be compiled for want of memory"
    try:
        return _resident(config), "all the time, without what programs need", note
    except ValueError as error:
        return {}, "", note or str(error)


def _resident(config: Any) -> dict[str, int]:
    import jax

    from jaxalign.plan.make import resident_bytes, run_shapes

    with config.mesh.use_rules():
        state, parts = run_shapes(config.algorithm, config, config.mesh.make(jax.devices()))
    return _named(resident_bytes(state, parts))


def _named(sizes: dict[str, int]) -> dict[str, int]:
    names = {"params": "parameters", "frozen": "frozen", "optimizer": "optimizer"}
    names |= {"models": "models", "batch": "batch", "cache": "cache", "other": "other"}
    return {names[name]: size for name, size in sizes.items() if size}


def _parts(plan: Any, config: Any) -> dict[str, int]:
    """A plan's kinds of memory, with the compiler's temporaries split as far as known.

    Gradients are as large as the parameters; logits are float32, a chunk of positions at a time.
    The rest is activations and other temporaries.
    """
    kinds = ("params", "frozen", "optimizer", "models", "batch", "cache", "other")
    found = _named({kind: getattr(plan, kind) for kind in kinds})
    rest = plan.temporary
    gradients = min(plan.params, rest) if plan.peak == "update" else 0
    rest -= gradients
    logits = min(_logits(plan, config), rest)
    split = {"gradients": gradients, "logits": logits, "activations": rest - logits}
    return found | {name: size for name, size in split.items() if size}


def _logits(plan: Any, config: Any) -> int:
    """Bytes of one chunk of logits on a device; 0 where the peak has none."""
    from jaxalign.plan.loader import read_model
    from jaxalign.plan.topology import find_devices

    if plan.head_chunk is None:
        return 0
    mesh = config.mesh.make(find_devices(None))
    model = read_model(config.model.source, config.model, mesh, config.model.remat)
    return 4 * plan.head_chunk * model.config.vocab_size // mesh.size


def _remedies(kind: str, config: Any) -> list[str]:
    """Options that reduce a kind of memory and are not yet in use."""
    optimizer, model, parts = config.optimizer, config.model, config.run.micro_batches
    lora = ["model.lora={rank: 16}"] if model.lora is None else []
    dtype = ["model.dtype=bfloat16"] if model.dtype == "float32" else []
    more = ["more devices (mesh.fsdp)"]
    halves = [f"run.micro_batches={2 * parts} (now {parts})"]
    shorter = [f"data.length below {config.data.length}"]
    if kind == "optimizer":
        small = ["optimizer.moments=int8"] if optimizer.moments != "int8" else []
        away = [] if optimizer.offload else ["optimizer.offload=true"]
        return [*small, *away, *lora, *more]
    if kind == "activations":
        remat = ["model.remat=block"] if model.remat in ("none", "dots") else []
        return [*halves, *remat, *shorter]
    if kind == "models":
        away = [] if getattr(config, "offload_frozen", True) else ["offload_frozen=true"]
        cached = ["reference_cache=DIR"] if getattr(config, "reference_cache", 0) is None else []
        return [*away, *cached, *more]
    if kind == "cache":
        ppo = config.ppo
        wide = (ppo.cache_dtype or model.compute_dtype) == "float32"
        slots = config.sequences if ppo.slots is None else ppo.slots
        return [
            f"ppo.slots below {slots}",
            *(["ppo.cache_dtype=bfloat16"] if wide else []),
            f"ppo.max_new_tokens below {ppo.max_new_tokens}",
            *shorter,
        ]
    return {
        "parameters": [*lora, *dtype, *more],
        "gradients": [*lora, *more],
        "frozen": [*dtype, *more],
        "logits": [*halves, "mesh.tensor above 1"],
        "batch": [f"data.rows below {config.data.rows}", *shorter],
    }.get(kind, [])
