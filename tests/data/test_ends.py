"""Where an answer ends: as publishers list it, and the same for training and sampling."""

import json

import chatty
import numpy as np
import pytest

from jaxalign.data import Conversation, encode_training, stop_token_ids
from jaxalign.hf import load_tokenizer
from jaxalign.models.base import DecoderConfig

# Family → its tokenizer's special tokens, eos, padding and bos; its shape of turns; and what its
# published generation_config.json lists under eos_token_id, by the tokens' names. The numbers
# beside the families were compared with public copies of these files in November 2026.
PUBLISHED = {
    # meta-llama/Meta-Llama-3-8B-Instruct: [128001, 128009]
    "llama 3": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eot_id|>"],
        ("<|eot_id|>", None, "<|begin_of_text|>"),
        chatty.LLAMA3,
        {"<|end_of_text|>", "<|eot_id|>"},
    ),
    # meta-llama/Llama-3.1-8B-Instruct, 3.2 and 3.3: [128001, 128008, 128009]
    "llama 3.1": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"],
        ("<|eot_id|>", None, "<|begin_of_text|>"),
        chatty.LLAMA3,
        {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"},
    ),
    # Qwen/Qwen2.5-7B-Instruct, Qwen2 and Qwen3 (dense and MoE): [151645, 151643]
    "qwen": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ("<|im_end|>", "<|endoftext|>", None),
        chatty.CHATML,
        {"<|im_end|>", "<|endoftext|>"},
    ),
    # HuggingFaceTB/SmolLM2-135M-Instruct: 2
    "smollm2": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"],
        ("<|im_end|>", "<|im_end|>", "<|im_start|>"),
        chatty.CHATML,
        {"<|im_end|>"},
    ),
    # HuggingFaceTB/SmolLM3-3B: 128012, in Llama 3's vocabulary
    "smollm3": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"],
        ("<|im_end|>", "<|im_end|>", None),
        chatty.CHATML,
        {"<|im_end|>"},
    ),
    # google/gemma-2-2b-it: [1, 107]; google/gemma-3-1b-it: [1, 106]
    "gemma": (
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        ("<eos>", "<pad>", "<bos>"),
        chatty.GEMMA,
        {"<eos>", "<end_of_turn>"},
    ),
    # mistralai/Mistral-7B-Instruct-v0.2 and Mixtral-8x7B-Instruct-v0.1: 2
    "mistral": (
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
        ("</s>", None, "<s>"),
        chatty.MISTRAL,
        {"</s>"},
    ),
    # microsoft/Phi-3-mini-4k-instruct and Phi-3.5-mini-instruct: [32000, 32001, 32007]
    "phi 3": (
        ["<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>"],
        ("<|endoftext|>", "<|endoftext|>", None),
        chatty.PHI,
        {"<|endoftext|>", "<|assistant|>", "<|end|>"},
    ),
    # microsoft/Phi-4-mini-instruct: [200020, 199999]
    "phi 4 mini": (
        ["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"],
        ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
        chatty.PHI,
        {"<|endoftext|>", "<|end|>"},
    ),
    # CohereForAI/c4ai-command-r-v01: 255001; Command R7B writes the next header always
    "command r": (
        ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
         "<|CHATBOT_TOKEN|>"],
        ("<|END_OF_TURN_TOKEN|>", None, "<BOS_TOKEN>"),
        chatty.COMMAND,
        {"<|END_OF_TURN_TOKEN|>"},
    ),
    "command r7b": (
        ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
         "<|CHATBOT_TOKEN|>"],
        ("<|END_OF_TURN_TOKEN|>", None, "<BOS_TOKEN>"),
        chatty.COMMAND_NEXT,
        {"<|END_OF_TURN_TOKEN|>"},
    ),
    # openai/gpt-oss-20b: [200002, 199999, 200012]
    "gpt-oss": (
        ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>",
         "<|message|>", "<|call|>"],
        ("<|return|>", "<|endoftext|>", "<|startoftext|>"),
        chatty.GPT_OSS,
        {"<|return|>", "<|endoftext|>", "<|call|>"},
    ),
    # allenai/OLMo-2-1124-7B-Instruct: 100257
    "olmo 2": (
        ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|pad|>"],
        ("<|endoftext|>", "<|pad|>", "<|endoftext|>"),
        chatty.OLMO,
        {"<|endoftext|>"},
    ),
    # openai-community/gpt2: 50256; it has no template
    "gpt2": (["<|endoftext|>"], ("<|endoftext|>", None, "<|endoftext|>"), None, {"<|endoftext|>"}),
}  # fmt: skip


