"""A tokenizer as GGUF metadata, verified by reading it back.

GGUF only names a pre-tokenizer, while `tokenizer.json` describes it; and it has scores instead of
the merges of SentencePiece. So the metadata is read back, and both tokenizers must give the same
ids.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

from jaxalign.data.ends import united_ends
from jaxalign.hf.tokenizer import IGNORES_MERGES, PRE, from_metadata, splitter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of `tokenizer.ggml.token_type`, see `gguf.TokenType`."""

WRITTEN = (
    f"byte-level BPE with a pre-tokenizer of {', '.join(PRE)}, and SentencePiece BPE as in Llama 2"
)
"""The tokenizers that can be written."""

_TEXTS = (
    "Hello world! It's 12345.67 tests, isn't it?\n\n  indented\tcode() ",
    "WE'LL SEE: 3x4=12; user@host.example/path?q=1&r=%20 — “quotes” … €9,99\r\n\r\n\tend",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. № 42",
    "Η γρήγορη καφέ αλεπού πηδάει πάνω από τον τεμπέλη σκύλο·",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣٤ كتاب",
    "नमस्ते दुनिया, आप कैसे हैं? १२३ क्षत्रिय",
    "今天天气很好，我们去公园吧。３４ 東京は晴れです。カタカナ",
    "안녕하세요 세계! 한국어 문장입니다 ㅋㅋㅋ",
    "สวัสดีชาวโลก שלום עולם Xin chào thế giới",
    "e\u0301 \u212b \ufb01 ½ ² \u00a0 \u200b 👩‍👩‍👧 👍🏽 🇫🇷 \U0001d54f",
    " ",
    "      ",
    "\n\n\n",
    "a",
    "",
)
_SAMPLES, _LONG = 200, 24  # texts of random tokens, and tokens of each


class _Values(dict):
    """Metadata that is not yet in a file, with the reader's interface."""

    path = "tokenizer"

    def need(self, key: str) -> Any:
        return self[key]


def tokenizer_metadata(tok: Any, rows: int, arch: str, length: int) -> dict[str, Any]:
    """The metadata from which the GGUF reader makes an equal tokenizer.

    Args:
      tok: a fast tokenizer of transformers.
      rows: the rows of the model's embedding; ids without a token get an unused token, as llama.cpp
        requires.
      arch: `general.architecture`.
      length: the longest context, in tokens.

    Returns:
      Key → a string, number, bool or list.

    Raises:
      ValueError: a kind that GGUF's readers cannot reproduce, or a token that has no row.
    """
    spec = _spec(tok)
    tokens, types = _tokens(tok, spec, rows)
    values = _Values(
        {
            "general.architecture": arch,
            f"{arch}.context_length": length,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
        }
    )
    values |= _special_ids(tok) | _added_ends(tok) | _templates(tok)
    texts = [*_TEXTS, *_samples(tok), *_around(tok)]
    expected = tok(texts).input_ids
    wrong = ""
    for form in _forms(tok, spec, tokens):
        candidate = _Values(values | form)
        rebuilt, _ = from_metadata(candidate)
        got = rebuilt(texts).input_ids
        if got == expected:
            del candidate["general.architecture"], candidate[f"{arch}.context_length"]
            return dict(candidate)
        differs = (t for t, a, b in zip(texts, got, expected, strict=True) if a != b)
        wrong = wrong or next(differs)  # from the likeliest form
    raise ValueError(
        f"tokenizer {tok.name_or_path!r} splits text in a way that GGUF has no name for here: "
        f"{wrong!r} would get other ids; what can be written is {WRITTEN}"
    )


def _spec(tok: Any) -> dict[str, Any]:
    """The tokenizer's `tokenizer.json`, if its kind can be written.

    Raises:
      ValueError: another kind.
    """
    core = getattr(tok, "backend_tokenizer", None)
    spec = {} if core is None else json.loads(core.to_str())
    model = spec.get("model", {"type": type(tok).__name__})
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type") != "BPE" or affixes:
        what = f"{model.get('type')} with {affixes!r} at pieces" if affixes else model.get("type")
        raise ValueError(
            f"tokenizer {tok.name_or_path!r} is {what}; GGUF is written for {WRITTEN}. Write --to "
            "hf or orbax"
        )
    return spec


