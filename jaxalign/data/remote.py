"""Addresses such as gs://bucket/folder: read through fsspec into a local cache.

A file is cached under its address and its version in the bucket: it is fetched once, and again if
it changes there. Files that are read together, such as a model's folder, get a folder of links to
the cached files.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fnmatch
import glob
import hashlib
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

FOLDER = "JAXALIGN_STAGE"
"""Environment variable: the local cache folder for files from buckets."""

EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
"""Scheme → the extra that installs its reader."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_VERSION = (
    *("generation", "ETag", "etag", "md5Hash", "crc32c", "content_md5", "mtime", "LastModified"),
    *("last_modified", "updated", "created", "size"),
)
"""The file systems' names for the metadata that reveals a changed file."""

_RIGHTS = {
    "gs": "log in (gcloud auth application-default login), or give the machine's account the role "
    "roles/storage.objectUser on the bucket",
    "s3": "set AWS_PROFILE or a role that may s3:ListBucket, s3:GetObject, s3:PutObject and "
    "s3:DeleteObject there",
}
_REFUSALS = ("AccessDenied", "Forbidden", "Unauthorized", "Anonymous caller", "InvalidAccessKeyId")
_WITHOUT_LOGIN = ("NoCredentialsError", "DefaultCredentialsError", "RefreshError")
_THREADS = 8
_TRIES = 3


class Place(NamedTuple):
    """A file or folder in a bucket.

    Attributes:
      fs: its fsspec file system.
      path: its path in the file system.
      address: the address as the user wrote it.
      option: the option that holds it, for messages.
    """

    fs: Any
    path: str
    address: str
    option: str

    def of(self, name: str) -> str:
        """The path of a file below the folder."""
        return f"{self.path}/{name}"


class Entry(NamedTuple):
    """A file in a bucket.

    Attributes:
      path: in its file system.
      size: in bytes.
      version: changes with its content.
    """

    path: str
    size: int
    version: str


def is_address(text: str | os.PathLike[str]) -> bool:
    """Whether a text is a bucket address that fsspec knows: `gs://…`, `s3://…`, `memory://…`.

    File systems from separate packages count; of fsspec's own, only `memory` does. So it is False
    for paths, hub ids, `https://…`, `file://…` and `hf://…`.
    """
    scheme = scheme_of(text)
    if scheme is None or scheme == "hf":
        return False
    if scheme == "memory":
        return True
    import fsspec
    from fsspec.registry import known_implementations

    if scheme in fsspec.registry:  # loaded, or registered by a program
        source = fsspec.registry[scheme].__module__
    else:
        source = known_implementations.get(scheme, {"class": "fsspec."})["class"]
    return not source.startswith("fsspec.")


def scheme_of(text: str | os.PathLike[str]) -> str | None:
    """The part before `://`, in lower case, or None."""
    match = _SCHEME.match(os.fspath(text))
    return None if match is None else match[1].lower()


def check_address(address: str, option: str) -> str:
    """An address in its normal form, without a trailing slash; makes no request.

    Raises:
      ValueError: the package that reads it is missing, or it names nothing within a bucket.
    """
    import fsspec

    scheme = str(scheme_of(address))
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        remedy = f"pip install 'jaxalign[{extra}]'" if extra else str(error)
        raise ValueError(
            f"{option}={address!r}: the package that reads {scheme}:// is not installed: {remedy}; "
            "or mount the bucket and give that path"
        ) from error
    rest = address.split("://", 1)[1].strip("/")
    if not rest:
        raise ValueError(f"{option}={address!r}: wanted {scheme}://BUCKET/FOLDER")
    return f"{scheme}://{rest}"


def place_of(address: str, option: str) -> Place:
    """Opens the file system of an address.

    Raises:
      ValueError: as `check_address`, or the login fails.
    """
    import fsspec

    address = check_address(address, option)
    with explained(address, option):
        fs, path = fsspec.core.url_to_fs(address)
    return Place(fs, path.rstrip("/"), address, option)


@contextlib.contextmanager
def explained(address: str, option: str) -> Iterator[None]:
    """Turns an error of the storage into one message with its remedy.

    Raises:
      ValueError: no such bucket, or no permission for the operation.
    """
    try:
        yield
    except Exception as error:  # every file system has its own errors
        if lacks_rights(error):
            known = {"gcs": "gs", "s3a": "s3"}
            scheme = known.get(str(scheme_of(address)), str(scheme_of(address)))
            remedy = _RIGHTS.get(scheme, "ask for the rights to list, read and write there")
            raise ValueError(
                f"{option}={address!r}: no right to use it ({reason(error)}); {remedy}"
            ) from error
        raise


def lacks_rights(error: BaseException) -> bool:
    """Whether the storage refused for lack of permission."""
    if isinstance(error, PermissionError) or type(error).__name__ in _WITHOUT_LOGIN:
        return True
    if getattr(error, "code", None) in (401, 403) or getattr(error, "status", None) in (401, 403):
        return True
    return any(word in str(error) for word in _REFUSALS)


