"""Install a model into a folder so that no reader ever sees half of one, and so that it can be undone.

    FOLDER/current -> versions/0003-5f1c0a9be27d   what readers follow: a relative link, replaced in one step
    FOLDER/versions/0003-5f1c0a9be27d/             the model's files, and manifest.json with their sha256
    FOLDER/history.json                            the versions there are, and the line that led to `current`
    FOLDER/.lock                                   held while something is installed or rolled back

A reader resolves `current` once and reads all its files from the folder that it got. That folder outlives the
next install; a reader that is slower than two finds it gone, and resolves again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import history
from .history import MANIFEST, MANIFEST_FORMAT, OURS, DeployError, State, Version
from .storage import forget_cached, sha256, sync

MARGIN_BYTES = 4 << 20  # manifest, history and folders, and no device is filled to its last block
POLL_S = 0.05


def install(
    files: Mapping[str, Path],
    manifest: Mapping[str, Any],
    folder: Path,
    smoke: Callable[[Path], None],
    keep: int = 5,
    lock_timeout_s: float = 30.0,
    restart: Callable[[], None] | None = None,
    linked: bool = False,
) -> dict[str, str]:
    """Copy a model into `folder`, try it there, and make it current; the receipt names what was before.

    Args:
        files: name in the version's folder -> the file to copy.
        manifest: what else is to be known about the model, as JSON values; files, sizes and sha256 are added.
        folder: made when it does not exist.
        smoke: called with the complete version's folder before the switch; raises when the model does not
            answer as it should.
        keep: how many of the newest versions stay; the one a rollback would go to stays in any case.
        lock_timeout_s: how long to wait for another install or rollback in this folder.
        restart: called after the switch; raises when the model's user does not come back. Then, and when the smoke
            test fails after it, what was current is current again, and is restarted.
        linked: the files belong to edgeprune, so links to them take no space.

    Raises:
        DeployError: nothing was switched; the new version is removed, and `current` is what it was.
    """
    folder = folder.absolute()
    if keep < 1:
        raise DeployError(f"keep is {keep}: at least 1 version has to stay, the one just installed")
    with explained("installing into", folder):
        content = _described(files, manifest)
        prepare(folder)
        with _locked(folder, lock_timeout_s):
            current = history.current_of(folder)
            before = history.load(folder, current)
            _clean(folder, before)
            stored = history.intact(folder, before, history.digest(content))
            entry = history.made(stored or history.next_name(folder, content), content, datetime.now(timezone.utc))
            after = history.appended(before, entry, keep)
            try:
                if not stored:
                    _bring(files, content, folder, entry.name, linked)
                _try(smoke, folder, entry.name)
                _switch(folder, before, after)
                _restart(restart, smoke, folder, before, after)
            finally:  # what a failure left, or what `keep` let go: `current` tells which of the two
                _clean(folder, history.load(folder, history.current_of(folder)))
    return _receipt(folder, entry.name, entry.sha256, current)


def rollback(
    folder: Path, smoke: Callable[[Path], None], lock_timeout_s: float = 30.0, restart: Callable[[], None] | None = None
) -> dict[str, str]:
    """Make the version current that was before this one; `previous` in the receipt is the one that was left.

    Twice goes further back. The version that was left stays on disk until `keep` of an install lets it go.

    Raises:
        DeployError: nothing to go back to, or it is damaged or fails `smoke`; `current` is what it was.
    """
    folder = folder.absolute()
    with explained("rolling back", folder):
        if not history.current_of(folder):
            raise DeployError(f"nothing is installed in {folder}, so nothing can be rolled back; {_listed(folder)}")
        with _locked(folder, lock_timeout_s):
            current = history.current_of(folder)
            before = history.load(folder, current)
            if len(before.line) < 2:
                raise DeployError(f"nothing is left to roll back to in {folder}; {_listed(folder)}")
            name = before.line[-2]
            if damage := history.damage(folder / "versions" / name):
                raise DeployError(
                    f"cannot roll back to {name} in {folder}, it is damaged: {damage}; "
                    f"{_standing(folder)}; install the model you want again instead"
                )
            _try(smoke, folder, name)
            after = replace(before, line=before.line[:-1])
            _switch(folder, before, after)
            _restart(restart, smoke, folder, before, after)
            digest = history.digest(history.read_manifest(folder / "versions" / name))
    return _receipt(folder, name, digest, current)


def versions(folder: Path) -> tuple[Version, ...]:
    """List what is installed, newest first, without waiting for a running install.

    Raises:
        DeployError: the folder cannot be read, or its history is damaged.
    """
    folder = folder.absolute()
    with explained("listing", folder):
        if not _is_folder(folder) or not _is_folder(folder / "versions"):
            return ()
        current = history.current_of(folder)
        state = history.load(folder, current)
        while (now := history.current_of(folder)) != current:  # an install switched between the two reads
            current, state = now, history.load(folder, now)
        return tuple(history.version_of(folder, entry, current) for entry in reversed(state.installed))


def _receipt(folder: Path, version: str, digest: str, previous: str) -> dict[str, str]:
    return {"folder": str(folder), "version": version, "sha256": digest, "previous": previous}


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
        name: {"size_bytes": source.stat().st_size, "sha256": sha256(str(source))} for name, source in sources.items()
    }
    try:
        text = json.dumps({**manifest, "files": recorded}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DeployError(f"the manifest holds what JSON cannot ({error}); use plain numbers and text") from error
    content: dict[str, Any] = json.loads(text)
    return content


# ---- the steps of an install -------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    _make_folder(folder)
    history.current_of(folder)  # refuses a `current` of the user's own before anything is written beside it
    _make_folder(folder / "versions")


def _make_folder(path: Path) -> None:
    if not _is_folder(path):
        path.mkdir(parents=True, exist_ok=True)  # another first install may have made it meanwhile
        sync(str(path.parent))


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


def _clean(folder: Path, state: State) -> None:
    """Remove what belongs to no state: only ever under the lock, so it is not a running install's."""
    kept = {entry.name for entry in state.installed} | set(state.line)
    for path in (folder / "versions").iterdir():
        if path.name.startswith(".incoming-") or (OURS.fullmatch(path.name) and path.name not in kept):
            shutil.rmtree(path, ignore_errors=True)  # nobody sees it, and the next install tries again
    for leftover in (folder / ".current-next", *folder.glob(".history.json.*")):
        leftover.unlink(missing_ok=True)


