"""Special tokens of a tokenizer: padding, stop tokens of its source, and tokens without rows."""

from __future__ import annotations

import pathlib
import re
from typing import Any

from jaxalign.data.bounds import read_json_file

GENERATION_FILE = "generation_config.json"

# Names of tokens that common templates write around turns, or that end a text. Such a token may be
# trained, so it cannot be padding.
_MARKUP = re.compile(
    r"im_start|im_end|eot|eom|end|user|assistant|system|human|bot|start|begin|header|turn|call"
    r"|message|channel|think|tool|inst|return|sep\b|^</?s>$|eos|bos",
    re.IGNORECASE,
)
_MOST_UNKNOWN = 0.01  # a fraction of the model's rows


def set_padding(tokenizer: Any, template: str = "", rows: int | None = None) -> Any:
    """Sets a padding token that is neither the tokenizer's eos nor written by its template.

    An existing padding token that is neither is kept. Otherwise the first of these is used: a
    special token with "pad" in its name, the unknown token, other special tokens by id that look
    unused. If there is none, as with GPT-2's tokenizer, nothing changes: masks separate padding
    from text, so any id can pad. The vocabulary never grows.

    Args:
      tokenizer: a transformers tokenizer; it is changed in place.
      template: the text of the chat template in use.
      rows: the rows of the model's embedding; tokens beyond them are not used. None: unknown.
    """
    own = tokenizer.pad_token_id
    known = rows if rows is not None else len(tokenizer)
    written = template + str(tokenizer.chat_template or "")
    free_of_roles = own not in (None, tokenizer.eos_token_id) and own < known
    if free_of_roles and str(tokenizer.pad_token) not in template:
        return tokenizer
    reserved = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    unknown = tokenizer.unk_token_id
    if unknown is not None:
        special[unknown] = str(tokenizer.unk_token)
    free = [
        (i, token)
        for i, token in sorted(special.items())
        if i not in reserved and i < known and token not in written
        if "pad" in token.lower() or i == unknown or not _MARKUP.search(token)
    ]
    if free:
        tokenizer.pad_token = min(
            free, key=lambda item: ("pad" not in item[1].lower(), item[0] != unknown)
        )[1]
    elif own is not None and own >= known:
        tokenizer.pad_token = None
    return tokenizer


def listed_stops(folder: pathlib.Path) -> tuple[int, ...]:
    """The stop ids in a folder's `generation_config.json`, or else in its `config.json`."""
    for name in (GENERATION_FILE, "config.json"):
        try:
            value = read_json_file(folder / name).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if value is not None:
            return tuple(i for i in as_list(value) if isinstance(i, int))
    return ()


def as_list(value: Any) -> list[Any]:
    """A value of `eos_token_id` (one id, several, or none) as a list."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def rows_of(folder: pathlib.Path) -> int | None:
    """The rows of the embedding of a folder's model, if its config has them."""
    try:
        value = read_json_file(folder / "config.json")["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, int) and value > 0 else None


def check_rows_for(tokenizer: Any, rows: int, model: str) -> None:
    """Raises ValueError if a tokenizer does not fit a model with this many rows.

    A few more tokens than rows are accepted, as in Gemma 3: ordinary text never contains their ids,
    and data that does raises an error.

    Args:
      tokenizer: a transformers tokenizer.
      rows: the rows of the model's embedding.
      model: the model's name in the message.

    Raises:
      ValueError: the tokenizer exceeds the rows by more than 1 %, or bos or eos has no row.
    """
    size = len(tokenizer)
    if size <= rows:
        return
    roles = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    lost = [f"its {role} token {i}" for role, i in roles.items() if i is not None and i >= rows]
    if lost or size - rows > max(16, _MOST_UNKNOWN * rows):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has {size} tokens, {model} only {rows}"
            f"{f' (not {lost[0]})' if lost else ''}; they do not belong together"
        )
