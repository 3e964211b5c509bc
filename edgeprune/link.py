"""Start a program on this machine or another one, and talk to it in lines of text."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence

from .errors import AgentError

STDERR_LINES = 12  # quoted when a program dies


class Process:
    """A running program: write lines, read lines with a deadline, quote what it said last when it dies."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.command = list(command)
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
        """Send one line; raises AgentError when the program is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise self.died() from error

    def read(self, deadline_s: float) -> str:
        """The next line.

        Args:
            deadline_s: on the clock of `time.monotonic`.
        Raises:
            AgentError: the program ended, or said nothing until the deadline.
        """
        try:
            line = self._lines.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            raise AgentError(
                f"{self.command[0]} did not answer in time and was stopped; last messages: {self.last_words()}"
            ) from None
        if line is None:
            raise self.died()
        return line.decode("utf-8", "replace")

    def died(self) -> AgentError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._readers[1].join(timeout=2)
        return AgentError(
            f"the program on the device ended (exit status {self._process.returncode}); last messages: "
            f"{self.last_words()}"
        )

    def last_words(self) -> str:
        return " | ".join(self._said) or "none"

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
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                for reader in self._readers:
                    reader.join(timeout=2)
                stream.close()
