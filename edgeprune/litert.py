"""Write a network as .tflite: converted, checked against torch, and quantised."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import flatbuffer
from .errors import RuntimeMissing, TraceError
from .graph import Example, as_call

CONVERT = "pip install 'edgeprune[litert-convert]'"
AGREES = 1e-3  # a converted network with torch, of the largest output
SIGNATURE = "serving_default"
Precision = Literal["f32", "f16", "int8"]


def convert(module: nn.Module, example: Example) -> bytes:
    """A network as a .tflite model of 32-bit floats, channels last inside and at its inputs and output.

    Args:
        module: any module; it is not changed. Of what it returns, the first tensor is the model's output.
        example: one input; its batch size is fixed in the model.
    Raises:
        RuntimeMissing: the converter is not installed.
        TraceError: the network cannot be converted, or computes something else afterwards.
    """
    try:
        with _silent():
            import litert_torch
    except ImportError as error:
        raise RuntimeMissing(f"converting to .tflite needs litert-torch; install it with: {CONVERT}") from error
    plain = _Positional(module, example)
    with torch.inference_mode():
        wanted = plain(*plain.inputs)
    planes = [at for at, x in enumerate(plain.inputs) if x.dim() == 4]
    turned = litert_torch.to_channel_last_io(plain, args=planes, outputs=[0] if wanted.dim() == 4 else None).eval()
    inputs = tuple(channels_last(x.numpy()) for x in plain.inputs)
    with TemporaryDirectory(prefix="edgeprune-convert-") as folder:
        path = f"{folder}/model.tflite"
        try:
            with _silent():
                litert_torch.convert(turned, tuple(map(torch.from_numpy, inputs))).export(path)
        except Exception as error:  # the converter raises its own kinds
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise TraceError(f"{type(module).__name__} cannot be converted to .tflite: {reason}") from error
        content = Path(path).read_bytes()
    _check(type(module).__name__, content, inputs, channels_last(wanted.numpy()))
    return content


def quantise(content: bytes, precision: Precision, calibration: Sequence[Sequence[NDArray[Any]]] = ()) -> bytes:
    """A model with 16-bit weights (f16), or with 8-bit weights and activations, inputs and output too (int8).

    Args:
        content: a model of 32-bit floats.
        precision: of the result.
        calibration: for int8: what the inputs may be, in the order of the network's arguments, in the model's layout.
    """
    if precision == "f32":
        return content
    try:
        with _silent():
            from ai_edge_quantizer import calibrator, quantizer, recipe_manager
            from ai_edge_quantizer.algorithm_manager import AlgorithmName
            from ai_edge_quantizer.qtyping import TFLOperationName
            from ai_edge_quantizer.utils import qsv_utils
    except ImportError as error:
        raise RuntimeMissing(f"{error.name} is missing; install it with: {flatbuffer.INSTALL}") from error
    recipe, everything = recipe_manager.RecipeManager(), TFLOperationName.ALL_SUPPORTED
    if precision == "f16":
        recipe.add_weight_only_config(".*", everything, num_bits=16, algorithm_key=AlgorithmName.FLOAT_CASTING)
    else:
        recipe.add_static_config(".*", everything, activation_num_bits=8, weight_num_bits=8)
    samples: list[Mapping[str, Any]] = [{f"args_{at}": x for at, x in enumerate(sample)} for sample in calibration]
    with _silent():
        work = quantizer.Quantizer(bytearray(content), recipe.get_quantization_recipe())
        if precision == "f16":
            return bytes(work.quantize().quantized_model)
        # over all samples: the moving average that is usual cuts off what only some of them reach
        ranges = calibrator.Calibrator(content, num_threads=1, qsv_update_func=qsv_utils.min_max_update)
        ranges.calibrate({SIGNATURE: samples}, recipe)
        return bytes(work.quantize(ranges.get_model_qsvs()).quantized_model)


def channels_last(x: NDArray[Any]) -> NDArray[Any]:
    """(N, C, H, W) as (N, H, W, C); anything else as it is."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x


def channels_first(x: NDArray[Any]) -> NDArray[Any]:
    """(N, H, W, C) as (N, C, H, W); anything else as it is."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x


class _Positional(nn.Module):
    """A network that takes its tensors by position and returns one."""

    def __init__(self, module: nn.Module, example: Example) -> None:
        super().__init__()
        args, kwargs = as_call(example)
        self.module = copy.deepcopy(module).eval()
        self.inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        self._call: Callable[..., Any] = lambda tensors: self.module(
            *_filled(args, tensors), **dict(zip(kwargs, _filled(kwargs.values(), tensors), strict=True))
        )

    def forward(self, *tensors: Tensor) -> Tensor:
        leaves = torch.utils._pytree.tree_flatten(self._call(iter(tensors)))[0]
        return next(leaf for leaf in leaves if isinstance(leaf, Tensor))


def _filled(values: Any, tensors: Iterator[Tensor]) -> list[Any]:
    return [next(tensors) if isinstance(value, Tensor) else value for value in values]


def _check(name: str, content: bytes, inputs: Sequence[NDArray[Any]], wanted: NDArray[Any]) -> None:
    """Raises TraceError when the model computes something else than the network."""
    from ai_edge_litert.interpreter import Interpreter

    with _silent():
        runner = Interpreter(model_content=content, num_threads=1).get_signature_runner()
        (found,) = runner(**{f"args_{at}": x for at, x in enumerate(inputs)}).values()
    off = float(np.abs(found - wanted).max()) / (float(np.abs(wanted).max()) or 1.0)
    if not off <= AGREES:
        raise TraceError(
            f"{name} computes something else as .tflite: a difference of {off:.2g} of the largest output (allowed "
            f"{AGREES:g}); please report this network"
        )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Converter, quantiser and runtime print about themselves, from Python and, past it, from C++."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for number, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, number)
        for descriptor in (*kept, nowhere):
            os.close(descriptor)
