"""PEFT's folders without torch: golden logits, files there and back, and what is refused."""

import functools
import json

import golden_peft
import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from jaxalign.hf import load_adapter, load_pretrained, save_adapter, save_pretrained
from jaxalign.hf.source import base_of
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import LoraConfig, add_lora
from jaxalign.parallel.mesh import make_mesh

GOLDEN = np.load(golden_peft.FILE)
BASES = json.loads(str(np.load(golden_peft.golden_families.FILE)["shapes"]))
SHAPES, CONFIGS = (json.loads(str(GOLDEN[name])) for name in ("shapes", "configs"))


@functools.lru_cache(maxsize=64)
def compiled(model):
    return jax.jit(lambda params, ids: model.logits(params, model.apply(params, ids)))


def logits(adapted):
    model, trained, frozen = adapted
    return compiled(model)(combine(trained, frozen), GOLDEN["tokens"])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            golden_peft.golden_families.write(folder, kind, BASES[kind])
            made[kind] = folder, *load_pretrained(folder)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", golden_peft.KINDS)
def test_golden_logits(kind, bases, tmp_path):
    folder, model, params = bases(kind)
    golden_peft.write(tmp_path / "read", CONFIGS[kind], SHAPES[kind])
    adapted = load_adapter(model, params, tmp_path / "read")
    got = logits(adapted)
    np.testing.assert_allclose(got, GOLDEN[kind], atol=2e-5, rtol=0)
    plain = compiled(model)(params, GOLDEN["tokens"])
    assert np.abs(plain - GOLDEN[kind]).max() > 0.05
    # Written and read again, with the base that the files name.
    together = combine(adapted.trained, adapted.frozen)
    save_adapter(adapted.model, together, tmp_path / "written", base=str(folder))
    again = logits(load_adapter(model, params, tmp_path / "written"))
    np.testing.assert_allclose(again, got, atol=2e-5, rtol=0)
    merged, whole = load_pretrained(tmp_path / "written")
    got = compiled(merged)(whole, GOLDEN["tokens"])
    np.testing.assert_allclose(got, GOLDEN[kind], atol=3e-5, rtol=0)


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2"])
def test_tensors_survive_a_round_trip(kind, bases, tmp_path):
    """Modules of one matrix come back byte for byte, and the names are PEFT's."""
    _, model, params = bases(kind)
    golden_peft.write(tmp_path / "read", CONFIGS[kind], SHAPES[kind])
    adapted = load_adapter(model, params, tmp_path / "read")
    save_adapter(adapted.model, combine(adapted.trained, adapted.frozen), tmp_path / "written")
    before, after = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("read", "written")
    )
    assert before.keys() == after.keys()
    for name in before:
        if "c_attn" not in name:
            np.testing.assert_array_equal(before[name].reshape(-1), after[name].reshape(-1), name)
    written = json.loads((tmp_path / "written/adapter_config.json").read_text())
    for key in ("peft_type", "task_type", "use_rslora", "use_dora", "fan_in_fan_out", "bias"):
        assert written[key] == CONFIGS[kind][key], key
    assert written["base_model_name_or_path"] is None


# --- a small Llama -------------------------------------------------------------------------------

