"""Widths that a plan may give each group, and what a layer's shape becomes under a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from .records import Block, ChannelGroup, Layer, LayerShape, Width

CHOICES = 16  # widths a group: enough to meet a budget within a few percent, few enough to solve exactly
ROUND = (1, 2, 4, 8, 16)  # vector lengths that kernels like: steps are rounded to these, or to multiples of the last


def candidates(
    groups: Iterable[ChannelGroup], least_share: float, protected: Sequence[str] = (), blocks: Iterable[Block] = ()
) -> dict[str, tuple[int, ...]]:
    """Units that each group may keep, ascending, its full width last; 0 first where a block may be dropped.

    Args:
        groups: of the network.
        least_share: of a group's units that stay in any case.
        protected: module paths whose groups stay whole.
        blocks: residual blocks that may be dropped.
    """
    droppable = {group for block in blocks for group in block.groups}
    found: dict[str, tuple[int, ...]] = {}
    for group in groups:
        if any(_touches(group, name) for name in protected):
            found[group.id] = (group.width,)
            continue
        step = _step(group)
        least = max(1, math.ceil(least_share * group.width))
        widths = {w for w in range(step, group.width, step) if w >= least}
        choices = tuple(sorted({*widths, group.width}))
        found[group.id] = (0, *choices) if group.id in droppable else choices
    return found


def _touches(group: ChannelGroup, module: str) -> bool:
    return any(m.tensor == module or m.tensor.startswith(f"{module}.") for m in group.members)


def _step(group: ChannelGroup) -> int:
    """Units between choices: about CHOICES of them, on channel counts that kernels like."""
    channels = group.width * group.channels_per_unit / CHOICES
    step = next((s for s in ROUND if s >= channels), math.ceil(channels / ROUND[-1]) * ROUND[-1])
    return max(1, min(round(step / group.channels_per_unit), group.width))


def size(width: Width, units: Mapping[str, int]) -> int:
    """Channels of a width when each group keeps `units[g]`."""
    return width.fixed + sum(per_unit * units[group] for group, per_unit in width.terms)


def shape_at(layer: Layer, units: Mapping[str, int]) -> LayerShape:
    """The layer's shape under a plan."""
    return replace(
        layer.shape,
        in_ch=size(layer.in_width, units),
        out_ch=size(layer.out_width, units),
        conv_groups=size(layer.groups_width, units),
    )
