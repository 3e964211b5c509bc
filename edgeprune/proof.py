"""Prove that a network's channel groups can be cut: the cut network against the masked dense one."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from . import surgery
from .errors import TraceError
from .graph import Example, ModelGraph, as_call, trace
from .records import ChannelGroup, Keep, Progress

TOLERANCE = 1e-5  # of the largest output: the cut network against the masked one
VISIBLE = 1e-9  # of the largest output: a cut that changes less than this proves nothing
ROUNDING = 2e-6  # of the largest output: more than this in float32 is looked at again in float64


@dataclass(frozen=True)
class Proof:
    """What cutting showed. Deviations and effects are relative to the largest output."""

    max_deviation: float  # of a cut network from the masked one; inf where shapes differ
    worst: str  # what was cut there
    checked: int  # exact groups cut one by one
    exact: int  # exact groups there are; all of them are also cut together
    blocks: int  # blocks dropped one by one
    precision: str  # float64, or float32 for a network that does not run in float64
    blind: tuple[str, ...]  # cuts that do not change the masked output either: nothing was shown


def check(
    model: nn.Module,
    example: Example,
    frozen: Sequence[str] = (),
    sample: int | None = None,
    progress: Progress | None = None,
    dtype: torch.dtype = torch.float64,
) -> Proof:
    """Cut a random half of every exact group, one by one and all together, and drop every block.

    Inexact groups have no oracle: they are cut together with all others and must give finite outputs of the same
    shapes.

    Args:
        model: any module; it is not changed. Its batch-norm statistics are made random in a copy.
        example: one input, batch first.
        frozen: modules whose channels must stay.
        sample: groups, and blocks, that are cut one by one, drawn at random; default all.
        progress: told (cuts checked, of).
        dtype: float64, or float32 with float64 only where float32 may be the limit.
    """
    subject = _widest(model, example, frozen, dtype)
    exact = [g for g in subject.graph.groups if not g.inexact]
    tries = _tries(subject.graph, exact, sample)
    worst, largest, blind = "", 0.0, []
    for at, (name, keep) in enumerate(tries):
        found, effect = _compare(subject, keep)
        if subject.dtype != torch.float64 and dtype != torch.float64 and not found < ROUNDING:
            found, effect = _compare(_widest(model, example, frozen, torch.float64), keep)
        if not found < largest:
            worst, largest = name, found
        if effect < VISIBLE:
            blind.append(name)
        if progress is not None:
            progress(at + 1, len(tries))
    if not _runs(subject, _first_halves(subject.graph)):
        worst, largest = "all groups together, inexact ones too", float("inf")
    blocks = sum(1 for name, _ in tries if name.startswith("block "))
    return Proof(
        largest, worst, len(tries) - blocks - bool(exact), len(exact), blocks, _name(subject.dtype), tuple(blind)
    )


@dataclass(frozen=True, eq=False)
class _Subject:
    """The network as it is checked: a copy with random statistics, its groups, and what it gives uncut."""

    model: nn.Module
    example: Example
    graph: ModelGraph
    dense: list[Tensor]
    dtype: torch.dtype


def _widest(model: nn.Module, example: Example, frozen: Sequence[str], dtype: torch.dtype) -> _Subject:
    """The network in `dtype`, or in float32 where it does not run in float64."""
    try:
        return _subject(model, example, frozen, dtype)
    except TraceError:
        if dtype == torch.float32:
            raise
        return _subject(model, example, frozen, torch.float32)


def _subject(model: nn.Module, example: Example, frozen: Sequence[str], dtype: torch.dtype) -> _Subject:
    ready = randomised(copy.deepcopy(model).to(dtype).eval())
    inputs = tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, example)
    with _precision(dtype):
        return _Subject(ready, inputs, trace(ready, inputs, frozen), outputs(ready, inputs), dtype)


def _compare(subject: _Subject, keep: Keep) -> tuple[float, float]:
    """(difference of the cut from the masked network, of the masked from the dense one); NaN counts as infinite."""
    with _precision(subject.dtype):
        masked = outputs(surgery.mask(subject.model, subject.graph, keep), subject.example)
        cut = outputs(surgery.cut(subject.model, subject.graph, keep), subject.example)
    found = difference(masked, cut)
    return found if found == found else float("inf"), difference(subject.dense, masked)


class _Doubled(TorchFunctionMode):
    """Makes float64 of the float32 tensors that a network creates, or casts to, in its forward."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        made = func(*args, **kwargs)
        return made.double() if isinstance(made, Tensor) and made.dtype == torch.float32 else made


def _precision(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    return _Doubled() if dtype == torch.float64 else contextlib.nullcontext()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_halves(graph: ModelGraph) -> Keep:
    return {g.id: tuple(range((g.width + 1) // 2)) for g in graph.groups}


def _tries(graph: ModelGraph, exact: Sequence[ChannelGroup], sample: int | None) -> list[tuple[str, Keep]]:
    """Everything that is cut in turn, with its name."""
    draw = random.Random(0)
    halves = {g.id: tuple(sorted(draw.sample(range(g.width), g.width - g.width // 2))) for g in exact}
    singles: list[tuple[str, Keep]] = [(group, {group: keep}) for group, keep in halves.items()]
    blocks: list[tuple[str, Keep]] = [(f"block {b.id}", dict.fromkeys(b.groups, ())) for b in graph.blocks]
    if sample is not None:
        singles = draw.sample(singles, min(sample, len(singles)))
        blocks = draw.sample(blocks, min(sample, len(blocks)))
    together: list[tuple[str, Keep]] = [("all groups together", halves)] if halves else []
    return [*singles, *together, *blocks]


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Batch-norm statistics and all-constant parameters made random, in place, so that a wrong cut shows."""
    draw = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and isinstance(module.running_mean, Tensor):
            module.running_mean.normal_(0, 0.1, generator=draw)
            assert isinstance(module.running_var, Tensor)
            module.running_var.uniform_(0.5, 1.5, generator=draw)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() > 1 and bool(parameter.min() == parameter.max()):
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float32).to(parameter) * 0.1)
            parameter.add_(float(parameter.mean().abs() < 1e-3) * 0.5)
    return model


def deviation(model: nn.Module, graph: ModelGraph, keep: Keep, example: Example) -> float:
    """Largest difference of the cut from the masked network, over the masked output's largest value."""
    masked, cut = surgery.mask(model, graph, keep), surgery.cut(model, graph, keep)
    return difference(outputs(masked, example), outputs(cut, example))


def _runs(subject: _Subject, keep: Keep) -> bool:
    """Does the cut network, inexact groups and all, give finite outputs of the dense network's shapes?"""
    with _precision(subject.dtype):
        cut = outputs(surgery.cut(subject.model, subject.graph, keep), subject.example)
    return [t.shape for t in subject.dense] == [t.shape for t in cut] and all(bool(t.isfinite().all()) for t in cut)


def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """Every tensor that the network returns, in order."""
    args, kwargs = as_call(example)
    with torch.inference_mode():
        return [t for t in tree_flatten(model(*args, **kwargs))[0] if isinstance(t, Tensor)]


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference of two lists of outputs, each relative to the first one's largest value."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    return max((_relative(x, y) for x, y in zip(a, b, strict=True) if x.numel()), default=0.0)


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).abs().max()) / (float(a.abs().max()) or 1.0)
