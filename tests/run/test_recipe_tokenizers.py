"""Every recipe under a tokenizer of its model's form: nothing is refused, and answers can end.

The tokenizers are tiny (a token a byte) but have the special tokens, the end tokens and in short
form the chat templates of the models' own; what the hub holds is not read.
"""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

import jaxalign as ja
from jaxalign.data import stop_token_ids
from jaxalign.run.config.runs import load_config

FOLDER = pathlib.Path(__file__).parents[2] / "configs/recipes"
RECIPES = sorted(FOLDER.glob("*/*.yaml"))

LLAMA = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}"
    "{{- 'Today Date: 26 Jul 2024\n\n' + system + '<|eot_id|>' }}"
    "{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{- m['content']|trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'] + '\n\n' -%}{%- set loop_messages = messages[1:] -%}"
    "{%- else -%}{%- set first = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- for m in loop_messages -%}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{%- endif -%}{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
    "{{ m['content']|trim }}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
QWEN = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
LLAMA_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|reserved_special_token_0|>"),
)
GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>")

# Hub id by its form → (special tokens, bos, eos, template, the token that ends a turn)
FORMS = {
    "llama-base": (LLAMA_TOKENS, "<|begin_of_text|>", "<|end_of_text|>", None, None),
    "llama-tuned": (LLAMA_TOKENS, "<|begin_of_text|>", "<|eot_id|>", LLAMA, "<|eot_id|>"),
    "gemma-base": (GEMMA_TOKENS, "<bos>", "<eos>", None, None),
    "gemma-tuned": (GEMMA_TOKENS, "<bos>", "<eos>", GEMMA, "<end_of_turn>"),
    "qwen-base": (QWEN_TOKENS, None, "<|endoftext|>", QWEN, "<|im_end|>"),
    "qwen-tuned": (QWEN_TOKENS, None, "<|im_end|>", QWEN, "<|im_end|>"),
}


def form_of(hub_id):
    family = next(name for name in ("llama", "gemma", "qwen") if name in hub_id.lower())
    tuned = {
        "llama": hub_id.endswith("-Instruct"),
        "gemma": hub_id.endswith("-it"),
        "qwen": not hub_id.endswith("-Base"),
    }[family]
    return f"{family}-{'tuned' if tuned else 'base'}"


@pytest.fixture(scope="module")
def tokenizers_of(tmp_path_factory):
    """A tokenizer of each form, saved and loaded as a run loads it."""
    made = {}
    for name, (special, bos, eos, template, _) in FORMS.items():
        vocab = {token: i for i, token in enumerate(special)}
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab |= {c: i for i, c in enumerate(alphabet, len(vocab))}
        core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special])
        if bos is not None:
            core.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos} $B:1",
                special_tokens=[(bos, vocab[bos])],
            )
        tok = transformers.PreTrainedTokenizerFast(
            tokenizer_object=core,
            bos_token=bos,
            eos_token=eos,
            chat_template=template,
            clean_up_tokenization_spaces=False,
        )
        folder = tmp_path_factory.mktemp(name)
        tok.save_pretrained(folder)
        made[name] = ja.load_tokenizer(folder)
    return made


def turns(*contents):
    return [
        {"role": "assistant" if i % 2 else "user", "content": text}
        for i, text in enumerate(contents)
    ]


# Rows as the recipes' data sets have them.
ROWS = {
    "sft": [{"id": "a", "messages": turns("hi", "hello", "and?", "yes"), "source": "s"}],
    "pairs": [
        {
            "prompt": "hi",
            "chosen": turns("hi", "hello there"),
            "rejected": turns("hi", "what"),
        }
    ],
    "ppo": [{"prompt": turns("hi")}],
}
ENCODED = {"length": 256, "shuffle": False}


def answers(tok, tokens):
    """The trained texts of the first row."""
    row = np.asarray(tokens.targets[0]), np.asarray(tokens.loss_mask[0])
    cuts = np.flatnonzero(np.diff(np.concatenate([[0], row[1], [0]])))
    return [tok.decode(row[0][a:b]) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_and_its_tokenizer(path, tokenizers_of, tmp_path):
    algorithm = path.stem
    config = load_config(algorithm, path)
    source = config.model.source
    form = form_of(source if config.model.tokenizer is None else config.model.tokenizer)
    assert form.split("-")[0] == form_of(source).split("-")[0]  # the same vocabulary
    tok, template = tokenizers_of[form], config.model.chat_template
    end = FORMS[form][-1]
    rows = ROWS.get(algorithm, ROWS["pairs"])
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded = ENCODED | {"rows": 1, "chat_template": template}
    if algorithm == "sft":
        (batch,) = ja.sft_batches([str(data)], tok, **encoded)
        first, last = answers(tok, batch)
        assert (first, last.removeprefix("<think>\n\n</think>\n\n")) == (f"hello{end}", f"yes{end}")
    elif algorithm == "ppo":
        (batch,) = ja.prompt_batches([str(data)], tok, **encoded)
        prompt = tok.decode(batch.tokens[0][batch.mask[0]])
        assert "hi" in prompt
        assert prompt.rstrip().endswith(("assistant", "<start_of_turn>model", "</think>")) or (
            prompt.endswith("<|end_header_id|>\n\n")
        )
    else:
        (batch,) = ja.preference_batches([str(data)], tok, **encoded)
        (chosen,), (rejected,) = (answers(tok, side) for side in (batch.chosen, batch.rejected))
        assert chosen.endswith(f"hello there{end}")
        assert rejected.endswith(f"what{end}")
    assert tok.convert_tokens_to_ids(end) in stop_token_ids(tok, template)


@pytest.mark.parametrize("form", ["llama-base", "gemma-base"])
def test_a_base_model_under_chatml_is_refused(form, tokenizers_of, tmp_path):
    """Its tokenizer has no <|im_end|>: an answer would end in ordinary tokens."""
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(ROWS["sft"][0]) + "\n")
    with pytest.raises(ValueError, match=r"ordinary token.*chat_template='alpaca'"):
        ja.sft_batches([str(data)], tokenizers_of[form], rows=1, chat_template="chatml", **ENCODED)
    (batch,) = ja.sft_batches(
        [str(data)], tokenizers_of[form], rows=1, chat_template="alpaca", **ENCODED
    )
    eos = FORMS[form][2]
    assert answers(tokenizers_of[form], batch) == [f"hello{eos}", f"yes{eos}"]
