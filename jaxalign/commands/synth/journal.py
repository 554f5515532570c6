"""Files that survive a kill: replies as they arrive, rows as they are finished.

Every reply is appended to a journal beside the output, under its request's name. A run that starts
again repeats every step from the beginning and takes replies from the journal while it has them.
Its decisions (which seeds to show, which tasks to drop) depend only on settings and replies, so it
makes the same rows. Rows already in the output must equal the rows it makes; they are not written
again.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from jaxalign.commands.synth.writer import REFUSED, Reply, Request, Writer, prompt_hash
from jaxalign.data.bounds import parse_json
from jaxalign.data.paths import local_path

_LOCKS = True
try:
    import fcntl
except ImportError:  # no such locks on Windows
    _LOCKS = False


class Appended:
    """A JSONL file of one writer: complete lines, and a place to append.

    A last line that a kill cut off is removed; `repaired` is then True. Each line is on the disk
    when `append` returns.

    Raises:
      ValueError: another process writes to the file, or a line is no JSON object.
    """

    def __init__(self, path: pathlib.Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.repaired = False
        self._file = open(path, "a+b")  # noqa: SIM115  (closed by close)
        try:
            self._lock()
            self.rows = list(self._read())
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        if not _LOCKS:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{self.path}: another process is writing to it; wait for it, or give another out"
            ) from None

    def _read(self) -> Iterator[dict[str, Any]]:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            if line.endswith(b"\n") and isinstance(row, dict):
                end += len(line)
                yield row
            elif line.endswith(b"\n"):
                raise ValueError(
                    f"{self.path}:{number}: wanted a JSON object as this program writes; remove "
                    "the line, or give another out"
                )
            else:
                self.repaired = True
                self._file.truncate(end)
                os.fsync(self._file.fileno())

    def append(self, row: dict[str, Any]) -> None:
        """Writes a row and waits for the disk."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file and lets others write to it."""
        self._file.close()


class Journal:
    """The replies of a run and the rows made of them.

    Args:
      out: the JSONL file of rows; replies go to `<out>.journal`.

    Attributes:
      rows: how many rows the run has made so far.
      requested: replies that came from the writer, not from the journal.
    """

    def __init__(self, out: str | os.PathLike[str]):
        path = local_path(out, "out")
        journal = path.with_name(path.name + ".journal")
        if path.is_file() and path.stat().st_size and not journal.is_file():
            raise ValueError(
                f"out={str(path)!r}: the file has rows, but there is no {journal.name} beside it, "
                "so this run did not write them; give another out"
            )
        self.rows = 0
        self.requested = 0
        self._replies = Appended(journal)
        try:
            self._out = Appended(path)
            self._known = dict(self._read())
        except BaseException:
            self.close()
            raise
        self._refusals: list[dict[str, Any]] = []

    def _read(self) -> Iterator[tuple[str, tuple[str, Reply]]]:
        for number, row in enumerate(self._replies.rows, start=1):
            try:
                reply = Reply(row["text"], row["finish"], row["time"], row["tokens"])
                yield row["request"], (row["prompt"], reply)
            except KeyError as error:
                raise ValueError(
                    f"{self._replies.path}:{number}: {error} is missing, so this is no journal of "
                    "replies; give another out"
                ) from None

    @property
    def resumed(self) -> tuple[int, int, bool]:
        """Replies and rows that the files held at the start; whether a cut-off line was removed."""
        repaired = self._replies.repaired or self._out.repaired
        return len(self._replies.rows), len(self._out.rows), repaired

    def ask(self, writer: Writer, requests: Sequence[Request]) -> list[Reply]:
        """The replies to all requests, from the journal if it has them.

        Raises:
          ValueError: a request of this name was made before with another prompt.
        """
        prompts = [prompt_hash(writer.name, request) for request in requests]
        replies: dict[int, Reply] = {}
        for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            if request.name in self._known:
                before, replies[i] = self._known[request.name]
                if before != prompt:
                    raise ValueError(
                        f"{self._replies.path}: {request.name!r} was asked with another prompt, "
                        "writer or sampling than now: settings or sources have changed since; give "
                        "another out, or restore them"
                    )
        missing = [i for i in range(len(requests)) if i not in replies]
        for i, reply in writer.write(requests, missing) if missing else ():
            replies[i] = reply
            self.requested += 1
            row = {"request": requests[i].name, "prompt": prompts[i], **reply._asdict()}
            if reply.finish == REFUSED:
                self._refusals.append(row)
            else:
                self._replies.append(row)
        # A refusal counts only once the writer has also answered: if it refuses everything, the
        # fault is in the settings, and the same requests must be sent again once those are fixed.
        if any(reply.finish != REFUSED for reply in replies.values()):
            for row in self._refusals:
                self._replies.append(row)
            self._refusals.clear()
        return [replies[i] for i in range(len(requests))]

    def add(self, row: dict[str, Any]) -> None:
        """The run's next row: written, or compared with what an earlier run wrote.

        Raises:
          ValueError: the output has another row at this place.
        """
        if self.rows >= len(self._out.rows):
            self._out.append(row)
        elif json.loads(json.dumps(row)) != self._out.rows[self.rows]:
            raise ValueError(
                f"{self._out.path}:{self.rows + 1}: the row differs from the one that this run "
                "comes to: settings or the file have changed since; give another out, or restore "
                "them"
            )
        self.rows += 1

    def close(self) -> None:
        """Closes both files."""
        self._replies.close()
        if hasattr(self, "_out"):
            self._out.close()
