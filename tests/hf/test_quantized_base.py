"""Files read straight into a quantised base: the same values, one matrix in floats at a time."""

import json

import families
import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import jaxalign
from jaxalign.hf import quantized_base
from jaxalign.hf.families import config_from_hf, flatten
from jaxalign.hf.quantized_base import quantize_params, with_quantized_base
from jaxalign.models.decoder import Decoder
from jaxalign.models.quantized import QUANTIZED, is_quantized
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.run.export import import_model

pytest.importorskip("qwix", reason="a quantised base needs qwix")


@pytest.fixture(scope="module", params=["llama", "phi3", "gpt2", "qwen3_moe"])
def folder(request, tmp_path_factory):
    """A model with tensors transposed or not, fused, and of experts."""
    kind = request.param
    path = tmp_path_factory.mktemp("models") / kind
    model = Decoder(config_from_hf({"model_type": kind, **families.keys(kind)}))
    jaxalign.save_pretrained(model, tiny.random_params(model), path)
    return path


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("devices", [1, 8])
def test_what_is_read_is_what_floats_become(folder, kind, devices, monkeypatch):
    mesh = None if devices == 1 else make_mesh(data=2, fsdp=4, tensor=1)
    model, floats = jaxalign.load_pretrained(folder)
    wanted = with_quantized_base(model, kind)
    want = flatten(quantize_params(floats, wanted))
    read, whole = [], quantized_base.load_leaf

    def spying(source, leaf, dtype, sharding, pool):
        read.append(leaf.shape)
        return whole(source, leaf, dtype, sharding, pool)

    monkeypatch.setattr(quantized_base, "load_leaf", spying)
    got_model, params = jaxalign.load_pretrained(folder, mesh=mesh, quantize=kind)
    assert got_model == wanted
    got = flatten(params)
    assert got.keys() == want.keys()
    for path, value in got.items():
        np.testing.assert_array_equal(value, want[path], path)
    # Never more than one layer's matrix, or one expert's.
    matrices = [x.size // (x.shape[-2] * x.shape[-1]) for x in _matrices(floats["blocks"], params)]
    assert {len(shape) for shape in read} == {2}
    assert len(read) == sum(matrices)
    if mesh is not None:
        layout = flatten(param_shardings(wanted.axes, mesh, wanted.shapes))
        assert {path: x.sharding for path, x in got.items()} == layout


def _matrices(floats, params):
    flat = flatten({"blocks": floats})
    return [x for path, x in flat.items() if is_quantized(_at(params, path))]


def _at(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def test_a_source_in_half_precision_is_quantised_as_it_is(chat_models, tmp_path):
    model, params = jaxalign.load_pretrained(chat_models / "chat")
    jaxalign.save_pretrained(model, params, tmp_path / "half", dtype="bfloat16")
    stored = load_file(tmp_path / "half/model.safetensors")
    assert {str(x.dtype) for x in stored.values()} == {"bfloat16"}
    _, halves = jaxalign.load_pretrained(tmp_path / "half")
    quantised, got = jaxalign.load_pretrained(tmp_path / "half", quantize="nf4", dtype="bfloat16")
    want = quantize_params(halves, quantised)["blocks"]["mlp"]
    jax.tree.map(np.testing.assert_array_equal, got["blocks"]["mlp"], want)
    assert got["embed"]["embedding"].dtype == "bfloat16"
    assert got["blocks"]["mlp"]["up"]["kernel"]["scales"].dtype == np.float32


def test_what_cannot_be_read_matrix_by_matrix_is_refused(chat_models, tmp_path):
    with pytest.raises(ValueError, match="quantize='int4': wanted one of"):
        jaxalign.load_pretrained(chat_models / "chat", quantize="int4")
    import_model(str(chat_models / "chat"), str(tmp_path / "orbax"))
    with pytest.raises(ValueError, match=r"Orbax folder.*jaxalign export … --to hf"):
        jaxalign.load_pretrained(tmp_path / "orbax", quantize="nf4")
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(chat_models / "chat")}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is an adapter, .*jaxalign export"):
        jaxalign.load_pretrained(tmp_path / "adapter", quantize="nf4")


def test_an_adapter_goes_on_a_quantised_base(chat_models, tmp_path):
    """PEFT's folder names the base; it says nothing of how that is kept."""
    model, params = jaxalign.load_pretrained(chat_models / "chat")
    config = jaxalign.LoraConfig(rank=2, targets=("query", "down"))
    adapted, trained, frozen = jaxalign.add_lora(model, params, jax.random.key(0), config)
    trained = jax.tree.map(lambda x: x + 0.1, trained)
    together = jaxalign.combine(trained, frozen)
    jaxalign.save_adapter(adapted, together, tmp_path / "adapter", base=str(chat_models / "chat"))
    base, params = jaxalign.load_pretrained(chat_models / "chat", quantize="nf4")
    over, read, kept = jaxalign.load_adapter(base, params, tmp_path / "adapter")
    assert over.quantize == "nf4"
    jax.tree.map(np.testing.assert_array_equal, read, trained)
    jaxalign.save_adapter(
        over, jaxalign.combine(read, kept), tmp_path / "again", base=str(chat_models / "chat")
    )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (
            tmp_path / "adapter" / name
        ).read_bytes()
