"""Conversations to tokens under a chat template, with an exact mask of what is trained.

Trained are the tokens of each assistant turn: its content and its end token (such as
`<|im_end|>`), not the header before it and not the newline after it. Where a turn lies is found
in the rendered text, by rendering the conversation up to it:

    head = render(messages[:i], add_generation_prompt=True)
    done = render(messages[:i + 1])
    whole = render(messages)            must start with done, and done with head

The turn is what lies between, so training sees an answer after exactly the header that
generation will give it. Templates that fail this check may mark the turns themselves with
`{% generation %}`; failing that too, there is an error: no mask is ever guessed.

The whole text is tokenised once (with a border before a turn where a token would straddle it);
every token that holds a character of a turn is trained.
"""

from __future__ import annotations

import importlib.resources
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxalign.data.examples import Conversation, Message, Messages
from jaxalign.data.messages import read_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE = "none"
"""The chat template of no template: prompt and completion as plain text."""

_TEMPLATES = "templates"
_CHUNK = 1024  # conversations rendered and tokenised at once: bounds the memory of offsets
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Templates of reasoning models close an empty reasoning block in the generation prompt when told
# that no reasoning is wanted. Answers without reasoning are trained, and generated, after that;
# answers with reasoning after the open header. Other templates ignore these variables.
_ANSWER_AT_ONCE = {"enable_thinking": False}
_THINK_FIRST = {"enable_thinking": True, "open_thinking": True}

Span = tuple[int, int]


class Encoded(NamedTuple):
    """A document as tokens.

    Attributes:
      ids: int32 `[n]`.
      trained: bool `[n]`, which of these tokens are to be learnt (as targets).
    """

    ids: np.ndarray
    trained: np.ndarray


def resolve_chat_template(
    tok: PreTrainedTokenizerBase, chat_template: str | os.PathLike[str] | None = None
) -> str:
    """The text of a chat template.

    Args:
      tok: a transformers tokenizer.
      chat_template: None for the tokenizer's own, the name of a built-in template ("chatml"),
        "none" for plain text without a template, a path of a jinja file, or jinja text.

    Returns:
      Jinja text, or "none".

    Raises:
      ValueError: the tokenizer has no template of its own, or there is no such name or file.
    """
    folder = importlib.resources.files("jaxalign.data") / _TEMPLATES
    names = sorted(f.name.removesuffix(".jinja") for f in folder.iterdir())
    choices = f"one of {', '.join([*names, NONE])}, or a jinja file"
    if chat_template is None:
        own = tok.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if not isinstance(own, str) or not own:
            raise ValueError(
                f"tokenizer {tok.name_or_path!r} has no chat template; pass as chat_template "
                f"{choices}"
            )
        return own
    chat_template = os.fspath(chat_template)
    if chat_template == NONE:
        return NONE
    if chat_template in names:
        return (folder / f"{chat_template}.jinja").read_text(encoding="utf-8")
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    path = pathlib.Path(chat_template).expanduser()
    if not path.is_file():
        raise ValueError(f"chat_template: no file {chat_template!r}; wanted {choices}")
    return path.read_text(encoding="utf-8")


def encode_conversations(
    tok: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    chat_template: str | None = None,
) -> list[Encoded]:
    """Tokens and mask of each conversation.

    Args:
      tok: a fast transformers tokenizer.
      conversations: what to encode.
      chat_template: see `resolve_chat_template`. Under "none" a conversation is one prompt and
        one completion: [bos] prompt completion eos, completion and eos trained. The bos token is
        there if the tokenizer has one that is not also its eos.

    Raises:
      ValueError: the template refuses a conversation, cannot mark its assistant turns, or ends
        them without a token to stop at. It names the row.
    """
    template = resolve_chat_template(tok, chat_template)
    encoded: list[Encoded] = []
    for start in range(0, len(conversations), _CHUNK):
        part = conversations[start : start + _CHUNK]
        if template == NONE:
            encoded.extend(_encode_plain(tok, part))
        else:
            encoded.extend(_encode_chat(tok, part, template))
    if encoded and template != NONE:
        _check_end_token(tok, encoded[0], conversations[0].origin)
    return encoded


def encode_prompts(
    tok: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    chat_template: str | None = None,
    origins: Sequence[str] | None = None,
) -> list[np.ndarray]:
    """Token ids of prompts, each ending where the assistant's answer begins.

    Args:
      tok: a transformers tokenizer.
      prompts: messages of each prompt.
      chat_template: see `resolve_chat_template`.
      origins: where the prompts came from, for errors.

    Returns:
      An int32 array a prompt, of its own length.
    """
    template = resolve_chat_template(tok, chat_template)
    names = origins if origins is not None else [f"prompt {n + 1}" for n in range(len(prompts))]
    if template == NONE:
        texts = [_plain_prompt(m, name) for m, name in zip(prompts, names, strict=True)]
        return [np.asarray(ids, np.int32) for ids in _plain_prompt_ids(tok, texts)]
    texts = _render(tok, template, [list(m) for m in prompts], names, generation_prompt=True)
    return [np.asarray(ids, np.int32) for ids in _tokenize(tok, texts)["input_ids"]]


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


