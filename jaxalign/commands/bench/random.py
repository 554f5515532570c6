"""Models with random weights, in place of those that a run loads."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from jaxalign.commands.bench.sizes import SIZES
from jaxalign.models.decoder import Decoder
from jaxalign.models.quantized import map_floats
from jaxalign.models.scorer import Scorer, with_scalar_head
from jaxalign.parallel.sharding import param_shardings
from jaxalign.run.config.base import ModelConfig
from jaxalign.run.tasks.loader import ArrayLoader
from jaxalign.types import Params


class RandomLoader(ArrayLoader):
    """A loader of random arrays; a source is a key of `SIZES`."""

    def load(
        self, source: str, config: ModelConfig, mesh: Mesh, *, remat: str
    ) -> tuple[Decoder | Scorer, Params]:
        """A language model."""
        return random_decoder(config, mesh, remat, source)

    def load_scorer(
        self, source: str, config: ModelConfig, mesh: Mesh, attributes: tuple[str, ...] = ()
    ) -> tuple[Decoder | Scorer, Params]:
        """A reward model."""
        model, params = random_decoder(config, mesh, config.remat, source)
        return with_scalar_head(model, params, jax.random.key(1), attributes)


def random_decoder(
    config: ModelConfig, mesh: Mesh, remat: str, size: str | None = None
) -> tuple[Decoder, Params]:
    """A language model with random weights on the mesh.

    Args:
      config: `source` is a key of `SIZES`.
      mesh: where the weights go.
      remat: what the backward pass keeps.
      size: another key; None: `source`.
    """
    model = Decoder(
        SIZES[config.source if size is None else size],
        compute_dtype=config.compute_dtype or "float32",
        remat=remat,
        attention=config.attention,
        quantize=config.quantize,
    )

    def init(key: jax.Array) -> Params:
        return map_floats(lambda x: x.astype(config.dtype), model.init(key))

    layout = param_shardings(model.axes, mesh, model.shapes)
    return model, jax.jit(init, out_shardings=layout)(jax.random.key(0))
