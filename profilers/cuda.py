"""Plain CUDA through torch: layers and whole models in CUDA graphs, and inference over arrays.

Launching a kernel from Python takes longer than most small layers run, so everything is captured and replayed. A layer
is captured many times in a row over inputs that rotate, so that it does not always find them in the cache. TF32 and
the search for kernels are as the session says, not as torch's defaults are.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from . import gpu_state, jetson, machine, timing
from .cuda_driver import Driver

METHOD = "1"  # of timing layers: entries of one method do not mix with another's
TYPES = {"f32": torch.float32, "f16": torch.float16}
REPEATS, BUFFERS = 20, 4  # of a layer in one graph; inputs that they take in turn
WARM, LAUNCHES = 3, 5
WARM_UP_S = 0.5  # until the GPU's clocks are up
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid, "gelu": F.gelu, "leaky_relu": F.leaky_relu, "elu": F.elu, "tanh": torch.tanh,
    "mish": F.mish,
}  # fmt: skip


class CudaError(RuntimeError):
    """CUDA cannot be used, or failed; the message says what to do."""


class Program:
    """The calls of one session: `open` first, then the others."""

    def __init__(self) -> None:
        self._kind, self._device, self._last = torch.float32, 0, True
        self._launch_ms = 0.0

    def calls(self) -> dict[str, Callable[..., Any]]:
        return {"open": self.open, "state": self.state, "time": self.time, "run": self.run}

    def open(
        self, event: Callable[[Any], None], precision: str, device: int, tf32: bool, autotune: bool, channels_last: bool
    ) -> dict[str, Any]:
        """Find the GPU and fix how it computes for the session; returns what the measurements will depend on."""
        if precision not in TYPES:
            raise ValueError("precision %r; plain CUDA measures %s" % (precision, ", ".join(sorted(TYPES))))
        about = Driver(device).describe()
        if not torch.cuda.is_available():
            raise CudaError(usable(torch.version.cuda, torch.__version__, about["cuda"]))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = autotune
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        self._kind, self._device, self._last = TYPES[precision], device, channels_last
        described = dict(machine.describe(), **jetson.describe())
        described.update(about, method=METHOD, tf32=str(tf32), autotune=str(autotune), channels_last=str(channels_last))
        described["cudnn"] = str(torch.backends.cudnn.version())
        described["processor"] = described.get("board") or about["gpu"]
        described["runtime"] = "torch %s, CUDA %s" % (torch.__version__, torch.version.cuda)
        with explained():
            nothing = torch.zeros(1, device="cuda")
            graph = captured(lambda at: nothing.zero_(), 1)
            _warm_up([graph])
            self._launch_ms = float(np.median([_timed_ms(graph) for _ in range(100)]))
        return {"machine": described}

    def state(self, event: Callable[[Any], None]) -> dict[str, Any]:
        return gpu_state.state(self._device)

    def time(
        self, event: Callable[[Any], None], items: list[dict[str, Any]], least: int, most: int, interval: float,
        budget_s: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Time layers ({"layer": shape}) and whole models ({"model": path}) in turn, each replayed from its graph.

        What launching a graph takes is taken off layers, not off models: an application pays it once.
        """
        visits, repeats = [], []
        with explained(), torch.inference_mode():
            for at, item in enumerate(items):
                repeats.append(REPEATS if "layer" in item else 1)
                call = self._layer(item["layer"]) if "layer" in item else self._model(item["model"])
                visits.append(_visits(captured(call, repeats[-1])))
                event({"compiled": at + 1, "of": len(items)})
            _warm_up([])
            timings = timing.visited_in_turn(visits, least, most, interval, budget_s)
        for found, count in zip(timings, repeats):
            if count > 1:
                timing.take_off(found, self._launch_ms)
                timing.scale(found, 1.0 / count)
        return {"timings": timings, "state": self.state(event)}

    def run(self, event: Callable[[Any], None], path: str, inputs: list[str], output: str) -> dict[str, Any]:
        """Run a model over saved arrays, one slice of its batch size at a time; save its first output as float32."""
        arrays = [np.load(name, mmap_mode="r", allow_pickle=False) for name in inputs]
        results: list[Any] = []
        with explained(), torch.inference_mode():
            module, shapes = loaded(path, self._kind, self._last)
            batch = shapes[0][0]
            for start in range(0, len(arrays[0]), batch):
                part = [np.ascontiguousarray(a[start : start + batch], dtype=np.float32) for a in arrays]
                short = batch - len(part[0])
                if short:
                    part = [np.concatenate([p, np.repeat(p[-1:], short, axis=0)]) for p in part]
                found = first(module(*(self._placed(torch.from_numpy(p)) for p in part)))
                results.append(found.float().cpu().numpy()[: batch - short])
                if start // batch % 100 == 0:
                    event({"done": start, "of": len(arrays[0])})
        np.save(output, np.concatenate(results))
        return {"count": len(arrays[0])}

    def _placed(self, tensor: Any) -> Any:
        """A tensor on the GPU, of the session's type and layout."""
        tensor = tensor.to("cuda", self._kind)
        return tensor.contiguous(memory_format=torch.channels_last) if self._last and tensor.dim() == 4 else tensor

    def _layer(self, shape: dict[str, Any]) -> Callable[[int], Any]:
        call, sizes = layer(shape, self._placed)
        inputs = [[self._placed(torch.randn(size)) for size in sizes] for _ in range(BUFFERS)]
        return lambda at: call(*inputs[at % BUFFERS])

    def _model(self, path: str) -> Callable[[int], Any]:
        module, shapes = loaded(path, self._kind, self._last)
        inputs = [self._placed(torch.randn(shape)) for shape in shapes]
        return lambda at: module(*inputs)


