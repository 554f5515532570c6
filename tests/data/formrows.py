"""Two or three rows of every form, as the data sets in circulation write them."""

from jaxalign.data import (
    to_conversation,
    to_graded,
    to_preference,
    to_prompt,
    to_ranked,
    to_steps,
    to_text,
    to_unpaired,
)

TOOL = {
    "name": "weather",
    "description": "Tells the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
_CALL = '{"name": "weather", "arguments": {"city": "北京"}}'

ROWS = {
    "messages": (
        to_conversation,
        [
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Who are you?"},
                    {"role": "assistant", "content": "A helper."},
                    {"role": "user", "content": "你好！"},
                    {"role": "assistant", "content": "你好，很高兴见到你。"},
                ]
            },
            {
                "messages": [
                    {"role": "user", "content": "Weather in 北京?"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "id": "c1",
                                "type": "function",
                                "function": {"name": "weather", "arguments": '{"city": "北京"}'},
                            }
                        ],
                    },
                    {"role": "tool", "tool_call_id": "c1", "content": '{"sky": "晴"}'},
                    {"role": "assistant", "content": "Sunny, 晴。"},
                ],
                "tools": [{"type": "function", "function": TOOL}],
            },
        ],
    ),
    "parts": (
        to_conversation,
        [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "value": "2 + 2?"}]},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "reasoning", "value": "Two and two."},
                            {"type": "text", "value": "4"},
                        ],
                        "loss_weight": 1.0,
                    },
                ]
            }
        ],
    ),
    "sharegpt": (
        to_conversation,
        [
            {
                "conversations": [
                    {"from": "human", "value": "Weather?"},
                    {"from": "function_call", "value": _CALL},
                    {"from": "observation", "value": '{"sky": "晴"}'},
                    {"from": "gpt", "value": "天气很好。"},
                ],
                "tools": '[{"name": "weather", "parameters": {}}]',
                "system": "Help.",
            },
            {
                "conversations": [
                    {"from": "system", "value": "Help."},
                    {"from": "user", "value": "Hi"},
                    {"from": "assistant", "value": "Hello"},
                ],
                "tools": "",
            },
        ],
    ),
    "alpaca": (
        to_conversation,
        [
            {"instruction": "Say hi", "input": "", "output": "Hi."},
            {"instruction": "翻译", "input": "cat", "output": "猫", "history": [["a", "b"]]},
        ],
    ),
    "completion": (to_conversation, [{"prompt": "1 + 1 =", "completion": " 2"}]),
    "gsm8k": (to_conversation, [{"question": "How many?", "answer": "Two.\n#### 2"}]),
    "seed_task": (
        to_conversation,
        [{"id": "s", "instruction": "Sort", "instances": [{"input": "b a", "output": "a b"}]}],
    ),
    "preference": (
        to_preference,
        [
            {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?", "margin": 1.5},
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Hello"},
                "rejected": {"from": "gpt", "value": "No"},
            },
            {
                "chosen_messages": [
                    {"role": "user", "content": [{"type": "text", "value": "Hi"}]},
                    {"role": "assistant", "content": [{"type": "text", "value": "Hello"}]},
                ],
                "rejected_messages": [
                    {"role": "user", "content": [{"type": "text", "value": "Hi"}]},
                    {"role": "assistant", "content": [{"type": "text", "value": "No"}]},
                ],
            },
        ],
    ),
    "implicit": (
        to_preference,
        [{"chosen": "The answer is four.", "rejected": "The answer is forty."}],
    ),
    "hh": (
        to_preference,
        [
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Yes.\n\nHuman: Who?\n\nAssistant: I am.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Yes.\n\nHuman: Who?\n\nAssistant: Go.",
            }
        ],
    ),
    "unpaired": (
        to_unpaired,
        [
            {"prompt": "Hi", "completion": "Hello", "label": True},
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "No"},
                ],
                "kto_tag": 0,
            },
        ],
    ),
    "prompt": (to_prompt, [{"key": 1, "prompt": "Write a poem"}, {"prompt": "写一首诗"}]),
    "text": (to_text, [{"text": "Once upon a time"}, {"text": "从前\n有座山"}]),
    "ranked": (
        to_ranked,
        [
            {"prompt": "Hi", "answers": ["a", "b", "c"], "ranks": [2, 1, 3]},
            {"prompt": "Hi", "completions": ["a", "b"], "scores": [0.5, -1]},
        ],
    ),
    "graded": (
        to_graded,
        [{"prompt": "Hi", "response": "Hello", "helpfulness": 4, "verbosity": 1}],
    ),
    "steps": (
        to_steps,
        [{"prompt": "2 + 2?", "completions": ["Two and two", "make 5"], "labels": [True, False]}],
    ),
}
