"""Loads and saves models and tokenizers as Hugging Face folders, GGUF files or Orbax folders."""

from __future__ import annotations

from jaxalign.hf.load import (
    load_language_model,
    load_model,
    load_pretrained,
    load_reward_model,
)
from jaxalign.hf.peft import load_adapter, load_adapters, save_adapter
from jaxalign.hf.save import save_pretrained
from jaxalign.hf.tokenizer import load_tokenizer

__all__ = [
    "load_adapter",
    "load_adapters",
    "load_language_model",
    "load_model",
    "load_pretrained",
    "load_reward_model",
    "load_tokenizer",
    "save_adapter",
    "save_pretrained",
]