def usable(built_for: str | None, version: str, driver: str) -> str:
    """Why torch cannot use a GPU that the driver has."""
    if built_for is None:
        return (
            "torch %s is built without CUDA; install a build with it for CUDA %s or older" % (version, driver)
            + " (on a Jetson NVIDIA's own wheel for its JetPack)"
        )
    return (
        "torch %s is built for CUDA %s and cannot use the GPU of a driver for CUDA %s; install a build for that or "
        "an older one, or a newer driver" % (version, built_for, driver)
    )


@contextlib.contextmanager
def explained() -> Any:
    """What torch raises about CUDA, in the user's words."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip().split("\n")[0]
        if "out of memory" in text:
            raise CudaError(
                "the GPU is out of memory (%s); end other programs on it, or use a smaller batch" % text
            ) from error
        if "no kernel image" in text:
            raise CudaError("this build of torch has no code for this GPU; install one that has (%s)" % text) from error
        raise


# ---- graphs --------------------------------------------------------------------------------------------------


class Replay:
    """A captured graph with everything whose memory it reads and writes."""

    def __init__(self, graph: Any, kept: Any) -> None:
        self.replay, self._kept = graph.replay, kept


def captured(call: Callable[[int], Any], repeats: int) -> Replay:
    """A CUDA graph of `repeats` calls in a row; each gets its number. Kernels are chosen before, on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            call(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call(at) for at in range(repeats)]
    return Replay(graph, (call, results))


def _visits(graph: Replay) -> Callable[[], tuple[float, bool, int]]:
    """A warm replay, then the median of a few, in seconds."""

    def visit() -> tuple[float, bool, int]:
        graph.replay()
        each = [_timed_ms(graph) for _ in range(LAUNCHES)]
        return float(np.median(each)) / 1000.0, True, LAUNCHES + 1

    return visit


def _timed_ms(graph: Replay) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _warm_up(graphs: Sequence[Replay]) -> None:
    """Keep the GPU busy until its clocks are up."""
    busy = torch.randn(1024, 1024, device="cuda")
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_UP_S:
        busy = (busy @ busy).clamp(-1, 1)
        for graph in graphs:
            graph.replay()
        torch.cuda.synchronize()


# ---- models and layers ---------------------------------------------------------------------------------------


