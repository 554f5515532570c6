"""Plain texts to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxalign.data.chat import Encoded
from jaxalign.data.examples import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_texts(tok: PreTrainedTokenizerBase, texts: Sequence[Text]) -> list[Encoded]:
    """[bos] text eos, all trained; bos if the tokenizer has one that is not also its eos.

    Raises:
      ValueError: the tokenizer has no eos token to end a text with.
    """
    if tok.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tok.name_or_path!r} has no eos token, wanted one to end texts with; set "
            "tok.eos_token"
        )
    begin = [] if tok.bos_token_id in (None, tok.eos_token_id) else [tok.bos_token_id]
    found = tok(
        [each.text for each in texts],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    documents = [np.asarray([*begin, *ids, tok.eos_token_id], np.int32) for ids in found]
    return [Encoded(ids, np.ones(len(ids), np.bool_)) for ids in documents]
