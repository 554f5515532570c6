"""Judges of two answers: a reward model, or a language model behind an OpenAI-compatible server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.commands.eval.win_rate import Judge, Verdicts
from jaxalign.commands.synth.writer import Request, Sampling, Writer
from jaxalign.data.examples import Message
from jaxalign.rewards.scoring import load_scorer, score_conversations
from jaxalign.run.evaluation.language_model import EvalOptions

MAX_UNDECIDED = 0.1

_TOKENS = 1024  # for judges that reason before the verdict
_VERDICT = re.compile(r"\[\[\s*([AB])\s*\]\]|(?<![A-Za-z])([AB])(?![A-Za-z'’])")
_PROMPT = """Two assistants answered the conversation below. Decide which answer is better: more \
helpful, correct and honest, and as long as it needs to be. The order of the answers means nothing.

[conversation]
{prompt}

[answer A]
{first}

[answer B]
{second}

End with your verdict alone on the last line: [[A]] or [[B]]."""


def reward_judge(source: str, options: EvalOptions, chat_template: str | None = None) -> Judge:
    """A reward model: the answer with the higher score is better; equal scores are a tie."""
    scorer, params, tok = load_scorer(source)

    def judge(
        prompts: Sequence[list[Message]], first: Sequence[str], second: Sequence[str]
    ) -> Verdicts:
        texts = [*first, *second]
        conversations = [
            [*prompt, {"role": "assistant", "content": text}]
            for prompt, text in zip([*prompts, *prompts], texts, strict=True)
        ]
        # An empty answer has no last token to read a score from, so it loses.
        scores = np.full(len(texts), -np.inf)
        spoken = [i for i, text in enumerate(texts) if text.strip()]
        if spoken:
            scores[spoken] = score_conversations(
                scorer,
                params,
                tok,
                [conversations[i] for i in spoken],
                batch=options.batch,
                chat_template=chat_template,
            )
        one, two = scores[: len(first)], scores[len(first) :]
        wins = np.where(one == two, 0.5, (one > two).astype(np.float64))
        empty = len(texts) - len(spoken)
        notes = [f"{empty} empty answers lose, or tie with another"] * bool(empty)
        details: list[dict[str, Any]] = [
            {"scores": [None if np.isinf(x) else float(x) for x in pair]}
            for pair in zip(one, two, strict=True)
        ]
        return Verdicts(wins, notes, details)

    return judge


def language_judge(writer: Writer, max_undecided: float = MAX_UNDECIDED) -> Judge:
    """A language model, asked about each pair in both orders.

    The first answer wins if both orders prefer it; if they disagree it is a tie. A reply that names
    neither A nor B is undecided: it counts as half a win in its order.

    Args:
      writer: receives the requests.
      max_undecided: the largest share of undecided replies with which there is a result.

    Raises:
      ValueError: when called: more undecided replies.
    """

    def judge(
        prompts: Sequence[list[Message]], first: Sequence[str], second: Sequence[str]
    ) -> Verdicts:
        requests = []
        for number, (prompt, a, b) in enumerate(zip(prompts, first, second, strict=True)):
            for order, (one, two) in enumerate(((a, b), (b, a))):
                text = _PROMPT.format(prompt=_transcript(prompt), first=one, second=two)
                messages = [{"role": "user", "content": text}]
                sampling = Sampling(0.0, 1.0, _TOKENS)
                name = f"pair {number + 1}, order {order + 1}"
                requests.append(Request(name, messages, sampling, 2 * number + order))
        replies = dict(writer.write(requests, range(len(requests))))
        texts = [replies[i].text for i in range(len(requests))]
        verdicts = [verdict(text) for text in texts]
        undecided = sum(found is None for found in verdicts)
        if undecided > max_undecided * len(verdicts):
            example = next(t for t, v in zip(texts, verdicts, strict=True) if v is None)
            raise ValueError(
                f"the judge {writer.name!r} answered neither A nor B in {undecided} of "
                f"{len(verdicts)} replies, such as {example[-80:]!r}; wanted at most "
                f"{max_undecided:.0%} (--max-undecided): choose a judge that keeps to the form"
            )
        # In the second order, B is the first answer.
        points = np.array([0.5 if v is None else float(v == "AB"[i % 2])
                           for i, v in enumerate(verdicts)])  # fmt: skip
        pairs = points.reshape(-1, 2)
        ties = int(np.sum(pairs.sum(axis=1) == 1.0))
        notes = [f"{undecided} of {len(verdicts)} replies named neither A nor B"] * bool(undecided)
        notes.append(f"{ties} of {len(pairs)} pairs are ties, since the two orders disagree")
        # 1.5 points of 2 are a win in one order and no verdict in the other: still a lead.
        wins = (np.sign(pairs.sum(axis=1) - 1) + 1) / 2
        details: list[dict[str, Any]] = [
            {"replies": texts[2 * i : 2 * i + 2]} for i in range(len(pairs))
        ]
        return Verdicts(wins, notes, details)

    return judge


def verdict(text: str) -> str | None:
    """The last A or B of a reply (the last one in brackets, if any); None without one."""
    found = list(_VERDICT.finditer(text))
    bracketed = [match[1] for match in found if match[1]]
    if bracketed:
        return bracketed[-1]
    # "A" is an article too: without brackets, only the last line counts.
    last = text.strip().rsplit("\n", 1)[-1]
    letters = {match[2] for match in _VERDICT.finditer(last) if match[2]}
    return letters.pop() if len(letters) == 1 else None


def _transcript(messages: Sequence[Message]) -> str:
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