CONFIG = LoraConfig(rank=3, alpha=6.0, targets=("query", "down"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder of the base, folder of the adapter, model, parameters)."""
    folder = tmp_path_factory.mktemp("llama")
    model = Decoder(tiny.CONFIG)
    save_pretrained(model, tiny.random_params(model), folder / "base")
    model, params = load_pretrained(folder / "base")
    adapted, trained, frozen = add_lora(model, params, jax.random.key(0), CONFIG)
    base = str(folder / "base")
    save_adapter(adapted, combine(trained, frozen), folder / "adapter", base=base)
    return folder / "base", folder / "adapter", model, params


def changed(written, tmp_path, config=None, tensors=None):
    """A copy of the adapter with other files."""
    source, target = written[1], tmp_path / "changed"
    target.mkdir()
    text = json.loads((source / "adapter_config.json").read_text()) | (config or {})
    (target / "adapter_config.json").write_text(json.dumps(text))
    loaded = load_file(source / "adapter_model.safetensors")
    save_file(loaded if tensors is None else tensors(loaded), target / "adapter_model.safetensors")
    return target


def test_the_files_are_those_of_peft(written):
    config = json.loads((written[1] / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(written[0]),
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    tensors = load_file(written[1] / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    assert tensors[f"{name}A.weight"].shape == (3, 48)
    assert tensors[f"{name}B.weight"].shape == (32, 3)
    assert len(tensors) == 2 * 2 * 2


def test_the_options_come_back(written):
    adapted = load_adapter(*written[2:], written[1])
    assert adapted.model.lora == LoraConfig(
        rank=3, alpha=6.0, targets=("query", "down"), init="peft"
    )
    assert set(adapted.frozen) == set(written[3])


def test_it_lies_on_the_bases_mesh(written):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    model, params = load_pretrained(written[0], mesh=mesh)
    adapted, trained, frozen = load_adapter(model, params, written[1])
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(trained))
    single = load_adapter(*written[2:], written[1])
    np.testing.assert_allclose(
        compiled(adapted)(combine(trained, frozen), GOLDEN["tokens"]), logits(single), 0, 1e-5
    )


def without(ending):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(ending)}


@pytest.mark.parametrize(
    ("config", "tensors", "told"),
    [
        ({"peft_type": "LOHA"}, None, "peft_type='LOHA' is not supported"),
        ({"lora_bias": True}, None, "lora_bias=True .adapters with a bias. is not supported"),
        ({"bias": "all"}, None, "bias='all' is not supported"),
        ({"init_lora_weights": "olora"}, None, "init_lora_weights='olora' changes the base"),
        ({"trainable_token_indices": [1]}, None, "trainable_token_indices.*single trained tokens"),
        ({"r": "many"}, None, "r='many': wanted a positive number"),
        ({"target_modules": "(q_proj"}, None, "'.q_proj' is no regular expression"),
        ({"alpha_pattern": {"q_proj": "high"}}, None, "alpha_pattern=.*an object of positive num"),
        ({"modules_to_save": "score"}, None, "modules_to_save='score': wanted names"),
        ({"layers_to_transform": ["0"]}, None, "layers_to_transform=.'0'.: wanted numbers"),
        ({}, without("1.mlp.down_proj.lora_B.weight"),
         "B of model.layers.1.mlp.down_proj is missing, wanted .32, 3."),
        ({"target_modules": ["q_proj", "k_proj"]}, None,
         "it has nothing for model.layers.0.self_attn.k_proj, which its target_modules choose"),
        ({}, lambda t: {k.replace("layers.1", "layers.2"): v for k, v in t.items()},
         "model.layers.2.mlp.down_proj is no module of it"),
        ({}, lambda t: {k: v[:, :16].copy() if "q_proj.lora_A" in k else v for k, v in t.items()},
         "A of model.layers.0.self_attn.q_proj has the shape .3, 16., wanted .3, 32."),
        ({}, lambda t: t | {"base_model.model.model.elbow.weight": np.ones(3, np.float32)},
         "model.elbow.weight is no tensor of it"),
        ({}, lambda t: t | {"base_model.model.model.embed_tokens.weight":
                            np.ones((70, 32), np.float32)},
         "its embedding or head has 70 rows, the base has 64, and only one of the two"),
        ({}, lambda t: t | {"base_model.model.model.layers.0.input_layernorm.weight":
                            np.ones(32, np.float32)},
         "layers.0.input_layernorm.weight is trained whole and model.layers.1.* is not"),
        ({}, lambda t: {"x": np.ones(3, np.float32)}, "x is no tensor of it"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(written, tmp_path, config, tensors, told):
    folder = changed(written, tmp_path, config, tensors)
    with pytest.raises(ValueError, match=told) as caught:
        load_adapter(*written[2:], folder)
    assert str(folder) in str(caught.value)


def test_a_resized_embedding_brings_its_rows(written, tmp_path):
    rng = np.random.default_rng(0)
    more = {
        f"base_model.model.{name}.weight": rng.normal(size=(70, 32)).astype(np.float32)
        for name in ("model.embed_tokens", "lm_head")
    }
    folder = changed(written, tmp_path, None, lambda tensors: tensors | more)
    model, trained, frozen = load_adapter(*written[2:], folder)
    assert model.config.vocab_size == 70
    assert trained["head"]["kernel"].shape == (32, 70)
    assert "embedding" not in frozen.get("embed", {})
    got = compiled(model)(combine(trained, frozen), np.array([[69, 3]]))
    assert got.shape == (1, 2, 70)


def test_a_base_that_is_no_base(written, tmp_path):
    folder = changed(written, tmp_path, {"base_model_name_or_path": str(written[1])})
    with pytest.raises(ValueError, match="is an adapter itself; merge that first"):
        load_pretrained(folder)
    again, _ = load_pretrained(folder, base=written[0])
    assert again == load_pretrained(written[0])[0]
    with pytest.raises(ValueError, match=r"base='x': wanted none, since .* is a whole model"):
        load_pretrained(written[0], base="x")


def test_what_cannot_be_written_is_refused(written, tmp_path, bases):
    _, adapter, model, params = written
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(model, params, tmp_path / "out")
    adapted, trained, frozen = load_adapter(model, params, adapter)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        save_adapter(adapted, combine(trained, frozen), tmp_path / "full")
    with pytest.raises(ValueError, match="already has adapters"):
        load_adapter(adapted, combine(trained, frozen), adapter)
    _, model, params = bases("qwen3_moe")
    adapted, trained, frozen = add_lora(model, params, jax.random.key(0), LoraConfig(rank=2))
    with pytest.raises(ValueError, match=r"no form for adapters of experts, such as .*mlp\.down"):
        save_adapter(adapted, combine(trained, frozen), tmp_path / "out")
    _, model, params = bases("phi3")
    config = LoraConfig(rank=2, init="pissa")
    adapted, trained, frozen = add_lora(model, params, jax.random.key(0), config)
    with pytest.raises(ValueError, match=r"pissa of model\.layers\.0\.self_attn\.qkv_proj"):
        save_adapter(adapted, combine(trained, frozen), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_of_the_hub_is_named_with_its_revision(bases, tmp_path):
    """PEFT takes the revision from a key of its own, and an id with `@` for no id."""
    _, model, params = bases("gpt2")
    model, trained, frozen = add_lora(model, params, jax.random.key(0), LoraConfig(rank=1))
    together = combine(trained, frozen)
    for base, wanted in {
        "org/name@v1.0": ("org/name", "v1.0"),
        "org/name": ("org/name", None),
    }.items():
        save_adapter(model, together, tmp_path / "adapter", base=base)
        config = json.loads((tmp_path / "adapter/adapter_config.json").read_text("utf-8"))
        assert (config["base_model_name_or_path"], config.get("revision")) == wanted
        assert base_of(tmp_path / "adapter") == base
