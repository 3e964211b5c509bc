"""Write a network as ONNX, the file that every runtime here starts from."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from . import files
from .errors import RuntimeMissing, TraceError
from .graph import Example, as_call

ANSI = re.compile(r"\x1b\[[\d;]*m")  # colours
UNKNOWN = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")
EXPORTER = re.escape(__file__) + r"|site-packages/(torch|onnxscript|onnx_ir|onnx)/|/contextlib\.py$"  # no network's
MOVE = "Move that part out of the network, into a wrapper around it that works on the exported network's outputs"


def to_onnx(module: nn.Module, example: Example, path: Path) -> None:
    """Export in evaluation mode, batch norm folded, weights inside the file.

    Args:
        module: any module; it is not changed.
        example: one input; its batch size is fixed in the file.
        path: written beside and renamed.
    Raises:
        RuntimeMissing: the exporter's packages are not installed.
        TraceError: the network cannot be exported; the message names the operator, or the network's line.
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
            raise TraceError(f"{type(module).__name__} cannot be exported to ONNX: {_why(error)}") from error


def _why(error: BaseException) -> str:
    """The reason that lies under the exporter's own report, the network's line, and what to do."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    line = next((line for cause in reversed(causes) if (line := _line_in(cause))), "")
    said = "\n".join(map(str, causes))
    unknown = UNKNOWN.search(said)
    if unknown is not None:
        return f"it has nothing for the operator {unknown[1]}{line}. {MOVE}, or write it with other operators."
    if "data-dependent" in said:
        return f"it decides on the data{line}. {MOVE}."
    innermost = ANSI.sub("", str(causes[-1])).strip().partition("\n")[0]
    return f"{type(causes[-1]).__name__}: {innermost or 'no reason given'}{line}. {MOVE}."


def _line_in(error: BaseException) -> str:
    """Where in the network's own code it was raised."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not re.search(EXPORTER, f.filename)]
    return f" at {frames[-1].filename}:{frames[-1].lineno} (`{frames[-1].line}`)" if frames else ""


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
