"""Filters of instructions, instances and replies; each drops with a reason."""

from __future__ import annotations

from collections.abc import Sequence

from jaxalign.commands.synth.config import InstructConfig
from jaxalign.commands.synth.prompts import Instance
from jaxalign.commands.synth.rouge import Pool, words
from jaxalign.commands.synth.writer import LENGTH, REFUSED, Reply


class InstructionFilter:
    """Keeps an instruction that is new, neither too short nor too long, and about text.

    Args:
      config: the thresholds.
      instructions: earlier instructions, from which new ones must differ.
    """

    def __init__(self, config: InstructConfig, instructions: Sequence[str]):
        self._config = config
        self._keywords = [(keyword, words(keyword)) for keyword in config.keywords]
        self._pool = Pool()
        for instruction in instructions:
            self._pool.add(words(instruction))

    def why_not(self, instruction: str) -> tuple[str | None, float]:
        """The reason to drop an instruction (or None), and its largest ROUGE-L; adds it if kept."""
        tokens = words(instruction)
        if len(tokens) < self._config.min_words:
            return f"instruction of less than {self._config.min_words} words", 0.0
        if len(tokens) > self._config.max_words:
            return f"instruction of more than {self._config.max_words} words", 0.0
        if not instruction[0].isalnum() and instruction[0] not in "\"'“‘《（([*`":
            return "instruction begins with a punctuation mark", 0.0
        for keyword, parts in self._keywords:
            if contains(tokens, parts):
                return f"keyword {keyword!r}", 0.0
        score, _ = self._pool.most_similar(tokens)
        if score >= self._config.rouge_threshold:
            return f"ROUGE-L of {self._config.rouge_threshold:g} or more with another", score
        self._pool.add(tokens)
        return None, score


def contains(text: Sequence[str], part: Sequence[str]) -> bool:
    """Whether the words of `part` occur in `text` in a row."""
    size = len(part)
    return size > 0 and any(
        list(text[at : at + size]) == list(part) for at in range(len(text) - size + 1)
    )


def keep_instances(
    instances: Sequence[Instance], instruction: str, config: InstructConfig
) -> tuple[list[Instance], list[str]]:
    """The instances of a task that training can use, and the reasons for dropping the others.

    All instances of an input with several outputs are dropped: at least one of those is wrong.
    """
    kept: list[Instance] = []
    reasons: list[str] = []
    outputs: dict[str, set[str]] = {}
    for instance in instances:
        outputs.setdefault(instance.input, set()).add(instance.output)
    for instance in instances:
        size = len(words(instance.output))
        if not instance.output.strip():
            reasons.append("output is empty")
        elif size > config.max_output_words:
            reasons.append(f"output of more than {config.max_output_words} words")
        elif instance.output.strip() in (instance.input.strip(), instruction.strip()):
            reasons.append("output repeats the input")
        elif len(outputs[instance.input]) > 1:
            reasons.append("one input with several outputs")
        elif instance in kept:
            reasons.append("instance is there twice")
        else:
            kept.append(instance)
    return kept, reasons


def why_no_answer(reply: Reply) -> str | None:
    """A reason to drop a reply regardless of its content, or None."""
    if reply.finish == REFUSED:
        return "request refused by the server"
    if reply.finish == LENGTH:
        return "cut off at max_tokens"
    if not reply.text.strip():
        return "reply is empty"
    return None
