"""Conversations to tokens under a chat template, with an exact mask of the trained tokens.

Training uses the tokens of each assistant turn: its content and its end token (such as
`<|im_end|>`), not the header before it and not the newline after it. `jaxalign.data.spans` finds
the turns in the rendered text; the text is then tokenised once, and every token that holds a
character of a turn is trained. If a token would straddle the start of a turn, the text is split
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxalign.data.ends import united_ends
from jaxalign.data.examples import Conversation, Message, Messages, RowError, Tools, TrainOn
from jaxalign.data.messages import read_messages
from jaxalign.data.render import NONE, resolve_chat_template
from jaxalign.data.spans import Document
from jaxalign.data.tokens import (
    blank_first,
    plain_ids,
    tokenize,
    tokens_of,
    with_begin,
    with_end,
)
from jaxalign.data.train_on import select
from jaxalign.data.writers import Style, Writers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnFault = Callable[[RowError], None] | None

# Documents tokenised at a time: offsets take many times the memory of the texts.
_MOST, _CHARACTERS = 256, 1 << 20


class Encoded(NamedTuple):
    """A document as tokens.

    Attributes:
      ids: int32 `[n]`.
      trained: bool `[n]`, which tokens are trained as targets.
    """

    ids: np.ndarray
    trained: np.ndarray


_NOTHING = Encoded(np.zeros(0, np.int32), np.zeros(0, np.bool_))


def encode_conversations(
    tok: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    chat_template: str | None = None,
    on_fault: OnFault = None,
    *,
    style: Style | None = None,
) -> list[Encoded]:
    """Encodes each conversation as one document of tokens with a mask.

    Args:
      tok: a fast transformers tokenizer.
      conversations: the conversations to encode.
      chat_template: see `resolve_chat_template`. Under "none" a conversation is one prompt and one
        completion: [bos] prompt completion eos, where completion and eos are trained. The bos token
        is added if the tokenizer has one that is not also its eos.
      on_fault: called with the error if a conversation cannot be encoded; its document is then
        empty. None: raise the error.
      style: variables of the template, and what becomes of special tokens in people's words.

    Raises:
      ValueError: the template rejects a conversation, cannot mark its assistant turns, or ends them
        without a stop token. The message names the row.
    """
    made = [_NOTHING] * len(conversations)
    encoded = _encode(tok, conversations, chat_template, on_fault, one_each=True, style=style)
    for row, document in encoded:
        made[row] = document
    return made


def encode_training(
    tok: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    chat_template: str | None = None,
    train_on: TrainOn = "all",
    on_fault: OnFault = None,
    *,
    style: Style | None = None,
) -> list[tuple[int, Encoded]]:
    """Tokens and masks for SFT: one document per conversation, or several.

    There are several with `train_on="split"`, and if the template rewrites an answer once more
    turns follow (see `jaxalign.data.spans`). Each such answer then has its own document: the text
    that the model sees and writes when it gives this answer.

    Args:
      tok: a fast transformers tokenizer.
      conversations: the conversations to encode.
      chat_template: see `encode_conversations`.
      train_on: see `jaxalign.data.train_on`.
      on_fault: called with the error if a conversation cannot be encoded; it then has no document.
        None: raise the error.
      style: variables of the template, and what becomes of special tokens in people's words.

    Returns:
      (index of the conversation, document), in the order of the conversations.

    Raises:
      ValueError: as `encode_conversations`; an unknown `train_on`.
    """
    chosen = [(n, each) for n, c in enumerate(conversations) for each in select(c, train_on)]
    faulty: set[int] = set()

    def once(fault: RowError) -> None:
        # A row whose conversations fail several times is one dropped row.
        if on_fault is None:
            raise fault
        if fault.origin not in origins:
            origins.add(fault.origin)
            on_fault(fault)

    origins: set[str] = set()
    made = list(
        _encode(
            tok,
            [each for _, each in chosen],
            chat_template,
            None if on_fault is None else once,
            one_each=False,
            style=style,
            failed=faulty,
        )
    )
    lost = {chosen[row][0] for row in faulty}
    return [(chosen[row][0], each) for row, each in made if chosen[row][0] not in lost]


def encode_texts(tok: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoded]:
    """Plain texts as [bos] text eos, all trained; bos and eos are added only if missing.

    Raises:
      ValueError: the tokenizer has no eos token.
    """
    encoded = []
    for text in texts:
        ids = np.asarray(with_end(tok, plain_ids(tok, [text])[0], text), np.int32)
        encoded.append(Encoded(ids, np.ones(len(ids), np.bool_)))
    return encoded


def encode_prompts(
    tok: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    chat_template: str | None = None,
    origins: Sequence[str] | None = None,
    tools: Sequence[Tools] | None = None,
    *,
    kwargs: Sequence[dict[str, Any] | None] | None = None,
    style: Style | None = None,
) -> list[np.ndarray]:
    """Token ids of prompts, each ending where the assistant's answer begins.

    Args:
      tok: a transformers tokenizer.
      prompts: the messages of each prompt.
      chat_template: see `resolve_chat_template`.
      origins: where the prompts came from, for errors.
      tools: functions that the template describes to the model in each prompt.
      kwargs: variables of the template for each prompt.
      style: variables of the template, and what becomes of special tokens in people's words.

    Returns:
      One int32 array per prompt, each of its own length.
    """
    names = origins if origins is not None else [f"prompt {n + 1}" for n in range(len(prompts))]
    given = tools if tools is not None else [()] * len(prompts)
    variables = kwargs if kwargs is not None else [None] * len(prompts)
    writers = Writers(tok, chat_template, style if style is not None else Style())
    encoded: list[np.ndarray] = []
    for messages, name, tool, own in zip(prompts, names, given, variables, strict=True):
        if writers.template == NONE:
            ids = plain_ids(tok, [plain_prompt(messages, name, tool)])[0]
        else:
            text = writers.prompt(messages, tool, name, own)
            ids = writers.tokenize(text)
        encoded.append(np.asarray(ids, np.int32))
    return encoded


def encode_prompt(
    tok: PreTrainedTokenizerBase,
    messages: str | Sequence[Message],
    chat_template: str | None = None,
    *,
    thinking: str = "auto",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of one prompt, ending where the assistant's answer begins.

    Args:
      tok: a transformers tokenizer.
      messages: the turns so far; a string is one user message.
      chat_template: see `resolve_chat_template`.
      thinking: "on" for the prompt that precedes answers with reasoning; "auto" and "off" for the
        other prompt.
      chat_template_kwargs: further variables of the template.
    """
    style = Style(chat_template_kwargs, thinking=thinking)
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    checked = read_messages(turns, "messages", "prompt")
    return encode_prompts(tok, [checked], chat_template, ["prompt"], style=style)[0].tolist()


