"""Conversations to tokens under a chat template, with an exact mask of what is trained.

Trained are the tokens of each assistant turn: its content and its end token (such as
`<|im_end|>`), not the header before it and not the newline after it. `jaxalign.data.spans` finds
the turns in the rendered text; the text is then tokenised once (with a border before a turn where
a token would straddle it), and every token that holds a character of a turn is trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxalign.data.examples import Conversation, Message, Messages, RowError, Tools, TrainOn
from jaxalign.data.messages import read_messages
from jaxalign.data.render import NONE, Renderer, resolve_chat_template
from jaxalign.data.spans import Document, Span, find_documents
from jaxalign.data.train_on import select

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024  # conversations rendered and tokenised at once: bounds the memory of their texts

OnFault = Callable[[RowError], None] | None


class Encoded(NamedTuple):
    """A document as tokens.

    Attributes:
      ids: int32 `[n]`.
      trained: bool `[n]`, which of these tokens are to be learnt (as targets).
    """

    ids: np.ndarray
    trained: np.ndarray


_NOTHING = Encoded(np.zeros(0, np.int32), np.zeros(0, np.bool_))


def encode_conversations(
    tok: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    chat_template: str | None = None,
    on_fault: OnFault = None,
) -> list[Encoded]:
    """Tokens and mask of each conversation, one document each.

    Args:
      tok: a fast transformers tokenizer.
      conversations: what to encode.
      chat_template: see `resolve_chat_template`. Under "none" a conversation is one prompt and
        one completion: [bos] prompt completion eos, completion and eos trained. The bos token is
        there if the tokenizer has one that is not also its eos.
      on_fault: called with the error of a conversation that cannot be encoded, which then gives a
        document of no tokens; None raises it.

    Raises:
      ValueError: the template refuses a conversation, cannot mark its assistant turns, or ends
        them without a token to stop at. It names the row.
    """
    made = [_NOTHING] * len(conversations)
    for row, document in _encode(tok, conversations, chat_template, on_fault, one_each=True):
        made[row] = document
    return made


def encode_training(
    tok: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    chat_template: str | None = None,
    train_on: TrainOn = "all",
    on_fault: OnFault = None,
) -> list[tuple[int, Encoded]]:
    """Tokens and masks for SFT: one document a conversation, or several.

    Several where `train_on="split"`, and where the template writes an answer anew once more turns
    follow (see `jaxalign.data.spans`): each such answer then has a document of its own, in which
    it is what the model sees and says when it answers.

    Args:
      tok: a fast transformers tokenizer.
      conversations: what to encode.
      chat_template: see `encode_conversations`.
      train_on: see `jaxalign.data.train_on`.
      on_fault: called with the error of a conversation that cannot be encoded, which then gives no
        document; None raises it.

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
            failed=faulty,
        )
    )
    lost = {chosen[row][0] for row in faulty}
    return [(chosen[row][0], each) for row, each in made if chosen[row][0] not in lost]


def encode_texts(tok: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoded]:
    """Plain texts, [bos] text eos, every token trained.

    Raises:
      ValueError: the tokenizer has no eos token.
    """
    made = []
    for start in range(0, len(texts), _CHUNK):
        for ids in plain_ids(tok, list(texts[start : start + _CHUNK])):
            whole = np.asarray([*ids, end_id(tok)], np.int32)
            made.append(Encoded(whole, np.ones(len(whole), np.bool_)))
    return made


def encode_prompts(
    tok: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    chat_template: str | None = None,
    origins: Sequence[str] | None = None,
    tools: Sequence[Tools] | None = None,
) -> list[np.ndarray]:
    """Token ids of prompts, each ending where the assistant's answer begins.

    Args:
      tok: a transformers tokenizer.
      prompts: messages of each prompt.
      chat_template: see `resolve_chat_template`.
      origins: where the prompts came from, for errors.
      tools: functions that the model is told of in each prompt.

    Returns:
      An int32 array a prompt, of its own length.
    """
    template = resolve_chat_template(tok, chat_template)
    names = origins if origins is not None else [f"prompt {n + 1}" for n in range(len(prompts))]
    given = tools if tools is not None else [()] * len(prompts)
    if template == NONE:
        texts = [plain_prompt(m, name, t) for m, name, t in zip(prompts, names, given, strict=True)]
        return [np.asarray(ids, np.int32) for ids in plain_ids(tok, texts)]
    render = Renderer(tok, template)
    chats = [render.chat(m, t, name) for m, name, t in zip(prompts, names, given, strict=True)]
    found: list[np.ndarray] = []
    for start in range(0, len(chats), _CHUNK):
        texts = render(chats[start : start + _CHUNK], generation_prompt=True)
        found += [np.asarray(ids, np.int32) for ids in tokenize(tok, texts)["input_ids"]]
    return found


