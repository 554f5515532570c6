"""`jaxalign chat`: a conversation with a model, or with two models side by side."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxalign.commands.adapters import load_writers
from jaxalign.commands.answer import model_arguments, sampling_flags
from jaxalign.commands.command import Command

Answer = Callable[..., list[str]]
"""(prompts, sampling options) → answers: `jaxalign.generate` of one model."""


class Speaker(NamedTuple):
    """A model in the conversation, which remembers its own answers.

    Attributes:
      name: shown above its answers; "": not shown.
      answer: generates its answers.
      messages: the conversation so far, without the system prompt.
    """

    name: str
    answer: Answer
    messages: list[dict[str, str]]


class Chat:
    """A conversation: input lines to output lines.

    Args:
      speakers: the models that answer.
      options: keyword arguments of `jaxalign.generate`, without its key.
      seed: the sampling seed; each turn has its own key.
      system: the system prompt; None: none.
      show: called with pieces of the answer while it is sampled, if only one model answers; None:
        `reply` returns the whole answer.
      adapters: name → the first speaker's answer function with that adapter, for `/adapter`; the
        first is active.
    """

    def __init__(
        self,
        speakers: Sequence[Speaker],
        options: Mapping[str, Any],
        seed: int = 0,
        system: str | None = None,
        show: Callable[[str], None] | None = None,
        adapters: Mapping[str, Answer] | None = None,
    ):
        self._speakers, self._options = list(speakers), dict(options)
        self._seed, self._turns, self._system = seed, 0, system
        self._answered = False
        # Two answers are shown one below the other, so the second could not start before the first
        # ends.
        self._streamed = {} if show is None or len(speakers) > 1 else {"on_text": self._piece}
        self._show, self._was_shown = show, False
        self._adapters = dict(adapters or {})
        self._adapter = next(iter(self._adapters), None)

    def reply(self, line: str) -> str:
        """The output for a line of the user: answers, or the result of a command.

        If the answer was already shown in pieces, it returns "".

        Raises:
          ValueError: the first message cannot be answered, so no other message could be.
        """
        if line.startswith("/") and not line.startswith("//"):
            name, _, value = line[1:].partition(" ")
            try:
                return self._command(name, value.strip())
            except (ValueError, OSError) as error:
                return f"/{name}: {error}"
        # Two slashes start a message that begins with a slash.
        return self._say(line[1:] if line.startswith("//") else line)

    def _say(self, text: str) -> str:
        import jax

        key = jax.random.fold_in(jax.random.key(self._seed), self._turns)
        answers, self._was_shown = [], False
        try:
            for speaker in self._speakers:
                prompt = [*self._opening(), *speaker.messages, {"role": "user", "content": text}]
                answers += speaker.answer([prompt], key=key, **self._options, **self._streamed)
        except ValueError as error:
            if not self._answered:
                raise
            return f"error: {error}\nYour last message is dropped; /reset begins anew."
        self._turns, self._answered = self._turns + 1, True
        shown = []
        for speaker, answer in zip(self._speakers, answers, strict=True):
            speaker.messages.append({"role": "user", "content": text})
            speaker.messages.append({"role": "assistant", "content": answer})
            shown.append(f"[{speaker.name}]\n{answer}" if speaker.name else answer)
        return "" if self._was_shown else "\n\n".join(shown)

    def _piece(self, text: str) -> None:
        self._was_shown = True
        if self._show is not None:
            self._show(text)

    def _opening(self) -> list[dict[str, str]]:
        return [] if self._system is None else [{"role": "system", "content": self._system}]

    def _command(self, name: str, value: str) -> str:
        if name in ("help", "?"):
            return self._help()
        if name == "system":
            self._system = value or None
            return "the system prompt is gone" if not value else "the system prompt is set"
        if name == "reset":
            for speaker in self._speakers:
                speaker.messages.clear()
            return "the conversation begins anew; the system prompt stays"
        if name == "seed":
            self._seed, self._turns = _number(int, value), 0
            return f"seed {self._seed}"
        if name == "save":
            return self._save(value)
        if name == "adapter" and self._adapters:
            return self._switch(value)
        if name == "options":
            return ", ".join(f"{k} {v}" for k, v in self._numbers().items())
        option = _SHORT.get(name, name.replace("-", "_"))
        if option not in self._numbers():
            raise ValueError("no such command; /help lists them")
        return self._set(option, value)

    def _switch(self, name: str) -> str:
        names = ", ".join(self._adapters)
        if not name:
            return f"{self._adapter} answers; there are {names}"
        if name not in self._adapters:
            raise ValueError(f"got {name!r}, wanted one of {names}")
        self._adapter = name
        self._speakers[0] = self._speakers[0]._replace(answer=self._adapters[name])
        return f"{name} answers from here on; the conversation stays"

    def _numbers(self) -> dict[str, Any]:
        """The numeric options that a command may set."""
        return {k: v for k, v in self._options.items() if type(v) in (int, float)}

    def _set(self, option: str, value: str) -> str:
        from jaxalign.sampling.generate import check_sampling

        number = _number(type(self._options[option]), value)
        check_sampling(**(self._numbers() | {option: number}))
        self._options[option] = number
        return f"{option} {number}"

    def _save(self, path: str) -> str:
        from jaxalign.data.paths import check_free

        if not path:
            raise ValueError("wanted a file to write, such as /save talk.jsonl")
        file = check_free(path, "/save", remedy="give another path")
        rows = [
            ({"model": speaker.name} if speaker.name else {})
            | {"messages": [*self._opening(), *speaker.messages]}
            for speaker in self._speakers
            if speaker.messages
        ]
        if not rows:
            raise ValueError("nothing has been said yet")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        file.write_text("".join(lines), encoding="utf-8")
        return f"wrote {file}, a row for each model, as SFT reads them"

    def _help(self) -> str:
        names = {option: short for short, option in _SHORT.items()}
        sets = [
            (f"/{names.get(option, option.replace('_', '-'))} N", f"{option}, now {value}")
            for option, value in self._numbers().items()
        ]
        lines = [
            ("/system TEXT", "the system prompt; without TEXT: none"),
            *sets,
            ("/seed N", "of sampling, from here on"),
            ("/options", "what is set"),
            *(
                [("/adapter NAME", f"now {self._adapter}; {', '.join(self._adapters)}")]
                if self._adapters
                else []
            ),
            ("/reset", "forgets the conversation"),
            ("/save FILE", "writes it as a row of JSON; a file that exists is kept"),
            ("//…", "a message that begins with a slash"),
            ("an empty line", "ends"),
        ]
        return "\n".join(f"{name:<16} {text}" for name, text in lines)


_SHORT = {"max": "max_new_tokens"}


def _number(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"got {text!r}, wanted {wanted}") from None


def _arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--versus", metavar="MODEL", help="a second model, which answers the same messages"
    )


def _run(parsed: argparse.Namespace) -> None:
    """Reads lines until an empty one or the end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lines can then be edited and called back)
    options = {name: getattr(parsed, name) for name in sampling_flags()}
    adapters = _answerers(parsed.model, parsed.adapter, "model")
    answers = [next(iter(adapters.values()))]
    names = [""]
    if parsed.versus is not None:
        # A model compared with itself answers twice, under two names.
        names = [f"A {parsed.model}", f"B {parsed.versus}"]
        answers += _answerers(parsed.versus, None, "--versus").values()
    speakers = [Speaker(name, answer, []) for name, answer in zip(names, answers, strict=True)]
    if len(adapters) == 1:
        adapters = {}
    chat = Chat(speakers, options, parsed.seed, parsed.system, _show, adapters)
    print("Empty line to end, /help for commands.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        print(chat.reply(line))


def _show(piece: str) -> None:
    """Prints without buffering, even into a pipe."""
    print(piece, end="", flush=True)


def _answerers(source: str, adapters: Sequence[str] | None, option: str) -> dict[str, Answer]:
    """Loads a model once; name → answer function with that adapter, and last without adapter."""
    from jaxalign.sampling.generate import generate

    def answerer(model: Any, params: Any, tok: Any) -> Answer:
        return lambda prompts, **options: generate(model, params, tok, prompts, **options)

    writers = load_writers(source, adapters, option, with_base=True)
    return {name: answerer(*loaded) for name, loaded in writers.items()}


COMMAND = Command("chat", "talk to a model, or to two", _arguments, _run, compiles=True)
