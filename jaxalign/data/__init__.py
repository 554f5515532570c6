"""Data: files and hub data sets → messages → tokens and masks → packed or padded batches.

Everything here is numpy on the host; nothing touches a device.
"""

from jaxalign.data.batches import Batches, preference_batches, prompt_batches, sft_batches
from jaxalign.data.chat import (
    Encoded,
    encode_conversations,
    encode_prompt,
    encode_prompts,
    resolve_chat_template,
    stop_token_ids,
)
from jaxalign.data.packing import best_fit
from jaxalign.data.rows import (
    Conversation,
    Preference,
    Prompt,
    to_conversation,
    to_preference,
    to_prompt,
)
from jaxalign.data.sources import Row, read_rows

__all__ = [
    "Batches",
    "Conversation",
    "Encoded",
    "Preference",
    "Prompt",
    "Row",
    "best_fit",
    "encode_conversations",
    "encode_prompt",
    "encode_prompts",
    "preference_batches",
    "prompt_batches",
    "read_rows",
    "resolve_chat_template",
    "sft_batches",
    "stop_token_ids",
    "to_conversation",
    "to_preference",
    "to_prompt",
]