# Rendering


def _render(
    tok: PreTrainedTokenizerBase,
    template: str,
    chats: Sequence[list[Message]],
    origins: Sequence[str],
    generation_prompt: bool = False,
    variables: dict[str, Any] = _ANSWER_AT_ONCE,
) -> list[str]:
    """Texts of chats; an error of the template names the row."""

    def run(batch: Sequence[list[Message]]) -> list[str]:
        texts: Any = tok.apply_chat_template(
            list(batch),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **variables,
        )
        return texts

    if not chats:
        return []
    try:
        return run(chats)
    except Exception:
        for chat, origin in zip(chats, origins, strict=True):
            try:
                run([chat])
            except Exception as error:  # templates raise what they like
                raise ValueError(
                    f"{origin}: the chat template refuses these messages: {error}; "
                    "change the row, or pass another chat_template"
                ) from error
        raise


def _encode_chat(
    tok: PreTrainedTokenizerBase, conversations: Sequence[Conversation], template: str
) -> Iterator[Encoded]:
    """Renders, finds the turns, tokenises, marks."""
    origins = [c.origin for c in conversations]
    wholes = _render(tok, template, [list(c.messages) for c in conversations], origins)
    spans = _turns(tok, template, conversations, wholes)
    tokens = _tokenize(tok, wholes, return_offsets_mapping=True)
    for text, ids, offsets, turns in zip(
        wholes, tokens["input_ids"], tokens["offset_mapping"], spans, strict=True
    ):
        begins, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
        if any(((begins < first) & (first < ends)).any() for first, _ in turns):
            ids, begins, ends = _tokenize_apart(tok, text, turns)
        trained = np.zeros(len(ids), np.bool_)
        for first, last in turns:
            trained |= (begins < last) & (ends > first)
        yield Encoded(np.asarray(ids, np.int32), trained)


