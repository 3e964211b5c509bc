"""Write single layers as .tflite files, without a converter: what latency tables of LiteRT are measured on.

Each is built of the operators that a converted network has in its place, channels last. Weights are a pattern that
repeats: values do not change how long a kernel takes, and a model on its way to a device shrinks to a few kilobytes.
Format: tensorflow/lite/schema/schema.fbs, version 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RuntimeMissing
from .records import LayerShape

INSTALL = "pip install 'edgeprune[litert]'"
SCHEMA_VERSION = 3
PERIOD = 4093  # a prime: no two neighbouring rows of weights are alike
FUSED = {"relu": "RELU", "relu6": "RELU6"}  # what an operator does to its own result
PLAIN = {
    "relu": "RELU", "relu6": "RELU6", "hardswish": "HARD_SWISH", "sigmoid": "LOGISTIC", "tanh": "TANH", "gelu": "GELU",
    "leaky_relu": "LEAKY_RELU",
}  # fmt: skip
ACTIVATIONS = (*PLAIN, "silu", "hardsigmoid")
LAYERS = ("conv", "conv_transpose", "linear", "max_pool", "avg_pool", "global_pool", "scale", "add", "mul", "gate",
          "concat", *ACTIVATIONS)  # fmt: skip


def schema() -> Any:
    """The classes of the format; raises RuntimeMissing where they are not installed."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise RuntimeMissing(f"{error.name or error} is missing; install it with: {INSTALL}") from error
    return schema_py_generated


def buildable(shape: LayerShape) -> bool:
    """Can this layer be written in the form in which the converter writes it?"""
    if shape.op not in LAYERS or not all(f in (*ACTIVATIONS, "add") for f in shape.fused):
        return False
    if shape.op == "conv_transpose":
        return (
            len(shape.kernel) == 2 and not any(shape.padding) and shape.conv_groups == 1 and set(shape.dilation) == {1}
        )
    return len(shape.kernel) in (0, 2)


def layer_model(shape: LayerShape) -> bytes:
    """One layer with its activations as a model; inputs are (batch, height, width, channels) or (rows, channels)."""
    graph = Graph()
    last, before = _makers()[shape.op](graph, shape), shape.op
    for name in shape.fused:
        if name == "add":
            last = graph.operator("ADD", [last, graph.input(graph.shape(last))], graph.shape(last))
        elif name in FUSED and before in ("conv", "linear", "add"):
            graph.fuse(FUSED[name])
        else:
            last = _activation(graph, name, last)
        before = name
    return graph.pack(last)


def weights(*shape: int) -> NDArray[np.float32]:
    """The pattern, as an array of this shape."""
    pattern = np.random.Generator(np.random.PCG64(0)).standard_normal(PERIOD).astype(np.float32) * np.float32(0.05)
    return np.resize(pattern, shape)


def input_shapes(content: bytes) -> list[tuple[int, ...]]:
    """Of a model's inputs, in their order."""
    graph = schema().ModelT.InitFromPackedBuf(content, 0).subgraphs[0]
    return [tuple(int(n) for n in graph.tensors[at].shape) for at in graph.inputs]


