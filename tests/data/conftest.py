"""A small tokenizer made on the spot, so that every test has a real one."""

import pytest

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = [
    "Hello there, how are you today? I am fine, thank you.",
    "The quick brown fox jumps over the lazy dog. user assistant system",
    "你好，世界！今天天气很好。请问你是谁？我是一个助手。",
]


@pytest.fixture(scope="session")
def tiny():
    """Byte-level BPE of some 300 tokens, ChatML; pad 0, eos <|im_end|>, no bos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        _TEXT,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def real(shared):
    """The real tokenizers, by name."""
    from transformers import AutoTokenizer

    names = ("smollm2", "minimind", "qwen3")
    return {n: AutoTokenizer.from_pretrained(shared / "data" / f"{n}-tokenizer") for n in names}
