"""Model files that lie: one clear error before time or memory is spent."""

import json
import math
import os
import struct

import pytest

from jaxalign.hf import gguf_header, load_pretrained
from jaxalign.hf.families import attributes_of, config_from_hf, is_scorer
from jaxalign.hf.gguf_header import Metadata
from jaxalign.hf.safetensors_file import SafetensorsFolder
from jaxalign.hf.source import read_json

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
WRONG = (2**40, 10**300, -1, math.inf, math.nan, "x", [], ["llama"], {}, {"a": [1]}, True, 1.5)


# --- GGUF ----------------------------------------------------------------------------------------

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: u64 lengths, u32 kinds; 8 is a string,
# 9 an array, 0 a byte.


def text(value, size=None):
    return struct.pack("<Q", len(value) if size is None else size) + value


def gguf(body, values=1, tensors=0):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + text(b"key") + body


def array(kind, count, content=b""):
    return struct.pack("<IIQ", 9, kind, count) + content


NESTED = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 20_000


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (gguf(NESTED), r"5 within each other; wanted at most 16777216 and 4; get the file again"),
        (gguf(struct.pack("<I", 8) + text(b"x" * 101)), "a string of 101 bytes at .* at most 100"),
        (gguf(struct.pack("<I", 8) + text(b"", 2**63)), "a string of 9223372036854775808 bytes"),
        (gguf(array(0, 2**63)), "an array of 9223372036854775808 values in a file of"),
        (gguf(b"", tensors=2**64 - 1), "18446744073709551615 tensors, wanted at most 1048576"),
        (gguf(b"", values=2**64 - 1), "truncated"),
        (gguf(struct.pack("<I", 77)), "unknown type 77"),
    ],
)
def test_gguf(tmp_path, monkeypatch, raw, message):
    monkeypatch.setattr(gguf_header, "MAX_STRING", 100)
    (tmp_path / "a.gguf").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        Metadata(tmp_path / "a.gguf")


def test_elements_of_all_arrays_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_header, "MAX_VALUES", 10)
    file = tmp_path / "a.gguf"
    bytes_of = array(0, 6, b"123456")
    file.write_bytes(gguf(bytes_of))
    assert Metadata(file).get("key") == list(b"123456")
    file.write_bytes(gguf(bytes_of + text(b"other") + bytes_of, values=2))
    with pytest.raises(ValueError, match="arrays of 12 values, 1 within each other"):
        Metadata(file)


def test_a_sparse_file_takes_no_memory(tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(gguf(array(0, 2**31)))
    os.truncate(file, 2**32)
    with pytest.raises(ValueError, match="arrays of 2147483648 values"):
        Metadata(file)


# --- safetensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{" + ", ".join(f'"{n % 90_000}": 0' for n in range(180_000)) + "}", "0, 1, 10 and 89997"),
        ('{"a": {"dtype": "F32", "shape": [' + "9," * 500_000 + '9], "data_offsets": [0, 4]}}',
         "a has 500001 axes, wanted at most 64"),
        ("[" * 100_000, "its header is not JSON"),
        ('{"a": ' * 101 + "1" + "}" * 101, "nested more than 100 deep"),
        ('{"a": ' + "9" * 5000 + "}", "not a readable safetensors file"),
        ('{"a": "' + "x" * 5000 + '"}', "its header's entry a is 'x{199}, wanted dtype"),
    ],
)  # fmt: skip
def test_safetensors(tmp_path, header, message):
    (tmp_path / "config.json").write_text("{}")
    raw = header.encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(ValueError, match=message) as caught:
        SafetensorsFolder(tmp_path)
    assert len(str(caught.value)) < 1000


# --- config.json ---------------------------------------------------------------------------------


KEYS = (
    *LLAMA, "rope_scaling", "layer_types", "sliding_window", "num_labels", "id2label", "head_dim",
    "quantization_config", "hidden_act", "tie_word_embeddings", "rms_norm_eps",
)  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("read", [config_from_hf, is_scorer, attributes_of])
def test_wrong_values_in_config_json(read, key):
    """Whatever stands in a key: a config, or a ValueError that names the file."""
    for value in WRONG:
        try:
            read(LLAMA | {key: value})
            said = "config.json: "
        except ValueError as error:
            said = str(error)
        assert "config.json: " in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2**40}, "num_hidden_layers=1099511627776 is not supported.*at most"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\] is not supported"),
        (
            {"hidden_act": ["silu"]},
            "a value is of the wrong kind .*get the file again",
        ),
        ({"layer_types": 3}, "config.json: a value is of the wrong kind"),
    ],
)
def test_config_json_says_why(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(LLAMA | changes)


def test_scorers_with_too_many_outputs():
    with pytest.raises(ValueError, match=r"num_labels=1099511627776 is not supp.*at most 10000"):
        attributes_of(LLAMA | {"num_labels": 2**40})


@pytest.mark.parametrize("raw", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", b"\xff", "{", ""])
def test_json_that_is_none(tmp_path, raw):
    file = tmp_path / "config.json"
    file.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON: "):
        read_json(file)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_folders_with_a_pipe_or_a_device_are_refused(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a named pipe, wanted a file; write"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{name} is a named pipe"):
        load_pretrained(tmp_path / name)