def stop_token_ids(
    tok: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    model: Any = None,
    *,
    listed: Iterable[int] = (),
) -> tuple[int, ...]:
    """The ids of tokens that end an answer, ascending: for training, sampling, scoring and exports.

    They are the template's end of turn, the tokenizer's eos, the ids in the source's generation
    config, and the ids that publishers list beside these (`jaxalign.data.ends.BESIDE`).

    Args:
      tok: a transformers tokenizer; `load_tokenizer` reads what its source lists.
      chat_template: see `resolve_chat_template`.
      model: a model whose source's generation config is also used; None: no model.
      listed: additional ids.

    Raises:
      ValueError: no such template, or a template under which an answer ends without a stop token.
    """
    template = resolve_chat_template(tok, chat_template)
    ends = {*listed, *getattr(getattr(model, "config", None), "listed_stops", ())}
    if template != NONE:
        turns = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})
        probe = encode_conversations(tok, [Conversation(turns, "chat template")], template)[0]
        ends.add(int(probe.ids[probe.trained][-1]))
    return united_ends(tok, ends)


# Under a template


def _encode(
    tok: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    chat_template: str | None,
    on_fault: OnFault,
    one_each: bool,
    style: Style | None,
    failed: set[int] | None = None,
) -> Iterator[tuple[int, Encoded]]:
    """(index, document) of all conversations; `failed` collects the indices of faulty ones."""
    if not conversations:
        return
    writers = Writers(tok, chat_template, style if style is not None else Style())
    ends = {*tok.all_special_ids, *tok.get_added_vocab().values()}
    waiting: list[tuple[int, Document]] = []

    def encoded() -> Iterator[tuple[int, Encoded]]:
        found = writers.encode([document for _, document in waiting])
        for (row, _), (ids, trained) in zip(waiting, found, strict=True):
            document = Encoded(np.asarray(ids, np.int32), trained)
            if not conversations[row].everything:
                _check_end_tokens(tok, document, conversations[row].origin, ends)
            yield row, document
        waiting.clear()

    for row, conversation in enumerate(conversations):
        try:
            if writers.template == NONE:
                yield row, _encode_plain(tok, conversation)
            else:
                waiting += [(row, text) for text in writers.texts(conversation, one_each)]
        except RowError as fault:
            if on_fault is None:
                raise
            on_fault(fault)
            if failed is not None:
                failed.add(row)
        if sum(len(document.text) for _, document in waiting[-_MOST:]) > _CHARACTERS or (
            len(waiting) >= _MOST
        ):
            yield from encoded()
    yield from encoded()