def reason(error: BaseException) -> str:
    """An error in one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def list_files(place: Place) -> dict[str, Entry]:
    """All files of a folder by their names below it; {"": …} for a file; {} if nothing exists.

    Raises:
      ValueError: see `explained`.
    """
    with explained(place.address, place.option):
        place.fs.invalidate_cache()
        try:
            found: dict[str, Any] = dict(place.fs.find(place.path, detail=True))
            if list(found) in ([], [place.path]):  # some list nothing for a file
                found = {place.path: place.fs.info(place.path)}
        except FileNotFoundError:
            return {}
    entries = {}
    for path, info in found.items():
        if info.get("type") == "file" and not path.endswith("/"):
            name = "" if path == place.path else path.removeprefix(place.path + "/")
            entries[name] = Entry(path, int(info["size"]), _version(info))
    return entries


def _version(info: Mapping[str, Any]) -> str:
    return "|".join(f"{key}={info[key]}" for key in _VERSION if info.get(key) is not None)


def fetch(
    address: str,
    option: str,
    patterns: Sequence[str] | None = None,
    *,
    accept: Callable[[str], bool] | None = None,
) -> pathlib.Path:
    """Makes a local copy of a file or folder in a bucket, or finds the existing copy.

    Args:
      address: the address of the file or folder.
      option: the option that holds it, for the messages.
      patterns: glob patterns of the files to fetch, by their names below the folder; None: all.
      accept: name → whether to fetch it, for rules beyond patterns.

    Returns:
      Path of the copy, under the last name of the address. It must not be written to.

    Raises:
      ValueError: it does not exist, may not be read, or keeps changing.
    """
    place = place_of(address, option)
    for _ in range(_TRIES):
        entries = list_files(place)
        if not entries:
            raise ValueError(
                f"{option}={address!r}: no such file or folder in the bucket; correct the address"
            )
        chosen = {
            name: entry
            for name, entry in entries.items()
            if not name or (_matches(name, patterns) and (accept is None or accept(name)))
        }
        with contextlib.suppress(_Changed):
            return _gathered(place, chosen)
    raise ValueError(f"{option}={address!r}: files changed while they were read; try again")


def fetch_matches(pattern: str, option: str) -> pathlib.Path:
    """Fetches the files that a glob such as `s3://bucket/data/*.jsonl` matches.

    Returns:
      The same pattern over the copies.

    Raises:
      ValueError: nothing matches, or as `fetch`.
    """
    parts = pattern.split("/")
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    if first < 3:
        raise ValueError(f"{option}={pattern!r}: a bucket's name cannot be a pattern; name it")
    address, below = "/".join(parts[:first]), "/".join(parts[first:])
    place = place_of(address, option)
    with explained(place.address, option):
        place.fs.invalidate_cache()
        found = {str(path) for path in place.fs.glob(f"{place.path}/{below}")}
    names = {path.removeprefix(place.path + "/") for path in found}
    if not names:
        raise ValueError(f"{pattern}: no file matches; correct the pattern (** goes into folders)")
    return fetch(address, option, accept=names.__contains__) / below


def name_of(file: pathlib.Path) -> str:
    """A file's path; for a copy that `fetch` made, without the local cache folder."""
    with contextlib.suppress(ValueError):
        return "/".join(file.relative_to(stage() / "folders").parts[1:])
    return str(file)


def stage() -> pathlib.Path:
    """The local cache folder for files from buckets."""
    chosen = os.environ.get(FOLDER)
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(chosen or f"{home}/jaxalign/stage").expanduser()


def download(fs: Any, entry: Entry, target: pathlib.Path) -> None:
    """Copies one file from a bucket atomically.

    Raises:
      OSError: the copy's size differs from the size that the bucket reported.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        fs.get_file(entry.path, str(fresh))
        if (size := fresh.stat().st_size) != entry.size:
            raise _Changed(f"{entry.path}: {size:,} of {entry.size:,} bytes arrived")
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


def download_all(place: Place, targets: Mapping[str, tuple[Entry, pathlib.Path]]) -> None:
    """Copies several files at once.

    Raises:
      ValueError: see `explained`.
      OSError: a file changed or was deleted meanwhile.
    """
    with (
        explained(place.address, place.option),
        concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
    ):
        list(pool.map(lambda pair: download(place.fs, *pair), targets.values()))


class _Changed(OSError):
    """A file changed since it was listed."""


def _matches(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether a name matches a pattern; `**/` also matches no folder."""
    if patterns is None:
        return True
    every = [*patterns, *(pattern.replace("**/", "") for pattern in patterns)]
    return any(fnmatch.fnmatch(name, pattern) for pattern in every)


def _gathered(place: Place, entries: Mapping[str, Entry]) -> pathlib.Path:
    """A folder of links to the cached files; fetches missing files."""
    root = stage()
    keys = {name: _key(place.address, name, entry.version) for name, entry in entries.items()}
    absent = {
        name: (entries[name], root / "files" / key)
        for name, key in keys.items()
        if not (root / "files" / key).is_file()
    }
    try:
        download_all(place, absent)
    except FileNotFoundError as error:
        raise _Changed(str(error)) from error
    whole = _key(place.address, "", repr(sorted(keys.items())))[:16]
    last = place.address.rpartition("/")[2]
    folder = root / "folders" / whole
    if not folder.is_dir():
        fresh = folder.with_name(f".{whole}.{secrets.token_hex(4)}.tmp")
        (fresh / last).parent.mkdir(parents=True)
        for name, key in keys.items():
            target = fresh / last / name if name else fresh / last
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(root / "files" / key, target)
        if "" not in keys:
            (fresh / last).mkdir(exist_ok=True)
        try:
            fresh.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(fresh, ignore_errors=True)
    return folder / last


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    """Hard-links a file, or copies it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
