"""What is installed in a folder, and how it came there: manifests, and the history that a rollback walks.

The history works like a browser's. An install puts its version at the end of the line; a rollback takes the
last one off and goes to the one before. What was left stays on disk, but only an install brings it back:

    install A, B, C    line A B C        rollback    line A B        rollback    line A
    install D          line A D          rollback    line A          rollback    DeployError: nothing is left

Installing what is already current leaves the line as it is.

`current` is the only truth. history.json is written just before the switch and holds the state before it and
the state after it: the one whose line ends in `current` counts. So a kill leaves the one or the other, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

from .storage import sha256, sync

MANIFEST_FORMAT = "edgeprune.manifest/1"
HISTORY_FORMAT = "edgeprune.history/1"
MANIFEST, HISTORY = "manifest.json", "history.json"
LINE_LIMIT = 100  # rollbacks that are remembered: two models installed in turn would grow the line for ever
OURS = re.compile(r"(\d+)-[0-9a-f]{12}")  # the names in versions/ that may be deleted again


class DeployError(Exception):
    """An installation that failed; what was installed before still stands."""


@dataclass(frozen=True)
class Version:
    """One installed model. `manifest` is empty when manifest.json is damaged."""

    name: str
    sha256: str  # of the manifest, which holds those of the files
    installed_at: str  # UTC, ISO 8601
    size_bytes: int
    current: bool
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    name: str
    sha256: str
    installed_at: str
    size_bytes: int


@dataclass(frozen=True)
class State:
    installed: tuple[Entry, ...]  # oldest first
    line: tuple[str, ...]  # the last is current, a rollback goes to the one before it


def version_of(folder: Path, entry: Entry, current: str) -> Version:
    manifest: dict[str, Any] = {}
    with suppress(OSError, DeployError):
        manifest = read_manifest(folder / "versions" / entry.name)
    is_current = entry.name == current
    return Version(entry.name, entry.sha256, entry.installed_at, entry.size_bytes, is_current, manifest)


def digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def made(name: str, content: Mapping[str, Any], installed_at: datetime) -> Entry:
    return Entry(name, digest(content), installed_at.isoformat(timespec="seconds"), size_bytes(content))


def size_bytes(content: Mapping[str, Any]) -> int:
    return sum(int(recorded["size_bytes"]) for recorded in content["files"].values())


def read_manifest(version: Path) -> dict[str, Any]:
    content = read_json(version / MANIFEST, MANIFEST_FORMAT)
    if not version.name.endswith("-" + digest(content)[:12]):
        raise DeployError(f"{version / MANIFEST} was changed after the install")
    return content


def damage(version: Path) -> str:
    """Why this version is no longer what was installed; "" when it is."""
    try:
        recorded = read_manifest(version)["files"]
        changed = [name for name in recorded if sha256(str(version / name)) != recorded[name]["sha256"]]
    except (OSError, DeployError) as error:
        return str(error)
    return f"{', '.join(changed)} changed after the install" if changed else ""


def intact(folder: Path, state: State, content_sha256: str) -> str:
    """The name of the undamaged version with this content, or ""."""
    names = (entry.name for entry in state.installed if entry.sha256 == content_sha256)
    return next((name for name in names if not damage(folder / "versions" / name)), "")


# ---- the history -------------------------------------------------------------------------------------------


def current_of(folder: Path) -> str:
    """The name of the current version, or ""."""
    link = folder / "current"
    if not link.is_symlink():
        if link.exists():
            raise DeployError(f"{link} is not a link that edgeprune made; rename or remove it, then try again")
        return ""
    target = Path(os.readlink(link))
    if target.parent != Path("versions"):
        raise DeployError(f"{link} leads to {target}, not into versions/; rename or remove it, then try again")
    return target.name


def load(folder: Path, current: str) -> State:
    """The state that `current` belongs to, without versions that were deleted by hand."""
    path = folder / HISTORY
    if path.exists():
        content = read_json(path, HISTORY_FORMAT)
        try:
            state = _settled(_parsed(content["before"]), _parsed(content["after"]), current)
        except (KeyError, TypeError) as error:
            raise DeployError(f"{path} is damaged ({error!r}); delete it and it will be made again") from error
    else:
        state = _rebuilt(folder, current)
    there = [version.name for version in (folder / "versions").iterdir() if version.is_dir()]
    return only(state, {*there, current})


def _parsed(state: dict[str, Any]) -> State:
    return State(tuple(Entry(**entry) for entry in state["installed"]), tuple(state["line"]))


def _settled(before: State, after: State, current: str) -> State:
    for state in (after, before):
        if current == (state.line[-1] if state.line else ""):
            return state
    # somebody changed `current` by hand: pointing it elsewhere counts as an install, deleting it as nothing
    return replace(after, line=(*after.line, current)) if current else after


def _rebuilt(folder: Path, current: str) -> State:
    """Without history.json: the versions in the order of their numbers, those up to `current` as the line."""
    if not current:
        return State((), ())  # no install ever finished
    entries = []
    for version in sorted((folder / "versions").iterdir(), key=_number):
        with suppress(OSError, DeployError):
            written_at = datetime.fromtimestamp((version / MANIFEST).stat().st_mtime, timezone.utc)
            entries.append(made(version.name, read_manifest(version), written_at))
    line = [entry.name for entry in entries if _number(Path(entry.name)) < _number(Path(current))]
    return State(tuple(entries), (*line, current))


def _number(version: Path) -> int:
    match = OURS.fullmatch(version.name)
    return int(match[1]) if match else 0


def next_name(folder: Path, content: Mapping[str, Any]) -> str:
    number = 1 + max((_number(version) for version in (folder / "versions").iterdir()), default=0)
    return f"{number:04d}-{digest(content)[:12]}"


def appended(state: State, entry: Entry, keep: int) -> State:
    """The state once `entry` is current; it stands in for a damaged version of the same content."""
    same = {old.name for old in state.installed if old.sha256 == entry.sha256}
    line = [entry.name if name in same else name for name in state.line] + [entry.name]
    unique = [name for name, _ in groupby(line)]
    installed = [old for old in state.installed if old.name not in same] + [entry]
    kept = {old.name for old in installed[-keep:]} | set(unique[-2:])
    return only(State(tuple(installed), tuple(unique[-LINE_LIMIT:])), kept)


def only(state: State, names: Collection[str]) -> State:
    """The state with nothing but these versions."""
    line = (name for name in state.line if name in names)
    installed = tuple(entry for entry in state.installed if entry.name in names)
    return State(installed, tuple(name for name, _ in groupby(line)))


# ---- JSON ----------------------------------------------------------------------------------------------------


def read_json(path: Path, format_name: str) -> dict[str, Any]:
    """The content of a JSON file of this format, without the format's name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DeployError(f"{path} does not exist") from None
    except ValueError as error:
        raise DeployError(f"{path} is damaged ({error}); delete it and it will be made again") from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != format_name:
        raise DeployError(
            f"{path} has format {found!r}, expected {format_name!r}: another version of edgeprune wrote it"
        )
    return dict(content)


def write(folder: Path, before: State, after: State) -> None:
    """Replace history.json, readable by whoever may enter versions/."""
    states = {"format": HISTORY_FORMAT, "before": asdict(before), "after": asdict(after)}
    beside = folder / f".{HISTORY}.{os.getpid()}"
    beside.write_text(json.dumps(states, indent=1) + "\n", encoding="utf-8")
    beside.chmod((folder / "versions").stat().st_mode & 0o666)
    sync(str(beside))
    os.replace(beside, folder / HISTORY)
    sync(str(folder))
