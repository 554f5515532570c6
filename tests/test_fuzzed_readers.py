"""Damaged files of every reader: a value, or a ValueError that says why; nothing else.

`JAXALIGN_FUZZ=10000` tries that many damaged files a reader instead of 200.
"""

import contextlib
import io
import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import save

from jaxalign.commands.report.runs import make_page, read_metrics
from jaxalign.commands.synth.journal import Appended, Journal
from jaxalign.data import Faults, read_examples, to_conversation
from jaxalign.hf import checksums
from jaxalign.hf.families import config_from_hf, is_scorer
from jaxalign.hf.gguf_header import Metadata
from jaxalign.hf.safetensors_file import SafetensorsFolder
from jaxalign.hf.source import read_json
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import read_yaml
from jaxalign.run.metrics import JsonlWriter
from jaxalign.run.record import read_record
from jaxalign.run.tasks.reference_cache import ReferenceCache

hypothesis = pytest.importorskip("hypothesis", reason="properties need hypothesis")
st = hypothesis.strategies

SNIPPETS = (
    b"", b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\r", b"\xe2\x80\xa8", b'"',
    b"\\", b"[", b"{", b"]", b"}", b",", b":", b"- ", b"&a ", b"*a", b"<<: *a", b"!!bool ",
    b"!!int ", b"!!float ", b"!!timestamp ", b"!!set ", b"!!python/name:os.system", b"? [a]\n: ",
    b"--- ", b"%YAML 9", b"null", b"true", b"-1", b"NaN", b"Infinity", b"1e999", b"9" * 400,
    b"9" * 5000, b"[" * 2000, b'{"a":' * 150, b"2026-13-99", b"1:2:3", b"\xff" * 8, b"\x00" * 8,
    b"\x09\x00\x00\x00" * 20,
)  # fmt: skip

ROWS = b"".join(
    json.dumps(row).encode() + b"\n"
    for row in (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": "q", "completion": "a", "margin": 1.5},
    )
)
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 100,
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "tie_word_embeddings": True,
    "layer_types": ["full_attention"] * 2,
}  # fmt: skip
RUN = b"""model: {source: some/model, lora: {rank: 4}}
data:
  train: [rows.jsonl]
  rows: 8
optimizer: {learning_rate: 1e-5, warmup_ratio: 0.1}
run: {folder: runs/x, steps: 10}
"""
METRICS = b'{"step": 1, "loss": 2.5, "grad_norm": "inf"}\n{"step": 2, "loss": 2.0}\n'
EVALUATION = {
    "step": 3,
    "objective": "pairs",
    "calibration": [{"predicted": 0.5, "observed": 0.5, "low": 0.4, "high": 0.6}],
    "histogram": {"edges": [0.0, 1.0, 2.0], "counts": {"chosen": [1, 2], "rejected": [2, 1]}},
    "sources": [{"source": "a", "accuracy": 0.5}],
}
REPLY = {"request": "a", "prompt": "h", "text": "t", "finish": "stop", "time": 1.0, "tokens": 3}
SUMS = {"algorithm": "xxh3_128", "files": {"a": {"bytes": 3, "sum": "0"}}}
ARRAYS = io.BytesIO()
np.savez(ARRAYS, keys=np.zeros((1, 2)), chosen=np.zeros(1), rejected=np.zeros(1))
RECORD = {"config": {"run": {"steps": 3}}, "config_sha256": "0", "starts": [{"step": 0}]}


def _string(text):
    return struct.pack("<Q", len(text)) + text


GGUF = (
    b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    + _string(b"general.architecture") + struct.pack("<I", 8) + _string(b"llama")
    + _string(b"tokens") + struct.pack("<IIQ", 9, 8, 2) + _string(b"a") + _string(b"b")
    + _string(b"w") + struct.pack("<IQIQ", 1, 4, 0, 0) + bytes(64)
)  # fmt: skip


def _rows(folder, raw):
    (folder / "a.jsonl").write_bytes(raw)
    faults = Faults("drop")
    return list(read_examples(folder / "a.jsonl", to_conversation, faults=faults))


