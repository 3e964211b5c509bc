"""LiteRT: single layers and whole networks against torch, and what is said where something is missing."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edgeprune.profilers import litert_operators, tflite
from sshd import Server
from torch import Tensor, nn

from edgeprune import flatbuffer, litert
from edgeprune.agent import Agent, local_program
from edgeprune.errors import RuntimeMissing, TraceError, UsageError
from edgeprune.host import Ssh
from edgeprune.link import Process
from edgeprune.records import LayerShape
from edgeprune.target import open_target

ACTIVATIONS = {
    "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid, "gelu": F.gelu, "leaky_relu": F.leaky_relu, "tanh": torch.tanh,
}  # fmt: skip


def layer(op: str, in_ch: int = 6, out_ch: int = 0, spatial: tuple[int, ...] = (9, 12), **rest: Any) -> LayerShape:
    plain = {"batch": 1, "kernel": (), "stride": (), "padding": (), "dilation": (), "conv_groups": 1, "fused": ()}
    return LayerShape(op=op, in_ch=in_ch, out_ch=out_ch or in_ch, spatial=spatial, **{**plain, **rest})


def conv(
    out_ch: int = 10,
    kernel: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    op: str = "conv",
    **rest: Any,
) -> LayerShape:
    pairs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return layer(op, out_ch=out_ch, **{k: (v, v) for k, v in pairs.items()}, **rest)


LAYERS = {
    "same padding": conv(),
    "stride 2": conv(stride=2, fused=("relu6",)),
    "no padding": conv(kernel=5, padding=0),
    "more padding than same": conv(kernel=5, padding=3),
    "padding by name": conv(padding=-1),
    "one tap, stride 2": conv(kernel=1, stride=2, padding=0, fused=("hardswish",)),
    "dilation": conv(padding=2, dilation=2, fused=("silu",)),
    "groups": conv(conv_groups=2, fused=("relu",)),
    "depthwise": conv(out_ch=6, conv_groups=6, stride=2, fused=("hardsigmoid",)),
    "depthwise, two each": conv(out_ch=12, conv_groups=6),
    "depthwise, dilation": conv(out_ch=6, conv_groups=6, padding=2, dilation=2),
    "residual": conv(fused=("add", "relu")),
    "residual behind its activation": conv(fused=("relu", "add")),
    "transposed": conv(kernel=2, stride=2, padding=0, op="conv_transpose", fused=("relu",)),
    "linear": layer("linear", 20, 7, (), fused=("relu",)),
    "linear over rows": layer("linear", 20, 7, (), batch=5, fused=("gelu",)),
    "max pool": layer("max_pool", kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    "max pool, no padding": layer("max_pool", kernel=(2, 2), stride=(2, 2), padding=(0, 0)),
    "average pool": layer("avg_pool", kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    "global pool": layer("global_pool"),
    "batch norm": layer("scale"),
    "sum": layer("add"),
    "product": layer("mul"),
    "gate": layer("gate"),
    "concat": layer("concat", 7, conv_groups=3),
    **{name: layer(name) for name in ACTIVATIONS},
}


def in_torch(shape: LayerShape, inputs: list[Tensor]) -> Tensor:
    """The layer by torch's own functions, over (N, C, H, W)."""
    rest, (w, b) = iter(inputs), _weights(shape)
    x = next(rest)
    same = "same" if -1 in shape.padding else shape.padding
    if shape.op == "conv":
        x = F.conv2d(x, w, b, shape.stride, same, shape.dilation, shape.conv_groups)
    elif shape.op == "conv_transpose":
        x = F.conv_transpose2d(x, w, b, shape.stride)
    elif shape.op == "linear":
        x = F.linear(x, w, b)
    elif shape.op == "max_pool":
        x = F.max_pool2d(x, shape.kernel, shape.stride, shape.padding)
    elif shape.op == "avg_pool":
        x = F.avg_pool2d(x, shape.kernel, shape.stride, shape.padding)
    elif shape.op == "global_pool":
        x = x.mean((2, 3), keepdim=True)
    elif shape.op == "scale":
        x = x * b[:, None, None] + b[:, None, None]
    elif shape.op == "concat":
        x = torch.cat([x, *rest], 1)
    elif shape.op in ("add", "mul", "gate"):
        x = x + next(rest) if shape.op == "add" else x * next(rest)
    else:
        x = ACTIVATIONS[shape.op](x)
    for name in shape.fused:
        x = x + next(rest) if name == "add" else ACTIVATIONS[name](x)
    return x


