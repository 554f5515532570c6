"""Tokenizers: from a folder, a hub id or a GGUF file to a transformers fast tokenizer.

Whatever the source, the padding token differs from the end-of-sequence token, so that a trained
stop token is never mistaken for padding.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

from jaxalign.hf.gguf_header import Metadata
from jaxalign.hf.source import locate

_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
    "config.json",
)

_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6
"""`tokenizer.ggml.token_type` of GGUF; 1 is normal, 5 unused."""

_SPLITS = {
    # Patterns of the models' own tokenizer.json files.
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_PRE = ("gpt-2", "smollm", *_SPLITS)


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """Loads a tokenizer, with a padding token that is not the end-of-sequence token.

    A padding token that is set and differs from EOS is kept. Otherwise it becomes the first of
    these that is in the vocabulary, is neither EOS nor BOS and does not occur in the chat template:
    a special token with "pad" in its name, the unknown token, any other special token by id. The
    vocabulary never grows.

    Args:
      source: a folder with `tokenizer.json`, a `.gguf` file, or a hub id.

    Returns:
      A `transformers.PreTrainedTokenizerFast`.

    Raises:
      ValueError: no tokenizer there, one of a kind that cannot be read exactly, or no token that
        could serve as padding.
    """
    path = locate(source, _PATTERNS)
    tokenizer = _from_gguf(path) if path.is_file() else _from_folder(path)
    return _with_pad(tokenizer, path)


def _from_folder(folder: pathlib.Path) -> Any:
    import transformers

    # tokenizer.json is the tokenizer; classes named in the config may rebuild it differently.
    exact = (folder / "tokenizer.json").is_file()
    kind = transformers.PreTrainedTokenizerFast if exact else transformers.AutoTokenizer
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(
            f"{folder} holds no tokenizer that transformers can read "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]}); wanted tokenizer.json"
        ) from error


def _with_pad(tokenizer: Any, where: pathlib.Path) -> Any:
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer
    template = str(tokenizer.chat_template or "")
    taken = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    if tokenizer.unk_token_id is not None:
        special[tokenizer.unk_token_id] = str(tokenizer.unk_token)
    free = [(i, t) for i, t in sorted(special.items()) if i not in taken and t not in template]
    if not free:
        raise ValueError(
            f"{where}: the tokenizer has no padding token that differs from EOS "
            f"{tokenizer.eos_token!r}, and no other special token that could serve; add one "
            f"(pad_token in tokenizer_config.json)"
        )
    rank = lambda item: ("pad" not in item[1].lower(), item[0] != tokenizer.unk_token_id)  # noqa: E731
    tokenizer.pad_token = min(free, key=rank)[1]
    return tokenizer


# --- GGUF ----------------------------------------------------------------------------------------


def _from_gguf(path: pathlib.Path) -> Any:
    """Builds the tokenizer from GGUF metadata with the `tokenizers` library alone."""
    import tokenizers
    import transformers
    from tokenizers import processors

    metadata = Metadata(path)
    kind = metadata.need("tokenizer.ggml.model")
    tokens = metadata.need("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if kind == "gpt2":
        core = _byte_level(metadata, tokens)
        bos_by_default = metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    elif kind == "llama":
        core = _sentencepiece(metadata, tokens, types)
        bos_by_default = True
    else:
        raise ValueError(
            f"{path}: tokenizer.ggml.model={kind!r} is not supported; supported: gpt2, llama; take "
            f"the tokenizer from the model's folder or hub id instead"
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

    names: dict[str, str] = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if token is not None:
            if not 0 <= token < len(tokens):
                raise ValueError(
                    f"{path}: tokenizer.ggml.{theirs}_token_id={token} is outside the vocabulary "
                    f"of {len(tokens)}"
                )
            names[f"{ours}_token"] = tokens[token]
    if "eos_token" not in names:
        raise ValueError(f"{path}: metadata key tokenizer.ggml.eos_token_id is missing")

    start = metadata.get("tokenizer.ggml.add_bos_token", bos_by_default) and "bos_token" in names
    stop = metadata.get("tokenizer.ggml.add_eos_token", False)
    if start or stop:
        ends = ([names["bos_token"]] if start else [], [names["eos_token"]] if stop else [])
        single = [*ends[0], "$A", *ends[1]]
        core.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, *ends[0], "$B:1", *ends[1]],
            special_tokens=[(t, tokens.index(t)) for t in dict.fromkeys(ends[0] + ends[1])],
        )
    arch = metadata.need("general.architecture")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get(f"{arch}.context_length", int(1e30)),
        chat_template=metadata.get("tokenizer.chat_template"),
        **names,
    )


def _byte_level(metadata: Metadata, tokens: list[str]) -> Any:
    """GPT-2's byte-level BPE, with the splitting rule that `tokenizer.ggml.pre` names."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _PRE:
        raise ValueError(
            f"{metadata.path}: tokenizer.ggml.pre={pre!r} is not supported; supported: "
            f"{', '.join(_PRE)}; take the tokenizer from the model's folder or hub id instead"
        )
    merges = [tuple(pair.split(" ", 1)) for pair in metadata.need("tokenizer.ggml.merges")]
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre == "llama-bpe",
        )
    )
    if pre in _SPLITS:
        split: Any = pre_tokenizers.Split(tokenizers.Regex(_SPLITS[pre]), "isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([split, rest])
    else:
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        core.pre_tokenizer = pre_tokenizers.Sequence([*digits, rest])
    if pre == "qwen2":
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece(metadata: Metadata, tokens: list[str], types: list[int]) -> Any:
    """SentencePiece BPE as Llama 2 uses it: join the adjacent pieces of best score, bytes else.

    Exact where pieces have distinct scores, which is how SentencePiece trains them.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores = metadata.need("tokenizer.ggml.scores")
    vocab = {token: i for i, token in enumerate(tokens)}
    plain = {t for t, kind in zip(tokens, types, strict=True) if kind not in (_CONTROL, _BYTE)}
    merges = []
    for token in plain:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in plain and right in plain:
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
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    core.normalizer = normalizers.Sequence(steps)
    core.decoder = decoders.Sequence(undo)
    return core
