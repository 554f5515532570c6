"""Will it fit, and how fast may it be? Compiles a run's own programs for named devices.

Everything is abstract: the model is read from `config.json` (or a GGUF file's metadata) alone, and
parameters, optimizer state and batches are shapes with the layout that a run would give them. The
devices may be absent: for TPUs and GPUs a compiler is enough (extras `plan-tpu` and `plan-gpu`).

The programs are those of `jaxalign.run.tasks`, made by the code that makes the run. SFT and reward
modelling compile their step, DPO and KTO also the reference's log-probabilities, PPO all of an
iteration: reading prompts, writing answers, scoring, experience, update.
"""

from __future__ import annotations

from jaxalign.plan.costs import Costs, Traffic
from jaxalign.plan.make import make_plan, resident_bytes, run_shapes, step_shapes
from jaxalign.plan.programs import Program
from jaxalign.plan.result import Plan
from jaxalign.plan.search import search_plans
from jaxalign.plan.topology import find_devices, parse_topology

__all__ = [
    "Costs",
    "Plan",
    "Program",
    "Traffic",
    "find_devices",
    "make_plan",
    "parse_topology",
    "resident_bytes",
    "run_shapes",
    "search_plans",
    "step_shapes",
]
