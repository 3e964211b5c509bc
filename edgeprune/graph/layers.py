"""The layers of a network as a latency table sees them: shapes, fused partners, widths that follow the plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..records import Layer, LayerShape, Width
from .labels import along
from .recording import Op, Ref
from .rules import name_of
from .run import Run, arguments, ids_along
from .unions import Ids

WidthOf = Callable[[Ids], Width]  # ids along an axis -> how many stay under a plan

ACTIVATIONS = {
    "relu": "relu", "hardtanh": "relu6", "relu6": "relu6", "silu": "silu", "hardswish": "hardswish",
    "hardsigmoid": "hardsigmoid", "sigmoid": "sigmoid", "gelu": "gelu", "leaky_relu": "leaky_relu", "elu": "elu",
    "tanh": "tanh", "mish": "mish",
}  # fmt: skip
OTHERS = {"batch_norm": "scale", "add": "add", "mul": "mul", "cat": "concat"}
POOLS = {
    "max_pool2d": "max_pool", "avg_pool2d": "avg_pool", "adaptive_avg_pool2d": "global_pool", "mean": "global_pool",
}  # fmt: skip


def extract(run: Run, width_of: WidthOf) -> list[Layer]:
    """Every convolution and linear layer, and what runs between them unfused, in the order they run."""
    consumers = _consumers(run)
    fused: set[int] = set()
    layers = []
    for at, op in enumerate(run.recording.ops):
        if at in fused:
            continue
        name = name_of(op.func)
        layer: Layer | None
        if name.startswith("conv"):
            layer = _conv(run, op, width_of, _follow(run, at, consumers, fused))
        elif name == "linear":
            layer = _linear(run, op, width_of, _follow(run, at, consumers, fused))
        else:
            layer = _between(run, op, name, width_of)
        if layer is not None:
            layers.append(layer)
    return layers


def _consumers(run: Run) -> dict[int, list[int]]:
    """Which operators read each value."""
    found: dict[int, list[int]] = {}
    for at, op in enumerate(run.recording.ops):
        for ref in op.refs:
            found.setdefault(ref.value, []).append(at)
    return found


def _follow(run: Run, at: int, consumers: dict[int, list[int]], fused: set[int]) -> tuple[str, ...]:
    """Batch norm, addition and activation that only this layer's result goes through, in order."""
    chain: list[str] = []
    value = run.recording.ops[at].outputs[0]
    while len(consumers.get(value, ())) == 1:
        at = consumers[value][0]
        op = run.recording.ops[at]
        name = name_of(op.func)
        same_shape = run.recording.values[op.outputs[0]].shape == run.recording.values[value].shape
        if name == "batch_norm" and not chain:
            pass
        elif name == "add" and len(op.refs) == 2 and "add" not in chain and same_shape:
            if at in fused:
                break
            chain.append("add")
        elif name in ACTIVATIONS and same_shape:
            chain.append(ACTIVATIONS[name])
        elif name not in ("dropout", "alias", "feature_dropout"):
            break
        fused.add(at)
        value = op.outputs[0]
    return tuple(chain)


def _ids(run: Run, ref: Ref, axis: int) -> Ids:
    label = along(run.of(ref), axis)
    if label is not None and len(label.axes) > 1:
        label = None
    return ids_along(label, axis, run.shape(ref)[axis])


def _conv(run: Run, op: Op, width_of: WidthOf, chain: tuple[str, ...]) -> Layer:
    a = arguments(op)
    x, out = run.shape(a["input"]), run.recording.values[op.outputs[0]].shape
    kernel = run.shape(a["weight"])[2:]
    count = len(kernel)
    axis = len(x) - count - 1
    groups = int(a["groups"])
    out_labels = along(run.labels.get(op.outputs[0], ()), axis)
    in_width = width_of(_ids(run, a["input"], axis))
    out_width = width_of(ids_along(out_labels, axis, out[axis]))
    transposed = "transpose" in op.func._schema.name or bool(a.get("transposed"))
    shape = LayerShape(
        op="conv_transpose" if transposed else "conv",
        in_ch=x[axis], out_ch=out[axis], batch=x[0] if axis else 1, spatial=tuple(x[axis + 1 :]),
        kernel=tuple(kernel), stride=_tuple(a["stride"], count), padding=_tuple(a["padding"], count),
        dilation=_tuple(a["dilation"], count), conv_groups=groups, fused=chain,
    )  # fmt: skip
    macs = int(np.prod(kernel)) * x[axis] // groups * out[axis] * shape.batch
    macs *= int(np.prod(x[axis + 1 :] if transposed else out[axis + 1 :]))
    return Layer(
        _owner(run, op, a["weight"]), shape, in_width, out_width, _groups_width(groups, in_width, x[axis]), macs
    )


