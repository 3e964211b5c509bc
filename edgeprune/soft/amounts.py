"""What widths cost, as functions that can be differentiated: latency through the table, and parameters.

Widths are real numbers here. At widths that plans may choose, latency is exactly the table's prediction; in between it
is interpolated, linearly along inputs and outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..allocate import Costs
from ..records import ChannelGroup, Width
from ..table import Surface, follows_input, layer_ms

Kept = Mapping[str, Tensor]  # group -> units kept, a real number, float64
Amount = Callable[[Kept], Tensor]


@dataclass(frozen=True, eq=False)
class Goal:
    """An amount to reach: |amount - wanted| <= tolerance * scale."""

    amount: Amount
    wanted: float
    scale: float
    tolerance: float

    def miss(self, kept: Kept) -> Tensor:
        """How far outside the tolerance, in parts of the scale; 0 inside."""
        return ((self.amount(kept) - self.wanted).abs() / self.scale - self.tolerance).clamp(min=0.0)


def latency(costs: Costs) -> Amount:
    """Milliseconds on the costs' device."""
    grids = [_grid(one) for one in costs.surfaces]

    def amount(kept: Kept) -> Tensor:
        return torch.stack([grid.at(kept) for grid in grids]).sum() + costs.correction.overhead_ms

    return amount


def latency_goal(costs: Costs, budget_ms: float, tolerance: float) -> Goal:
    return Goal(latency(costs), budget_ms, budget_ms, tolerance)


def parameters(model: nn.Module, groups: Sequence[ChannelGroup]) -> Amount:
    """Parameters that are left."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    terms: dict[str, list[tuple[int, str, int, int]]] = {}  # tensor -> (axis, group, width, slices a unit)
    for group in groups:
        for m in group.members:
            terms.setdefault(m.tensor, []).append((m.axis, group.id, group.width, m.positions.shape[1]))
    constant = sum(math.prod(shape) for name, shape in shapes.items() if name not in terms)

    def amount(kept: Kept) -> Tensor:
        total = torch.tensor(float(constant), dtype=torch.float64)
        for name, found in terms.items():
            if name not in shapes:
                continue  # a buffer
            sizes = [torch.tensor(float(size), dtype=torch.float64) for size in shapes[name]]
            for axis, group, width, slices in found:
                sizes[axis] = sizes[axis] - slices * (width - kept[group])
            total = total + torch.stack(sizes).prod() if sizes else total + 1.0
        return total

    return amount


def sparsity_goal(model: nn.Module, groups: Sequence[ChannelGroup], sparsity: float, tolerance: float) -> Goal:
    """The share of parameters that goes, within `tolerance` (of all of them)."""
    total = float(sum(p.numel() for p in model.parameters()))
    return Goal(parameters(model, groups), (1 - sparsity) * total, total, tolerance)


@dataclass(frozen=True, eq=False)
class _Grid:
    """One layer's milliseconds on a grid of channels, (ins, outs); one that follows its input has one column."""

    in_width: Width
    out_width: Width
    ins: Tensor
    outs: Tensor
    ms: Tensor

    def at(self, kept: Kept) -> Tensor:
        i, s = _between(self.ins, _channels(self.in_width, kept))
        o, t = _between(self.outs, _channels(self.out_width, kept)) if self.ms.shape[1] > 1 else (0, _ZERO)
        j, p = min(i + 1, self.ms.shape[0] - 1), min(o + 1, self.ms.shape[1] - 1)
        low = self.ms[i, o] + s * (self.ms[j, o] - self.ms[i, o])
        high = self.ms[i, p] + s * (self.ms[j, p] - self.ms[i, p])
        return low + t * (high - low)


_ZERO = torch.zeros((), dtype=torch.float64)


def _grid(one: Surface) -> _Grid:
    outs = one.outs[-1:] if follows_input(one.layer) else one.outs
    ms = [[layer_ms(one, i, o) for o in outs] for i in one.ins]
    layer = one.layer
    return _Grid(layer.in_width, layer.out_width, *(torch.tensor(v, dtype=torch.float64) for v in (one.ins, outs, ms)))


def _channels(width: Width, kept: Kept) -> Tensor:
    total = torch.tensor(float(width.fixed), dtype=torch.float64)
    for group, per_unit in width.terms:
        total = total + per_unit * kept[group]
    return total


def _between(grid: Tensor, x: Tensor) -> tuple[int, Tensor]:
    """The interval of an ascending grid that x lies in, and how far through it, 0..1."""
    if len(grid) == 1:
        return 0, _ZERO
    at = int(torch.searchsorted(grid, x.detach(), right=True)) - 1
    at = max(0, min(at, len(grid) - 2))
    return at, ((x - grid[at]) / (grid[at + 1] - grid[at])).clamp(0.0, 1.0)
