"""Networks as the ONNX files that TensorRT 8.5 to 11 take: opset 17, nodes named by module, precision inside.

`f16` has 16-bit weights and activations between casts, so that inputs and outputs stay 32-bit; `int8` has a
QuantizeLinear and DequantizeLinear around what is computed in 8 bits, symmetric, with ranges from calibration data.
What precision a layer has is then the same in every release: from 11 on there is no other way to say it.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from . import export
from .errors import RuntimeMissing, TraceError
from .graph import Example

INSTALL = "pip install 'edgeprune[nvidia]'"
OPSET, IR = 17, 8  # the newest that TensorRT 8.5 reads
SCOPES = "pkg.torch.onnx.name_scopes"
QUANTISED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "AveragePool", "GlobalAveragePool", "MaxPool")
Precision = Literal["f32", "f16", "int8"]


def convert(
    module: nn.Module, example: Example, precision: Precision, samples: Sequence[Sequence[NDArray[Any]]] = ()
) -> bytes:
    """A network as an ONNX file; inputs and outputs are 32-bit floats.

    Args:
        module: any module; it is not changed.
        example: one input; its batch size is fixed in the file.
        precision: of the computation.
        samples: for int8: inputs of the network, in the order of its arguments, to find ranges on.
    Raises:
        RuntimeMissing: a package is missing. TraceError: the network cannot be written so.
    """
    return computed(exported(module, example), precision, samples)


def exported(module: nn.Module, example: Example) -> Any:
    """A network in 32 bits, as an ONNX model."""
    onnx = _onnx()
    with TemporaryDirectory(prefix="edgeprune-onnx-") as folder:
        path = Path(folder, "model.onnx")
        export.to_onnx(module, example, path)
        model = onnx.load(str(path))
    _name_inputs(model)
    name_nodes(model)
    lower(model, type(module).__name__)
    return model


def computed(model: Any, precision: Precision, samples: Sequence[Sequence[NDArray[Any]]] = ()) -> bytes:
    """An exported network in a precision, as a file; the model may be changed."""
    if precision == "f16":
        model = half(model)
    elif precision == "int8":
        model = quantised(model, samples)
    _onnx().checker.check_model(model)
    return bytes(model.SerializeToString())


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise RuntimeMissing(f"{error.name} is missing; install it with: {INSTALL}") from error
    return onnx


# ---- names ---------------------------------------------------------------------------------------------------


def _name_inputs(model: Any) -> None:
    """input0, input1, ... in the order of the network's arguments, in place."""
    names = {port.name: f"input{at}" for at, port in enumerate(model.graph.input)}
    for port in model.graph.input:
        port.name = names[port.name]
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = names.get(name, name)


def name_nodes(model: Any) -> None:
    """Call every node `MODULE/OPERATOR`, in place: engines name their layers after these."""
    weights = {tensor.name for tensor in model.graph.initializer}
    taken: dict[str, int] = {}
    for node in model.graph.node:
        owner = _module_of(node, weights)
        base = f"{owner}/{node.op_type}" if owner else node.op_type
        taken[base] = taken.get(base, 0) + 1
        node.name = base if taken[base] == 1 else f"{base}_{taken[base]}"


def _module_of(node: Any, weights: set[str]) -> str:
    """The module of a node's own weight; without one, the innermost in which the exporter met it."""
    for name in node.input:
        if name in weights and name.endswith(".weight"):
            return str(name).removesuffix(".weight")
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            with contextlib.suppress(ValueError, SyntaxError):
                scopes = ast.literal_eval(entry.value)
                return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


def _name_new(model: Any, known: set[str]) -> None:
    """What a converter has added is called after its own name and operator."""
    for node in model.graph.node:
        if node.name not in known:
            node.name = f"{node.name or node.output[0]}/{node.op_type}".replace(" ", "_")


# ---- opset ---------------------------------------------------------------------------------------------------


