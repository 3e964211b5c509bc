"""Measurements of all devices on this machine's disk: one SQLite file, keyed by what they depend on.

All networks share it, so that a second network of the same family costs almost nothing. A batch of entries is written
when it is measured: a killed profile loses the batch it was at, never the file.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import files
from .errors import TableError
from .records import DeviceState, Fingerprint, LayerShape, Timing

FORMAT = 2
WAIT_S = 30  # for another process that is writing
SCHEMA = """
CREATE TABLE IF NOT EXISTS device (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS session (
    id INTEGER PRIMARY KEY, device INTEGER NOT NULL REFERENCES device(id), began_at TEXT NOT NULL, began TEXT NOT NULL,
    ended TEXT NOT NULL, notes TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS entry (
    device INTEGER NOT NULL REFERENCES device(id), layer TEXT NOT NULL, timing TEXT NOT NULL,
    measured_at TEXT NOT NULL, session INTEGER NOT NULL REFERENCES session(id), PRIMARY KEY (device, layer)
) WITHOUT ROWID;
"""
NOW = "strftime('%Y-%m-%dT%H:%M:%SZ', 'now')"


@dataclass(frozen=True)
class Session:
    """One filling: the state the device was in when it began and when it ended (None: it was killed, or still runs)."""

    id: int
    began_at: str  # UTC, ISO 8601
    began: DeviceState
    ended: DeviceState | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One measured layer."""

    layer: LayerShape
    timing: Timing
    measured_at: str
    session: int


@dataclass(frozen=True)
class Device:
    """A table in the store."""

    id: int
    fingerprint: Fingerprint
    entries: int
    first_at: str
    last_at: str


def default_path() -> Path:
    """$EDGEPRUNE_HOME/latency.sqlite, or the user's data folder."""
    home = os.environ.get("EDGEPRUNE_HOME")
    base = Path(home) if home else Path(os.environ.get("XDG_DATA_HOME", "~/.local/share")).expanduser() / "edgeprune"
    return base / "latency.sqlite"


class Store:
    """Layer timings by device fingerprint. Several processes may read while one writes; writers wait for each other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self._db = sqlite3.connect(path, timeout=WAIT_S)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")  # what was measured survives a power cut too
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, FORMAT):
                raise TableError(f"{path} was written by another version of edgeprune (format {version}); move it away")
            with self._db:
                for statement in SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={FORMAT}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What SQLite raises, in the user's words."""
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            if "full" in text:
                raise TableError(
                    f"the disk is full: {self.path}; make room and profile again, what was measured is kept"
                ) from error
            if "locked" in text or "busy" in text:
                raise TableError(
                    f"another process has been writing to {self.path} for {WAIT_S} s; wait for it or stop it"
                ) from error
            raise TableError(
                f"the latency table {self.path} cannot be used ({text}); move it away and profile again, or name "
                "another with EDGEPRUNE_HOME"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise TableError(f"{self.path} holds an entry that cannot be read ({error}); move it away") from error

    # ---- reading

    def entries(self, fingerprint: Fingerprint) -> dict[LayerShape, Timing]:
        """All timings of a device; raises TableError when the file or an entry is damaged."""
        return {entry.layer: entry.timing for entry in self.records(fingerprint)}

    def records(self, fingerprint: Fingerprint) -> list[Entry]:
        """All entries of a device, in an order that does not depend on when they were measured."""
        query = (
            "SELECT layer, timing, measured_at, session FROM entry JOIN device ON device.id = entry.device "
            "WHERE fingerprint = ? ORDER BY layer"
        )
        with self._explained():
            rows = self._db.execute(query, (key(fingerprint),)).fetchall()
            return [Entry(layer_of(json.loads(a)), timing_of(json.loads(b)), c, d) for a, b, c, d in rows]

    def devices(self) -> list[Device]:
        """The tables in this file."""
        query = (
            "SELECT id, fingerprint, count(layer), coalesce(min(measured_at), ''), coalesce(max(measured_at), '') "
            "FROM device LEFT JOIN entry ON device.id = entry.device GROUP BY id ORDER BY id"
        )
        with self._explained():
            rows = self._db.execute(query).fetchall()
            return [Device(a, fingerprint_of(json.loads(b)), c, d, e) for a, b, c, d, e in rows]

    def sessions(self, fingerprint: Fingerprint) -> list[Session]:
        """When a device's entries were measured, and the state it was in."""
        query = (
            "SELECT session.id, began_at, began, ended, notes FROM session JOIN device ON device.id = session.device "
            "WHERE fingerprint = ? ORDER BY session.id"
        )
        with self._explained():
            rows = self._db.execute(query, (key(fingerprint),)).fetchall()
            return [
                Session(a, b, state_of(json.loads(c)), state_of(json.loads(d)) if d else None, tuple(json.loads(e)))
                for a, b, c, d, e in rows
            ]

    def check(self) -> None:
        """Raises TableError when the file is damaged anywhere."""
        with self._explained():
            found = [row[0] for row in self._db.execute("PRAGMA integrity_check").fetchall()]
        if found != ["ok"]:
            raise TableError(f"{self.path} is damaged ({found[0]}); move it away and profile again")

    # ---- writing

    def begin(self, fingerprint: Fingerprint, state: DeviceState, at: str = "", notes: Sequence[str] = ()) -> int:
        """Start a session; returns its number. `at`: when it began, if not now."""
        with self._explained(), self._db:
            self._db.execute("INSERT OR IGNORE INTO device (fingerprint) VALUES (?)", (key(fingerprint),))
            inserted = self._db.execute(
                f"INSERT INTO session (device, began_at, began, ended, notes) "
                f"SELECT id, coalesce(nullif(?, ''), {NOW}), ?, '', ? FROM device WHERE fingerprint = ?",
                (at, _json(state), _json(notes), key(fingerprint)),
            )
            assert inserted.lastrowid is not None
            return inserted.lastrowid

    def finish(self, session: int, state: DeviceState | None, notes: Sequence[str]) -> None:
        """Record the state at the end of a session, and what is to be said about its entries."""
        ended = _json(state) if state is not None else ""
        with self._explained(), self._db:
            self._db.execute(
                "UPDATE session SET ended = ?, notes = ? WHERE id = ?", (ended, _json(sorted(notes)), session)
            )

    def add(self, fingerprint: Fingerprint, timings: Mapping[LayerShape, Timing], session: int, at: str = "") -> None:
        """Write entries; they are on disk when this returns. A layer measured again replaces its entry."""
        rows = [(_json(layer), _json(timing), at, session, key(fingerprint)) for layer, timing in timings.items()]
        with self._explained(), self._db:
            self._db.executemany(
                f"INSERT OR REPLACE INTO entry (device, layer, timing, measured_at, session) "
                f"SELECT id, ?, ?, coalesce(nullif(?, ''), {NOW}), ? FROM device WHERE fingerprint = ?",
                rows,
            )

    def close(self) -> None:
        self._db.close()


# ---- records as JSON -----------------------------------------------------------------------------------------


def key(fingerprint: Fingerprint) -> str:
    """The same text for the same fingerprint."""
    return _json(fingerprint)


def layer_of(values: Mapping[str, Any]) -> LayerShape:
    return LayerShape(**_tuples(values))


def timing_of(values: Mapping[str, Any]) -> Timing:
    return Timing(**_tuples(values))


def state_of(values: Mapping[str, Any]) -> DeviceState:
    return DeviceState(**{"memory_mb": 0.0, **_tuples(values)})  # 0: not recorded, as in older tables


def fingerprint_of(values: Mapping[str, Any]) -> Fingerprint:
    found = Fingerprint(**_tuples(values))
    return replace(found, details=tuple((name, value) for name, value in values["details"]))


def _json(content: Any) -> str:
    return json.dumps(files.plain(content), sort_keys=True)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
