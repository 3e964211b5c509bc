"""OpenVINO on a processor: single layers built in its own operators, whole models, and inference over arrays."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

# else every import is reported to its maker, by a forked process that keeps this one's pipes open
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino as ov  # noqa: E402
import openvino.opset13 as ops  # noqa: E402

from . import machine, timing  # noqa: E402

METHOD = "2"  # of timing layers: entries of one method do not mix with another's
TYPES = {"f32": np.float32, "bf16": np.float32, "f16": np.float32}  # inputs and weights; the runtime converts inside
ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "relu": ops.relu,
    "relu6": lambda x: ops.clamp(x, 0.0, 6.0),
    "silu": ops.swish,
    "hardswish": ops.hswish,
    "hardsigmoid": ops.hsigmoid,
    "sigmoid": ops.sigmoid,
    "gelu": lambda x: ops.gelu(x, "erf"),
    "leaky_relu": lambda x: ops.prelu(x, ops.constant(np.float32(0.01))),
    "elu": lambda x: ops.elu(x, 1.0),
    "tanh": ops.tanh,
    "mish": ops.mish,
}


class Program:
    """The calls of one session: `open` first, then the others."""

    def __init__(self) -> None:
        os.environ.pop("ONEDNN_VERBOSE", None)  # corrupts inference in some releases
        self.core = ov.Core()
        self.threads = 1
        self.config: dict[str, Any] = {}
        self.call_ms = 0.0

    def calls(self) -> dict[str, Callable[..., Any]]:
        return {"open": self.open, "time": self.time, "run": self.run}

    def open(self, event: Callable[[Any], None], threads: int, precision: str) -> dict[str, Any]:
        """Fix threads and precision for the session; returns what the measurements will depend on."""
        if precision not in TYPES:
            raise ValueError("precision %r; this runtime measures %s" % (precision, ", ".join(sorted(TYPES))))
        self.threads = threads
        pinned = machine.pin(threads)
        self.config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,
        }
        x = ops.parameter([1, 16], np.float32)
        nothing = self._compiled(ov.Model([ops.relu(x)], [x]))
        self.call_ms = timing.in_turn([nothing], threads, 30, 60, 0.01, 1.0)[0]["median_ms"]
        described = machine.describe()
        described["processor"] = self.core.get_property("CPU", "FULL_DEVICE_NAME").strip()
        described["method"] = METHOD
        described["runtime"] = "openvino " + ov.__version__.partition("-")[0]
        return {"machine": described, "pinned": pinned}

    def time(self, event: Callable[[Any], None], items: list[dict[str, Any]], **limits: Any) -> dict[str, Any]:
        """Time layers ({"layer": shape}) and whole models ({"model": path}) in turn; everything is compiled first.

        What the call itself takes is taken off layers, not off models: an application pays it once. The limits are
        those of `timing.in_turn`.
        """
        runs = []
        for at, item in enumerate(items):
            model = layer_model(item["layer"]) if "layer" in item else self.core.read_model(item["model"])
            runs.append(self._compiled(model))
            event({"compiled": at + 1, "of": len(items)})
        around = {at: before(item["layer"]) for at, item in enumerate(items) if "layer" in item}
        held = [at for at, model in around.items() if model is not None]
        runs += [self._compiled(around[at]) for at in held]
        timings = timing.in_turn(runs, self.threads, **limits)
        rest_ms = dict.fromkeys(around, self.call_ms)
        rest_ms.update(zip(held, (found["median_ms"] for found in timings[len(items) :])))
        timings = timings[: len(items)]
        for at, rest in rest_ms.items():
            timing.take_off(timings[at], rest)
        return {"timings": timings, "peak_memory_bytes": machine.peak_memory_bytes()}

    def run(self, event: Callable[[Any], None], path: str, inputs: list[str], output: str) -> dict[str, Any]:
        """Run a model over saved arrays, one slice of its batch size at a time; save its first output."""
        arrays = [np.load(name, mmap_mode="r", allow_pickle=False) for name in inputs]
        compiled = self.core.compile_model(self.core.read_model(path), "CPU", self.config)
        request = compiled.create_infer_request()
        batch = compiled.inputs[0].shape[0]
        results: list[Any] = []
        for start in range(0, len(arrays[0]), batch):
            part = [np.ascontiguousarray(a[start : start + batch]) for a in arrays]
            short = batch - len(part[0])
            if short:
                part = [np.concatenate([p, np.repeat(p[-1:], short, axis=0)]) for p in part]
            request.infer(dict(enumerate(part)))
            results.append(np.array(request.get_output_tensor(0).data)[: batch - short])
            if start // batch % 100 == 0:
                event({"done": start, "of": len(arrays[0])})
        np.save(output, np.concatenate(results))
        return {"count": len(arrays[0]), "peak_memory_bytes": machine.peak_memory_bytes()}

    def _compiled(self, model: Any) -> Callable[[], Any]:
        compiled = self.core.compile_model(model, "CPU", self.config)
        request = compiled.create_infer_request()
        random = np.random.RandomState(0)
        for port in compiled.inputs:
            data = random.standard_normal(list(port.shape)).astype(port.element_type.to_dtype())
            request.set_tensor(port, ov.Tensor(data))
        for _ in range(3):
            request.infer()
        return request.infer  # type: ignore[no-any-return]


# ---- layers --------------------------------------------------------------------------------------------------


def layer_model(shape: dict[str, Any]) -> Any:
    """One layer and its activation, as a model whose inputs and outputs are channels-last.

    Inside a network tensors are channels-last; with the usual layout at its borders, a single layer would be measured
    with two reorders.
    """
    builders = {"linear": _linear, "conv": _conv, "conv_transpose": _conv}
    builders.update(dict.fromkeys(("max_pool", "avg_pool", "global_pool"), _pool))
    build = builders.get(shape["op"])
    if build is None:
        parameters, result = _between(shape)
        return ov.Model([result], parameters)
    parameters, result = build(shape)
    for fused in shape["fused"]:
        result = ACTIVATIONS[fused](result)
    model = ov.Model([result], parameters)
    return _channels_last(model) if len(result.output(0).shape) > 2 else model


def before(shape: dict[str, Any]) -> Any:
    """What a layer's model holds besides the layer, as a model to subtract; None when there is nothing."""
    if shape["op"] not in ("max_pool", "avg_pool"):
        return None
    x = _planes(shape)
    return _channels_last(ov.Model([_one_tap(x)], [x]))