def _bring(sources: Mapping[str, Path], content: Mapping[str, Any], folder: Path, name: str, linked: bool) -> None:
    """Copy the files beside, prove the copies, and rename them into `versions/name`."""
    there = linked and all(source.stat().st_dev == folder.stat().st_dev for source in sources.values())
    check_space(folder, 0 if there else history.size_bytes(content))
    incoming = folder / "versions" / f".incoming-{os.getpid()}"
    incoming.mkdir()
    for file_name, source in sources.items():
        copy = incoming / file_name
        if not (linked and _link(source, copy)):
            shutil.copyfile(source, copy)
        _flush(copy)
        if sha256(str(copy)) != content["files"][file_name]["sha256"]:
            raise DeployError(
                f"the copy of {source} in {folder} is not what was read first: the file changed meanwhile, "
                f"or the disk is faulty; {_standing(folder)}; try again when nothing writes to the file"
            )
    text = json.dumps({"format": MANIFEST_FORMAT, **content}, indent=1)
    (incoming / MANIFEST).write_text(text + "\n", encoding="utf-8")
    sync(str(incoming / MANIFEST))
    sync(str(incoming))
    incoming.rename(folder / "versions" / name)
    sync(str(folder / "versions"))


def _link(source: Path, copy: Path) -> bool:
    """A second name for a file, readable by whoever may read what is installed; False across file systems."""
    try:
        os.link(source, copy)
    except OSError:
        return False
    mask = os.umask(0o077)
    os.umask(mask)
    copy.chmod(0o666 & ~mask)
    return True


def check_space(folder: Path, size_bytes: int) -> None:
    needed, free = size_bytes + MARGIN_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise DeployError(
            f"not enough space in {folder}: {needed:,} bytes are needed ({size_bytes:,} for the model) and "
            f"{free:,} are free; {_standing(folder)}; delete something, or install a smaller model"
        )


def _flush(path: Path) -> None:
    """Write to the disk and drop the memory's copy, so that the next read proves the disk's."""
    sync(str(path))
    with path.open("rb") as stream:
        forget_cached(stream.fileno())


def _try(smoke: Callable[[Path], None], folder: Path, name: str) -> None:
    try:
        smoke(folder / "versions" / name)
    except Exception as error:  # the caller's code: whatever it raises is a model that does not work here
        raise DeployError(
            f"{name} failed its smoke test in {folder} ({type(error).__name__}: {error}) and was not made "
            f"current; {_standing(folder)}; check the runtime on this machine, or export the model again"
        ) from error


def _switch(folder: Path, before: State, after: State) -> None:
    history.write(folder, before, after)
    link = folder / ".current-next"
    link.unlink(missing_ok=True)
    if after.line:
        link.symlink_to(Path("versions") / after.line[-1])
        link.replace(folder / "current")
    else:
        (folder / "current").unlink(missing_ok=True)
    sync(str(folder))


def _restart(
    restart: Callable[[], None] | None, smoke: Callable[[Path], None], folder: Path, before: State, after: State
) -> None:
    """Let the model's user take up the new version; go back to the old one when that fails."""
    if restart is None:
        return
    try:
        restart()
        smoke(folder / "versions" / after.line[-1])
    except Exception as error:
        _switch(folder, after, before)
        problem = ""
        if before.line:
            try:
                restart()
            except Exception as again:
                problem = f"; restarting what was there before failed too: {again}"
        raise DeployError(
            f"{after.line[-1]} failed in {folder} after the service was restarted ({type(error).__name__}: {error}) "
            f"and was taken back; {_standing(folder)}{problem}; look at the service's log"
        ) from error


# ---- words -------------------------------------------------------------------------------------------------


@contextmanager
def explained(action: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room" if full else "check the path, its permissions and its disk"
        raise DeployError(
            f"{action} {folder} failed: {error}; {_standing(folder)}; {advice}, then try again"
        ) from error


def _standing(folder: Path) -> str:
    with suppress(OSError, DeployError):
        name = history.current_of(folder)
        return f"`current` leads to {name}" if name else "there is no current version yet"
    return "`current` cannot be read"


def _listed(folder: Path) -> str:
    """What there is, for the message that says that something else is not."""
    found = [f"{v.name}{' (current)' if v.current else ''} of {v.installed_at}" for v in versions(folder)]
    return f"there is: {', '.join(found)}" if found else "install a model first"
