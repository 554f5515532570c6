"""Finds a model: a folder, a GGUF file, or a hub id."""

from __future__ import annotations

import collections
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.data.bounds import check_plain, check_plain_folder, read_json_file
from jaxalign.data.paths import local_path
from jaxalign.data.remote import fetch, is_address

# A name with or without its owner, then optionally `@` and a branch, tag or commit.
_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w./-]+))?"
)


def locate(source: str | os.PathLike[str], patterns: Sequence[str]) -> pathlib.Path:
    """Finds a model's folder or GGUF file; a hub id is downloaded (or taken from the cache).

    Args:
      source: an existing folder, an existing `.gguf` file, one of these in a bucket (`gs://…`), or
        a hub id such as "org/name", which may name a revision: "org/name@COMMIT", a branch or tag.
      patterns: glob patterns of the files to download from a hub repository or a bucket.

    Raises:
      ValueError: no such path, a pipe or device, a file that is not `.gguf`, or a failed download.
    """
    path = local_path(source, "model") if not is_address(source) else _fetch(source, patterns)
    if path.is_dir():
        check_plain_folder(path)
        _check_no_run(path)
        return path
    check_plain(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(
                f"{path} is a file, but not .gguf; give a .gguf file, or the folder that holds "
                f"config.json and the weights"
            )
        return path
    text = os.fspath(source)
    hub_id = _HUB_ID.fullmatch(text)
    if hub_id is None or text.lower().endswith(".gguf"):
        raise ValueError(
            f"{text!r}: no such folder or .gguf file, and not a hub id like 'org/name' or "
            "'org/name@revision'"
        )
    return _download(hub_id["repo"], hub_id["revision"], patterns)


def _fetch(address: str | os.PathLike[str], patterns: Sequence[str]) -> pathlib.Path:
    """A copy of a model in a bucket; of a run's folder, only what `_check_no_run` looks for."""
    marks = ("config.yaml", "model/config.json")
    return fetch(os.fspath(address), "model", (*patterns, "config.json", *marks))


def _check_no_run(folder: pathlib.Path) -> None:
    """Raises ValueError for a run's folder, whose model is in a sub-folder.

    Raises:
      ValueError: it is a run's folder.
    """
    if not (folder / "config.yaml").is_file() or (folder / "config.json").is_file():
        return
    model = folder / "model"
    if (model / "config.json").is_file():
        raise ValueError(f"{folder} is the folder of a run; its model is {model}")
    raise ValueError(
        f"{folder} is the folder of a run that holds no model yet; let it finish, or write one of "
        f"its checkpoints with `jaxalign export {folder} --out DIR` and give that folder"
    )


def without_revision(source: str) -> str:
    """A hub id without its `@revision`; any other text unchanged."""
    hub_id = _HUB_ID.fullmatch(source)
    return source if hub_id is None else hub_id["repo"]


def split_revision(source: str) -> tuple[str, str | None]:
    """A hub id and the revision after its `@`, if there is one.

    Anything else, and any existing path, is returned unchanged.
    """
    hub_id = _HUB_ID.fullmatch(source)
    if hub_id is None or pathlib.Path(source).exists():
        return source, None
    return hub_id["repo"], hub_id["revision"]


def _download(repo: str, revision: str | None, patterns: Sequence[str]) -> pathlib.Path:
    import huggingface_hub

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(patterns)
            )
        )
    except Exception as error:  # the HTTP client, and so the type of its errors, varies by version
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ValueError(
            f"{repo!r}{f' at {revision!r}' if revision else ''}: no such folder, and it could not "
            f"be had from the hub ({reason}); check the name and the network, or give a local "
            f"folder or .gguf file"
        ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
      ValueError: the file is absent, exceeds the limits of `jaxalign.data.bounds`, or is not a JSON
        object.
    """
    try:
        value = read_json_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; wanted a JSON object")
    return value


ADAPTER_CONFIG = "adapter_config.json"
"""The file that a PEFT adapter's folder has instead of `config.json`."""


def is_adapter(folder: pathlib.Path) -> bool:
    """Whether a folder holds only an adapter, not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: pathlib.Path) -> str:
    """The source of an adapter's base, as its configuration has it.

    Raises:
      ValueError: it names none.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG}: base_model_name_or_path={base!r} names no base; give it: "
            "base=…"
        )
    if isinstance(revision, str) and revision and not pathlib.Path(base).exists():
        return f"{base}@{revision}"
    return base


def same_source(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two texts name the same model: one hub id, or paths to one file or folder."""
    paths = [pathlib.Path(source).expanduser() for source in (one, other)]
    if all(path.exists() for path in paths):
        return paths[0].resolve() == paths[1].resolve()
    return os.fspath(one) == os.fspath(other)


SOURCE_DTYPES = "_source_dtypes"
"""Key of `source_config` for the dtypes of the source's tensors: the most common under "*", and by
name those that differ."""


def dtypes_to_remember(dtypes: Mapping[str, Any]) -> dict[str, str]:
    """The value of `SOURCE_DTYPES` for a source.

    Args:
      dtypes: tensor name → dtype.
    """
    counts = collections.Counter(str(dtype) for dtype in dtypes.values())
    if not counts:
        return {}
    common = counts.most_common(1)[0][0]
    others = {name: str(dtype) for name, dtype in dtypes.items() if str(dtype) != common}
    return {"*": common, **others}
