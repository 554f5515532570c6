"""Flips bits of a checkpoint and of an exported model, and tells what notices.

    python scripts/faults/flips.py [--flips 500] [--each 30] [--seed 0] [--out FILE.json]

Makes a decoder of 1 million parameters, saves its train state as a checkpoint and its weights as a
Hugging Face folder, and damages copies of both, one fault at a time:

- `anywhere`: `--flips` single bits, drawn evenly from all bytes of the folder;
- `each file`: `--each` single bits of every file, however small it is;
- `cut`, `emptied`, `zeroed`, `removed`, `swapped` (with the next file of the folder): every file.

Then it restores, or loads, as a run does, and counts:

- `detected`: an error of ours (ValueError), or a message that names the file;
- `harmless`: not noticed, and what was read is the same, bit for bit;
- `silent`: not noticed, and something else was read;
- `traceback`: any other error.

Exits with status 1 if anything was silent or a traceback in a checkpoint, or in weights. The JSON
files of a Hugging Face folder carry no checksum, as in other libraries, and are told apart.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import pathlib
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxalign
from jaxalign.algorithms.state import init_state
from jaxalign.models.base import DecoderConfig
from jaxalign.models.decoder import Decoder
from jaxalign.run.checkpoint import Checkpoints

STEP = 3
CONFIG = DecoderConfig(
    vocab_size=4096,
    hidden_size=96,
    intermediate_size=256,
    num_layers=4,
    num_heads=6,
    num_kv_heads=3,
    head_dim=16,
)


def main() -> int:
    """Runs all of it; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--each", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"jax": jax.__version__, "python": platform.python_version()}
    bad = 0
    with tempfile.TemporaryDirectory() as place:
        for name, (folder, read) in make(pathlib.Path(place)).items():
            wanted, _ = outcome(read)
            counts = damage(folder, read, wanted, options)
            report[name] = counts
            for row, found in counts.items():
                print(f"{name:12} {row:42} {dict(found)}", flush=True)
                is_json = row.endswith((".json", ".json (each)"))
                bad += 0 if is_json else found["silent"] + found["traceback"]
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(bad > 0)


def make(place: pathlib.Path) -> dict[str, tuple[pathlib.Path, Callable[[], Any]]]:
    """Name → (folder, what reads it and returns all that it holds)."""
    model = Decoder(CONFIG)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), model.shapes
    )
    state = init_state(params, optax.adam(1e-3))
    store = Checkpoints(place / "checkpoints")
    store.save(STEP, state, {"done": STEP, "loop": {"kl_coef": 0.1}})
    store.close()
    jaxalign.save_pretrained(model, params, place / "model")

    def restore() -> Any:
        store = Checkpoints(place / "checkpoints")
        try:
            got, loop = store.restore(state, STEP)
        finally:
            store.close()
        return (got.params, got.opt_state, got.step), loop

    def load() -> Any:
        model, params = jaxalign.load_pretrained(place / "model")
        return params, repr(model.config)

    return {
        "checkpoint": (place / "checkpoints" / str(STEP), restore),
        "export": (place / "model", load),
    }


def outcome(read: Callable[[], Any]) -> tuple[Any, str]:
    """(what was read, "") or (None, the kind of error); what was printed counts as noticed."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            tree, rest = read()
    except ValueError:
        return None, "detected"
    except Exception:
        return None, "traceback"
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
    return (leaves, rest), "detected" if printed.getvalue() else ""


def damage(
    folder: pathlib.Path, read: Callable[[], Any], wanted: Any, options: argparse.Namespace
) -> dict[str, collections.Counter]:
    """Row of the table → outcomes."""
    table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for row, path, data in faults(folder, options):
        whole = path.read_bytes()
        if data == whole:
            continue
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)
        got, notice = outcome(read)
        table[row][notice or ("harmless" if got == wanted else "silent")] += 1
        path.write_bytes(whole)
    return dict(table)


def faults(
    folder: pathlib.Path, options: argparse.Namespace
) -> Iterator[tuple[str, pathlib.Path, bytes | None]]:
    """(row, file, its new bytes or None for none)."""
    rng = np.random.default_rng(options.seed)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in paths])
    for place in rng.integers(0, sizes.sum(), options.flips):
        which = int(np.searchsorted(np.cumsum(sizes), place, side="right"))
        yield "anywhere", paths[which], flipped(paths[which], rng)
    for path in paths:
        name = short(path, folder)
        for _ in range(options.each if path.stat().st_size else 0):
            yield f"each: {name}", path, flipped(path, rng)
    for path, other in zip(paths, [*paths[1:], paths[0]], strict=True):
        whole = path.read_bytes()
        kind = ".json" if path.suffix == ".json" else ""
        yield f"cut{kind}", path, whole[: len(whole) // 2]
        yield f"emptied{kind}", path, b""
        yield f"zeroed{kind}", path, bytes(len(whole))
        yield f"removed{kind}", path, None
        yield f"swapped{kind}", path, other.read_bytes()


def flipped(path: pathlib.Path, rng: np.random.Generator) -> bytes:
    """The file with one bit changed."""
    data = bytearray(path.read_bytes())
    bit = int(rng.integers(0, 8 * len(data)))
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def short(path: pathlib.Path, folder: pathlib.Path) -> str:
    """A file's path in the folder, with Orbax's random names cut."""
    name = path.relative_to(folder).as_posix()
    return "/".join(part if len(part) < 30 else f"{part[:6]}…" for part in name.split("/"))


if __name__ == "__main__":
    sys.exit(main())