def _weights(shape: LayerShape) -> tuple[Tensor, Tensor]:
    """In torch's order of axes, from the order in which the format has them."""
    per_group = shape.in_ch // shape.conv_groups
    b = torch.from_numpy(flatbuffer.weights(shape.out_ch))
    if shape.op == "conv" and shape.conv_groups == shape.in_ch:
        w = torch.from_numpy(flatbuffer.weights(*shape.kernel, shape.out_ch)).permute(2, 0, 1)[:, None]
    elif shape.op == "conv":
        w = torch.from_numpy(flatbuffer.weights(shape.out_ch, *shape.kernel, per_group)).permute(0, 3, 1, 2)
    elif shape.op == "conv_transpose":
        w = torch.from_numpy(flatbuffer.weights(shape.out_ch, *shape.kernel, shape.in_ch)).permute(3, 0, 1, 2)
    else:
        w = torch.from_numpy(flatbuffer.weights(shape.out_ch, shape.in_ch))
    return w, b


def in_litert(content: bytes, inputs: list[Tensor]) -> np.ndarray[Any, Any]:
    """A model by the runtime, over (N, C, H, W)."""
    model = tflite.RUNTIME.Interpreter(model_content=content, num_threads=1)
    model.allocate_tensors()
    for port, x in zip(tflite._ports(model), inputs, strict=True):
        model.set_tensor(port["index"], tflite.quantised(litert.channels_last(x.numpy()), port))
    model.invoke()
    answer = model.get_output_details()[0]
    return litert.channels_first(tflite.numbers(model.get_tensor(answer["index"]), answer))


def some_inputs(content: bytes) -> list[Tensor]:
    random = np.random.default_rng(0)
    arrays = [random.standard_normal(size).astype(np.float32) for size in flatbuffer.input_shapes(content)]
    return [torch.from_numpy(litert.channels_first(a)) for a in arrays]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_written_directly_computes_what_torch_does(name: str) -> None:
    shape = LAYERS[name]
    assert flatbuffer.buildable(shape)
    content = flatbuffer.layer_model(shape)
    inputs = some_inputs(content)
    wanted = in_torch(shape, inputs).numpy()
    found = in_litert(content, inputs)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 1e-5


def test_every_layer_that_can_be_written_is_compared() -> None:
    assert {shape.op for shape in LAYERS.values()} == set(flatbuffer.LAYERS)
    assert set(ACTIVATIONS) == set(flatbuffer.ACTIVATIONS)


@pytest.mark.parametrize(
    "shape",
    [
        layer("mish"),
        conv(fused=("mish",)),
        conv(op="conv_transpose", stride=2),
        layer("conv", kernel=(3, 3, 3), spatial=(4, 4, 4), stride=(1, 1, 1), padding=(1, 1, 1), dilation=(1, 1, 1)),
    ],
    ids=["mish", "conv and mish", "padded transposed", "volumes"],
)
def test_what_the_converter_writes_otherwise_is_not_timed_alone(shape: LayerShape) -> None:
    assert not flatbuffer.buildable(shape)


@pytest.mark.parametrize("name", ["stride 2", "depthwise", "residual", "linear", "global pool", "gate"])
def test_a_quantised_layer_is_within_a_few_steps_of_torch(name: str) -> None:
    content = flatbuffer.layer_model(LAYERS[name])
    inputs = some_inputs(content)
    calibration = [[litert.channels_last(x.numpy()) for x in inputs]]
    wanted = in_torch(LAYERS[name], inputs).numpy()
    for precision, tolerance in (("f16", 1e-3), ("int8", 0.03)):
        quantised = litert.quantise(content, precision, calibration)  # type: ignore[arg-type]
        assert np.abs(in_litert(quantised, inputs) - wanted).max() <= tolerance * np.abs(wanted).max(), precision


def test_the_order_of_operators_is_read_from_a_model() -> None:
    assert flatbuffer.operators(flatbuffer.layer_model(LAYERS["residual"])) == ["CONV_2D", "ADD"]


# ---- whole networks ------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two inputs of different kinds, and planes as output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(4, 5)

    def forward(self, picture: Tensor, *, facts: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.conv(picture)) * self.fc(facts)[:, :, None, None]
        return y, facts


