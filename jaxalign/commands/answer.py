"""The commands in which a model answers or judges: `generate`, `chat`, `score`."""

from __future__ import annotations

import argparse
import sys


def generate(parsed: argparse.Namespace) -> int:
    """Answers prompts from the command line or standard input."""
    prompts = parsed.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if parsed.best_of is not None:
        return _generate_best(parsed, prompts)
    for option in ("reward_model", "weights", "reward_chat_template"):
        if getattr(parsed, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')}: wanted --best-of N with it")
    answer = _answerer(parsed)
    for prompt, text in zip(prompts, answer(prompts), strict=True):
        print(f"> {prompt}\n{text}\n")
    return 0


def _generate_best(parsed: argparse.Namespace, prompts: list[str]) -> int:
    import jax

    from jaxalign.hf import load_pretrained, load_tokenizer
    from jaxalign.rewards.best_of import best_of, model_judge
    from jaxalign.rewards.scoring import load_scorer

    if parsed.reward_model is None:
        raise ValueError("--best-of: wanted --reward-model, which picks the best answer")
    scorer, scorer_params, scorer_tok = load_scorer(parsed.reward_model, _weights(parsed.weights))
    template = parsed.reward_chat_template
    judge = model_judge(scorer, scorer_params, scorer_tok, chat_template=template)
    tok = load_tokenizer(parsed.model)
    model, params = load_pretrained(parsed.model)
    picked = best_of(
        _language_model(model, parsed.model),
        params,
        tok,
        prompts,
        judge,
        count=parsed.best_of,
        max_new_tokens=parsed.max_new_tokens,
        temperature=parsed.temperature,
        top_k=parsed.top_k,
        top_p=parsed.top_p,
        key=jax.random.key(parsed.seed),
        chat_template=parsed.chat_template,
    )
    for prompt, one in zip(prompts, picked, strict=True):
        scores = ", ".join(f"{score:.3g}" for score in one.scores)
        print(f"> {prompt}\n{one.answer}\n[score {one.score:.3g} of {scores}]\n")
    return 0


def score(parsed: argparse.Namespace) -> int:
    """A reward model's scores of the answers in files."""
    from jaxalign.rewards.scoring import score_files

    print(
        score_files(
            parsed.model,
            parsed.files,
            parsed.out,
            column=parsed.column,
            weights=_weights(parsed.weights),
            batch=parsed.batch,
            length=parsed.length,
            chat_template=parsed.chat_template,
        ),
        file=sys.stderr,
    )
    return 0


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


def chat(parsed: argparse.Namespace) -> int:
    """Talks to a model, line by line."""
    answer = _answerer(parsed)
    said: list[dict[str, str]] = []
    print("Empty line to end.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            line = ""
        if not line:
            return 0
        said.append({"role": "user", "content": line})
        text = answer([said])[0]
        said.append({"role": "assistant", "content": text})
        print(text)


def _answerer(parsed: argparse.Namespace):
    import jax

    from jaxalign.hf import load_pretrained, load_tokenizer
    from jaxalign.sampling.generate import generate as write_answers

    tok = load_tokenizer(parsed.model)
    model, params = load_pretrained(parsed.model)
    model = _language_model(model, parsed.model)
    key = jax.random.key(parsed.seed)

    def answer(prompts):
        return write_answers(
            model,
            params,
            tok,
            prompts,
            max_new_tokens=parsed.max_new_tokens,
            temperature=parsed.temperature,
            top_k=parsed.top_k,
            top_p=parsed.top_p,
            key=key,
            chat_template=parsed.chat_template,
        )

    return answer


def _language_model(model, source: str):
    from jaxalign.models.decoder import Decoder

    if not isinstance(model, Decoder):
        raise ValueError(f"{source!r} is a reward model; wanted a language model")
    return model
