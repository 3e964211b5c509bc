"""Run a network once and write down every operator it calls.

Under `torch.inference_mode` a dispatch mode sees the composite operators (conv2d, linear, batch_norm,
scaled_dot_product_attention ...) before they are decomposed. Composites without a rule of their own are decomposed on
the spot. What depends on the input flows without data, so nothing heavy is computed; a network that reads its data, or
does with it what only data can do, is run once more on the example itself.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from ..errors import TraceError
from .copies import parts, switch, without_weights
from .dataless import Dataless
from .recorder import Recorder
from .recording import Recording

Example = Tensor | Sequence[Any] | Mapping[str, Any]

HERE = str(Path(__file__).parent)


def as_call(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (args, kwargs) with which a network is called on `example`: a tensor, a sequence, or keywords."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return tuple(example), {}


def record(
    model: nn.Module,
    example: Example,
    has_rule: Callable[[OpOverload[..., Any]], bool],
    training: bool = False,
    like: Recording | None = None,
) -> Recording:
    """Run `model(example)` once and record it.

    Args:
        model: any module; it is not changed, not even its buffers or its mode.
        example: one input (batch first): a tensor, a tuple of arguments, or a dict of keywords.
        has_rule: operators to keep as they are; composites without a rule are decomposed.
        training: record the training-mode forward (auxiliary heads, drop path).
        like: run it with data, or without, as this recording was made; default whichever succeeds.
    Raises:
        TraceError: the forward pass failed; the message holds the error and the line.
    """
    args, kwargs = as_call(example)
    dataless = Dataless.beside([leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
    tries: list[Dataless | None] = [dataless, None] if like is None else [None if like.with_data else dataless]
    found = parts(model)
    for hollow in tries:
        copied = without_weights(found)
        runner = switch(copied, training)
        with undisturbed():
            recorder = Recorder(copied, has_rule, training, hollow)
            try:
                recorder.run(runner, args, kwargs)
                break
            except Exception as error:
                if hollow is tries[-1]:
                    raise TraceError(_failed_forward(model, args, kwargs, error, recorder.op_name)) from error
    return recorder.recording


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No gradients, the caller's random numbers left alone, and none of the transformer fast paths.

    Those fuse a whole layer into one operator that nothing could be said about.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _failed_forward(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception, op_name: str
) -> str:
    shapes = [tuple(a.shape) if isinstance(a, Tensor) else repr(a) for a in (*args, *kwargs.values())]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages/torch/" not in f.filename]
    inside = [f for f in frames if not f.filename.startswith(HERE)]
    where = f" at {inside[-1].filename}:{inside[-1].lineno} (`{inside[-1].line}`)" if inside else ""
    return (
        f"{type(model).__name__} failed on an input of shape {', '.join(map(str, shapes))}{where}, last operator "
        f"{op_name or 'none'}: {type(error).__name__}: {error}. Check the input shape; if the forward needs more "
        "than tensors (targets, masks), wrap it in a module that takes tensors only."
    )
