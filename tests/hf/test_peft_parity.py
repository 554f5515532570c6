"""Adapters against PEFT on tiny models of six families: it loads ours, we load its own."""

import dataclasses
import functools
import json
import warnings

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.hf import load_adapter, load_adapters, load_pretrained, save_adapter
from jaxalign.hf.peft_modules import modules_of
from jaxalign.models.base import combine
from jaxalign.models.lora import LoraConfig, add_lora, merge_lora
from jaxalign.models.scorer import Scorer, pooled_scores, with_scalar_head
from jaxalign.types import TokenBatch

torch = pytest.importorskip("torch", reason="parity with PEFT needs torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="parity with PEFT needs it")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

KINDS = ("llama", "qwen3", "gemma3_text", "phi3", "gpt2", "qwen3_moe")
TOKENS = np.random.default_rng(0).integers(3, 48, (2, 9)).astype(np.int32)


def randomised(model, seed=0, only="", spread=1.0):
    """Every parameter (whose name has `only` in it) random, none of them small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only not in name or ("base_layer" in name and only):
                continue
            noise = spread * torch.randn(p.shape, generator=generator)
            if "magnitude" in name:
                p.mul_(1 + 0.3 * noise)
            elif ("norm" in name or "ln_" in name) and not name.endswith("bias"):
                p.copy_((0 if "Gemma" in type(model).__name__ else 1) + 0.2 * noise)
            elif p.ndim == 1:
                p.copy_(0.15 * noise)
            else:
                p.copy_(noise * (0.3 if "embed" in name or "wte" in name else p.shape[-1] ** -0.5))
    return model.eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """kind → (folder of a transformers model, our model, our parameters), made once."""
    made = {}

    def get(kind):
        if kind not in made:
            keys = json.loads(json.dumps(families.keys(kind)))
            config = transformers.AutoConfig.for_model(kind, **keys)
            auto = transformers.AutoModelForCausalLM
            theirs = randomised(auto.from_config(config, attn_implementation="eager"))
            folder = tmp_path_factory.mktemp(kind)
            theirs.save_pretrained(folder)
            made[kind] = folder, *load_pretrained(folder)
        return made[kind]

    return get


def their_base(folder):
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, attn_implementation="eager").eval()


def their_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


@functools.lru_cache(maxsize=64)
def compiled(model):
    return jax.jit(lambda params, ids: model.logits(params, model.apply(params, ids)))


def our_logits(model, params):
    return np.asarray(compiled(model)(params, TOKENS))


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=0)


def noisy(tree, seed=1):
    """Trained values: A, B and lengths that matter; columns that a layer lacks stay 0."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        name, noise = path[-1].key, rng.normal(size=x.shape).astype(np.float32)
        if name == "lora_a":
            return x + 0.1 * noise * np.any(np.asarray(x) != 0, axis=-2, keepdims=True)
        if name == "lora_b":  # a row counts where A's column does
            return x + 0.1 * noise
        return x * (1 + 0.2 * noise)

    return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, tree))


def with_idle_rows(model, trained):
    """B is 0 in the rows of ranks that a layer does not have, as training leaves it."""
    from jaxalign.models.adapters import map_adapted

    def cut(node, adapter):
        mask = np.array(adapter.mask())[:, :, None]
        return node | {"lora_b": node["lora_b"] * mask}

    blocks = map_adapted(cut, trained["blocks"], model.lora, model.config.num_layers)
    return trained | {"blocks": blocks}