def _check_end_tokens(
    tok: PreTrainedTokenizerBase, encoded: Encoded, origin: str, ends: set[int]
) -> None:
    """Raises ValueError for templates under which a model would never learn to stop."""
    trained = encoded.trained
    last = np.flatnonzero(trained & ~np.append(trained[1:], False))
    for token in encoded.ids[last].tolist():
        if token not in ends:
            raise ValueError(
                f"{origin}: under this chat template an answer ends with the ordinary token "
                f"{tok.decode([token])!r}, so a model could not learn to stop; end assistant turns "
                "with {{ eos_token }}, use a tokenizer that has the template's end token, or pass "
                "chat_template='alpaca', which ends answers with eos_token ('none' for plain text)"
            )


# Without a template


def plain_prompt(messages: Messages, origin: str, tools: Tools = ()) -> str:
    """The one user message of a prompt without a template."""
    if len(messages) != 1 or messages[0]["role"] != "user" or tools:
        roles = ", ".join(message["role"] for message in messages)
        raise RowError(
            origin,
            "more than one turn without a template",
            f"got the turns [{roles}]{' with tools' if tools else ''} before the answer, wanted "
            "one user turn: chat_template='none' takes plain text; pass a template, such as "
            "'chatml'",
        )
    return messages[0]["content"]


def _encode_plain(tok: PreTrainedTokenizerBase, conversation: Conversation) -> Encoded:
    """[bos] prompt completion eos; bos and eos are added only if missing."""
    messages, origin = conversation.messages, conversation.origin
    prompt = plain_prompt(messages[:-1], origin, conversation.tools)
    if messages[-1]["role"] != "assistant":
        raise RowError(
            origin, "no completion at the end", "the last message is no completion; remove it"
        )
    if "tool_calls" in messages[-1] or "reasoning_content" in messages[-1]:
        raise RowError(
            origin,
            "tools or reasoning without a template",
            "the answer calls tools or has reasoning apart, which chat_template='none' would "
            "leave out; pass a template",
        )
    answer = messages[-1]["content"]
    if blank_first(tok):
        # An answer tokenised separately would get a leading space, so tokenise the whole text.
        ids, trained = tokens_of(tok, prompt + answer, [(len(prompt), len(prompt + answer))], None)
        before = len(with_begin(tok, ids)) - len(ids)
        ids, trained = with_begin(tok, ids), np.append(np.zeros(before, np.bool_), trained)
    else:
        head, whole = plain_ids(tok, [prompt, prompt + answer])
        # If a token would straddle the border, tokenise the two parts separately: generation
        # continues from exactly the prompt's tokens.
        ids = (
            whole if whole[: len(head)] == head else head + tokenize(tok, [answer])["input_ids"][0]
        )
        trained = np.arange(len(ids)) >= len(head)
    ended = with_end(tok, ids, answer)
    trained = np.append(trained, np.ones(len(ended) - len(ids), np.bool_))
    return Encoded(np.asarray(ended, np.int32), trained | conversation.everything)
