"""Write a network as ONNX, the file that every runtime here starts from."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from . import files
from .errors import RuntimeMissing, TraceError
from .graph import Example, as_call


def to_onnx(module: nn.Module, example: Example, path: Path) -> None:
    """Export in evaluation mode, batch norm folded, weights inside the file.

    Args:
        module: any module; it is not changed.
        example: one input; its batch size is fixed in the file.
        path: written beside and renamed.
    Raises:
        RuntimeMissing: the exporter's packages are not installed.
        TraceError: the network cannot be exported; the message names the operator.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeMissing(f"{error.name} is missing; install it with: pip install 'edgeprune[openvino]'") from error
    args, kwargs = as_call(example)
    module = copy.deepcopy(module).eval()
    with files.writing(path) as beside, _quiet():
        try:
            torch.onnx.export(
                module, args, str(beside), kwargs=kwargs or None, dynamo=True, external_data=False, verbose=False
            )
        except Exception as error:  # the exporter raises its own kinds
            reason = str(error).strip().splitlines()
            raise TraceError(
                f"{type(module).__name__} cannot be exported to ONNX: {reason[0] if reason else type(error).__name__}"
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
