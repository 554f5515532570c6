"""The command `doctor`."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxalign.commands.command import Command

if TYPE_CHECKING:
    import jax

    from jaxalign.plan.installed import Problem

PROBLEMS = 1
"""Exit status if something does not fit together."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs: facts and problems")


def _run(parsed: argparse.Namespace) -> int:
    from jaxalign.commands.doctor import checks, facts

    variables = facts.variables()
    # Listing a GPU must not reserve three quarters of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    devices, problems = _find_devices()
    problems += checks.check_packages()
    problems += checks.check_machine(facts.machine())
    problems += checks.check_variables()
    if devices:
        problems += checks.check_devices(devices)
    if parsed.json:
        found = [problem._asdict() for problem in problems]
        print(json.dumps(facts.as_dict(devices, variables) | {"problems": found}))
    else:
        print(describe(devices, problems, variables))
    return PROBLEMS if problems else 0


def _find_devices() -> tuple[Sequence[jax.Device], list[Problem]]:
    """The devices, or the reason why JAX finds none."""
    import jax

    from jaxalign.plan.installed import Problem

    try:
        return jax.devices(), []
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        remedy = (
            "another process may hold the accelerator, or its driver does not fit; "
            "JAX_PLATFORMS decides which platforms JAX tries"
        )
        return [], [Problem(f"JAX finds no device: {first}", remedy)]


def describe(
    devices: Sequence[jax.Device], problems: Sequence[Problem], variables: Mapping[str, str]
) -> str:
    """Facts, suggestions and problems as a page of text."""
    from jaxalign.commands.doctor import facts
    from jaxalign.parallel.chips import GIB

    host = facts.machine()
    memory = "unknown" if host.memory is None else f"{host.memory / GIB:.1f} GiB"
    packages = ", ".join(f"{name} {version}" for name, version in facts.versions().items())
    lines = [
        *_wrapped("versions", packages),
        *_wrapped("machine", f"{host.system}, {host.cores} cores, {memory} of memory"),
        *_wrapped(
            "disk",
            f"{host.free_disk / GIB:.0f} GiB free here, {host.free_cache / GIB:.0f} GiB where "
            "models are stored",
        ),
    ]
    for name, value in variables.items():
        lines += _wrapped("variable", f"{name}={value}")
    if devices:
        lines += _wrapped("devices", facts.describe_devices(devices))
        lines += ["", "meshes for these devices (docs/parallel.md):"]
        hosts = len({device.process_index for device in devices})
        rows = facts.meshes(len(devices), hosts)
        width = max(len(mesh) for mesh, _ in rows)
        lines += [f"  {mesh:<{width}}   {why}" for mesh, why in rows]
        lines += _sizes(facts.device_memory(devices[0]), host.memory, len(devices))
    lines.append("")
    for problem in problems:
        lines += _wrapped("problem", problem.what)
        lines += _wrapped("", f"→ {problem.remedy}")
    if not problems:
        lines.append("no problems found")
    return "\n".join(lines)


def _sizes(memory: int | None, shared: int | None, count: int) -> list[str]:
    """The models that fit into the devices' memory, or into the host's, if they share it."""
    from jaxalign.commands.doctor import facts

    if memory is None:
        memory, count = shared, 1
    if memory is None:
        return []
    lines = ["", "largest models, all weights trained in float32, half of the memory for the rest:"]
    for run, billions in facts.largest_models(memory, count):
        lines.append(f"  {run:<26} {billions:6.1f} B parameters")
    return [*lines, "  jaxalign plan CONFIG compiles a run and counts exactly; docs/memory.md"]


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, 100, initial_indent=f"{label:<10}", subsequent_indent=" " * 10, break_long_words=False
    )


COMMAND = Command(
    "doctor",
    "versions, devices, memory, what does not fit together, and what to do",
    _arguments,
    _run,
)
