"""Where the trained turns of a conversation lie in its text, found by rendering what precedes them.

    head = render(messages[:i], add_generation_prompt=True)     what generation starts from
    done = render(messages[:i + 1])
    whole = render(messages)            must start with done, and done with head

The turn is what lies between, so training sees an answer after exactly the header that generation
gives it. Templates that write earlier turns anew fail this check (Qwen3 drops their reasoning, or
the empty block in its place). What is done then, first that applies:

1. The template marks turns by `{% generation %}`: the marks count.
2. The turn becomes a document of its own, `messages[: i + 1]`: what the model sees when it answers.
   A template that drops reasoning even there (DeepSeek-R1) is helped: the document is
   head + reasoning and answer + what the template writes after the answer.
3. One document is wanted for several turns (a preference's): the turn is taken as it stands there,
   if all that it says, but for reasoning, is found at its place, character for character.

Failing that, there is an error: no mask is ever guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxalign.data.examples import Conversation, RowError
from jaxalign.data.render import GENERATION, THINK_FIRST, Chat, Renderer

Span = tuple[int, int]

_OPEN, _CLOSE = "<think>", "</think>"


class Document(NamedTuple):
    """A text to be trained.

    Attributes:
      row: which conversation it came from.
      text: as the template wrote it.
      spans: the characters that are trained, in order.
    """

    row: int
    text: str
    spans: list[Span]


def find_documents(
    render: Renderer, conversations: Sequence[Conversation], one_each: bool
) -> list[Document]:
    """The documents of conversations, with the spans of their trained turns.

    Args:
      render: the template.
      conversations: what to train.
      one_each: one document a conversation, whatever the template does to earlier turns.

    Raises:
      RowError: a turn's tokens cannot be told exactly.
    """
    chats = [render.chat(c.messages, c.tools, c.origin) for c in conversations]
    wholes = render(chats)
    turns = [
        _Turn(row, at)
        for row, c in enumerate(conversations)
        if not c.everything
        for at in c.trained_turns()
    ]
    heads, dones = _prefixes(render, chats, turns, wholes)
    found: list[Document] = []
    apart: list[Document] = []
    spans: list[list[Span]] = [[] for _ in chats]
    moved: dict[int, list[_Turn]] = {}
    for turn in turns:
        span = _stable(chats[turn.row], turn, wholes[turn.row], heads[turn], dones[turn])
        if span is None:
            moved.setdefault(turn.row, []).append(turn)
        else:
            spans[turn.row].append(span)
    for row, rewritten in moved.items():
        conversation, chat, whole = conversations[row], chats[row], wholes[row]
        if GENERATION.search(render.template):
            spans[row] = _marked(render, conversation, chat, whole)
            continue
        if not one_each or len(conversation.trained_turns()) == 1:
            apart += [_own(chat, turn, heads[turn], dones[turn]) for turn in rewritten]
            continue
        for turn in rewritten:
            span = _in_place(chat, turn, whole, heads[turn], dones[turn])
            spans[row].append(span)
        spans[row].sort()
    for row, conversation in enumerate(conversations):
        if conversation.everything:
            found.append(Document(row, wholes[row], [(0, len(wholes[row]))]))
        elif spans[row] or row not in moved:
            found.append(Document(row, wholes[row], spans[row]))
    return sorted(found + apart, key=lambda document: document.row)


class _Turn(NamedTuple):
    """The assistant's message `at` of the conversation `row`."""

    row: int
    at: int


def _prefixes(
    render: Renderer, chats: Sequence[Chat], turns: Sequence[_Turn], wholes: Sequence[str]
) -> tuple[dict[_Turn, list[str]], dict[_Turn, str]]:
    """Texts up to each turn (one or two ways to begin an answer), and through it."""

    def cut(turn: _Turn, extra: int) -> Chat:
        chat = chats[turn.row]
        return chat._replace(messages=chat.messages[: turn.at + extra])

    inner = [t for t in turns if t.at + 1 < len(chats[t.row].messages)]
    dones = {t: wholes[t.row] for t in turns}
    dones |= zip(inner, render([cut(t, 1) for t in inner]), strict=True)
    first = render([cut(t, 0) for t in turns], generation_prompt=True)
    heads = {t: [head] for t, head in zip(turns, first, strict=True)}
    other = [
        t
        for t in turns
        if not (wholes[t.row].startswith(heads[t][0]) and dones[t].startswith(heads[t][0]))
    ]
    texts = render([cut(t, 0) for t in other], generation_prompt=True, variables=THINK_FIRST)
    for turn, head in zip(other, texts, strict=True):
        # Reasoning that the row has goes after the header that opens it.
        heads[turn] = [heads[turn][0], head]
    return heads, dones


