"""Answer requests, one JSON object a line: the main program on the device.

    {"id": 1, "call": "time", "arguments": {...}}        -> any number of {"id": 1, "event": ...},
                                                             then {"id": 1, "result": ...}
                                                             or   {"id": 1, "error": {"kind": ..., "message": ...}}

The first thing on the wire is {"ready": PROTOCOL}. Replies go to the descriptor that was standard output; descriptor 1
itself is pointed at standard error, so that nothing a C library prints can end up between them.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

PROTOCOL = 1


def main(argv: list[str]) -> int:
    """Serve the runtime named by the first argument until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")

    try:
        runtime = importlib.import_module("." + argv[1], __package__)
    except ImportError as error:
        send({"error": {"kind": "RuntimeMissing", "message": "%s: %s" % (argv[1], error)}})
        return 3
    calls: dict[str, Callable[..., Any]] = runtime.Program().calls()
    send({"ready": PROTOCOL})
    for line in sys.stdin:
        if line.strip():
            answer(line, calls, send)
    return 0


def answer(line: str, calls: dict[str, Callable[..., Any]], send: Callable[[dict[str, Any]], None]) -> None:
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
