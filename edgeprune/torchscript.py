"""Networks as TorchScript files: what plain torch loads on a device without their Python.

TorchScript is deprecated and still what the torch of every JetPack loads; nothing of Python is unpickled from it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from . import files
from .errors import TraceError
from .graph import Example, as_call

AGREES = 1e-4  # a written network with the module, of the largest output


def write(module: nn.Module, example: Example, path: Path) -> None:
    """Trace and save a network in 32 bits; the shapes of its inputs go into the file too.

    The device puts it into its precision and folds batch norm.

    Args:
        module: any module; it is not changed.
        example: one input; its batch size is fixed in the file.
        path: written beside and renamed.
    Raises:
        TraceError: it cannot be traced, or computes something else afterwards.
    """
    args, kwargs = as_call(example)
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if kwargs or len(inputs) != len(args):
        raise TraceError(f"{type(module).__name__} takes more than tensors by position, which plain CUDA does not run")
    module = copy.deepcopy(module).eval()
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation, and what tracing fixes: compared below
        try:
            traced = torch.jit.trace(module, tuple(inputs))
        except (RuntimeError, TypeError, ValueError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise TraceError(f"{type(module).__name__} cannot be traced: {reason}") from error
        _check(module, traced, inputs)
        shapes = ";".join(",".join(map(str, x.shape)) for x in inputs)
        with files.writing(path) as beside:
            torch.jit.save(traced, str(beside), _extra_files={"inputs": shapes})


def _check(module: nn.Module, traced: nn.Module, inputs: Sequence[Tensor]) -> None:
    wanted, found = (_first(m(*inputs)) for m in (module, traced))
    off = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    if not off <= AGREES:
        raise TraceError(
            f"{type(module).__name__} computes something else as TorchScript: a difference of {off:.2g} of the largest "
            f"output (allowed {AGREES:g}); please report this network"
        )


def _first(found: object) -> Tensor:
    return next(leaf for leaf in torch.utils._pytree.tree_flatten(found)[0] if isinstance(leaf, Tensor))
