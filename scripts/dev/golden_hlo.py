"""Writes golden texts: tiny compiled programs, one a collective, as this JAX prints them.

    python scripts/dev/golden_hlo.py                        # places whose compilers are here
    python scripts/dev/golden_hlo.py --places cpu tpu --out /elsewhere

Run it with the oldest and with the newest JAX that is supported, and commit what it wrote to
tests/plan/golden: a file a release and place, one module behind the other. What `plan` counts in
them is compared with counts by hand (tests/plan/test_golden.py). Nothing runs. The TPU's and the
GPU's programs want the compilers (`pip install "jaxalign[plan-tpu,plan-gpu]"`); without them those
places are left out, and named.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import sys
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign.plan.topology import find_devices

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "tests/plan/golden"

PLACES = {"cpu": "cpu:8", "tpu": "v5e:2x4", "gpu": "h100:4x2"}
"""Place → 8 devices, by the name that `plan --topology` takes."""

ROWS, WIDTH, LAYERS = 1024, 4096, 3
"""Each device holds `[ROWS, WIDTH]`; the loop turns LAYERS times."""

AXES = ("outer", "inner")
"""Of the mesh, 2 × 4: groups of the one are 4 apart, of the other next to each other."""


def all_gather(x: jax.Array) -> jax.Array:
    """Each of a pair's rows, 4 devices apart."""
    return lax.all_gather(x, "outer", tiled=True)


def reduce_scatter(x: jax.Array) -> jax.Array:
    """Sums over 4 neighbours, of which each keeps a quarter."""
    return lax.psum_scatter(x, "inner", tiled=True)


def all_reduce(x: jax.Array) -> jax.Array:
    """Sums over all 8."""
    return lax.psum(x, AXES)


def all_to_all(x: jax.Array) -> jax.Array:
    """Rows for columns among 4 neighbours."""
    return lax.all_to_all(x, "inner", 0, 1, tiled=True)


def permute(x: jax.Array) -> jax.Array:
    """To the next of 8, around."""
    return lax.ppermute(x, AXES, [(i, (i + 1) % 8) for i in range(8)])


def layers(weights: jax.Array, x: jax.Array) -> jax.Array:
    """A loop over layers of two matrices, each gathered and multiplied: the second one's gather can
    run under the first one's product, which is where compilers make it asynchronous.

    Weights are `[LAYERS, 2, WIDTH / 8, WIDTH]` a device, split over all 8.
    """

    def layer(h: jax.Array, parts: jax.Array) -> tuple[jax.Array, None]:
        for part in parts:
            h = jnp.tanh(h @ lax.all_gather(part, AXES, tiled=True))
        return h, None

    return lax.scan(layer, x, weights)[0]


PROGRAMS: dict[str, Callable[..., jax.Array]] = {
    f.__name__: f for f in (all_gather, reduce_scatter, all_reduce, all_to_all, permute, layers)
}


def compile_text(name: str, devices: list[jax.Device]) -> str:
    """The compiled text of a program for 8 devices, without places in files."""
    mesh = Mesh(np.array(devices).reshape(2, 4), AXES)
    rows = PartitionSpec(AXES)
    specs, shapes = (rows,), [(8 * ROWS, WIDTH)]
    dtype = jnp.float32
    if name == "layers":
        dtype = jnp.bfloat16
        specs = (PartitionSpec(None, None, AXES), rows)
        shapes = [(LAYERS, 2, WIDTH, WIDTH), *shapes]
    function = jax.shard_map(
        PROGRAMS[name], mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False
    )
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return _shorten(text)


def _shorten(text: str) -> str:
    """Without what names files and lines of this machine, and without a compiler's long notes."""
    first = text.split("\n", 1)[0]
    body = re.search(r"^(%|ENTRY )", text, re.MULTILINE)  # before it newer releases list files
    text = f"{first}\n\n{text[body.start() if body else len(text) :]}"
    text = re.sub(r", metadata=\{[^{}]*\}", "", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"


def main(arguments: list[str]) -> int:
    """Writes a file a place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for place in options.places:
        try:
            devices = find_devices(PLACES[place])
        except ValueError as error:
            print(f"{place}: left out: {error}")
            continue
        path = options.out / f"jax-{jax.__version__}-{place}.txt"
        path.write_text("\n".join(compile_text(name, devices) for name in PROGRAMS), "utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
