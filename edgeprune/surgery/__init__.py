"""Cut a network: a new module with really smaller tensors, trainable and exportable like the one it came from.

    smaller = cut(model, graph, keep)

The parameters of a copy of the user's own module are sliced and the attributes that repeat a size are set. Whether
its Python really follows is checked operator by operator; where a size is written into `forward`, the recorded graph
is used instead, with its sizes recomputed (`replay`).
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SurgeryError
from ..graph import ModelGraph
from ..graph.blocks import branch_state
from ..records import Block, Keep
from . import replay
from .fit import fits, set_sizes, slice_state
from .rewrite import Rewriter

__all__ = ["cut", "dropped_blocks", "mask", "narrow", "positions"]


def cut(model: nn.Module, graph: ModelGraph, keep: Keep) -> nn.Module:
    """A new module without the channels that `keep` leaves out; the input module is untouched.

    Args:
        model: the network that `graph` was traced from.
        graph: its channel groups.
        keep: units kept of each group, ascending; groups not named stay whole. An empty tuple for every group of a
            block drops that block.
    Raises:
        SurgeryError: a group cut to nothing, units out of range, or a graph of another network.
    """
    dropped = _check(model, graph, keep)
    rewriter = Rewriter(graph, _without_dropped(keep))
    mode = model.training
    if not dropped:
        for use_attributes in (False, True):
            candidate = _sliced(model, graph, rewriter)
            set_sizes(candidate, rewriter, use_attributes)
            if fits(candidate, graph, rewriter):
                return candidate.train(mode)
    root = _sliced(model, graph, rewriter)
    set_sizes(root, rewriter, use_attributes=False)
    return replay.build(model, root, graph, rewriter, dropped).train(mode)


def _sliced(model: nn.Module, graph: ModelGraph, rewriter: Rewriter) -> nn.Module:
    memo = {id(p): p for p in model.parameters()}
    module: nn.Module = copy.deepcopy(model, memo)
    slice_state(module, model, rewriter.positions)
    return module


def _without_dropped(keep: Keep) -> Keep:
    return {group: units for group, units in keep.items() if units}


def _check(model: nn.Module, graph: ModelGraph, keep: Keep) -> tuple[Block, ...]:
    """Refuse what makes no sense; returns the blocks to drop."""
    have = {n: tuple(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    for axis in graph.trace.axes:
        if len(have.get(axis.name, ())) <= axis.axis or have[axis.name][axis.axis] != axis.size:
            raise SurgeryError(
                f"this plan belongs to another network: {axis.name} should have {axis.size} slices along axis "
                f"{axis.axis}, the model has shape {have.get(axis.name)}. Trace this model and plan again."
            )
    for group_id, units in keep.items():
        width = graph.group(group_id).width
        if any(not 0 <= u < width for u in units) or list(units) != sorted(set(units)):
            raise SurgeryError(f"group {group_id} has units 0 to {width - 1}; {units} is not an ascending choice")
    return dropped_blocks(graph, keep)


def dropped_blocks(graph: ModelGraph, keep: Keep) -> tuple[Block, ...]:
    """The blocks that `keep` drops: those whose groups are all empty."""
    empty = {group for group, units in keep.items() if not units}
    dropped = tuple(b for b in graph.blocks if set(b.groups) <= empty)
    left = empty - {g for b in dropped for g in b.groups}
    if left:
        raise SurgeryError(
            f"group {sorted(left)[0]} would be cut to nothing; keep at least one unit, or empty all groups of a "
            "residual block to drop the block"
        )
    return dropped


def positions(graph: ModelGraph, keep: Keep) -> dict[tuple[str, int], Tensor]:
    """(tensor, axis) -> indices kept along it, for every axis that loses something."""
    return Rewriter(graph, _without_dropped(keep)).positions


def mask(model: nn.Module, graph: ModelGraph, keep: Keep) -> nn.Module:
    """The oracle: a dense copy with every removed slice at zero. Its output must equal the cut network's."""
    dropped = _check(model, graph, keep)
    masked = copy.deepcopy(model)
    state = dict([*masked.named_parameters(), *masked.named_buffers()])
    with torch.no_grad():
        for (name, axis), kept in positions(graph, keep).items():
            gone = np.setdiff1d(np.arange(state[name].shape[axis]), kept.numpy())
            state[name].index_fill_(axis, torch.from_numpy(gone), 0)
        for block in dropped:
            for name in branch_state(graph.trace.recording, block):
                state[name].zero_()
    return masked


def narrow(state: dict[str, Tensor], graph: ModelGraph, keep: Keep, next_keep: Keep) -> dict[str, Tensor]:
    """Slice the state dict of a network cut by `keep` to what a network cut by `next_keep` needs.

    Raises:
        SurgeryError: `next_keep` wants a channel that `keep` had removed already.
    """
    before, after = positions(graph, keep), positions(graph, next_keep)
    narrowed = dict(state)
    for (name, axis), kept in after.items():
        if name not in narrowed:
            continue
        have = before.get((name, axis))
        index = kept if have is None else torch.searchsorted(have, kept)
        if have is not None and not torch.equal(have[index.clamp(max=len(have) - 1)], kept):
            raise SurgeryError(f"{name}: a channel that was cut in an earlier step cannot come back")
        narrowed[name] = narrowed[name].index_select(axis, index)
    return narrowed

