"""Refuse a cut that makes no sense, before anything is changed."""

from __future__ import annotations

import operator

from ..errors import SurgeryError
from ..graph import ModelGraph
from ..graph.copies import Parts
from ..records import Block, Keep


def only_cut(keep: Keep) -> Keep:
    return {group: units for group, units in keep.items() if units}


def check(found: Parts, graph: ModelGraph, keep: Keep) -> tuple[Block, ...]:
    """Refuse what makes no sense; returns the blocks to drop."""
    shapes = {name: tensor.shape for name, tensor in found.state.items()}
    for axis in graph.trace.axes:
        shape = shapes.get(axis.name)
        if shape is None or len(shape) <= axis.axis or shape[axis.axis] != axis.size:
            raise SurgeryError(
                f"this plan belongs to another network: {axis.name} should have {axis.size} slices along axis "
                f"{axis.axis}, the model has shape {shape and tuple(shape)}. Trace this model and plan again."
            )
    for group_id, units in keep.items():
        width = graph.group(group_id).width
        if units and not (units[0] >= 0 and units[-1] < width and all(map(operator.lt, units, units[1:]))):
            raise SurgeryError(f"group {group_id} has units 0 to {width - 1}; {units} is not an ascending choice")
    return dropped_blocks(graph, keep)


def dropped_blocks(graph: ModelGraph, keep: Keep) -> tuple[Block, ...]:
    """The blocks that `keep` drops: those whose groups are all empty."""
    empty = {group for group, units in keep.items() if not units}
    if not empty:
        return ()
    dropped = tuple(b for b in graph.blocks if set(b.groups) <= empty)
    left = empty - {g for b in dropped for g in b.groups}
    if left:
        raise SurgeryError(
            f"group {sorted(left)[0]} would be cut to nothing; keep at least one unit, or empty all groups of a "
            "residual block to drop the block"
        )
    return dropped
