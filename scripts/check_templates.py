"""Checks the masks that chat templates get: every template of a folder under many conversations.

    python scripts/check_templates.py FOLDER [--tokenizer DIR] [--verbose]

Each `.jinja` file is tried with conversations that differ in roles, tools, reasoning and turns, and
with each of `train_on`'s all, last and split. A case is *right* where the trained text of every
turn holds what the turn says (reasoning too) and ends in one end token, where nothing else is
trained, and where the text before it is the prompt that generation gets. It is an *error* where the
package refuses the row, and *wrong* otherwise. The exit status is 1 if any case is wrong.
"""

from __future__ import annotations

import argparse
import collections
import copy
import pathlib
import re
import sys
from typing import Any

import numpy as np

from jaxalign.data import Conversation, encode_prompts, encode_training
from jaxalign.data.train_on import select

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
_CALL = {
    "type": "function",
    "id": "abcdef123",
    "function": {"name": "weather", "arguments": {"city": "Oslo"}},
}


def _turn(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | fields


_USER, _ANSWER = _turn("user", "Where is the lighthouse?"), _turn("assistant", "Behind the dunes.")
_AGAIN, _LAST = _turn("user", "Who keeps it lit?"), _turn("assistant", "Nobody since 1974.")
_SYSTEM = _turn("system", "Answer like a sailor.")
_THOUGHT = "The map shows a tower."
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "one turn": ([_USER, _ANSWER], []),
    "system": ([_SYSTEM, _USER, _ANSWER], []),
    "two turns": ([_USER, _ANSWER, _AGAIN, _LAST], []),
    "system, two turns": ([_SYSTEM, _USER, _ANSWER, _AGAIN, _LAST], []),
    "three turns": ([_USER, _ANSWER, _AGAIN, _LAST, _turn("user", "Since when?"), _ANSWER], []),
    "same answer twice": ([_USER, _ANSWER, _AGAIN, _ANSWER], []),
    "reasoning": ([_USER, _ANSWER | {"reasoning_content": _THOUGHT}], []),
    "reasoning in text": (
        [_USER, _turn("assistant", f"<think>\n{_THOUGHT}\n</think>\n\nBehind the dunes.")],
        [],
    ),
    "reasoning in the first of two": (
        [_USER, _ANSWER | {"reasoning_content": _THOUGHT}, _AGAIN, _LAST],
        [],
    ),
    "reasoning in the last of two": (
        [_USER, _ANSWER, _AGAIN, _LAST | {"reasoning_content": _THOUGHT}],
        [],
    ),
    "reasoning in both": (
        [
            _USER,
            _ANSWER | {"reasoning_content": _THOUGHT},
            _AGAIN,
            _LAST | {"reasoning_content": "A plaque says so."},
        ],
        [],
    ),
    "call": ([_USER, _turn("assistant", "", tool_calls=[_CALL])], [TOOL]),
    "call with text": ([_USER, _turn("assistant", "I will look.", tool_calls=[_CALL])], [TOOL]),
    "call and answer": (
        [
            _USER,
            _turn("assistant", "", tool_calls=[_CALL]),
            _turn("tool", '{"sky": "clear"}', name="weather", tool_call_id="abcdef123"),
            _ANSWER,
        ],
        [TOOL],
    ),
    "tools unused": ([_USER, _ANSWER], [TOOL]),
    "edges": ([_turn("user", "  spaces  "), _turn("assistant", "Yes:\n\n- one\n- two")], []),
}


def tokenizer_for(base: Any, template: str) -> Any:
    """The tokenizer with the template, and with what looks like a special token in it."""
    from tokenizers import AddedToken

    tok = copy.deepcopy(base)
    tokens = set(
        re.findall(
            r"<[|｜]?[^<>{}\s'\"]{1,40}[|｜]>|<[|｜][^<>{}\s'\"]{1,40}>|</?s>|<\w+_of_\w+>|\[/?[A-Z_]{3,24}\]",
            template,
        )
    )
    known = tok.get_added_vocab()
    tok.add_tokens(
        [AddedToken(t, special=True, normalized=False) for t in sorted(tokens) if t not in known]
    )
    tok.chat_template = template
    return tok