@pytest.fixture(scope="module")
def here() -> Iterator[Any]:
    with closing(open_target("lite", {"lite": {"kind": "tflite"}})) as opened:
        yield opened


def test_a_network_of_several_inputs_and_planes_as_output_runs_as_in_torch(
    here: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    module, example = Two().eval(), {"picture": torch.randn(2, 3, 6, 8), "facts": torch.randn(2, 4)}
    artifact = here.export(module, example, tmp_path)
    assert capfd.readouterr() == ("", "")  # converters talk
    pictures, facts = torch.randn(5, 3, 6, 8), torch.randn(5, 4)
    found = here.run(artifact, [pictures.numpy(), facts.numpy()])
    with torch.inference_mode():
        wanted = module(pictures, facts=facts)[0].numpy()
    assert found.shape == wanted.shape == (5, 5, 6, 8)
    assert np.abs(found - wanted).max() < 1e-5


@pytest.mark.ssh
def test_images_go_to_a_board_in_parts_that_do_not_pile_up_there(
    server: Server, here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    artifact = here.export(net, torch.zeros(1, 3, 8, 8), tmp_path / "net")
    images = np.random.default_rng(0).normal(size=(10, 3, 8, 8)).astype(np.float32)
    whole, told = here.run(artifact, [images]), []
    cache, module = tmp_path / "cache", importlib.import_module("edgeprune.targets.tflite")
    monkeypatch.setattr(module.Tflite, "part_bytes", 4 * images[0].nbytes)
    with closing(module.Tflite("pi", module.Options(), Ssh("board", server.config, str(cache)))) as board:
        found = board.run(artifact, [images], lambda done, of: told.append((done, of)))
        assert not list(cache.rglob("input*"))
    assert np.array_equal(found, whole)
    assert told == [(0, 10), (4, 10), (8, 10)]


def test_a_network_that_cannot_be_converted_is_refused_by_name(here: Any, tmp_path: Path) -> None:
    module = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, 2, 1, 1))
    with pytest.raises(TraceError, match=r"Sequential cannot be converted to \.tflite: Failed to run converter"):
        here.export(module, torch.randn(1, 4, 6, 6), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_network_that_computes_something_else_afterwards_is_refused() -> None:
    content = flatbuffer.layer_model(LAYERS["batch norm"])
    x = np.ones(flatbuffer.input_shapes(content)[0], np.float32)
    with pytest.raises(TraceError, match=r"Net computes something else as \.tflite: a difference of 1 of the largest"):
        litert._check("Net", content, [x], 1e9 * x)


def test_int8_without_images_is_refused_with_what_to_do(tmp_path: Path) -> None:
    message = r"target lite has precision int8.*give the project a \[data\] section"
    with (
        closing(open_target("lite", {"lite": {"kind": "tflite", "precision": "int8"}})) as opened,
        pytest.raises(UsageError, match=message),
    ):
        opened.export(nn.Linear(3, 3), torch.randn(1, 3), tmp_path)


def test_without_the_converter_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(RuntimeMissing, match=r"install it with: pip install 'edgeprune\[litert-convert\]'"):
        litert.convert(nn.Linear(3, 3), torch.randn(1, 3))


# ---- the device --------------------------------------------------------------------------------------------------


def test_the_fingerprint_says_which_kernels_run(here: Any) -> None:
    details = dict(here.fingerprint().details)
    assert here.fingerprint().runtime.startswith("ai_edge_litert 2")
    assert details["xnnpack"] == "on"
    with closing(open_target("lite", {"lite": {"kind": "tflite", "xnnpack": False}})) as opened:
        assert dict(opened.fingerprint().details)["xnnpack"] == "off"


def test_layers_and_models_are_timed_together_and_a_larger_layer_takes_longer(here: Any, tmp_path: Path) -> None:
    small, large = conv(out_ch=8), conv(out_ch=256, spatial=(40, 40))
    model = here.export(nn.Conv2d(6, 8, 3), torch.randn(1, 6, 9, 12), tmp_path)
    timings = here.time([small, large, model], 5, 10, 0.05, 1.0)
    assert timings[1].median_ms > 5 * timings[0].median_ms > 0
    assert timings[2].median_ms > 0


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("none", r"neither ai_edge_litert nor tflite_runtime is installed; install it there: python3 -m pip install"),
        ("old", r"tflite_runtime is installed and cannot run a model: it needs numpy 1.*pip install 'numpy<2'"),
        ("broken", r"ai_edge_litert is installed and cannot run a model: OSError: libc\.so is too old"),
    ],
)
def test_a_runtime_that_is_missing_or_does_not_work_is_named_with_what_to_do(
    tmp_path: Path, folder: str, message: str
) -> None:
    """A stand-in beside the path hides the real runtime: what is tested is the device program that meets it."""
    hidden = "raise ModuleNotFoundError('hidden', name={name!r})\n"
    failing = "class Interpreter:\n    def __init__(self, **options):\n        raise {error}\n"
    packages = {
        "none": {"ai_edge_litert": None, "tflite_runtime": None},
        "old": {"ai_edge_litert": None, "tflite_runtime": "SystemError('_ARRAY_API not found')"},
        "broken": {"ai_edge_litert": "OSError('libc.so is too old')", "tflite_runtime": None},
    }
    for name, error in packages[folder].items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(hidden.format(name=name) if error is None else "")
        (tmp_path / name / "interpreter.py").write_text(failing.format(error=error))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    with pytest.raises(RuntimeMissing, match=message):
        Agent(lambda: Process([sys.executable, "-u", str(local_program()), "tflite"], environment))


