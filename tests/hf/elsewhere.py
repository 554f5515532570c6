"""Reads exported folders with transformers alone, of version 4 or 5: run as a script by any Python.

python tests/hf/elsewhere.py FOLDER [FOLDER ...]

Each folder holds a model, and beside it `<folder>.json`: what jaxalign found of it. Prints one line
of JSON a folder: what transformers finds of the same.
"""

import json
import pathlib
import sys

NEW_TOKENS = 10
WORDS = "Once upon a time"


def read(folder, wanted):
    import torch
    import transformers

    tok = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompt = None
    if wanted["prompt"] is not None:
        turns = [{"role": "user", "content": WORDS}]
        text = tok.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False, thinking=False
        )
        prompt = tok(text, add_special_tokens=False).input_ids
    ids = torch.tensor([wanted["ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, -1].tolist()
        sampled = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return {
        "version": transformers.__version__,
        "plain": tok(wanted["text"], add_special_tokens=False).input_ids,
        "whole": tok(wanted["text"]).input_ids,
        "prompt": prompt,
        "logits": logits,
        "answer": sampled[0, ids.shape[1] :].tolist(),
    }


if __name__ == "__main__":
    for name in sys.argv[1:]:
        folder = pathlib.Path(name)
        wanted = json.loads(folder.with_suffix(".json").read_text())
        print(json.dumps({"family": folder.name} | read(folder, wanted)), flush=True)