def operators(content: bytes) -> list[str]:
    """Names of a model's operators, in the order they run."""
    s = schema()
    model = s.ModelT.InitFromPackedBuf(content, 0)
    names = {number: name for name, number in vars(s.BuiltinOperator).items() if not name.startswith("_")}
    codes = [names[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]
    return [codes[op.opcodeIndex] for op in model.subgraphs[0].operators]


class Graph:
    """A model that grows operator by operator; tensors are numbers."""

    def __init__(self) -> None:
        self._s = schema()
        self._model = self._s.ModelT()
        self._model.version = SCHEMA_VERSION
        self._model.description = "edgeprune layer"
        self._model.buffers = [self._s.BufferT()]
        self._model.operatorCodes = []
        self._graph = self._s.SubGraphT()
        self._graph.name = "main"
        self._graph.tensors, self._graph.operators, self._graph.inputs = [], [], []
        self._model.subgraphs = [self._graph]

    def shape(self, tensor: int) -> tuple[int, ...]:
        return tuple(self._graph.tensors[tensor].shape)

    def _tensor(self, shape: Sequence[int], buffer: int = 0, type_: str = "FLOAT32") -> int:
        tensor = self._s.TensorT()
        tensor.name = f"t{len(self._graph.tensors)}"
        tensor.shape, tensor.buffer, tensor.type = [int(n) for n in shape], buffer, getattr(self._s.TensorType, type_)
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def input(self, shape: Sequence[int]) -> int:
        tensor = self._tensor(shape)
        self._graph.inputs.append(tensor)
        return tensor

    def constant(self, value: NDArray[Any]) -> int:
        buffer = self._s.BufferT()
        buffer.data = np.frombuffer(value.tobytes(), np.uint8)
        self._model.buffers.append(buffer)
        kind = "INT32" if value.dtype == np.int32 else "FLOAT32"
        return self._tensor(value.shape, len(self._model.buffers) - 1, kind)

    def operator(
        self, name: str, inputs: Sequence[int], shape: Sequence[int], kind: str = "", version: int = 1, **options: Any
    ) -> int:
        """Add an operator; returns its result.

        Args:
            name: of the builtin operator.
            inputs: tensors.
            shape: of the result.
            kind: of its options, where it has any; for ADD and MUL it follows from the name.
            version: of the operator: the oldest that can do it, so that old runtimes load it.
            options: fields of its options.
        """
        code = self._s.OperatorCodeT()
        code.builtinCode = getattr(self._s.BuiltinOperator, name)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = version
        self._model.operatorCodes.append(code)
        op = self._s.OperatorT()
        op.opcodeIndex, op.inputs = len(self._model.operatorCodes) - 1, list(inputs)
        kind = kind or {"ADD": "AddOptions", "MUL": "MulOptions"}.get(name, "")
        if kind:
            op.builtinOptionsType = getattr(self._s.BuiltinOptions, kind)
            op.builtinOptions = getattr(self._s, f"{kind}T")()
            for field, value in options.items():
                setattr(op.builtinOptions, field, value)
        op.outputs = [self._tensor(shape)]
        self._graph.operators.append(op)
        return int(op.outputs[0])

    def fuse(self, activation: str) -> None:
        """Let the last operator do this to its result."""
        options = self._graph.operators[-1].builtinOptions
        options.fusedActivationFunction = getattr(self._s.ActivationFunctionType, activation)

    def pack(self, output: int) -> bytes:
        import flatbuffers

        self._graph.outputs = [output]
        signature = self._s.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs = [self._named(f"args_{at}", t) for at, t in enumerate(self._graph.inputs)]
        signature.outputs = [self._named("output_0", output)]
        self._model.signatureDefs = [signature]
        builder = flatbuffers.Builder(1024)
        builder.Finish(self._model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def _named(self, name: str, tensor: int) -> Any:
        found = self._s.TensorMapT()
        found.name, found.tensorIndex = name, tensor
        return found


# ---- layers --------------------------------------------------------------------------------------------------


def _makers() -> Mapping[str, Callable[[Graph, LayerShape], int]]:
    makers: dict[str, Callable[[Graph, LayerShape], int]] = {
        "conv": _conv, "conv_transpose": _conv_transpose, "linear": _linear, "global_pool": _global_pool,
        "max_pool": _pool, "avg_pool": _pool, "scale": _scale, "concat": _concat,
    }  # fmt: skip
    makers |= dict.fromkeys(("add", "mul", "gate"), _pair)
    return makers | dict.fromkeys(ACTIVATIONS, lambda graph, shape: _activation(graph, shape.op, _planes(graph, shape)))


def _planes(graph: Graph, shape: LayerShape) -> int:
    return graph.input((shape.batch, *shape.spatial, shape.in_ch))


def _same(shape: LayerShape) -> bool:
    """Is this padding the one that the format calls SAME: as much on both sides as keeps size / stride?"""
    spans = [(k - 1) * d + 1 for k, d in zip(shape.kernel, shape.dilation or (1, 1), strict=True)]
    totals = [
        max((-(-n // s) - 1) * s + span - n, 0) for n, s, span in zip(shape.spatial, shape.stride, spans, strict=True)
    ]
    return min(shape.padding) < 0 or all(t == 2 * p for t, p in zip(totals, shape.padding, strict=True))


def _padded(graph: Graph, shape: LayerShape, x: int, lowest: bool = False) -> int:
    """Zeros around the planes, or the lowest number."""
    (top, left), (n, *size, channels) = shape.padding, graph.shape(x)
    around = graph.constant(np.array([[0, 0], [top, top], [left, left], [0, 0]], np.int32))
    whole = (n, size[0] + 2 * top, size[1] + 2 * left, channels)
    if lowest:
        low = graph.constant(np.array(np.finfo(np.float32).min, np.float32))
        return graph.operator("PADV2", [x, around, low], whole, "PadV2Options")
    return graph.operator("PAD", [x, around], whole, "PadOptions")


def _window(graph: Graph, shape: LayerShape, x: int, lowest: bool = False) -> tuple[int, str, list[int]]:
    """The input of an operator that slides a window, the padding it has to do itself, and the size of its result."""
    dilation = shape.dilation or (1, 1)
    if any(shape.padding) and _same(shape) and not lowest:
        return x, "SAME", [-(-n // s) for n, s in zip(graph.shape(x)[1:3], shape.stride, strict=True)]
    if any(shape.padding):
        x = _padded(graph, shape, x, lowest)
    each = zip(graph.shape(x)[1:3], shape.kernel, dilation, shape.stride, strict=True)
    return x, "VALID", [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in each]


def _conv(graph: Graph, shape: LayerShape) -> int:
    x, padding, size = _window(graph, shape, _planes(graph, shape))
    depthwise = shape.conv_groups == shape.in_ch and shape.conv_groups > 1
    per_group = shape.in_ch // shape.conv_groups
    kernel = (1, *shape.kernel, shape.out_ch) if depthwise else (shape.out_ch, *shape.kernel, per_group)
    inputs = [x, graph.constant(weights(*kernel)), graph.constant(weights(shape.out_ch))]
    options = {
        "padding": getattr(schema().Padding, padding), "strideH": shape.stride[0], "strideW": shape.stride[1],
        "dilationHFactor": shape.dilation[0], "dilationWFactor": shape.dilation[1],
    }  # fmt: skip
    whole = (shape.batch, *size, shape.out_ch)
    if depthwise:
        options["depthMultiplier"] = shape.out_ch // shape.in_ch
        version = 2 if max(shape.dilation) > 1 else 1
        return graph.operator("DEPTHWISE_CONV_2D", inputs, whole, "DepthwiseConv2DOptions", version, **options)
    version = 6 if shape.conv_groups > 1 else 1
    return graph.operator("CONV_2D", inputs, whole, "Conv2DOptions", version, **options)


def _conv_transpose(graph: Graph, shape: LayerShape) -> int:
    size = [(n - 1) * s + k for n, s, k in zip(shape.spatial, shape.stride, shape.kernel, strict=True)]
    whole = (shape.batch, *size, shape.out_ch)
    kernel = graph.constant(weights(shape.out_ch, *shape.kernel, shape.in_ch))
    inputs = [graph.constant(np.array(whole, np.int32)), kernel, _planes(graph, shape)]
    inputs.append(graph.constant(weights(shape.out_ch)))
    options = {"padding": schema().Padding.VALID, "strideH": shape.stride[0], "strideW": shape.stride[1]}
    return graph.operator("TRANSPOSE_CONV", inputs, whole, "TransposeConvOptions", 3, **options)


def _linear(graph: Graph, shape: LayerShape) -> int:
    x = graph.input((shape.batch, shape.in_ch))
    inputs = [x, graph.constant(weights(shape.out_ch, shape.in_ch)), graph.constant(weights(shape.out_ch))]
    return graph.operator("FULLY_CONNECTED", inputs, (shape.batch, shape.out_ch), "FullyConnectedOptions")


def _pool(graph: Graph, shape: LayerShape) -> int:
    highest = shape.op == "max_pool"
    x = _planes(graph, shape)
    if any(shape.padding):  # converters write what is around out, for averages count it
        x = _padded(graph, shape, x, highest)
    each = zip(graph.shape(x)[1:3], shape.kernel, shape.stride, strict=True)
    size = [(n - k) // s + 1 for n, k, s in each]
    options = {
        "padding": schema().Padding.VALID, "strideH": shape.stride[0], "strideW": shape.stride[1],
        "filterHeight": shape.kernel[0], "filterWidth": shape.kernel[1],
    }  # fmt: skip
    name = "MAX_POOL_2D" if highest else "AVERAGE_POOL_2D"
    return graph.operator(name, [x], (shape.batch, *size, shape.in_ch), "Pool2DOptions", **options)


def _global_pool(graph: Graph, shape: LayerShape) -> int:
    axes = graph.constant(np.array([1, 2], np.int32))
    whole = (shape.batch, 1, 1, shape.in_ch)
    return graph.operator("MEAN", [_planes(graph, shape), axes], whole, "ReducerOptions", keepDims=True)


def _scale(graph: Graph, shape: LayerShape) -> int:
    x = _planes(graph, shape)
    scaled = graph.operator("MUL", [x, graph.constant(weights(shape.in_ch))], graph.shape(x))
    return graph.operator("ADD", [scaled, graph.constant(weights(shape.in_ch))], graph.shape(x))


def _pair(graph: Graph, shape: LayerShape) -> int:
    x = _planes(graph, shape)
    other = graph.input((shape.batch, 1, 1, shape.in_ch) if shape.op == "gate" else graph.shape(x))
    return graph.operator("ADD" if shape.op == "add" else "MUL", [x, other], graph.shape(x))


def _concat(graph: Graph, shape: LayerShape) -> int:
    share, rest = divmod(shape.in_ch, shape.conv_groups)
    parts = [graph.input((shape.batch, *shape.spatial, share + (at < rest))) for at in range(shape.conv_groups)]
    whole = (shape.batch, *shape.spatial, shape.in_ch)
    return graph.operator("CONCATENATION", parts, whole, "ConcatenationOptions", axis=3)


def _activation(graph: Graph, name: str, x: int) -> int:
    shape = graph.shape(x)
    if name == "silu":
        return graph.operator("MUL", [x, graph.operator("LOGISTIC", [x], shape)], shape)
    if name == "hardsigmoid":
        shifted = graph.operator("ADD", [x, graph.constant(np.array(3.0, np.float32))], shape)
        graph.fuse("RELU6")
        return graph.operator("MUL", [shifted, graph.constant(np.array(1 / 6, np.float32))], shape)
    kind = {"hardswish": "HardSwishOptions", "gelu": "GeluOptions", "leaky_relu": "LeakyReluOptions"}.get(name, "")
    options: dict[str, Any] = {"alpha": 0.01} if name == "leaky_relu" else {}
    return graph.operator(PLAIN[name], [x], shape, kind, **options)
