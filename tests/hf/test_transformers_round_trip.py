"""Round trips with transformers: load its weights, save a folder, compare logits."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from jaxalign.hf import load_pretrained, load_tokenizer, save_pretrained
from jaxalign.models.scorer import with_scalar_head
from jaxalign.parallel.mesh import make_mesh

torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

LLAMAS = {
    "plain": {"num_key_value_heads": 4},
    "gqa": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3_rope": {"rope_parameters": LLAMA3},
    "tied_linear_rope": {"rope_parameters": LINEAR, "tie_word_embeddings": True},
    "wide_heads": {"head_dim": 16, "attention_bias": True, "num_key_value_heads": 1},
}
CASES = [*LLAMAS, "qwen2"]


def hf_config(case):
    if case == "qwen2":
        return transformers.Qwen2Config(**SMALL)
    return transformers.LlamaConfig(**SMALL | LLAMAS[case])


def randomised(model):
    """Random parameters, biases and norms included, so that an omitted one changes the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """case → folder of a saved transformers model, made once."""
    made = {}

    def get(case):
        if case not in made:
            model = randomised(transformers.AutoModelForCausalLM.from_config(hf_config(case)))
            folder = tmp_path_factory.mktemp(case)
            model.save_pretrained(folder)
            made[case] = folder, model
        return made[case]

    return get


TOKENS = np.random.default_rng(0).integers(3, 96, (2, 24)).astype(np.int32)


def torch_logits(model, tokens, mask=None):
    with torch.no_grad():
        ids = torch.tensor(tokens, dtype=torch.long)
        mask = None if mask is None else torch.tensor(mask, dtype=torch.long)
        return model(input_ids=ids, attention_mask=mask).logits.numpy()


