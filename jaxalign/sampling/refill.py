"""When to give a rollout fewer slots than answers, so that finished answers make room for others.

With a slot for every answer, all slots are computed until the longest answer ends. With S slots and
a queue (`sample(slots=S)`), short answers waste no steps, but there are more of them. A decode step
of n rows costs about n₀ + n, with n₀ for reading the weights (`Backend.decode_free_tokens`). So B
answers of ΣL tokens, the longest of R, cost

    a slot for every answer:  R · (n₀ + B)
    S slots and a queue:      (ΣL / S + R / 2) · (n₀ + S)

where R / 2 is for the end, when the queue is empty and slots fall idle one by one. The choice is
between a slot for each and S = 2 · n₀, where the weights are a third of a step.
"""

from __future__ import annotations

from jax.sharding import Mesh

from jaxalign.models.backend import backend
from jaxalign.parallel.sharding import axis_shards, use_mesh


def refilled_slots(
    answers: int, mean_length: float, longest: float, mesh: Mesh | None = None
) -> int | None:
    """The slots for a rollout whose answers are as long as those of the last one.

    Args:
      answers: B, at least 1.
      mean_length: tokens of an answer, ΣL / B.
      longest: R, tokens of the longest answer.
      mesh: where answers are sampled, under the rules in context. If rows are split over devices,
        there is a slot for every answer: a queue would gather the prompts' keys and values on every
        device.

    Returns:
      S; None: a slot for every answer.
    """
    if mesh is not None and max(axis_shards(axis, mesh) for axis in ("rows", "cache_rows")) > 1:
        return None
    with use_mesh(mesh):
        free = backend().decode_free_tokens  # n₀
    slots = 2 * free
    if answers < 2 * slots:
        return None
    steps = mean_length * answers / slots + longest / 2
    return slots if steps * (free + slots) < longest * (free + answers) else None
