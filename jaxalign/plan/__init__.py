"""Will it fit, and how fast can it be? Compiles a run's own programs for named devices.

Everything is abstract: only `config.json` (or a GGUF file's metadata) is read of the model, and
parameters, optimizer state and batches are shapes with a run's shardings. The devices may be
absent: for TPUs and GPUs a compiler is enough (extras `plan-tpu` and `plan-gpu`).

The programs are those of `jaxalign.run.tasks`, built by the same code as in a run. SFT and reward
modelling compile their step, DPO and KTO also the reference's log-probabilities, and PPO a whole
iteration: prefill, decoding, scoring, experience, update.
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