def _after_any(text: str, heads: Sequence[str]) -> int | None:
    """Where a text goes on after one of its beginnings (up to blanks at their end)."""
    for whole_head in heads:
        for head in (whole_head, whole_head.rstrip()):
            if text.startswith(head):
                return len(head)
    return None


def _stable(chat: Chat, turn: _Turn, whole: str, heads: list[str], done: str) -> Span | None:
    """The turn, where the whole starts with what was there when it was said."""
    start, end = _after_any(whole, heads), len(done.rstrip())
    if start is None or end <= start or not whole.startswith(done[:end]):
        return None
    return (start, end) if _shows(chat, turn, whole[start:end], heads) else None


def _shows(chat: Chat, turn: _Turn, text: str, heads: list[str]) -> bool:
    """Whether a text holds all that the turn says: reasoning (but for its tags), and answer."""
    thought, answer = _split(chat.messages[turn.at]["content"])
    reasoning = chat.messages[turn.at].get("reasoning_content", "")
    return answer in text and thought in text and reasoning.strip() in text


def _split(content: str) -> tuple[str, str]:
    """Reasoning and answer of a text, without blanks around them."""
    before, closing, after = content.rpartition(_CLOSE)
    if not closing:
        return "", content.strip()
    return before.rpartition(_OPEN)[2].strip(), after.strip()


def _own(chat: Chat, turn: _Turn, heads: list[str], done: str) -> Document:
    """The turn as the end of a document of its own."""
    start, end = _after_any(done, heads), len(done.rstrip())
    if start is not None and end > start and _shows(chat, turn, done[start:end], heads):
        return Document(turn.row, done, [(start, end)])
    thought, answer = _split(chat.messages[turn.at]["content"])
    head = heads[-1]
    opened = head.rstrip().endswith(_OPEN)
    at = done.rfind(answer) if answer else -1
    tail = done[at + len(answer) :].rstrip() if at >= 0 else ""
    if not tail or not (thought or opened) or "tool_calls" in chat.messages[turn.at]:
        raise _unmarkable(chat, turn)
    if not opened:
        head += f"{_OPEN}\n"
    begin = len(heads[-1])
    text = f"{head}{thought}\n{_CLOSE}\n\n{answer}{tail}"
    return Document(turn.row, text, [(begin, len(text))])


def _in_place(chat: Chat, turn: _Turn, whole: str, heads: list[str], done: str) -> Span:
    """The turn as later turns leave it: the same text, or the same but for its reasoning."""
    start, said = _after_any(whole, heads), _after_any(done, heads)
    if start is not None and said is not None:
        produced = done[said:].rstrip()
        # An empty block that the template puts before an answer goes with the reasoning.
        for text in (produced, produced.rpartition(_CLOSE)[2].lstrip("\n")):
            _, answer = _split(chat.messages[turn.at]["content"])
            if text and answer in text and whole.startswith(text, start):
                return start, start + len(text)
    raise _unmarkable(chat, turn)


def _unmarkable(chat: Chat, turn: _Turn) -> RowError:
    return RowError(
        chat.origin,
        "the chat template rewrites its turns",
        f"the chat template renders messages[{turn.at}] (assistant) differently alone and within "
        "the conversation, so its tokens cannot be marked exactly; pass chat_template='chatml', or "
        "a jinja file that wraps what the assistant says, with its end token, in "
        "{% generation %} … {% endgeneration %}",
    )


def _marked(render: Renderer, conversation: Conversation, chat: Chat, whole: str) -> list[Span]:
    """Spans that the template marks, without the blanks after them."""
    text, marks = render.marked(chat)
    said = [at for at, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if text != whole or len(marks) != len(said):
        raise RowError(
            chat.origin,
            "the chat template marks other turns",
            f"the chat template marks {len(marks)} passages by {{% generation %}}, wanted one for "
            f"each of the {len(said)} assistant turns; correct it",
        )
    trained = conversation.trained_turns()
    pairs = zip(said, marks, strict=True)
    return [(a, a + len(whole[a:b].rstrip())) for at, (a, b) in pairs if at in trained]
