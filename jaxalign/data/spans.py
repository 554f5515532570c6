"""Finds the trained turns of a conversation in its text, by rendering the turns before them.

    head = render(messages[:i], add_generation_prompt=True)     what generation starts from
    done = render(messages[:i + 1])
    whole = render(messages)            must start with done, and done with head

The turn is the text between `head` and `done`, up to the token that ends a turn, so that training
sees an answer after exactly the header that generation writes. Templates that rewrite earlier turns
fail this check (Qwen3 drops their reasoning, or the empty block in its place). Then the first
applicable rule is used:

1. If the template marks turns with `{% generation %}`, the marks are used.
2. The turn becomes a separate document: what the model sees when it answers. If `done` does not
   begin with `head` (DeepSeek-R1 drops reasoning; others put the system text into the last user
   turn), the document is head + reasoning and answer + the template's end of turn.
3. If several turns must share one document (preferences), the turn is used as rendered there,
   provided that all its text except reasoning is found in place, character for character.

Otherwise it is an error: a mask is never guessed. Every turn up to the last trained one must be
found in the text, in order (`jaxalign.data.presence`).

The prefixes of a conversation with n answers have n / 2 times its text. So they are rendered with
placeholders for the messages (`jaxalign.data.placeholders`), once for all conversations of one
shape. If a conversation's text equals the filled placeholders, it takes their spans.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxalign.data.examples import Conversation, Message, RowError
from jaxalign.data.placeholders import filled, placeholders_of
from jaxalign.data.presence import (
    LEFT_OUT,
    check_turns,
    find_content,
    reasons,
    split_reasoning,
)
from jaxalign.data.render import GENERATION, Chat, Renderer

Span = tuple[int, int]

_OPEN, _CLOSE = "<think>", "</think>"
_BLOCK = re.compile(rf"{_OPEN}\s*(?:{_CLOSE}\s*)?$")


class Document(NamedTuple):
    """A text to train on.

    Attributes:
      row: the index of its conversation.
      text: the rendered text.
      spans: the characters that are trained, in order.
    """

    row: int
    text: str
    spans: list[Span]


def find_documents(
    render: Renderer, conversations: Sequence[Conversation], one_each: bool
) -> Iterator[Document]:
    """The documents of conversations, with the spans of their trained turns.

    Args:
      render: the template.
      conversations: the conversations to train on.
      one_each: one document per conversation, whatever the template does to earlier turns.

    Raises:
      RowError: a turn's tokens cannot be determined exactly, or a turn is not in the text.
    """
    for row, c in enumerate(conversations):
        chat = render.chat(c.messages, c.tools, c.origin, c.template_kwargs)
        chat = chat._replace(thinking=c.thinking)
        for document in _documents(render, chat, c, one_each):
            yield document._replace(row=row)


def _documents(
    render: Renderer, chat: Chat, conversation: Conversation, one_each: bool
) -> list[Document]:
    """The documents of one conversation."""
    trained = conversation.trained_turns()
    everything = conversation.everything
    shape = placeholders_of(chat)
    key = (shape.chat.keys, trained, one_each, everything)
    if key not in render.cache:
        if len(render.cache) > 10_000:
            render.cache.clear()
        try:
            found = _exact(render, shape.chat, trained, one_each, everything)
        except RowError as error:
            found = error  # the row's own text decides, and an error should quote it
        render.cache[key] = found
    documents = render.cache[key]
    if not isinstance(documents, RowError) and len(documents) == 1:
        text = render.one(chat, thinking=_thinks(chat, trained))
        mapped = filled(documents[0].text, documents[0].spans, shape, text)
        if mapped is not None:
            return [Document(0, text, mapped)]
    exact = _exact(render, chat, trained, one_each, everything)
    if isinstance(documents, RowError) and documents.reason == LEFT_OUT and shape.short:
        # A turn of a few letters occurs in any text; its placeholder does not.
        raise RowError(chat.origin, LEFT_OUT, str(documents).removeprefix(f"{documents.origin}: "))
    return exact


def _exact(
    render: Renderer, chat: Chat, trained: Sequence[int], one_each: bool, everything: bool
) -> list[Document]:
    """The documents, by rendering every prefix that ends where a trained turn begins or ends."""
    thinking = _thinks(chat, trained)
    whole = render.one(chat, thinking=thinking)
    if everything:
        check_turns(chat, len(chat.messages), whole)
        return [Document(0, whole, [(0, len(whole))])]
    spans: dict[int, Span] = {}
    own: list[Document] = []
    for at in trained:
        heads, done = _heads(render, chat, at, whole), _done(render, chat, at, thinking)
        span = _stable(render, chat, at, whole, heads[0], done)
        if span is None and GENERATION.search(render.template):
            spans = _marked(render, chat, trained, whole, thinking, one_each)
            # Answers whose reasoning the whole text leaves out come from the prefix that has it.
            for lacking in [at for at in trained if at not in spans]:
                head = _heads(render, chat, lacking, whole)[0]
                done = _done(render, chat, lacking, thinking)
                own.append(_own(render, chat, lacking, head, done, thinking))
            break
        if span is None and (not one_each or (len(trained) == 1 and at == len(chat.messages) - 1)):
            own.append(_own(render, chat, at, heads[0], done, thinking))
        elif span is None:
            before = max((earlier for earlier in spans if earlier < at), default=None)
            start = _after_any(whole, heads)
            if start is None and before is not None:
                earlier = _done(render, chat, before, thinking).rstrip()
                start = _after_turn(whole, spans[before][1], heads, earlier)
            span = _in_place(render, chat, at, whole, start, heads, done)
        if span is not None:
            spans[at] = span
    documents = []
    if spans or not own:
        text_spans = [spans[at] for at in sorted(spans)]
        end = len(whole) if not spans else text_spans[-1][1]
        check_turns(chat, (max(spans) if spans else len(chat.messages) - 1) + 1, whole[:end])
        documents.append(Document(0, whole, text_spans))
    return documents + own


def _thinks(chat: Chat, trained: Sequence[int]) -> bool:
    """Whether some trained answers follow the prompt for reasoning."""
    return any(_reasons(chat, at) for at in trained)


def _reasons(chat: Chat, at: int) -> bool:
    """Whether an answer follows the prompt for reasoning."""
    message = chat.messages[at]
    if chat.thinking is not None:
        return chat.thinking
    return message["role"] == "assistant" and reasons(message)


def _done(render: Renderer, chat: Chat, at: int, thinking: bool) -> str:
    """The text through a turn."""
    return render.one(chat.upto(at + 1), thinking=thinking)


def _heads(render: Renderer, chat: Chat, at: int, whole: str) -> list[str]:
    """Texts up to a turn, with the generation prompt for its kind of answer, then for the other."""
    mine = _reasons(chat, at)
    before = chat.upto(at)
    heads = [render.one(before, generation_prompt=True, thinking=mine)]
    if not whole.startswith(heads[0]):
        heads.append(render.one(before, generation_prompt=True, thinking=not mine))
    return heads


def _after_any(text: str, heads: Sequence[str]) -> int | None:
    """Where a text continues after one of its prefixes (ignoring whitespace at their ends)."""
    for whole_head in heads:
        for head in (whole_head, whole_head.rstrip()):
            if text.startswith(head):
                return len(head)
    return None


def _turn_end(render: Renderer, chat: Chat, at: int, done: str, start: int) -> int:
    """Where a turn that begins at `start` ends: after the token that ends turns.

    The token is searched for after the turn's whole text. Whitespace, the end of the text, or the
    next turn's header may follow it.
    """
    content = find_content(chat.messages[at], done, start)
    end = None if content is None else render.find_end(done, content)
    return len(done.rstrip()) if end is None else end


def _stable(render: Renderer, chat: Chat, at: int, whole: str, head: str, done: str) -> Span | None:
    """The turn, if the whole text starts with the rendering up to that turn."""
    start = _after_any(whole, [head])
    if start is None or not done.startswith(whole[:start]):
        return None
    end = _turn_end(render, chat, at, done, start)
    if end <= start or not whole.startswith(done[:end]):
        return None
    return (start, end) if _shows(chat, at, whole[start:end]) else None


def _shows(chat: Chat, at: int, text: str) -> bool:
    """Whether a text contains the whole turn: reasoning (without its tags) and answer."""
    message = chat.messages[at]
    thought, answer = split_reasoning(message)
    inside = split_reasoning({"content": message["content"]})[0]
    return answer in text and inside in text and thought in text


def _left_out(message: Message) -> str:
    """What a template is likely to have left out of a turn."""
    if "tool_calls" in message:
        return "such as its text or reasoning beside a call"
    return "such as text before a second </think>"


def _own(render: Renderer, chat: Chat, at: int, head: str, done: str, thinking: bool) -> Document:
    """The turn as the end of a separate document."""
    message = chat.messages[at]
    if thinking != _reasons(chat, at):
        done = _done(render, chat, at, not thinking)
    start = _after_any(done, [head])
    if start is not None:
        end = _turn_end(render, chat, at, done, start)
        if end > start and _shows(chat, at, done[start:end]):
            check_turns(chat, at + 1, done[:end])
            return Document(0, done, [(start, end)])
    thought, answer = split_reasoning(message)
    opened = head.rstrip().endswith(_OPEN)
    # A short answer could also occur in the end token.
    limit = done.rfind(render.end_of_turn) if render.end_of_turn is not None else -1
    place = done.rfind(answer, 0, limit if limit >= 0 else len(done)) if answer else -1
    if _CLOSE in thought or (start is not None and not thought):
        raise RowError(
            chat.origin,
            "the chat template leaves something out",
            f"the chat template leaves out a part of what messages[{at}] (assistant) says, "
            f"{_left_out(message)}; correct the row, or pass another chat_template",
        )
    if "tool_calls" in message and _BLOCK.search(head):
        return _own_calls(render, chat, at, head, done)
    if place < 0 or "tool_calls" in message:
        raise _unmarkable(chat, at)
    end = _turn_end(render, chat, at, done, place)
    tail = done[place + len(answer) : end]
    if not tail:
        raise _unmarkable(chat, at)
    produced = _after_header(render, chat, at, head, done[:end])
    if produced is not None:
        text = f"{head}{produced}"
    elif thought or opened:
        before = "" if opened else f"{_OPEN}\n"
        text = f"{head}{before}{thought}\n{_CLOSE}\n\n{answer}{tail}"
    else:
        text = f"{head}{_blanks_before(done[:place], head)}{answer}{tail}"
    check_turns(chat, at + 1, text)
    return Document(0, text, [(len(head), len(text))])


def _after_header(render: Renderer, chat: Chat, at: int, head: str, done: str) -> str | None:
    """What a template writes for a turn between the generation prompt's header and the turn's end.

    That may be more than the answer: gpt-oss names the channel of each part. None where blocks of
    reasoning are in the way, or the header is not found.
    """
    thought, answer = split_reasoning(chat.messages[at])
    before = render.one(chat.upto(at))
    header = head.removeprefix(before)
    if header == head or not header.strip() or _OPEN in header or _CLOSE in header:
        return None
    place = done.rfind(answer)
    place = done.rfind(thought, 0, place) if thought else place
    start = done.rfind(header, 0, max(place, 0))
    produced = done[start + len(header) :]
    if start < 0 or not _shows(chat, at, produced):
        return None
    mine = thought + answer
    others = [m["content"] for m in chat.messages[:at] if m["content"] not in mine]
    if any(text in produced for text in (_OPEN, _CLOSE, *others)):
        return None
    return produced


def _own_calls(render: Renderer, chat: Chat, at: int, head: str, done: str) -> Document:
    """A turn that calls tools, after a prompt that ends with a block of reasoning (QwQ)."""
    thought, answer = split_reasoning(chat.messages[at])
    header, closed = _BLOCK.sub("", head).rstrip(), head.rstrip().endswith(_CLOSE)
    if not done.startswith(header) or (closed and thought):
        raise _unmarkable(chat, at)
    said = done[len(header) : _turn_end(render, chat, at, done, len(header))]
    if _OPEN in said or answer not in said:
        raise _unmarkable(chat, at)
    text = f"{head}{said}" if closed else f"{head}{thought}\n{_CLOSE}\n\n{said.lstrip()}"
    check_turns(chat, at + 1, text)
    return Document(0, text, [(len(head), len(text))])


def _blanks_before(written: str, head: str) -> str:
    """The whitespace that a template writes between the header and the answer.

    It can be separated from the header's own whitespace if both texts are equal before it.
    """
    text, header = written.rstrip(), head.rstrip()
    if not header or not text.endswith(header[-4:]):
        return ""
    return written[len(text) :].removeprefix(head[len(header) :])


def _after_turn(whole: str, end: int, heads: list[str], earlier: str) -> int | None:
    """Where a turn starts, by the text between it and the previous turn, which ends at `end`.

    For turns after tools' answers, whose reasoning is dropped only after a later user turn.
    """
    for head in heads:
        if head.startswith(earlier) and whole.startswith(head[len(earlier) :], end):
            return end + len(head) - len(earlier)
    return None


def _in_place(
    render: Renderer,
    chat: Chat,
    at: int,
    whole: str,
    start: int | None,
    heads: list[str],
    done: str,
) -> Span:
    """The turn as rendered with later turns: the same text, or the same without its reasoning."""
    content = _after_any(done, heads)
    later = at + 1 < len(chat.messages)  # the last turn's text must be complete
    if later and start is not None and content is not None:
        produced = done[content : _turn_end(render, chat, at, done, content)]
        # An empty block that the template puts before an answer counts as reasoning.
        for text in (produced, produced.rpartition(_CLOSE)[2].lstrip("\n")):
            _, answer = split_reasoning(chat.messages[at])
            if text and answer in text and whole.startswith(text, start):
                return start, start + len(text)
    raise _unmarkable(chat, at)


def _unmarkable(chat: Chat, at: int) -> RowError:
    return RowError(
        chat.origin,
        "the chat template rewrites its turns",
        f"the chat template renders messages[{at}] (assistant) differently alone and within "
        "the conversation, so its tokens cannot be marked exactly; pass chat_template='chatml', or "
        "a jinja file that wraps what the assistant says, with its end token, in "
        "{% generation %} … {% endgeneration %}",
    )


def _marked(
    render: Renderer,
    chat: Chat,
    trained: Sequence[int],
    whole: str,
    thinking: bool,
    one_each: bool,
) -> dict[int, Span]:
    """The spans that the template marks, without trailing whitespace.

    Turns whose reasoning is missing, and turns whose header is marked too, are left out, unless one
    document is required.
    """
    text, marks = render.marked(chat, thinking)
    answers = [at for at, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if text != whole or len(marks) != len(answers):
        raise RowError(
            chat.origin,
            "the chat template marks other turns",
            f"the chat template marks {len(marks)} passages by {{% generation %}}, wanted one for "
            f"each of the {len(answers)} assistant turns; correct it",
        )
    spans = {}
    for at, (first, last) in zip(answers, marks, strict=True):
        if at not in trained:
            continue
        thought, answer = split_reasoning(chat.messages[at])
        if thought not in whole[first:last] and not one_each:
            continue
        if answer not in whole[first:last]:
            raise RowError(
                chat.origin,
                LEFT_OUT,
                f"the passage that the chat template marks by {{% generation %}} lacks what "
                f"messages[{at}] (assistant) says; correct it, or pass another chat_template",
            )
        last = first + len(whole[first:last].rstrip())
        header = _marked_header(render, chat, at, whole, first)
        if header and not one_each:
            continue
        spans[at] = (first + len(header) if whole.startswith(header, first) else first, last)
    return spans


def _marked_header(render: Renderer, chat: Chat, at: int, whole: str, first: int) -> str:
    """The header of an answer, if a template marks it too; generation starts after it."""
    head = _heads(render, chat, at, whole)[0]
    if not head.startswith(whole[:first]):
        return ""
    opened = head[first:].rstrip().removesuffix(_CLOSE).rstrip()
    return opened.removesuffix(_OPEN).strip()
