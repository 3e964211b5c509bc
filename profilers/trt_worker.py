"""TensorRT's Python module on one GPU. It runs as a child of `tensorrt`, for it can take a process down with it.

The driver is asked before anything of TensorRT is touched.
"""

from __future__ import annotations

import base64
import contextlib
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import timing, trt_api, trt_cache, trt_names, trt_reports
from .cuda_driver import Driver
from .trt_api import Api, BuildError, Wish
from .trt_engine import Engine, launch_ms

LAYER = "layer"  # the module that a layer's own nodes are called after, in the network built around it
WARM_UP_S = 0.5  # until the GPU's clocks are up


class Program:
    """The calls of one session: `open` first, then the others."""

    def __init__(self) -> None:
        self._facts: dict[str, Any] = {}
        self._launch_ms = 0.0

    def calls(self) -> dict[str, Callable[..., Any]]:
        return {"open": self.open, "build": self.build, "time": self.time, "run": self.run, "layers": self.layers}

    def open(self, event: Callable[[Any], None], device: int, power_mode: str, wish: dict[str, Any]) -> dict[str, str]:
        """Find the GPU, then TensorRT; returns what measurements will depend on."""
        self._driver = Driver(device)
        self._driver.use()
        self._api, self._wish = Api(trt_api.imported()), Wish(**wish)
        self._cache = trt_cache.Cache()
        about = self._driver.describe()
        runtime = "%s %s" % (self._api.name, self._api.version)
        self._facts = {**about, "runtime": runtime, "power_mode": power_mode, **wish}
        self._launch_ms = launch_ms(self._driver)
        return {**about, "runtime": runtime, "backend": "python"}

    def build(self, event: Callable[[Any], None], path: str) -> dict[str, Any]:
        """Build a network and keep its engine."""
        with open(path, "rb") as stream:
            return {"size_bytes": len(self._plan(stream.read()))}

    def time(
        self, event: Callable[[Any], None], items: list[dict[str, Any]], least: int, most: int, interval: float,
        budget_s: float,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Time layers ({"forms": [[packed network, its nodes], ...]}) and whole models ({"model": path}) in turn.

        Through a CUDA graph, without the profiler. Of the first form of a layer in whose fused engine it can be told
        from its neighbours, it gets its share of the time, by the profiler.
        """
        with contextlib.ExitStack() as stack:
            loaded = []
            for at, item in enumerate(items):
                engine, share = self._item(item)
                stack.callback(engine.close)
                loaded.append((engine, share))
                event({"compiled": at + 1, "of": len(items)})
            self._warm_up([engine for engine, _ in loaded])
            found = timing.visited_in_turn([e.visit for e, _ in loaded], least, most, interval, budget_s)
            for (engine, share), one in zip(loaded, found):
                one["why_no_graph"] = engine.why_no_graph
                if share is not None:
                    timing.take_off(one, self._launch_ms)
                    timing.scale(one, share)
        return found

    def _item(self, item: dict[str, Any]) -> tuple[Engine, float | None]:
        if "model" in item:
            with open(item["model"], "rb") as stream:
                return self._engine(stream.read()), None
        for at, (packed, nodes) in enumerate(item["forms"]):
            engine = self._engine(zlib.decompress(base64.b64decode(packed)))
            share = share_of_layer(*self._rows(engine), nodes, last=at + 1 == len(item["forms"]))
            if share is not None:
                return engine, share
            engine.close()
        raise BuildError("the engine of a layer has no time of its own; please report this layer")

    def run(self, event: Callable[[Any], None], path: str, inputs: list[str], output: str) -> dict[str, Any]:
        """Run a model over saved arrays, one slice of its batch size at a time; save its first output as float32."""
        arrays = [np.load(name, mmap_mode="r", allow_pickle=False) for name in inputs]
        results: list[Any] = []
        with self._model(path) as engine:
            batch = engine.inputs[0][1].shape[0]
            for start in range(0, len(arrays[0]), batch):
                part = [np.asarray(a[start : start + batch]) for a in arrays]
                short = batch - len(part[0])
                if short:
                    part = [np.concatenate([p, np.repeat(p[-1:], short, axis=0)]) for p in part]
                results.append(engine.answer(part)[: batch - short])
                if start // batch % 100 == 0:
                    event({"done": start, "of": len(arrays[0])})
        np.save(output, np.concatenate(results))
        return {"count": len(arrays[0])}

    def layers(self, event: Callable[[Any], None], path: str) -> dict[str, Any]:
        """(layer, kind, ms) of a model's fused engine as they run, and its time end to end without the profiler."""
        with self._model(path) as engine:
            self._warm_up([engine])
            whole = timing.visited_in_turn([engine.visit], 25, 50, 0.005, 5.0)[0]
            rows, kinds = self._rows(engine)
            text = engine.description()
        return {
            "layers": [[name, kinds.get(name, ""), ms] for name, ms in rows],
            "whole_ms": whole["median_ms"],
            "description": text,
        }

    # ---- inside

    @contextlib.contextmanager
    def _model(self, path: str) -> Iterator[Engine]:
        with open(path, "rb") as stream:
            engine = self._engine(stream.read())
        try:
            yield engine
        finally:
            engine.close()

    def _plan(self, content: bytes) -> bytes:
        name = trt_cache.key(content, self._facts)
        plan = self._cache.get(name)
        if plan is None:
            plan = self._api.build(content, self._wish, self._cache.path("timing-" + trt_cache.key(b"", self._facts)))
            self._cache.put(name, plan)
        return plan

    def _engine(self, content: bytes) -> Engine:
        """A network's engine, ready to run; one from the cache that does not load is built anew."""
        name = trt_cache.key(content, self._facts)
        kept, engine = self._cache.get(name), None
        if kept is not None:
            try:
                engine = Engine(self._api, self._driver, kept)
            except BuildError:
                self._cache.drop(name)
        if engine is None:
            engine = Engine(self._api, self._driver, self._plan(content))
        engine.ready()
        return engine

    def _rows(self, engine: Engine) -> tuple[list[tuple[str, float]], dict[str, str]]:
        rows = [(trt_reports.clean(name), ms) for name, ms in engine.layers()]
        return rows, kinds_of(engine.description())

    def _warm_up(self, engines: list[Engine]) -> None:
        began = time.perf_counter()
        while engines and time.perf_counter() - began < WARM_UP_S:
            for engine in engines:
                engine.visit()


def kinds_of(description: str) -> dict[str, str]:
    """Layer -> kind by the inspector; {} where it tells nothing."""
    try:
        return {str(layer["name"]): str(layer["kind"]) for layer in trt_reports.layers(description)}
    except trt_reports.ReportError:
        return {}


def share_of_layer(rows: list[tuple[str, float]], kinds: dict[str, str], nodes: list[str], last: bool) -> float | None:
    """Which part of an engine's time is its layer's; None when it cannot be told.

    Args:
        rows, kinds: of the engine's layers.
        nodes: of the network; the layer's own are `layer/...`.
        last: there is no other form: then all that is no reformat is the layer's.
    """
    found = trt_names.gathered(rows, trt_names.Names(nodes), kinds)
    total = sum(found.values())
    if total <= 0:
        return None
    if last:
        return max(total - found.get(trt_names.REFORMATS, 0.0), 0.0) / total or None
    mixed = found.get(trt_names.MIXED, 0.0) > 0 or found.get(trt_names.UNKNOWN, 0.0) > 0
    return None if mixed or not found.get(LAYER) else found[LAYER] / total