def encode_prompt(
    tok: PreTrainedTokenizerBase,
    messages: str | Sequence[Message],
    chat_template: str | None = None,
) -> list[int]:
    """Token ids of one prompt, ending where the assistant's answer begins.

    Args:
      tok: a transformers tokenizer.
      messages: what was said so far; a string is one user message.
      chat_template: see `resolve_chat_template`.
    """
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    checked = read_messages(said, "messages", "prompt")
    return encode_prompts(tok, [checked], chat_template, ["prompt"])[0].tolist()


def stop_token_ids(
    tok: PreTrainedTokenizerBase, chat_template: str | None = None
) -> tuple[int, ...]:
    """The tokens at which an answer ends: the template's end of turn, and the tokenizer's eos."""
    stops = set() if tok.eos_token_id is None else {int(tok.eos_token_id)}
    template = resolve_chat_template(tok, chat_template)
    if template != NONE:
        turns = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})
        probe = encode_conversations(tok, [Conversation(turns, "chat template")], template)[0]
        stops.add(int(probe.ids[probe.trained][-1]))
    return tuple(sorted(stops))


# From texts to tokens


def _encode(
    tok: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    chat_template: str | None,
    on_fault: OnFault,
    one_each: bool,
    failed: set[int] | None = None,
) -> Iterator[tuple[int, Encoded]]:
    """(index, document) of all conversations; `failed` collects the indices of faulty ones."""
    template = resolve_chat_template(tok, chat_template)
    render = None if template == NONE else Renderer(tok, template)
    checked = render is None

    def encode(part: Sequence[Conversation]) -> list[tuple[int, Encoded]]:
        if render is None:
            return list(enumerate(_encode_plain(tok, part)))
        return _encode_documents(tok, find_documents(render, part, one_each))

    for start in range(0, len(conversations), _CHUNK):
        part = conversations[start : start + _CHUNK]
        try:
            documents, faults = encode(part), {}
        except RowError:
            if on_fault is None:
                raise
            documents, faults = _one_by_one(encode, part)
            for fault in faults.values():
                on_fault(fault)
        if failed is not None:
            failed |= {start + n for n in faults}
        for n, document in documents:
            if not checked and document.trained.any() and not part[n].everything:
                _check_end_token(tok, document, part[n].origin)
                checked = True
            yield start + n, document


def _one_by_one(
    encode: Callable[[Sequence[Conversation]], list[tuple[int, Encoded]]],
    conversations: Sequence[Conversation],
) -> tuple[list[tuple[int, Encoded]], dict[int, RowError]]:
    """Documents of the conversations that can be encoded, and the errors of the others."""
    documents: list[tuple[int, Encoded]] = []
    faults: dict[int, RowError] = {}
    for n, conversation in enumerate(conversations):
        try:
            documents += [(n, document) for _, document in encode([conversation])]
        except RowError as fault:
            faults[n] = fault
    return documents, faults


