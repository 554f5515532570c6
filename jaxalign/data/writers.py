"""Renders and tokenises conversations, with special tokens in messages' texts hidden."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.data.examples import Conversation, Message, Messages, RowError, Tools
from jaxalign.data.options import THINKING, Options
from jaxalign.data.placeholders import placeholders_of
from jaxalign.data.presence import LEFT_OUT, check_turns, reasons, without_reasoning
from jaxalign.data.render import Chat, Renderer, resolve_chat_template
from jaxalign.data.spans import Document, find_documents
from jaxalign.data.time_limit import TEMPLATE_SECONDS
from jaxalign.data.tokens import SpecialTokens, places_of, tokenize, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Style:
    """How a chat template is used.

    Attributes:
      kwargs: variables of the template, for all conversations; a row's own take precedence.
      special_tokens: how to treat special tokens in message text. "escape": tokenise them as
        ordinary characters, so that no text can forge a turn. "error": the row is bad. "keep": they
        become the special tokens.
      rendered: whether an already rendered prompt, in rows of prompt and completion, is used as it
        is rather than wrapped again.
      thinking: "auto", "on" or "off"; see `jaxalign.data.options.BatchOptions`.
      seconds: how long one rendering may take; None: no limit.
      found: token → how often it occurred in message text; updated while encoding.
    """

    kwargs: Mapping[str, Any] | None = None
    special_tokens: str = "escape"
    rendered: bool = False
    thinking: str = "auto"
    seconds: float | None = TEMPLATE_SECONDS
    found: Counter[str] = dataclasses.field(default_factory=Counter)
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)

    def __post_init__(self):
        if self.thinking not in THINKING:
            wanted = ", ".join(THINKING)
            raise ValueError(f"thinking: got {self.thinking!r}, wanted {wanted}")

    @classmethod
    def of(cls, options: Options) -> Style:
        """The style for a batch function's options; rows may be already rendered."""
        kwargs, special = options.chat_template_kwargs, options.special_tokens_in_text
        limit = options.template_timeout
        return cls(kwargs, special, rendered=True, thinking=options.thinking, seconds=limit)

    def notes(self) -> list[str]:
        """Lines to print about special tokens in message text and about reasoning left out."""
        lost = self.left_out["reasoning"]
        lines = [f"reasoning left out of {lost} answers (thinking: off)"] if lost else []
        if not self.found:
            return lines
        becomes = {"escape": "read as ordinary characters", "keep": "kept as tokens"}
        tokens = ", ".join(f"{token} ({count})" for token, count in self.found.most_common(10))
        return [
            *lines,
            f"special tokens in the text, {becomes.get(self.special_tokens, 'refused')}: {tokens}",
        ]