def test_the_model_that_measures_a_call_is_one_relu() -> None:
    assert flatbuffer.operators(tflite.NOTHING) == ["RELU"]
    assert flatbuffer.input_shapes(tflite.NOTHING) == [(1, 16)]


# ---- operators inside a network ------------------------------------------------------------------------------


def stacked(folder: Path) -> Path:
    """Two convolutions of which the second does almost three times the work of the first, and a sum."""
    graph = flatbuffer.Graph()
    x, size = graph.input((1, 48, 48, 32)), (1, 48, 48, 32)
    options = {"strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1}
    for kernel in (3, 5):
        weights, bias = flatbuffer.weights(32, kernel, kernel, 32), flatbuffer.weights(32)
        x = graph.operator(
            "CONV_2D", [x, graph.constant(weights), graph.constant(bias)], size, "Conv2DOptions", **options
        )
    x = graph.operator("ADD", [x, graph.input(size)], size)
    path = folder / "model.tflite"
    path.write_bytes(graph.pack(x))
    return path


def test_the_operators_of_a_network_are_timed_in_the_order_they_run(here: Any, tmp_path: Path) -> None:
    stacked(tmp_path)
    found = here.operators(tmp_path)
    assert found.why == ""
    names = [name for name, _ in found.times]
    assert [name.split()[0] for name in names] == ["Convolution", "Convolution", "Add"]
    assert found.times[1][1] > 1.3 * found.times[0][1]
    assert 0.5 * found.whole_ms < sum(ms for _, ms in found.times) <= found.whole_ms


def test_operators_that_cannot_be_read_are_explained_and_nothing_else_stops(here: Any, tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes(b"no model")
    why = here.operators(tmp_path).why
    assert re.match(r"LiteRT's profiler ended with status 1: RuntimeError: LiteRt\w+ failed", why)
    assert here.operators(tmp_path / "nowhere").why.endswith("nowhere has no model.tflite")
    assert here.time([conv()], 5, 5, 0.5, 0.1)[0].median_ms > 0
    with closing(open_target("lite", {"lite": {"kind": "tflite", "threads": 2}})) as opened:
        stacked(tmp_path)
        assert opened.operators(tmp_path).why == "they are read with one thread and XNNPACK"


def test_a_library_that_the_profiler_does_not_fit_ends_its_own_process_only(tmp_path: Path) -> None:
    """Another release's library may crash it: here one in which nothing is where it is looked for."""
    with pytest.raises(RuntimeError, match=r"LiteRT's profiler ended with status 1: AttributeError: .*LiteRtCreateEnv"):
        litert_operators.measured("libc.so.6", str(stacked(tmp_path)))


def test_an_operator_takes_the_mean_of_its_middle_half_and_belongs_to_its_place_in_a_run() -> None:
    events = []
    for at, us in enumerate((100, 10, 11, 12, 13, 90, 12, 13)):
        events += [("Invoke", 1, 2 * us), ("Conv", 8, us), ("Add", 8, 1), ("Conv", 2, 3)]
        events += [("once", 8, 7)] if at == 0 else []
    found = litert_operators.summary(events)
    assert found["operators"] == [["Conv", 12.5], ["Add", 1.0], ["Conv", 3.0]]
    assert found["whole_us"] == 25.0