def _planes(shape: dict[str, Any]) -> Any:
    return ops.parameter([shape["batch"], shape["in_ch"]] + list(shape["spatial"]), np.float32)


def _one_tap(x: Any) -> Any:
    """The cheapest convolution: it settles the layout for what follows."""
    channels, ones = x.shape[1], [1] * (len(x.shape) - 2)
    nothing = [0] * len(ones)
    return ops.group_convolution(x, _weights(channels, 1, 1, *ones), ones, nothing, nothing, ones)


def _channels_last(model: Any) -> Any:
    plain = {3: "NCW", 4: "NCHW", 5: "NCDHW"}[len(model.output(0).shape)]
    last = "N" + plain[2:] + "C"
    steps = ov.preprocess.PrePostProcessor(model)
    for at in range(len(model.inputs)):
        steps.input(at).tensor().set_layout(ov.Layout(last))
        steps.input(at).model().set_layout(ov.Layout(plain))
    steps.output(0).model().set_layout(ov.Layout(plain))
    steps.output(0).tensor().set_layout(ov.Layout(last))
    return steps.build()


def _weights(*shape: int) -> Any:
    random = np.random.RandomState(0)
    return ops.constant((random.standard_normal(shape) * 0.05).astype(np.float32))


def _conv(shape: dict[str, Any]) -> tuple[list[Any], Any]:
    x = ops.parameter([shape["batch"], shape["in_ch"]] + list(shape["spatial"]), np.float32)
    groups, rank = shape["conv_groups"], len(shape["kernel"])
    per_in, per_out = shape["in_ch"] // groups, shape["out_ch"] // groups
    transposed = shape["op"] == "conv_transpose"
    ends = (per_in, per_out) if transposed else (per_out, per_in)
    weights = _weights(*((groups,) if groups > 1 else ()), *ends, *shape["kernel"])
    pads = [max(p, 0) for p in shape["padding"]]
    automatic = "same_upper" if min(shape["padding"], default=0) < 0 else "explicit"
    rest = {
        "strides": shape["stride"],
        "pads_begin": pads,
        "pads_end": pads,
        "dilations": shape["dilation"],
        "auto_pad": automatic,
    }
    if transposed:
        make = ops.group_convolution_backprop_data if groups > 1 else ops.convolution_backprop_data
    else:
        make = ops.group_convolution if groups > 1 else ops.convolution
    y = make(x, weights, **rest)
    return [x], ops.add(y, _weights(1, shape["out_ch"], *([1] * rank)))


def _linear(shape: dict[str, Any]) -> tuple[list[Any], Any]:
    x = ops.parameter([shape["batch"], shape["in_ch"]], np.float32)
    y = ops.matmul(x, _weights(shape["out_ch"], shape["in_ch"]), False, True)
    return [x], ops.add(y, _weights(1, shape["out_ch"]))


def _between(shape: dict[str, Any]) -> tuple[list[Any], Any]:
    """What runs between layers unfused and channel by channel: scales, sums, activations. Channels last."""
    size = [shape["batch"]] + list(shape["spatial"]) + [shape["in_ch"]]
    each = [1] * (len(size) - 1) + size[-1:]
    x, op = ops.parameter(size, np.float32), shape["op"]
    if op == "scale":
        return [x], ops.add(ops.multiply(x, _weights(*each)), _weights(*each))
    if op in ("add", "mul", "gate"):
        other = ops.parameter(each if op == "gate" else size, np.float32)
        return [x, other], (ops.add if op == "add" else ops.multiply)(x, other)
    if op == "concat":
        share, rest = divmod(size[-1], shape["conv_groups"])
        parts = [share + (at < rest) for at in range(shape["conv_groups"])]
        inputs = [ops.parameter(size[:-1] + [part], np.float32) for part in parts]
        return inputs, ops.concat(inputs, len(size) - 1)
    if op in ACTIVATIONS:
        return [x], ACTIVATIONS[op](x)
    raise ValueError("no layer is called %r here" % op)


def _pool(shape: dict[str, Any]) -> tuple[list[Any], Any]:
    """Pooling over a window behind a convolution of one tap: alone, it would be measured in another layout."""
    x = _planes(shape)
    rank, op = len(shape["spatial"]), shape["op"]
    if op == "global_pool":
        return [x], ops.reduce_mean(x, ops.constant(np.arange(2, 2 + rank)), True)
    window = (shape["padding"], shape["padding"], shape["kernel"])
    if op == "max_pool":
        return [x], ops.max_pool(_one_tap(x), shape["stride"], [1] * rank, *window).output(0).get_node()
    return [x], ops.avg_pool(_one_tap(x), shape["stride"], *window, True)