def lower(model: Any, name: str) -> None:
    """Rewrite a network of a newer opset as one of opset 17, in place; raises TraceError at what that cannot say."""
    onnx = _onnx()
    graph = _Lowered(onnx, model)
    nodes = [new for node in model.graph.node for new in graph.lowered(node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for node in nodes:
        _check(onnx, node, name)
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    model.ir_version = IR


def _check(onnx: Any, node: Any, name: str) -> None:
    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, node.domain)
    except onnx.defs.SchemaError as error:
        raise TraceError(f"{name} needs the operator {node.op_type}, which TensorRT 8.5 does not read") from error
    new = [a.name for a in node.attribute if a.name not in schema.attributes]
    if new or len(node.input) > schema.max_input:
        what = ", ".join(new) or f"{len(node.input)} inputs"
        raise TraceError(f"{name} uses {node.op_type} with {what}, which opset {OPSET} cannot say; report this network")


class _Lowered:
    """One graph while its nodes are rewritten."""

    def __init__(self, onnx: Any, model: Any) -> None:
        self._onnx, self._graph = onnx, model.graph
        self._constants = {t.name: t for t in model.graph.initializer}
        self._constants |= {n.output[0]: n.attribute[0].t for n in model.graph.node if n.op_type == "Constant"}
        values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
        self._shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        self._rules: dict[str, Callable[[Any], list[Any]]] = {
            "Split": self._split,
            "Pad": self._pad,
            "Gelu": self._gelu,
            "Mish": self._mish,
            "GridSample": self._grid_sample,
        }

    def lowered(self, node: Any) -> list[Any]:
        self._without_defaults(node)
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
            return self._reduce(node)
        return self._rules.get(node.op_type, lambda same: [same])(node)

    def _without_defaults(self, node: Any) -> None:
        """Attributes that a newer opset has and that ask for nothing."""
        drop = {"noop_with_empty_axes": 0, "antialias": 0, "keep_aspect_ratio_policy": b"stretch", "saturate": 1}
        kept = []
        for attribute in node.attribute:
            value = self._onnx.helper.get_attribute_value(attribute)
            plain = attribute.name in drop and value == drop[attribute.name] and node.op_type != "ReduceSum"
            pool = node.op_type == "AveragePool" and attribute.name == "dilations" and set(value) == {1}
            if not (plain or pool):
                kept.append(attribute)
        del node.attribute[:]
        node.attribute.extend(kept)

    def _numbers(self, name: str) -> NDArray[Any] | None:
        tensor = self._constants.get(name)
        return None if tensor is None else np.asarray(self._onnx.numpy_helper.to_array(tensor))

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        self._graph.initializer.append(self._onnx.numpy_helper.from_array(value, name))
        return name

    def _reduce(self, node: Any) -> list[Any]:
        """Axes were an attribute."""
        if len(node.input) > 1:
            axes = self._numbers(node.input[1])
            if axes is not None:
                del node.input[1:]
                node.attribute.append(self._onnx.helper.make_attribute("axes", [int(a) for a in axes]))
        return [node]

    def _split(self, node: Any) -> list[Any]:
        """Sizes had to be said."""
        attributes = {a.name: self._onnx.helper.get_attribute_value(a) for a in node.attribute}
        if "num_outputs" in attributes and self._shapes.get(node.input[0]):
            size, count = self._shapes[node.input[0]][attributes.get("axis", 0)], attributes["num_outputs"]
            share = -(-size // count)
            sizes = np.array([share] * (count - 1) + [size - share * (count - 1)], np.int64)
            node.input.append(self._constant(f"{node.output[0]}/sizes", sizes))
            kept = [a for a in node.attribute if a.name != "num_outputs"]
            del node.attribute[:]
            node.attribute.extend(kept)
        return [node]

    def _pad(self, node: Any) -> list[Any]:
        """All axes had to be said."""
        axes = self._numbers(node.input[3]) if len(node.input) > 3 and node.input[3] else None
        pads, shape = self._numbers(node.input[1]), self._shapes.get(node.input[0])
        if axes is not None and pads is not None and shape:
            whole = np.zeros(2 * len(shape), np.int64)
            for at, axis in enumerate(axes):
                whole[axis], whole[axis + len(shape)] = pads[at], pads[at + len(axes)]
            node.input[1] = self._constant(f"{node.output[0]}/pads", whole)
            del node.input[3:]
        return [node]

    def _gelu(self, node: Any) -> list[Any]:
        x, y = node.input[0], node.output[0]
        if any(a.name == "approximate" and a.s == b"tanh" for a in node.attribute):
            return [node]  # refused below
        steps = [
            ("Div", [x, self._scalar(y, "root", 2**0.5)]),
            ("Erf", ["-"]),
            ("Add", ["-", self._scalar(y, "one", 1)]),
        ]
        steps += [("Mul", [x, "-"]), ("Mul", ["-", self._scalar(y, "half", 0.5)])]
        return self._chain(node, steps)

    def _mish(self, node: Any) -> list[Any]:
        return self._chain(node, [("Softplus", [node.input[0]]), ("Tanh", ["-"]), ("Mul", [node.input[0], "-"])])

    def _scalar(self, base: str, name: str, value: float) -> str:
        return self._constant(f"{base}/{name}", np.array(value, np.float32))

    def _chain(self, node: Any, steps: Sequence[tuple[str, list[str]]]) -> list[Any]:
        """Nodes in the place of one; `-` stands for what the one before gives."""
        made, last = [], ""
        for at, (operator, inputs) in enumerate(steps):
            output = node.output[0] if at == len(steps) - 1 else f"{node.output[0]}/{at}"
            names = [last if name == "-" else name for name in inputs]
            made.append(self._onnx.helper.make_node(operator, names, [output], f"{node.name}_{at}/{operator}"))
            last = output
        return made

    def _grid_sample(self, node: Any) -> list[Any]:
        for attribute in node.attribute:
            if attribute.name == "mode":
                attribute.s = {b"linear": b"bilinear", b"cubic": b"bicubic"}.get(attribute.s, attribute.s)
        return [node]


# ---- precision -----------------------------------------------------------------------------------------------


def half(model: Any) -> Any:
    """A network in 16 bits, but for its inputs and outputs."""
    known = {node.name for node in model.graph.node}
    with _silent():
        try:
            from onnxruntime.transformers.float16 import convert_float_to_float16
        except ImportError as error:
            raise RuntimeMissing(f"{error.name} is missing; install it with: {INSTALL}") from error
        made = convert_float_to_float16(model, keep_io_types=True)
    _sort(made)
    _name_new(made, known)
    return made


def _sort(model: Any) -> None:
    """Put nodes behind what they read, in place: the converter puts its casts at the end."""
    left, nodes = list(model.graph.node), []
    made = {out for node in left for out in node.output}
    while left:
        ready = [n for n in left if not any(i in made for i in _read_by(n))]
        assert ready, "a cycle"
        nodes += ready
        made -= {out for node in ready for out in node.output}
        left = [n for n in left if any(out in made for out in n.output)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _read_by(node: Any) -> list[str]:
    """Names of the tensors that a node reads, its subgraphs too."""
    inner = [i for a in node.attribute if a.HasField("g") for n in a.g.node for i in _read_by(n)]
    return [*node.input, *inner]


def quantised(model: Any, samples: Sequence[Sequence[NDArray[Any]]]) -> Any:
    """A network in 8 bits where TensorRT has kernels for that, with the whole ranges that `samples` show.

    Weights by output channel, all scales symmetric (zero is 0), biases in 32-bit floats: what TensorRT asks for.
    """
    onnx, known = _onnx(), {node.name for node in model.graph.node}
    with _silent():
        try:
            from onnxruntime import quantization as q
        except ImportError as error:
            raise RuntimeMissing(f"{error.name} is missing; install it with: {INSTALL}") from error
        names = [port.name for port in model.graph.input]
        options = {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "AddQDQPairToWeight": True,
            "QuantizeBias": False,
            "DedicatedQDQPair": False,
        }
        with TemporaryDirectory(prefix="edgeprune-int8-") as folder:
            path = f"{folder}/int8.onnx"
            q.quantize_static(
                model, path, _Reader(names, samples), quant_format=q.QuantFormat.QDQ, per_channel=True,
                op_types_to_quantize=list(QUANTISED), calibrate_method=q.CalibrationMethod.MinMax,
                extra_options=options,
            )  # fmt: skip
            made = onnx.load(path)
    _name_new(made, known)
    made.ir_version = IR
    return made


class _Reader:
    """Samples, one at a time, as the calibration asks for them."""

    def __init__(self, names: Sequence[str], samples: Sequence[Sequence[NDArray[Any]]]) -> None:
        self._feeds = [dict(zip(names, sample, strict=True)) for sample in samples]
        self.set_range(0, len(self._feeds))

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._left, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._feeds[start_index:end_index])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The converters log and warn about what they do."""
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
