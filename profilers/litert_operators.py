"""Times of the operators inside a .tflite model, by the C profiler in LiteRT's own library.

Its interface is not documented and changes between releases: it is used with the releases it was tried with, and in a
process of its own, so that a mistake about it ends nothing else.

    python3 -m device.litert_operators LIBRARY MODEL RUNS   -> {"whole_us": 812.0, "operators": [["Conv2D", 97.0], ...]}
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
from typing import Any

KNOWN = ("ai_edge_litert 2.3.0",)
LIBRARY = "libLiteRt.so"
CPU = 1  # of the accelerators
EVENT, EVENT_BYTES = struct.Struct("<QIIQQ"), 104  # tag, type, -, start, elapsed microseconds, and more
INVOKE, OPERATORS = 1, (2, 8)  # types of events: one run of the model; an operator of it, 8 in XNNPACK
WARM, RUNS = 5, 40
LIMIT_S = 120.0


def measured(library: str, path: str, runs: int = RUNS) -> dict[str, Any]:
    """Operators in the order they run, microseconds each, measured in a child process.

    Raises:
        RuntimeError: the child failed; the message says how.
    """
    package, environment = __package__ or "", dict(os.environ, PYTHONPATH=sys.path[0] or os.getcwd())
    if package != "device":  # not inside the zip: beside this file
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", package + ".litert_operators", library, path, str(runs)]
    done = subprocess.run(command, capture_output=True, timeout=LIMIT_S, env=environment, check=False)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise RuntimeError("LiteRT's profiler ended with status %d: %s" % (done.returncode, " ".join(said) or "silent"))
    return json.loads(done.stdout)  # type: ignore[no-any-return]


class _Calls:
    """The library's functions; each returns 0 or fails."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)

    def __call__(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, "LiteRt" + name)(*arguments)
        if status:
            raise RuntimeError("LiteRt%s failed (status %d)" % (name, status))

    def make(self, name: str, *arguments: Any) -> Any:
        """Call a function that gives an object through its last argument."""
        found = ctypes.c_void_p()
        self(name, *arguments, ctypes.byref(found))
        return found


def profile(library: str, path: str, runs: int) -> dict[str, Any]:
    """Load a model, run it, and read what the profiler counted."""
    call = _Calls(library)
    environment = call.make("CreateEnvironment", 0, None)
    model = call.make("CreateModelFromFile", environment, path.encode())
    options, kept = _options(call)
    compiled = call.make("CreateCompiledModel", environment, model, options)
    profiler = call.make("CompiledModelGetProfiler", compiled)
    inputs, outputs = (_buffers(call, environment, model, compiled, kind) for kind in ("Input", "Output"))

    def run() -> None:
        many = ctypes.c_size_t(len(inputs)), inputs, ctypes.c_size_t(len(outputs)), outputs
        call("RunCompiledModel", compiled, ctypes.c_size_t(0), *many)

    for _ in range(WARM):
        run()
    call("StartProfiler", profiler)
    for _ in range(runs):
        run()
    call("StopProfiler", profiler)
    assert kept  # until here the library may call back
    return summary(_events(call, profiler))


def _options(call: _Calls) -> tuple[Any, list[Any]]:
    """On the processor, with the profiler on; the second is to be kept for as long as the model is."""
    options = call.make("CreateOptions")
    call("SetOptionsHardwareAccelerators", options, ctypes.c_int(CPU))
    c = ctypes.CDLL(None)
    c.strdup.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(c.free)
    name, text = (ctypes.c_void_p(c.strdup(t)) for t in (b"runtime_options_string", b"enable_profiling = true\n"))
    call("AddOpaqueOptions", options, call.make("CreateOpaqueOptions", name, text, free))
    return options, [free]


def _buffers(call: _Calls, environment: Any, model: Any, compiled: Any, kind: str) -> Any:
    """A buffer for each input or output."""
    first, count = ctypes.c_size_t(0), ctypes.c_size_t()
    signature = call.make("GetModelSignature", model, first)
    call("GetNumSignature%ss" % kind, signature, ctypes.byref(count))
    buffers = (ctypes.c_void_p * count.value)()
    for at in range(count.value):
        place = ctypes.c_size_t(at)
        tensor = call.make("GetSignature%sTensorByIndex" % kind, signature, place)
        ranked = ctypes.create_string_buffer(512)
        call("GetRankedTensorType", tensor, ranked)
        needs = call.make("GetCompiledModel%sBufferRequirements" % kind, compiled, first, place)
        buffers[at] = call.make("CreateManagedTensorBufferFromRequirements", environment, ranked, needs)
    return buffers


def _events(call: _Calls, profiler: Any) -> list[tuple[str, int, int]]:
    """(name, type, microseconds) in the order of time."""
    count = ctypes.c_int()
    call("GetNumProfilerEvents", profiler, ctypes.byref(count))
    raw = ctypes.create_string_buffer(max(count.value, 1) * EVENT_BYTES)
    call("GetProfilerEvents", profiler, count, raw)
    found = []
    for at in range(count.value):
        tag, kind, _, _, elapsed_us = EVENT.unpack_from(raw.raw, at * EVENT_BYTES)
        found.append((ctypes.string_at(tag).decode("utf-8", "replace"), kind, elapsed_us))
    return found


def summary(events: list[tuple[str, int, int]]) -> dict[str, Any]:
    """Typical times over the runs, by each operator's place in a run."""
    whole: list[int] = []
    times: dict[tuple[int, str], list[int]] = {}
    at = 0
    for name, kind, elapsed_us in events:
        if kind == INVOKE and name == "Invoke":
            whole.append(elapsed_us)
            at = 0
        elif kind in OPERATORS:
            times.setdefault((at, name), []).append(elapsed_us)
            at += 1
    often = {place: values for place, values in times.items() if len(values) > len(whole) // 2}
    each = [[name, _middle(values)] for (_, name), values in sorted(often.items())]
    return {"whole_us": _middle(whole), "operators": each}


def _middle(values: list[int]) -> float:
    """The mean of the middle half: as steady as a median, and finer than the whole microseconds that are counted."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    inner = ordered[quarter : len(ordered) - quarter]
    return sum(inner) / float(len(inner))


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump(profile(sys.argv[1], sys.argv[2], int(sys.argv[3])), replies)
    replies.flush()
