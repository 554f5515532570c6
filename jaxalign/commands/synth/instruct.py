"""Self-Instruct (Wang et al. 2022, arXiv 2212.10560): new tasks from a few seed tasks.

A round follows the paper. Each step handles everything that the step before has kept:

1. *Instructions*: a prompt shows some human and some machine tasks (6 and 2, as the paper) and asks
   for new ones.
2. *Filters* drop those that are too short or long, contain a keyword, or resemble another task
   (ROUGE-L ≥ 0.7 in the paper).
3. *Classification?* The writer says of each task whether it is one, given seed tasks as examples.
   An option turns this off.
4. *Instances*: input first, then the output; for classifications the labels first and an input for
   each, since a model that writes inputs first tends to give them all the same label.
5. *Filters* drop instances that are empty, too long, repeated or contradictory.

The paper completes text with a plain language model. Here a chat model gets instructions, and one
request writes several tasks, as in Alpaca. Which tasks a prompt shows depends only on the seed and
on the position in the run.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxalign.commands.synth import prompts
from jaxalign.commands.synth.config import InstructConfig
from jaxalign.commands.synth.filters import InstructionFilter, keep_instances, why_no_answer
from jaxalign.commands.synth.journal import Journal
from jaxalign.commands.synth.prompts import Instance
from jaxalign.commands.synth.writer import (
    LENGTH,
    Reply,
    Request,
    RequestFactory,
    Writer,
    prompt_hash,
)
from jaxalign.data.rows import Messages
from jaxalign.data.sources import read_rows

_SHOWN = 4  # seed tasks shown as examples of classifications and instances
_SHOWN_CHARACTERS = 1500  # the longest of those


class Task(NamedTuple):
    """A task with working examples of it.

    Attributes:
      id: for a seed its own id, or `file:line`; for a machine-written task its place in the run.
      instruction: what to do.
      instances: inputs and outputs.
      classification: whether outputs are a few fixed labels.
    """

    id: str
    instruction: str
    instances: tuple[Instance, ...]
    classification: bool


class _New(NamedTuple):
    """A task without instances yet."""

    id: str
    instruction: str
    score: float
    seeds: list[str]
    hashes: list[str]
    classification: bool


def read_seed_tasks(sources: Sequence[str]) -> list[Task]:
    """Seed tasks: `instruction` with `instances` (a list of `input` and `output`), or Alpaca rows.

    Raises:
      ValueError: a row without these columns or with empty ones, with `file:line`.
    """
    tasks = []
    for data, origin in read_rows(list(sources)):
        instruction = data.get("instruction")
        if not isinstance(instruction, str) or not instruction.strip():
            raise ValueError(
                f"{origin}: instruction: got {instruction!r:.40}, wanted text; a seed task has "
                "instruction and instances, or instruction, input and output"
            )
        given = data.get("instances", [data])
        if not isinstance(given, list) or not given:
            raise ValueError(f"{origin}: instances: got {given!r:.40}, wanted a list; correct it")
        instances = []
        for number, instance in enumerate(given):
            at = f"{origin}: instances[{number}]"
            if not isinstance(instance, dict):
                raise ValueError(f"{at}: got {instance!r:.40}, wanted an object with output")
            output, extra = instance.get("output"), instance.get("input")
            extra = "" if extra is None else extra
            if not isinstance(output, str) or not output.strip():
                raise ValueError(f"{at}.output: got {output!r:.40}, wanted text; write it")
            if not isinstance(extra, str):
                raise ValueError(f"{at}.input: got {extra!r:.40}, wanted text; correct it")
            instances.append(Instance(extra.strip(), output.strip()))
        classification = data.get("is_classification", False)
        if not isinstance(classification, bool):
            raise ValueError(
                f"{origin}: is_classification: got {classification!r:.40}, wanted true or false"
            )
        name = data.get("id")
        name = str(name) if isinstance(name, str | int) else origin
        tasks.append(Task(name, instruction.strip(), tuple(instances), classification))
    return tasks


class SelfInstruct:
    """A run of Self-Instruct; `run` writes the rows.

    Args:
      config: the options.
      seeds: human tasks; at least one.
      writer: who writes.
      factory: seed and sampling.
      journal: stores replies and rows.
      language: "en" or "zh", of the prompts.

    Attributes:
      dropped: how much was dropped, by reason.
      notes: other counts.
    """

    def __init__(
        self,
        config: InstructConfig,
        seeds: Sequence[Task],
        writer: Writer,
        factory: RequestFactory,
        journal: Journal,
        language: str,
    ):
        self.dropped: collections.Counter[str] = collections.Counter()
        self.notes: collections.Counter[str] = collections.Counter()
        self._config = config
        self._seeds = list(seeds)
        self._machine: list[Task] = []
        self._writer = writer
        self._factory = factory
        self._journal = journal
        self._language = language
        self._filter = InstructionFilter(config, [task.instruction for task in seeds])

    def run(self) -> None:
        """Writes rows until there are `count`.

        Raises:
          ValueError: `patience` rounds in a row wrote no row.
        """
        number = barren = 0
        while self._journal.rows < self._config.count:
            number += 1
            before = self._journal.rows
            self._round(number)
            barren = 0 if self._journal.rows > before else barren + 1
            if barren == self._config.patience:
                reasons = ", ".join(f"{n} × {why}" for why, n in self.dropped.most_common(5))
                raise ValueError(
                    f"{barren} rounds in a row without a new row ({self._journal.rows} of "
                    f"{self._config.count} written); dropped so far: {reasons}; use another "
                    "writer, more seeds or other thresholds"
                )

    def _round(self, number: int) -> None:
        tasks = self._instructions(number)
        if self._config.classification_check:
            tasks = self._classified(tasks)
        replies, digests = self._written(tasks)
        for task, reply, digest in zip(tasks, replies, digests, strict=True):
            self._keep(task, reply, digest)

    def _rng(self, name: str) -> random.Random:
        return random.Random(f"{self._factory.seed} {name}")

    def _ask(self, requests: Sequence[Request]) -> tuple[list[Reply], list[str]]:
        replies = self._journal.ask(self._writer, requests)
        return replies, [prompt_hash(self._writer.name, request) for request in requests]

    def _instructions(self, number: int) -> list[_New]:
        """Asks for new instructions and keeps those that pass the filters."""
        config, names, requests, shown = self._config, [], [], []
        for n in range(1, config.prompts_per_round + 1):
            name = f"round {number}/prompt {n}"
            rng = self._rng(name)
            human = rng.sample(self._seeds, min(config.human_examples, len(self._seeds)))
            machine = rng.sample(self._machine, min(config.machine_examples, len(self._machine)))
            examples = human + machine
            rng.shuffle(examples)
            text = prompts.NEW_TASKS[self._language].format(
                count=config.tasks_per_prompt,
                first=len(examples) + 1,
                examples=prompts.show_list([task.instruction for task in examples]),
            )
            names.append(name)
            shown.append([task.id for task in examples])
            requests.append(self._factory.request(f"{name}/tasks", text))
        kept: list[_New] = []
        for name, ids, reply, digest in zip(names, shown, *self._ask(requests), strict=True):
            reason = None if reply.finish == LENGTH else why_no_answer(reply)
            found = prompts.read_list(reply.text) if reason is None else []
            if reason is None and reply.finish == LENGTH and found:
                found.pop()
                self.dropped["instruction cut off at max_tokens"] += 1
            elif reason is not None or not found:
                self.dropped[reason if reason is not None else "no list in the reply"] += 1
            for n, instruction in enumerate(found, start=1):
                reason, score = self._filter.why_not(instruction)
                if reason is not None:
                    self.dropped[reason] += 1
                    continue
                kept.append(_New(f"{name}/task {n}", instruction, score, ids, [digest], False))
        return kept

    def _classified(self, tasks: Sequence[_New]) -> list[_New]:
        """Asks which tasks are classifications; an unclear reply counts as no, as in the paper."""
        requests = []
        for task in tasks:
            rng = self._rng(f"{task.id}/classification")
            examples = self._examples(rng, True, _SHOWN // 2)
            examples += self._examples(rng, False, _SHOWN // 2)
            rng.shuffle(examples)
            text = prompts.CLASSIFICATION[self._language].format(
                examples="\n\n".join(
                    prompts.show_classification(self._language, e.instruction, e.classification)
                    for e in examples
                ),
                instruction=task.instruction,
            )
            requests.append(self._factory.request(f"{task.id}/classification", text, exact=True))
        result = []
        for task, reply, digest in zip(tasks, *self._ask(requests), strict=True):
            answer = prompts.read_yes_no(reply.text) if why_no_answer(reply) is None else None
            # A long reply may begin with a clear word.
            answer = prompts.read_yes_no(reply.text) if reply.finish == LENGTH else answer
            if answer is None:
                self.notes["classification unclear, taken as no"] += 1
            result.append(task._replace(classification=bool(answer), hashes=[*task.hashes, digest]))
        return result

    def _examples(self, rng: random.Random, classification: bool, count: int) -> list[Task]:
        fit = [
            task
            for task in self._seeds
            if task.classification == classification
            and len(_as_example(self._language, task)) <= _SHOWN_CHARACTERS
        ]
        return rng.sample(fit, min(count, len(fit)))

    def _written(self, tasks: Sequence[_New]) -> tuple[list[Reply], list[str]]:
        """Asks for the instances of all tasks."""
        requests = []
        for task in tasks:
            name = f"{task.id}/instances"
            examples = self._examples(self._rng(name), task.classification, _SHOWN)
            template = prompts.OUTPUT_FIRST if task.classification else prompts.INPUT_FIRST
            text = template[self._language].format(
                count=self._config.max_labels,
                examples="\n\n".join(_as_example(self._language, e) for e in examples),
                instruction=task.instruction,
            )
            requests.append(self._factory.request(name, text))
        return self._ask(requests)

    def _keep(self, task: _New, reply: Reply, digest: str) -> None:
        """Filters the instances of a task and writes rows of what is left."""
        reason = why_no_answer(reply)
        if reason is not None:
            self.dropped[reason] += 1
            return
        found = prompts.read_instances(reply.text, task.classification)
        if not found:
            self.dropped["no instance in the reply"] += 1
            return
        if task.classification and len(found) > self._config.max_labels:
            self.dropped["more labels than max_labels"] += len(found) - self._config.max_labels
            found = found[: self._config.max_labels]
        kept, reasons = keep_instances(found, task.instruction, self._config)
        self.dropped.update(reasons)
        if not kept:
            return
        self._machine.append(Task(task.id, task.instruction, tuple(kept), task.classification))
        for instance in kept:
            if self._journal.rows >= self._config.count:
                self.notes["rows beyond count, not written"] += 1
                continue
            row = as_row(self._config.form, task.instruction, instance)
            row["provenance"] = {
                "method": "self-instruct",
                "writer": self._writer.name,
                "task": task.id,
                "seeds": task.seeds,
                "prompts": [*task.hashes, digest],
                "time": reply.time,
                "sampling": self._factory.sampling._asdict(),
                "seed": self._factory.seed,
                "classification": task.classification,
                "scores": {"rouge_l": round(task.score, 4)},
            }
            self._journal.add(row)


def _as_example(language: str, task: Task) -> str:
    instances = task.instances if task.classification else task.instances[:1]
    return prompts.show_instances(language, task.instruction, instances, task.classification)


def as_row(form: str, instruction: str, instance: Instance) -> dict[str, Any]:
    """A row in one of the forms that are read for SFT."""
    if form == "alpaca":
        return {"instruction": instruction, "input": instance.input, "output": instance.output}
    prompt = f"{instruction}\n{instance.input}" if instance.input else instruction
    if form == "prompt_completion":
        return {"prompt": prompt, "completion": instance.output}
    messages: Messages = (
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": instance.output},
    )
    return {"messages": list(messages)}
