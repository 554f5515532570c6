"""Loads a transformers fast tokenizer from a folder, a hub id or a GGUF file.

The padding token differs from the end-of-sequence token if the tokenizer has any other suitable
token: masking padding must not mask the stop token that a model learns.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

from jaxalign.hf.gguf_header import Metadata
from jaxalign.hf.source import ADAPTER_CONFIG, base_of, is_adapter, locate
from jaxalign.hf.special_tokens import GENERATION_FILE, listed_stops, rows_of, set_padding

_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "*.model",
    "config.json",
    ADAPTER_CONFIG,
    GENERATION_FILE,
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.model")

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
"""Values of `tokenizer.ggml.token_type` in GGUF."""

_SPLITS = {
    # The patterns of the models' tokenizer.json files.
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
PRE = ("gpt-2", "smollm", *_SPLITS)
"""The values of `tokenizer.ggml.pre` that can be read and written."""
IGNORES_MERGES = "llama-bpe"
"""The entry of `PRE` with which a word of the vocabulary is one token, whatever the merges."""


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """Loads a tokenizer, with a padding token that is not the end-of-sequence token.

    `jaxalign.hf.special_tokens.set_padding` chooses that token. The stop ids of the source's
    `generation_config.json` (or GGUF metadata) become the tokenizer's attribute `source_stops`,
    which `jaxalign.data.stop_token_ids` reads.

    Args:
      source: a folder with `tokenizer.json`, a `.gguf` file, or a hub id. For an adapter's folder
        without a tokenizer, the base's is loaded.

    Returns:
      A `transformers.PreTrainedTokenizerFast`.

    Raises:
      ValueError: no tokenizer, no vocabulary, or a kind that cannot be reproduced exactly.
    """
    path = locate(source, _PATTERNS)
    if is_adapter(path) and not _has_vocabulary(path):
        return load_tokenizer(base_of(path))
    if path.is_file():
        tokenizer, stops = from_metadata(Metadata(path))
        rows = None
    else:
        tokenizer, stops, rows = _from_folder(path), listed_stops(path), rows_of(path)
    tokenizer.source_stops = stops
    return set_padding(tokenizer, rows=rows)


def own_tokenizer(adapter: str | os.PathLike[str]) -> Any | None:
    """The tokenizer in an adapter's folder, with its training template; None if there is none.

    Args:
      adapter: its folder, `.gguf` file or hub id.

    Raises:
      ValueError: as `load_tokenizer`.
    """
    path = locate(adapter, _PATTERNS)
    return load_tokenizer(path) if path.is_dir() and _has_vocabulary(path) else None


def _has_vocabulary(folder: pathlib.Path) -> bool:
    return any(any(folder.glob(name)) for name in _VOCABULARIES)


def _from_folder(folder: pathlib.Path) -> Any:
    import transformers

    # tokenizer.json is authoritative; the class named in the config may rebuild it differently.
    exact = (folder / "tokenizer.json").is_file()
    if not _has_vocabulary(folder):
        there = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        what = f"; it holds {', '.join(there[:6])}" if there else "; it is empty"
        raise ValueError(
            f"{folder} holds no tokenizer's vocabulary{what}; wanted tokenizer.json (copy it from "
            "the model that this one was made from, or name that one as the tokenizer)"
        )
    cls = transformers.PreTrainedTokenizerFast if exact else transformers.AutoTokenizer
    try:
        tokenizer: Any = cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(
            f"{folder} holds no tokenizer that transformers can read "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]}); wanted tokenizer.json"
        ) from error
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        raise ValueError(f"{folder}: its tokenizer has no vocabulary; wanted tokenizer.json")
    return tokenizer


# --- GGUF ----------------------------------------------------------------------------------------


def from_metadata(metadata: Any) -> tuple[Any, tuple[int, ...]]:
    """Builds the tokenizer from GGUF metadata with the `tokenizers` library alone.

    Args:
      metadata: a `Metadata`, or an object with its `path`, `get` and `need`.

    Returns:
      The tokenizer, and the metadata's ids that end texts, turns and messages.

    Raises:
      ValueError: a kind that cannot be reproduced exactly.
    """
    import tokenizers
    import transformers

    model = metadata.need("tokenizer.ggml.model")
    tokens = metadata.need("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if model == "gpt2":
        core = _byte_level(metadata, tokens, types)
        bos_by_default = metadata.get("tokenizer.ggml.pre") == IGNORES_MERGES
    elif model == "llama":
        core = _sentencepiece(metadata, tokens, types)
        bos_by_default = True
    else:
        raise ValueError(
            f"{metadata.path}: tokenizer.ggml.model={model!r} is not supported; supported: gpt2, "
            f"llama; take the tokenizer from the model's folder or hub id instead"
        )
    for flag, add in ((_CONTROL, core.add_special_tokens), (_USER, core.add_tokens)):
        special = flag == _CONTROL
        add(
            [
                tokenizers.AddedToken(token, special=special, normalized=False)
                for token, type_ in zip(tokens, types, strict=True)
                if type_ == flag or (special and type_ == _UNKNOWN)
            ]
        )
    names = _special_tokens(metadata, tokens)
    start = metadata.get("tokenizer.ggml.add_bos_token", bos_by_default) and "bos_token" in names
    stop = metadata.get("tokenizer.ggml.add_eos_token", False)
    if start or stop:
        core.post_processor = _post_processor(
            [names["bos_token"]] if start else [], [names["eos_token"]] if stop else [], tokens
        )
    arch = metadata.need("general.architecture")
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    stops = tuple(i for i in ends if isinstance(i, int) and 0 <= i < len(tokens))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get(f"{arch}.context_length", int(1e30)),
        chat_template=metadata.get("tokenizer.chat_template"),
        **names,
    )
    return tokenizer, stops


def _special_tokens(metadata: Any, tokens: list[str]) -> dict[str, str]:
    """transformers' name of each special token that the metadata sets → the token."""
    names: dict[str, str] = {}
    for hf, gguf in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{gguf}_token_id")
        if token is not None:
            if not 0 <= token < len(tokens):
                raise ValueError(
                    f"{metadata.path}: tokenizer.ggml.{gguf}_token_id={token} is outside the "
                    f"vocabulary of {len(tokens)}"
                )
            names[f"{hf}_token"] = tokens[token]
    if "eos_token" not in names:
        raise ValueError(f"{metadata.path}: metadata key tokenizer.ggml.eos_token_id is missing")
    return names


