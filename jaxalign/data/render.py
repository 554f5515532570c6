"""Chat templates: choosing one, and rendering conversations with it."""

from __future__ import annotations

import functools
import importlib.resources
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxalign.data.bounds import check_plain
from jaxalign.data.day import with_day
from jaxalign.data.ends import end_tokens
from jaxalign.data.examples import Messages, RowError, Tools
from jaxalign.data.paths import local_path
from jaxalign.data.time_limit import TEMPLATE_SECONDS, OutOfTime, call_within

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE = "none"
"""The name for no template: prompt and completion as plain text."""

_READS_THINKING = re.compile(
    r"""message(\.thinking\b|\[["']thinking["']\]|\.get\(["']thinking["'])"""
)
"""Templates that read reasoning from the field `thinking` of a message (gpt-oss)."""

# With these variables, templates of reasoning models put an empty, closed reasoning block in the
# generation prompt. Answers without reasoning are trained and generated after it, answers with
# reasoning after the open header. Other templates ignore these variables.
ANSWER_AT_ONCE = {"enable_thinking": False, "thinking": False}
THINK_FIRST = {"enable_thinking": True, "thinking": True, "open_thinking": True}

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATES = "templates"
_CACHED = 20_000  # renderings of placeholders that a renderer caches


class Chat(NamedTuple):
    """The input of a template.

    Attributes:
      messages: the turns.
      tools: functions that the template describes to the model.
      origin: `file:line`, for errors.
      kwargs: further variables of the template.
      keys: for a conversation of placeholders: one text for tools and variables, then one for each
        message. Renderings of such conversations are cached.
      thinking: whether its answers follow the prompt for reasoning; None: each answer that begins
        with reasoning does.
    """

    messages: Messages
    tools: Tools
    origin: str
    kwargs: Mapping[str, Any] | None = None
    keys: tuple[str, ...] | None = None
    thinking: bool | None = None

    def upto(self, size: int) -> Chat:
        """The first `size` messages."""
        keys = None if self.keys is None else self.keys[: size + 1]
        return self._replace(messages=self.messages[:size], keys=keys)


def resolve_chat_template(
    tok: PreTrainedTokenizerBase,
    chat_template: str | os.PathLike[str] | None = None,
    *,
    tools: bool = False,
) -> str:
    """The text of a chat template.

    Args:
      tok: a transformers tokenizer.
      chat_template: None for the tokenizer's own, the name of a built-in template ("chatml",
        "alpaca"), "none" for plain text without a template, the path of a jinja file, or jinja
        text.
      tools: use the tokenizer's own template for tools (`tool_use`), if it has one.

    Returns:
      Jinja text, or "none".

    Raises:
      ValueError: the tokenizer has no template of its own, or there is no such name or file.
    """
    folder = importlib.resources.files("jaxalign.data") / _TEMPLATES
    names = sorted(f.name.removesuffix(".jinja") for f in folder.iterdir())
    others = ", ".join(name for name in names if name != "chatml")
    choices = f"one of chatml, {NONE}, or a jinja file (also built in: {others})"
    if chat_template is None:
        own = tok.chat_template
        if isinstance(own, dict):
            own = own.get("tool_use", own.get("default")) if tools else own.get("default")
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
    path = local_path(chat_template, "chat_template")
    check_plain(path)
    if not path.is_file():
        raise ValueError(f"chat_template: no file {chat_template!r}; wanted {choices}")
    return path.read_text(encoding="utf-8")


