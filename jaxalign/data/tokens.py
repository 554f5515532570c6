"""From texts to token ids: whole, split at borders, and as plain text between bos and eos."""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

# While a text is rendered, one private-use character replaces each special token in message text.
# The token is then tokenised as ordinary characters.
_FIRST, _LAST = 0xF0000, 0xF0FFF
_LITERAL = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
# The tokens around reasoning and calls belong to the assistant's text.
_SPOKEN = re.compile(r"think|tool|call|reason|response|function|python", re.IGNORECASE)

_WITHOUT_SPECIAL: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def tokenize(tok: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> Any:
    """Tokenises rendered texts without adding special tokens: the text has them already."""
    if not tok.is_fast:
        raise ValueError(
            f"tokenizer {tok.name_or_path!r} has no fast version, wanted one (tokenizer.json): "
            "masks need to know where in the text a token lies"
        )
    return tok(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **options,
    )


class SpecialTokens:
    """The special tokens of a tokenizer, which may not occur in messages' texts.

    Args:
      tok: a fast transformers tokenizer.
    """

    def __init__(self, tok: PreTrainedTokenizerBase):
        added = tok.added_tokens_decoder.values()
        names = {str(token) for token in added if token.special} | {*tok.all_special_tokens}
        self.names = sorted((n for n in names if n and not _SPOKEN.search(n)), key=len)[::-1]
        self._found = re.compile("|".join(map(re.escape, self.names))) if self.names else None

    def find(self, text: str) -> list[str]:
        """The special tokens in a text, in order."""
        return [] if self._found is None else self._found.findall(text)

    def hide(self, text: str) -> str:
        """Replaces special tokens in a text with private-use characters."""
        if self._found is None:
            return text
        return self._found.sub(lambda m: chr(_FIRST + self.names.index(m[0])), text)


def tokens_of(
    tok: PreTrainedTokenizerBase,
    text: str,
    spans: Sequence[Span],
    special: SpecialTokens | None,
    encoding: Any = None,
) -> tuple[list[int], np.ndarray]:
    """Token ids of a text, and which of them hold a character of a span.

    No token straddles the start of a span: generation continues from the header's own tokens, so
    training splits there too. (The exception is tokenizers that put a space before every text, such
    as SentencePiece's: they would put it in the middle of a word.)

    Args:
      tok: a fast transformers tokenizer.
      text: the rendered text; hidden characters of `special` are read as the tokens' characters.
      spans: the trained characters.
      special: the hidden tokens; None: no tokens are hidden.
      encoding: the tokenizer's encoding of the whole text; None: it is computed here.
    """
    hidden = [m.start() for m in _LITERAL.finditer(text)] if special is not None else []
    if hidden:
        cuts = sorted({*hidden, *(at + 1 for at in hidden)})
        ids, begins, ends = _apart(tok, text, cuts, special)
        straddled = False
    else:
        encoding = tokenize(tok, [text]).encodings[0] if encoding is None else encoding
        ids = encoding.ids
        marks = None if _blanks(text, spans) else _whole_tokens(encoding, spans, len(text))
        if marks is not None:
            return ids, marks
        begins, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
        straddled = any(((begins < first) & (first < ends)).any() for first, _ in spans)
        cuts = []
    straddled = straddled or _blanks(text, spans)
    if (straddled or hidden) and not blank_first(tok):
        cuts = sorted({*cuts, *(first for first, _ in spans)})
        ids, begins, ends = _apart(tok, text, cuts, special)
    trained = np.zeros(len(ids), np.bool_)
    for first, last in spans:
        trained |= (begins < last) & (ends > first)
    return ids, trained


def places_of(
    tok: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], special: SpecialTokens | None
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Token ids of a text, and where each begins and ends; borders as in `tokens_of`."""
    cuts = [m.start() + end for m in _LITERAL.finditer(text) for end in (0, 1)] if special else []
    if not cuts:
        encoding = tokenize(tok, [text]).encodings[0]
        begins, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
        straddled = any(((begins < first) & (first < ends)).any() for first, _ in spans)
        if not straddled and not _blanks(text, spans):
            return encoding.ids, begins, ends
    return _apart(tok, text, sorted({*cuts, *(first for first, _ in spans)}), special)


def _blanks(text: str, spans: Sequence[Span]) -> bool:
    """Whether a header ends in several spaces before a word.

    Many tokenizers join the last of these spaces to the word, but not at the end of a prompt.
    """
    return any(text[first - 2 : first].isspace() and first > 1 for first, _ in spans)


def _whole_tokens(encoding: Any, spans: Sequence[Span], length: int) -> np.ndarray | None:
    """Which tokens are in spans, if a token begins at every span's border; else None."""
    count = len(encoding.ids)
    trained = np.zeros(count, np.bool_)
    for first, last in spans:
        begin = encoding.char_to_token(first)
        end = count if last == length else encoding.char_to_token(last)
        if begin is None or end is None or encoding.token_to_chars(begin)[0] != first:
            return None
        if end < count and encoding.token_to_chars(end)[0] != last:
            return None
        trained[begin:end] = True
    return trained


def _apart(
    tok: PreTrainedTokenizerBase, text: str, cuts: Iterable[int], special: SpecialTokens | None
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Tokens (ids, begins, ends) of a text, with a border at each cut."""
    borders = sorted({0, *cuts, len(text)})
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for first, last in itertools.pairwise(borders):
        piece = text[first:last]
        if special is not None and _LITERAL.fullmatch(piece):
            written = special.names[ord(piece) - _FIRST]
            literal = _without_special(tok).encode(written, add_special_tokens=False).ids
            ids += literal
            offsets += [(first, last)] * len(literal)
            continue
        tokens = tokenize(tok, [piece], return_offsets_mapping=True)
        ids += tokens["input_ids"][0]
        offsets += [(begin + first, end + first) for begin, end in tokens["offset_mapping"][0]]
    begins, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    return ids, begins, ends


def _without_special(tok: Any) -> Any:
    """A copy of the tokenizer that reads special tokens as ordinary characters."""
    if tok not in _WITHOUT_SPECIAL:
        import tokenizers

        copy = tokenizers.Tokenizer.from_str(tok.backend_tokenizer.to_str())
        copy.encode_special_tokens = True
        _WITHOUT_SPECIAL[tok] = copy
    return _WITHOUT_SPECIAL[tok]


def blank_first(tok: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts a space before every text, as SentencePiece's do."""
    first = tok.convert_ids_to_tokens(tokenize(tok, ["a"])["input_ids"][0])
    return bool(first) and str(first[0]).startswith("▁")


# Plain text


def end_id(tok: PreTrainedTokenizerBase) -> int:
    """The tokenizer's eos token, or an error."""
    if tok.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tok.name_or_path!r} has no eos token, wanted one to end texts with "
            "(chat_template='none', plain text); set tok.eos_token"
        )
    return int(tok.eos_token_id)


def begin_id(tok: PreTrainedTokenizerBase) -> int | None:
    """The bos token, if the tokenizer itself puts it before a text."""
    bos = tok.bos_token_id
    if bos is None or bos == tok.eos_token_id:
        return None
    ids = tok("a", verbose=False)["input_ids"]
    return int(bos) if list(ids)[:1] == [bos] else None


def with_begin(tok: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Puts the bos token before token ids, unless they begin with it."""
    bos = begin_id(tok)
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def plain_ids(tok: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Plain texts, after a bos token if the tokenizer adds one and the text has none."""
    bos = begin_id(tok)
    return [
        ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        for ids in tokenize(tok, texts)["input_ids"]
    ]


def with_end(tok: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[int]:
    """Puts the eos token after token ids, unless the text ends with it (ignoring whitespace)."""
    end = end_id(tok)
    ends = text.rstrip().endswith(str(tok.eos_token))
    return [*ids] if ends else [*ids, end]
