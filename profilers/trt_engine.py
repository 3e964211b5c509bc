"""A TensorRT engine ready to run: its buffers, its CUDA graph, the times of its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from .cuda_driver import Driver, DriverError, Graph
from .trt_api import Api, BuildError

WARM, LAUNCHES, PROFILED = 3, 5, 30
NOTHING_BYTES = 4
TYPES = {
    "FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "UINT8": np.uint8, "INT32": np.int32, "INT64": np.int64,
    "BOOL": np.bool_,
}  # fmt: skip


class Engine:
    """One network on the GPU, with random inputs.

    Args:
        api, driver: TensorRT, and the GPU.
        plan: an engine that was built for it.
    Raises:
        BuildError: it cannot be loaded. DriverError: no memory is left.
    """

    def __init__(self, api: Api, driver: Driver, plan: bytes) -> None:
        self._api, self._driver = api, driver
        self._stream = driver.stream()
        self._addresses: list[int] = []
        self._graph: Graph | None = None
        self._engine: Any = None
        self._context: Any = None
        self.why_no_graph = ""
        self.inputs: list[tuple[str, Any]] = []  # (name, an array of its shape and type)
        self.outputs: list[tuple[str, Any]] = []
        try:
            self._load(plan)
        except BaseException:
            self.close()  # what was allocated before the memory ran out
            raise

    def _load(self, plan: bytes) -> None:
        api, driver = self._api, self._driver
        engine = api.loaded(plan)
        context = engine.create_execution_context()
        if context is None:
            raise BuildError("%s cannot run an engine: %s" % (api.name, api.log.said() or "no memory is left"))
        self._engine, self._context = engine, context  # the context needs the engine for as long as it lives
        random, kinds = np.random.RandomState(0), api.module.TensorIOMode
        for at in range(engine.num_io_tensors):
            name = engine.get_tensor_name(at)
            array = np.zeros(tuple(context.get_tensor_shape(name)), type_of(engine.get_tensor_dtype(name)))
            address = driver.allocated(array.nbytes)
            self._addresses.append(address)
            is_input = engine.get_tensor_mode(name) == kinds.INPUT
            (self.inputs if is_input else self.outputs).append((name, array))
            if is_input and array.dtype.kind == "f":
                array[...] = random.standard_normal(array.shape)
            if is_input:
                driver.send(address, array)
            context.set_tensor_address(name, address)

    def ready(self) -> None:
        """Run a few times, then capture the graph; where that cannot be, every run is enqueued."""
        for _ in range(WARM):
            self._enqueue()
        self._stream.wait()
        try:
            self._graph = self._stream.captured(self._enqueue)
        except (DriverError, BuildError) as error:
            self.why_no_graph = str(error)

    def visit(self) -> tuple[float, bool, int]:
        """Seconds of one run on the GPU: the median of a few, after a warm one."""
        enqueue = self._graph.launch if self._graph is not None else self._enqueue
        enqueue()
        each = [self._stream.timed_ms(enqueue) for _ in range(LAUNCHES)]
        return float(np.median(each)) / 1000.0, True, LAUNCHES + 1

    def layers(self) -> list[tuple[str, float]]:
        """(name, ms) of each layer in the order they run: medians, by TensorRT's own profiler, without the graph."""
        profiler, context = self._api.profiler(), self._engine.create_execution_context()
        if context is None:
            raise BuildError("no memory is left to profile an engine: %s" % self._api.log.said())
        context.profiler, context.enqueue_emits_profile = profiler, False
        for name, _ in (*self.inputs, *self.outputs):
            context.set_tensor_address(name, self._context.get_tensor_address(name))
        runs: list[list[tuple[str, float]]] = []
        for _ in range(WARM + PROFILED):
            profiler.rows = []
            context.execute_async_v3(self._stream.number)
            self._stream.wait()
            context.report_to_profiler()
            runs.append(profiler.rows)
        kept = [run for run in runs[WARM:] if [n for n, _ in run] == [n for n, _ in runs[-1]]]
        middle = np.median([[ms for _, ms in run] for run in kept], axis=0)
        return [(name, float(ms)) for (name, _), ms in zip(kept[0], middle)]

    def description(self) -> str:
        return self._api.description(self._engine, self._context)

    def answer(self, arrays: list[Any]) -> Any:
        """The first output for inputs of the engine's own shapes, as float32."""
        for (name, kept), array in zip(self.inputs, arrays):
            self._driver.send(self._context.get_tensor_address(name), np.ascontiguousarray(array, dtype=kept.dtype))
        self._enqueue()
        self._stream.wait()
        name, output = self.outputs[0]
        self._driver.fetch(output, self._context.get_tensor_address(name))
        return output.astype(np.float32)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.number):
            raise BuildError("%s could not run the engine: %s" % (self._api.name, self._api.log.said()))

    def close(self) -> None:
        """Give the memory back, the engine's own too."""
        if self._graph is not None:
            self._graph.close()
        self._context = self._engine = None
        for address in self._addresses:
            with contextlib.suppress(DriverError):
                self._driver.release(address)
        self._stream.close()


def launch_ms(driver: Driver, median: Callable[[list[float]], Any] = np.median) -> float:
    """What a graph takes in which next to nothing is done."""
    stream, address = driver.stream(), driver.allocated(NOTHING_BYTES)
    graph = stream.captured(lambda: stream.clear(address, NOTHING_BYTES))
    for _ in range(WARM):
        graph.launch()
    found = float(median([stream.timed_ms(graph.launch) for _ in range(100)]))
    graph.close()
    driver.release(address)
    stream.close()
    return found


def type_of(kind: Any) -> Any:
    """numpy's type for one of TensorRT's; their own table fails with newer releases of numpy."""
    name = str(kind).rpartition(".")[2]
    if name not in TYPES:
        raise BuildError("the network takes or gives %s, which numpy does not have" % name)
    return TYPES[name]
