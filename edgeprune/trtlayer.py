"""Single layers as ONNX files: what latency tables of TensorRT are measured on.

A layer stands between two convolutions of one tap, as inside a network: then its tensors have the formats that
TensorRT chooses inside networks, what it fuses is fused, and reformats at the border of the file are not the layer's.
Its own nodes are called `layer/...`, the others `before/...` and `after/...`. Weights are a pattern that repeats:
values do not change how long a kernel takes, and the file shrinks to a few kilobytes on its way to a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RuntimeMissing
from .records import LayerShape

INSTALL = "pip install 'edgeprune[nvidia]'"
OPSET, IR = 17, 8
PERIOD = 4093  # a prime: no two neighbouring rows of weights are alike
SCALE = 0.02  # of 8-bit numbers; any will do
PLAIN = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "hardswish": "HardSwish"}
ACTIVATIONS = (*PLAIN, "relu6", "silu", "hardsigmoid", "gelu", "leaky_relu", "elu", "mish")
HEAVY = ("conv", "conv_transpose", "linear")
POOLS = ("max_pool", "avg_pool", "global_pool")
LAYERS = (*HEAVY, *POOLS, "scale", "add", "mul", "gate", "concat", *ACTIVATIONS)
AFTER = 8  # channels of the convolution behind the layer: cheap, and aligned


def buildable(shape: LayerShape) -> bool:
    """Can this layer be written?"""
    return shape.op in LAYERS and all(f in (*ACTIVATIONS, "add") for f in shape.fused)


def forms(shape: LayerShape, precision: str) -> list[tuple[bytes, list[str]]]:
    """A layer between its neighbours, and alone, for where it cannot be told from them: (ONNX file, its nodes) each.

    What runs channel by channel is only written alone: between convolutions it would become a part of them.
    """
    neighbours = len(shape.spatial) > 0 and (shape.op in HEAVY or shape.op in POOLS)
    return [_file(shape, precision, around) for around in ((True, False) if neighbours else (False,))]


def weights(*shape: int) -> NDArray[np.float32]:
    """The pattern, as an array of this shape."""
    pattern = np.random.Generator(np.random.PCG64(0)).standard_normal(PERIOD).astype(np.float32) * np.float32(0.05)
    return np.resize(pattern, shape)


def _file(shape: LayerShape, precision: str, around: bool) -> tuple[bytes, list[str]]:
    net = _Net(precision)
    size = (shape.batch, shape.in_ch, *shape.spatial)
    x = net.input(size)
    if around:
        x = net.conv("before", x, shape.in_ch, shape.in_ch, rank=len(shape.spatial))
    y = _MAKERS[shape.op](net, shape, x, size)
    for name in shape.fused:
        y = net.add_input("layer", "Add", y, _result_size(shape)) if name == "add" else net.activation(name, y)
    if around:
        y = net.conv("after", y, shape.out_ch, AFTER, rank=len(shape.spatial))
    return net.packed(y)


class _Net:
    """A network that grows node by node."""

    def __init__(self, precision: str) -> None:
        try:
            import onnx
        except ImportError as error:
            raise RuntimeMissing(f"{error.name} is missing; install it with: {INSTALL}") from error
        self._onnx, self._precision = onnx, precision
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._constants: list[Any] = []
        self._kind = np.float16 if precision == "f16" else np.float32

    def input(self, size: Sequence[int]) -> str:
        """A 32-bit input, in the precision of the computation."""
        name = f"x{len(self._inputs)}"
        kind = self._onnx.TensorProto.FLOAT
        self._inputs.append(self._onnx.helper.make_tensor_value_info(name, kind, list(size)))
        if self._precision == "f16":
            return self.node("cast", "Cast", [name], to=self._onnx.TensorProto.FLOAT16)
        return name

    def constant(self, value: NDArray[Any]) -> str:
        name = f"c{len(self._constants)}"
        self._constants.append(self._onnx.numpy_helper.from_array(value, name))
        return name

    def number(self, value: float) -> str:
        return self.constant(np.array(value, self._kind))

    def node(self, owner: str, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        taken = sum(n.name.startswith(f"{owner}/{operator}") for n in self._nodes)
        name = f"{owner}/{operator}" + (f"_{taken + 1}" if taken else "")
        output = f"t{len(self._nodes)}"
        self._nodes.append(self._onnx.helper.make_node(operator, list(inputs), [output], name, **attributes))
        return output

    def eight(self, owner: str, tensor: str, axis: int | None = None, channels: int = 0) -> str:
        """A tensor as 8-bit numbers show it, in int8 networks; weights by channel."""
        if self._precision != "int8":
            return tensor
        scale = np.array(SCALE, np.float32) if axis is None else np.full(channels, SCALE, np.float32)
        zero = np.zeros(scale.shape, np.int8)
        about = [self.constant(scale), self.constant(zero)]
        more = {} if axis is None else {"axis": axis}
        small = self.node(owner, "QuantizeLinear", [tensor, *about], **more)
        return self.node(owner, "DequantizeLinear", [small, *about], **more)

    def weight(self, owner: str, axis: int, *size: int) -> str:
        return self.eight(owner, self.constant(weights(*size).astype(self._kind)), axis, size[axis])

    def conv(self, owner: str, x: str, ins: int, outs: int, rank: int) -> str:
        inputs = [self.eight(owner, x), self.weight(owner, 0, outs, ins, *[1] * rank)]
        return self.node(owner, "Conv", inputs)

    def add_input(self, owner: str, operator: str, x: str, size: Sequence[int]) -> str:
        """A sum or product with another input, in 8 bits too where the network is."""
        other = self.eight(owner, self.input(size))
        return self.node(owner, operator, [self.eight(owner, x) if self._precision == "int8" else x, other])

    def activation(self, name: str, x: str) -> str:
        owner = "layer"
        if name in PLAIN:
            return self.node(owner, PLAIN[name], [x])
        if name == "relu6":
            return self.node(owner, "Clip", [x, self.number(0.0), self.number(6.0)])
        if name == "silu":
            return self.node(owner, "Mul", [x, self.node(owner, "Sigmoid", [x])])
        if name == "mish":
            return self.node(owner, "Mul", [x, self.node(owner, "Tanh", [self.node(owner, "Softplus", [x])])])
        if name == "gelu":
            inner = self.node(owner, "Erf", [self.node(owner, "Div", [x, self.number(2**0.5)])])
            whole = self.node(owner, "Mul", [x, self.node(owner, "Add", [inner, self.number(1.0)])])
            return self.node(owner, "Mul", [whole, self.number(0.5)])
        attributes: dict[str, dict[str, Any]] = {
            "hardsigmoid": {"alpha": 1 / 6, "beta": 0.5}, "leaky_relu": {"alpha": 0.01}, "elu": {"alpha": 1.0},
        }  # fmt: skip
        operator = {"hardsigmoid": "HardSigmoid", "leaky_relu": "LeakyRelu", "elu": "Elu"}[name]
        return self.node(owner, operator, [x], **attributes[name])

    def packed(self, last: str) -> tuple[bytes, list[str]]:
        helper, kind = self._onnx.helper, self._onnx.TensorProto.FLOAT
        if self._precision == "f16":
            last = self.node("uncast", "Cast", [last], to=kind)
        result = helper.make_tensor_value_info(last, kind, None)
        graph = helper.make_graph(self._nodes, "layer", self._inputs, [result], self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
        model = self._onnx.shape_inference.infer_shapes(model, strict_mode=True)
        self._onnx.checker.check_model(model)
        return bytes(model.SerializeToString()), [node.name for node in self._nodes]


# ---- operators -----------------------------------------------------------------------------------------------


def _conv(net: _Net, shape: LayerShape, x: str, size: Sequence[int]) -> str:
    transposed = shape.op == "conv_transpose"
    ins, outs = shape.in_ch, shape.out_ch // shape.conv_groups
    ends = (ins, outs) if transposed else (shape.out_ch, ins // shape.conv_groups)
    weight = net.weight("layer", 1 if transposed else 0, *ends, *shape.kernel)
    inputs = [net.eight("layer", x), weight, net.constant(weights(shape.out_ch).astype(net._kind))]
    return net.node(
        "layer", "ConvTranspose" if transposed else "Conv", inputs, group=shape.conv_groups,
        strides=list(shape.stride), dilations=list(shape.dilation), **_padding(shape),
    )  # fmt: skip


def _padding(shape: LayerShape) -> dict[str, Any]:
    if min(shape.padding, default=0) < 0:
        return {"auto_pad": "SAME_UPPER"}
    return {"pads": [*shape.padding, *shape.padding]}


def _linear(net: _Net, shape: LayerShape, x: str, size: Sequence[int]) -> str:
    weight = net.weight("layer", 0, shape.out_ch, shape.in_ch)
    inputs = [net.eight("layer", x), weight, net.constant(weights(shape.out_ch).astype(net._kind))]
    return net.node("layer", "Gemm", inputs, transB=1)


def _pool(net: _Net, shape: LayerShape, x: str, size: Sequence[int]) -> str:
    x = net.eight("layer", x)
    if shape.op == "global_pool":
        return net.node("layer", "GlobalAveragePool", [x])
    operator = "MaxPool" if shape.op == "max_pool" else "AveragePool"
    window = {"kernel_shape": list(shape.kernel), "strides": list(shape.stride), **_padding(shape)}
    return net.node("layer", operator, [x], **window)


def _scale(net: _Net, shape: LayerShape, x: str, size: Sequence[int]) -> str:
    each = (1, shape.in_ch, *[1] * len(shape.spatial))
    pair = [net.constant(weights(*each).astype(net._kind)) for _ in range(2)]
    return net.node("layer", "Add", [net.node("layer", "Mul", [x, pair[0]]), pair[1]])


def _pair(net: _Net, shape: LayerShape, x: str, size: Sequence[int]) -> str:
    other = (*size[:2], *[1] * len(shape.spatial)) if shape.op == "gate" else size
    return net.add_input("layer", "Add" if shape.op == "add" else "Mul", x, other)


def _concat(net: _Net, shape: LayerShape, x: str, size: Sequence[int]) -> str:
    """`conv_groups` tells of how many parts; the first of them is the input that is there already."""
    share, rest = divmod(shape.in_ch, shape.conv_groups)
    parts = [share + (at < rest) for at in range(shape.conv_groups)]
    net._inputs[0] = net._onnx.helper.make_tensor_value_info("x0", 1, [size[0], parts[0], *size[2:]])
    others = [net.input((size[0], part, *size[2:])) for part in parts[1:]]
    return net.node("layer", "Concat", [x, *others], axis=1)


def _activation(net: _Net, shape: LayerShape, x: str, size: Sequence[int]) -> str:
    return net.activation(shape.op, x)


_MAKERS: dict[str, Callable[[_Net, LayerShape, str, Sequence[int]], str]] = {
    "conv": _conv, "conv_transpose": _conv, "linear": _linear, "scale": _scale, "concat": _concat,
    **dict.fromkeys(POOLS, _pool), **dict.fromkeys(("add", "mul", "gate"), _pair),
    **dict.fromkeys(ACTIVATIONS, _activation),
}  # fmt: skip


def _result_size(shape: LayerShape) -> tuple[int, ...]:
    """Of a layer's output."""
    if shape.op == "global_pool":
        return (shape.batch, shape.out_ch, *[1] * len(shape.spatial))
    if not shape.kernel:
        return (shape.batch, shape.out_ch, *shape.spatial)
    same = min(shape.padding, default=0) < 0
    dilation = shape.dilation or (1,) * len(shape.kernel)
    sides = []
    for n, k, s, p, d in zip(shape.spatial, shape.kernel, shape.stride, shape.padding, dilation, strict=True):
        if shape.op == "conv_transpose":
            sides.append((n - 1) * s - 2 * p + d * (k - 1) + 1)
        else:
            sides.append(-(-n // s) if same else (n + 2 * p - d * (k - 1) - 1) // s + 1)
    return (shape.batch, shape.out_ch, *sides)
