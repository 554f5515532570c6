"""Chat templates: which one, and conversations as text under it."""

from __future__ import annotations

import importlib.resources
import os
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxalign.data.examples import Messages, RowError, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE = "none"
"""The chat template of no template: prompt and completion as plain text."""

# Templates of reasoning models close an empty reasoning block in the generation prompt when told
# that no reasoning is wanted. Answers without reasoning are trained, and generated, after that;
# answers with reasoning after the open header. Other templates ignore these variables.
ANSWER_AT_ONCE = {"enable_thinking": False}
THINK_FIRST = {"enable_thinking": True, "open_thinking": True}

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATES = "templates"


class Chat(NamedTuple):
    """What a template writes.

    Attributes:
      messages: the turns.
      tools: functions that the model is told of.
      origin: `file:line`, for errors.
    """

    messages: Messages
    tools: Tools
    origin: str


def resolve_chat_template(
    tok: PreTrainedTokenizerBase, chat_template: str | os.PathLike[str] | None = None
) -> str:
    """The text of a chat template.

    Args:
      tok: a transformers tokenizer.
      chat_template: None for the tokenizer's own, the name of a built-in template ("chatml",
        "alpaca"), "none" for plain text without a template, a path of a jinja file, or jinja text.

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


class Renderer:
    """A chat template with a tokenizer's special tokens, which it may write.

    Attributes:
      template: jinja text.
    """

    def __init__(self, tok: PreTrainedTokenizerBase, template: str):
        self.template = template
        self._special: dict[str, Any] = dict(tok.special_tokens_map)

    def chat(self, messages: Messages, tools: Tools, origin: str) -> Chat:
        """A conversation as this template can show it.

        Reasoning in a field of its own goes into the content, in `<think>`, where the template
        does not know that field.

        Raises:
          ValueError: the template would leave out tools, or calls of tools.
        """
        if "tools" not in self.template and tools:
            raise _no_tools(origin, "a list of tools")
        if any("tool_calls" in m or "reasoning_content" in m for m in messages):
            messages = tuple(self._shown(message, origin) for message in messages)
        return Chat(messages, tools, origin)

    def _shown(self, message: dict[str, Any], origin: str) -> dict[str, Any]:
        if "tool_calls" in message and "tool_calls" not in self.template:
            raise _no_tools(origin, "a call of a tool")
        if "reasoning_content" not in message or "reasoning_content" in self.template:
            return message
        message = dict(message)
        thought = message.pop("reasoning_content").strip()
        if thought:
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
        return message

    def __call__(
        self,
        chats: Sequence[Chat],
        generation_prompt: bool = False,
        variables: dict[str, Any] = ANSWER_AT_ONCE,
    ) -> list[str]:
        """Texts of chats; an error of the template names the row."""
        texts = [""] * len(chats)
        together = [n for n, chat in enumerate(chats) if not chat.tools]
        groups = [together] if together else []
        groups += [[n] for n, chat in enumerate(chats) if chat.tools]
        for group in groups:
            found, _ = self._run([chats[n] for n in group], generation_prompt, variables)
            for n, text in zip(group, found, strict=True):
                texts[n] = text
        return texts

    def marked(self, chat: Chat) -> tuple[str, list[tuple[int, int]]]:
        """A text, and the passages in it that the template marks by `{% generation %}`."""
        texts, marks = self._run([chat], False, ANSWER_AT_ONCE, return_assistant_tokens_mask=True)
        return texts[0], marks[0]

    def _run(
        self, chats: Sequence[Chat], generation_prompt: bool, variables: dict[str, Any], **more: Any
    ) -> Any:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            return render_jinja_template(
                [list(chat.messages) for chat in chats],
                tools=list(chats[0].tools) if chats[0].tools else None,
                chat_template=self.template,
                add_generation_prompt=generation_prompt,
                **(self._special | variables | more),
            )
        except Exception as error:  # templates raise what they like
            if len(chats) == 1:
                raise RowError(
                    chats[0].origin,
                    "the chat template refuses it",
                    f"the chat template refuses these messages: {error}; change the row, or pass "
                    "another chat_template",
                ) from error
            for chat in chats:
                self._run([chat], generation_prompt, variables, **more)
            raise


def _no_tools(origin: str, what: str) -> RowError:
    return RowError(
        origin,
        "the chat template takes no tools",
        f"tools: the row has {what}, which this chat template would leave out; pass "
        "chat_template='chatml', which writes tools, or a jinja file that does",
    )
