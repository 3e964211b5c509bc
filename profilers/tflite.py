"""LiteRT on a processor: single layers and whole models as .tflite files, and inference over arrays.

It runs on `ai_edge_litert` or on the older `tflite_runtime`, whichever the device has.
"""

from __future__ import annotations

import base64
import importlib
import os
import subprocess
import zlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from . import litert_operators, machine, timing

METHOD = "1"  # of timing layers: entries of one method do not mix with another's
RUNTIMES = ("ai_edge_litert", "tflite_runtime")
NOTHING = zlib.decompress(
    base64.b64decode(
        "eNptUEuKwkAQfRkbCU5QwSxcZDFHUPQIw+AiCxfuJWAbhExG8hG8wRzCA8wRPI43ia+7S2hlunlUV/FevapOAGy+0kWMBFPEGCNCCHMUM7"
        "AGXIg/4kr8BkCPkYFccwaiUXyBL7AT8EmMiFpXp0OZb3d6n7VFY3WGE4omlF7K1oCftjm2zXYGqUfWo2+5feGZmFV5bViB6JS9zlPvcn2s"
        "2lJ/FNlZV5YT2z5Db0fFzNXNvCsiJdbi8Z0dSrzs6eZ2e4YyW+AB/+RvxFJ63rque+hMvZm7+PCIvL+PPA/LnT1zfc27p5k428kdK6Ahag=="
    )
)  # a model of one ReLU over sixteen numbers: what takes next to no time


def _runtime() -> tuple[Any, str]:
    """The runtime's module of the interpreter, and its name and version; one that cannot run a model does not count."""
    broken = []
    for package in RUNTIMES:
        try:
            module = importlib.import_module(package + ".interpreter")
            module.Interpreter(model_content=NOTHING).allocate_tensors()
            return module, "%s %s" % (package, metadata.version(package.replace("_", "-")))
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != package:
                broken.append("%s: %s" % (package, error))
        except Exception as error:  # with a numpy that it was not built for, it fails in ways of its own
            if package == "tflite_runtime" and int(np.__version__.partition(".")[0]) >= 2:
                reason = "it needs numpy 1, and numpy is %s; python3 -m pip install 'numpy<2'" % np.__version__
            else:
                reason = "%s: %s" % (type(error).__name__, error)
            broken.append("%s is installed and cannot run a model: %s" % (package, reason))
    if broken:
        raise ImportError("; ".join(broken))
    raise ImportError("neither %s nor %s is installed" % RUNTIMES, name="ai_edge_litert")


RUNTIME, VERSION = _runtime()


