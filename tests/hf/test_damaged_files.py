"""Damaged and misnamed weight files are refused with name and reason; no pickle is opened."""

import json
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxalign.hf import load_pretrained
from jaxalign.hf.safetensors_file import SafetensorsFolder

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float32)
ENTRIES = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


DATA = A.tobytes() + B.tobytes()


def write(folder, header, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    start = size if isinstance(size, bytes) else size.to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(start + text + DATA)
    return folder


def test_written_file_is_read_back(folder):
    file = SafetensorsFolder(write(folder, ENTRIES))
    assert file.shapes == {"a": (2, 3), "b": (4,)}
    np.testing.assert_array_equal(file.read("a", (slice(1, 2), slice(1, 3))), A[1:2, 1:3])
    np.testing.assert_array_equal(file.read("b", (slice(None),)), B)
    file.close()


def change(**changes):
    """The header with another entry "b"."""
    return ENTRIES | {"b": ENTRIES["b"] | changes}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (change(data_offsets=[16, 32]), "b overlaps a: it starts at 16, wanted 24"),
        (change(data_offsets=[32, 48]), "b ends at byte 48 of the data, of which there are 40"),
        (change(data_offsets=[24, 36], shape=[3]), "end at byte 36 of the data"),
        (change(data_offsets=[24, 44]), "takes 16 bytes, its offsets 24 to 44 hold 20"),
        (change(data_offsets=[-8, 8]), "b holds no sizes and offsets"),
        (change(data_offsets=[24.0, 40]), "b holds no sizes and offsets"),
        (change(data_offsets=[24]), "entry b is"),
        (change(shape=[True, 4]), "b holds no sizes and offsets"),
        (change(shape=4), "b holds no sizes and offsets"),
        (change(dtype=["F32"]), "b holds no sizes and offsets"),
        (change(shape=[2, 3]), r"shape \[2, 3\] takes 24 bytes"),
        (ENTRIES | {"b": None}, "entry b is None"),
        ([1], "not a JSON object"),
        (b'{"a": 1', "its header is not JSON"),
        (b"\xff\xfe", "its header is not JSON"),
        (b'{"a": NaN}', "its header holds NaN"),
        (
            json.dumps(ENTRIES).replace('"b"', '"a"').encode(),
            "its header names a twice",
        ),
    ],
)
def test_headers(folder, header, message):
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(write(folder, header))
    assert f"{folder}/model.safetensors is not a readable safetensors file" in str(error.value)
    assert "get the file again" in str(error.value)


@pytest.mark.parametrize(
    "length",
    [
        pytest.param(10**6, id="longer than the file"),
        pytest.param((-1).to_bytes(8, "little", signed=True), id="negative"),
        pytest.param(np.float64("nan").tobytes(), id="NaN"),
        pytest.param(2**62, id="absurd"),
    ],
)
def test_header_lengths(folder, length):
    with pytest.raises(ValueError, match=r"its header would be \d+ bytes long, the file has \d+"):
        load_pretrained(write(folder, ENTRIES, length=length))


def test_truncated_files(folder):
    path = write(folder, ENTRIES) / "model.safetensors"
    whole = path.read_bytes()
    for size, message in (
        (len(whole) - 1, "b ends at byte 40 of the data, of which there are 39: truncated"),
        (len(whole) - 17, "of which there are 23: truncated"),
        (40, r"its header would be \d+ bytes long"),
        (5, "5 bytes are too few"),
        (0, "0 bytes are too few"),
    ):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=message):
            load_pretrained(folder)


class Trap:
    """Creates a file when unpickled."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("unpickled"),)


def test_pickles_are_named_and_never_opened(folder, monkeypatch):
    monkeypatch.chdir(folder)
    path = folder / "model.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="starts like a pickle, which is never opened"):
        load_pretrained(folder)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="it is a zip archive, as PyTorch pickles weights"):
        load_pretrained(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle weights only \(pytorch_model\.bin\)"):
        load_pretrained(folder)
    # The index may name any file; its content decides.
    index = {"weight_map": {"a": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a readable.*zip archive"):
        load_pretrained(folder)
    assert not (folder / "unpickled").exists()


def test_other_file_formats_are_recognised(folder):
    path = folder / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"Git LFS pointer.*git lfs pull"):
        load_pretrained(folder)
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match="it is a GGUF file"):
        load_pretrained(folder)


def test_swapped_shapes_are_named(folder):
    config = {
        "model_type": "llama", "vocab_size": 4, "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    layer = "model.layers.0."
    shapes = {f"{layer}self_attn.{n}_proj.weight": (8, 8) for n in "qkvo"}
    shapes |= {f"{layer}mlp.gate_proj.weight": (12, 8), f"{layer}mlp.up_proj.weight": (8, 12)}
    shapes |= {f"{layer}mlp.down_proj.weight": (8, 12), "model.embed_tokens.weight": (4, 8)}
    norms = (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "model.norm")
    shapes |= {f"{name}.weight": (8,) for name in norms}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: np.ones(s, np.float32) for n, s in shapes.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit") as error:
        load_pretrained(folder)
    message = f"wrong shape: {layer}mlp.up_proj.weight (8, 12), wanted (12, 8). Check that"
    assert message in str(error.value)
    assert "unexpected" not in str(error.value)
    assert "missing" not in str(error.value)
