"""Install a model into a folder so that no reader ever sees half of one, and so that it can be undone.

    FOLDER/current -> versions/0003-5f1c0a9be27d   what readers follow: a relative link, replaced in one step
    FOLDER/versions/0003-5f1c0a9be27d/             the model's files, and manifest.json with their sha256
    FOLDER/history.json                            the versions there are, and the line that led to `current`
    FOLDER/.lock                                   held while something is installed or rolled back

The history works like a browser's. An install puts its version at the end of the line; a rollback takes the
last one off and goes to the one before. What was left stays on disk, but only an install brings it back:

    install A, B, C    line A B C        rollback    line A B        rollback    line A
    install D          line A D          rollback    line A          rollback    DeployError: nothing is left

Installing what is already current leaves the line as it is.

`current` is the only truth. history.json is written just before the switch and holds the state before it and
the state after it: the one whose line ends in `current` counts. So a kill leaves the one or the other, whole.

A reader resolves `current` once and reads all its files from the folder that it got. That folder outlives the
next install; a reader that is slower than two finds it gone, and resolves again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

from . import files as disk
from .errors import DeployError, RunError
from .records import Receipt

MANIFEST_FORMAT = "edgeprune.manifest/1"
HISTORY_FORMAT = "edgeprune.history/1"
MANIFEST = "manifest.json"
MARGIN_BYTES = 4 << 20  # manifest, history and folders, and no device is filled to its last block
LINE_LIMIT = 100  # rollbacks that are remembered: two models installed in turn would grow the line for ever
OURS = re.compile(r"(\d+)-[0-9a-f]{12}")  # the names in versions/ that may be deleted again
POLL_S = 0.05


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
class _Entry:
    name: str
    sha256: str
    installed_at: str
    size_bytes: int


@dataclass(frozen=True)
class _State:
    installed: tuple[_Entry, ...]  # oldest first
    line: tuple[str, ...]  # the last is current, a rollback goes to the one before it


def install(
    files: Mapping[str, Path],
    manifest: Mapping[str, Any],
    folder: Path,
    smoke: Callable[[Path], None],
    keep: int = 5,
    lock_timeout_s: float = 30.0,
) -> Receipt:
    """Copy a model into `folder`, try it there, and make it current; the receipt names what was before.

    Args:
        files: name in the version's folder -> the file to copy.
        manifest: what else is to be known about the model, as JSON values; files, sizes and sha256 are added.
        folder: made when it does not exist.
        smoke: called with the complete version's folder before the switch; raises when the model does not
            answer as it should.
        keep: how many of the newest versions stay; the one a rollback would go to stays in any case.
        lock_timeout_s: how long to wait for another install or rollback in this folder.

    Raises:
        DeployError: nothing was switched; the new version is removed, and `current` is what it was.
    """
    folder = folder.absolute()
    if keep < 1:
        raise DeployError(f"keep is {keep}: at least 1 version has to stay, the one just installed")
    with _explained("installing into", folder):
        content = _described(files, manifest)
        _prepare(folder)
        with _locked(folder, lock_timeout_s):
            current = _current(folder)
            before = _load(folder, current)
            _clean(folder, before)
            stored = _intact(folder, before, _digest(content))
            entry = _entry(stored or _next_name(folder, content), content, datetime.now(timezone.utc))
            after = _appended(before, entry, keep)
            try:
                if not stored:
                    _bring(files, content, folder, entry.name)
                _try(smoke, folder, entry.name)
                _switch(folder, before, after)
            finally:  # what a failure left, or what `keep` let go: `current` tells which of the two
                _clean(folder, _load(folder, _current(folder)))
    return Receipt(str(folder), entry.name, entry.sha256, current)


def rollback(folder: Path, smoke: Callable[[Path], None], lock_timeout_s: float = 30.0) -> Receipt:
    """Make the version current that was before this one; `previous` in the receipt is the one that was left.

    Twice goes further back. The version that was left stays on disk until `keep` of an install lets it go.

    Raises:
        DeployError: nothing to go back to, or it is damaged or fails `smoke`; `current` is what it was.
    """
    folder = folder.absolute()
    with _explained("rolling back", folder):
        if not _current(folder):
            raise DeployError(f"nothing is installed in {folder}, so nothing can be rolled back; {_listed(folder)}")
        with _locked(folder, lock_timeout_s):
            current = _current(folder)
            before = _load(folder, current)
            if len(before.line) < 2:
                raise DeployError(f"nothing is left to roll back to in {folder}; {_listed(folder)}")
            name = before.line[-2]
            if damage := _damage(folder / "versions" / name):
                raise DeployError(
                    f"cannot roll back to {name} in {folder}, it is damaged: {damage}; "
                    f"{_standing(folder)}; install the model you want again instead"
                )
            _try(smoke, folder, name)
            _switch(folder, before, replace(before, line=before.line[:-1]))
            sha256 = _digest(_manifest(folder / "versions" / name))
    return Receipt(str(folder), name, sha256, current)


def versions(folder: Path) -> tuple[Version, ...]:
    """List what is installed, newest first, without waiting for a running install.

    Raises:
        DeployError: the folder cannot be read, or its history is damaged.
    """
    folder = folder.absolute()
    with _explained("listing", folder):
        if not _is_folder(folder) or not _is_folder(folder / "versions"):
            return ()
        current = _current(folder)
        state = _load(folder, current)
        while (now := _current(folder)) != current:  # an install switched between the two reads
            current, state = now, _load(folder, now)
        return tuple(_version(folder, entry, current) for entry in reversed(state.installed))


def _version(folder: Path, entry: _Entry, current: str) -> Version:
    manifest: dict[str, Any] = {}
    with suppress(OSError, DeployError):
        manifest = _manifest(folder / "versions" / entry.name)
    is_current = entry.name == current
    return Version(entry.name, entry.sha256, entry.installed_at, entry.size_bytes, is_current, manifest)


# ---- what is installed -------------------------------------------------------------------------------------


def _described(sources: Mapping[str, Path], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its files, exactly as it will be read back from JSON."""
    if taken := {"format", "files"} & manifest.keys():
        raise DeployError(f"the manifest has {sorted(taken)}, which install adds itself; leave it out")
    if not sources:
        raise DeployError("there are no files to install; pass at least one as {name: path}")
    for name, source in sources.items():
        if not name.isprintable() or name in ("", "..", MANIFEST) or name != Path(name).name:
            raise DeployError(f"a model's file cannot be named {name!r}; use a plain name other than {MANIFEST}")
        if not source.is_file():
            raise DeployError(f"{source}, to be installed as {name}, is not a file; export the model again")
    recorded = {
        name: {"size_bytes": source.stat().st_size, "sha256": disk.sha256(source)} for name, source in sources.items()
    }
    try:
        text = json.dumps({**disk.plain(dict(manifest)), "files": recorded}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DeployError(f"the manifest holds what JSON cannot ({error}); use plain numbers and text") from error
    content: dict[str, Any] = json.loads(text)
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _entry(name: str, content: Mapping[str, Any], installed_at: datetime) -> _Entry:
    return _Entry(name, _digest(content), installed_at.isoformat(timespec="seconds"), _size_bytes(content))


def _size_bytes(content: Mapping[str, Any]) -> int:
    return sum(int(recorded["size_bytes"]) for recorded in content["files"].values())


def _manifest(version: Path) -> dict[str, Any]:
    content = disk.read_json(version / MANIFEST, MANIFEST_FORMAT, DeployError)
    if not version.name.endswith("-" + _digest(content)[:12]):
        raise DeployError(f"{version / MANIFEST} was changed after the install")
    return content


def _damage(version: Path) -> str:
    """Why this version is no longer what was installed; "" when it is."""
    try:
        recorded = _manifest(version)["files"]
        changed = [name for name in recorded if disk.sha256(version / name) != recorded[name]["sha256"]]
    except (OSError, DeployError) as error:
        return str(error)
    return f"{', '.join(changed)} changed after the install" if changed else ""


def _intact(folder: Path, state: _State, sha256: str) -> str:
    """The name of the undamaged version with this content, or ""."""
    names = (entry.name for entry in state.installed if entry.sha256 == sha256)
    return next((name for name in names if not _damage(folder / "versions" / name)), "")


# ---- the steps of an install -------------------------------------------------------------------------------


def _prepare(folder: Path) -> None:
    _make_folder(folder)
    _current(folder)  # refuses a `current` of the user's own before anything is written beside it
    _make_folder(folder / "versions")


def _make_folder(path: Path) -> None:
    if not _is_folder(path):
        path.mkdir(parents=True, exist_ok=True)  # another first install may have made it meanwhile
        disk.sync(path.parent)


def _is_folder(path: Path) -> bool:
    """False when there is nothing; an error when there is something else."""
    try:
        found = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise DeployError(f"{path} is a link to nothing; remove it, or choose another folder") from None
        return False
    if not stat.S_ISDIR(found.st_mode):
        raise DeployError(f"{path} is not a folder; remove it, or choose another folder")
    return True


@contextmanager
def _locked(folder: Path, timeout_s: float) -> Iterator[None]:
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _wait_for_lock(handle, folder, timeout_s)
        with suppress(OSError):  # the number only serves the message below: a full disk is no reason to stop
            os.pwrite(handle, f"{os.getpid():<20}\n".encode(), 0)
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough when `smoke` left a forked process behind
        os.close(handle)


def _wait_for_lock(handle: int, folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = os.pread(handle, 20, 0).decode().strip() or "unknown"
                raise DeployError(
                    f"process {holder} is installing or rolling back in {folder} and did not finish within "
                    f"{timeout_s:g} s; wait for it or stop it, then try again"
                ) from None
        time.sleep(POLL_S)


def _clean(folder: Path, state: _State) -> None:
    """Remove what belongs to no state: only ever under the lock, so it is not a running install's."""
    kept = {entry.name for entry in state.installed} | set(state.line)
    for path in (folder / "versions").iterdir():
        if path.name.startswith(".incoming-") or (OURS.fullmatch(path.name) and path.name not in kept):
            shutil.rmtree(path, ignore_errors=True)  # nobody sees it, and the next install tries again
    for leftover in (folder / ".current-next", *folder.glob(".history.json.*")):
        leftover.unlink(missing_ok=True)


def _bring(sources: Mapping[str, Path], content: Mapping[str, Any], folder: Path, name: str) -> None:
    """Copy the files beside, prove the copies, and rename them into `versions/name`."""
    _check_space(folder, _size_bytes(content))
    incoming = folder / "versions" / f".incoming-{os.getpid()}"
    incoming.mkdir()
    for file_name, source in sources.items():
        copy = incoming / file_name
        shutil.copyfile(source, copy)
        _flush(copy)
        if disk.sha256(copy) != content["files"][file_name]["sha256"]:
            raise DeployError(
                f"the copy of {source} in {folder} is not what was read first: the file changed meanwhile, "
                f"or the disk is faulty; {_standing(folder)}; try again when nothing writes to the file"
            )
    text = json.dumps({"format": MANIFEST_FORMAT, **content}, indent=1)
    (incoming / MANIFEST).write_text(text + "\n", encoding="utf-8")
    disk.sync(incoming / MANIFEST)
    disk.sync(incoming)
    incoming.rename(folder / "versions" / name)
    disk.sync(folder / "versions")


def _check_space(folder: Path, size_bytes: int) -> None:
    needed, free = size_bytes + MARGIN_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise DeployError(
            f"not enough space in {folder}: {needed:,} bytes are needed ({size_bytes:,} for the model) and "
            f"{free:,} are free; {_standing(folder)}; delete something, or install a smaller model"
        )


def _flush(path: Path) -> None:
    """Write to the disk and drop the memory's copy, so that the next read proves the disk's."""
    disk.sync(path)
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _try(smoke: Callable[[Path], None], folder: Path, name: str) -> None:
    try:
        smoke(folder / "versions" / name)
    except Exception as error:  # the caller's code: whatever it raises is a model that does not work here
        raise DeployError(
            f"{name} failed its smoke test in {folder} ({type(error).__name__}: {error}) and was not made "
            f"current; {_standing(folder)}; check the runtime on this machine, or export the model again"
        ) from error


def _switch(folder: Path, before: _State, after: _State) -> None:
    path = folder / "history.json"
    states = {"format": HISTORY_FORMAT, "before": disk.plain(before), "after": disk.plain(after)}
    with disk.writing(path) as beside:
        beside.write_text(json.dumps(states, indent=1) + "\n", encoding="utf-8")
        # mkstemp makes private files, but whoever may enter versions/ may list them
        beside.chmod((folder / "versions").stat().st_mode & 0o666)
    link = folder / ".current-next"
    link.unlink(missing_ok=True)
    link.symlink_to(Path("versions") / after.line[-1])
    link.replace(folder / "current")
    disk.sync(folder)


# ---- the history -------------------------------------------------------------------------------------------


def _current(folder: Path) -> str:
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


def _load(folder: Path, current: str) -> _State:
    """The state that `current` belongs to, without versions that were deleted by hand."""
    path = folder / "history.json"
    if path.exists():
        content = disk.read_json(path, HISTORY_FORMAT, DeployError)
        try:
            state = _settled(_parsed(content["before"]), _parsed(content["after"]), current)
        except (KeyError, TypeError) as error:
            raise DeployError(f"{path} is damaged ({error!r}); delete it and it will be made again") from error
    else:
        state = _rebuilt(folder, current)
    there = [version.name for version in (folder / "versions").iterdir() if version.is_dir()]
    return _only(state, {*there, current})


def _parsed(state: dict[str, Any]) -> _State:
    return _State(tuple(_Entry(**entry) for entry in state["installed"]), tuple(state["line"]))


def _settled(before: _State, after: _State, current: str) -> _State:
    for state in (after, before):
        if current == (state.line[-1] if state.line else ""):
            return state
    # somebody changed `current` by hand: pointing it elsewhere counts as an install, deleting it as nothing
    return replace(after, line=(*after.line, current)) if current else after


def _rebuilt(folder: Path, current: str) -> _State:
    """Without history.json: the versions in the order of their numbers, those up to `current` as the line."""
    if not current:
        return _State((), ())  # no install ever finished
    entries = []
    for version in sorted((folder / "versions").iterdir(), key=_number):
        with suppress(OSError, DeployError):
            written_at = datetime.fromtimestamp((version / MANIFEST).stat().st_mtime, timezone.utc)
            entries.append(_entry(version.name, _manifest(version), written_at))
    line = [entry.name for entry in entries if _number(Path(entry.name)) < _number(Path(current))]
    return _State(tuple(entries), (*line, current))


def _number(version: Path) -> int:
    match = OURS.fullmatch(version.name)
    return int(match[1]) if match else 0


def _next_name(folder: Path, content: Mapping[str, Any]) -> str:
    number = 1 + max((_number(version) for version in (folder / "versions").iterdir()), default=0)
    return f"{number:04d}-{_digest(content)[:12]}"


def _appended(state: _State, entry: _Entry, keep: int) -> _State:
    """The state once `entry` is current; it stands in for a damaged version of the same content."""
    same = {old.name for old in state.installed if old.sha256 == entry.sha256}
    line = [entry.name if name in same else name for name in state.line] + [entry.name]
    unique = [name for name, _ in groupby(line)]
    installed = [old for old in state.installed if old.name not in same] + [entry]
    kept = {old.name for old in installed[-keep:]} | set(unique[-2:])
    return _only(_State(tuple(installed), tuple(unique[-LINE_LIMIT:])), kept)


def _only(state: _State, names: Collection[str]) -> _State:
    """The state with nothing but these versions."""
    line = (name for name in state.line if name in names)
    installed = tuple(entry for entry in state.installed if entry.name in names)
    return _State(installed, tuple(name for name, _ in groupby(line)))


# ---- words -------------------------------------------------------------------------------------------------


@contextmanager
def _explained(action: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RunError) as error:
        cause = error.__cause__ or error  # files.writing gives the advice for a run folder
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room" if full else "check the path, its permissions and its disk"
        raise DeployError(
            f"{action} {folder} failed: {cause}; {_standing(folder)}; {advice}, then try again"
        ) from error


def _standing(folder: Path) -> str:
    with suppress(OSError, DeployError):
        name = _current(folder)
        return f"`current` leads to {name}" if name else "there is no current version yet"
    return "`current` cannot be read"


def _listed(folder: Path) -> str:
    """What there is, for the message that says that something else is not."""
    found = [f"{v.name}{' (current)' if v.current else ''} of {v.installed_at}" for v in versions(folder)]
    return f"there is: {', '.join(found)}" if found else "install a model first"
