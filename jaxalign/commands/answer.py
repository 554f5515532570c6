"""The commands `generate` (a model answers) and `score` (a reward model scores).

`generate` and `chat` take the sampling options of `jaxalign.generate` as flags. Names, types,
defaults and help come from its signature and docstring, so a new option there becomes a new flag
here.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from jaxalign.commands.adapters import adapter_argument, load_writers, named_adapters
from jaxalign.commands.command import Command
from jaxalign.commands.going_on import overwrite_argument
from jaxalign.data.bounds import parse_json

_NOT_FLAGS = ("key", "rows", "on_text")  # --seed makes the key; as many rows as fit
_DEFAULTS = {"max_new_tokens": 128}  # defaults that differ from the function's


def _object(text: str) -> dict[str, Any]:
    """An object of JSON, such as '{"enable_thinking": true}'."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


_TYPES = {"int": int, "float": float, "str": str, "dict[str, Any]": _object}


# --- generate ------------------------------------------------------------------------------------


def sampling_flags() -> dict[str, dict[str, Any]]:
    """Option of `jaxalign.generate` → arguments of `add_argument`."""
    from jaxalign.sampling.generate import generate

    flags = {}
    for name, parameter in inspect.signature(generate).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY or name in _NOT_FLAGS:
            continue
        flags[name] = {
            "type": _TYPES[str(parameter.annotation).removesuffix(" | None")],
            "default": _DEFAULTS.get(name, parameter.default),
            "help": _documented(generate, name),
        }
    return flags


def _documented(function: Callable[..., Any], name: str) -> str:
    """An argument's description in a docstring of Google's style, on one line."""
    found = re.search(
        rf"^  {name}: (.*(?:\n    .*)*)", inspect.getdoc(function) or "", re.MULTILINE
    )
    text = " ".join(found[1].split()) if found is not None else ""
    return text.rstrip(".").replace("%", "%%").replace("`", "")


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the model, its adapters, the sampling options and the seed."""
    parser.add_argument("model", help="folder, .gguf file or hub id")
    adapter_argument(parser)
    for name, arguments in sampling_flags().items():
        parser.add_argument(f"--{name.replace('_', '-')}", **arguments)
    parser.add_argument("--seed", type=int, default=0, help="of sampling")


def _sampling(parsed: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `jaxalign.generate`."""
    import jax

    options = {name: getattr(parsed, name) for name in sampling_flags()}
    return options | {"key": jax.random.key(parsed.seed)}


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    parser.add_argument("prompts", nargs="*", help="read from standard input, a line each, if none")
    parser.add_argument(
        "--best-of", type=int, metavar="N", help="sample N answers, show the one scored best"
    )
    parser.add_argument("--reward-model", metavar="MODEL", help="what scores them")
    parser.add_argument("--reward-chat-template", help="its template; its tokenizer's own if none")
    _weights_argument(parser)


def _generate(parsed: argparse.Namespace) -> None:
    """Answers prompts from the command line or standard input."""
    prompts = parsed.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if parsed.best_of is not None:
        _generate_best(parsed, prompts)
        return
    for option in ("reward_model", "weights", "reward_chat_template"):
        if getattr(parsed, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')}: wanted --best-of N with it")
    from jaxalign.sampling.generate import generate

    options, answers = _sampling(parsed), {}
    for name, (model, params, tok) in load_writers(parsed.model, parsed.adapter, "model").items():
        answers[name] = generate(model, params, tok, prompts, **options)
    for number, prompt in enumerate(prompts):
        texts = {name: found[number] for name, found in answers.items()}
        shown = [f"[{name}]\n{text}" if len(texts) > 1 else text for name, text in texts.items()]
        print(f"> {prompt}\n{chr(10).join(shown)}\n")


def _generate_best(parsed: argparse.Namespace, prompts: list[str]) -> None:
    from jaxalign.rewards.best_of import best_of, model_judge
    from jaxalign.rewards.scoring import load_scorer

    if parsed.reward_model is None:
        raise ValueError("--best-of: wanted --reward-model, which picks the best answer")
    if len(parsed.adapter or ()) > 1:
        raise ValueError("--best-of with several adapters: wanted one --adapter at most")
    scorer, scorer_params, scorer_tok = load_scorer(parsed.reward_model, _weights(parsed.weights))
    template = parsed.reward_chat_template
    judge = model_judge(scorer, scorer_params, scorer_tok, chat_template=template)
    writers = load_writers(parsed.model, parsed.adapter, "model")
    model, params, tok = next(iter(writers.values()))
    results = best_of(model, params, tok, prompts, judge, count=parsed.best_of, **_sampling(parsed))
    for prompt, best in zip(prompts, results, strict=True):
        scores = ", ".join(f"{score:.3g}" for score in best.scores)
        print(f"> {prompt}\n{best.answer}\n[score {best.score:.3g} of {scores}]\n")


# --- score ----------------------------------------------------------------------------------------


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="folder or hub id of a reward model; with --adapter, the adapter's base"
    )
    adapter_argument(parser)
    parser.add_argument("files", nargs="+", help="rows with answers: files, folders, hub ids")
    parser.add_argument("--out", help="file to write; standard output if none")
    overwrite_argument(parser, "the file OUT")
    parser.add_argument("--column", default="reward", help="name of the column that is added")
    parser.add_argument("--batch", type=int, default=16, help="answers scored at a time")
    parser.add_argument(
        "--length", type=int, help="longest prompt with answer, tokens; no limit if none"
    )
    parser.add_argument("--chat-template", help='"chatml", "none" or a jinja file')
    parser.add_argument(
        "--thinking", default="auto", help='"on", "off" or "auto", as in the training of the model'
    )
    parser.add_argument(
        "--chat-template-kwargs",
        type=_object,
        metavar="JSON",
        help="variables of the chat template, as in the training of the model",
    )
    _weights_argument(parser)


def _score(parsed: argparse.Namespace) -> None:
    from jaxalign.data.paths import check_free
    from jaxalign.rewards.scoring import score_files

    adapters = named_adapters(parsed.adapter)
    if parsed.out is not None:
        sources = [parsed.model, *adapters.values(), *parsed.files]
        check_free(parsed.out, "--out", overwrite=parsed.overwrite, sources=sources)
    summary = score_files(
        parsed.model,
        parsed.files,
        parsed.out,
        adapters=adapters,
        column=parsed.column,
        weights=_weights(parsed.weights),
        batch=parsed.batch,
        length=parsed.length,
        chat_template=parsed.chat_template,
        thinking=parsed.thinking,
        chat_template_kwargs=parsed.chat_template_kwargs,
    )
    print(summary, file=sys.stderr)


def _weights_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        metavar="NAME=W,…",
        help="of a reward model's attributes, for one score: helpfulness=0.7,verbosity=-0.3",
    )


def _weights(text: str | None) -> dict[str, float] | None:
    """`a=1,b=-0.5` as numbers by name."""
    if text is None:
        return None
    weights = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            separator = ""
        if not separator or not name.strip():
            raise ValueError(f"--weights: got {part!r}, wanted name=number, separated by commas")
    return weights


COMMANDS = (
    Command("generate", "answer prompts", _generate_arguments, _generate, compiles=True),
    Command(
        "score",
        "a reward model's scores of answers, as JSON lines",
        _score_arguments,
        _score,
        compiles=True,
    ),
)
