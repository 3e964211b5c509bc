"""Answer requests, one JSON object a line: the main program on the device.

    {"id": 1, "call": "time", "arguments": {...}}        -> any number of {"id": 1, "event": ...},
                                                             then {"id": 1, "result": ...}
                                                             or   {"id": 1, "error": {"kind": ..., "message": ...}}

The first thing on the wire is {"ready": PROTOCOL}. Replies go to the descriptor that was standard output; descriptor 1
itself is pointed at standard error, so that nothing a C library prints can end up between them.

When standard input ends the host is gone, and so is the program, in the middle of a measurement too. Where the link
breaks so that the device does not notice, the host starts the program again with the same session name: that ends what
is left of the last one.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from . import machine

PROTOCOL = 1


def main(argv: list[str]) -> int:
    """Serve the runtime named by the first argument until standard input ends; the second names the session."""
    # standard input too is left empty: runtimes fork, and a child closes the one that a thread here waits for
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # so that its children are known by their group

    def send(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")

    try:
        runtime = importlib.import_module("." + argv[1], __package__)
    except ImportError as error:
        message = "%s: %s" % (argv[1], error)
        send({"error": {"kind": "RuntimeMissing", "message": message, "module": error.name}})
        return 3
    program = runtime.Program()
    calls: dict[str, Callable[..., Any]] = {"state": state, **program.calls()}
    finishes = getattr(program, "finishes", False)
    if len(argv) > 2 and not finishes:
        end_others(argv[2])
    send({"ready": PROTOCOL})
    for line in lines(requests, finishes):
        if line.strip():
            answer(line, calls, send)
    return 0


def state(event: Callable[[Any], None]) -> dict[str, Any]:
    """Load, clock, temperature, and the largest memory this program has had."""
    return dict(machine.state(), peak_memory_bytes=machine.peak_memory_bytes())


def lines(requests: BinaryIO, finish: bool) -> Iterator[bytes]:
    """Requests. When they end in the middle of a call, so do the process and its children, unless it is to finish."""
    waiting: queue.Queue[bytes | None] = queue.Queue()

    def read() -> None:
        for line in requests:
            waiting.put(line)
        if waiting.unfinished_tasks and not finish:
            os.killpg(os.getpgrp(), signal.SIGKILL)
        waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    for line in iter(waiting.get, None):
        yield line
        waiting.task_done()


def end_others(session: str) -> None:
    """Kill device programs of this session that a broken link has left behind."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/cmdline" % name, "rb") as stream:
                arguments = stream.read().decode("utf-8", "replace").split("\0")
            if int(name) != os.getpid() and arguments[-2:-1] == [session]:
                os.kill(int(name), signal.SIGKILL)
        except OSError:
            continue  # it has ended, or it is another user's


def answer(line: bytes, calls: dict[str, Callable[..., Any]], send: Callable[[dict[str, Any]], None]) -> None:
    """Run one request and send its events and its result; an exception becomes an error reply."""
    request = json.loads(line)
    number = request["id"]

    def event(content: Any) -> None:
        send({"id": number, "event": content})

    try:
        send({"id": number, "result": calls[request["call"]](event, **request["arguments"])})
    except MemoryError:
        send({"id": number, "error": {"kind": "MemoryError", "message": "the device is out of memory"}})
    except Exception as error:
        trace = traceback.format_exc().strip().splitlines()[-3:]
        message = "%s: %s" % (type(error).__name__, error)
        send({"id": number, "error": {"kind": type(error).__name__, "message": message, "trace": trace}})
