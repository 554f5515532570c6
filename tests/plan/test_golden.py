"""What `plan` counts in compiled programs as releases of JAX print them, against counts by hand.

`golden/` holds the texts: of the oldest and the newest JAX that is supported, and of each compiler
that was there. `scripts/dev/golden_hlo.py` writes them. The last test compiles the same programs
with the JAX that is installed, so a release that prints another text fails here.
"""

import importlib.util
import pathlib
import re
import sys

import jax
import pytest

from jaxalign.plan.costs import count_costs

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXTS = sorted((pathlib.Path(__file__).parent / "golden").glob("*.txt"))
NODES = [0] * 4 + [1] * 4  # the mesh's axis `outer` is the one between nodes

# 1,024 × 4,096 numbers a device, 4 bytes each: 16 MiB. Kind → how many, and the bytes that a device
# sends within its node and to the other one.
N = 1024 * 4096 * 4
SENT = {
    # Its share to one device, which is in the other node.
    "all_gather": {"all-gather": (1, 0, N)},
    # To each of 3 neighbours the quarter that they keep.
    "reduce_scatter": {"reduce-scatter": (1, 3 * N / 4, 0)},
    # Within the node a sum and a gather of quarters, between the nodes halves of one's own quarter.
    "all_reduce": {"all-reduce": (1, 2 * 3 * N / 4, 2 * N / 4 / 2)},
    # A quarter to each of 3 neighbours.
    "all_to_all": {"all-to-all": (1, 3 * N / 4, 0)},
    # 6 of 8 neighbours on the ring are in the same node.
    "permute": {"collective-permute": (1, N * 6 / 8, N * 2 / 8)},
}
# Six matrices of 4,096 × 4,096: a device has 512 rows, which come to 7 others, of those to one
# across and around to 6 in the nodes. 2 bytes a number; the CPU widens them first.
SHARE = 6 * 512 * 4096 * 2
FLOPS = 6 * 2 * 1024 * 4096 * 4096


def by_hand(name, place):
    """FLOPs and what is sent by a program, as a compiler for that place makes it."""
    if name == "layers":
        share = SHARE * 2 if place == "cpu" else SHARE
        return FLOPS, {"all-gather": (6, 6 * share, share)}
    if name == "reduce_scatter" and place == "tpu":
        # Rows come in tiles of 8 to two links: 264 in place of 256, 8 further for each neighbour
        # before it; a permute of 24 rows brings back what slid over, to 6 of 8.
        rows = 4096 * 4
        return 0, {
            "reduce-scatter": (1, 3 * 264 * rows, 0),
            "collective-permute": (1, 24 * rows * 6 / 8, 0),
        }
    return 0, SENT[name]


def check(text, name, place):
    costs = count_costs(text, NODES)
    flops, sent = by_hand(name, place)
    assert costs.flops == flops
    assert {kind: tuple(vars(x).values()) for kind, x in costs.collectives.items()} == sent


def modules(path):
    """Program's name → its text."""
    texts = re.split(r"^(?=HloModule )", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.match(r"HloModule jit_(\w+)", text)[1]: text for text in texts if text}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_counts_in_golden_texts(path):
    found = modules(path)
    assert set(found) == {*SENT, "layers"}
    for name, text in found.items():
        check(text, name, path.stem.rsplit("-", 1)[1])


def test_golden_texts_hold_every_form():
    """Two releases; groups as lists and by axes; what is started, finished, spread over kernels."""
    assert len({path.stem.rsplit("-", 1)[0] for path in TEXTS}) >= 2
    text = "".join(path.read_text(encoding="utf-8") for path in TEXTS)
    for form in (
        "replica_groups={{",
        "replica_groups=mesh[",
        " all-gather-start(",
        " all-gather-done(",
        " reduce-scatter-start(",
        " all-reduce-start(",
        " all-to-all-start(",
        " collective-permute-start(",
        "chain_id=",
        "AsyncCollectiveStart",
    ):
        assert form in text, form
    for place in ("metadata=", "FileNames", "source_file", ".py"):  # of whoever wrote them
        assert place not in text


@pytest.fixture(scope="module")
def golden_hlo():
    spec = importlib.util.spec_from_file_location("golden_hlo", ROOT / "scripts/dev/golden_hlo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("name", [*SENT, "layers"])
def test_counts_with_the_jax_that_is_installed(golden_hlo, name):
    check(golden_hlo.compile_text(name, jax.devices("cpu")[:8]), name, "cpu")
