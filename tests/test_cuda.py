"""Plain CUDA on a machine without a GPU: what it says, its layers and its files, computed on the processor instead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from edgeprune.profilers import cuda, onnx_inputs
from nets import NETS, image
from test_nvidia_graphs import LAYERS, off, ran
from torch import Tensor, nn

from edgeprune import files, target, torchscript, trtlayer
from edgeprune.errors import ConfigError, TargetError, TraceError
from edgeprune.records import LayerShape


def test_without_a_driver_the_target_says_what_is_missing() -> None:
    with pytest.raises(TargetError, match=r"this machine has no NVIDIA driver \(libcuda.so.1: .*install it"):
        target.open_target("gpu", {"gpu": {"kind": "cuda"}})


def test_a_torch_that_cannot_use_the_gpu_is_named_with_what_to_install() -> None:
    assert cuda.usable(None, "2.13.0+cpu", "12.4").startswith(
        "torch 2.13.0+cpu is built without CUDA; install a build with it for CUDA 12.4 or older"
    )
    assert "is built for CUDA 13.0 and cannot use the GPU of a driver for CUDA 12.4" in cuda.usable("13.0", "2", "12.4")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("CUDA out of memory. Tried to allocate 2 GiB", "the GPU is out of memory .*use a smaller batch"),
        ("CUDA error: no kernel image is available for execution", "this build of torch has no code for this GPU"),
    ],
)
def test_what_torch_raises_about_cuda_is_told_in_the_users_words(raised: str, said: str) -> None:
    with pytest.raises(cuda.CudaError, match=said), cuda.explained():
        raise RuntimeError(raised)


def test_int8_is_no_precision_of_plain_cuda() -> None:
    with pytest.raises(ConfigError, match=r"\[target.gpu\]: precision: input should be 'f32' or 'f16'"):
        target.check_options("gpu", {"kind": "cuda", "precision": "int8"})


@pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS.keys())
def test_a_layer_computes_what_onnx_runtime_does_with_the_same_weights(shape: LayerShape) -> None:
    """The device program's layers get the pattern as their weights, on the processor."""

    def placed(tensor: Tensor) -> Tensor:
        return torch.from_numpy(trtlayer.weights(*tensor.shape).copy())

    content, _ = trtlayer.forms(shape, "f32")[-1]
    call, sizes = cuda.layer(files.plain(shape), placed)
    assert [tuple(size) for size in sizes] == [size for _, size in onnx_inputs.inputs(content)]
    random = np.random.default_rng(0)
    inputs = [random.standard_normal(size).astype(np.float32) for size in sizes]
    found = call(*map(torch.from_numpy, inputs)).numpy()
    assert off(found, ran(content, inputs)) < 1e-5


@pytest.mark.parametrize("name", ["shared", "auxiliary"])
def test_a_network_is_loaded_and_folded_as_it_was_written(tmp_path: Path, name: str) -> None:
    make, example = NETS[name]
    torch.manual_seed(0)
    module = make().eval()
    path = tmp_path / "model.ts"
    inputs = example if isinstance(example, tuple) else (example,)
    torchscript.write(module, example, path)
    found, shapes = cuda.loaded(str(path), torch.float32, True, "cpu")
    assert shapes == [tuple(x.shape) for x in inputs]
    with torch.inference_mode():
        wanted, computed = cuda.first(module(*inputs)), cuda.first(found(*inputs))
    assert off(computed.numpy(), wanted.numpy()) < 1e-5
    assert "batch_norm" not in str(found.inlined_graph)


def test_a_network_that_tracing_would_change_is_refused(tmp_path: Path) -> None:
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.randn(())

    with pytest.raises(TraceError, match="Random computes something else as TorchScript: a difference of"):
        torchscript.write(Random(), image(), tmp_path / "model.ts")
    with pytest.raises(TraceError, match="Linear takes more than tensors by position"):
        torchscript.write(nn.Linear(3, 3), {"input": torch.zeros(1, 3)}, tmp_path / "model.ts")
    assert not list(tmp_path.iterdir())