def _yaml(folder, raw):
    (folder / "a.yaml").write_bytes(raw)
    read_yaml(folder / "a.yaml")
    return load_config("sft", folder / "a.yaml")


def _config(folder, raw):
    (folder / "config.json").write_bytes(raw)
    hf = read_json(folder / "config.json")
    return config_from_hf(hf), is_scorer(hf)


def _tensors(folder, raw, name="model.safetensors"):
    (folder / "config.json").write_text("{}")
    (folder / name).write_bytes(raw)
    SafetensorsFolder(folder).close()


def _index(folder, raw):
    _tensors(folder, raw, "model.safetensors.index.json")


def _gguf(folder, raw):
    (folder / "a.gguf").write_bytes(raw)
    return Metadata(folder / "a.gguf")


def _metrics(folder, raw):
    (folder / "metrics.jsonl").write_bytes(raw)
    return read_metrics(folder / "metrics.jsonl"), make_page(folder)


def _resumed(folder, raw):
    (folder / "metrics.jsonl").write_bytes(raw)
    JsonlWriter(folder / "metrics.jsonl", resume_at=1).close()


def _evaluation(folder, raw):
    (folder / "metrics.jsonl").write_bytes(METRICS)
    (folder / "evaluation.json").write_bytes(raw)
    return make_page(folder)


def _journal(folder, raw):
    (folder / "out.jsonl.journal").write_bytes(raw)
    with contextlib.closing(Journal(folder / "out.jsonl")):
        pass
    with contextlib.closing(Appended(folder / "out.jsonl.journal")):
        pass


def _record(folder, raw):
    (folder / "run.json").write_bytes(raw)
    return read_record(folder)


def _checksums(folder, raw):
    (folder / checksums.NAME).write_bytes(raw)
    (folder / "a").write_bytes(b"abc")
    return checksums.check(folder)


def _cache(folder, raw):
    (folder / "fingerprint.json").write_bytes(raw)
    (folder / "logps.npz").write_bytes(ARRAYS.getvalue())
    return ReferenceCache.load(folder, {"model": "a"})


def _arrays(folder, raw):
    (folder / "fingerprint.json").write_text('{"model": "a"}')
    (folder / "logps.npz").write_bytes(raw)
    return ReferenceCache.load(folder, {"model": "a"})


READERS = {
    "rows": (_rows, ROWS),
    "yaml": (_yaml, RUN),
    "config.json": (_config, json.dumps(CONFIG).encode()),
    "safetensors": (_tensors, save({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4)})),
    "index": (_index, b'{"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y.x"}}'),
    "gguf": (_gguf, GGUF),
    "metrics in a report": (_metrics, METRICS),
    "metrics at a resume": (_resumed, METRICS),
    "evaluation": (_evaluation, json.dumps(EVALUATION).encode()),
    "journal": (_journal, json.dumps(REPLY).encode() + b"\n"),
    "run.json": (_record, json.dumps(RECORD).encode()),
    "checksums": (_checksums, json.dumps(SUMS).encode()),
    "fingerprint": (_cache, b'{"model": "a"}'),
    "log-probabilities": (_arrays, ARRAYS.getvalue()),
}  # fmt: skip


@st.composite
def damaged(draw, raw):
    """A file with a few parts removed, doubled or replaced by something hostile."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        end = min(len(raw), start + draw(st.integers(0, 12)))
        put = draw(st.sampled_from(SNIPPETS) | st.just(raw[start:end] * 2) | st.binary(max_size=4))
        raw = raw[:start] + put + raw[end:]
    return raw


@pytest.mark.parametrize("name", READERS)
def test_a_value_or_a_clear_error(name, tmp_path):
    read, sound = READERS[name]
    if name != "index":  # which names weights that are not there
        read(tmp_path, sound)
    said = []

    @hypothesis.settings(
        max_examples=int(os.environ.get("JAXALIGN_FUZZ", "200")),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(damaged(sound))
    def check(raw):
        try:
            read(tmp_path, raw)
        except ValueError as error:
            said.append(str(error))

    check()
    assert all(said)
    # Those that give or count what is wrong rarely raise.
    assert said or name in ("checksums", "rows", "metrics at a resume", "evaluation")
