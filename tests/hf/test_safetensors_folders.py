"""Folders of safetensors, without torch: against a numpy Llama and golden numbers."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.hf import load as hf
from jaxalign.hf import load_model, load_pretrained, load_tokenizer, save_pretrained
from jaxalign.hf import save as hf_save
from jaxalign.models.scorer import with_scalar_head
from jaxalign.parallel.mesh import make_mesh

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "mlp_bias": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
TOKENS = np.array([[3, 1, 4, 15, 9, 2]], np.int32)


def tensor_shapes():
    shapes = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,)}
    shapes["lm_head.weight"] = (16, 8)
    for layer in ("model.layers.0.", "model.layers.1."):
        for name, rows, columns in (
            ("self_attn.q_proj", 16, 8),
            ("self_attn.k_proj", 8, 8),
            ("self_attn.v_proj", 8, 8),
            ("self_attn.o_proj", 8, 16),
            ("mlp.gate_proj", 12, 8),
            ("mlp.up_proj", 12, 8),
            ("mlp.down_proj", 8, 12),
        ):
            shapes[f"{layer}{name}.weight"] = (rows, columns)
            shapes[f"{layer}{name}.bias"] = (rows,)
        shapes[f"{layer}input_layernorm.weight"] = (8,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (8,)
    return shapes


def sines(shapes):
    """Reproducible weights: ½ sin(0.7 n + i), norms 1 + sin / 10."""
    weights = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        wave = np.sin(np.arange(np.prod(shape)) * 0.7 + i).reshape(shape)
        weights[name] = (1 + 0.1 * wave if "norm" in name else 0.5 * wave).astype(np.float32)
    return weights


WEIGHTS = sines(tensor_shapes())


def write(folder, weights=None, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    save_file(WEIGHTS if weights is None else weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model")


def logits(model, params, tokens=TOKENS):
    return np.asarray(model.logits(params, model.apply(params, tokens)))


def numpy_llama(w, tokens, theta=100.0, heads=2, eps=1e-5, width=8):
    """One sequence, in float64, head by head and query by query."""
    w = {name: value.astype(np.float64) for name, value in w.items()}

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[name + ".weight"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def rotate(x):  # [T, width]
        half = width // 2
        out = np.empty_like(x)
        for t in range(len(x)):
            for i in range(half):
                c, s = np.cos(t * theta ** (-i / half)), np.sin(t * theta ** (-i / half))
                out[t, i] = x[t, i] * c - x[t, i + half] * s
                out[t, i + half] = x[t, i + half] * c + x[t, i] * s
        return out

    x = w["model.embed_tokens.weight"][tokens]
    for layer in ("model.layers.0.", "model.layers.1."):
        h = norm(x, layer + "input_layernorm")
        q, k, v = (linear(h, f"{layer}self_attn.{n}_proj") for n in "qkv")
        k = rotate(k)
        mixed = np.zeros_like(q)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            query = rotate(q[:, part])
            for t in range(len(tokens)):
                weight = np.exp(k[: t + 1] @ query[t] / np.sqrt(width))
                mixed[t, part] = weight @ v[: t + 1] / weight.sum()
        x = x + linear(mixed, layer + "self_attn.o_proj")
        h = norm(x, layer + "post_attention_layernorm")
        gate = linear(h, layer + "mlp.gate_proj")
        gate = gate / (1 + np.exp(-gate))
        x = x + linear(gate * linear(h, layer + "mlp.up_proj"), layer + "mlp.down_proj")
    hidden = norm(x, "model.norm")
    return hidden, hidden @ w["lm_head.weight"].T


# transformers 5.23 in float32, last position, with these weights
GOLDEN = [-0.374487, -0.561858, -0.497029, -0.209099, 0.172689, 0.476962, 0.567142, 0.40275]
GOLDEN_LLAMA3 = [-0.369104, -0.55255, -0.487973, -0.204361, 0.170982, 0.469577, 0.557394, 0.395014]


def test_logits_equal_a_numpy_llama_and_transformers(folder, tmp_path):
    model, params = load_pretrained(folder)
    assert model.compute_dtype == "float32"
    got = logits(model, params)[0]
    np.testing.assert_allclose(got, numpy_llama(WEIGHTS, TOKENS[0])[1], atol=1e-5)
    np.testing.assert_allclose(got[-1, :8], GOLDEN, atol=1e-5)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    scaled = write(tmp_path / "scaled", config=CONFIG | {"rope_parameters": rope})
    got = logits(*load_pretrained(scaled))[0]
    np.testing.assert_allclose(got[-1, :8], GOLDEN_LLAMA3, atol=1e-5)


def test_parameters_are_plain_float32_dicts(folder):
    _, params = load_pretrained(folder)
    assert type(params["blocks"]["attention"]["query"]) is dict
    kernel = params["blocks"]["attention"]["query"]["kernel"]
    assert kernel.shape == (2, 8, 16)
    np.testing.assert_array_equal(kernel[1], WEIGHTS["model.layers.1.self_attn.q_proj.weight"].T)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert not kernel.committed  # uncommitted: follows other arrays to their devices


def test_options(folder):
    model, params = load_pretrained(
        str(folder), dtype="bfloat16", compute_dtype="bfloat16", remat="block"
    )
    assert (model.compute_dtype, model.remat) == ("bfloat16", "block")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    with pytest.raises(ValueError, match="dtype=int8: wanted one of float32, bfloat16, float16"):
        load_pretrained(folder, dtype=jnp.int8)


def test_half_precision_sources(tmp_path):
    half = {name: value.astype(np.float16) for name, value in WEIGHTS.items()}
    folder = write(tmp_path / "half", weights=half)
    model, params = load_pretrained(folder)
    expected = numpy_llama(half, TOKENS[0])[1]
    np.testing.assert_allclose(logits(model, params)[0], expected, atol=1e-5)
    save_pretrained(model, params, tmp_path / "out", dtype=jnp.float16)
    again = load_file(tmp_path / "out/model.safetensors")
    assert all(again[name].tobytes() == value.tobytes() for name, value in half.items())


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (4, 2, 1)])
def test_load_on_a_mesh(folder, tmp_path, shape, monkeypatch):
    model, params = load_pretrained(folder)
    mesh = make_mesh(*shape)
    reads = []
    read = hf.safetensors_file.SafetensorsFolder.read
    monkeypatch.setattr(
        hf.safetensors_file.SafetensorsFolder,
        "read",
        lambda self, name, index: reads.append((name, str(index))) or read(self, name, index),
    )
    _, sharded = load_pretrained(folder, mesh=mesh)
    assert len(reads) == len(set(reads))  # every piece is read once, replicas included
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b)), params, sharded)
    down = sharded["blocks"]["mlp"]["down"]["kernel"]
    assert down.addressable_shards[0].data.shape == (2, 12 // shape[2], 8 // shape[1])
    save_pretrained(model, sharded, tmp_path / "out")
    again = load_file(tmp_path / "out/model.safetensors")
    assert all(again[name].tobytes() == value.tobytes() for name, value in WEIGHTS.items())


def test_a_mesh_that_does_not_divide_is_refused(folder):
    mesh = make_mesh(data=1, fsdp=1, tensor=8)
    with pytest.raises(ValueError, match="axis 'heads' has 2 parts of 8"):
        load_pretrained(folder, mesh=mesh)


def test_save_is_byte_equal_sharded_or_not(folder, tmp_path):
    model, params = load_pretrained(folder)
    save_pretrained(model, params, tmp_path / "one")
    save_pretrained(model, params, tmp_path / "many", max_shard_bytes=1500)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in WEIGHTS.values())
    parts = [load_file(tmp_path / "many" / name) for name in files]
    assert all(sum(w.nbytes for w in part.values()) <= 1500 for part in parts)
    many = {name: value for part in parts for name, value in part.items()}
    one = load_file(tmp_path / "one/model.safetensors")
    assert one.keys() == many.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert one[name].tobytes() == many[name].tobytes() == value.tobytes()
    again = load_pretrained(tmp_path / "many")
    np.testing.assert_array_equal(logits(*again), logits(model, params))
    # mixed dtypes keep their own, and stay aligned
    mixed = params | {"norm": {"scale": params["norm"]["scale"].astype(jnp.bfloat16)}}
    save_pretrained(model, mixed, tmp_path / "mixed")
    kinds = {n: t.dtype.name for n, t in load_file(tmp_path / "mixed/model.safetensors").items()}
    assert kinds.pop("model.norm.weight") == "bfloat16"
    assert set(kinds.values()) == {"float32"}


def test_configs_survive(folder, tmp_path):
    extra = {"eos_token_id": [5, 6], "bos_token_id": 1, "initializer_range": 0.3}
    (folder / "config.json").write_text(json.dumps(CONFIG | extra))
    (folder / "generation_config.json").write_text(json.dumps({"top_p": 0.9, "eos_token_id": 7}))
    save_pretrained(*load_pretrained(folder), tmp_path / "out")
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert {key: saved[key] for key in extra} == extra
    assert saved["architectures"] == ["LlamaForCausalLM"]
    assert saved["dtype"] == "float32"
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"top_p": 0.9, "eos_token_id": 7, "bos_token_id": 1}


def word_tokenizer(words, specials, **names):
    """One id a word, the special ones last."""
    import tokenizers
    import transformers

    vocab = {word: i for i, word in enumerate([*words, *specials])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=words[0]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in specials])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)


@pytest.mark.parametrize(("eos", "expected"), [(5, [5, 6]), (9, [5, 6, 9])])
def test_exports_stop_where_the_source_and_the_tokenizer_do(folder, tmp_path, eos, expected):
    words = [f"w{i}" for i in range(16)]
    tok = word_tokenizer(words, [], eos_token=f"w{eos}", pad_token="w3")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"eos_token_id": 5}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    model, params = load_pretrained(folder)
    save_pretrained(model, params, tmp_path / "out", tokenizer=tok)
    saved = json.loads((tmp_path / "out/config.json").read_text())
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert saved["pad_token_id"] == 3
    assert generation == {"eos_token_id": expected, "pad_token_id": 3}


def test_an_export_stops_where_its_template_ends_a_turn(folder, tmp_path):
    template = (
        "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    specials = ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
    words = [f"w{i}" for i in range(12)]
    tok = word_tokenizer(words, specials, eos_token="<|endoftext|>", chat_template=template)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"eos_token_id": 2}))
    save_pretrained(*load_pretrained(folder), tmp_path / "out", tokenizer=tok)
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert sorted(generation["eos_token_id"]) == [2, 14, 15]  # 2: the source's own


def test_exports_carry_and_clean_what_lies_beside_the_tokenizer(folder, tmp_path):
    source = tmp_path / "source"
    more = {"auto_map": {"AutoTokenizer": "x.py"}, "extra_special_tokens": ["w4"]}
    words = [f"w{i}" for i in range(16)]
    word_tokenizer(words, [], eos_token="w1", pad_token="w2").save_pretrained(source)
    config = json.loads((source / "tokenizer_config.json").read_text()) | more
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "tokenizer.model").write_bytes(b"pieces")
    auto = {"AutoModelForCausalLM": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"auto_map": auto}))
    out = tmp_path / "out"
    save_pretrained(*load_pretrained(folder), out, tokenizer=load_tokenizer(source))
    saved = json.loads((out / "tokenizer_config.json").read_text())
    assert "auto_map" not in saved
    # transformers 4 raises AttributeError at a list under extra_special_tokens.
    assert "extra_special_tokens" not in saved
    assert saved["additional_special_tokens"] == ["w4"]
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    again = load_tokenizer(out)
    assert "w4" in again.all_special_tokens
    assert again.get_vocab() == load_tokenizer(source).get_vocab()
    save_pretrained(*load_pretrained(out), out, tokenizer=again)  # replaces the folder


def test_a_trained_head_under_a_tied_flag_is_kept(tmp_path):
    folder = write(tmp_path / "tied", config=CONFIG | {"tie_word_embeddings": True})
    model, params = load_pretrained(folder)
    np.testing.assert_array_equal(params["head"]["kernel"], WEIGHTS["lm_head.weight"].T)
    assert not load_model(folder).config.tie_embeddings
    save_pretrained(model, params, tmp_path / "out")
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert saved["tie_word_embeddings"] is False
    again = load_pretrained(tmp_path / "out")[1]
    np.testing.assert_array_equal(again["head"]["kernel"], WEIGHTS["lm_head.weight"].T)


def test_a_spare_head_beside_a_score_is_left_out(folder, tmp_path):
    scorer, params = with_scalar_head(*load_pretrained(folder), jax.random.key(1))
    save_pretrained(scorer, params, tmp_path / "scorer")
    path = tmp_path / "scorer/model.safetensors"
    save_file(load_file(path) | {"lm_head.weight": WEIGHTS["lm_head.weight"]}, path)
    again, loaded = load_pretrained(tmp_path / "scorer")
    assert type(again) is type(scorer)
    assert set(loaded) == set(params)


def test_folders_that_are_no_model_say_what_they_are(tmp_path):
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    (peft / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match=r"an adapter of 'org/base' \(PEFT\).*merge it first"):
        load_pretrained(peft)
    (peft / "config.json").write_text(json.dumps(CONFIG))  # some keep the base's config beside it
    with pytest.raises(ValueError, match=r"an adapter of 'org/base'"):
        load_pretrained(peft)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("sft: {}")
    with pytest.raises(ValueError, match=r"the folder of a run that holds no model yet; let it f"):
        load_pretrained(run)
    write(run / "model")
    with pytest.raises(ValueError, match=r"the folder of a run; its model is .*run/model"):
        load_pretrained(run)


@pytest.mark.parametrize(
    ("rename", "told"),
    [
        (lambda name: f"module.{name}", "begin with 'module.': remove that"),
        (lambda name: f"_orig_mod.{name}", "begin with '_orig_mod.': remove that"),
        (lambda name: f"language_model.{name}", "begin with 'language_model.': remove that"),
        (lambda name: name.removeprefix("model."), "lack 'model.' at their start: add it"),
        (lambda name: f"base_model.model.{name}.lora_A", "adapters .*: merge them"),
        (lambda name: name.replace("weight", "qweight"), "quantised: give the unquantised model"),
    ],
)
def test_names_with_another_prefix_say_which(tmp_path, rename, told):
    folder = write(tmp_path / "m", weights={rename(name): x for name, x in WEIGHTS.items()})
    with pytest.raises(ValueError, match=told):
        load_pretrained(folder)


def test_scorer_round_trip(folder, tmp_path):
    scorer, params = with_scalar_head(*load_pretrained(folder), jax.random.key(1))
    save_pretrained(scorer, params, tmp_path / "out")
    assert not (tmp_path / "out/generation_config.json").exists()
    saved = load_file(tmp_path / "out/model.safetensors")
    assert saved["score.weight"].shape == (1, 8)
    assert "lm_head.weight" not in saved
    again, loaded = load_pretrained(tmp_path / "out")
    assert type(again) is type(scorer)
    scores = np.asarray(again.scores(loaded, again.apply(loaded, TOKENS)))[0]
    expected = numpy_llama(WEIGHTS, TOKENS[0])[0] @ saved["score.weight"][0].astype(np.float64)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


# --- bad input -----------------------------------------------------------------------------------


def test_all_bad_names_are_listed_at_once(tmp_path):
    weights = dict(WEIGHTS)
    del weights["model.layers.1.mlp.up_proj.bias"]
    weights["model.norm.weight"] = np.ones(9, np.float32)
    weights["model.layers.0.extra.weight"] = np.ones(3, np.float32)
    weights["lm_head.weight"] = np.ones((16, 8), np.int32)
    folder = write(tmp_path / "bad", weights=weights)
    with pytest.raises(ValueError, match="weights do not fit") as error:
        load_pretrained(folder)
    text = str(error.value)
    assert str(folder) in text
    assert "missing: model.layers.1.mlp.up_proj.bias." in text
    assert "unexpected: model.layers.0.extra.weight." in text
    assert "wrong shape: model.norm.weight (9,), wanted (8,)." in text
    assert "unusable: lm_head.weight: dtype I32" in text


def test_harmless_extra_names_are_tolerated(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    folder = write(tmp_path / "old", weights=WEIGHTS | extra)
    load_pretrained(folder)
    same = WEIGHTS | {"lm_head.weight": WEIGHTS["model.embed_tokens.weight"]}
    tied = write(tmp_path / "tied", config=CONFIG | {"tie_word_embeddings": True}, weights=same)
    _, params = load_pretrained(tied)
    assert "head" not in params
    untied = {name: value for name, value in WEIGHTS.items() if name != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        load_pretrained(write(tmp_path / "headless", weights=untied))


def split(folder, tmp_path):
    out = tmp_path / "split"
    save_pretrained(*load_pretrained(folder), out, max_shard_bytes=2000)
    return out, sorted(out.glob("*.safetensors"))


def test_duplicate_names_and_missing_indexed_names(folder, tmp_path):
    out, files = split(folder, tmp_path)
    first, second = load_file(files[0]), load_file(files[1])
    name = next(iter(first))
    save_file(second | {name: first[name]}, files[1], metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}: duplicate, in {files[0].name} and"):
        load_pretrained(out)
    lost = first.pop(name)
    assert lost is not None
    save_file(second, files[1])
    save_file(first, files[0])
    with pytest.raises(ValueError, match=f"{name}: promised by model.safetensors.index.json"):
        load_pretrained(out)


def test_damaged_folders(folder, tmp_path):
    out, files = split(folder, tmp_path)
    data = files[0].read_bytes()
    files[0].write_bytes(data[:-8])
    with pytest.raises(ValueError, match=f"{files[0].name} is not a readable safetensors file"):
        load_pretrained(out)
    files[0].write_bytes(b"\x80\x04\x95" + data[3:])  # how a pickle starts
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load_pretrained(out)
    files[0].unlink()
    with pytest.raises(ValueError, match=f"names files that are not there: {files[0].name}"):
        load_pretrained(out)
    index = out / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match=r"a points to '\.\./model"):
        load_pretrained(out)
    index.write_text("{}")
    with pytest.raises(ValueError, match="weight_map is missing"):
        load_pretrained(out)
    shutil.copy(folder / "model.safetensors", out)
    with pytest.raises(ValueError, match=r"holds both model\.safetensors and"):
        load_pretrained(out)


def test_sources_that_are_not_models(folder, tmp_path):
    with pytest.raises(ValueError, match="not a hub id"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"'models/gone\.gguf': no such folder or \.gguf file"):
        load_pretrained("models/gone.gguf")
    with pytest.raises(ValueError, match=r"is a file, but not \.gguf"):
        load_pretrained(folder / "config.json")
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_pretrained(tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="wanted a JSON object"):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"hidden_act": "odd"}))
    with pytest.raises(ValueError, match=r"model: config\.json: hidden_act='odd'"):
        load_pretrained(folder)


def test_weights_in_other_formats_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds neither"):
        load_pretrained(folder)
    (folder / "some.gguf").touch()
    with pytest.raises(ValueError, match=r"to load some\.gguf, give the path"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"pickle weights only \(pytorch_model\.bin\)"):
        load_pretrained(folder)


def test_hub_id_without_network(monkeypatch):
    import huggingface_hub

    calls = {}

    def offline(repo, **options):
        calls.update(options, repo=repo)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"'org/name'.*hub \(OSError: no network\)"):
        load_pretrained("org/name")
    assert calls["repo"] == "org/name"
    assert "config.json" in calls["allow_patterns"]
    assert not any("bin" in pattern for pattern in calls["allow_patterns"])


def test_a_hub_id_may_name_a_revision(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repo, *, revision, allow_patterns):
        asked.append((repo, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for source in ("org/name@3fa2c1d", "org/name@refs/pr/7", "org/name@v1.0", "org/name"):
        load_pretrained(source)
    revisions = ("3fa2c1d", "refs/pr/7", "v1.0", None)
    assert asked == [("org/name", revision) for revision in revisions]
    with pytest.raises(ValueError, match="not a hub id"):
        load_pretrained("org/name@")


def test_hub_id_uses_the_download_cache(folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(folder))
    np.testing.assert_allclose(logits(*load_pretrained("org/name"))[0, -1, :8], GOLDEN, atol=1e-5)


# --- saving safely -------------------------------------------------------------------------------


def test_replaces_a_model_folder_and_nothing_else(folder, tmp_path):
    model, params = load_pretrained(folder)
    out = tmp_path / "deep/out"
    save_pretrained(model, params, out, max_shard_bytes=2000)
    save_pretrained(model, jax.tree.map(lambda x: 2 * x, params), out)  # replaces the first
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    again = load_file(out / "model.safetensors")
    np.testing.assert_array_equal(again["model.norm.weight"], 2 * WEIGHTS["model.norm.weight"])
    assert [p.name for p in out.parent.iterdir()] == ["out"]

    (out / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"holds thesis\.tex"):
        save_pretrained(model, params, out)
    with pytest.raises(ValueError, match=r"is a file; give a folder"):
        save_pretrained(model, params, out / "thesis.tex")
    assert (out / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("moment", ["write", "swap"])
def test_a_failed_save_leaves_the_old_folder(folder, tmp_path, monkeypatch, moment):
    model, params = load_pretrained(folder)
    out = tmp_path / "place/out"
    save_pretrained(model, params, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    if moment == "write":
        monkeypatch.setattr(hf_save, "write_configs", fail)
    else:
        rename = hf.os.rename

        def fail_at_the_last_rename(old, new):
            return fail() if str(old).endswith(".tmp") else rename(old, new)

        monkeypatch.setattr(hf_save.os, "rename", fail_at_the_last_rename)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(model, jax.tree.map(lambda x: 2 * x, params), out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_parameters_that_do_not_fit(folder, tmp_path):
    model, params = load_pretrained(folder)
    bad = {k: v for k, v in params.items() if k != "head"}
    bad |= {"score": {"kernel": jnp.ones((8, 1))}, "norm": {"scale": jnp.ones(9)}}
    with pytest.raises(ValueError, match="do not fit the model") as error:
        save_pretrained(model, bad, tmp_path / "out")
    for part in (
        "missing: head/kernel",
        "unexpected: score/kernel",
        "norm/scale (9,), wanted (8,)",
    ):
        assert part in str(error.value)
    adapted = params | {"norm": params["norm"] | {"lora_a": jnp.ones((8, 2))}}
    with pytest.raises(ValueError, match=r"unexpected: norm/lora_a; merge adapters.*merge_lora"):
        save_pretrained(model, adapted, tmp_path / "out")
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        save_pretrained(model, params, tmp_path / "out", max_shard_bytes=0)
    assert not (tmp_path / "out").exists()


# --- real weights --------------------------------------------------------------------------------


def test_stories260k(shared):
    golden = np.load(shared / "data/stories260K/golden.npz")
    model, params = load_pretrained(shared / "data/stories260K/hf")
    ids = golden["input_ids"].astype(np.int32)[None]
    np.testing.assert_allclose(logits(model, params, ids)[0], golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("weights", "architecture"),
    [
        ("policy.safetensors", "LlamaForCausalLM"),
        ("reward.safetensors", "LlamaForSequenceClassification"),
    ],
)
def test_reference_forward(shared, tmp_path, weights, architecture):
    oracle = shared / "oracle"
    config = json.loads((oracle / "config.json").read_text()) | {"architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(oracle / weights, tmp_path / "model.safetensors")
    expected = np.load(oracle / "forward.npz")
    model, params = load_pretrained(tmp_path)
    ids = expected["input_ids"].astype(np.int32)
    mask = expected["attention_mask"].astype(np.int32)
    hidden = model.apply(params, ids, segment_ids=mask)
    if architecture.endswith("CausalLM"):
        real = mask > 0
        got = np.asarray(model.logits(params, hidden))
        np.testing.assert_allclose(got[real], expected["logits"][real], rtol=1e-5, atol=1e-5)
        last = np.asarray(hidden)[real]
        np.testing.assert_allclose(last, expected["last_hidden"][real], rtol=1e-5, atol=1e-5)
        left = expected["left_attention_mask"].astype(np.int32)
        hidden = model.apply(
            params,
            expected["left_input_ids"].astype(np.int32),
            expected["left_position_ids"].astype(np.int32),
            left,
        )
        got = np.asarray(model.logits(params, hidden))[left > 0]
        np.testing.assert_allclose(got, expected["left_logits"][left > 0], rtol=1e-5, atol=1e-5)
    else:
        scores = np.asarray(model.scores(params, hidden))
        pooled = scores[np.arange(len(ids)), mask.sum(1) - 1]
        np.testing.assert_allclose(pooled, expected["reward_logits"][:, 0], rtol=1e-5, atol=1e-6)
