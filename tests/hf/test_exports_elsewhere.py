"""Exports in other people's hands: twelve families with tokenizers of their form, in transformers.

In this environment's transformers, and in that of the Python that `JAXALIGN_OTHER_PYTHON` names,
such as one with transformers 4.57.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import elsewhere
import families
import jax
import numpy as np
import pytest

from jaxalign.data.chat import encode_prompt, stop_token_ids
from jaxalign.data.packing import prompt_rows
from jaxalign.hf import load_pretrained, load_tokenizer, save_pretrained
from jaxalign.sampling.generate import sample

torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

# Family → its published tokenizer's form in tests/data/test_ends.py, or a real one among the data.
TOKENIZERS = {
    "llama": "llama 3.1",
    "smollm3": "smollm3",
    "mistral": pathlib.Path("stories260K/hf"),
    "qwen2": pathlib.Path("qwen3-tokenizer"),
    "qwen3": pathlib.Path("qwen3-tokenizer"),
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "phi3": "phi 3",
    "olmo2": "olmo 2",
    "gpt2": pathlib.Path("gpt2-tokenizer"),
    "mixtral": pathlib.Path("stories260K/hf"),
    "qwen3_moe": pathlib.Path("qwen3-tokenizer"),
}
TEXT = "Hello, 你好 1234 😀\n  x <|im_end|>"


def _tokenizer(form, shared, folder):
    """Saves the tokenizer of a family into the folder, as publishers do, and returns it."""
    if isinstance(form, str):
        sys.path.append(str(pathlib.Path(__file__).parents[1] / "data"))
        import test_ends

        tok = test_ends._tokenizer(form)
        tok.save_pretrained(folder)
        return tok
    source = shared / "data" / form
    if not source.is_dir():
        pytest.skip(f"needs the tokenizer {form}, which is not beside this checkout")
    for path in source.iterdir():
        if path.name.startswith(("tokenizer", "vocab", "merges", "special_tokens")):
            shutil.copy(path, folder)
    kind = transformers.GPT2Tokenizer if "gpt2" in form.name else transformers.AutoTokenizer
    return kind.from_pretrained(source)


def _publish(family, shared, folder):
    """A model of the family, random but complete, whose generation_config lists two ends."""
    folder.mkdir()
    tok = _tokenizer(TOKENIZERS[family], shared, folder)
    keys = families.keys(family) | {
        "vocab_size": -(-len(tok) // 8) * 8,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": None,
    }
    if family == "olmo2":
        keys.pop("rope_parameters")  # the form of version 5 only
    if family == "gpt2":
        keys["n_positions"] = 64
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **keys)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    model.save_pretrained(folder)
    saved = load_tokenizer(folder)
    prompt = encode_prompt(saved, elsewhere.WORDS, None if saved.chat_template else "none")
    # An end that only generation_config names: the first token that the answer has not said before.
    answer = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=elsewhere.NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    new = [t for i, t in enumerate(answer) if i >= 3 and t not in answer[:i]]
    path = folder / "generation_config.json"
    options = json.loads(path.read_text())
    options["eos_token_id"] = [tok.eos_token_id, (new or answer)[0 if new else -1]]
    path.write_text(json.dumps(options))


def _export(source, target):
    """Loads and exports the model; what we find of it."""
    tok = load_tokenizer(source)
    template = None if tok.chat_template else "none"
    model, params = load_pretrained(source)
    ids = encode_prompt(tok, elsewhere.WORDS, template)
    stops = stop_token_ids(tok, template, model)
    rows = prompt_rows([np.asarray(ids, np.int32)], [0], 1, len(ids), 0)
    answer = sample(
        model,
        params,
        rows,
        jax.random.key(0),
        max_new_tokens=elsewhere.NEW_TOKENS,
        temperature=0.0,
        stop_tokens=stops,
    )
    logits = model.logits(params, model.apply(params, np.asarray([ids])))
    save_pretrained(model, params, target, tokenizer=tok)
    ends = json.loads((target / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends if isinstance(ends, list) else [ends]) == set(stops)
    found = {
        "text": TEXT,
        "ids": list(map(int, ids)),
        "plain": tok(TEXT, add_special_tokens=False).input_ids,
        "whole": tok(TEXT).input_ids,
        "prompt": None if template else list(map(int, ids)),
        "logits": np.asarray(logits)[0, -1].tolist(),
        "answer": np.asarray(answer.tokens)[0][np.asarray(answer.mask)[0]].tolist(),
    }
    target.with_suffix(".json").write_text(json.dumps(found))
    return found


def _read_by(python, folder):
    command = [python, str(pathlib.Path(elsewhere.__file__)), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", TOKENIZERS)
def test_ids_logits_and_ends_are_the_same_in_transformers(family, shared, tmp_path):
    source, target = tmp_path / "published", tmp_path / family
    _publish(family, shared, source)
    wanted = _export(source, target)
    assert 0 < len(wanted["answer"]) <= elsewhere.NEW_TOKENS
    readings = [elsewhere.read(target, wanted)]
    if other := os.environ.get("JAXALIGN_OTHER_PYTHON"):
        readings.append(_read_by(other, target))
    for got in readings:
        print(family, got["version"], np.abs(np.subtract(got["logits"], wanted["logits"])).max())
        for key in ("plain", "whole", "prompt", "answer"):
            assert got[key] == wanted[key], (got["version"], key)
        np.testing.assert_allclose(got["logits"], wanted["logits"], rtol=1e-5, atol=2e-5)
