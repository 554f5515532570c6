"""Saving: dtypes, which process writes which file, and atomic replacement of the folder."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from jaxalign.hf import blocks, load_pretrained, save_pretrained
from jaxalign.hf.families.table import Tensor
from jaxalign.hf.safetensors_write import Planned, index_of, plan_files
from jaxalign.models.base import DecoderConfig
from jaxalign.models.decoder import Decoder
from jaxalign.parallel.mesh import make_mesh

TESTS = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(tiny.DECODER, seed=7)


def stored(folder):
    return {
        name: value
        for path in sorted(pathlib.Path(folder).glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


# --- dtypes --------------------------------------------------------------------------------------


def test_the_sources_dtypes_come_back_tensor_by_tensor(params, tmp_path):
    save_pretrained(tiny.DECODER, params, tmp_path / "start", dtype="bfloat16")
    mixed = stored(tmp_path / "start")
    assert {value.dtype.name for value in mixed.values()} == {"bfloat16"}
    mixed["model.norm.weight"] = mixed["model.norm.weight"].astype(np.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    mixed[name] = mixed[name].astype(np.float16)
    save_file(mixed, tmp_path / "start/model.safetensors", metadata={"format": "pt"})
    for dtype in ("float32", "source"):
        model, loaded = load_pretrained(tmp_path / "start", dtype=dtype)
        save_pretrained(model, loaded, tmp_path / dtype, dtype="source")
        again = stored(tmp_path / dtype)
        assert again.keys() == mixed.keys()
        for key, value in mixed.items():
            assert again[key].dtype == value.dtype, key
            if dtype == "float32" or key != name:  # its layers share one array
                assert again[key].tobytes() == value.tobytes(), key
        config = json.loads((tmp_path / dtype / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
        assert not [key for key in config if key.startswith("_")]
    assert loaded["norm"]["scale"].dtype == jnp.float32
    assert loaded["embed"]["embedding"].dtype == jnp.bfloat16


def test_initialised_model_has_no_source_dtype(params, tmp_path):
    with pytest.raises(ValueError, match=r"not loaded from a checkpoint; name one of float32"):
        save_pretrained(tiny.DECODER, params, tmp_path / "out", dtype="source")
    with pytest.raises(ValueError, match="dtype=int8"):
        save_pretrained(tiny.DECODER, params, tmp_path / "out", dtype="int8")
    assert not list(tmp_path.iterdir())


def test_values_beyond_a_dtype_are_refused_on_save_and_load(params, tmp_path):
    huge = params | {"norm": {"scale": params["norm"]["scale"].at[3].set(1e5)}}
    message = r"model\.norm\.weight holds values that float16 cannot"
    with pytest.raises(ValueError, match=f"{message}; save it as bfloat16 or float32"):
        save_pretrained(tiny.DECODER, huge, tmp_path / "half", dtype="float16")
    assert not list(tmp_path.iterdir())
    save_pretrained(tiny.DECODER, huge, tmp_path / "whole")
    with pytest.raises(ValueError, match=f"whole: {message}; load it as"):
        load_pretrained(tmp_path / "whole", dtype="float16")
    infinite = params | {"norm": {"scale": params["norm"]["scale"].at[3].set(jnp.inf)}}
    save_pretrained(tiny.DECODER, infinite, tmp_path / "inf", dtype="float16")
    assert np.isinf(stored(tmp_path / "inf")["model.norm.weight"][3])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("to", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32", "float64"])
def test_copies_convert_as_numpy_does(source, to, turned):
    values = np.random.default_rng(0).standard_normal((3, 37, 50)).astype(ml_dtypes.bfloat16)
    values = values.astype(source)
    target = np.zeros((3, 50, 37) if turned else values.shape, to)
    assert blocks.copy(target, values.swapaxes(-1, -2) if turned else values)
    expected = values.astype(to)
    np.testing.assert_array_equal(target, expected.swapaxes(-1, -2) if turned else expected)


# --- memory --------------------------------------------------------------------------------------


def test_host_memory_is_bounded_by_local_shards(tmp_path, monkeypatch):
    """Peak numpy memory while 8 devices get their shards, which on CPUs are that memory."""
    config = DecoderConfig(
        vocab_size=512, hidden_size=256, intermediate_size=768, num_layers=6, num_heads=8,
        num_kv_heads=8, head_dim=32, tie_embeddings=True,
    )  # fmt: skip
    model = Decoder(config)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.shapes)
    save_pretrained(model, zeros, tmp_path / "m", max_shard_bytes=3_000_000)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(zeros))
    largest = 256 * 768 * 4  # a matrix of the MLP
    monkeypatch.setattr(blocks, "PIECE", 1 << 16)
    tracemalloc.start()
    try:
        _, loaded = load_pretrained(tmp_path / "m", mesh=make_mesh(1, 8, 1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total < peak < total + 1.3 * largest
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(loaded)) == total


# --- several processes ---------------------------------------------------------------------------


def planned(*sizes):
    kind = np.dtype(np.float32)
    return [Planned(Tensor(f"t{i}", (size,), ()), kind) for i, size in enumerate(sizes)]


def test_files_are_assigned_round_robin():
    files = plan_files(planned(10, 10, 30, 5, 5, 10), 80, processes=2)
    assert [[p.tensor.name for p in file.tensors] for file in files] == [
        ["t0", "t1"],
        ["t2"],  # larger than the limit: a file to itself
        ["t3", "t4", "t5"],
    ]
    assert [file.owner for file in files] == [0, 1, 0]
    assert [file.name for file in files] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    index = index_of(files)
    assert index["metadata"] == {"total_size": 280}
    assert index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"
    # Every process computes the same plan.
    for count in (1, 3, 8):
        other = plan_files(planned(10, 10, 30, 5, 5, 10), 80, processes=count)
        assert [file[:2] for file in other] == [file[:2] for file in files]
        assert [file.owner for file in other] == [i % count for i in range(3)]
    (single,) = plan_files(planned(10, 10), 80, processes=4)
    assert (single.name, single.owner, index_of([single])) == ("model.safetensors", 0, None)


# --- killed --------------------------------------------------------------------------------------

KILLED = """
import sys, time
import tiny
from jaxalign.hf import safetensors_write
from jaxalign.hf import save as hf_save
class Slow(safetensors_write.Writer):
    def write(self, planned, blocks):
        super().write(planned, blocks)
        if planned.tensor.name == "model.norm.weight":
            print("half", flush=True)
            time.sleep(3600)
hf_save.Writer = Slow
hf_save.save_pretrained(tiny.DECODER, tiny.random_params(tiny.DECODER), sys.argv[1])
"""


@pytest.mark.parametrize("there", [False, True])
def test_killed_save_leaves_no_partial_folder(params, tmp_path, there):
    out = tmp_path / "place/out"
    before = None
    if there:
        save_pretrained(tiny.DECODER, params, out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    left = [path for path in out.parent.iterdir() if path != out]
    assert len(left) == 1
    assert left[0].name.startswith(".out.")
    assert (left[0] / "model.safetensors").stat().st_size > 0  # it was killed while writing
    if there:
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    else:
        assert not out.exists()
    save_pretrained(tiny.DECODER, params, out)  # the temporary folder is no obstacle
    assert stored(out)
