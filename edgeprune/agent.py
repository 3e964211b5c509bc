"""The host's side of the device program: pack it, start it, call it.

The folder `profilers/` travels as one zip, named by its content: two versions never mix, and a device that has it
already gets nothing.
"""

from __future__ import annotations

import contextlib
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

from .errors import AgentError, DeployError, EdgepruneError, LinkError, RuntimeMissing, TargetError
from .link import Process

PROTOCOL = 1
START = "import sys\nfrom device.serve import main\nsys.exit(main(sys.argv))\n"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the same sources make the same bytes
START_S = 60.0
PAUSE_S = 2.0  # between attempts to get a link back
NOISE_LINES = 200  # of a login shell
ADVICE = {
    "numpy": "sudo apt install python3-numpy, or python3 -m pip install numpy",
    "torch": "a build with CUDA; on a Jetson NVIDIA's own wheel for its JetPack",
    "ai_edge_litert": "python3 -m pip install ai-edge-litert (before Python 3.9: tflite-runtime 'numpy<2')",
}


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
    """A running device program. Use it as a context manager; calls are answered one at a time.

    Args:
        begin: starts the program, and again after the link to it broke.
        patience_s: how long to try to get a broken link back; the call that it broke is then made again, and before it
            the program's `open`.
    Raises:
        RuntimeMissing: the program cannot load the runtime; AgentError: it does not start.
    """

    def __init__(self, begin: Callable[[], Process], patience_s: float = 0.0) -> None:
        self._numbers = itertools.count(1)
        self._begin, self._patience_s = begin, patience_s
        self._opening: dict[str, Any] | None = None
        self._process = self._started()

    def _started(self) -> Process:
        """The program once it has said that it is ready; what a login shell prints before that is passed over."""
        process = self._begin()
        try:
            first = first_object(process, time.monotonic() + START_S)
            if "error" in first:
                raise RuntimeMissing(_missing(first["error"]))
            if first.get("ready") != PROTOCOL:
                raise AgentError(f"the device program speaks protocol {first.get('ready')}, this host {PROTOCOL}")
        except TargetError:
            process.close()
            raise
        return process

    @classmethod
    def local(cls, runtime: str) -> Agent:
        """The device program on this machine, with this Python."""
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        return cls(lambda: Process([sys.executable, "-u", str(local_program()), runtime], environment))

    def call(self, name: str, timeout_s: float, on_event: Callable[[Any], None] | None = None, **arguments: Any) -> Any:
        """Call a function of the device program; again when the link breaks and comes back.

        Args:
            name: of the function; the rest are its arguments, as JSON.
            timeout_s: without a reply or an event for this long, the program is stopped.
            on_event: gets what the function reports on its way.
        Raises:
            AgentError: the program died, hung, answered nonsense, or the function failed.
            LinkError: the link broke and did not come back in time.
        """
        if name == "open":
            self._opening = arguments
        try:
            return self._call(name, timeout_s, on_event, arguments)
        except LinkError as error:
            lost = error
        deadline_s = time.monotonic() + self._patience_s
        while time.monotonic() < deadline_s:
            try:
                self._process = self._started()
                if self._opening is not None and name != "open":
                    self._call("open", timeout_s, None, self._opening)
                return self._call(name, timeout_s, on_event, arguments)
            except LinkError as error:
                lost = error
                time.sleep(PAUSE_S)
        raise lost

    def _call(
        self, name: str, timeout_s: float, on_event: Callable[[Any], None] | None, arguments: dict[str, Any]
    ) -> Any:
        number = next(self._numbers)
        try:
            self._process.write(json.dumps({"id": number, "call": name, "arguments": arguments}))
            while True:
                reply = next_object(self._process, time.monotonic() + timeout_s)
                if reply.get("id") != number:
                    continue  # the late answer to a call that was given up
                if "event" not in reply:
                    break
                if on_event is not None:
                    on_event(reply["event"])
        except TargetError:
            self._process.close()
            raise
        if "error" in reply:
            raise _failed(name, reply["error"])
        return reply["result"]

    def close(self) -> None:
        self._process.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def next_object(process: Process, deadline_s: float) -> dict[str, Any]:
    """The next line, a JSON object; raises AgentError when it is none."""
    line = process.read(deadline_s)
    try:
        reply = json.loads(line)
    except json.JSONDecodeError as error:
        raise AgentError(f"the device program answered {line[:200]!r}, which is no JSON") from error
    if not isinstance(reply, dict):
        raise AgentError(f"the device program answered {line[:200]!r}, which is no object")
    return reply


def first_object(process: Process, deadline_s: float) -> dict[str, Any]:
    """What a program on the device says first, after what the login shell prints before it."""
    for _ in range(NOISE_LINES):
        with contextlib.suppress(json.JSONDecodeError):
            found = json.loads(process.read(deadline_s))
            if isinstance(found, dict):
                return found
    raise AgentError(
        f"the device's login shell prints more than {NOISE_LINES} lines before the device program starts; make it "
        "silent for shells that are not interactive"
    )


def _failed(name: str, error: dict[str, Any]) -> EdgepruneError:
    """What a call ended with: an installation's own words, anything else with the name of the call."""
    text = str(error["message"])
    if error["kind"] == "DeployError":
        return DeployError(text.partition(": ")[2])
    return AgentError(f"{name} failed on the device: {text}")


def _missing(error: dict[str, Any]) -> str:
    advice = ADVICE.get(str(error.get("module")))
    return f"{error['message']}; install it there: {advice}" if advice else str(error["message"])
