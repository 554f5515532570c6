"""A tiny chat model on disk, and tiny runs of it: what tests of whole runs start from.

The tokenizer has one token a byte and ChatML's special tokens, so that lengths can be counted by
hand. The model has 2 layers of width 32 with random weights.
"""

import json
import pathlib

import jax
import numpy as np
import tiny
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

import jaxalign
from jaxalign.models.base import DecoderConfig
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer

SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 256 + len(SPECIAL)
DECODER = Decoder(
    DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )
)

# The header and the ends of turns of ChatML take 19 tokens besides the words of a short exchange:
# <|im_start|> user \n … <|im_end|> \n <|im_start|> assistant \n … <|im_end|> \n
QUESTIONS = ("hi", "up?", "a b", "so", "why", "go", "two", "red", "no?", "yes", "cat", "sun")
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "ok" + q[0]}]}
    for q in QUESTIONS
]
PAIRS = [{"prompt": q, "chosen": "yes" + q[0], "rejected": "no"} for q in QUESTIONS]
PROMPTS = [{"prompt": q} for q in QUESTIONS]
MARKED = [
    {"prompt": q, "completion": "yes" + q[0] if i % 3 else "no", "label": bool(i % 3)}
    for i, q in enumerate(QUESTIONS)
]
ROWS = {"sft": CONVERSATIONS, "reward": PAIRS, "dpo": PAIRS, "kto": MARKED, "ppo": PROMPTS}


def make_tokenizer(chat_template=CHATML):
    """One token a byte, after the special tokens."""
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    vocab |= {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), len(vocab))}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in SPECIAL])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|endoftext|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def save_models(folder):
    """Writes a language model to `folder/chat` and a reward model to `folder/scorer`."""
    tok = make_tokenizer()
    params = tiny.random_params(DECODER, seed=3)
    jaxalign.save_pretrained(DECODER, params, folder / "chat", tokenizer=tok)
    scorer = Scorer(DECODER)
    params = tiny.random_params(scorer, seed=4)
    jaxalign.save_pretrained(scorer, params, folder / "scorer", tokenizer=tok)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings(algorithm, models_folder, folder, **run):
    """Nested values of a tiny run, with its data written beside `folder`.

    8 rows a batch are one row for each of the 8 devices; 4 batches in 2⅔ epochs of 12 rows.
    """
    folder = pathlib.Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = folder.parent / f"{folder.name}-{algorithm}.jsonl"
    values = {
        "model": {"source": str(models_folder / "chat")},
        "data": {
            "train": [write_rows(data, ROWS[algorithm])],
            "rows": 8,
            "length": 32,
            "epochs": None,
        },
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant"},
        "run": {"folder": str(folder), "steps": 4, "log_every": 100} | run,
    }
    if algorithm == "ppo":
        values |= {
            "reward_model": str(models_folder / "scorer"),
            "ppo": {"max_new_tokens": 6},
            "ppo_epochs": 1,
        }
    return values


def lines(folder):
    """`metrics.jsonl` as a list of dicts."""
    text = (pathlib.Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def timeless(rows):
    """Without the wall-clock times, which no two runs share."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def weights(folder):
    """The bytes of every weight file of a model folder."""
    files = sorted(pathlib.Path(folder).glob("*.safetensors"))
    assert files
    return {file.name: file.read_bytes() for file in files}


def leaves(params):
    """Flat `{path: numpy array}` of a parameter tree."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}
