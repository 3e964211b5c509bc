"""The channel groups of a network as a tree for people."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.tree import Tree

from ..inspection import Inspection
from ..records import ChannelGroup, FrozenChannels

NAMES = 4  # of a list of layers
UNSURE = ("no rule for", "follows a decision", "selected by a mask")  # reasons that a change of the network removes
HINT = (
    "what an operator without a rule, a mask or a decision on the data touches stays whole: move it out of the "
    "network, into a wrapper around it, to prune more"
)


def show(found: Inspection) -> None:
    """Print groups, frozen channels, shares, and what the check found."""
    graph, console = found.graph, Console(highlight=False)
    tree = Tree(f"{found.name}: {graph.total_params:,} parameters, {graph.total_macs / 1e6:,.0f} MMACs")
    groups = tree.add(f"{len(graph.groups)} channel groups" if graph.groups else "no channel group: nothing can be cut")
    for group in graph.groups:
        _group(groups, group, found.steps[group.id], found.params[group.id])
    if graph.blocks:
        _blocks(tree, found)
    if graph.frozen:
        _frozen(tree.add("frozen"), graph.frozen)
    for note in graph.notes:
        tree.add(f"note: {note}")
    console.print(tree)
    share, macs = graph.prunable_params / graph.total_params, graph.prunable_macs / max(graph.total_macs, 1)
    print(f"prunable: {share:.1%} of the parameters, {macs:.1%} of the MACs; traced in {found.seconds:.2f} s")
    if any(f.reason.startswith(UNSURE) for f in graph.frozen):
        print(HINT)
    _proof(found)


def _group(tree: Tree, group: ChannelGroup, step: int, params: int) -> None:
    unit = f" x {group.channels_per_unit} channels" if group.channels_per_unit > 1 else ""
    exact = f"inexact: {group.inexact}" if group.inexact else "exact"
    branch = tree.add(f"{group.id}: {group.width} units{unit}, step {step}, {params:,} parameters, {exact}")
    made, read = ([m.tensor.removesuffix(".weight") for m in group.members if m.role == role] for role in ("out", "in"))
    branch.add(f"made by {_some(made)}" if made else f"held by {_some([m.tensor for m in group.members])}")
    if read:
        branch.add(f"read by {_some(read)}")


def _blocks(tree: Tree, found: Inspection) -> None:
    names = [block.id or "the network itself" for block in found.graph.blocks]
    tree.add(f"{len(names)} residual blocks can be dropped whole: {_some(names)}")


def _frozen(tree: Tree, frozen: Sequence[FrozenChannels]) -> None:
    """One line a reason, however many modules have it."""
    alike: dict[str, list[FrozenChannels]] = {}
    for channels in frozen:
        alike.setdefault(re.sub(r" \(in [^()]*\)$", "", channels.reason), []).append(channels)
    for reason, several in alike.items():
        tensors = [name for channels in several for name in channels.tensors]
        tree.add(f"{sum(c.channels for c in several):,} slices of {_some(tensors)}: {reason}")


def _proof(found: Inspection) -> None:
    if found.proof is None:
        return
    p = found.proof
    cuts = f"{p.checked} of {p.exact} exact groups one by one and all together, {p.blocks} blocks dropped"
    print(f"largest deviation from the masked model: {p.max_deviation:.2g} (at {p.worst}; {p.precision}; {cuts})")
    if p.blind:
        print(f"no proof for {_some(list(p.blind))}: masking them does not change the output either")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more