def _groups_width(groups: int, in_width: Width, in_ch: int) -> Width:
    """Depthwise convolutions and whole cut groups follow the input; everything else keeps its groups."""
    per_group = in_ch // groups
    if groups > 1 and in_width.terms and all(units % per_group == 0 for _, units in in_width.terms):
        return Width(in_width.fixed // per_group, tuple((g, u // per_group) for g, u in in_width.terms))
    return Width(groups, ())


def _linear(run: Run, op: Op, width_of: WidthOf, chain: tuple[str, ...]) -> Layer:
    a = arguments(op)
    x, w = run.shape(a["input"]), run.shape(a["weight"])
    axis = len(x) - 1
    tokens = int(np.prod(x[:-1]))
    out_label = along(run.labels.get(op.outputs[0], ()), axis)
    shape = LayerShape(
        op="linear", in_ch=w[1], out_ch=w[0], batch=tokens, spatial=(), kernel=(), stride=(), padding=(),
        dilation=(), conv_groups=1, fused=chain,
    )  # fmt: skip
    in_width = width_of(_ids(run, a["input"], axis))
    out_width = width_of(ids_along(out_label, axis, w[0]))
    return Layer(_owner(run, op, a["weight"]), shape, in_width, out_width, Width(1, ()), tokens * w[0] * w[1])


def _between(run: Run, op: Op, name: str, width_of: WidthOf) -> Layer | None:
    """Pooling, unfused normalisation, activation or addition over (N, C, H, W): cheap, but not free."""
    kind = POOLS.get(name) or OTHERS.get(name) or ACTIVATIONS.get(name)
    operands = [ref for ref in op.refs if run.value(ref).from_input]
    if kind is None or not operands or not op.outputs or op.outputs[0] < 0:
        return None
    x = run.shape(operands[0])
    if kind == "concat":
        return _concat(run, op, width_of, len(operands))
    if kind in ("add", "mul"):
        if len(operands) < 2:
            return None
        x = max((run.shape(ref) for ref in operands), key=lambda s: int(np.prod(s)))
        if kind == "mul" and any(run.shape(ref) == (*x[:2], *[1] * (len(x) - 2)) for ref in operands):
            kind = "gate"  # squeeze and excitation: one number a channel
    if len(x) != 4 or int(np.prod(x[2:])) < 2:
        return None
    a = arguments(op)
    width = width_of(_ids(run, operands[0], 1))
    pools = kind in ("max_pool", "avg_pool")
    kernel = _tuple(a["kernel_size"], 2) if pools else ()
    shape = LayerShape(
        op=kind, in_ch=x[1], out_ch=x[1], batch=x[0], spatial=tuple(x[2:]), kernel=kernel,
        stride=(_tuple(a["stride"], 2) or kernel) if pools else (), padding=_tuple(a["padding"], 2) if pools else (),
        dilation=(), conv_groups=1, fused=(),
    )  # fmt: skip
    return Layer(op.module or name, shape, width, width, Width(1, ()), 0)


def _concat(run: Run, op: Op, width_of: WidthOf, parts: int) -> Layer | None:
    """Joining channels is copying them; `conv_groups` is how many tensors are joined."""
    out = run.recording.values[op.outputs[0]].shape
    if len(out) != 4 or int(arguments(op).get("dim", 0)) not in (1, -3):
        return None
    width = width_of(ids_along(along(run.labels.get(op.outputs[0], ()), 1), 1, out[1]))
    shape = LayerShape(
        op="concat", in_ch=out[1], out_ch=out[1], batch=out[0], spatial=tuple(out[2:]), kernel=(), stride=(),
        padding=(), dilation=(), conv_groups=parts, fused=(),
    )  # fmt: skip
    return Layer(op.module or "concat", shape, width, width, Width(parts, ()), 0)


def _owner(run: Run, op: Op, weight: Ref) -> str:
    name = run.value(weight).name
    return name.rpartition(".")[0] if name.endswith(".weight") else name or op.module


def _tuple(value: Any, count: int) -> tuple[int, ...]:
    if isinstance(value, str):  # "same" or "valid"
        return (0,) * count if value == "valid" else (-1,) * count
    numbers = [value] if isinstance(value, int) else list(value or ())
    return tuple(numbers * count if len(numbers) == 1 else numbers)
