"""Data: files and hub data sets → messages → tokens and masks → packed or padded batches.

Everything here is numpy on the host; nothing touches a device. Modules are imported at first use:
code that only packs rows does not load grain.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxalign.data.answers import graded_batches, ranked_batches, step_batches, unpaired_batches
    from jaxalign.data.batches import preference_batches, prompt_batches, sft_batches
    from jaxalign.data.chat import (
        Encoded,
        encode_conversations,
        encode_prompt,
        encode_prompts,
        encode_texts,
        encode_training,
        resolve_chat_template,
        stop_token_ids,
    )
    from jaxalign.data.examples import (
        Conversation,
        Graded,
        Preference,
        Prompt,
        Ranked,
        RowError,
        Steps,
        Text,
        Unpaired,
    )
    from jaxalign.data.faults import Faults, read_examples
    from jaxalign.data.loader import Batches, count_samples, filled
    from jaxalign.data.mixture import Source
    from jaxalign.data.options import Options
    from jaxalign.data.pack_ids import PackCounts, pack_pairs, pack_tokens
    from jaxalign.data.packing import best_fit, best_fit_split, wrapped
    from jaxalign.data.rows import (
        to_conversation,
        to_graded,
        to_preference,
        to_prompt,
        to_ranked,
        to_steps,
        to_text,
        to_unpaired,
    )
    from jaxalign.data.sources import Row, iter_rows, read_rows
    from jaxalign.data.steps import EncodedSteps, encode_steps

_ROOMS = {
    "answers": ("graded_batches", "ranked_batches", "step_batches", "unpaired_batches"),
    "batches": ("preference_batches", "prompt_batches", "sft_batches"),
    "chat": (
        "Encoded",
        "encode_conversations",
        "encode_prompt",
        "encode_prompts",
        "encode_texts",
        "encode_training",
        "resolve_chat_template",
        "stop_token_ids",
    ),
    "examples": (
        "Conversation",
        "Graded",
        "Preference",
        "Prompt",
        "Ranked",
        "RowError",
        "Steps",
        "Text",
        "Unpaired",
    ),
    "faults": ("Faults", "read_examples"),
    "loader": ("Batches", "count_samples", "filled"),
    "mixture": ("Source",),
    "options": ("Options",),
    "pack_ids": ("PackCounts", "pack_pairs", "pack_tokens"),
    "packing": ("best_fit", "best_fit_split", "wrapped"),
    "rows": (
        "to_conversation",
        "to_graded",
        "to_preference",
        "to_prompt",
        "to_ranked",
        "to_steps",
        "to_text",
        "to_unpaired",
    ),
    "sources": ("Row", "iter_rows", "read_rows"),
    "steps": ("EncodedSteps", "encode_steps"),
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "Batches",
    "Conversation",
    "Encoded",
    "EncodedSteps",
    "Faults",
    "Graded",
    "Options",
    "PackCounts",
    "Preference",
    "Prompt",
    "Ranked",
    "Row",
    "RowError",
    "Source",
    "Steps",
    "Text",
    "Unpaired",
    "best_fit",
    "best_fit_split",
    "count_samples",
    "encode_conversations",
    "encode_prompt",
    "encode_prompts",
    "encode_steps",
    "encode_texts",
    "encode_training",
    "filled",
    "graded_batches",
    "iter_rows",
    "pack_pairs",
    "pack_tokens",
    "preference_batches",
    "prompt_batches",
    "ranked_batches",
    "read_examples",
    "read_rows",
    "resolve_chat_template",
    "sft_batches",
    "step_batches",
    "stop_token_ids",
    "to_conversation",
    "to_graded",
    "to_preference",
    "to_prompt",
    "to_ranked",
    "to_steps",
    "to_text",
    "to_unpaired",
    "unpaired_batches",
    "wrapped",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxalign.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'jaxalign.data' has no attribute {name!r}")
