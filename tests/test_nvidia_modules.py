"""The version adapter on NVIDIA's own modules of three generations, and real builds by TensorRT for RTX. No GPU.

What is built here is accepted by TensorRT for RTX; that says nothing of how fast it runs, or of a Jetson.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nets import NETS
from nvidia_modules import MODULES, device_program, told

from edgeprune import surgery, trtgraph, trtlayer
from edgeprune.errors import AgentError, SurgeryError, TraceError
from edgeprune.graph import as_call, trace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from prunability_models import Case, build
from test_nvidia_graphs import LAYERS
from test_zoo import ZOO

pytestmark = pytest.mark.nvidia
OPENING = {
    "precision": "f16", "device": 0, "backend": "auto", "tf32": False, "dla": -1, "external_tactics": True,
    "workspace_mib": 256, "power_mode": "",
}  # fmt: skip
FEATURES = "import dataclasses; print(json.dumps([dataclasses.asdict(api.features), api.network_flags()]))"
REFUSED = """
try:
    api.build(b"", trt_api.Wish("f32", False, -1, True, 256))
except trt_api.BuildError as error:
    print(json.dumps(str(error)))
"""
BUILD = """
wish = trt_api.Wish(sys.argv[4], False, int(sys.argv[5]), True, 256)
found = []
for path in sys.argv[3].split(":"):
    with open(path, "rb") as stream:
        try:
            found.append(len(api.build(stream.read(), wish)))
        except trt_api.BuildError as error:
            found.append(str(error))
print(json.dumps(found))
"""


def built(folder: Path, contents: list[bytes], precision: str = "f32", dla: int = -1) -> list[Any]:
    """Sizes of the engines that TensorRT for RTX builds, or what it says."""
    paths = [folder / f"{at}.onnx" for at in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    found: list[Any] = told("rtx", BUILD, ":".join(map(str, paths)), precision, str(dla))
    return found


# ---- three generations ---------------------------------------------------------------------------------------


def test_what_each_generation_has_is_found_in_its_own_module() -> None:
    features = {kind: told(kind, FEATURES) for kind in MODULES}
    v8, rtx, lean = features["v8"][0], features["rtx"][0], features["lean"][0]
    assert (v8["weak_types"], v8["strong_types"], v8["explicit_batch"], v8["calibrators"]) == (True, False, True, True)
    assert (rtx["weak_types"], rtx["strong_types"], rtx["explicit_batch"]) == (False, True, False)
    assert (lean["weak_types"], lean["calibrators"], lean["builds"]) == (False, False, False)
    assert all(f["named_tensors"] and f["inspector"] for f in (v8, rtx, lean))
    assert {kind: flags for kind, (_, flags) in features.items()} == {"v8": 1, "rtx": 1, "lean": 0}


@pytest.mark.parametrize("kind", list(MODULES))
def test_every_name_that_engines_are_run_and_profiled_by_is_in_the_module(kind: str) -> None:
    body = """
names = {
    "IExecutionContext": ["set_tensor_address", "get_tensor_address", "get_tensor_shape", "execute_async_v3",
                          "report_to_profiler", "enqueue_emits_profile", "profiler"],
    "ICudaEngine": ["num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype",
                    "create_execution_context", "create_engine_inspector"],
    "IProfiler": ["report_layer_time"],
    "Runtime": ["deserialize_cuda_engine"],
}
module = api.module
missing = [k + "." + n for k, each in names.items() for n in each if not hasattr(getattr(module, k), n)]
from device.trt_engine import TYPES
unknown = [n for n in TYPES if not hasattr(module.DataType, n)]
kinds = [n for n in ("INPUT", "OUTPUT") if not hasattr(module.TensorIOMode, n)]
profiler = api.profiler()
profiler.report_layer_time("a", 1.5)
print(json.dumps([missing, unknown, kinds, profiler.rows]))
"""
    missing, unknown, kinds, rows = told(kind, body)
    assert not missing
    assert set(unknown) <= {"INT64"}  # from 10 on
    assert not kinds
    assert rows == [["a", 1.5]]


@pytest.mark.parametrize("kind", ["v8", "rtx"])
def test_what_a_build_is_configured_by_is_in_the_module(kind: str) -> None:
    body = """
module = api.module
config = ["profiling_verbosity", "set_memory_pool_limit", "clear_flag", "set_flag", "max_aux_streams",
          "set_tactic_sources", "default_device_type", "DLA_core", "create_timing_cache", "set_timing_cache"]