def our_logits(model, params, tokens, segment_ids=None):
    return np.asarray(model.logits(params, model.apply(params, tokens, None, segment_ids)))


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def assert_same_bytes(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert tensor.tobytes() == right[name].tobytes(), name


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_and_survive_a_round_trip(case, folders, tmp_path):
    folder, reference = folders(case)
    model, params = load_pretrained(folder)
    expected = torch_logits(reference, TOKENS)
    assert np.abs(expected).max() > 0.5  # otherwise a tolerance of 1e-4 shows nothing
    np.testing.assert_allclose(our_logits(model, params, TOKENS), expected, atol=1e-4, rtol=0)

    save_pretrained(model, params, tmp_path / "out")
    assert_same_bytes(tensors(folder), tensors(tmp_path / "out"))
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    np.testing.assert_allclose(torch_logits(again, TOKENS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["gqa", "llama3_rope"])
def test_right_padding_and_packing(case, folders):
    folder, reference = folders(case)
    model, params = load_pretrained(folder)
    mask = np.ones((2, 24), np.int32)
    mask[0, 17:] = 0
    expected = torch_logits(reference, TOKENS, mask)
    got = our_logits(model, params, TOKENS, segment_ids=mask)
    np.testing.assert_allclose(got[mask > 0], expected[mask > 0], atol=1e-4, rtol=0)

    # Two documents in one row give the same logits as alone.
    positions = np.concatenate([np.arange(10), np.arange(14)])[None].astype(np.int32)
    segments = np.repeat([1, 2], [10, 14])[None].astype(np.int32)
    hidden = model.apply(params, TOKENS[:1], positions, segments)
    packed = np.asarray(model.logits(params, hidden))[0]
    for part in (slice(0, 10), slice(10, 24)):
        alone = torch_logits(reference, TOKENS[:1, part])[0]
        np.testing.assert_allclose(packed[part], alone, atol=1e-4, rtol=0)


def test_sharded_bf16_source_on_a_mesh(folders, tmp_path):
    _, reference = folders("gqa")
    source = tmp_path / "source"
    copy.deepcopy(reference).to(torch.bfloat16).save_pretrained(source, max_shard_size="20KB")
    reference = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert len(list(source.glob("*.safetensors"))) > 2

    model, params = load_pretrained(source)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    _, sharded = load_pretrained(source, mesh=mesh)
    kernel = sharded["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 16, 24)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, sharded
    )
    with jax.set_mesh(mesh):
        logits = jax.jit(lambda p, x: model.logits(p, model.apply(p, x)))(sharded, TOKENS)
    expected = torch_logits(reference, TOKENS)
    np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-4, rtol=0)

    # bf16 in, bf16 out: loaded as such from the mesh, or rounded back from float32.
    _, narrow = load_pretrained(source, mesh=mesh, dtype=jnp.bfloat16)
    save_pretrained(model, narrow, tmp_path / "narrow", max_shard_bytes=20_000)
    save_pretrained(model, params, tmp_path / "wide", dtype=jnp.bfloat16)
    assert len(list((tmp_path / "narrow").glob("*.safetensors"))) > 2
    for name in ("narrow", "wide"):
        assert_same_bytes(tensors(source), tensors(tmp_path / name))
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
    assert again.dtype == torch.bfloat16


def test_sequence_classification_round_trip(tmp_path):
    config = hf_config("gqa")
    config.num_labels = 1
    reference = randomised(transformers.AutoModelForSequenceClassification.from_config(config))
    reference.save_pretrained(tmp_path / "source")
    model, params = load_pretrained(tmp_path / "source")
    mask = np.ones((2, 24), np.int32)
    mask[1, 15:] = 0
    tokens = np.where(mask > 0, TOKENS, 0)
    scores = np.asarray(model.scores(params, model.apply(params, tokens, None, mask)))
    expected = torch_logits(reference, tokens, mask)[:, 0]
    np.testing.assert_allclose(scores[[0, 1], [23, 14]], expected, atol=1e-5, rtol=1e-5)

    save_pretrained(model, params, tmp_path / "out")
    assert_same_bytes(tensors(tmp_path / "source"), tensors(tmp_path / "out"))
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.config.num_labels == 1
    np.testing.assert_allclose(torch_logits(again, tokens, mask)[:, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["tied_linear_rope", "qwen2"])
def test_fresh_scalar_head_exports(case, folders, tmp_path):
    folder, _ = folders(case)
    scorer, params = with_scalar_head(*load_pretrained(folder), jax.random.key(0))
    save_pretrained(scorer, params, tmp_path / "out")
    reference, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = torch_logits(reference, TOKENS)[:, 0]
    scores = np.asarray(scorer.scores(params, scorer.apply(params, TOKENS)))[:, -1]
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)


def test_scorer_with_attributes_round_trip(folders, tmp_path):
    folder, _ = folders("tied_linear_rope")
    names = ("helpfulness", "verbosity", "tact")
    scorer, params = with_scalar_head(*load_pretrained(folder), jax.random.key(0), names)
    save_pretrained(scorer, params, tmp_path / "out")
    reference, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert reference.config.id2label == dict(enumerate(names))
    assert reference.config.problem_type == "regression"
    outputs = np.asarray(scorer.outputs(params, scorer.apply(params, TOKENS)))[:, -1]
    np.testing.assert_allclose(outputs, torch_logits(reference, TOKENS), atol=1e-5, rtol=0)
    again, weights = load_pretrained(tmp_path / "out")
    assert again.attributes == names
    np.testing.assert_array_equal(weights["score"]["kernel"], params["score"]["kernel"])


def test_token_ids_and_chat_template_are_exported(shared, folders, tmp_path):
    folder, _ = folders("gqa")
    tokenizer = load_tokenizer(shared / "data/stories260K/hf")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model, params = load_pretrained(folder)
    with pytest.raises(ValueError, match=r"512 tokens.*96"):
        save_pretrained(model, params, tmp_path / "out", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []  # no partial folder

    folder = shared / "data/stories260K/hf"
    model, params = load_pretrained(folder)
    save_pretrained(model, params, tmp_path / "out", tokenizer=tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("Once upon a time").input_ids == tokenizer("Once upon a time").input_ids
    assert again.chat_template == tokenizer.chat_template
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reference.config.pad_token_id == again.pad_token_id == 0
    assert reference.generation_config.eos_token_id == 2
    assert reference.generation_config.pad_token_id == 0


def test_stories260k_exports_the_same_logits(shared, tmp_path):
    golden = np.load(shared / "data/stories260K/golden.npz")
    ids, expected = golden["input_ids"], golden["logits"]
    save_pretrained(*load_pretrained(shared / "data/stories260K/hf"), tmp_path / "out")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(torch_logits(reference, ids[None])[0], expected, atol=1e-4, rtol=0)
    source = transformers.AutoModelForCausalLM.from_pretrained(shared / "data/stories260K/hf")
    got, origin = torch_logits(reference, ids[None]), torch_logits(source, ids[None])
    np.testing.assert_allclose(got, origin, atol=1e-5, rtol=0)
