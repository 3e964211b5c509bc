"""Hand files over a link: what is there is not sent, what broke off goes on, nothing counts before its checksum.

It runs by itself, before anything else of edgeprune is on the device: `python3 -c SOURCE FOLDER`. Requests and replies
are lines of JSON, with a file's bytes behind them:

    {"name": "model.tflite", "size_bytes": 9, "sha256": "..."}   -> {"offset": 4}, now the bytes from there on
                                                                 -> {"path": "..."} when it is there, whole;
                                                                    "" when it came damaged and was deleted
    {"get": "/path"}                                             -> {"size_bytes": 9, "sha256": "..."}, bytes, newline
    {"make": "/path"}, {"remove": "/path"}: a folder             -> {}

A folder that another host was given a file of stays until that host removes it, or its connection ends. What cannot be
done is answered with {"error": "..."}; after that in the middle of a file the program ends.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from io import BufferedReader
from typing import Any, BinaryIO, cast

BLOCK = 1 << 18
MARGIN_BYTES = 4 << 20  # no device is filled to its last block
LIMIT_BYTES = 512 << 20  # of files kept for the next time


def main(argv: list[str]) -> int:
    """Serve the folder until standard input ends. The first reply says where the folder is."""
    folder = os.path.abspath(os.path.expanduser(argv[1]))
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    held: dict[str, int] = {}  # folders that files were given of: descriptors with a shared lock
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        _forget(folder)
        _send(replies, {"folder": folder})
        for line in iter(sys.stdin.buffer.readline, b""):
            _answer(json.loads(line), folder, replies, held)
    except OSError as error:
        _send(replies, {"error": _words(error, folder)})
        return 1
    return 0


def _answer(request: dict[str, Any], folder: str, replies: BinaryIO, held: dict[str, int]) -> None:
    if "get" in request:
        _give(request["get"], replies)
    elif "make" in request:
        os.makedirs(request["make"], mode=0o700, exist_ok=True)
        _send(replies, {})
    elif "remove" in request:
        if request["remove"] in held:
            os.close(held.pop(request["remove"]))
        _remove(request["remove"])
        _send(replies, {})
    else:
        place = os.path.join(folder, request["sha256"][:16])
        if place not in held:
            held[place] = _hold(place)
        _take(place, request, replies)


def _hold(place: str) -> int:
    """Make a folder that nobody removes while the descriptor is open."""
    while True:
        os.makedirs(place, mode=0o700, exist_ok=True)
        try:
            handle = os.open(place, os.O_RDONLY)
        except FileNotFoundError:
            continue  # removed at this moment
        fcntl.flock(handle, fcntl.LOCK_SH)
        if os.path.exists(place) and os.path.samestat(os.fstat(handle), os.stat(place)):
            return handle
        os.close(handle)


def _remove(place: str) -> None:
    """Delete a folder, unless another host holds it."""
    try:
        handle = os.open(place, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(place, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(handle)


def _take(place: str, request: dict[str, Any], replies: BinaryIO) -> None:
    """Receive a file into `place`, from where an earlier attempt broke off.

    Two hosts that send the same file write the same bytes to the same positions of one file, so they cannot disturb
    each other; what a power cut made of it is found by the checksum.
    """
    path, size_bytes = os.path.join(place, request["name"]), request["size_bytes"]
    part = path + ".part"
    if os.path.exists(path) and sha256(path) == request["sha256"]:
        os.utime(place)
        _send(replies, {"path": path})
        return
    handle = os.open(part, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        offset = min(os.fstat(handle).st_size, size_bytes)
        free = shutil.disk_usage(place).free
        if free < size_bytes - offset + MARGIN_BYTES:
            needed = (request["name"], place, size_bytes - offset + MARGIN_BYTES, free)
            raise OSError(errno.ENOSPC, "%s does not fit into %s: %d bytes are needed and %d are free" % needed)
        _send(replies, {"offset": offset})
        os.lseek(handle, offset, os.SEEK_SET)
        while offset < size_bytes:
            block = cast(BufferedReader, sys.stdin.buffer).read1(min(BLOCK, size_bytes - offset))
            if not block:
                return  # the link broke: the next attempt goes on from here
            offset += _write(handle, block)
        os.fsync(handle)
        forget_cached(handle)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _unlink(part)
        raise
    finally:
        os.close(handle)
    if os.path.exists(part) and sha256(part) != request["sha256"]:
        _unlink(part)  # what an earlier attempt left was not what it seemed
        _send(replies, {"path": ""})
        return
    if os.path.exists(part):  # another host may have been faster
        os.replace(part, path)
    sync(place)
    sync(os.path.dirname(place))
    _send(replies, {"path": path})


def _write(handle: int, block: bytes) -> int:
    view = memoryview(block)
    while view:
        view = view[os.write(handle, view) :]
    return len(block)


def _give(path: str, replies: BinaryIO) -> None:
    try:
        size_bytes, digest = os.path.getsize(path), sha256(path)
    except OSError as error:
        _send(replies, {"error": "%s: %s" % (path, error.strerror)})
        return
    _send(replies, {"size_bytes": size_bytes, "sha256": digest})
    with open(path, "rb") as stream:
        shutil.copyfileobj(stream, replies, BLOCK)
    replies.write(b"\n")


def _forget(folder: str) -> None:
    """Delete what was used longest ago, until the rest is within the limit."""
    places = [entry for entry in os.scandir(folder) if entry.is_dir()]
    sizes = {p.path: sum(f.stat().st_size for f in os.scandir(p.path) if f.is_file()) for p in places}
    for place in sorted(places, key=lambda p: p.stat().st_mtime):
        if sum(sizes.values()) <= LIMIT_BYTES:
            break
        del sizes[place.path]
        _remove(place.path)


def _send(replies: BinaryIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")


def _unlink(path: str) -> None:
    if os.path.exists(path):
        os.unlink(path)


def _words(error: OSError, folder: str) -> str:
    where = "" if error.filename is None else " (%s)" % error.filename
    text = "%s%s" % (error.strerror, where)
    if error.errno == errno.ENOSPC:
        return text + "; make room on the device, then try again"
    if error.errno == errno.EIO:
        return text + "; the disk under %s is faulty: try another card, or have it checked with fsck" % folder
    if error.errno in (errno.EROFS, errno.EACCES):
        return text + "; %s has to be writable: check its owner and how it is mounted" % folder
    return text


# ---- files, for the other device programs too ----------------------------------------------------------------


def sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()


def sync(path: str) -> None:
    """Make a file or a folder's entries survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def forget_cached(handle: int) -> None:
    """Drop the memory's copy of a synced file, so that the next read proves the disk's."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