missing = [n for n in config if not hasattr(module.IBuilderConfig, n)]
missing += [n for n in ("TF32", "GPU_FALLBACK") if not hasattr(module.BuilderFlag, n)]
missing += [n for n in ("create_network", "build_serialized_network") if not hasattr(module.Builder, n)]
print(json.dumps(missing))
"""
    assert told(kind, body) == []


# ---- without a driver, and with one that finds no GPU --------------------------------------------------------


@pytest.mark.parametrize("kind", ["v8", "rtx"])
def test_without_a_driver_the_device_program_says_so_before_it_touches_tensorrt(kind: str) -> None:
    with device_program(kind) as agent:
        with pytest.raises(AgentError, match=r"this machine has no NVIDIA driver \(libcuda.so.1: .*nvidia-jetpack"):
            agent.call("open", 60, **OPENING)
        assert agent.call("state", 60)["memory_mb"] > 0  # it still lives


def test_with_a_real_driver_and_no_gpu_the_device_program_says_so() -> None:
    with (
        device_program("v8", driver=True) as agent,
        pytest.raises(AgentError, match=r"cuInit failed \(CUDA error 100\): the driver finds no GPU; check CUDA_VIS"),
    ):
        agent.call("open", 60, **OPENING)


def test_without_a_gpu_tensorrt_8_gives_no_builder_and_that_is_an_error_with_its_own_words() -> None:
    assert "tensorrt 8.6.0 gives no Builder: " in told("v8", REFUSED)
    assert "CUDA initialization failure" in told("v8", REFUSED)


def test_a_runtime_alone_says_that_it_builds_nothing() -> None:
    assert "tensorrt-lean 11.4.0.106 is a runtime alone and builds no engines" in told("lean", REFUSED)


def test_an_engine_that_does_not_load_is_an_error_with_its_own_words() -> None:
    body = """
try:
    api.loaded(b"no engine" * 100)
except trt_api.BuildError as error:
    print(json.dumps(str(error)))
"""
    assert "cannot load an engine, which was built for another GPU or release, or is damaged: " in told("rtx", body)


@pytest.mark.parametrize("kind", ["v8", "rtx"])
def test_a_build_that_gives_nothing_says_why_and_what_to_do_when_memory_ran_out(kind: str) -> None:
    """The words are put into the module's own log: no build runs out of memory here."""
    body = """
severity = api.module.ILogger.Severity
found = [str(api._failed("builds no engine"))]
api.log.log(severity.INFO, "not worth keeping")
api.log.log(severity.WARNING, "Requested amount of GPU memory could not be allocated: out of memory")
found.append(str(api._failed("builds no engine")))
print(json.dumps(found))
"""
    silent, full = told(kind, body)
    assert silent.endswith("builds no engine: it does not say why; is there a GPU?")
    assert "runs out of memory: end other programs, or choose a smaller batch or workspace. It says: Requested" in full


# ---- builds --------------------------------------------------------------------------------------------------


