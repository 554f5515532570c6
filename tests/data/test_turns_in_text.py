"""Every turn is in the text, answers end where the turn ends, and time is linear in the text."""

import copy

import numpy as np
import pytest

from jaxalign.data import (
    Conversation,
    encode_conversations,
    encode_prompts,
    encode_training,
    stop_token_ids,
)
from jaxalign.data.render import Renderer


def _talk(*turns, tools=()):
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Conversation(messages, "f:1", 0, tools)


TURNS = {
    "system": _talk(("system", "Be brief."), ("user", "Why?"), ("assistant", "Night.")),
    "tool": _talk(("user", "t?"), ("assistant", "I look."), ("tool", "n"), ("assistant", "Noon.")),
    "user": _talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
}
CONDITIONS = {
    "system": "m.role in ('user', 'assistant')",
    "tool": "m.role != 'tool'",
    "user": "m.role != 'user' or loop.index0 == 0",
}
WRITE = "{{ '<|im_start|>' + m.role + '\n' }}%s{{ m.content + '<|im_end|>' }}%s{{ '\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def _template(condition, marked=False):
    marks = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    write = WRITE % marks
    if marked:
        write = "{% if m.role == 'assistant' %}" + write + "{% else %}" + WRITE % ("", "")
        write += "{% endif %}"
    return (
        f"{{% for m in messages %}}{{% if {condition} %}}{write}{{% endif %}}{{% endfor %}}{PROMPT}"
    )


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("train_on", ["all", "last", "split", "everything"])
@pytest.mark.parametrize("role", CONDITIONS)
def test_a_turn_that_a_template_leaves_out_is_named(tiny, role, train_on, marked):
    fine = _talk(("user", "Hello there"), ("assistant", "How are you"))
    rows = [fine, TURNS[role]]
    at = {"system": 0, "tool": 2, "user": 2}[role]
    template = _template(CONDITIONS[role], marked)
    with pytest.raises(ValueError, match=rf"f:1: messages\[{at}\] \({role}\) is not in what"):
        encode_training(tiny, rows, template, train_on)
    assert len(encode_training(tiny, rows, _template("true", marked), train_on)) >= 2
    if role == "system":
        with pytest.raises(ValueError, match=r"messages\[0\] \(system\) is not in what"):
            encode_prompts(tiny, [TURNS[role].messages[:2]], template)


SYSTEM_LAST = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{% if loop.last and s %}"
    "{{ '[INST] ' + s + ': ' + m.content + ' [/INST]' }}{% else %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% else %}"
    "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def test_answers_follow_the_prompt_of_generation(tiny):
    talk = _talk(
        ("system", "Be"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
    )
    documents = [d for _, d in encode_training(tiny, [talk], SYSTEM_LAST)]
    texts = [(tiny.decode(d.ids[~d.trained]), tiny.decode(d.ids[d.trained])) for d in documents]
    assert texts == [
        ("[INST] Be: a [/INST]", " b<|im_end|>"),
        ("[INST] a [/INST] b<|im_end|>[INST] Be: c [/INST]", " d<|im_end|>"),
    ]
    for document, size in zip(documents, (2, 4), strict=True):
        prompt = encode_prompts(tiny, [talk.messages[:size]], SYSTEM_LAST)[0]
        assert document.ids[~document.trained].tolist() == prompt.tolist()


def test_nothing_after_the_end_of_a_turn_is_trained(tiny):
    body = "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
    talk = _talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    end = tiny.convert_tokens_to_ids("<|im_end|>")
    for template in (
        body + "{{ 'assistant:' }}",
        body + "{% if add_generation_prompt %}{{ 'assistant:' }}{% else %}{{ '<pad>' }}{% endif %}",
    ):
        ((ids, trained),) = encode_conversations(tiny, [talk], template)[:1]
        assert tiny.decode(ids[trained]) == "b<|im_end|>d<|im_end|>"
        assert stop_token_ids(tiny, template) == (end,)


def test_end_tokens_are_checked_in_every_row(tiny):
    template = (
        "{% for m in messages %}{{ m.role + m.content }}{% if 'x' in m.content %}"
        "{{ '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
    )
    rows = [_talk(("user", "x"), ("assistant", "x"))] * 2 + [
        _talk(("user", "x"), ("assistant", "y"))
    ]
    for order in (rows, rows[::-1]):
        with pytest.raises(ValueError, match="ends with the ordinary token 'y'"):
            encode_conversations(tiny, order, template)


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)


def test_reasoning_after_the_open_header_and_answers_after_the_closed_one(tiny):
    question = {"role": "user", "content": "2+2?"}
    for answer, before, trained in (
        ({"content": "four"}, "<think>\n\n</think>\n\n", "four<|im_end|>"),
        (
            {"content": "<think>\nadd\n</think>\n\nfour"},
            "<think>\n",
            "add\n</think>\n\nfour<|im_end|>",
        ),
    ):
        talk = Conversation((question, {"role": "assistant"} | answer), "f:1")
        ((_, document),) = encode_training(tiny, [talk], THINKING)
        assert tiny.decode(document.ids[document.trained]) == trained
        first = int(np.argmax(document.trained))
        assert tiny.decode(document.ids[:first]).endswith(f"assistant\n{before}")


def test_sentencepiece_words_stay_whole():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", "▁o", "▁ti", "me", "▁", "▁me", "m", "e", "t", "i", "o"]
    merges = [("▁", "o"), ("t", "i"), ("▁", "ti"), ("m", "e"), ("▁", "me")]
    vocab = {piece: n for n, piece in enumerate([*pieces, "ti"])}
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    talk = _talk(("user", "o ti"), ("assistant", "me"))
    ((ids, trained),) = encode_conversations(tok, [talk], "none")
    assert [pieces[i] for i in ids] == ["▁o", "▁ti", "me", "</s>"]
    assert trained.tolist() == [False, False, True, True]


def test_prefixes_of_one_shape_are_rendered_once(tiny, monkeypatch):
    """Characters rendered grow with the text, not with its square."""
    written = []
    run = Renderer._run

    def counted(self, chat, *arguments, **options):
        result = run(self, chat, *arguments, **options)
        written.append(len(result[0][0]))
        return result

    monkeypatch.setattr(Renderer, "_run", counted)

    def conversations(answers):
        return [
            _talk(*(pair for n in range(answers)
                    for pair in (("user", f"{k} {n} " + "word " * 100), ("assistant", f"act {n}"))))
            for k in range(8)
        ]  # fmt: skip

    for answers in (10, 40):
        written.clear()
        rows = conversations(answers)
        encoded = encode_conversations(tiny, rows)
        length = sum(len(m["content"]) for row in rows for m in row.messages)
        assert sum(written) < 3 * length
        runs = [int((np.diff(trained.astype(int)) == 1).sum()) for _, trained in encoded]
        assert runs == [answers] * 8


def test_the_words_of_a_shape_do_not_change_its_mask(tiny):
    """Rows that share a shape, one at a time and together, give the same tokens."""
    other = copy.deepcopy(tiny)
    rows = [
        _talk(("user", f"{n} hello"), ("assistant", text), ("user", "you"), ("assistant", "dog"))
        for n, text in enumerate(["a", " b ", "Zq0001x", "c\n\nd", "<think>\ne\n</think>\n\nf"])
    ]
    together = encode_conversations(tiny, rows)
    for row, (ids, trained) in zip(rows, together, strict=True):
        ((alone, mask),) = encode_conversations(other, [row])
        assert ids.tolist() == alone.tolist()
        assert trained.tolist() == mask.tolist()
