"""The command `verify`: reruns some steps of a run, and says whether the bits are the same."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import Any

from jaxalign.commands.command import Command

_DIFFERENT = 1  # exit status


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a run's folder; nothing in it is changed")
    parser.add_argument(
        "--steps",
        type=int,
        default=2,
        metavar="K",
        help="steps to rerun from the start and from each kept checkpoint; default 2",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="rerun although data, models or the template are others than the run's",
    )


def _verify(parsed: argparse.Namespace) -> int:
    quiet = contextlib.nullcontext()
    if parsed.json:  # what is printed on the way goes to the other stream
        quiet = contextlib.redirect_stdout(sys.stderr)
    with quiet:
        found = verify(parsed.folder, parsed.steps, allow_changes=parsed.allow_changes)
    print(json.dumps(found, indent=1) if parsed.json else _text(found))
    return 0 if found["same_bits"] else _DIFFERENT


def verify(folder: str, steps: int = 2, *, allow_changes: bool = False) -> dict[str, Any]:
    """Reruns recorded steps of a run, without changing anything in its folder.

    Args:
      folder: the run's folder.
      steps: how many to rerun from the start, and from each sound checkpoint.
      allow_changes: rerun although what the run read has changed.

    Returns:
      `same_bits`; `parts`, one a start, with the steps that ran and what differs; `notes`, why bits
      cannot be promised. JSON-able.

    Raises:
      ValueError: no run there, nothing to rerun, or inputs that have changed since.
    """
    from jaxalign.run.past import read_past
    from jaxalign.run.replay import checkpoints_of, open_replay

    if steps < 1:
        raise ValueError(f"--steps={steps}: wanted 1 or more")
    past = read_past(folder)
    parts: list[dict[str, Any]] = []
    notes: list[str] = []
    starts = [0, *checkpoints_of(folder)]
    spans = [(start, _end(past, start, steps)) for start in starts]
    spans = [(start, end) for start, end in spans if end > start]
    if not spans:
        raise ValueError(f"{folder}: no step is recorded after its start or a sound checkpoint")
    with contextlib.ExitStack() as stack:
        replay = None
        for start, end in spans:
            if replay is None or not replay.serves(start + 1):
                stack.pop_all().close()
                replay = stack.enter_context(
                    open_replay(folder, start + 1, allow_changes=allow_changes)
                )
            replayed = replay.run(start, end)
            notes += [note for note in replay.notes if note not in notes]
            parts.append(
                {
                    "from": start,
                    "steps": [step.step for step in replayed],
                    "compared": sum(step.compared for step in replayed),
                    "differences": [
                        {"step": step.step} | difference._asdict()
                        for step in replayed
                        for difference in step.differences
                    ],
                }
            )
    same = all(not part["differences"] for part in parts)
    return {"same_bits": same, "parts": parts, "notes": notes}


def _end(past: Any, start: int, steps: int) -> int:
    """The last of at most `steps` recorded steps that follow a start with the same options."""
    other = {each["step"] for each in past.starts if each.get("changes")}
    end = start
    while end < start + steps and end + 1 in past.metrics and (end == start or end not in other):
        end += 1
    return end


def _text(found: dict[str, Any]) -> str:
    lines = []
    for part in found["parts"]:
        first, last = part["steps"][0], part["steps"][-1]
        begin = f"checkpoint {part['from']}" if part["from"] else "the initial state"
        where = f"step {first}" if first == last else f"steps {first} to {last}"
        differs = part["differences"]
        result = f"{part['compared']} metrics, the same bits"
        if differs:
            one = differs[0]
            result = (
                f"{len(differs)} of {part['compared']} metrics differ, first {one['name']} of step "
                f"{one['step']}: recorded {one['recorded']!r}, now {one['replayed']!r}"
            )
        lines.append(f"{where}, from {begin}: {result}")
    if found["notes"]:
        lines.append("Bits cannot be promised: " + "; ".join(found["notes"]))
    lines.append("The same bits." if found["same_bits"] else "Not the same bits.")
    return "\n".join(lines)


COMMAND = Command(
    "verify",
    "rerun some steps of a run, and say whether the bits are the recorded ones",
    _arguments,
    _verify,
    compiles=True,
)
