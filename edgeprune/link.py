"""Start a program on this machine or another one, and talk to it in lines of text."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence

from .errors import AgentError, LinkError

STDERR_LINES, QUOTED_LINES = 60, 12  # kept; quoted when a program dies
WRITE_S = 60.0  # a program that takes nothing for this long hangs


class Process:
    """A running program: write lines, read lines with a deadline, quote what it said last when it dies.

    Args:
        command: the program and its arguments.
        environment: of the program; default: this process's.
        link_status: the exit status by which the program says that the link to the device broke.
    """

    def __init__(
        self, command: Sequence[str], environment: dict[str, str] | None = None, link_status: int | None = None
    ) -> None:
        self.command, self._link_status = list(command), link_status
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is ours to handle
            )
        except OSError as error:
            raise AgentError(f"{self.command[0]} could not be started: {error}") from error
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._said: deque[str] = deque(maxlen=STDERR_LINES)
        self._readers = [
            threading.Thread(target=self._read_replies, daemon=True),
            threading.Thread(target=self._drain_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_replies(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _drain_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line.decode("utf-8", "replace").rstrip())

    def write(self, line: str) -> None:
        """Send one line; raises AgentError when the program is gone or takes nothing."""
        self.send(line.encode() + b"\n")

    def send(self, content: bytes) -> None:
        """Send bytes; raises AgentError when the program is gone or takes nothing."""
        assert self._process.stdin is not None
        try:
            handle, left = self._process.stdin.fileno(), memoryview(content)
            os.set_blocking(handle, False)
            while left:
                if not select.select([], [handle], [], WRITE_S)[1]:
                    raise AgentError(f"{self.command[0]} took no input for {WRITE_S:g} s and was stopped")
                with contextlib.suppress(BlockingIOError):
                    left = left[os.write(handle, left) :]
        except (BrokenPipeError, ValueError) as error:
            raise self.died() from error

    def read(self, deadline_s: float) -> str:
        """The next line.

        Args:
            deadline_s: on the clock of `time.monotonic`.
        Raises:
            AgentError: the program ended, or said nothing until the deadline.
        """
        return self.receive(deadline_s).decode("utf-8", "replace")

    def receive(self, deadline_s: float) -> bytes:
        """The next line as it came: bytes up to a newline. Raises as `read` does."""
        try:
            line = self._lines.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            raise AgentError(
                f"{self.command[0]} did not answer in time and was stopped; last messages: {self.last_words()}"
            ) from None
        if line is None:
            raise self.died()
        return line

    def died(self) -> AgentError | LinkError:
        """What became of a program that is gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._readers[1].join(timeout=2)
        if self.status() == self._link_status is not None:
            return LinkError(f"the link to the device broke; last messages: {self.last_words()}")
        return AgentError(
            f"the program on the device ended (exit status {self.status()}); last messages: {self.last_words()}"
        )

    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    def last_words(self, lines: int = QUOTED_LINES) -> str:
        return " | ".join(list(self._said)[-lines:]) or "none"

    def close(self) -> None:
        """End the program: politely, then not."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._join()
        if any(reader.is_alive() for reader in self._readers):  # a process that it left behind holds its output
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._join()
        for stream, reader in zip((self._process.stdout, self._process.stderr), self._readers, strict=True):
            if stream is not None and not reader.is_alive():
                stream.close()

    def _join(self) -> None:
        for reader in self._readers:
            reader.join(timeout=2)
