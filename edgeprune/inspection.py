"""Look at a network's channel groups, and prove that each can be cut."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import proof, widths
from .graph import Example, ModelGraph, trace
from .proof import Proof
from .records import ChannelGroup, Progress


@dataclass(frozen=True, eq=False)
class Inspection:
    """What was found; no proof when nothing was cut."""

    name: str
    graph: ModelGraph
    steps: dict[str, int]  # group -> units between the widths that plans choose
    params: dict[str, int]  # group -> parameters in its slices; one in slices of two groups counts for both
    seconds: float
    proof: Proof | None


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
    proved = proof.check(model, example, frozen, progress=progress) if check else None
    params = {g.id: _params(g, model) for g in graph.groups}
    return Inspection(type(model).__name__, graph, steps, params, seconds, proved)


def _params(group: ChannelGroup, model: nn.Module) -> int:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    members = [(m, shapes[m.tensor]) for m in group.members if m.tensor in shapes]
    return sum(m.positions.size * shape.numel() // shape[m.axis] for m, shape in members)


def as_json(found: Inspection) -> dict[str, Any]:
    graph = found.graph
    return {
        "groups": [
            {
                "id": g.id,
                "width": g.width,
                "channels_per_unit": g.channels_per_unit,
                "step": found.steps[g.id],
                "params": found.params[g.id],
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
        "max_deviation": None if found.proof is None else found.proof.max_deviation,
        "worst": "" if found.proof is None else found.proof.worst,
        "precision": "" if found.proof is None else found.proof.precision,
        "unproved": () if found.proof is None else found.proof.blind,
        "seconds": found.seconds,
        "notes": graph.notes,
    }
