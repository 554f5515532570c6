"""Whether a reward model is an adapter on the policy's base, so that both share it in memory."""

from __future__ import annotations

import pathlib
import sys

from jaxalign.hf.peft_config import CONFIG, read_config
from jaxalign.hf.source import base_of, same_source
from jaxalign.parallel import distributed
from jaxalign.rewards.model_spec import ModelReward
from jaxalign.run.config.ppo import PPORun
from jaxalign.run.digests import weights_digest
from jaxalign.run.tasks.loader import Loader


def shares_base(config: PPORun, spec: ModelReward, loader: Loader) -> bool:
    """Whether a reward model is an adapter that fits the policy's frozen base.

    If an adapter must be a separate model in memory, a line on standard error says why.

    Args:
      config: the run's config.
      spec: the reward model's configuration.
      loader: the loader of the run's models.

    Raises:
      ValueError: `adapter: true`, but it is not an adapter on that base; the message says why.
    """
    if config.model.lora is None and not spec.adapter:
        return False
    path = loader.find_adapter(spec.source, assume=spec.adapter)
    if path is None:
        reason = "it is a whole model"
    else:
        reason = _own_place(config) or _other_base(path, config.model.source)
    if reason is not None and spec.adapter:
        raise ValueError(
            f"rewards: adapter=true of {spec.source!r}: {reason}; wanted an adapter on the frozen "
            "base of model.lora, as `jaxalign export RUN --to peft` writes, or adapter: false"
        )
    if reason is not None and path is not None and distributed.is_main():
        print(
            f"the reward model {spec.source!r} is an adapter, and has a base of its own in memory: "
            f"{reason}",
            file=sys.stderr,
        )
    return reason is None


def _own_place(config: PPORun) -> str | None:
    """Why no reward model of this run can share the base, or None."""
    if config.model.lora is None:
        return "model.lora is null, and the policy trains the whole model"
    if config.model.lora.init == "pissa":
        return "model.lora.init=pissa takes a part out of the base"
    if "reward" in config.mesh.apart:
        return "mesh.apart.reward gives it devices of its own"
    if config.mesh.rules_of.get("reward"):
        return "mesh.rules_of.reward gives it a layout of its own"
    return None


def _other_base(folder: pathlib.Path, source: str) -> str | None:
    """Why an adapter does not fit the model `source`; None for one that does not exist yet."""
    if not (folder / CONFIG).is_file():
        return None
    if read_config(folder).get("init_lora_weights") == "pissa":
        return "init_lora_weights=pissa takes a part out of the base"
    try:
        base = base_of(folder)
        if same_source(base, source) or weights_digest(base) == weights_digest(source):
            return None
    except ValueError as error:
        return str(error)
    return f"its base is {base!r}, with other weights than model.source={source!r}"
