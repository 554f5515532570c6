"""Runs on what people bring: learned positions, tokenizers of other sizes, other ends of turns."""

import json
import shutil

import chatmodel
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxalign
from jaxalign.models.base import DecoderConfig
from jaxalign.models.decoder import Decoder
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import merge
from jaxalign.run.loop import train

pytestmark = pytest.mark.usefixtures("kept_programs")

ALPACA = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A GPT-2 of 24 positions, with a tokenizer of one special token more than it has rows."""
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    config = DecoderConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
        num_kv_heads=2, head_dim=8, norm="layer", max_positions=24, learned_positions=True,
        gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=True,
        activation="gelu_tanh", family="gpt2",
    )  # fmt: skip
    model = Decoder(config)
    tok = chatmodel.make_tokenizer(chat_template=None)
    jaxalign.save_pretrained(model, tiny.random_params(model), folder, tokenizer=tok)
    tok.add_tokens(["<extra>"], special_tokens=True)
    tok.save_pretrained(folder)
    return folder


def run(algorithm, models, folder, changes):
    values = merge(chatmodel.settings(algorithm, models, folder, steps=1), changes)
    return train(load_config(algorithm, values))


def test_beyond_learned_positions_is_an_error_at_once(gpt2, chat_models, tmp_path):
    rows = [{"prompt": "once upon a time", "completion": " there was a girl"}] * 8
    data = chatmodel.write_rows(tmp_path / "rows.jsonl", rows)
    changes = {"model": {"source": str(gpt2), "chat_template": "none"}, "data": {"train": [data]}}
    with pytest.raises(
        ValueError, match=r"longest has 32 tokens.*n_positions=24 learned positions"
    ):
        run("sft", chat_models, tmp_path / "run", changes)
    assert not (tmp_path / "run").exists()  # nothing was begun
    model, params = jaxalign.load_pretrained(gpt2)
    tok = jaxalign.load_tokenizer(gpt2)
    with pytest.raises(ValueError, match=r"4 tokens, with 21 more to be sampled.*n_positions=24"):
        jaxalign.generate(model, params, tok, ["once"], max_new_tokens=21, chat_template="none")
    with pytest.raises(ValueError, match=r"holds the token 260 \('<extra>'\)"):
        jaxalign.generate(model, params, tok, ["<extra>"], max_new_tokens=2, chat_template="none")


def test_positions_in_bfloat16_are_added_in_float32(gpt2):
    model, params = jaxalign.load_pretrained(gpt2, dtype="bfloat16")
    ids = np.arange(5, 15)[None]
    narrow = params["embed"]["embedding"][ids[0]], params["embed"]["positions"][:10]
    wide = sum(np.asarray(part, np.float32) for part in narrow)
    found = model._embed(params, ids, np.arange(10)[None], np.ones((1, 10)), "rows length hidden")
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[0], wide)


def test_a_run_exports_where_it_taught_to_stop_and_says_what_it_read(chat_models, tmp_path):
    """Of a base model whose eos ends texts, trained under a template that ends turns otherwise."""
    base = tmp_path / "base"
    shutil.copytree(chat_models / "chat", base)
    old = {"eos_token_id": 3}
    (base / "generation_config.json").write_text(json.dumps(old))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | old))
    changes = {"model": {"source": str(base)}, "run": {"checkpoint": False}}
    result = run("sft", chat_models, tmp_path / "run", changes)
    tok = jaxalign.load_tokenizer(result.model)
    end, old = tok.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    generation = json.loads((result.model / "generation_config.json").read_text())
    assert sorted(generation["eos_token_id"]) == sorted([end, old])
    assert tok.eos_token == "<|im_end|>"
    assert tok.pad_token == "<pad>"
    report = (result.folder / "data.txt").read_text()
    assert "sft_batches: 12 rows read, 12 kept" in report
    assert "run-sft: 12 rows as messages; messages → messages" in report


def test_a_stream_says_what_it_read(chat_models, tmp_path):
    changes = {"data": {"streaming": True, "window": 12}, "run": {"checkpoint": False}}
    result = run("sft", chat_models, tmp_path / "run", changes)
    assert "run-sft: 12 rows as messages; messages" in (result.folder / "data.txt").read_text()


def test_a_reward_model_under_another_template_stops_the_run(chat_models, tmp_path):
    template = tmp_path / "alpaca.jinja"
    template.write_text(ALPACA)
    changes = {"model": {"chat_template": str(template)}}
    with pytest.raises(ValueError, match="has another chat template than the policy"):
        run("ppo", chat_models, tmp_path / "run", changes)
