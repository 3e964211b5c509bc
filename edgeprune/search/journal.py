"""An append-only file of what was judged: one JSON line each, safe on the disk before the search goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from .. import files
from ..errors import RunError
from ..records import Evaluation

FORMAT = "edgeprune.search/1"
Key = tuple[int, ...]  # widths, in the groups' order


class Journal:
    """The file of one search; what a killed search has judged is read back."""

    def __init__(self, path: Path, groups: tuple[str, ...]) -> None:
        """Open or begin it.

        Args:
            path: of the file.
            groups: whose widths a line holds, in order.
        Raises:
            RunError: the file is of other groups or damaged, or cannot be written.
        """
        self.path = path
        head = json.dumps({"format": FORMAT, "groups": groups})
        self.known: dict[Key, Evaluation] = {}
        if path.exists():
            self._drop_half_line()
        if path.exists() and path.stat().st_size:
            found, *lines = path.read_text(encoding="utf-8").splitlines()
            if found != head:
                raise RunError(f"{path} belongs to another search; start a new run, or delete the file")
            self.known.update(self._read(number, line) for number, line in enumerate(lines, 2))
            self._stream = path.open("a", encoding="utf-8")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("w", encoding="utf-8")
        self._append(head)

    def add(self, key: Key, found: Evaluation) -> None:
        """Raises RunError when the disk is full."""
        self._append(json.dumps({"widths": key, "loss": found.loss, "accuracy": found.accuracy}))
        self.known[key] = found

    def close(self) -> None:
        self._stream.close()

    def _append(self, line: str) -> None:
        with files.not_full(self.path):
            self._stream.write(line + "\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def _read(self, number: int, line: str) -> tuple[Key, Evaluation]:
        try:
            content = json.loads(line)
            return tuple(map(int, content["widths"])), Evaluation(float(content["loss"]), float(content["accuracy"]))
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.path}, line {number} is damaged ({error}); delete the line and that network is judged again"
            ) from error

    def _drop_half_line(self) -> None:
        """A search that was killed while it wrote leaves a last line without an end."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)


def read(path: Path) -> Iterator[tuple[Key, Evaluation]]:
    """What a journal holds, in the order in which it was judged."""
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        content = json.loads(line)
        yield tuple(content["widths"]), Evaluation(content["loss"], content["accuracy"])
