"""A run's folder in a bucket: its address, its local copy, and which checkpoints are complete.

A checkpoint's `checksums.json` is uploaded last, and a checkpoint without it does not count. This
is because objects cannot be renamed or appended to, but each upload is atomic.
"""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from jaxalign.data.paths import local_path
from jaxalign.data.remote import (
    Entry,
    check_address,
    fetch,
    is_address,
    list_files,
    place_of,
    stage,
)
from jaxalign.hf import checksums

CHECKPOINTS = "checkpoints"


def check_folder(folder: str, option: str) -> str:
    """A folder as the user wrote it: a path with `~` expanded, or an address.

    Raises:
      ValueError: an address that cannot be used, see `check_address`; or as `local_path`.
    """
    if is_address(folder):
        return check_address(folder, option)
    return str(local_path(folder, option))


def below(folder: str, *names: str) -> str:
    """A path or address below a folder."""
    if is_address(folder):
        return "/".join((folder, *names))
    return str(pathlib.Path(folder, *names))


def is_inside(source: str, folder: str) -> bool:
    """Whether an address names a folder in a bucket, or something in it."""
    return f"{_usual(source)}/".startswith(f"{_usual(folder)}/")


def _usual(address: str) -> str:
    """An address with the canonical name of its scheme."""
    scheme, _, rest = address.rstrip("/").partition("://")
    return f"{ {'gcs': 'gs', 's3a': 's3'}.get(scheme, scheme) }://{rest}"


def local_folder(folder: str) -> pathlib.Path:
    """A run's local folder: its own, or the copy of a folder in a bucket."""
    if not is_address(folder):
        return pathlib.Path(folder)
    name = hashlib.sha256(folder.encode()).hexdigest()[:12]
    return stage() / "runs" / name / folder.rpartition("/")[2]


def check_processes(folder: str) -> None:
    """Raises ValueError for a folder in a bucket if there are several processes.

    Raises:
      ValueError: there are several.
    """
    if is_address(folder) and jax.process_count() > 1:
        raise ValueError(
            f"run.folder={folder!r}: each of {jax.process_count()} processes writes a part of a "
            "checkpoint, which needs a file system that all of them see; mount the bucket "
            "(gcsfuse, mountpoint-s3) and give that path"
        )


@contextlib.contextmanager
def named_by_address(folder: str) -> Iterator[None]:
    """Replaces the local copy's path in messages by the bucket folder's address."""
    try:
        yield
    except ValueError as error:
        local = str(local_folder(folder))
        if type(error) is not ValueError or local == folder or local not in str(error):
            raise
        raise ValueError(str(error).replace(local, folder)) from error


def fetch_run(folder: str, option: str) -> pathlib.Path:
    """A run's folder for reading: the folder itself, or a local copy without its model.

    Raises:
      ValueError: no such folder, or as `jaxalign.data.remote.fetch`.
    """
    if not is_address(folder):
        return local_path(folder, option)
    whole = sort_files(list_files(place_of(folder, option))).complete

    def wanted(name: str) -> bool:
        step = step_of(name)
        return step in whole if step is not None else not name.startswith("model/")

    return fetch(folder, option, accept=wanted)


def has_remote_checkpoints(folder: str) -> bool:
    """Whether a folder in a bucket holds a complete checkpoint."""
    return bool(sort_files(list_files(place_of(folder, "run.folder"))).complete)


def is_remote_run(folder: str) -> bool:
    """Whether a folder in a bucket belongs to a run, and is not a model."""
    return "config.yaml" in list_files(place_of(folder, "folder"))


class Sorted(NamedTuple):
    """The files of a run in a bucket.

    Attributes:
      plain: those outside of checkpoints.
      complete: step → the files of a completely uploaded checkpoint.
      cut: the files of all other checkpoints.
    """

    plain: dict[str, Entry]
    complete: dict[int, dict[str, Entry]]
    cut: dict[str, Entry]


def sort_files(entries: Mapping[str, Entry]) -> Sorted:
    """Separates the files of complete checkpoints from others; skips hidden files."""
    plain: dict[str, Entry] = {}
    steps: dict[int, dict[str, Entry]] = {}
    for name, entry in entries.items():
        step = step_of(name)
        if step is not None:
            steps.setdefault(step, {})[name] = entry
        elif not any(part.startswith(".") for part in name.split("/")):
            plain[name] = entry
    complete = {step: files for step, files in steps.items() if manifest_of(step) in files}
    cut = {n: e for step, files in steps.items() if step not in complete for n, e in files.items()}
    return Sorted(plain, complete, cut)


def step_of(name: str) -> int | None:
    """The step of the checkpoint that a file belongs to."""
    parts = name.split("/")
    inside = len(parts) > 2 and parts[0] == CHECKPOINTS and parts[1].isdecimal()
    return int(parts[1]) if inside else None


def manifest_of(step: int) -> str:
    """The file of a checkpoint that is uploaded last and makes it complete."""
    return f"{CHECKPOINTS}/{step}/{checksums.NAME}"