def _post_processor(start: list[str], stop: list[str], tokens: list[str]) -> Any:
    """Adds BOS before and EOS after each sequence, if given."""
    from tokenizers import processors

    single = [*start, "$A", *stop]
    return processors.TemplateProcessing(
        single=single,
        pair=[*single, *start, "$B:1", *stop],
        special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys(start + stop)],
    )


def _byte_level(metadata: Any, tokens: list[str], types: list[int]) -> Any:
    """GPT-2's byte-level BPE, with the pre-tokenizer that `tokenizer.ggml.pre` names."""
    import tokenizers
    from tokenizers import decoders, models

    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE:
        raise ValueError(
            f"{metadata.path}: tokenizer.ggml.pre={pre!r} is not supported; supported: "
            f"{', '.join(PRE)}; take the tokenizer from the model's folder or hub id instead"
        )
    # GGUF has no empty arrays: without merges every ordinary token is a single byte.
    merged = any(len(t) > 1 for t, type_ in zip(tokens, types, strict=True) if type_ == _NORMAL)
    pairs = (metadata.need if merged else metadata.get)("tokenizer.ggml.merges")
    merges = [tuple(pair.split(" ", 1)) for pair in pairs or ()]
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre == IGNORES_MERGES,
        )
    )
    core.normalizer, core.pre_tokenizer = splitter(pre)
    core.decoder = decoders.ByteLevel()
    return core


def splitter(pre: str) -> tuple[Any, Any]:
    """The normalizer (or None) and the pre-tokenizer for one of `PRE`."""
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers

    normalizer: Any = normalizers.NFC() if pre == "qwen2" else None
    if pre in _SPLITS:
        split: Any = pre_tokenizers.Split(tokenizers.Regex(_SPLITS[pre]), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return normalizer, pre_tokenizers.Sequence([split, byte_level])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    return normalizer, pre_tokenizers.Sequence([*digits, byte_level])


def _sentencepiece(metadata: Any, tokens: list[str], types: list[int]) -> Any:
    """SentencePiece BPE as in Llama 2: merges the best-scoring pair; unknown text becomes bytes.

    Exact if all pieces have distinct scores, as SentencePiece's trainer gives them.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores = metadata.need("tokenizer.ggml.scores")
    vocab = {token: i for i, token in enumerate(tokens)}
    pieces = {t for t, type_ in zip(tokens, types, strict=True) if type_ not in (_CONTROL, _BYTE)}
    merges = []
    for token in pieces:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                merges.append((-scores[vocab[token]], vocab[token], -cut, left, right))
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    encode: list[Any] = [normalizers.Replace(" ", "▁")]
    decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        encode.insert(0, normalizers.Prepend("▁"))
        decode.append(decoders.Strip(" ", 1, 0))
    core.normalizer = normalizers.Sequence(encode)
    core.decoder = decoders.Sequence(decode)
    return core
