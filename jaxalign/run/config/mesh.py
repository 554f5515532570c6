"""The section `mesh` of a run's configuration."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from jaxalign.parallel.mesh import make_mesh, split_devices
from jaxalign.parallel.rules import check_rules, check_sequence_attention, use_rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the device mesh, and how arrays are placed on it. See `jaxalign.make_mesh`.

    Attributes:
      data: replicas; one of the sizes may be -1, "the rest".
      fsdp: shards of parameters and optimizer state.
      tensor: shards of heads, MLP columns and vocabulary.
      sequence: parts of every row.
      expert: shards of the experts of a mixture.
      dcn: axis → the number of slices or nodes over which it is split; None: detected.
      rules: logical axis → mesh axis, several, or null (replicated): overrides entries of
        `jaxalign.parallel.rules.RULES`, for parameters and activations.
      rules_of: the same for a single model, on top of `rules`: the sharding of the parameters of
        `reference`, `reward` and `critic`, and under `rollout` that of the policy's parameters,
        cache and activations while sampling.
      apart: model → number of devices that hold only this model, the last ones of each host; the
        sizes above then count the remaining devices. Such a model is split along `fsdp`.
      sequence_attention: how a device attends to other devices' parts of a row: "gather" all keys
        and values, pass them round a "ring", or exchange tokens for heads ("ulysses"); "auto"
        chooses, see docs/parallel.md.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    dcn: dict[str, int] | None = None
    rules: dict[str, str | tuple[str, ...] | None] = dataclasses.field(default_factory=dict)
    rules_of: dict[str, dict[str, str | tuple[str, ...] | None]] = dataclasses.field(
        default_factory=dict
    )
    apart: dict[str, int] = dataclasses.field(default_factory=dict)
    sequence_attention: str = "auto"

    def __post_init__(self):
        check_rules(self.rules)
        check_sequence_attention(self.sequence_attention)
        with use_rules(self.rules):
            for rules in self.rules_of.values():
                check_rules(rules)

    def make(self, devices: Sequence[jax.Device] | None = None, model: str | None = None) -> Mesh:
        """The mesh, of all devices or of these; or the one that `model` alone lies on.

        A model without its own devices is on the run's mesh.
        """
        if self.apart:
            dealt = split_devices(list(jax.devices() if devices is None else devices), self.apart)
            if model in self.apart:
                return make_mesh(devices=dealt[model])
            devices = dealt[None]
        return make_mesh(
            self.data,
            self.fsdp,
            self.tensor,
            devices,
            sequence=self.sequence,
            expert=self.expert,
            dcn=self.dcn,
        )

    def use_rules(self, model: str | None = None) -> contextlib.AbstractContextManager[None]:
        """Context with the sharding rules of the run, or of one of its models."""
        if model is None:
            return use_rules(self.rules, sequence_attention=self.sequence_attention)
        return use_rules(self.rules_of.get(model))