def cut(name: str) -> tuple[torch.nn.Module, Any]:
    """A network of the test zoo with half of every group's units."""
    make, example = NETS[name]
    torch.manual_seed(0)
    model = make().eval()
    graph = trace(model, example)
    keep = {g.id: tuple(range(g.width - (g.width + 1) // 2, g.width)) for g in graph.groups}
    try:
        return surgery.cut(model, graph, keep).eval(), example
    except SurgeryError:
        return model, example


def contents(module: torch.nn.Module, example: Any) -> dict[str, bytes]:
    args, kwargs = as_call(example)
    sample = [x.numpy() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    exported = trtgraph.exported(module, example)
    precisions: tuple[Any, ...] = ("f32", "f16", "int8")
    return {p: trtgraph.computed(copy.deepcopy(exported), p, [sample]) for p in precisions}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NETS if name != "decides"])
def test_a_pruned_network_is_parsed_and_built_in_every_precision(tmp_path: Path, name: str) -> None:
    found = contents(*cut(name))
    sizes = {p: built(tmp_path, [content], p)[0] for p, content in found.items()}
    assert all(isinstance(size, int) and size > 1000 for size in sizes.values()), sizes


@pytest.mark.filterwarnings("ignore")
def test_a_network_that_decides_on_its_data_is_refused_before_that() -> None:
    with pytest.raises((TraceError, SurgeryError)):
        contents(*cut("decides"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_a_pruned_network_of_the_zoos_is_parsed_and_built_in_every_precision(tmp_path: Path, case: Case) -> None:
    model, example = build(case)
    graph = trace(model, example)
    keep = {g.id: tuple(range(g.width - (g.width + 1) // 2, g.width)) for g in graph.groups}
    found = contents(surgery.cut(model, graph, keep).eval(), example)
    sizes = {p: built(tmp_path, [content], p)[0] for p, content in found.items()}
    assert all(isinstance(size, int) and size > 1000 for size in sizes.values()), sizes


@pytest.mark.parametrize("precision", ["f32", "f16", "int8"])
def test_every_layer_of_a_table_is_built_between_neighbours_and_alone(tmp_path: Path, precision: str) -> None:
    files = {f"{name}, form {at}": content for name, shape in LAYERS.items()
             for at, (content, _) in enumerate(trtlayer.forms(shape, precision))}  # fmt: skip
    found = dict(zip(files, built(tmp_path, list(files.values()), precision), strict=True))
    assert not {name: said for name, said in found.items() if not isinstance(said, int)}


# ---- what has to be refused ----------------------------------------------------------------------------------


def broken() -> dict[str, bytes]:
    """Files of a network in which surgery would have gone wrong, or that is no network for TensorRT."""
    content, _ = trtlayer.forms(LAYERS["residual"], "f32")[1]

    def changed(change: Any) -> bytes:
        model = onnx.load_from_string(content)
        del model.graph.value_info[:]
        change(model)
        return bytes(model.SerializeToString())

    def narrower(model: Any) -> None:
        for at, tensor in enumerate(model.graph.initializer):
            array = onnx.numpy_helper.to_array(tensor)
            if array.ndim == 4:
                model.graph.initializer[at].CopyFrom(onnx.numpy_helper.from_array(array[:, :-1].copy(), tensor.name))

    def wider_sum(model: Any) -> None:
        model.graph.input[1].type.tensor_type.shape.dim[1].dim_value = 7

    def unknown(model: Any) -> None:
        model.graph.node[-1].op_type = "Pruned"

    def open_size(model: Any) -> None:
        for port in model.graph.input:
            port.type.tensor_type.shape.dim[0].dim_param = "batch"

    return {
        "weights of another width": changed(narrower),
        "a sum of different widths": changed(wider_sum),
        "an unknown operator": changed(unknown),
        "an open batch size": changed(open_size),
        "a file that is cut off": content[: len(content) // 2],
        "no file": b"",
    }


@pytest.mark.parametrize("name", list(broken()))
def test_a_broken_graph_is_refused_with_a_reason(tmp_path: Path, name: str) -> None:
    (said,) = built(tmp_path, [broken()[name]])
    assert isinstance(said, str), "it was built"
    assert "refuses the network: " in said or "builds no engine: " in said or "has no fixed shape" in said, said
    assert len(said.partition(": ")[2]) > 10 or "has no fixed shape" in said


def test_a_file_of_measured_kernels_that_is_damaged_or_not_there_is_no_matter(tmp_path: Path) -> None:
    body = """
wish, path = trt_api.Wish("f32", False, -1, True, 256), sys.argv[4]
with open(sys.argv[3], "rb") as stream:
    content = stream.read()
sizes = [len(api.build(content, wish, path))]
with open(path, "wb") as stream:
    stream.write(b"not a cache")
sizes.append(len(api.build(content, wish, path)))
print(json.dumps(sizes))
"""
    (tmp_path / "net.onnx").write_bytes(trtlayer.forms(LAYERS["convolution"], "f32")[0][0])
    sizes = told("rtx", body, str(tmp_path / "net.onnx"), str(tmp_path / "cache"))
    assert all(size > 1000 for size in sizes)


def test_an_accelerator_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """TensorRT for RTX takes any core in silence; the number of cores tells."""
    (said,) = built(tmp_path, [trtlayer.forms(LAYERS["convolution"], "f16")[0][0]], "f16", dla=0)
    assert said == "DLA core 0 was asked for, and tensorrt-rtx 1.7.1.116 finds none here; leave `dla` out"


def test_a_build_that_is_refused_leaves_the_next_one_sound(tmp_path: Path) -> None:
    sound = trtlayer.forms(LAYERS["convolution"], "f32")[0][0]
    first, second, third = built(tmp_path, [sound, broken()["an unknown operator"], sound])
    assert isinstance(second, str)
    assert isinstance(first, int)
    assert isinstance(third, int)
    assert np.isclose(first, third, rtol=0.05)