def loaded(path: str, kind: Any, last: bool, device: str = "cuda") -> tuple[Callable[..., Any], list[tuple[int, ...]]]:
    """A model that the host exported as TorchScript, and the shapes of its inputs, which lie in its extra file.

    Args:
        kind: the type of its weights.
        last: they are laid out channels last.
    """
    extra = {"inputs": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and what every JetPack's torch loads
        module = torch.jit.load(path, map_location=device, _extra_files=extra).eval().to(kind)
        if last:
            module = module.to(memory_format=torch.channels_last)
        module = torch.jit.freeze(module)
    text = extra["inputs"]
    shapes = (text.decode() if isinstance(text, bytes) else text).split(";")
    return module, [tuple(int(n) for n in shape.split(",")) for shape in shapes]


def first(found: Any) -> Any:
    """The first tensor of what a model returns."""
    while not torch.is_tensor(found):
        found = next(iter(found.values())) if isinstance(found, dict) else found[0]
    return found


def layer(shape: dict[str, Any], placed: Callable[[Any], Any]) -> tuple[Callable[..., Any], list[list[int]]]:
    """One layer with its activations as a function, and the shapes of its inputs.

    Args:
        shape: a LayerShape's fields.
        placed: puts a weight where and as it is computed with.
    """
    size = [shape["batch"], shape["in_ch"], *shape["spatial"]]
    main, sizes = _main(shape, size, placed)
    sums = [name == "add" for name in shape["fused"]]
    if any(sums):
        with torch.inference_mode():
            result = list(main(*(placed(torch.zeros(s)) for s in sizes)).shape)
        sizes = sizes + [result] * sum(sums)

    def call(*inputs: Any) -> Any:
        own = len(inputs) - sum(sums)
        y, others = main(*inputs[:own]), iter(inputs[own:])
        for name in shape["fused"]:
            y = y + next(others) if name == "add" else ACTIVATIONS[name](y)
        return y

    return call, sizes


def _main(
    shape: dict[str, Any], size: list[int], placed: Callable[[Any], Any]
) -> tuple[Callable[..., Any], list[list[int]]]:
    op, rank, ones = shape["op"], len(shape["spatial"]), [1] * len(shape["spatial"])
    if op in ("conv", "conv_transpose"):
        return _conv(shape, placed), [size]
    if op == "linear":
        weight, bias = _weight(placed, shape["out_ch"], shape["in_ch"]), _weight(placed, shape["out_ch"])
        return (lambda x: F.linear(x, weight, bias)), [size]
    if op in ("max_pool", "avg_pool"):
        pool = getattr(F, "%s%dd" % (op, rank))
        window = [tuple(shape[key]) for key in ("kernel", "stride", "padding")]
        return (lambda x: pool(x, *window)), [size]
    if op == "global_pool":
        return (lambda x: x.mean(tuple(range(2, 2 + rank)), keepdim=True)), [size]
    if op == "scale":
        factor, offset = (_weight(placed, 1, shape["in_ch"], *ones) for _ in range(2))
        return (lambda x: x * factor + offset), [size]
    if op in ("add", "mul", "gate"):
        other = size[:2] + ones if op == "gate" else size
        return (torch.add if op == "add" else torch.mul), [size, other]
    if op == "concat":
        share, rest = divmod(shape["in_ch"], shape["conv_groups"])
        parts = [share + (at < rest) for at in range(shape["conv_groups"])]
        return (lambda *inputs: torch.cat(inputs, 1)), [[size[0], part, *size[2:]] for part in parts]
    if op in ACTIVATIONS:
        return ACTIVATIONS[op], [size]
    raise ValueError("no layer is called %r here" % op)


def _conv(shape: dict[str, Any], placed: Callable[[Any], Any]) -> Callable[[Any], Any]:
    rank, groups, transposed = len(shape["kernel"]), shape["conv_groups"], shape["op"] == "conv_transpose"
    name = "conv_transpose%dd" if transposed else "conv%dd"
    convolve = getattr(F, name % rank)
    ends = (shape["in_ch"], shape["out_ch"] // groups) if transposed else (shape["out_ch"], shape["in_ch"] // groups)
    weight, bias = _weight(placed, *ends, *shape["kernel"]), _weight(placed, shape["out_ch"])
    stride, dilation = tuple(shape["stride"]), tuple(shape["dilation"])
    padding = tuple(max(p, 0) for p in shape["padding"])
    around: list[int] = []
    if min(shape["padding"], default=0) < 0:  # same: the rest at the end
        for n, k, s, d in zip(shape["spatial"], shape["kernel"], stride, dilation):
            total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            around = [total // 2, total - total // 2] + around
    if transposed:
        return lambda x: convolve(x, weight, bias, stride, padding, 0, groups, dilation)
    if any(around):
        return lambda x: convolve(F.pad(x, around), weight, bias, stride, padding, dilation, groups)
    return lambda x: convolve(x, weight, bias, stride, padding, dilation, groups)


def _weight(placed: Callable[[Any], Any], *size: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return placed(torch.randn(size, generator=generator) * 0.05)
