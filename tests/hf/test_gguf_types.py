"""Every element type that PyPI's gguf dequantises, in files by its own writer."""

import gguf
import ml_dtypes
import numpy as np
import pytest

from jaxalign.hf.gguf_file import GGUFFile
from jaxalign.hf.gguf_header import Metadata

PLAIN = ("F32", "F16", "F64")


def is_read_by_gguf(kind):
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


TYPES = [
    *sorted(k.name for k in gguf.GGML_QUANT_SIZES if k.name not in PLAIN and is_read_by_gguf(k)),
    *PLAIN,
]
WIDTH, HEADS, HEAD, ROWS = 512, 2, 16, 32


def encoded(kind, rows, seed):
    """Quantised rows: by gguf if it can quantise to the type, else random finite blocks."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, WIDTH)).astype(np.float32)
    if kind == gguf.GGMLQuantizationType.F64:
        return values.astype(np.float64)
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (rows, WIDTH // numbers, size), np.uint8)
        data = blocks.reshape(rows, -1)

        def finite():
            return np.isfinite(gguf.quants.dequantize(data, kind))

        with np.errstate(all="ignore"):
            while not finite().all():  # the scales are half-precision numbers, some not finite
                bad = ~finite().reshape(rows, WIDTH // numbers, numbers).all(-1)
                blocks[bad] = rng.integers(0, 256, (int(bad.sum()), size), np.uint8)
        return data


@pytest.mark.parametrize("name", TYPES)
def test_values_equal_those_of_the_package(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 8),
        (writer.add_embedding_length, WIDTH),
        (writer.add_feed_forward_length, 8),
        (writer.add_head_count, HEADS),
        (writer.add_key_length, HEAD),
        (writer.add_rope_dimension_count, HEAD),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):
        add(value)
    raw = {"token_embd.weight": encoded(kind, 6, 0), "blk.0.attn_q.weight": encoded(kind, ROWS, 1)}
    for tensor, data in raw.items():
        plain = name in PLAIN
        writer.add_tensor(tensor, data, raw_dtype=None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    # Values by the package's own reader and dequantiser.
    expected = {}
    for tensor in gguf.GGUFReader(path).tensors:
        plain = name == "F64"
        data = tensor.data if plain else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected[tensor.name] = np.asarray(data).reshape(-1, WIDTH)
    file = GGUFFile(path)
    kept = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": ml_dtypes.bfloat16}
    everything = (slice(None), slice(None))
    got = file.read("model.embed_tokens.weight", everything)
    assert got.dtype == file.dtypes["model.embed_tokens.weight"] == kept.get(name, np.float32)
    np.testing.assert_array_equal(got.astype(np.float64), expected["token_embd.weight"])
    part = (slice(2, 5), slice(17, 300))
    got = file.read("model.embed_tokens.weight", part)
    np.testing.assert_array_equal(got.astype(np.float64), expected["token_embd.weight"][part])
    # Queries: the file interleaves the rows of a head, Hugging Face splits them in halves.
    pairs = expected["blk.0.attn_q.weight"].reshape(HEADS, HEAD // 2, 2, WIDTH)
    rows = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(ROWS, WIDTH)
    query = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(file.read(query, everything).astype(np.float64), rows)
    part = (slice(5, 21), slice(100, 101))
    np.testing.assert_array_equal(file.read(query, part).astype(np.float64), rows[part])
    assert file.read(query, (slice(3, 3), slice(None))).shape == (0, WIDTH)
    file.close()


def metadata(path, *adds):
    writer = gguf.GGUFWriter(path, "llama")
    for add in adds:
        add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_equals_that_of_the_package(tmp_path):
    path = metadata(
        tmp_path / "m.gguf",
        lambda w: w.add_uint8("a", 200),
        lambda w: w.add_int64("b", -(2**40)),
        lambda w: w.add_float64("c", 0.1),
        lambda w: w.add_bool("d", True),
        lambda w: w.add_string("e", "ü\n"),
        lambda w: w.add_array("f", ["x", "", "€"]),
        lambda w: w.add_array("g", [1, -2, 3]),
        lambda w: w.add_array("h", [0.5, 1.5]),
        lambda w: w.add_array("i", [True, False]),
    )
    ours, theirs = Metadata(path), gguf.GGUFReader(path)
    for key in "abcdefghi":
        value = ours.get(key)
        assert value == theirs.get_field(key).contents()
        assert type(value) is type(theirs.get_field(key).contents())
    assert ours.get("nothing", 7) == 7


def test_damaged_headers(tmp_path):
    path = metadata(
        tmp_path / "m.gguf",
        lambda w: w.add_string("key", "value"),
        lambda w: w.add_tensor("x", np.ones((4, 4), np.float32)),
    )
    good = path.read_bytes()

    def refuse(data, message):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            Metadata(path)
        assert f"{path} is not a readable GGUF file" in str(error.value)

    refuse(b"PK" + good[2:], "it starts with")
    refuse(good[:4] + (1).to_bytes(4, "little") + good[8:], "version 1; supported")
    refuse(good[:4] + (3).to_bytes(4, "big") + good[8:], "big-endian")
    refuse(good[:8] + (2**63).to_bytes(8, "little") + good[16:], "truncated")
    refuse(good[:16] + (2**40).to_bytes(8, "little") + good[24:], "truncated|unknown type|twice")
    at = good.index(b"value") - 8
    refuse(good[:at] + (2**50).to_bytes(8, "little") + good[at + 8 :], "truncated")
    refuse(good[:-40], "tensor x ends at byte .*: truncated")
    at = good.index(b"x", good.index(b"value") + 5) + 1
    refuse(good[:at] + (99).to_bytes(4, "little") + good[at + 4 :], "x has 99 axes")
    kind = at + 4 + 16
    refuse(good[:kind] + (77).to_bytes(4, "little") + good[kind + 4 :], "x has the unknown type 77")
    refuse(good[:kind] + (12).to_bytes(4, "little") + good[kind + 4 :], "no multiple of its type's")
