"""Key tables on a made-up family: fused, stacked twice, transposed or not, in two forms."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import CONFIG

from jaxalign.hf.blocks import (
    Block,
    empty_block,
    full_bounds,
    gather_tensor_piece,
    read_blocks,
    workers,
)
from jaxalign.hf.families import LLAMA
from jaxalign.hf.families.table import Entry, Part, leaves, tensors

L, E, D, F = 2, 3, 4, 5


def _qkv(config):
    return (config.num_heads * 2, config.num_kv_heads * 2, config.num_kv_heads * 2)


def _halves(config):
    return (F, F)


SIZES = {"query": 8, "key": 4, "value": 4}  # 4 heads, 2 of them for keys, of width 2
TABLE = (
    Entry("embed/embedding", "wte"),
    *(
        Entry(f"blocks/{name}/kernel", "h.{}.qkv", part=Part(1, _qkv, i))
        for i, name in enumerate(SIZES)
    ),
    *(
        Entry(f"blocks/{name}/bias", "h.{}.qkv_bias", part=Part(0, _qkv, i))
        for i, name in enumerate(SIZES)
    ),
    Entry("experts/gate", "h.{}.experts.{}.w1", transpose=True),
    Entry("experts/up", "h.{}.experts.{}.w3", transpose=True),
    Entry("experts/gate", "h.{}.gate_up", transpose=True, part=Part(1, _halves, 0)),
    Entry("experts/up", "h.{}.gate_up", transpose=True, part=Part(1, _halves, 1)),
    Entry("single", "s", transpose=True),
)
FAMILY = dataclasses.replace(LLAMA, table=TABLE)


def shapes():
    wide = {name: {"kernel": (L, D, n), "bias": (L, n)} for name, n in SIZES.items()}
    tree = {"embed": {"embedding": (7, D)}, "blocks": wide, "single": (D, F)}
    tree["experts"] = {"gate": (L, E, D, F), "up": (L, E, D, F)}
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


class Memory:
    """A source whose tensors are numpy arrays."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.shapes = {name: value.shape for name, value in arrays.items()}
        self.dtypes = {name: value.dtype for name, value in arrays.items()}

    def read(self, name, index):
        return self.arrays[name][index]


def numbers(*shape, start):
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.fixture(params=["an expert a tensor", "experts fused"])
def source(request):
    """A made-up checkpoint, and its parameters, assembled by hand."""
    arrays = {"wte": numbers(7, D, start=0), "s": numbers(F, D, start=100)}
    gate, up = np.zeros((2, L, E, D, F), np.float32)
    for layer in range(L):
        arrays[f"h.{layer}.qkv"] = numbers(D, 16, start=1000 * layer + 200)
        arrays[f"h.{layer}.qkv_bias"] = numbers(16, start=1000 * layer + 300)
        for expert in range(E):
            first = numbers(F, D, start=1000 * layer + 100 * expert + 400)
            second = first + 20
            gate[layer, expert], up[layer, expert] = first.T, second.T
            if request.param == "experts fused":
                both = arrays.setdefault(f"h.{layer}.gate_up", np.zeros((E, 2 * F, D), np.float32))
                both[expert, :F], both[expert, F:] = first, second
            else:
                arrays[f"h.{layer}.experts.{expert}.w1"] = first
                arrays[f"h.{layer}.experts.{expert}.w3"] = second
    expected = {"embed/embedding": arrays["wte"], "single": arrays["s"].T}
    expected |= {"experts/gate": gate, "experts/up": up}
    for name, part in {"query": slice(8), "key": slice(8, 12), "value": slice(12, 16)}.items():
        layers = range(L)
        expected[f"blocks/{name}/kernel"] = np.stack(
            [arrays[f"h.{i}.qkv"][:, part] for i in layers]
        )
        expected[f"blocks/{name}/bias"] = np.stack(
            [arrays[f"h.{i}.qkv_bias"][part] for i in layers]
        )
    return Memory(arrays), expected


def test_reading_finds_every_part(source):
    file, expected = source
    found = leaves(FAMILY, CONFIG, shapes(), file.shapes)
    assert {leaf.path for leaf in found} == set(expected)
    for leaf in found:
        assert leaf.tensor_shape == file.shapes[leaf.names[0]]
        everything = full_bounds(leaf.shape)
        # a block, as a device of a mesh holds it
        some = tuple(slice(size // 2, size) for size in leaf.shape)
        blocks = [empty_block(bounds, np.dtype(np.float32)) for bounds in (everything, some)]
        with workers() as pool:
            read_blocks(file, leaf, blocks, pool)
        np.testing.assert_array_equal(blocks[0].data, expected[leaf.path], leaf.path)
        np.testing.assert_array_equal(blocks[1].data, expected[leaf.path][some], leaf.path)


def test_writing_puts_the_parts_back(source):
    file, expected = source
    found = leaves(FAMILY, CONFIG, shapes(), file.shapes)
    written = {}
    for tensor in tensors(found):
        blocks = []
        for piece in tensor.pieces:
            item = expected[piece.leaf.path][piece.position]
            # two blocks, as two devices hold them
            cut = item.shape[0] // 2
            halves = (slice(0, cut), slice(cut, item.shape[0]))
            rest = full_bounds(item.shape[1:])
            blocks.append([Block((half, *rest), item[half]) for half in halves])
        written[tensor.name] = np.zeros(tensor.shape, np.float32)
        middle = tensor.shape[0] // 2
        for rows in (slice(0, middle), slice(middle, tensor.shape[0])):
            gather_tensor_piece(tensor, blocks, rows, written[tensor.name][rows])
    assert written.keys() == file.arrays.keys()
    for name, value in file.arrays.items():
        np.testing.assert_array_equal(written[name], value, name)


def test_the_first_form_is_written():
    names = {tensor.name for tensor in tensors(leaves(FAMILY, CONFIG, shapes()))}
    assert "h.1.experts.2.w3" in names
    assert "h.1.gate_up" not in names


def test_table_that_does_not_cover_a_tensor_raises():
    short = dataclasses.replace(FAMILY, table=tuple(e for e in TABLE if "value" not in e.path))
    less = shapes()
    del less["blocks"]["value"]
    with pytest.raises(RuntimeError, match=r"h\.0\.qkv\S* \(.*16,?\) is not made up of exactly"):
        tensors(leaves(short, CONFIG, less))
    wrong = dataclasses.replace(
        FAMILY, table=(*TABLE[:1], Entry("blocks/key/kernel", "k", part=Part(1, _halves, 0)))
    )
    kernel = {"kernel": shapes()["blocks"]["key"]["kernel"]}
    with pytest.raises(RuntimeError, match="does not fit a leaf"):
        leaves(wrong, CONFIG, {"blocks": {"key": kernel}})