class Renderer:
    """A chat template together with the tokenizer's special tokens, which it may use.

    Args:
      tok: a transformers tokenizer.
      template: jinja text.
      kwargs: further variables of the template, for all conversations.
      seconds: how long one rendering may take, see `data.time_limit`; None: no limit.

    Attributes:
      template: jinja text.
      added: the tokens added to the tokenizer's model, including special tokens.
      cache: for callers: results for conversations of one shape.
    """

    def __init__(
        self,
        tok: PreTrainedTokenizerBase,
        template: str,
        kwargs: Mapping[str, Any] | None = None,
        seconds: float | None = TEMPLATE_SECONDS,
    ):
        self.template = with_day(template)
        self._tok = tok
        self._seconds = seconds
        self.added = sorted({*tok.get_added_vocab(), *tok.all_special_tokens}, key=len)[::-1]
        self.cache: dict[Any, Any] = {}
        self._special: dict[str, Any] = dict(tok.special_tokens_map)
        self._kwargs = dict(kwargs) if kwargs else {}
        self._texts: dict[Any, str] = {}

    def chat(
        self,
        messages: Messages,
        tools: Tools,
        origin: str,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Chat:
        """A conversation in a form that this template can render.

        If the template does not read the field of reasoning, the reasoning moves into the content,
        in `<think>`.

        Raises:
          ValueError: the template would leave out tools, or calls of tools.
        """
        if "tools" not in self.template and tools:
            raise _no_tools(origin, "a list of tools")
        if any("tool_calls" in m or "reasoning_content" in m for m in messages):
            messages = tuple(self._shown(message, origin) for message in messages)
        return Chat(messages, tools, origin, kwargs)

    def _shown(self, message: dict[str, Any], origin: str) -> dict[str, Any]:
        if "tool_calls" in message and "tool_calls" not in self.template:
            raise _no_tools(origin, "a call of a tool")
        if "reasoning_content" not in message or "reasoning_content" in self.template:
            return message
        message = dict(message)
        thought = message.pop("reasoning_content").strip()
        if thought and _READS_THINKING.search(self.template):
            message["thinking"] = thought
        elif thought:
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
        return message

    def one(
        self, chat: Chat, *, generation_prompt: bool = False, thinking: bool | None = False
    ) -> str:
        """Renders a chat; an error of the template names the row.

        Args:
          chat: the chat to render.
          generation_prompt: whether the header of the next answer follows.
          thinking: whether that answer, or the chat's answers, begin with reasoning; None: the
            template's default.
        """
        if chat.keys is None:
            return self._run(chat, generation_prompt, thinking)[0][0]
        key = (chat.keys, generation_prompt, thinking)
        if key not in self._texts:
            if len(self._texts) >= _CACHED:
                self._texts.clear()
            self._texts[key] = self._run(chat, generation_prompt, thinking)[0][0]
        return self._texts[key]

    def __call__(
        self,
        chats: Sequence[Chat],
        generation_prompt: bool = False,
        thinking: bool | None = False,
    ) -> list[str]:
        """Renders chats; an error of the template names the row."""
        return [
            self.one(chat, generation_prompt=generation_prompt, thinking=thinking) for chat in chats
        ]

    def marked(self, chat: Chat, thinking: bool) -> tuple[str, list[tuple[int, int]]]:
        """A text, and the passages in it that the template marks with `{% generation %}`."""
        texts, marks = self._run(chat, False, thinking, return_assistant_tokens_mask=True)
        return texts[0], marks[0]

    @functools.cached_property
    def end_of_turn(self) -> str | None:
        """The token that ends an answer under this template; None if it writes none.

        It is the first added token after the content of an answer. Text that a template writes
        after it (a newline, the end of the text, the next header) belongs to no answer.
        """
        content = "An answer of some words."
        turns = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": content})
        try:
            text = self.one(Chat(turns, (), "chat template"))
        except RowError:
            return None
        tail = text[text.rfind(content) + len(content) :] if content in text else ""
        places = [(tail.find(token), -len(token), token) for token in self.added if token in tail]
        return min(places)[2] if places else None

    @functools.cached_property
    def ends(self) -> tuple[str, ...]:
        """The tokens at which an answer can end: this template's and the tokenizer's."""
        return end_tokens(self._tok, self.end_of_turn)

    def find_end(self, text: str, start: int) -> int | None:
        """The end of the first of `ends` found from `start` on; None if there is none."""
        places = [(text.find(end, start), end) for end in self.ends]
        found = [(place, len(end)) for place, end in places if place >= 0]
        return sum(min(found)) if found else None

    def _run(self, chat: Chat, generation_prompt: bool, thinking: bool | None, **more: Any) -> Any:
        from transformers.utils.chat_template_utils import render_jinja_template

        mode = {} if thinking is None else THINK_FIRST if thinking else ANSWER_AT_ONCE
        variables = self._special | mode | self._kwargs | dict(chat.kwargs or {}) | more
        try:
            return call_within(
                self._seconds,
                render_jinja_template,
                [list(chat.messages)],
                tools=list(chat.tools) if chat.tools else None,
                chat_template=self.template,
                add_generation_prompt=generation_prompt,
                **variables,
            )
        except OutOfTime:
            raise RowError(
                chat.origin,
                "the chat template took too long",
                f"the chat template took more than {self._seconds:g} s for this row; change the "
                "template, or raise template_timeout",
            ) from None
        except Exception as error:  # templates can raise anything
            raise RowError(
                chat.origin,
                "the chat template refuses it",
                f"the chat template refuses these messages: {error}; change the row, or pass "
                "another chat_template",
            ) from error


def key_of(message: Mapping[str, Any]) -> str:
    """A text that identifies a message."""
    return json.dumps(message, ensure_ascii=False, sort_keys=True, default=str)


def _no_tools(origin: str, what: str) -> RowError:
    return RowError(
        origin,
        "the chat template takes no tools",
        f"tools: the row has {what}, which this chat template would leave out; pass "
        "chat_template='chatml', which writes tools, or a jinja file that does",
    )
