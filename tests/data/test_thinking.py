"""Reasoning as an option: training and sampling write the same prompt, both sides of a pair too."""

import chatty
import numpy as np
import pytest

from jaxalign.data import (
    RowError,
    encode_prompts,
    encode_training,
    preference_batches,
    prompt_batches,
    ranked_batches,
    sft_batches,
    to_conversation,
)
from jaxalign.data.chat import encode_prompt
from jaxalign.data.files import Row
from jaxalign.data.writers import Style

# As Qwen3: the prompt without reasoning closes an empty block; history loses its reasoning.
CLOSES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
# As DeepSeek V3.1: `thinking` opens the block in the prompt, which is closed otherwise.
OPENS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>{% if loop.last and "
    "thinking and m.reasoning_content %}<think>{{ m.reasoning_content }}{% endif %}</think>"
    "{{ m.content }}<|end|>{% else %}<|User|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% if thinking %}<think>{% else %}</think>"
    "{% endif %}{% endif %}"
)
# As QwQ: always opens the block.
ALWAYS = chatty.turns(
    "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n",
    prompt="<|im_start|>assistant\n<think>\n",
)  # fmt: skip
# As SmolLM3: says in a system turn whether to think.
SAYS = (
    "<|im_start|>system\n/{{ 'think' if enable_thinking else 'no_think' }}<|im_end|>\n"
    + chatty.CHATML
)
TEMPLATES = {
    "closes": CLOSES,
    "opens": OPENS,
    "always": ALWAYS,
    "says": SAYS,
    "none of it": chatty.CHATML,
}
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>", "<|end|>")


@pytest.fixture(scope="module")
def tok():
    plain = ("<think>", "</think>")
    return chatty.tokenizer(SPECIALS, eos="<|im_end|>", pad=None, plain=plain)


def _row(thought=None):
    answer = {"role": "assistant", "content": "Four."}
    if thought is not None:
        answer["reasoning_content"] = thought
    return {"messages": [{"role": "user", "content": "2+2?"}, answer]}


def _trained(tok, template, row, thinking):
    """Prompt and answer of the one document of a row."""
    example = to_conversation(Row(row, "f:1"))
    ((_, document),) = encode_training(tok, [example], template, style=Style(thinking=thinking))
    first, last = np.flatnonzero(document.trained)[[0, -1]]
    ids = document.ids.tolist()
    return ids[:first], tok.decode(ids[first : last + 1])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("thinking", ["auto", "on", "off"])
def test_training_and_sampling_write_the_same_prompt(tok, name, thinking):
    template = TEMPLATES[name]
    sampled = encode_prompt(tok, "2+2?", template, thinking=thinking)
    asked = {"messages": [{"role": "user", "content": "2+2?"}]}
    style = Style(thinking=thinking)
    messages = [tuple(asked["messages"])]
    assert encode_prompts(tok, messages, template, style=style)[0].tolist() == sampled
    rollout = next(
        iter(
            prompt_batches(
                [{"prompt": "2+2?"}], tok, rows=1, length=128, chat_template=template,
                thinking=thinking,
            )
        )
    )  # fmt: skip
    assert rollout.tokens[0][rollout.mask[0]].tolist() == sampled
    prompt, said = _trained(tok, template, _row(), thinking)
    assert prompt == sampled
    assert said.rpartition("</think>")[2].strip() in ("Four.<|im_end|>", "Four.<|end|>")
    # Reasoning is trained unless it is off; "on" and "auto" agree on rows that have it.
    prompt, said = _trained(tok, template, _row("two and two"), thinking)
    assert ("two and two" in said) == (thinking != "off")
    wanted = sampled if thinking != "auto" else encode_prompt(tok, "2+2?", template, thinking="on")
    assert prompt == wanted


def test_variables_of_a_run_and_of_a_row_stand_above_it(tok):
    kwargs = {"enable_thinking": True}
    first = encode_prompt(tok, "2+2?", CLOSES, chat_template_kwargs=kwargs)
    assert first == encode_prompt(tok, "2+2?", CLOSES, thinking="on")
    row = _row() | {"chat_template_kwargs": kwargs}
    assert _trained(tok, CLOSES, row, "off")[0] == first


def test_reasoning_that_is_left_out_is_counted_and_never_the_whole_answer(tok, capsys):
    rows = [_row("two"), _row(), _row("2, 2")]
    batches = sft_batches(
        rows, tok, rows=3, length=128, chat_template=CLOSES, thinking="off", packing=False
    )
    list(batches)
    assert "reasoning left out of 2 answers (thinking: off)" in capsys.readouterr().out
    only = {"messages": [{"role": "user", "content": "2+2?"},
                         {"role": "assistant", "content": "<think>\nfour\n</think>"}]}  # fmt: skip
    with pytest.raises(RowError, match="holds nothing but reasoning, which thinking='off'"):
        sft_batches([only], tok, rows=1, length=128, chat_template=CLOSES, thinking="off")


