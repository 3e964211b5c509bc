"""The host's side of the device program: pack it, start it, call it.

The folder `profilers/` travels as one zip, named by its content: two versions never mix, and a device that has it
already gets nothing.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import AgentError, RuntimeMissing
from .link import Process

PROTOCOL = 1
START = "import sys\nfrom device.serve import main\nsys.exit(main(sys.argv))\n"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the same sources make the same bytes


def program() -> tuple[str, bytes]:
    """Name and bytes of the zip that runs on a device: `python3 NAME RUNTIME`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py", EPOCH), START)
        for file in sorted(resources.files("edgeprune.profilers").iterdir(), key=lambda f: f.name):
            if file.name.endswith(".py"):
                archive.writestr(zipfile.ZipInfo(f"device/{file.name}", EPOCH), file.read_bytes())
    content = buffer.getvalue()
    return f"edgeprune-{hashlib.sha256(content).hexdigest()[:12]}.pyz", content


def local_program() -> Path:
    """The zip as a file on this machine, in a folder of this user's own."""
    name, content = program()
    folder = Path(tempfile.gettempdir()) / f"edgeprune-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / name
    if not path.exists() or path.read_bytes() != content:
        beside = folder / f".{name}.{os.getpid()}"
        beside.write_bytes(content)
        os.replace(beside, path)
    return path


class Agent:
    """A running device program. Use it as a context manager; calls are answered one at a time."""

    def __init__(self, command: list[str], runtime: str, environment: dict[str, str] | None = None) -> None:
        self._numbers = itertools.count(1)
        self._process = Process([*command, runtime], environment)
        try:
            first = self._read(time.monotonic() + 60)
        except AgentError:
            self._process.close()
            raise
        problem = first.get("error")
        if problem:
            self._process.close()
            raise RuntimeMissing(str(problem["message"]))
        if first.get("ready") != PROTOCOL:
            self._process.close()
            raise AgentError(f"the device program speaks protocol {first.get('ready')}, this host {PROTOCOL}")

    @classmethod
    def local(cls, runtime: str) -> Agent:
        """The device program on this machine, with this Python."""
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        return cls([sys.executable, "-u", str(local_program())], runtime, environment)

    def call(self, name: str, timeout_s: float, on_event: Callable[[Any], None] | None = None, **arguments: Any) -> Any:
        """Call a function of the device program.

        Args:
            name: of the function; the rest are its arguments, as JSON.
            timeout_s: without a reply or an event for this long, the program is stopped.
            on_event: gets what the function reports on its way.
        Raises:
            AgentError: the program died, hung, answered nonsense, or the function failed.
        """
        number = next(self._numbers)
        self._process.write(json.dumps({"id": number, "call": name, "arguments": arguments}))
        while True:
            try:
                reply = self._read(time.monotonic() + timeout_s)
            except AgentError:
                self._process.close()
                raise
            if reply.get("id") != number:
                continue  # the late answer to a call that was given up
            if "event" in reply:
                if on_event is not None:
                    on_event(reply["event"])
            elif "error" in reply:
                raise AgentError(f"{name} failed on the device: {reply['error']['message']}")
            else:
                return reply["result"]

    def _read(self, deadline_s: float) -> dict[str, Any]:
        line = self._process.read(deadline_s)
        try:
            reply = json.loads(line)
        except json.JSONDecodeError as error:
            raise AgentError(f"the device program answered {line[:200]!r}, which is no JSON") from error
        if not isinstance(reply, dict):
            raise AgentError(f"the device program answered {line[:200]!r}, which is no object")
        return reply

    def close(self) -> None:
        self._process.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
