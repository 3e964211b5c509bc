"""Look at a network's channel groups, and prove that each can be cut."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from . import surgery, widths
from .graph import Example, ModelGraph, as_call, trace
from .records import Keep, Progress

TOLERANCE = 1e-5  # of the largest output: the cut network against the masked one


@dataclass(frozen=True, eq=False)
class Inspection:
    """What was found; deviations are None when nothing was cut."""

    name: str
    graph: ModelGraph
    steps: dict[str, int]  # group -> units between the widths that plans choose
    seconds: float
    max_deviation: float | None
    worst: str


def inspect(
    model: nn.Module,
    example: Example,
    frozen: Sequence[str] = (),
    check: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Trace a network; with `check`, cut a random half of every exact group, one by one and all together.

    Args:
        model: any module; it is not changed.
        example: one input, batch first.
        frozen: modules whose channels must stay.
        check: compare cut networks with masked ones, in float64 with random batch-norm statistics.
        progress: told (groups checked, of).
    """
    began = time.perf_counter()
    graph = trace(model, example, frozen)
    seconds = time.perf_counter() - began
    choices = widths.candidates(graph.groups, 0.0)
    steps = {g: w[1] - w[0] if len(w) > 1 else w[0] for g, w in choices.items()}
    worst, deviation = "", None
    if check:
        worst, deviation = _check(model, example, frozen, progress)
    return Inspection(type(model).__name__, graph, steps, seconds, deviation, worst)


def as_json(found: Inspection) -> dict[str, Any]:
    graph = found.graph
    return {
        "groups": [
            {
                "id": g.id,
                "width": g.width,
                "channels_per_unit": g.channels_per_unit,
                "step": found.steps[g.id],
                "exact": not g.inexact,
                "inexact": g.inexact,
                "members": [{"tensor": m.tensor, "axis": m.axis, "role": m.role} for m in g.members],
            }
            for g in graph.groups
        ],
        "frozen": [{"tensors": f.tensors, "channels": f.channels, "reason": f.reason} for f in graph.frozen],
        "blocks": [{"id": b.id, "groups": b.groups} for b in graph.blocks],
        "prunable_params": graph.prunable_params,
        "total_params": graph.total_params,
        "prunable_macs": graph.prunable_macs,
        "total_macs": graph.total_macs,
        "max_deviation": found.max_deviation,
        "worst": found.worst,
        "seconds": found.seconds,
        "notes": graph.notes,
    }


def _check(model: nn.Module, example: Example, frozen: Sequence[str], progress: Progress | None) -> tuple[str, float]:
    """The largest relative deviation of a cut network from the masked one, and where."""
    exact = randomised(copy.deepcopy(model).double().eval())
    inputs = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, example)
    graph = trace(exact, inputs, frozen)
    draw = random.Random(0)
    halves = {
        g.id: tuple(sorted(draw.sample(range(g.width), g.width - g.width // 2))) for g in graph.groups if not g.inexact
    }
    tries: list[tuple[str, Keep]] = [(group, {group: keep}) for group, keep in halves.items()]
    tries.append(("all groups together", halves))
    tries += [(f"block {b.id}", dict.fromkeys(b.groups, ())) for b in graph.blocks]
    worst, largest = "", 0.0
    for at, (name, keep) in enumerate(tries):
        found = deviation(exact, graph, keep, inputs)
        if found >= largest:
            worst, largest = name, found
        if progress is not None:
            progress(at + 1, len(tries))
    if not runs(exact, graph, {g.id: tuple(range((g.width + 1) // 2)) for g in graph.groups}, inputs):
        return "inexact groups", float("inf")
    return worst, largest


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
        if parameter.is_floating_point() and parameter.numel() > 1 and float(parameter.std()) == 0:
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float32).to(parameter) * 0.1)
            parameter.add_(float(parameter.mean().abs() < 1e-3) * 0.5)
    return model


def deviation(model: nn.Module, graph: ModelGraph, keep: Keep, example: Example) -> float:
    """Largest difference of the cut from the masked network, over the masked output's largest value."""
    masked, cut = surgery.mask(model, graph, keep), surgery.cut(model, graph, keep)
    args, kwargs = as_call(example)
    with torch.inference_mode():
        pairs = zip(_tensors(masked(*args, **kwargs)), _tensors(cut(*args, **kwargs)), strict=True)
        return max(_relative(a, b) for a, b in pairs)


def runs(model: nn.Module, graph: ModelGraph, keep: Keep, example: Example) -> bool:
    """Does the cut network, inexact groups and all, give outputs of the dense network's shapes?"""
    args, kwargs = as_call(example)
    with torch.inference_mode():
        dense, cut = (_tensors(m(*args, **kwargs)) for m in (model, surgery.cut(model, graph, keep)))
    return [t.shape for t in dense] == [t.shape for t in cut] and all(bool(t.isfinite().all()) for t in cut)


def _tensors(output: object) -> list[Tensor]:
    return [t for t in tree_flatten(output)[0] if isinstance(t, Tensor)]


def _relative(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    scale = float(a.abs().max()) if a.numel() else 1.0
    return float((a - b).abs().max()) / (scale or 1.0) if a.numel() else 0.0
