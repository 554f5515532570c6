"""Training on packed batches of the data room equals training on documents one by one, unpadded.

Each document goes through the model alone, without segments, padding or masks; its loss is written
out here, from the formula, on logits and scores.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracle import furthest

from jaxalign.algorithms import dpo, reward, sft
from jaxalign.data import preference_batches, sft_batches
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer

MODEL = Decoder(dataclasses.replace(tiny.CONFIG, vocab_size=100))
SCORER = Scorer(MODEL)
BETA = 0.3

# Every word is one token, so that lengths are known: prompt, answer, and 6 that the template adds.
# Few different lengths in all, since each is compiled.
SFT = [(3, 4), (9, 2), (5, 6), (2, 5), (6, 5)]
PAIRS = [(3, 7, 11), (6, 8, 4), (8, 2, 6), (5, 5, 9)]


@pytest.fixture(scope="module")
def words():
    """A tokenizer of 90 words and ChatML."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>", "user", "assistant"]
    names = special + [f"w{n}" for n in range(90)]
    core = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(special[:3])
    template = (
        "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + "
        "' <|im_end|> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>", chat_template=template
    )


def _said(rng, count):
    return " ".join(f"w{n}" for n in rng.integers(0, 90, count))


def _ids(tok, prompt, answer):
    """The ids of a document and where its answer begins, put together here."""
    head = tok.encode(f"<|im_start|> user {prompt} <|im_end|> <|im_start|> assistant")
    return np.asarray(head + tok.encode(f"{answer} <|im_end|>"), np.int32)[None], len(head)


@jax.jit
def _logps(params, ids, first):
    """Σ log π of the tokens from `first` on."""
    logits = MODEL.logits(params, MODEL.apply(params, ids[:, :-1]))
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=2)[0, :, 0]
    return jnp.sum(jnp.where(jnp.arange(1, ids.shape[1]) >= first, chosen, 0))


@jax.jit
def _score(params, ids):
    """The score at the last token."""
    hidden = SCORER.apply(params, ids)[0, -1]
    return hidden.astype(jnp.float32) @ params["score"]["kernel"][:, 0].astype(jnp.float32)


def _packed(loss, params, batches):
    """Loss and gradient over all batches, each divided by what all weigh."""
    found = list(batches)
    (name,) = loss.count(found[0])
    weight = sum(float(loss.count(batch)[name]) for batch in found)

    @jax.jit
    def part(params, batch):
        return loss.terms(params, batch)[0][name] / weight

    parts = [jax.value_and_grad(part)(params, batch) for batch in found]
    total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    return (*total, weight)


def _check(packed, alone):
    (loss, gradient, _), (wanted, wanted_gradient) = packed, alone
    assert float(jnp.abs(loss - wanted)) < 1e-5
    assert furthest(gradient, wanted_gradient) < 1e-5
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted_gradient)) > 1e-2


def test_sft(words):
    rng = np.random.default_rng(0)
    rows = [{"prompt": _said(rng, p), "completion": _said(rng, a)} for p, a in SFT]
    batches = sft_batches(rows, words, rows=2, length=44, packing=True)
    assert batches.stats["rows"] == 2 < len(rows)
    params = tiny.random_params(MODEL, seed=1)
    documents = [_ids(words, row["prompt"], row["completion"]) for row in rows]
    count = sum(a + 1 for _, a in SFT)  # the answers and their end tokens

    def alone(params):
        return -sum(_logps(params, *document) for document in documents) / count

    packed = _packed(sft.make_loss(MODEL), params, batches)
    assert packed[2] == count
    _check(packed, jax.value_and_grad(alone)(params))


def _pairs(tok, shared):
    rng = np.random.default_rng(1)
    rows = [
        {"prompt": _said(rng, p), "chosen": _said(rng, c), "rejected": _said(rng, r)}
        for p, c, r in PAIRS
    ]
    documents = [[_ids(tok, r["prompt"], r[side]) for side in ("chosen", "rejected")] for r in rows]
    length = 64 if shared else 40
    batches = preference_batches(
        rows, tok, rows=2, length=length, packing=True, shared_prefix=shared
    )
    assert batches.stats["rows"] < len(rows)
    assert (batches.stats["saved"] > 0) == shared
    return documents, batches


@pytest.mark.parametrize("shared", [False, True])
def test_reward(words, shared):
    documents, batches = _pairs(words, shared)
    params = tiny.random_params(SCORER, seed=2)

    def alone(params):
        gaps = [_score(params, c) - _score(params, r) for (c, _), (r, _) in documents]
        return -sum(jax.nn.log_sigmoid(gap) for gap in gaps) / len(gaps)

    packed = _packed(reward.make_loss(SCORER), params, batches)
    assert packed[2] == len(PAIRS)
    _check(packed, jax.value_and_grad(alone)(params))


@pytest.mark.parametrize("shared", [False, True])
def test_dpo(words, shared):
    documents, batches = _pairs(words, shared)
    params, ref = tiny.random_params(MODEL, seed=1), tiny.random_params(MODEL, seed=3)
    before = [[_logps(ref, *document) for document in pair] for pair in documents]

    def alone(params):
        total = 0.0
        for pair, (ref_chosen, ref_rejected) in zip(documents, before, strict=True):
            chosen, rejected = (_logps(params, *document) for document in pair)
            total -= jax.nn.log_sigmoid(BETA * (chosen - ref_chosen - rejected + ref_rejected))
        return total / len(documents)

    prepare = dpo.make_prepare(MODEL)
    loss = dpo.make_loss(MODEL, dpo.Config(beta=BETA))
    packed = _packed(loss, params, [prepare(ref, batch) for batch in batches])
    assert packed[2] == len(PAIRS)
    _check(packed, jax.value_and_grad(alone)(params))


def test_plain_text_split_over_rows(words, tmp_path):
    """Wrapped: each piece alone, from the piece's start, up to the token it goes on with."""
    rng = np.random.default_rng(4)
    texts = [_said(rng, n) for n in (24, 8)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    batches = sft_batches(str(file), words, rows=2, length=17, packing="wrapped")
    params = tiny.random_params(MODEL, seed=1)
    stream = [(*words.encode(text), words.eos_token_id) for text in texts]
    pieces, free = [], 17
    for ids in stream:
        start = 0
        while start < len(ids):
            end = min(len(ids), start + free)
            pieces.append(np.asarray(ids[start : end + 1], np.int32)[None])
            free = 17 if end - start == free else free - (end - start)
            start = end
    pieces = [piece for piece in pieces if piece.shape[1] > 1]
    count = sum(len(ids) - 1 for ids in stream)

    def alone(params):
        return -sum(_logps(params, piece, 1) for piece in pieces) / count

    packed = _packed(sft.make_loss(MODEL), params, batches)
    assert packed[2] == count
    _check(packed, jax.value_and_grad(alone)(params))
