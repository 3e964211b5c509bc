"""Measurements of all devices on this machine's disk: one SQLite file, keyed by what they depend on.

All networks share it, so that a second network of the same family costs almost nothing. One entry is one row, written
when it is measured: a killed profile loses the entry it was at.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import files
from .errors import TableError
from .records import Fingerprint, LayerShape, Timing

FORMAT = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS device (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS entry (
    device INTEGER NOT NULL REFERENCES device(id), layer TEXT NOT NULL, timing TEXT NOT NULL,
    measured_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')),
    PRIMARY KEY (device, layer)
) WITHOUT ROWID;
"""


def default_path() -> Path:
    """$EDGEPRUNE_HOME/latency.sqlite, or the user's data folder."""
    home = os.environ.get("EDGEPRUNE_HOME")
    base = Path(home) if home else Path(os.environ.get("XDG_DATA_HOME", "~/.local/share")).expanduser() / "edgeprune"
    return base / "latency.sqlite"


class Store:
    """Layer timings by device fingerprint. Several processes may read; writers wait for each other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, timeout=30)
            self._db.execute("PRAGMA journal_mode=WAL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, FORMAT):
                raise TableError(f"{path} was written by another version of edgeprune (format {version}); move it away")
            self._db.executescript(SCHEMA)
            self._db.execute(f"PRAGMA user_version={FORMAT}")
            self._db.commit()
        except sqlite3.Error as error:
            raise self._damaged(error) from error

    def _damaged(self, error: sqlite3.Error) -> TableError:
        return TableError(
            f"the latency table {self.path} cannot be used ({error}); move it away and profile again, or name another "
            "with EDGEPRUNE_HOME"
        )

    def entries(self, fingerprint: Fingerprint) -> dict[LayerShape, Timing]:
        """All timings of a device; raises TableError when the file or an entry is damaged."""
        try:
            rows = self._db.execute(
                "SELECT layer, timing FROM entry JOIN device ON device.id = entry.device WHERE fingerprint = ?",
                (_key(fingerprint),),
            ).fetchall()
            return {_layer(layer): _timing(timing) for layer, timing in rows}
        except sqlite3.Error as error:
            raise self._damaged(error) from error
        except (ValueError, TypeError, KeyError) as error:
            raise TableError(f"{self.path} holds an entry that cannot be read ({error}); move it away") from error

    def add(self, fingerprint: Fingerprint, timings: Mapping[LayerShape, Timing]) -> None:
        """Write entries; they are on disk when this returns. A layer measured again replaces its entry."""
        try:
            with self._db:
                key = _key(fingerprint)
                self._db.execute("INSERT OR IGNORE INTO device (fingerprint) VALUES (?)", (key,))
                device = self._db.execute("SELECT id FROM device WHERE fingerprint = ?", (key,)).fetchone()[0]
                self._db.executemany(
                    "INSERT OR REPLACE INTO entry (device, layer, timing) VALUES (?, ?, ?)", _rows(device, timings)
                )
        except sqlite3.Error as error:
            full = "disk is full" in str(error) or "disk full" in str(error)
            raise (TableError(f"the disk is full: {self.path}; make room and profile again, what was measured is kept")
                   if full else self._damaged(error)) from error  # fmt: skip

    def close(self) -> None:
        self._db.close()


def _rows(device: int, timings: Mapping[LayerShape, Timing]) -> Iterable[tuple[int, str, str]]:
    for shape, timing in timings.items():
        yield device, json.dumps(files.plain(shape), sort_keys=True), json.dumps(files.plain(timing), sort_keys=True)


def _key(fingerprint: Fingerprint) -> str:
    return json.dumps(files.plain(fingerprint), sort_keys=True)


def _layer(text: str) -> LayerShape:
    return LayerShape(**_tuples(json.loads(text)))


def _timing(text: str) -> Timing:
    return Timing(**_tuples(json.loads(text)))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