def _tokens(tok: Any, spec: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Every id's token and type, as many as the model has rows."""
    model = spec["model"]
    by_id = {i: token for token, i in model["vocab"].items()}
    types = dict.fromkeys(by_id, NORMAL)
    if model["byte_fallback"]:
        types |= {i: BYTE for i, token in by_id.items() if _is_byte(token)}
    for added in spec["added_tokens"]:
        by_id[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
    beyond = [f"{by_id[i]!r} ({i})" for i in sorted(by_id) if i >= rows]
    if beyond:
        raise ValueError(
            f"tokenizer {tok.name_or_path!r}: {', '.join(beyond[:5])} has no row in the model's "
            f"embedding of {rows}, and GGUF wants one for every token; write --to hf or orbax"
        )
    return (
        [by_id.get(i, f"[PAD{i}]") for i in range(rows)],
        [types.get(i, UNUSED) for i in range(rows)],
    )


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _forms(tok: Any, spec: dict[str, Any], tokens: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The tokenizer's model in each form that could match it, likely forms first."""
    model = spec["model"]
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    if model["byte_fallback"]:
        # Pieces are merged in the order of their scores, which follow the order of the merges.
        rank: dict[str, int] = {}
        for number, (left, right) in enumerate(merges):
            rank.setdefault(left + right, number)
        scores = [float(-rank.get(token, len(merges))) for token in tokens]
        for prefix in (True, False):
            yield {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.pre": "default",
                "tokenizer.ggml.scores": scores,
                "tokenizer.ggml.add_space_prefix": prefix,
            }
        return
    common: dict[str, Any] = {"tokenizer.ggml.model": "gpt2"}
    if merges:
        common["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
    ignores = bool(model.get("ignore_merges")) and bool(merges)
    named = [pre for pre in PRE if (pre == IGNORES_MERGES) == ignores]
    core = tok.backend_tokenizer
    alike = [pre for pre in named if _pieces(*splitter(pre)) == _pieces_of(core)]
    for pre in [*alike, *(pre for pre in named if pre not in alike)]:
        yield common | {"tokenizer.ggml.pre": pre}


def _pieces_of(core: Any) -> list[Any]:
    return _pieces(core.normalizer, core.pre_tokenizer)


def _pieces(normalizer: Any, pre_tokenizer: Any) -> list[Any]:
    """The output of a normalizer and a pre-tokenizer for the texts, before any merge."""
    normal = [t if normalizer is None else normalizer.normalize_str(t) for t in _TEXTS]
    if pre_tokenizer is None:
        return normal
    return [[piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] for text in normal]


def _special_ids(tok: Any) -> dict[str, int]:
    """The ids of bos, eos, unk and pad, and of the other tokens that end an answer.

    Raises:
      ValueError: no eos, or more ends than GGUF has keys for.
    """
    if tok.eos_token_id is None:
        raise ValueError(f"tokenizer {tok.name_or_path!r} has no eos token, which GGUF wants")
    ids = {"bos": tok.bos_token_id, "eos": tok.eos_token_id, "unknown": tok.unk_token_id}
    ids["padding"] = tok.pad_token_id
    others = [i for i in united_ends(tok, ()) if i != tok.eos_token_id]
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    return {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}


def unlisted_ends(tok: Any) -> list[str]:
    """The tokens that end an answer but have no key in GGUF, which has three."""
    others = [i for i in united_ends(tok, ()) if i != tok.eos_token_id]
    return [str(tok.convert_ids_to_tokens(i)) for i in others[2:]]


def _added_ends(tok: Any) -> dict[str, bool]:
    """Whether the tokenizer puts bos before a text and eos after it.

    Raises:
      ValueError: it adds something else.
    """
    bare = tok("a", add_special_tokens=False).input_ids
    full = tok("a").input_ids
    for start in (False, True):
        for stop in (False, True):
            before = [tok.bos_token_id] if start else []
            if full == [*before, *bare, *([tok.eos_token_id] if stop else [])]:
                return {
                    "tokenizer.ggml.add_bos_token": start,
                    "tokenizer.ggml.add_eos_token": stop,
                }
    raise ValueError(
        f"tokenizer {tok.name_or_path!r} makes {full} of a text of {bare}; GGUF can add bos "
        f"{tok.bos_token_id} before it and eos {tok.eos_token_id} after it only"
    )


def _templates(tok: Any) -> dict[str, str]:
    """The (default) chat template, and any other templates under their names."""
    template = tok.chat_template
    if isinstance(template, dict):
        named = {f"tokenizer.chat_template.{n}": t for n, t in template.items() if n != "default"}
        return named | (
            {"tokenizer.chat_template": template["default"]} if "default" in template else {}
        )
    return {"tokenizer.chat_template": template} if template else {}


def _samples(tok: Any) -> list[str]:
    """Texts of random tokens, so that the whole vocabulary is tested, in any script."""
    drawn = random.Random(0)
    size = len(tok)
    return [tok.decode([drawn.randrange(size) for _ in range(_LONG)]) for _ in range(_SAMPLES)]


def _around(tok: Any) -> list[str]:
    """Each added token within text, next to spaces and next to letters."""
    added = [str(token) for token in tok.added_tokens_decoder.values()]
    return [f"a {token} b\n{token}\nc{token}d  {token}  " for token in added]
