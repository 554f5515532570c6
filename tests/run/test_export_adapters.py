"""`jaxalign export` with adapters: their weighted sum on a model, and one extracted from two."""

import json

import chatmodel
import jax
import numpy as np
import pytest
import tiny

import jaxalign
from jaxalign.commands import cli
from jaxalign.hf import save_adapter
from jaxalign.hf.gguf_lora import save_gguf_adapter
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import LoraConfig, add_lora
from jaxalign.models.lora_extract import extract_lora

pytestmark = pytest.mark.usefixtures("kept_programs")

QUERY, UP = "['blocks']['attention']['query']['kernel']", "['blocks']['mlp']['up']['kernel']"


def made(folder, base, seed, lora):
    """(source, matrix → change) of an adapter; one as PEFT's folder, one as a GGUF file."""
    model, params = jaxalign.load_pretrained(base)
    model, trained, frozen = add_lora(model, params, jax.random.key(seed), lora)
    rng = np.random.default_rng(seed)
    trained = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape, scale=0.1)), trained)
    deltas = {}
    for part, name in (("attention", "query"), ("mlp", "up")):
        node = trained["blocks"].get(part, {}).get(name)
        if node is not None:
            a, b = (np.asarray(node[f"lora_{side}"], np.float64) for side in "ab")
            deltas[f"['blocks']['{part}']['{name}']['kernel']"] = lora.alpha / lora.rank * (a @ b)
    together = combine(trained, frozen)
    if seed:
        save_gguf_adapter(model, together, folder / "b.gguf")
        return str(folder / "b.gguf"), deltas
    save_adapter(model, together, folder / "a", base=str(base))
    return str(folder / "a"), deltas


def test_the_weighted_sum_of_adapters(chat_models, tmp_path, capsys):
    chat = chat_models / "chat"
    one, first = made(tmp_path, chat, 0, LoraConfig(rank=2, alpha=6.0, targets=("query", "up")))
    two, second = made(tmp_path, chat, 1, LoraConfig(rank=3, alpha=4.0, targets=("up",)))
    out = tmp_path / "out"
    command = ["export", str(chat), "--adapter", one, "--adapter", two, "--weights", "0.5", "-2"]
    assert cli.main([*command, "--out", str(out), "--to", "hf", "peft", "gguf-lora"]) == 0
    assert capsys.readouterr().err == ""
    _, base = jaxalign.load_pretrained(chat)
    expected = chatmodel.leaves(base)
    expected[QUERY] = expected[QUERY] + 0.5 * first[QUERY]
    expected[UP] = expected[UP] + 0.5 * first[UP] - 2 * second[UP]
    for place in (out / "hf", out / "peft"):
        _, params = jaxalign.load_pretrained(place)
        for name, value in chatmodel.leaves(params).items():
            np.testing.assert_allclose(value, expected[name], atol=2e-6, err_msg=name)
    config = json.loads((out / "peft" / "adapter_config.json").read_text())
    assert config["rank_pattern"] | {"": config["r"]} in (
        {"q_proj": 2, "": 5}, {"up_proj": 5, "": 2},
    )  # fmt: skip
    noted = json.loads((out / "export.json").read_text())["formats"]
    assert noted["gguf-lora"]["verified"]["jaxalign"]["rejected"] is False


def test_an_adapter_is_extracted_from_a_tuned_model(chat_models, tmp_path, capsys):
    chat = chat_models / "chat"
    source, deltas = made(tmp_path, chat, 0, LoraConfig(rank=2, alpha=6.0, targets=("query", "up")))
    tuned = tmp_path / "tuned"
    jaxalign.save_pretrained(
        *jaxalign.load_pretrained(source), tuned, tokenizer=chatmodel.make_tokenizer()
    )
    command = ["export", str(tuned), "--base", str(chat), "--to", "peft"]
    assert cli.main([*command, "--rank", "2", "--out", str(tmp_path / "whole")]) == 0
    assert "hold 100.0% of the squared change" in capsys.readouterr().out
    _, params = jaxalign.load_pretrained(tmp_path / "whole")
    _, expected = jaxalign.load_pretrained(tuned)
    expected = chatmodel.leaves(expected)
    for name, value in chatmodel.leaves(params).items():
        np.testing.assert_allclose(value, expected[name], atol=2e-5, err_msg=name)
    # Of rank 1: the largest singular value of each layer's change, by numpy.
    assert cli.main([*command, "--rank", "1", "--out", str(tmp_path / "one")]) == 0
    _, base = jaxalign.load_pretrained(chat)
    _, params = jaxalign.load_pretrained(tmp_path / "one")
    got = chatmodel.leaves(params)[QUERY] - chatmodel.leaves(base)[QUERY]
    for layer in range(2):
        u, s, v = np.linalg.svd(deltas[QUERY][layer])
        best = s[0] * np.outer(u[:, 0], v[0])
        np.testing.assert_allclose(got[layer], best, atol=2e-5)


def test_what_an_adapter_does_not_hold_is_said():
    model = Decoder(tiny.CONFIG)
    base = tiny.random_params(model, seed=1)
    tuned = jax.tree.map(lambda x: x, base)
    tuned["norm"] = jax.tree.map(lambda x: x * 1.5, tuned["norm"])
    kernel = tuned["blocks"]["mlp"]["down"]["kernel"]
    tuned["blocks"]["mlp"]["down"]["kernel"] = kernel * 1.5
    config = LoraConfig(rank=1, alpha=1.0, targets=("query", "down"))
    found = extract_lora(model, base, tuned, config)
    assert found.left == ("norm",)
    # Layers of a random matrix: the share of the largest of their squared singular values.
    s = np.linalg.svd(np.asarray(kernel), compute_uv=False) ** 2
    assert found.kept == {
        "blocks.attention.query": 1.0,  # nothing changed
        "blocks.mlp.down": pytest.approx(s[:, 0].sum() / s.sum(), rel=1e-4),
    }
    saved = LoraConfig(rank=1, targets=("down",), modules_to_save=("norm",))
    found = extract_lora(model, base, tuned, saved)
    assert found.left == ()
    np.testing.assert_array_equal(found.trained["norm"]["scale"], tuned["norm"]["scale"])
    with pytest.raises(ValueError, match="an extracted adapter has neither"):
        extract_lora(model, base, tuned, LoraConfig(rank=1, dora=True))


def test_wrong_requests_write_nothing(chat_models, tmp_path, capsys):
    chat, scorer = str(chat_models / "chat"), str(chat_models / "scorer")
    adapter, _ = made(tmp_path, chat, 0, LoraConfig(rank=2, targets=("up",)))
    there = sorted(tmp_path.iterdir())
    for options, message in (
        (["--adapter", adapter, "--weights", "1", "2"], "got 2 for 1 --adapter"),
        (["--adapter", adapter, "--adapter", adapter], "wanted each adapter once"),
        (["--adapter", adapter, "--base", chat], "give either"),
        (["--base", scorer], "is a reward model"),
        (["--base", chat, "--rank", "99"], "rank=99 is above that of"),
    ):
        assert cli.main(["export", chat, "--out", str(tmp_path / "out"), *options]) == 2
        assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == there
