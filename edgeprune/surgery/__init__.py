"""Cut a network: a new module with really smaller tensors, trainable and exportable like the one it came from.

    smaller = cut(model, graph, keep)

The parameters of a copy of the user's own module are sliced and the attributes that repeat a size are set. Whether
its Python really follows is checked operator by operator; where a size is written into `forward`, the recorded graph
is used instead, with its sizes recomputed (`replay`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SurgeryError
from ..graph import ModelGraph
from ..graph.blocks import branch_state
from ..graph.copies import parts, switch, with_tensors
from ..records import ChannelGroup, Keep
from . import replay
from .checks import check, dropped_blocks, only_cut
from .fit import set_sizes, sliced
from .follow import fits
from .masking import mask
from .rewrite import Rewriter

__all__ = ["cut", "dropped_blocks", "mask", "narrow", "narrow_groups", "positions"]


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
    found = parts(model)
    dropped = check(found, graph, keep)
    rewriter = Rewriter(graph, only_cut(keep))
    mode = model.training
    tensors = sliced(found, rewriter.positions)
    if not dropped:
        for use_attributes in (False, True):
            candidate = with_tensors(found, tensors)
            news = set_sizes(candidate, rewriter, use_attributes)
            if use_attributes and not news:
                break
            if fits(candidate, graph, rewriter):
                return switch(candidate, mode)
    root = with_tensors(found, tensors)
    set_sizes(root, rewriter, use_attributes=False)
    return replay.build(model, root.root, graph, rewriter, dropped).train(mode)


def positions(graph: ModelGraph, keep: Keep) -> dict[tuple[str, int], Tensor]:
    """(tensor, axis) -> indices kept along it, for every axis that loses something."""
    return Rewriter(graph, only_cut(keep)).positions


def narrow_groups(graph: ModelGraph, keep: Keep) -> list[ChannelGroup]:
    """The channel groups as they stand in the cut network: units kept, positions counted there.

    What lies in a dropped block is gone: its own groups, and the members of others in it.
    """
    kept, gone = positions(graph, keep), _in_dropped_blocks(graph, keep)
    narrowed = []
    for group in graph.groups:
        units = np.array(keep.get(group.id, range(group.width)), dtype=int)
        if not len(units):
            continue
        members = []
        for member in group.members:
            if member.tensor in gone:
                continue
            have = kept.get((member.tensor, member.axis))
            where = member.positions[units]
            where = where if have is None else np.searchsorted(have.numpy(), where)
            members.append(replace(member, positions=where))
        narrowed.append(replace(group, width=len(units), members=tuple(members)))
    return narrowed


def _in_dropped_blocks(graph: ModelGraph, keep: Keep) -> set[str]:
    """Parameters and buffers that only blocks read which `keep` drops."""
    recording = graph.trace.recording
    return {name for block in dropped_blocks(graph, keep) for name in branch_state(recording, block)}


def narrow(
    state: dict[str, Tensor], graph: ModelGraph, keep: Keep, next_keep: Keep, smaller: nn.Module
) -> dict[str, Tensor]:
    """Slice the state dict of a network cut by `keep` to that of `smaller`, the dense one cut by `next_keep`.

    What `smaller` does not hold is left out: a dropped block's tensors and, where only the recorded operators could be
    cut (see `replay`), those that no operator reads: what only training uses, what a batch norm counts.

    Raises:
        SurgeryError: `next_keep` wants a channel, or a block, that `keep` had removed already.
    """
    _refuse_return(graph, keep, next_keep)
    before, after = positions(graph, keep), positions(graph, next_keep)
    wanted = smaller.state_dict().keys()
    narrowed = {name: tensor for name, tensor in state.items() if name in wanted}
    for (name, axis), kept in after.items():
        if name not in narrowed:
            continue
        have = before.get((name, axis))
        index = kept if have is None else torch.searchsorted(have, kept)
        if have is not None and not torch.equal(have[index.clamp(max=len(have) - 1)], kept):
            raise SurgeryError(f"{name}: a channel that was cut in an earlier step cannot come back")
        narrowed[name] = narrowed[name].index_select(axis, index)
    return narrowed


def _refuse_return(graph: ModelGraph, keep: Keep, next_keep: Keep) -> None:
    left = {block.id for block in dropped_blocks(graph, next_keep)}
    back = [block.id for block in dropped_blocks(graph, keep) if block.id not in left]
    if back:
        raise SurgeryError(f"block {back[0]}: it was dropped in an earlier step and cannot come back")
