"""TensorRT by its own program `trtexec`, for devices without the Python module. Slower: a process for each step.

Which options it has is read from its help text. `--useCudaGraph --noDataTransfers --useSpinWait --separateProfileRun`
together give the same measurement in every release; in 11 they are the default and still accepted.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from . import jetson, onnx_inputs, timing, trt_cache, trt_reports
from .child import ChildError
from .cuda_driver import Driver
from .trt_worker import kinds_of, share_of_layer

USUAL = "/usr/src/tensorrt/bin/trtexec"
VERSION = re.compile(r"\[TensorRT v(\d+)\]")
MEASURE = ("--useCudaGraph", "--noDataTransfers", "--useSpinWait", "--separateProfileRun")
SAMPLES = 60  # of a run's times that are kept, evenly spread
SAID = 4  # lines of errors that are quoted
POLL_S = 15.0
FLAGS = {"f16": "fp16", "int8": "int8"}


def found() -> str:
    """Its path; "" where there is none."""
    named = os.environ.get("TRTEXEC", "")
    return next(
        (path for path in (named, shutil.which("trtexec") or "", USUAL) if path and os.access(path, os.X_OK)), ""
    )


def version(text: str) -> str:
    """`8.5.2` from `[TensorRT v8502]`, `10.3.0` from `[TensorRT v100300]`; "" where it is not told."""
    told = VERSION.search(text)
    if told is None:
        return ""
    number = int(told.group(1)[:9])
    step = 100 if number >= 100_000 else 10
    return "%d.%d.%d" % (number // (step * 100), number // 100 % step, number % 100)


def build_command(
    program: str, flags: frozenset[str], wish: dict[str, Any], onnx: str, engine: str, cache: str
) -> list[str]:
    """How to build an engine with this release.

    Args:
        flags: that its help text lists.
        wish: see `trt_api.Wish`; and `device`.
    Raises:
        ChildError: an accelerator was asked for that this release does not know.
    """
    command = [program, "--onnx=" + onnx, "--saveEngine=" + engine, "--profilingVerbosity=detailed"]
    command += ["--device=%d" % wish["device"]]
    only = next((name for name in ("skipInference", "buildOnly") if name in flags), None)
    command += ["--" + only] if only else []
    command += ["--timingCacheFile=" + cache] if cache and "timingCacheFile" in flags else []
    if "memPoolSize" in flags:
        command += ["--memPoolSize=workspace:%d" % wish["workspace_mib"]]
    elif "workspace" in flags:
        command += ["--workspace=%d" % wish["workspace_mib"]]
    command += ["--noTF32"] if not wish["tf32"] and "noTF32" in flags else []
    flag = FLAGS.get(wish["precision"], "")
    if "stronglyTyped" in flags:
        command += ["--stronglyTyped"]
    elif flag in flags:
        command += ["--" + flag]
    if not wish["external_tactics"] and "tacticSources" in flags:
        command += ["--tacticSources=-CUDNN,-CUBLAS,-CUBLAS_LT"]
    if wish["dla"] >= 0:
        if "useDLACore" not in flags:
            raise ChildError(
                "DLA core %d was asked for, and this trtexec has no --useDLACore; leave `dla` out" % wish["dla"]
            )
        command += ["--useDLACore=%d" % wish["dla"], "--allowGPUFallback"]
    return command


def measure_command(program: str, engine: str, device: int, folder: str, seconds: int, runs: int) -> list[str]:
    """How to time an engine and its layers; the reports go to times.json, profile.json and layers.json in `folder`."""
    command = [program, "--loadEngine=" + engine, "--device=%d" % device, *MEASURE, "--warmUp=500"]
    command += ["--duration=%d" % seconds, "--iterations=%d" % runs]
    exports = {"Times": "times", "Profile": "profile", "LayerInfo": "layers"}
    return command + ["--export%s=%s/%s.json" % (kind, folder, name) for kind, name in exports.items()]


class Trtexec:
    """The same calls as `trt_worker`, through trtexec. Made like a `child.Child`, and closed like one."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._wish: dict[str, Any] = {}
        self._flags: frozenset[str] = frozenset()
        self._facts: dict[str, Any] = {}
        self._cache = trt_cache.Cache()
        self._kept = tempfile.TemporaryDirectory(prefix="edgeprune-trtexec-")
        self._folder = self._kept.name

    def call(self, name: str, event: Callable[[Any], None], timeout_s: float, **arguments: Any) -> Any:
        self._deadline_s = time.monotonic() + timeout_s
        self._event = event
        return getattr(self, "_" + name)(**arguments)

    def close(self) -> None:
        self._kept.cleanup()

    def _open(self, device: int, power_mode: str, wish: dict[str, Any]) -> dict[str, str]:
        about = Driver(device).describe()
        text = self._ran([self._program, "--help"])
        told = jetson.said([self._program, "--loadEngine=/nowhere"])  # the help text does not tell the release
        self._flags, self._wish = trt_reports.flags(text), dict(wish, device=device)
        runtime = "tensorrt " + (version(text) or version(told) or "of an unknown version")
        self._facts = {**about, "runtime": runtime, "power_mode": power_mode, "by": "trtexec", **wish}
        return {**about, "runtime": runtime, "backend": "trtexec"}

    def _build(self, path: str) -> dict[str, Any]:
        with open(path, "rb") as stream:
            return {"size_bytes": os.path.getsize(self._engine(stream.read()))}

    def _time(
        self, items: list[dict[str, Any]], least: int, most: int, interval: float, budget_s: float
    ) -> list[dict[str, Any]]:
        timings = []
        for at, item in enumerate(items):
            timings.append(self._item(item, max(1, round(budget_s / len(items)))))
            self._event({"compiled": at + 1, "of": len(items)})
        return timings

    def _item(self, item: dict[str, Any], seconds: int) -> dict[str, Any]:
        if "model" in item:
            with open(item["model"], "rb") as stream:
                return self._measured(stream.read(), seconds)[0]
        for at, (packed, nodes) in enumerate(item["forms"]):
            found, rows, kinds = self._measured(zlib.decompress(base64.b64decode(packed)), seconds)
            share = share_of_layer(rows, kinds, nodes, last=at + 1 == len(item["forms"]))
            if share is not None:
                timing.scale(found, share)
                return found
        raise ChildError("the engine of a layer has no time of its own; please report this layer")

    def _measured(self, content: bytes, seconds: int) -> tuple[dict[str, Any], list[tuple[str, float]], dict[str, str]]:
        engine = self._engine(content)
        self._ran(measure_command(self._program, engine, self._wish["device"], self._folder, seconds, 100))
        times, profile, description = (self._report(name) for name in ("times", "profile", "layers"))
        every = trt_reports.times(times)
        kept = [every[int(at)] for at in np.linspace(0, len(every) - 1, min(len(every), SAMPLES))]
        return timing.summary(kept, len(every), 0), trt_reports.profile(profile), kinds_of(description)

    def _layers(self, path: str) -> dict[str, Any]:
        with open(path, "rb") as stream:
            found, rows, kinds = self._measured(stream.read(), 3)
        layers = [[name, kinds.get(name, ""), ms] for name, ms in rows]
        return {"layers": layers, "whole_ms": found["median_ms"], "description": self._report("layers")}

    def _run(self, path: str, inputs: list[str], output: str) -> dict[str, Any]:
        """A process for every slice: for a smoke test and a few images, not for a test set."""
        arrays = [np.load(name, mmap_mode="r", allow_pickle=False) for name in inputs]
        with open(path, "rb") as stream:
            content = stream.read()
        engine, ports = self._engine(content), onnx_inputs.inputs(content)
        names, batch = [name for name, _ in ports], ports[0][1][0]
        results: list[Any] = []
        for start in range(0, len(arrays[0]), batch):
            part = [np.asarray(a[start : start + batch], dtype=np.float32) for a in arrays]
            short = batch - len(part[0])
            if short:
                part = [np.concatenate([p, np.repeat(p[-1:], short, axis=0)]) for p in part]
            results.append(self._answer(engine, names, part, batch)[: batch - short])
            self._event({"done": start, "of": len(arrays[0])})
        np.save(output, np.concatenate(results))
        return {"count": len(arrays[0])}

    def _answer(self, engine: str, names: list[str], part: list[Any], batch: int) -> Any:
        given = []
        for at, (name, array) in enumerate(zip(names, part)):
            path = "%s/input%d.bin" % (self._folder, at)
            np.ascontiguousarray(array).tofile(path)
            given.append("'%s':%s" % (name, path))
        command = [self._program, "--loadEngine=" + engine, "--loadInputs=" + ",".join(given)]
        command += ["--iterations=1", "--warmUp=0", "--duration=0", "--exportOutput=%s/output.json" % self._folder]
        self._ran(command)
        values = np.asarray(trt_reports.output(self._report("output")), dtype=np.float32)
        return values.reshape(batch, -1)

    def _engine(self, content: bytes) -> str:
        """The path of a network's engine, built where it is not there."""
        name = trt_cache.key(content, self._facts)
        path = self._cache.path(name)
        if not os.path.exists(path):
            onnx, beside = self._folder + "/network.onnx", "%s.%d" % (path, os.getpid())
            with open(onnx, "wb") as stream:
                stream.write(content)
            cache = self._cache.path("timing-" + trt_cache.key(b"", self._facts))
            self._ran(build_command(self._program, self._flags, self._wish, onnx, beside, cache))
            if not os.path.exists(beside):
                raise ChildError("trtexec ended well and wrote no engine; look at its output on the device")
            os.replace(beside, path)
            self._cache.trim(name)
        return path

    def _report(self, name: str) -> str:
        try:
            with open("%s/%s.json" % (self._folder, name), encoding="utf-8", errors="replace") as stream:
                return stream.read()
        except OSError as error:
            raise ChildError("trtexec wrote no report of %s: %s" % (name, error)) from error

    def _ran(self, command: list[str]) -> str:
        """What it prints; raises ChildError with its own errors when it fails or does not end."""
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)
            while True:
                try:
                    process.wait(timeout=POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    self._event({"working": process.pid})
                if time.monotonic() > self._deadline_s:
                    process.kill()
                    process.wait()
                    raise ChildError("trtexec did not end in time and was stopped")
            said.seek(0)
            text = said.read().decode("utf-8", "replace")
        if process.returncode:
            errors = [line.strip() for line in text.split("\n") if "[E]" in line or "rror" in line][-SAID:]
            words = " | ".join(errors) or text.strip()[-300:] or "it said nothing"
            raise ChildError("trtexec failed (exit status %d): %s" % (process.returncode, words))
        return text