def judge(tok: Any, conversation: Conversation, train_on: str) -> str:
    """ "right", "error: …" or "wrong: …" of one conversation."""
    try:
        documents = [d for _, d in encode_training(tok, [conversation], None, train_on)]  # type: ignore[arg-type]
    except ValueError as error:
        return f"error: {str(error).removeprefix('case: ')}"
    wanted = [c.messages[at] for c in select(conversation, train_on) for at in c.trained_turns()]  # type: ignore[arg-type]
    ends = [c.messages[:at] for c in select(conversation, train_on) for at in c.trained_turns()]  # type: ignore[arg-type]
    found = []
    for document in documents:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], document.trained.astype(int), [0]])))
        found += [(document.ids[:a], document.ids[a:b]) for a, b in edges.reshape(-1, 2)]
    if len(found) != len(wanted):
        return f"wrong: {len(found)} passages are trained, not {len(wanted)}"
    texts = [(tok.decode(ids), before) for before, ids in found]
    for message, prefix in zip(wanted, ends, strict=True):
        content = message["content"].rpartition("</think>")[2].strip()
        parts = [content, message.get("reasoning_content", "")]
        parts += [_THOUGHT] if _THOUGHT in message["content"] else []
        parts += ["weather", "Oslo"] if "tool_calls" in message else []
        matches = [(t, before) for t, before in texts if all(part in t for part in parts)]
        if not matches:
            return f"wrong: what is trained lacks a part of {message}: {[t for t, _ in texts]}"
        match = [t for t, _ in matches]
        others = [m["content"] for m in conversation.messages if m["role"] != "assistant"]
        if any(len(other) > 4 and other.strip() in t for t in match for other in others):
            return f"wrong: others' words are trained: {match}"
        special = tok(match[0], add_special_tokens=False)["input_ids"][-1:]
        if special and special[0] not in {*tok.all_special_ids, *tok.get_added_vocab().values()}:
            return f"wrong: no end token: {match[0]!r}"
        if "reasoning_content" not in message and _THOUGHT not in message["content"]:
            prompts = encode_prompts(tok, [prefix], None, None, [conversation.tools])
            if not any(before.tolist() == prompts[0].tolist() for _, before in matches) and (
                train_on != "all" or len(wanted) == 1
            ):
                got = tok.decode(matches[0][1])[-60:]
                return f"wrong: prompt {got!r}, in generation {tok.decode(prompts[0])[-60:]!r}"
    return "right"


def _sums(counts: collections.Counter[str]) -> str:
    return f"{counts['right']} right, {counts['error']} errors, {counts['wrong']} wrong"


def main() -> int:
    """Prints a line for each template, and the wrong cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tokenizer", required=True, help="folder of a fast tokenizer with eos")
    parser.add_argument("--verbose", action="store_true", help="print errors too")
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    base = AutoTokenizer.from_pretrained(arguments.tokenizer)
    total: collections.Counter[str] = collections.Counter()
    for path in sorted(arguments.folder.rglob("*.jinja")):
        tok = tokenizer_for(base, path.read_text(encoding="utf-8"))
        counts: collections.Counter[str] = collections.Counter()
        for name, (messages, tools) in CONVERSATIONS.items():
            case = Conversation(tuple(copy.deepcopy(messages)), "case", 0, tuple(tools))
            for train_on in ("all", "last", "split"):
                result = judge(tok, case, train_on)
                kind = result.split(":")[0]
                counts[kind] += 1
                if kind == "wrong" or (arguments.verbose and kind == "error"):
                    print(f"  {path.name}, {name}, {train_on}: {result[:300]}")
        print(f"{path.name}: {_sums(counts)}")
        total += counts
    print(f"all: {_sums(total)}")
    return int(total["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