READ = {
    "llama": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 3},
        "alpha_pattern": {"v_proj": 5},
        "modules_to_save": ["embed_tokens", "model.norm"],
    },
    "qwen3": {
        "target_modules": r".*layers\.[02]\..*(q|k|o)_proj",
        "use_rslora": True,
        "rank_pattern": {r".*\.2\..*": 5},
        "alpha_pattern": {"k_proj": 9},
    },
    "gemma3_text": {
        "target_modules": ["q_proj", "up_proj", "embed_tokens"],
        "use_dora": True,
        "use_rslora": True,
    },
    "phi3": {
        "target_modules": "all-linear", "rank_pattern": {"qkv_proj": 6}, "layers_to_transform": None
    },
    "gpt2": {
        "target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True, "fan_in_fan_out": True,
        "modules_to_save": ["ln_f"],
    },
    "qwen3_moe": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "use_rslora": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_we_load_what_peft_wrote(kind, bases, tmp_path):
    folder, model, params = bases(kind)
    config = peft.LoraConfig(r=4, lora_alpha=7, task_type="CAUSAL_LM", **READ[kind])
    theirs = peft.get_peft_model(their_base(folder), config)
    plain = their_logits(theirs)
    for only in ("lora_", "modules_to_save"):
        randomised(theirs, 3, only)
    want = their_logits(theirs)
    assert np.abs(want - plain).max() > 0.05
    theirs.save_pretrained(tmp_path / "adapter")
    adapted, trained, frozen = load_adapter(model, params, tmp_path / "adapter")
    together = combine(trained, frozen)
    close(our_logits(adapted, together), want)
    merged, weights = merge_lora(adapted, together)
    close(our_logits(merged, weights), want)
    lora = adapted.lora
    assert (lora.rslora, lora.dora) == (config.use_rslora, config.use_dora)
    # Its folder is a source too: the base that it names, with the adapter merged.
    if kind in ("llama", "gemma3_text"):
        again, loaded = load_pretrained(tmp_path / "adapter")
        close(our_logits(again, loaded), want)