@pytest.mark.parametrize("name", TEMPLATES)
def test_both_sides_of_a_pair_follow_the_same_prompt(tok, name):
    thought, plain = "<think>\ntwo and two\n</think>\n\nFour.", "Five."
    options = {"rows": 1, "length": 256, "chat_template": TEMPLATES[name]}
    for chosen, rejected in ((thought, plain), (plain, thought), (thought, thought)):
        row = {"prompt": "2+2?", "chosen": chosen, "rejected": rejected}
        batch = next(iter(preference_batches([row], tok, **options)))
        prompts = [
            side.inputs[0, : int(np.argmax(side.loss_mask[0])) + 1].tolist()
            for side in (batch.chosen, batch.rejected)
        ]
        assert prompts[0] == prompts[1]
        assert prompts[0] == encode_prompt(tok, "2+2?", TEMPLATES[name], thinking="on")
    ranked = {"prompt": "2+2?", "answers": [plain, thought, "Six."], "scores": [1, 2, 0]}
    batch = next(iter(ranked_batches([ranked], tok, **options)))
    starts = [int(np.argmax(mask)) + 1 for mask in batch.answers.loss_mask[0]]
    assert len({tuple(batch.answers.inputs[0, n, :start]) for n, start in enumerate(starts)}) == 1


def test_an_unknown_mode_is_refused(tok):
    with pytest.raises(ValueError, match="thinking: got 'maybe', wanted auto, on, off"):
        encode_prompt(tok, "2+2?", CLOSES, thinking="maybe")
    with pytest.raises(ValueError, match="thinking: got 'maybe', wanted auto, on, off"):
        sft_batches([_row()], tok, rows=1, thinking="maybe")


CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "<think>\n{% if not enable_thinking %}</think>{% endif %}{% endif %}"
)


@pytest.mark.parametrize("thinking", ["auto", "on"])
def test_a_call_after_a_prompt_with_a_block_of_reasoning(tok, thinking):
    """As under QwQ, whose history has no such block."""
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    asked = {"role": "user", "content": "Is it clear?"}
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    row = {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    prompt, said = _trained(tok, CALLS, row | {"tools": tools}, thinking)
    style = Style(thinking=thinking)
    (sampled,) = encode_prompts(tok, [(asked,)], CALLS, None, [tuple(tools)], style=style)
    assert prompt == sampled.tolist()
    empty = "\n</think>\n\n" if thinking == "on" else "\n"
    assert said == f'{empty}<call>{{"name": "look", "arguments": {{"at": "sky"}}}}</call><|im_end|>'


# As gpt-oss: a channel for each part, reasoning in `thinking` and none of it in earlier turns. What
# is said beside a call is dropped once a later answer is there.
CHANNELS = (
    "{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}<|m|>"
    "{{ m.content }}<|im_end|>{% else %}"
    "{% set message = m %}"
    "{% if m.tool_calls %}{% if m.content and loop.index0 + 3 > messages|length %}"
    "<|im_start|>assistant<|c|>analysis<|m|>{{ m.content }}<|im_end|>{% endif %}"
    "<|im_start|>assistant<|c|>call<|m|>{{ m.tool_calls[0].function.name }}<|im_end|>"
    "{% else %}{% if message.thinking and loop.last %}"
    "<|im_start|>assistant<|c|>analysis<|m|>{{ message.thinking }}<|im_end|>{% endif %}"
    "<|im_start|>assistant<|c|>final<|m|>{{ m.content }}<|im_end|>{% endif %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def _answers(tok, row):
    """What is trained of a row, document by document."""
    found = encode_training(tok, [to_conversation(Row(row, "f:1"))], CHANNELS)
    return [tok.decode(x.ids[np.asarray(x.trained)].tolist()) for _, x in found]


def test_reasoning_goes_where_the_template_reads_it(tok):
    assert _answers(tok, _row("Two and two.")) == [
        "<|c|>analysis<|m|>Two and two.<|im_end|>"
        "<|im_start|>assistant<|c|>final<|m|>Four.<|im_end|>"
    ]


def test_what_a_template_writes_before_an_answer_stays_in_a_document_of_its_own(tok):
    call = {"function": {"name": "add", "arguments": {}}, "type": "function"}
    row = {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "I add.", "tool_calls": [call]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "4"},
        ],
    }
    assert "<|c|>final<|m|>4<|im_end|>" in _answers(tok, row)
