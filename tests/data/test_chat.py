"""Masks against a brute-force search in the tokens, and against text."""

import copy
import itertools
import json
import re

import numpy as np
import pytest

from jaxalign.data import (
    Conversation,
    encode_conversations,
    encode_prompt,
    encode_prompts,
    resolve_chat_template,
    stop_token_ids,
)

_TALKS = [
    [("user", "Hello, who are you?"), ("assistant", "I am a helper.")],
    [("system", "Be brief."), ("user", "你好！"), ("assistant", "你好，世界。今天天气很好😀")],
    [
        ("user", "What is 2 + 2?"),
        ("assistant", "  4, with spaces around  "),
        ("user", "assistant\nand the word user, <b>really</b>?"),
        ("assistant", "Yes:\n\n- one\n- two\n"),
        ("user", "再见"),
        ("assistant", "再见！"),
    ],
    [("user", "Say it twice"), ("assistant", "Same."), ("user", "Again"), ("assistant", "Same.")],
    [("user", "a"), ("assistant", "b"), ("user", "trailing question")],
]


def _conversation(talk, trained_from=0):
    turns = tuple({"role": role, "content": text} for role, text in talk)
    return Conversation(turns, "f.jsonl:1", trained_from)


def _brute_force(tok, ids):
    """Token by token: after each assistant header (and empty reasoning), up to the end token."""
    header = tok.encode("<|im_start|>assistant\n", add_special_tokens=False)
    thinking = tok.encode("<think>\n\n</think>\n\n", add_special_tokens=False)
    end = tok.convert_tokens_to_ids("<|im_end|>")
    mask = [False] * len(ids)
    for at in range(len(ids)):
        if ids[at : at + len(header)] == header:
            here = at + len(header)
            if ids[here : here + len(thinking)] == thinking:
                here += len(thinking)
            while ids[here] != end:
                mask[here] = True
                here += 1
            mask[here] = True
    return mask