WRITTEN = {
    "llama": {
        "targets": ("query", "down", "lm_head"),
        "rank_pattern": {r"layers\.[12]\..*query": 3, "lm_head": 2},
        "modules_to_save": ("embed", "norm", "mlp_norm"),
    },
    "qwen3": {
        "targets": (r"layers\.[02]\..*", "value"), "rslora": True, "alpha_pattern": {"key": 3.0}
    },
    "gemma3_text": {"targets": ("embed", "lm_head", "query", "gate"), "rank_pattern": {"gate": 6}},
    "phi3": {"rank_pattern": {"query": 2, "up": 3}, "alpha_pattern": {"key": 11.0}, "rslora": True},
    "gpt2": {"targets": ("query", "value", "up", "embed"), "dora": True},
    "qwen3_moe": {
        "targets": ("query", "key", "value", "out"), "dora": True, "rslora": True, "init": "peft"
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_we_wrote(kind, bases, tmp_path):
    folder, model, params = bases(kind)
    config = LoraConfig(**({"rank": 4, "alpha": 7.0} | WRITTEN[kind]))
    adapted, trained, frozen = add_lora(model, params, jax.random.key(0), config)
    trained = with_idle_rows(adapted, noisy(trained))
    together = combine(trained, frozen)
    want = our_logits(adapted, together)
    assert np.abs(want - our_logits(model, params)).max() > 0.05
    save_adapter(adapted, together, tmp_path / "adapter", base=str(folder))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(their_base(folder), tmp_path / "adapter")
    assert not [w for w in caught if "missing" in str(w.message).lower()]
    close(their_logits(theirs.eval()), want)
    again = load_adapter(model, params, tmp_path / "adapter")
    close(our_logits(again.model, combine(again.trained, again.frozen)), want)
    merged, weights = merge_lora(adapted, together)
    close(our_logits(merged, weights), want)


def test_principal_vectors_leave_the_same_base(bases, tmp_path):
    folder, model, params = bases("llama")
    config = LoraConfig(rank=3, init="pissa", targets=("query", "up"))
    adapted, trained, frozen = add_lora(model, params, jax.random.key(0), config)
    together = combine(noisy(trained), frozen)
    save_adapter(adapted, together, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(their_base(folder), tmp_path / "ours")
    # Two singular value decompositions in float32, of random matrices with little gaps.
    close(their_logits(theirs.eval()), our_logits(adapted, together), 3e-4)
    written = peft.LoraConfig(r=3, init_lora_weights="pissa", target_modules=["k_proj"])
    theirs = peft.get_peft_model(their_base(folder), written)
    randomised(theirs, 3, "lora_A")
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(model, params, tmp_path / "theirs")
    got = our_logits(again.model, combine(again.trained, again.frozen))
    close(got, their_logits(theirs), 3e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_reward_models_travel_with_their_head(kind, bases, tmp_path):
    folder, model, params = bases(kind)
    auto = transformers.AutoModelForSequenceClassification
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear")
    base = auto.from_pretrained(folder, num_labels=1)
    theirs = peft.get_peft_model(base, config)
    for only in ("lora_", "modules_to_save"):
        randomised(theirs, 5, only)
    theirs.save_pretrained(tmp_path / "theirs")
    scorer, trained, frozen = load_adapter(model, params, tmp_path / "theirs")
    assert isinstance(scorer, Scorer)
    assert "score" in trained
    close(our_scores(scorer, combine(trained, frozen)), their_scores(theirs))
    whole, weights = load_pretrained(tmp_path / "theirs")
    close(our_scores(whole, weights), their_scores(theirs))

    adapted, trained, frozen = add_lora(model, params, jax.random.key(0), LoraConfig(rank=2))
    scorer, full = with_scalar_head(adapted, frozen, jax.random.key(1))
    together = combine(noisy(trained), full)
    save_adapter(scorer, together, tmp_path / "ours", base=str(folder))
    theirs = peft.PeftModel.from_pretrained(
        auto.from_pretrained(folder, num_labels=1), tmp_path / "ours"
    )
    close(their_scores(theirs.eval()), our_scores(scorer, together))


def their_scores(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()[:, 0]


def our_scores(scorer, params):
    ones = np.ones_like(TOKENS)
    positions = np.broadcast_to(np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape)
    batch = TokenBatch(TOKENS, TOKENS, positions, ones, ones.astype(bool))
    return np.asarray(jax.jit(functools.partial(pooled_scores, scorer))(params, batch))


def test_a_tied_embedding_is_trained_once_here_and_twice_there(bases, tmp_path):
    folder, model, params = bases("gemma3_text")
    assert model.config.tie_embeddings
    config = LoraConfig(rank=2, targets=("query",), modules_to_save=("embed",))
    adapted, trained, frozen = add_lora(model, params, jax.random.key(0), config)
    together = combine(noisy(trained), frozen)
    want = our_logits(adapted, together)
    save_adapter(adapted, together, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(their_base(folder), tmp_path / "ours")
    close(their_logits(theirs.eval()), want)
    again = load_adapter(model, params, tmp_path / "ours")
    assert again.model.config.tie_embeddings
    close(our_logits(again.model, combine(again.trained, again.frozen)), want)

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    theirs = peft.get_peft_model(their_base(folder), config)
    for only in ("lora_", "modules_to_save"):
        randomised(theirs, 5, only)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(model, params, tmp_path / "theirs")
    close(our_logits(again.model, combine(again.trained, again.frozen)), their_logits(theirs))


def test_several_adapters_share_a_base(bases, tmp_path):
    folder, model, params = bases("llama")
    wanted = {}
    for number, name in enumerate(("one", "two")):
        config = peft.LoraConfig(r=2 + number, target_modules=["q_proj", "v_proj"])
        theirs = peft.get_peft_model(their_base(folder), config)
        randomised(theirs, 7 + number, "lora_")
        theirs.save_pretrained(tmp_path / name)
        wanted[name] = their_logits(theirs)
    read = load_adapters(model, params, {name: tmp_path / name for name in wanted})
    for name, want in wanted.items():
        adapted, trained, frozen = read[name]
        assert frozen["blocks"]["mlp"]["up"]["kernel"] is params["blocks"]["mlp"]["up"]["kernel"]
        close(our_logits(adapted, combine(trained, frozen)), want)


def test_modules_hold_what_they_hold(bases):
    assert {len(m.slots) for m in modules_of(bases("phi3")[1]).values()} == {1, 2, 3}
    conv = modules_of(bases("gpt2")[1])["transformer.h.0.attn.c_attn"]
    assert conv.conv1d
    assert [slot.start for slot in conv.slots] == [0, 32, 64]
    experts = modules_of(dataclasses.replace(bases("qwen3_moe")[1]))
    assert not any("experts" in name for name in experts)