def _tokenizer(name):
    specials, (eos, pad, bos), template, _ = PUBLISHED[name]
    return chatty.tokenizer(specials, eos=eos, pad=pad, bos=bos, template=template)


def _names(tok, ids):
    return set(tok.convert_ids_to_tokens(list(ids)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_answers_end_where_the_publisher_says(name, tmp_path):
    tok, wanted = _tokenizer(name), PUBLISHED[name][3]
    template = None if tok.chat_template else "none"
    assert _names(tok, stop_token_ids(tok, template)) == wanted
    # The same from a folder that lists them, padded as it may be.
    tok.save_pretrained(tmp_path)
    listed = {"eos_token_id": tok.convert_tokens_to_ids(sorted(wanted))}
    (tmp_path / "generation_config.json").write_text(json.dumps(listed))
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token not in {"<|im_start|>", "<|user|>", "<|eot_id|>", "<|start|>"}
    assert _names(loaded, stop_token_ids(loaded, template)) == wanted


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "gpt2"])
def test_training_stops_where_sampling_does(name):
    tok = _tokenizer(name)
    stops = set(stop_token_ids(tok))
    talk = tuple(
        {"role": role, "content": content}
        for role, content in (
            ("user", "who?"), ("assistant", "me"), ("user", "and?"), ("assistant", "you too"),
        )
    )  # fmt: skip
    said = []
    for _, document in encode_training(tok, [Conversation(talk, "f:1")]):
        edges = np.diff(np.concatenate([[0], document.trained.astype(int), [0]]))
        for first, last in zip(
            np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True
        ):
            answer = document.ids[first:last].tolist()
            # The end is the last token of each trained passage, and no other of them ends it.
            assert [token in stops for token in answer] == [False] * (len(answer) - 1) + [True]
            said.append(tok.decode(answer[:-1]).strip())
    assert sorted(said) == ["me", "you too"]


def test_what_the_models_source_lists_ends_answers_too():
    tok = _tokenizer("smollm2")
    source = {"_generation_config": {"eos_token_id": [7, 10_000]}, "eos_token_id": 8}
    config = DecoderConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=8, source_config=json.dumps(source),
    )  # fmt: skip

    class Model:
        def __init__(self):
            self.config = config

    (end,) = stop_token_ids(tok)
    assert stop_token_ids(tok, model=Model()) == (7, end)  # the other id is no row of the model
    assert stop_token_ids(tok, listed=[3]) == (3, end)
    assert stop_token_ids(tok, "none") == (end,)


def test_exported_tokenizers_say_the_same_in_transformers(tmp_path):
    """Every form, through an export: the same ids, and generation stops at the same tokens."""
    import tiny
    import transformers

    from jaxalign.hf import save_pretrained
    from jaxalign.models.decoder import Decoder

    config = DecoderConfig(
        vocab_size=272, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=8,
    )  # fmt: skip
    model = Decoder(config)
    params = tiny.random_params(model)
    text = "Hello, 你好 1234 😀\n  x <|im_end|> <end_of_turn>"
    for number, name in enumerate(PUBLISHED):
        tok, folder = _tokenizer(name), tmp_path / str(number)
        save_pretrained(model, params, folder, tokenizer=tok)
        again = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        assert again(text).input_ids == tok(text).input_ids, name
        assert again.chat_template == tok.chat_template, name
        listed = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        listed = listed if isinstance(listed, list) else [listed]
        assert _names(tok, listed) == PUBLISHED[name][3], name
        saved = json.loads((folder / "tokenizer_config.json").read_text())
        assert not isinstance(saved.get("extra_special_tokens"), list), name
