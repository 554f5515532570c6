"""The shortest possible step: each resource at its peak, all overlapped (Williams et al. 2009).

    t = max(FLOPs / peak, bytes / bandwidth, bytes sent / link)        of each program, added up

The true time is longer: matrix units seldom reach their peak, and not all traffic overlaps with
arithmetic. The opposite bound is the sum of the three, where nothing overlaps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxalign.parallel.chips import Chip
from jaxalign.plan.costs import Costs
from jaxalign.plan.programs import Program

ASSUMPTIONS = (
    "each resource at the maker's peak: bfloat16 matrix products, main memory, all links of a chip "
    "at once, one network port; seconds: all overlapped; seconds_serial: nothing overlapped; PPO's "
    "answers all as long as max_new_tokens; MFU: FLOPs the mathematics asks for (no recomputation, "
    "causal attention) over time × peak"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """An estimate for one step (in PPO, one iteration).

    Attributes:
      seconds: the time if all resources overlap, each at its peak.
      seconds_serial: the time if nothing overlaps.
      tokens_per_second: total of all devices, at `seconds`.
      mfu: model FLOPs utilisation at `seconds`, 0 to 1.
      bound: what limits the longest program: "compute", "memory", "links" or "network".
      by_resource: seconds of each.
      assumptions: in words.
    """

    seconds: float
    seconds_serial: float
    tokens_per_second: float
    mfu: float
    bound: str
    by_resource: dict[str, float]
    assumptions: str = ASSUMPTIONS


def resource_seconds(costs: Costs, chip: Chip) -> dict[str, float]:
    """Time that each resource of a device needs."""
    return {
        "compute": costs.flops / chip.flops,
        "memory": costs.bytes / chip.bandwidth,
        "links": costs.inner / chip.inner,
        "network": costs.outer / chip.outer,
    }


def estimate(programs: Sequence[Program], chip: Chip, devices: int, tokens: int) -> Speed:
    """The estimate for all programs of a step together."""
    times = [
        {name: t * program.times for name, t in resource_seconds(program.costs, chip).items()}
        for program in programs
    ]
    seconds = sum(max(one.values()) for one in times)
    total = {name: sum(one[name] for one in times) for name in times[0]}
    longest = max(times, key=lambda one: max(one.values()))
    useful = sum(program.useful * program.times for program in programs)
    return Speed(
        seconds=seconds,
        seconds_serial=sum(total.values()),
        tokens_per_second=tokens / seconds,
        mfu=useful / (seconds * chip.flops * devices),
        bound=max(longest, key=lambda name: longest[name]),
        by_resource=total,
    )
