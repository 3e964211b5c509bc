"""A device program in a process of its own: what a driver or a runtime does to it stays there.

It answers as `serve` does. When it dies, hangs, or fails, the caller gets a ChildError with its last words.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

START = (
    "import importlib, sys; sys.path[:] = sys.argv[3:]; "
    "sys.exit(importlib.import_module(sys.argv[1] + '.serve').main(['', sys.argv[2]]))"
)
BEAT_S = 15.0  # the host hears this often that a long call still runs
END_S = 5.0
LINES = 12


class ChildError(RuntimeError):
    """The program failed; `kind` is the name of its error, "" where it is gone."""

    def __init__(self, message: str, kind: str = "", module: str = "") -> None:
        super().__init__(message)
        self.kind, self.module = kind, module


class Child:
    """A running program; calls are answered one at a time.

    Args:
        runtime: a file of this folder with a `Program`.
        named: what it is called in messages.
    Raises:
        ChildError: it does not start; `kind` is RuntimeMissing where a package is missing.
    """

    def __init__(self, runtime: str, named: str) -> None:
        self._named, self._number = named, 0
        command = [sys.executable, "-u", "-c", START, __package__ or "", runtime, *sys.path]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._said: deque[str] = deque(maxlen=LINES)
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._listen, self._overhear)]
        for reader in self._readers:
            reader.start()
        try:
            first = self._reply(time.monotonic() + 60.0, None)
            if "error" in first:
                error = first["error"]
                raise ChildError(str(error["message"]), str(error["kind"]), str(error.get("module")))
        except ChildError:
            self.close()
            raise

    def call(self, name: str, event: Callable[[Any], None], timeout_s: float, **arguments: Any) -> Any:
        """Call one of its functions.

        Args:
            event: gets what the function reports on its way, and a sign of life now and then.
            timeout_s: without a reply or an event for this long, the program is stopped.
        """
        self._number += 1
        request = {"id": self._number, "call": name, "arguments": arguments}
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # its end is told below
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        while True:
            reply = self._reply(time.monotonic() + timeout_s, event)
            if "event" in reply:
                event(reply["event"])
            elif "error" in reply:
                raise ChildError(str(reply["error"]["message"]), str(reply["error"]["kind"]))
            else:
                return reply["result"]

    def close(self) -> None:
        """End it; a process that it left behind too."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._kill()
        for reader in self._readers:
            reader.join(timeout=END_S)
        for stream, reader in zip((self._process.stdout, self._process.stderr), self._readers):
            if stream is not None and not reader.is_alive():
                stream.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _reply(self, deadline_s: float, event: Callable[[Any], None] | None) -> dict[str, Any]:
        while True:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                self._kill()
                raise ChildError("%s did not answer in time and was stopped; %s" % (self._named, self._last()))
            try:
                line = self._lines.get(timeout=min(left_s, BEAT_S))
            except queue.Empty:
                if event is not None:
                    event({"working": self._process.pid})
                continue
            if not line:
                self._lines.put(b"")  # for the next call
                raise ChildError(self._died())
            return json.loads(line)  # type: ignore[no-any-return]

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def _overhear(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode("utf-8", "replace").rstrip()
            self._said.append(text)
            print(text, file=sys.stderr, flush=True)

    def _died(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=END_S)
        self._readers[1].join(timeout=END_S)
        status = self._process.poll()
        how = "signal %d" % -status if status is not None and status < 0 else "exit status %s" % status
        return "%s ended (%s); %s" % (self._named, how, self._last())

    def _last(self) -> str:
        return "last messages: %s" % (" | ".join(self._said) or "none")