def _encode_documents(
    tok: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> list[tuple[int, Encoded]]:
    """Tokenises and marks."""
    tokens = tokenize(tok, [document.text for document in documents])
    made = []
    for document, ids, encoding in zip(
        documents, tokens["input_ids"], tokens.encodings, strict=True
    ):
        trained = np.zeros(len(ids), np.bool_)
        for first, last in document.spans:
            tokens_of = _token_range(encoding, first, last, len(document.text), len(ids))
            if tokens_of is None:
                ids, trained = _mark_by_offsets(tok, document, ids, encoding)
                break
            trained[tokens_of] = True
        made.append((document.row, Encoded(np.asarray(ids, np.int32), trained)))
    return made


def _token_range(encoding: Any, first: int, last: int, length: int, count: int) -> slice | None:
    """The tokens of the characters first to last, if tokens begin at both borders."""
    begin = encoding.char_to_token(first)
    end = count if last == length else encoding.char_to_token(last)
    if begin is None or end is None or encoding.token_to_chars(begin)[0] != first:
        return None
    if end < count and encoding.token_to_chars(end)[0] != last:
        return None
    return slice(begin, end)


def _mark_by_offsets(
    tok: PreTrainedTokenizerBase, document: Document, ids: list[int], encoding: Any
) -> tuple[list[int], np.ndarray]:
    """Marks token by token, where one holds characters of two sides of a border."""
    ids, begins, ends = tokens_with_places(tok, document, ids, encoding)
    trained = np.zeros(len(ids), np.bool_)
    for first, last in document.spans:
        trained |= (begins < last) & (ends > first)
    return ids, trained


def tokens_with_places(
    tok: PreTrainedTokenizerBase, document: Document, ids: list[int], encoding: Any
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Tokens (ids, begins, ends) of a document, none of which straddles the start of a turn."""
    begins, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
    if any(((begins < first) & (first < ends)).any() for first, _ in document.spans):
        return _tokenize_apart(tok, document.text, document.spans)
    return ids, begins, ends


def _tokenize_apart(
    tok: PreTrainedTokenizerBase, text: str, turns: Sequence[Span]
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Tokens (ids, begins, ends) of a text, with a border at the start of each turn.

    For answers whose first blanks would melt into one token with the end of the header: in
    generation the answer goes on from the header's own tokens, so training separates them too.
    """
    cuts = [0, *(first for first, _ in turns), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    tokens = tokenize(tok, pieces, return_offsets_mapping=True)
    ids = [i for piece in tokens["input_ids"] for i in piece]
    offsets = [
        (begin + cut, end + cut)
        for cut, piece in zip(cuts, tokens["offset_mapping"], strict=False)
        for begin, end in piece
    ]
    begins, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    return ids, begins, ends


def _check_end_token(tok: PreTrainedTokenizerBase, encoded: Encoded, origin: str) -> None:
    """Refuses templates under which a model would never learn to stop."""
    last = int(encoded.ids[encoded.trained][-1])
    if last not in tok.all_special_ids and last not in tok.get_added_vocab().values():
        raise ValueError(
            f"{origin}: under this chat template an answer ends with the ordinary token "
            f"{tok.decode([last])!r}, so a model could not learn to stop; end assistant turns with "
            "{{ eos_token }}, or use a tokenizer that has the template's end token (pass "
            "chat_template='none' for plain text)"
        )


def tokenize(tok: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> Any:
    """Tokenises rendered texts as they are: special tokens are in the text."""
    if not tok.is_fast:
        raise ValueError(
            f"tokenizer {tok.name_or_path!r} has no fast version, wanted one (tokenizer.json): "
            "masks need to know where in the text a token lies"
        )
    return tok(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **options,
    )


# Without a template


def end_id(tok: PreTrainedTokenizerBase) -> int:
    """The tokenizer's eos token, or an error."""
    if tok.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tok.name_or_path!r} has no eos token, wanted one to end texts with "
            "(chat_template='none', plain text); set tok.eos_token"
        )
    return int(tok.eos_token_id)


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


def plain_ids(tok: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Plain texts, after the bos token of tokenizers that have one of its own."""
    bos = tok.bos_token_id if tok.bos_token_id != tok.eos_token_id else None
    begin = [] if bos is None else [bos]
    return [begin + ids for ids in tokenize(tok, texts)["input_ids"]]


def _encode_plain(
    tok: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> Iterator[Encoded]:
    """[bos] prompt completion eos."""
    eos = end_id(tok)
    prompts, answers = [], []
    for conversation in conversations:
        messages, origin = conversation.messages, conversation.origin
        prompts.append(plain_prompt(messages[:-1], origin, conversation.tools))
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
        answers.append(messages[-1]["content"])
    heads = plain_ids(tok, prompts)
    wholes = plain_ids(tok, [p + a for p, a in zip(prompts, answers, strict=True)])
    alone = tokenize(tok, answers)["input_ids"]
    for conversation, head, whole, answer in zip(conversations, heads, wholes, alone, strict=True):
        # Where a token would straddle the border, the two parts are tokenised apart: generation
        # will go on from exactly the prompt's tokens.
        ids = whole if whole[: len(head)] == head else head + answer
        ids = np.asarray([*ids, eos], np.int32)
        trained = np.arange(len(ids)) >= len(head)
        yield Encoded(ids, trained | conversation.everything)
