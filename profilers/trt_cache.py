"""Engines that were built on this device, kept by everything that they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from typing import Any

FOLDER = "~/.cache/edgeprune/engines"
LIMIT_BYTES = 2 << 30  # the engines that were used longest ago go first


def key(network: bytes, facts: dict[str, Any]) -> str:
    """A name for the engine of a network.

    Args:
        network: the ONNX file's content.
        facts: TensorRT, GPU, driver, precision, power mode, accelerator, flags: any that differs makes another engine.
    """
    about = json.dumps(facts, sort_keys=True).encode()
    return hashlib.sha256(hashlib.sha256(network).digest() + about).hexdigest()[:32]


class Cache:
    """A folder of files named by their key."""

    def __init__(self, folder: str = FOLDER, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder, self._limit_bytes = os.path.expanduser(folder), limit_bytes
        os.makedirs(self.folder, exist_ok=True)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name + ".plan")

    def get(self, name: str) -> bytes | None:
        """An engine; None when there is none, or it is damaged: then it is gone."""
        try:
            with open(self.path(name), "rb") as stream:
                digest, content = stream.read(32), stream.read()
        except OSError:
            return None
        if hashlib.sha256(content).digest() != digest:
            self.drop(name)
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path(name))
        return content

    def put(self, name: str, content: bytes) -> None:
        """Keep an engine, written beside and renamed. Where the disk is full it is only built again the next time."""
        beside = "%s.%d" % (self.path(name), os.getpid())
        try:
            with open(beside, "wb") as stream:
                stream.write(hashlib.sha256(content).digest() + content)
            os.replace(beside, self.path(name))
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(beside)
        self.trim(name)

    def drop(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.path(name))

    def trim(self, newest: str) -> None:
        """Let go of the engines that were used longest ago, down to the limit; never of the newest."""
        found = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(OSError):
                if entry.name.endswith(".plan") and entry.path != self.path(newest):
                    about = entry.stat()
                    found.append((about.st_mtime, about.st_size, entry.path))
        room = self._limit_bytes
        for _, size_bytes, path in sorted(found, reverse=True):
            room -= size_bytes
            if room < 0:
                with contextlib.suppress(OSError):
                    os.unlink(path)
