"""Uploads an export to the hub, as one commit with a model card."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CARD = "README.md"
_GIVEN = (".gitattributes",)  # files that the hub itself puts into a new repository


def check_repository(name: str, *, overwrite: bool, api: Any) -> None:
    """Raises ValueError for a repository that is not empty, before a long export starts.

    Args:
      name: `owner/name`.
      overwrite: allow a non-empty repository; files of the same names are replaced.
      api: a `huggingface_hub.HfApi`.

    Raises:
      ValueError: no such name, or a repository that is not empty.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"--push={name!r}: wanted OWNER/NAME, a repository of the hub")
    if overwrite or not _ask(lambda: api.repo_exists(name), name):
        return
    there = [f for f in _ask(lambda: api.list_repo_files(name), name) if f not in _GIVEN]
    if there:
        raise ValueError(
            f"--push={name!r}: the repository holds {', '.join(sorted(there)[:4])}"
            f"{' …' if len(there) > 4 else ''}; give another name, or replace files of the same "
            "names with --overwrite"
        )


def files_to_push(
    places: Mapping[str, pathlib.Path], names: Mapping[str, Sequence[str] | None]
) -> dict[str, pathlib.Path]:
    """Path in the repository → file.

    Hugging Face files and GGUF files are at the top, where readers look for them. An Orbax folder
    is in `orbax/`, and an adapter beside one of these in `peft/`.

    Args:
      places: format → its folder.
      names: format → patterns of its files, if its folder may hold other files; None: all files
        belong to it.
    """
    files = {}
    for name, place in places.items():
        patterns = names[name] or ("**/*",)
        found = [path for pattern in patterns for path in sorted(place.glob(pattern))]
        below = name == "orbax" or (name == "peft" and len(places) > 1)
        top = f"{name}/" if below else ""
        for path in found:
            if path.is_file():
                files[top + path.relative_to(place).as_posix()] = path
    return files


def push(name: str, files: Mapping[str, pathlib.Path], card: str, *, public: bool, api: Any) -> str:
    """Uploads files and a card as one commit; returns the address.

    Args:
      name: `owner/name`. A missing repository is created.
      files: path in the repository → file.
      card: `README.md`, unless it is among the files.
      public: whether a new repository is public.
      api: a `huggingface_hub.HfApi`.

    Raises:
      ValueError: the hub refuses, or cannot be reached; the files stay where they are.
    """
    from huggingface_hub import CommitOperationAdd

    _ask(lambda: api.create_repo(name, private=not public, exist_ok=True), name)
    content: dict[str, Any] = {_CARD: card.encode(), **files}
    operations = [CommitOperationAdd(path, value) for path, value in sorted(content.items())]
    message = "Upload a model with jaxalign"
    done = _ask(lambda: api.create_commit(name, operations, commit_message=message), name)
    return str(getattr(done, "repo_url", None) or name)


def _ask(call: Any, name: str) -> Any:
    try:
        return call()
    except Exception as error:  # the HTTP client, and so the type of its errors, varies by version
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ValueError(
            f"--push={name!r}: the hub says no ({reason}); log in with `hf auth login` or set "
            "HF_TOKEN, and check the name and the network"
        ) from error