def _tokenize_apart(
    tok: PreTrainedTokenizerBase, text: str, turns: Sequence[Span]
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Tokens (ids, begins, ends) of a text, with a border at the start of each turn.

    For answers whose first blanks would melt into one token with the end of the header: in
    generation the answer goes on from the header's own tokens, so training separates them too.
    """
    cuts = [0, *(first for first, _ in turns), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    tokens = _tokenize(tok, pieces, return_offsets_mapping=True)
    ids = [i for piece in tokens["input_ids"] for i in piece]
    offsets = [
        (begin + cut, end + cut)
        for cut, piece in zip(cuts, tokens["offset_mapping"], strict=False)
        for begin, end in piece
    ]
    begins, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    return ids, begins, ends


def _turns(
    tok: PreTrainedTokenizerBase,
    template: str,
    conversations: Sequence[Conversation],
    wholes: Sequence[str],
) -> list[list[Span]]:
    """Character spans of the trained turns in each rendered conversation."""
    turns = [
        (row, at)
        for row, conversation in enumerate(conversations)
        for at in range(conversation.trained_from, len(conversation.messages))
        if conversation.messages[at]["role"] == "assistant"
    ]

    def prefixes(which: list[int], extra: int, **options: Any) -> dict[int, str]:
        """Renderings of the conversations up to (extra 0) or through (1) some turns."""
        chats = [list(conversations[turns[t][0]].messages[: turns[t][1] + extra]) for t in which]
        origins = [conversations[turns[t][0]].origin for t in which]
        return dict(zip(which, _render(tok, template, chats, origins, **options), strict=True))

    everything = list(range(len(turns)))
    heads = prefixes(everything, 0, generation_prompt=True)
    starts = {t: _after_prefix(wholes[turns[t][0]], heads[t]) for t in everything}
    missing = [t for t in everything if starts[t] is None]
    reheads = prefixes(missing, 0, generation_prompt=True, variables=_THINK_FIRST)
    starts |= {t: _after_prefix(wholes[turns[t][0]], reheads[t]) for t in missing}
    inner = [t for t in everything if turns[t][1] + 1 < len(conversations[turns[t][0]].messages)]
    dones = prefixes(inner, 1)

    spans: list[list[Span]] = [[] for _ in conversations]
    unmarked: dict[int, int] = {}
    for t, (row, at) in enumerate(turns):
        whole, start = wholes[row], starts[t]
        done = dones.get(t, whole)
        end = _after_prefix(whole, done.rstrip())
        if start is not None and end is None:
            end = _end_of_restyled(whole, start, done, conversations[row].messages[at]["content"])
        if start is None or end is None or end <= start:
            unmarked.setdefault(row, at)
        else:
            spans[row].append((start, end))
    for row, at in unmarked.items():
        spans[row] = _marked_spans(tok, template, conversations[row], wholes[row], at)
    return spans


def _after_prefix(whole: str, prefix: str) -> int | None:
    """Where `whole` goes on after `prefix` (up to trailing whitespace); None if it differs."""
    for text in (prefix, prefix.rstrip()):
        if whole.startswith(text):
            return len(text)
    return None


def _end_of_restyled(whole: str, start: int, done: str, content: str) -> int | None:
    """The end of a turn that the template writes differently once more turns follow.

    Templates of reasoning models (Qwen3) drop the reasoning block of earlier turns, so `done` is
    no prefix of the whole. What the turn shows, and the end that `done` puts after it, must then
    stand in the whole at `start`, character for character.
    """
    answer = content.split("</think>")[-1]
    for shown in (content, answer.lstrip("\n"), answer.strip()):
        at = done.rfind(shown) if shown else -1
        tail = done[at + len(shown) :].rstrip() if at >= 0 else ""
        if tail and whole.startswith(shown + tail, start):
            return start + len(shown) + len(tail)
    return None


def _marked_spans(
    tok: PreTrainedTokenizerBase, template: str, conversation: Conversation, whole: str, at: int
) -> list[Span]:
    """Spans that the template marks by `{% generation %}`, without the whitespace after them."""
    if not _GENERATION.search(template):
        raise ValueError(
            f"{conversation.origin}: the chat template renders messages[{at}] (assistant) "
            "differently alone and within the conversation, so its tokens cannot be marked "
            "exactly; pass chat_template='chatml', or a jinja file that wraps what the assistant "
            "says, with its end token, in {% generation %} … {% endgeneration %}"
        )
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = dict(tok.special_tokens_map) | _ANSWER_AT_ONCE
    rendered: Any = render_jinja_template(
        [list(conversation.messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **variables,
    )
    texts, marks = rendered
    roles = [message["role"] for message in conversation.messages]
    said, context = roles.count("assistant"), roles[: conversation.trained_from].count("assistant")
    if texts[0] != whole or len(marks[0]) != said:
        raise ValueError(
            f"{conversation.origin}: the chat template marks {len(marks[0])} passages by "
            f"{{% generation %}}, wanted one for each of the {said} assistant turns; correct it"
        )
    spans = [(first, first + len(whole[first:last].rstrip())) for first, last in marks[0]]
    return spans[context:]


def _check_end_token(tok: PreTrainedTokenizerBase, encoded: Encoded, origin: str) -> None:
    """Refuses templates under which a model would never learn to stop."""
    if not encoded.trained.any():
        return  # counted and reported where documents are cut and dropped
    last = int(encoded.ids[encoded.trained][-1])
    if last not in tok.all_special_ids and last not in tok.get_added_vocab().values():
        raise ValueError(
            f"{origin}: under this chat template an answer ends with the ordinary token "
            f"{tok.decode([last])!r}, so a model could not learn to stop; end assistant turns with "
            "{{ eos_token }}, or use a tokenizer that has the template's end token (pass "
            "chat_template='none' for plain text)"
        )


# Tokens


def _tokenize(tok: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> Any:
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


def _plain_prompt(messages: Messages, origin: str) -> str:
    """The one user message of a prompt without a template."""
    if len(messages) != 1 or messages[0]["role"] != "user":
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"{origin}: got the turns [{roles}] before the answer, wanted one user turn: "
            "chat_template='none' takes plain text; pass a template, such as 'chatml'"
        )
    return messages[0]["content"]


def _plain_prompt_ids(tok: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Plain texts, after the bos token of tokenizers that have one of its own."""
    bos = tok.bos_token_id if tok.bos_token_id != tok.eos_token_id else None
    begin = [] if bos is None else [bos]
    return [begin + ids for ids in _tokenize(tok, texts)["input_ids"]]


def _encode_plain(
    tok: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> Iterator[Encoded]:
    """[bos] prompt completion eos."""
    if tok.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tok.name_or_path!r} has no eos token, wanted one to end completions with "
            "(chat_template='none'); set tok.eos_token"
        )
    prompts, answers = [], []
    for messages, origin, *_ in conversations:
        prompts.append(_plain_prompt(messages[:-1], origin))
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{origin}: the last message is no completion; remove it")
        answers.append(messages[-1]["content"])
    heads = _plain_prompt_ids(tok, prompts)
    wholes = _plain_prompt_ids(tok, [p + a for p, a in zip(prompts, answers, strict=True)])
    alone = _tokenize(tok, answers)["input_ids"]
    for head, whole, answer in zip(heads, wholes, alone, strict=True):
        # Where a token would straddle the border, the two parts are tokenised apart: generation
        # will go on from exactly the prompt's tokens.
        ids = whole if whole[: len(head)] == head else head + answer
        ids = np.asarray([*ids, tok.eos_token_id], np.int32)
        yield Encoded(ids, np.arange(len(ids)) >= len(head))