class Program:
    """The calls of one session: `open` first, then the others."""

    def __init__(self) -> None:
        self.threads = 1
        self.xnnpack = True
        self.call_ms = 0.0

    def calls(self) -> dict[str, Callable[..., Any]]:
        return {"open": self.open, "time": self.time, "run": self.run, "operators": self.operators}

    def open(self, event: Callable[[Any], None], threads: int, xnnpack: bool) -> dict[str, Any]:
        """Fix threads and kernels for the session; returns what the measurements will depend on."""
        self.threads, self.xnnpack = threads, xnnpack
        pinned = machine.pin(threads)
        nothing = self._loaded(NOTHING)
        self.call_ms = timing.in_turn([_ready(nothing)], threads, 30, 60, 0.01, 1.0)[0]["median_ms"]
        described = machine.describe()
        described["processor"] = described["model"]
        described["method"] = METHOD
        described["runtime"] = VERSION
        described["xnnpack"] = "on" if _delegated(nothing) else "not there" if xnnpack else "off"
        return {"machine": described, "pinned": pinned}

    def time(self, event: Callable[[Any], None], items: list[dict[str, Any]], **limits: Any) -> dict[str, Any]:
        """Time layers ({"layer": a packed model}) and whole models ({"model": path}) in turn; all are loaded first.

        What the call itself takes is taken off layers, not off models: an application pays it once. The limits are
        those of `timing.in_turn`.
        """
        runs = []
        for at, item in enumerate(items):
            content = zlib.decompress(base64.b64decode(item["layer"])) if "layer" in item else item["model"]
            runs.append(_ready(self._loaded(content)))
            event({"compiled": at + 1, "of": len(items)})
        timings = timing.in_turn(runs, self.threads, **limits)
        for item, found in zip(items, timings):
            if "layer" in item:
                timing.take_off(found, self.call_ms)
        return {"timings": timings, "peak_memory_bytes": machine.peak_memory_bytes()}

    def run(self, event: Callable[[Any], None], path: str, inputs: list[str], output: str) -> dict[str, Any]:
        """Run a model over saved arrays, one slice of its batch size at a time; save its first output as float32.

        Arrays are of the model's own layout; integer models get and give numbers by their scales.
        """
        arrays = [np.load(name, mmap_mode="r", allow_pickle=False) for name in inputs]
        model = self._loaded(path)
        ports = _ports(model)
        answer = model.get_output_details()[0]
        batch = int(ports[0]["shape"][0])
        results: list[Any] = []
        for start in range(0, len(arrays[0]), batch):
            part = [np.ascontiguousarray(a[start : start + batch]) for a in arrays]
            short = batch - len(part[0])
            for port, values in zip(ports, part):
                if short:
                    values = np.concatenate([values, np.repeat(values[-1:], short, axis=0)])
                model.set_tensor(port["index"], quantised(values, port))
            model.invoke()
            found = numbers(model.get_tensor(answer["index"]), answer)
            results.append(found[: batch - short])
            if start // batch % 100 == 0:
                event({"done": start, "of": len(arrays[0])})
        np.save(output, np.concatenate(results))
        return {"count": len(arrays[0]), "peak_memory_bytes": machine.peak_memory_bytes()}

    def operators(self, event: Callable[[Any], None], path: str) -> dict[str, Any]:
        """What each operator inside a model takes; where that cannot be read, `why`. It is never needed."""
        if VERSION not in litert_operators.KNOWN:
            return {"why": "they are read with %s, not with %s" % (", ".join(litert_operators.KNOWN), VERSION)}
        if self.threads != 1 or not self.xnnpack:
            return {"why": "they are read with one thread and XNNPACK"}
        library = os.path.join(os.path.dirname(os.path.abspath(RUNTIME.__file__)), litert_operators.LIBRARY)
        try:
            return litert_operators.measured(library, path)
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            return {"why": str(error)}

    def _loaded(self, model: Any) -> Any:
        """An interpreter of a model, given by path or as bytes."""
        options: dict[str, Any] = {"num_threads": self.threads}
        if not self.xnnpack:
            options["experimental_op_resolver_type"] = RUNTIME.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        options["model_path" if isinstance(model, str) else "model_content"] = model
        interpreter = RUNTIME.Interpreter(**options)
        interpreter.allocate_tensors()
        return interpreter


def quantised(values: Any, port: dict[str, Any]) -> Any:
    """Numbers as a model's input takes them."""
    kind = port["dtype"]
    if not np.issubdtype(kind, np.integer) or not port["quantization"][0]:
        return np.asarray(values, dtype=kind)
    scale, zero = port["quantization"]
    limits = np.iinfo(kind)
    return np.clip(np.round(values / scale) + zero, limits.min, limits.max).astype(kind)


def numbers(values: Any, port: dict[str, Any]) -> Any:
    """A model's output as float32."""
    scale, zero = port["quantization"]
    return (values.astype(np.float32) - zero) * np.float32(scale) if scale else values.astype(np.float32)


def _ports(model: Any) -> list[dict[str, Any]]:
    """The inputs in the order of the network's arguments: a converter keeps their numbers in the signature's names."""
    ports: list[dict[str, Any]] = model.get_input_details()
    if len(ports) == 1:
        return ports
    named = model.get_signature_runner().get_input_details()
    return [named[name] for name in sorted(named, key=lambda name: int(name.rpartition("_")[2]))]


def _delegated(model: Any) -> bool:
    """Does XNNPACK run this model? Its operators then stand behind one that is called DELEGATE."""
    return any(op["op_name"] == "DELEGATE" for op in model._get_ops_details())


def _ready(model: Any) -> Callable[[], Any]:
    """Fill the inputs at random and run a few times."""
    random = np.random.RandomState(0)
    for port in model.get_input_details():
        model.set_tensor(port["index"], quantised(random.standard_normal(port["shape"]), port))
    for _ in range(3):
        model.invoke()
    return model.invoke  # type: ignore[no-any-return]
