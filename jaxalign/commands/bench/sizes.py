"""Llama shapes that are measured, by name."""

from __future__ import annotations

from jaxalign.models.base import DecoderConfig


def llama(
    vocab: int, hidden: int, layers: int, heads: int, inner: int, *,
    kv_heads: int | None = None, head_dim: int | None = None, tied: bool = False,
    qk_norm: str = "none",
) -> DecoderConfig:  # fmt: skip
    """A Llama.

    Args:
      vocab: V.
      hidden: D.
      layers: L.
      heads: query heads.
      inner: width of the MLP.
      kv_heads: key and value heads; None: as many as query heads.
      head_dim: width of a head; None: D / heads.
      tied: whether the head is the transposed embedding.
      qk_norm: see `DecoderConfig`.
    """
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=hidden // heads if head_dim is None else head_dim,
        tie_embeddings=tied,
        qk_norm=qk_norm,
    )


SIZES: dict[str, DecoderConfig] = {
    "XS": llama(256, 64, 2, 4, 128, kv_heads=2),
    "S": llama(8192, 256, 4, 4, 688),
    "M": llama(32000, 512, 8, 8, 1376),
    "Qwen3-0.6B": llama(
        151936, 1024, 28, 16, 3072, kv_heads=8, head_dim=128, tied=True, qk_norm="head"
    ),
    "0.5B": llama(128256, 1024, 24, 16, 4096, kv_heads=8, tied=True),
    "1B": llama(128256, 2048, 16, 32, 8192, kv_heads=8, tied=True),
    "3B": llama(128256, 3072, 28, 24, 8192, kv_heads=8, head_dim=128, tied=True),
    "8B": llama(128256, 4096, 32, 32, 14336, kv_heads=8),
}
"""XS is for trying things out; S and M are for CPUs; 1B and 3B are those of Llama 3.2, 8B that of
Llama 3.1, Qwen3-0.6B that of Qwen 3."""
