"""Which tokens end an answer: eos, the template's end of turn, and ids that publishers list.

`jaxalign.data.stop_token_ids` adds the ids in a source's generation config. Training, sampling,
scoring and exports all use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Beside(NamedTuple):
    """Tokens that generation configs list beside an end token, if the tokenizer has them.

    Attributes:
      end: the end of turn, or eos.
      others: the other tokens that end an answer.
      where: a token that identifies the publisher's tokenizer; None: any tokenizer.
    """

    end: str
    others: tuple[str, ...]
    where: str | None = None


BESIDE = (
    # Llama 3: end of text, and end of a message that waits for a tool's answer.
    Beside("<|eot_id|>", ("<|end_of_text|>", "<|eom_id|>")),
    # gpt-oss: end of a tool call, and end of text. There `<|end|>` ends a message within an answer.
    Beside("<|return|>", ("<|call|>", "<|endoftext|>")),
    # Phi 3 and 3.5, but not Phi 4.
    Beside("<|end|>", ("<|assistant|>",), where="<|placeholder1|>"),
)
# Qwen pads with the end of the texts that the base model was trained on.
_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")


def united_ends(tok: PreTrainedTokenizerBase, ends: Iterable[int]) -> tuple[int, ...]:
    """Ids that end an answer, ascending: `ends`, eos, and the ids that publishers list beside them.

    If `load_tokenizer` read the ids that the tokenizer's source lists, they are included. Ids that
    are not tokens are left out.
    """
    size = len(tok)
    found = {*ends, *getattr(tok, "source_stops", ())}
    if tok.eos_token_id is not None:
        found.add(int(tok.eos_token_id))
    found = {i for i in found if 0 <= i < size}
    ids = {str(token): i for i, token in tok.added_tokens_decoder.items()}
    known = {str(tok.convert_ids_to_tokens(i)) for i in found}
    for row in BESIDE:
        if row.end in known and (row.where is None or row.where in ids):
            found |= {ids[other] for other in row.others if other in ids}
    pad = tok.pad_token
    if known and pad in _ENDS_OF_TEXT and pad not in (tok.unk_token, tok.bos_token):
        found.add(int(tok.pad_token_id))
    return tuple(sorted(found))


def end_tokens(tok: PreTrainedTokenizerBase, end_of_turn: str | None) -> tuple[str, ...]:
    """The same tokens as text, if turns end with `end_of_turn`; added tokens only."""
    end: Any = None if end_of_turn is None else tok.convert_tokens_to_ids(end_of_turn)
    ends = () if end is None else (int(end),)
    added = {*tok.added_tokens_decoder, *tok.all_special_ids}
    return tuple(str(tok.convert_ids_to_tokens(i)) for i in united_ends(tok, ends) if i in added)