def _cut_after_headers(tok, text):
    """The text in pieces, cut where answers begin if a token would straddle that border."""
    begin = r"(?<=<\|im_start\|>assistant\n)(?:<think>\n\n</think>\n\n)?"
    pieces = [0, *(m.end() for m in re.finditer(begin, text)), len(text)]
    whole = tok(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if any(a < cut < b for cut in pieces for a, b in whole):
        return [text[a:b] for a, b in itertools.pairwise(pieces)]
    return [text]


def _runs(mask):
    """First and last + 1 of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(mask, int), [0]])))
    return edges.reshape(-1, 2)


def _check(tok, talks, template=None):
    encoded = encode_conversations(tok, [_conversation(talk) for talk in talks], template)
    for talk, (ids, trained) in zip(talks, encoded, strict=True):
        assert ids.dtype == np.int32
        assert trained.dtype == np.bool_
        turns = list(_conversation(talk).messages)
        text = tok.apply_chat_template(turns, tokenize=False, chat_template=template)
        pieces = _cut_after_headers(tok, text)
        assert ids.tolist() == [i for p in pieces for i in tok.encode(p, add_special_tokens=False)]
        assert trained.tolist() == _brute_force(tok, ids.tolist())
        said = [tok.decode(ids[first:last]) for first, last in _runs(trained)]
        wanted = [content for role, content in talk if role == "assistant"]
        assert [s.removesuffix("<|im_end|>").strip() for s in said] == [w.strip() for w in wanted]
        assert all(s.endswith("<|im_end|>") for s in said)


def test_masks_of_the_tiny_tokenizer(tiny):
    _check(tiny, _TALKS)


@pytest.mark.parametrize("name", ["smollm2", "minimind", "qwen3"])
def test_masks_under_real_templates(real, name):
    _check(real[name], _TALKS)


def test_masks_on_real_data(real, shared):
    for name, file in [("smollm2", "alpaca_en_demo"), ("qwen3", "alpaca_zh_demo")]:
        rows = json.loads((shared / "data" / "llamafactory" / f"{file}.json").read_text())[:150]
        talks = [[("user", r["instruction"]), ("assistant", r["output"])] for r in rows]
        _check(real[name], talks)


def test_golden_ids_of_smollm2(real):
    # Written down from the tokenizer's vocabulary: [1] starts, [2] ends a turn, 198 is the newline.
    ids, trained = encode_conversations(
        real["smollm2"], [_conversation([("user", "Hello"), ("assistant", "Hi")])], "chatml"
    )[0]
    assert ids.tolist() == [1, 4093, 198, 19556, 2, 198, 1, 520, 9531, 198, 26843, 2, 198]
    assert trained.tolist() == [False] * 10 + [True, True, False]


def test_earlier_turns_of_a_prompt_are_context(tiny):
    ids, trained = encode_conversations(tiny, [_conversation(_TALKS[2], trained_from=3)])[0]
    assert len(_runs(trained)) == 2
    assert trained.tolist() != _brute_force(tiny, ids.tolist())
    first = _runs(trained)[0]
    assert tiny.decode(ids[slice(*first)]).startswith("Yes:")


@pytest.mark.parametrize("name", ["qwen3", "minimind"])
def test_reasoning_in_the_last_answer_is_trained(real, name):
    tok = real[name]
    talk = [
        ("user", "q"), ("assistant", "<think>\nolder\n</think>\n\nfirst"),
        ("user", "r"), ("assistant", "<think>\nnow 想\n</think>\n\nlast"),
    ]  # fmt: skip
    ids, trained = encode_conversations(tok, [_conversation(talk)])[0]
    said = [tok.decode(ids[first:last]) for first, last in _runs(trained)]
    # Qwen3 shows the reasoning of the last answer only; minimind opens it in the header.
    assert (
        said
        == {
            "qwen3": ["first<|im_end|>", "<think>\nnow 想\n</think>\n\nlast<|im_end|>"],
            "minimind": [
                "older\n</think>\n\nfirst<|im_end|>",
                "now 想\n</think>\n\nlast<|im_end|>",
            ],
        }[name]
    )


def test_a_prompt_is_the_beginning_of_its_training_row(tiny, real):
    for tok in (tiny, *real.values()):
        for template in (None, "chatml"):
            talk = [("user", "Hello, who are you?"), ("assistant", "I am 你好.")]
            ids, trained = encode_conversations(tok, [_conversation(talk)], template)[0]
            prompt = encode_prompt(tok, "Hello, who are you?", template)
            assert prompt == ids[: int(np.argmax(trained))].tolist()


def test_encode_prompts_of_several_turns(tiny):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "你好"}]
    text = (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = encode_prompt(tiny, turns)
    assert tiny.decode(ids) == text
    assert [p.tolist() for p in encode_prompts(tiny, [tuple(turns)] * 2)] == [ids, ids]
    with pytest.raises(ValueError, match=r"prompt: messages\[0\]\.role"):
        encode_prompt(tiny, [{"role": "robot", "content": "x"}])


def test_builtin_chatml_has_no_default_system_prompt(tiny):
    turns = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b\n"}]
    template = resolve_chat_template(tiny, "chatml")
    text = tiny.apply_chat_template(turns, tokenize=False, chat_template=template)
    assert text == "<|im_start|>user\n a <|im_end|>\n<|im_start|>assistant\nb\n<|im_end|>\n"


def test_resolve(tiny, tmp_path):
    assert resolve_chat_template(tiny) == tiny.chat_template
    assert resolve_chat_template(tiny, "none") == "none"
    assert resolve_chat_template(tiny, "{{ messages }}") == "{{ messages }}"
    file = tmp_path / "my.jinja"
    file.write_text("{{ 1 }}")
    assert resolve_chat_template(tiny, str(file)) == "{{ 1 }}"
    assert resolve_chat_template(tiny, file) == "{{ 1 }}"
    with pytest.raises(
        ValueError, match=r"no file 'chatlm'; wanted one of chatml, none, or a jinja"
    ):
        resolve_chat_template(tiny, "chatlm")


@pytest.fixture
def bare(tiny):
    own = copy.deepcopy(tiny)
    own.chat_template = None
    return own


def test_no_template_is_an_error_with_a_remedy(bare):
    with pytest.raises(
        ValueError, match="has no chat template; pass as chat_template one of chatml"
    ):
        encode_conversations(bare, [_conversation(_TALKS[0])])


def test_plain_text(bare):
    talk = [("user", "Hello there,"), ("assistant", " how are you")]
    ids, trained = encode_conversations(bare, [_conversation(talk)], "none")[0]
    assert bare.decode(ids) == "Hello there, how are you<|im_end|>"
    assert bare.decode(ids[trained]) == " how are you<|im_end|>"
    assert encode_prompt(bare, "Hello there,", "none") == ids[~trained].tolist()
    # Where one token would hold letters of both, the prompt's tokens stay as they are.
    h, e = next(word for word in bare.get_vocab() if len(word) == 2 and word.isascii())
    assert len(bare.encode(h + e)) == 1
    ids, trained = encode_conversations(
        bare, [_conversation([("user", h), ("assistant", e)])], "none"
    )[0]
    assert [bare.decode([i]) for i in ids] == [h, e, "<|im_end|>"]
    assert trained.tolist() == [False, True, True]
    # A bos token comes first where the tokenizer itself puts it there.
    bare.bos_token = "<|im_start|>"
    ids, trained = encode_conversations(bare, [_conversation(talk)], "none")[0]
    assert bare.decode(ids) == "Hello there, how are you<|im_end|>"
    from tokenizers.processors import TemplateProcessing

    begin = ("<|im_start|>", bare.bos_token_id)
    bare.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[begin]
    )
    ids, trained = encode_conversations(bare, [_conversation(talk)], "none")[0]
    assert ids[0] == encode_prompt(bare, "x", "none")[0] == bare.bos_token_id
    assert bare.decode(ids[trained]) == " how are you<|im_end|>"


def test_plain_text_takes_one_turn_each(tiny):
    with pytest.raises(ValueError, match=r"f.jsonl:1: got the turns \[system, user\]"):
        encode_conversations(tiny, [_conversation(_TALKS[1])], "none")
    with pytest.raises(ValueError, match=r"f.jsonl:1: .*no completion|got the turns"):
        encode_conversations(tiny, [_conversation(_TALKS[4])], "none")


def test_stop_tokens(tiny):
    end = tiny.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(tiny) == stop_token_ids(tiny, "none") == (end,)
    other = tiny.chat_template.replace("<|im_end|>", "<pad>")
    assert stop_token_ids(tiny, other) == (tiny.pad_token_id, end)


# The last turn looks different from the earlier ones, so prefixes do not match.
_UNSTABLE = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{{ 'A' if loop.last else 'B' }}{OPEN}{{ m.content + '<|im_end|>\n' }}{CLOSE}"
    "{%- else -%}{{ 'U' + m.content + '|' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'A' }}{%- endif -%}"
)


def test_generation_marks_are_used_where_prefixes_fail(tiny):
    talk = [("user", "q"), ("assistant", "你好"), ("user", "r"), ("assistant", "bye")]
    plain = _UNSTABLE.replace("{OPEN}", "").replace("{CLOSE}", "")
    with pytest.raises(
        ValueError, match=r"f\.jsonl:1: .* renders messages\[1\] .*pass chat_template='chatml'"
    ):
        encode_conversations(tiny, [_conversation(talk)], plain)
    marked = _UNSTABLE.replace("{OPEN}", "{% generation %}").replace(
        "{CLOSE}", "{% endgeneration %}"
    )
    for first, said in [(0, ["你好<|im_end|>", "bye<|im_end|>"]), (3, ["bye<|im_end|>"])]:
        ids, trained = encode_conversations(tiny, [_conversation(talk, first)], marked)[0]
        assert tiny.decode(ids) == "Uq|B你好<|im_end|>\nUr|Abye<|im_end|>\n"
        assert [tiny.decode(ids[a:b]) for a, b in _runs(trained)] == said


def test_incomplete_generation_marks_are_refused(tiny):
    once = _UNSTABLE.replace(
        "{OPEN}", "{% if loop.last %}{% generation %}x{% endgeneration %}{% endif %}"
    )
    once = once.replace("{CLOSE}", "")
    talk = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    with pytest.raises(ValueError, match=r"marks 1 passages .* wanted one for each of the 2"):
        encode_conversations(tiny, [_conversation(talk)], once)


def test_a_template_without_end_token_is_refused(tiny):
    talk = [_conversation([("user", "q"), ("assistant", "a")])]
    template = tiny.chat_template.replace("<|im_end|>", "|")
    with pytest.raises(ValueError, match=r"ordinary token '\|', so a model"):
        encode_conversations(tiny, talk, template)


def test_errors_of_a_template_name_the_row(tiny):
    template = (
        "{{ raise_exception('roles must alternate') if messages|length > 2 }}" + tiny.chat_template
    )
    good, bad = _conversation(_TALKS[0]), _conversation(_TALKS[2])._replace(origin="f.jsonl:9")
    with pytest.raises(
        ValueError, match=r"^f\.jsonl:9: the chat template refuses .*must alternate"
    ):
        encode_conversations(tiny, [good, bad], template)
    with pytest.raises(ValueError, match=r"^f\.jsonl:1: the chat template refuses"):
        encode_conversations(tiny, [good], "{% if %}{{ x }}")


def test_marks_of_the_reference_template(shared):
    """TRL's conversations: content and end token of each turn, counted by hand."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reference = json.loads((shared / "oracle" / "assistant_masks.json").read_text())
    words = {"<eos>": 2} | {f"t{n}": n for n in range(3, 64)} | {"<unk>": 0}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    talks = [Conversation(tuple(c), "f:1") for c in reference["conversations"]]
    encoded = encode_conversations(tok, talks, reference["chat_template"])
    for (ids, trained), example in zip(encoded, reference["examples"], strict=True):
        assert ids.tolist() == example["input_ids"]
        # The reference also trains the user's turn after an answer (it cannot place the blank at
        # the end of a marked passage); the turns themselves are in both.
        labels = np.asarray(example["labels"])
        assert (labels[trained] == ids[trained]).all()
    assert [e.ids[e.trained].tolist() for e in encoded] == [
        [30, 31, 2, 32, 33, 34, 2],
        [50, 51, 52, 53, 54, 2],
    ]
