"""The ONNX files for TensorRT: whole networks and single layers, by ONNX Runtime against torch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edgeprune.profilers import onnx_inputs
from edgeprune.profilers.onnx_inputs import OnnxError
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import image
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune import trtgraph, trtlayer
from edgeprune.errors import TraceError
from edgeprune.records import LayerShape

TOLERANCE = {"f32": 1e-5, "f16": 1e-2, "int8": 0.1}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.fc(torch.relu(x + self.b(x)).mean((2, 3)))


def ran(content: bytes, inputs: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    return np.asarray(session.run(None, dict(zip(names, inputs, strict=True)))[0])


def off(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.fixture(scope="module")
def network() -> tuple[Any, Tensor, np.ndarray[Any, Any]]:
    """A residual network, exported once: (model, input, torch's output)."""
    torch.manual_seed(0)
    module, x = Residual().eval(), image(2, 3, 8, 8)
    with torch.inference_mode():
        return trtgraph.exported(module, x), x, module(x).numpy()


@pytest.mark.parametrize("precision", ["f32", "f16", "int8"])
def test_a_network_computes_in_each_precision_what_torch_does(network: Any, precision: Any) -> None:
    model, x, wanted = network
    content = trtgraph.computed(copy.deepcopy(model), precision, [[x.numpy()]])
    assert off(ran(content, [x.numpy()]), wanted) < TOLERANCE[precision]
    made = onnx.load_from_string(content)
    assert [p.version for p in made.opset_import if p.domain == ""] == [17]
    ports = [*made.graph.input, *made.graph.output]
    assert {p.type.tensor_type.elem_type for p in ports} == {onnx.TensorProto.FLOAT}
    weights = [t for t in made.graph.initializer if t.name.startswith("b.weight")]
    kinds = {"f32": onnx.TensorProto.FLOAT, "f16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.FLOAT}
    assert weights[0].data_type == kinds[precision]
    operators = {node.op_type for node in made.graph.node}
    assert ("DequantizeLinear" in operators) == (precision == "int8")


def test_int8_scales_are_symmetric_for_weights_and_activations(network: Any) -> None:
    model, x, _ = network
    made = onnx.load_from_string(trtgraph.computed(copy.deepcopy(model), "int8", [[x.numpy()]]))
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in made.graph.initializer}
    zeros = [constants[n.input[2]] for n in made.graph.node if n.op_type == "QuantizeLinear"]
    assert len(zeros) > 5
    assert not any(zero.any() for zero in zeros)


@pytest.mark.parametrize("precision", ["f32", "f16", "int8"])
def test_every_node_has_a_name_of_its_own_after_its_module(network: Any, precision: Any) -> None:
    model, x, _ = network
    content = trtgraph.computed(copy.deepcopy(model), precision, [[x.numpy()]])
    names = onnx_inputs.nodes(content)
    assert names == [node.name for node in onnx.load_from_string(content).graph.node]
    assert len(set(names)) == len(names)
    assert {"a.0/Conv", "a.2/Relu", "b/Conv", "Add", "fc/Gemm"} <= set(names)


def test_an_operator_that_opset_17_cannot_say_is_refused_by_name() -> None:
    node = onnx.helper.make_node("Gelu", ["x"], ["y"], approximate="tanh")
    ports = [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", ports[:1], ports[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    with pytest.raises(TraceError, match=r"Net needs the operator Gelu, which TensorRT 8\.5 does not read"):
        trtgraph.lower(model, "Net")


NEW: dict[str, tuple[Any, Any]] = {
    "a mean over axes": ("ReduceMean", {"inputs": ["axes"], "axes": [1]}),
    "an exact gelu": ("Gelu", {}),
    "mish": ("Mish", {}),
    "a split into equal parts": ("Split", {"num_outputs": 2, "axis": 1}),
    "padding of one axis": ("Pad", {"inputs": ["pads", "", "axes"], "pads": [1, 2], "axes": [1]}),
}


@pytest.mark.parametrize("case", NEW.values(), ids=NEW.keys())
def test_an_operator_of_a_newer_opset_computes_the_same_in_opset_17(case: tuple[str, dict[str, Any]]) -> None:
    operator, about = case
    inputs = ["x", *about.get("inputs", [])]
    constants = [onnx.numpy_helper.from_array(np.array(about[n], np.int64), n) for n in about.get("inputs", []) if n]
    more = {k: v for k, v in about.items() if k not in ("inputs", "axes", "pads")}
    outputs = ["y", "z"] if operator == "Split" else ["y"]
    node = onnx.helper.make_node(operator, inputs, outputs, **more)
    x = onnx.helper.make_tensor_value_info("x", 1, [2, 6, 3])
    graph = onnx.helper.make_graph([node], "g", [x], [onnx.helper.make_tensor_value_info("y", 1, None)], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    data = np.random.default_rng(0).standard_normal((2, 6, 3)).astype(np.float32)
    wanted = ran(model.SerializeToString(), [data])
    trtgraph.lower(model, "Net")
    assert off(ran(model.SerializeToString(), [data]), wanted) < 1e-5


def test_what_stands_in_the_place_of_an_operator_takes_no_name_that_another_has() -> None:
    """The exporter calls the results of two of them gelu and gelu_1."""
    nodes = [
        onnx.helper.make_node("Gelu", ["x"], ["gelu"], "a"),
        onnx.helper.make_node("Gelu", ["gelu"], ["gelu_1"], "b"),
    ]
    ports = [onnx.helper.make_tensor_value_info(name, 1, [4]) for name in ("x", "gelu_1")]
    graph = onnx.helper.make_graph(nodes, "g", ports[:1], ports[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    data = np.linspace(-2, 2, 4, dtype=np.float32)
    wanted = ran(model.SerializeToString(), [data])
    trtgraph.lower(model, "Net")
    onnx.checker.check_model(model)
    assert off(ran(model.SerializeToString(), [data]), wanted) < 1e-5


# ---- layers --------------------------------------------------------------------------------------------------


def layer(op: str, in_ch: int = 6, out_ch: int = 0, spatial: tuple[int, ...] = (9, 12), **rest: Any) -> LayerShape:
    plain = {"batch": 2, "kernel": (), "stride": (), "padding": (), "dilation": (), "conv_groups": 1, "fused": ()}
    return LayerShape(op=op, in_ch=in_ch, out_ch=out_ch or in_ch, spatial=spatial, **{**plain, **rest})


def conv(out_ch: int = 10, op: str = "conv", kernel: int = 3, stride: int = 1, padding: int = 1, **rest: Any) -> Any:
    window = {"kernel": (kernel,) * 2, "stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (1, 1)}
    return layer(op, out_ch=out_ch, **{**window, **rest})


LAYERS = {
    "convolution": conv(),
    "stride, relu6": conv(stride=2, fused=("relu6",)),
    "padding by name": conv(padding=-1, stride=2, fused=("hardsigmoid",)),
    "dilation": conv(padding=2, dilation=(2, 2), fused=("silu",)),
    "groups": conv(conv_groups=2, fused=("relu",)),
    "depthwise": conv(out_ch=6, conv_groups=6, stride=2, fused=("hardswish",)),
    "residual": conv(fused=("add", "relu")),
    "transposed": conv(op="conv_transpose", kernel=2, stride=2, padding=0, fused=("gelu",)),
    "signal": layer("conv", out_ch=5, spatial=(20,), kernel=(3,), stride=(1,), padding=(1,), dilation=(1,)),
    "linear": layer("linear", 20, 7, (), fused=("mish",)),
    "max pool": layer("max_pool", kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    "average pool": layer("avg_pool", kernel=(2, 2), stride=(2, 2), padding=(0, 0)),
    "global pool": layer("global_pool"),
    "batch norm": layer("scale"),
    "sum": layer("add"),
    "gate": layer("gate"),
    "concat": layer("concat", 7, conv_groups=3),
    "elu": layer("elu"),
    "leaky": layer("leaky_relu"),
}  # fmt: skip
ACTS: dict[str, Any] = {
    "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu, "mish": F.mish, "elu": F.elu, "leaky_relu": F.leaky_relu,
}  # fmt: skip


def computed(shape: LayerShape, x: Tensor, others: list[Tensor]) -> Tensor:
    """The layer in torch, with the pattern as its weights."""
    pattern = lambda *size: torch.from_numpy(trtlayer.weights(*size).copy())  # noqa: E731
    bias = pattern(shape.out_ch)
    if shape.op == "conv":
        call = F.conv1d if len(shape.kernel) == 1 else F.conv2d
        weight = pattern(shape.out_ch, shape.in_ch // shape.conv_groups, *shape.kernel)
        padding: Any = shape.padding
        if shape.padding[0] < 0:  # same, the rest at the end
            total = [
                max((-(-n // s) - 1) * s + k - n, 0)
                for n, s, k in zip(x.shape[2:], shape.stride, shape.kernel, strict=True)
            ]
            x = F.pad(x, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
            padding = 0
        y = call(x, weight, bias, shape.stride, padding, shape.dilation, shape.conv_groups)
    elif shape.op == "conv_transpose":
        y = F.conv_transpose2d(x, pattern(shape.in_ch, shape.out_ch, *shape.kernel), bias, shape.stride)
    elif shape.op == "linear":
        y = F.linear(x, pattern(shape.out_ch, shape.in_ch), bias)
    elif shape.op == "max_pool":
        y = F.max_pool2d(x, shape.kernel, shape.stride, shape.padding)
    elif shape.op == "avg_pool":
        y = F.avg_pool2d(x, shape.kernel, shape.stride)
    elif shape.op == "global_pool":
        y = x.mean((2, 3), keepdim=True)
    elif shape.op == "scale":
        each = pattern(1, shape.in_ch, 1, 1)
        y = x * each + each
    elif shape.op in ("add", "gate"):
        y = x + others[0] if shape.op == "add" else x * others[0]
    elif shape.op == "concat":
        y = torch.cat([x, *others], 1)
    else:
        y = ACTS[shape.op](x)
    for name in shape.fused:
        y = y + others[0] if name == "add" else ACTS[name](y)
    return y


@pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS.keys())
def test_a_layer_computes_what_torch_does_and_stands_between_neighbours(shape: LayerShape) -> None:
    made = {precision: trtlayer.forms(shape, precision) for precision in ("f32", "f16", "int8")}
    content, nodes = made["f32"][-1]
    random = np.random.default_rng(0)
    inputs = [random.standard_normal(size).astype(np.float32) for _, size in onnx_inputs.inputs(content)]
    tensors = [torch.from_numpy(i) for i in inputs]
    wanted = computed(shape, tensors[0], tensors[1:]).numpy()
    assert off(ran(content, inputs), wanted) < 1e-5
    assert all(node.startswith("layer/") for node in nodes)
    for precision in ("f16", "int8"):
        ran(made[precision][-1][0], inputs)
    if shape.spatial and shape.op in (*trtlayer.HEAVY, *trtlayer.POOLS):
        for forms in made.values():
            assert {"before/Conv", "after/Conv"} <= set(forms[0][1])
            ran(forms[0][0], inputs)


# ---- inputs without the onnx package -------------------------------------------------------------------------


def test_inputs_are_read_without_the_onnx_package() -> None:
    content, _ = trtlayer.forms(LAYERS["residual"], "f32")[0]
    assert onnx_inputs.inputs(content) == [("x0", (2, 6, 9, 12)), ("x1", (2, 10, 9, 12))]


SOUND = trtlayer.forms(LAYERS["linear"], "f32")[0][0]


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60), st.integers(0, len(SOUND)), st.integers(0, len(SOUND)))
def test_bytes_that_are_no_onnx_file_are_an_error_and_nothing_worse(noise: bytes, start: int, end: int) -> None:
    for content in (noise, SOUND[:start], SOUND[:start] + noise + SOUND[end:]):
        try:
            assert all(isinstance(name, str) for name, _ in onnx_inputs.inputs(content))
        except OnnxError:
            continue