class Writers:
    """Renders and tokenises conversations.

    Args:
      tok: a fast transformers tokenizer.
      chat_template: see `resolve_chat_template`; None: the tokenizer's own template, or its
        template for tools for rows with tools.
      style: how the template is used.
    """

    def __init__(self, tok: PreTrainedTokenizerBase, chat_template: str | None, style: Style):
        self.tok = tok
        self.style = style
        self.template = resolve_chat_template(tok, chat_template)
        self._with_tools = self.template
        if chat_template is None and isinstance(tok.chat_template, dict):
            self._with_tools = resolve_chat_template(tok, None, tools=True)
        self._renderers: dict[str, Renderer] = {}
        self.special = SpecialTokens(tok)

    def renderer(self, tools: Tools, messages: Messages = ()) -> Renderer:
        """The renderer for a conversation with these tools."""
        uses_tools = bool(tools) or any("tool_calls" in message for message in messages)
        template = self._with_tools if uses_tools else self.template
        if template not in self._renderers:
            self._renderers[template] = Renderer(
                self.tok, template, self.style.kwargs, self.style.seconds
            )
        return self._renderers[template]

    def encode(self, documents: Sequence[Document]) -> Iterator[tuple[list[int], np.ndarray]]:
        """(token ids, trained mask) of each document; texts are tokenised together."""
        if not documents:
            return
        encodings = tokenize(self.tok, [document.text for document in documents]).encodings
        for document, encoding in zip(documents, encodings, strict=True):
            yield tokens_of(self.tok, document.text, document.spans, self._hidden(), encoding)

    def texts(self, conversation: Conversation, one_each: bool) -> list[Document]:
        """The documents of a conversation as text."""
        render = self.renderer(conversation.tools, conversation.messages)
        ready = self._rendered(render, conversation)
        if ready is not None:
            return [ready]
        conversation = self._with_thinking(conversation)
        messages = self.words(conversation.messages, conversation.origin, render)
        shown = conversation._replace(messages=messages)
        return list(find_documents(render, [shown], one_each))

    def _with_thinking(self, conversation: Conversation) -> Conversation:
        """The conversation for the prompt that `style.thinking` selects."""
        if self.style.thinking == "auto":
            return conversation
        if self.style.thinking == "on":
            return conversation._replace(thinking=True)
        messages = list(conversation.messages)
        for at in conversation.trained_turns():
            if not reasons(messages[at]):
                continue
            messages[at] = without_reasoning(messages[at])
            self.style.left_out["reasoning"] += 1
            if not messages[at]["content"] and "tool_calls" not in messages[at]:
                raise RowError(
                    conversation.origin,
                    "nothing but reasoning",
                    f"messages[{at}] (assistant) holds nothing but reasoning, which thinking='off' "
                    "leaves out; remove the row, or set thinking to 'auto'",
                )
        return conversation._replace(messages=tuple(messages), thinking=False)

    def places(self, document: Document) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Token ids of a document, and where in its text each begins and ends."""
        return places_of(self.tok, document.text, document.spans, self._hidden())

    def prompt(
        self, messages: Messages, tools: Tools, origin: str, kwargs: Mapping[str, Any] | None
    ) -> str:
        """The text of a prompt, up to where the answer begins."""
        render = self.renderer(tools, messages)
        if len(messages) == 1 and self.style.rendered and self._is_rendered(render, messages[0]):
            return messages[0]["content"]
        chat = render.chat(self.words(messages, origin, render), tools, origin, kwargs)
        thinking = self.style.thinking == "on"
        text = render.one(chat, generation_prompt=True, thinking=thinking)
        self._check_prompt(render, chat, text)
        return text

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text."""
        return tokens_of(self.tok, text, [], self._hidden())[0]

    def words(self, messages: Messages, origin: str, render: Renderer) -> Messages:
        """Messages in which special tokens are hidden, rejected or kept, according to `style`.

        An end of turn at the end of an answer and a bos token at the start are removed, because the
        template writes them itself.
        """
        made: list[Message] = []
        ends = render.ends
        for number, message in enumerate(messages):
            changed = dict(message)
            if message["role"] == "assistant":
                for end in ends:
                    content = changed["content"].rstrip()
                    if content.endswith(end) and content != end:
                        changed["content"] = content.removesuffix(end)
            bos = self.tok.bos_token
            if number == 0 and bos and changed["content"].startswith(bos):
                changed["content"] = changed["content"].removeprefix(bos).lstrip()
            for name in ("content", "reasoning_content"):
                found = self.special.find(changed.get(name, ""))
                if not found:
                    continue
                self.style.found.update(found)
                if self.style.special_tokens == "error":
                    raise RowError(
                        origin,
                        "special tokens in the text",
                        f"messages[{number}].{name}: holds the special token {found[0]!r}, which "
                        "could forge a turn; remove it, or set special_tokens_in_text to 'escape' "
                        "or 'keep'",
                    )
                if self.style.special_tokens == "escape":
                    changed[name] = self.special.hide(changed[name])
            made.append(changed if changed != message else message)
        return tuple(made)

    def _hidden(self) -> SpecialTokens | None:
        return self.special if self.style.special_tokens == "escape" else None

    def _check_prompt(self, render: Renderer, chat: Chat, text: str) -> None:
        """Raises an error for a prompt in which a turn is missing."""
        size = len(chat.messages)
        check_turns(chat, size, text)
        shape = placeholders_of(chat)
        if not shape.short:
            return
        try:
            check_turns(shape.chat, size, render.one(shape.chat, generation_prompt=True))
        except RowError as error:
            if error.reason == LEFT_OUT:
                raise

    # Already rendered rows

    def _rendered(self, render: Renderer, conversation: Conversation) -> Document | None:
        """The document of an already rendered prompt with its answer; else None."""
        messages = conversation.messages
        if not self.style.rendered or len(messages) != 2 or messages[1]["role"] != "assistant":
            return None
        if not self._is_rendered(render, messages[0]):
            return None
        prompt, answer = messages[0]["content"], messages[1]["content"]
        end = render.end_of_turn
        if end and not answer.rstrip().endswith(render.ends):
            answer += end
        start = 0 if conversation.everything else len(prompt)
        return Document(0, prompt + answer, [(start, len(prompt + answer))])

    def _is_rendered(self, render: Renderer, message: Message) -> bool:
        """Whether a user's text begins and ends as the template begins and ends a prompt."""
        if message["role"] != "user":
            return False
        if "prompt" not in render.cache:
            content = "A question of some words."
            probe = Chat(({"role": "user", "content": content},), (), "chat template")
            try:
                whole = render.one(probe, generation_prompt=True)
            except RowError:
                whole = ""
            head, _, tail = whole.partition(content)
            starts = [token for token in render.added if head.lstrip().startswith(token)]
            ends = [token for token in render.added if token in tail]
            # After the user's end of turn comes the header of the answer.
            first = min((tail.find(token) + len(token) for token in ends), default=0)
            header = tail[first:].strip() if tail[first:].strip() else tail.strip()
            render.cache["prompt"] = (tuple(starts), header)
        starts, header = render.cache["prompt"]
        text = message["content"].strip()
        if len(header) < 4 or not text.endswith(header):
            return False
        return text.startswith(starts) if starts else True
