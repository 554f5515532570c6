"""Preference pairs: k answers sampled to a prompt, ranked, the best against the worst.

Three rankers:

- `reward`: the score of a reward model, as in best-of-n sampling and rejection sampling.
- `grade`: a judge gives each answer a grade from 1 to 10.
- `pairwise`: a judge compares every two answers (Zheng et al. 2023, arXiv 2306.05685). Judges
  favour a position, so the judge sees both orders. An answer that wins both wins; otherwise it is
  a tie. An answer's score is its number of wins (Copeland's rule).

Equal scores make no pair. Answers, prompts and pairs that are dropped are counted by reason.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxalign.commands.synth import prompts as texts
from jaxalign.commands.synth.config import PreferenceConfig
from jaxalign.commands.synth.filters import why_no_answer
from jaxalign.commands.synth.journal import Journal
from jaxalign.commands.synth.writer import Request, RequestFactory, Writer, prompt_hash
from jaxalign.data.rows import Prompt, to_prompt
from jaxalign.data.sources import read_rows

TOO_LONG = "too_long"
"""`finish` of an answer that exceeds the reward model's length."""


class _Answer(NamedTuple):
    """One distinct answer.

    Attributes:
      text: the answer.
      number: which of the k it is, from 1.
      time: when it was written.
      digest: the hash of its prompt.
    """

    text: str
    number: int
    time: str
    digest: str


class _Ranked(NamedTuple):
    """A pair: the indices of its answers, and their scores."""

    chosen: int
    rejected: int
    scores: tuple[float, float]


def read_prompts(config: PreferenceConfig) -> list[Prompt]:
    """The prompts of a run, in order.

    Raises:
      ValueError: a row without a prompt, or one with tools, which requests cannot carry.
    """
    prompts = [to_prompt(row) for row in read_rows(list(config.prompts))[: config.count]]
    for prompt in prompts:
        if prompt.tools:
            raise ValueError(
                f"{prompt.origin}: tools: got some, wanted a prompt without: requests carry no "
                "tools; leave the row out"
            )
    return prompts


class Preferences:
    """A run that writes preference pairs.

    Args:
      config: the options.
      prompts: the prompts to answer.
      writer: the model that answers.
      judge: the model that ranks; for "reward" a writer whose replies are numbers (`score_writer`).
      factory: seed and sampling.
      judge_factory: the same for the judge.
      journal: stores replies and rows.
      language: "en" or "zh", of the judge's prompts.

    Attributes:
      dropped: how much was dropped, by reason.
      notes: other counts.
    """

    def __init__(
        self,
        config: PreferenceConfig,
        prompts: Sequence[Prompt],
        writer: Writer,
        judge: Writer,
        factory: RequestFactory,
        judge_factory: RequestFactory,
        journal: Journal,
        language: str,
    ):
        self.dropped: collections.Counter[str] = collections.Counter()
        self.notes: collections.Counter[str] = collections.Counter()
        self._config = config
        self._prompts = prompts
        self._writer = writer
        self._judge = judge
        self._factory = factory
        self._judge_factory = judge_factory
        self._journal = journal
        self._language = language

    def run(self) -> None:
        """Answers all prompts and writes the pairs, round after round."""
        size = self._config.prompts_per_round
        for start in range(0, len(self._prompts), size):
            places = list(range(start, min(start + size, len(self._prompts))))
            answers = self._answers(places)
            ranked = self._pairwise if self._config.ranker == "pairwise" else self._scored
            for place, pairs in zip(places, ranked(places, answers), strict=True):
                for pair in pairs:
                    self._journal.add(self._row(place, answers[place], pair))

    def _answers(self, places: Sequence[int]) -> dict[int, list[_Answer]]:
        """The distinct answers to each prompt that can be used."""
        numbers = range(1, self._config.answers + 1)
        which = list(itertools.product(places, numbers))
        requests = [
            self._factory.request(f"prompt {place + 1}/answer {n}", self._prompts[place].messages)
            for place, n in which
        ]
        answers: dict[int, list[_Answer]] = {place: [] for place in places}
        replies = self._journal.ask(self._writer, requests)
        for (place, n), request, reply in zip(which, requests, replies, strict=True):
            reason = why_no_answer(reply)
            text = reply.text.strip()
            if reason is not None:
                self.dropped[f"answer: {reason}"] += 1
            elif any(text == other.text for other in answers[place]):
                self.dropped["answer: the same as another"] += 1
            else:
                digest = prompt_hash(self._writer.name, request)
                answers[place].append(_Answer(text, n, reply.time, digest))
        return answers

    def _scored(
        self, places: Sequence[int], answers: dict[int, list[_Answer]]
    ) -> list[list[_Ranked]]:
        """Pairs by a score of each answer: a reward model's or a grade."""
        rewarded = self._config.ranker == "reward"
        which = [
            (place, at)
            for place in places
            for at in range(len(answers[place]))
            if len(answers[place]) > 1
        ]
        requests = []
        for place, at in which:
            answer = answers[place][at]
            messages = list(self._prompts[place].messages)
            name = f"prompt {place + 1}/{'score' if rewarded else 'grade'} {answer.number}"
            if rewarded:
                messages.append({"role": "assistant", "content": answer.text})
                requests.append(self._judge_factory.request(name, messages, exact=True))
                continue
            text = texts.GRADE[self._language].format(
                conversation=texts.show_conversation(self._language, messages), answer=answer.text
            )
            requests.append(self._judge_factory.request(name, text, exact=True))
        scores: dict[int, dict[int, float]] = {place: {} for place in places}
        replies = self._journal.ask(self._judge, requests)
        for (place, at), request, reply in zip(which, requests, replies, strict=True):
            if rewarded and reply.finish == TOO_LONG:
                self.dropped["answer: too long for the reward model"] += 1
            elif rewarded:
                scores[place][at] = _score(request, reply.text)
            else:
                grade = texts.read_grade(reply.text) if why_no_answer(reply) is None else None
                if grade is None:
                    self.dropped["answer: no grade in the judge's reply"] += 1
                else:
                    scores[place][at] = float(grade)
        return [self._pairs(scores[place], {}) for place in places]

    def _pairwise(
        self, places: Sequence[int], answers: dict[int, list[_Answer]]
    ) -> list[list[_Ranked]]:
        """Pairs by verdicts on every two answers, each in both orders."""
        which: list[tuple[int, int, int]] = []
        requests: list[Request] = []
        for place in places:
            conversation = texts.show_conversation(
                self._language, list(self._prompts[place].messages)
            )
            for one, two in itertools.combinations(range(len(answers[place])), 2):
                for first, second in ((one, two), (two, one)):
                    a, b = answers[place][first], answers[place][second]
                    text = texts.PAIRWISE[self._language].format(
                        conversation=conversation, first=a.text, second=b.text
                    )
                    name = f"prompt {place + 1}/answer {a.number} before {b.number}"
                    requests.append(self._judge_factory.request(name, text, exact=True))
                    which.append((place, first, second))
        winners: dict[tuple[int, int, int], int | None] = {}
        unread: set[tuple[int, int, int]] = set()
        replies = self._journal.ask(self._judge, requests)
        for (place, first, second), reply in zip(which, replies, strict=True):
            verdict = texts.read_verdict(reply.text) if why_no_answer(reply) is None else None
            if verdict is None:
                unread.add((place, min(first, second), max(first, second)))
            winner = {"A": first, "B": second}.get(verdict if verdict is not None else "")
            winners[place, first, second] = winner
        wins = {place: dict.fromkeys(range(len(answers[place])), 0.0) for place in places}
        beats: dict[int, dict[tuple[int, int], bool]] = {place: {} for place in places}
        for place, one, two in winners:
            if one > two:
                continue
            verdicts = winners[place, one, two], winners[place, two, one]
            if (place, one, two) in unread:
                self.notes["comparisons without a verdict, taken as ties"] += 1
            elif verdicts[0] != verdicts[1]:
                self.notes["comparisons in which the order decided, taken as ties"] += 1
            elif verdicts[0] is None:
                self.notes["comparisons that are ties in both orders"] += 1
            else:
                winner, loser = (one, two) if verdicts[0] == one else (two, one)
                wins[place][winner] += 1
                beats[place][winner, loser] = True
        return [self._pairs(wins[place], beats[place]) for place in places]

    def _pairs(self, scores: dict[int, float], beats: dict[tuple[int, int], bool]) -> list[_Ranked]:
        """The pairs of one prompt from its answers' scores (and direct wins, if pairwise)."""
        if len(scores) < 2:
            self.dropped["prompt: less than two answers to compare"] += 1
            return []
        order = sorted(scores, key=lambda at: (-scores[at], at))
        if self._config.pairs == "best_worst":
            # On ties the last of the worst answers, and the first of the best.
            candidates = [(order[0], order[-1])]
        else:
            candidates = list(itertools.combinations(order, 2))
        pairs = []
        for chosen, rejected in candidates:
            margin = scores[chosen] - scores[rejected]
            if margin <= 0:
                self.dropped["pair: a tie"] += 1
            elif beats.get((rejected, chosen), False):
                self.dropped["pair: the one with less wins won against the other"] += 1
            elif margin < self._config.min_margin:
                self.dropped["pair: difference below min_margin"] += 1
            else:
                pairs.append(_Ranked(chosen, rejected, (scores[chosen], scores[rejected])))
        return pairs

    def _row(self, place: int, answers: Sequence[_Answer], pair: _Ranked) -> dict[str, Any]:
        prompt = self._prompts[place]
        chosen, rejected = answers[pair.chosen], answers[pair.rejected]
        row: dict[str, Any] = {
            "prompt": list(prompt.messages),
            "chosen": [{"role": "assistant", "content": chosen.text}],
            "rejected": [{"role": "assistant", "content": rejected.text}],
        }
        margin = pair.scores[0] - pair.scores[1]
        if self._config.write_margin:
            row["margin"] = margin
        row["provenance"] = {
            "method": f"best-of-k, ranked by {self._config.ranker}",
            "writer": self._writer.name,
            "judge": self._judge.name,
            "seeds": [prompt.origin],
            "prompts": [chosen.digest, rejected.digest],
            "time": max(chosen.time, rejected.time),
            "sampling": self._factory.sampling._asdict(),
            "seed": self._factory.seed,
            "answers": [chosen.number, rejected.number],
            "scores": {"chosen": pair.scores[0], "rejected": pair.scores[1], "margin": margin},
        }
        return row


def _score(request: Request, text: str) -> float:
    """A reward model's score, as the journal keeps it."""
    score = float(text)
    if not math.isfinite(score):
        raise ValueError(f"{request.name}: the reward model's score is {text}, wanted a number")
    return score
