"""Remove neurons that pruning has left without inputs or without outputs; the network computes the same as before.

A neuron whose outputs all have weight 0 can simply go. One whose inputs all have weight 0 gives a constant (its bias,
through whatever comes after it): that constant, times the weights that read it, is added to the biases of the readers.
Into a convolution that pads with zeros a constant other than 0 cannot be folded, since it stops at the border; such a
neuron stays.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import surgery
from ..graph import Example, ModelGraph, as_call, trace
from ..records import ChannelGroup, Keep, Member

Bools = NDArray[np.bool_]
CONSTANT = 1e-7  # of the largest value: what rounding makes of a constant


@dataclass(frozen=True, eq=False)
class Removal:
    """The smaller network, and what went."""

    model: nn.Module
    removed: Mapping[str, int]  # group -> units; groups of the network as it was
    stuck: Mapping[str, int]  # units with a constant that a zero-padded convolution reads
    params: int
    passes: int


def dead(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, tuple[Bools, Bools]]:
    """Units of each exact group (without inputs, without outputs), by weights that are exactly 0, (width,) each."""
    state = {n: p.detach() for n, p in model.named_parameters()}
    found = {}
    for group in groups:
        if group.inexact:
            continue  # under a mean over channels every channel counts
        makers = [m for m in group.members if m.role == "out" and m.tensor in state and state[m.tensor].dim() > 1]
        readers = [m for m in group.members if m.role == "in"]
        found[group.id] = (_all_zero(makers, state, group.width), _all_zero(readers, state, group.width))
    return found


def remove_dead(model: nn.Module, example: Example, protected: Sequence[str] = ()) -> Removal:
    """A smaller network with the same outputs, in evaluation mode; a layer without a bias gets one where it needs it.

    Args:
        model: with zeros in its weights; it is not changed.
        example: one input, batch first.
        protected: module paths whose channels stay.
    """
    smaller, removed, passes = copy.deepcopy(model), dict[str, int](), 0
    while True:
        graph = trace(smaller, example, protected)
        folded, keep, stuck = _folded(smaller, graph)
        if not keep:
            break
        smaller = surgery.cut(folded, trace(folded, example, protected), keep)
        passes += 1
        for group, units in keep.items():
            removed[group] = removed.get(group, 0) + graph.group(group).width - len(units)
    return Removal(smaller, removed, stuck, graph.total_params, passes)


def _all_zero(members: Sequence[Member], state: Mapping[str, Tensor], width: int) -> Bools:
    """Whether all weights of a unit are 0; never, where nothing says so."""
    if not members or any(m.tensor not in state for m in members):
        return np.zeros(width, dtype=bool)
    zero = np.ones(width, dtype=bool)
    for member in members:
        weight = state[member.tensor]
        other = [d for d in range(weight.dim()) if d != member.axis]
        used = (weight != 0).any(dim=other) if other else weight != 0  # (slices,)
        zero &= ~used.cpu().numpy()[member.positions].any(axis=1)
    return zero


def _folded(model: nn.Module, graph: ModelGraph) -> tuple[nn.Module, Keep, dict[str, int]]:
    """A copy with the constants in the readers' biases, what is left without the dead units, and units that stay."""
    states = {g: s for g, s in dead(model, graph.groups).items() if s[0].any() or s[1].any()}
    if not states:
        return model, {}, {}
    readers = {m.tensor for g in states for m in graph.group(g).members if m.role == "in"}
    inputs = _captured(model, graph.example, readers)
    folded, keep, stuck = copy.deepcopy(model), dict[str, tuple[int, ...]](), dict[str, int]()
    for group_id, (unfed, unread) in states.items():
        group = graph.group(group_id)
        gone = unread.copy()
        for unit in np.flatnonzero(unfed & ~unread):
            shifts = _shifts(model, group, int(unit), inputs)
            if shifts is None:
                stuck[group_id] = stuck.get(group_id, 0) + 1
                continue
            gone[unit] = True
            for reader, shift in shifts.items():
                _add_bias(folded.get_submodule(reader), shift)
        if gone.all():
            gone[-1] = False  # a layer keeps one unit
        if gone.any():
            keep[group_id] = tuple(np.flatnonzero(~gone).tolist())
    return folded, keep, stuck


def _captured(model: nn.Module, example: Example, weights: set[str]) -> dict[str, list[Tensor]]:
    """What the modules of these weights read, on the example and on noise of its shape."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name in weights:
        path, _, last = name.rpartition(".")
        part = model.get_submodule(path)
        if last == "weight" and isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            handles.append(part.register_forward_pre_hook(_noting(seen.setdefault(path, []))))
    was_training = model.training
    noise = torch.Generator().manual_seed(0)

    def other(item: Any) -> Any:
        is_real = isinstance(item, Tensor) and item.is_floating_point()
        return torch.randn(item.shape, generator=noise, dtype=item.dtype) if is_real else item

    with torch.inference_mode():
        for inputs in (example, tree_map(other, example)):
            args, kwargs = as_call(inputs)
            model.eval()(*args, **kwargs)
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return seen


def _noting(into: list[Tensor]) -> Any:
    return lambda module, args: into.append(args[0].clone())


def _shifts(
    model: nn.Module, group: ChannelGroup, unit: int, inputs: Mapping[str, list[Tensor]]
) -> dict[str, Tensor] | None:
    """What a constant unit adds to each reader's output, (out channels,); None where it is no constant there."""
    found: dict[str, Tensor] = {}
    readers = [m for m in group.members if m.role == "in"]
    for member in readers:
        path = member.tensor.rpartition(".")[0]
        part = model.get_submodule(path)
        if path not in inputs:
            return None
        constant = _constant(inputs[path], member.positions[unit], -1 if isinstance(part, nn.Linear) else 1)
        if constant is None or not (_folds(part) or not constant.any()):
            return None
        weight = part.weight.detach()[:, torch.from_numpy(member.positions[unit])]  # type: ignore[operator]
        kernel = weight.flatten(2).sum(2) if weight.dim() > 2 else weight  # (out, slices)
        shift = (kernel.double() @ constant.double()).to(weight.dtype)
        found[path] = found[path] + shift if path in found else shift
    return found if readers else None


def _constant(seen: Sequence[Tensor], positions: NDArray[np.int64], axis: int) -> Tensor | None:
    """The value at each position of a channel axis, when it is the same everywhere else and for every input."""
    if not seen:
        return None
    rows = [x.movedim(axis, 0)[torch.from_numpy(positions)].flatten(1) for x in seen]  # (slices, all else)
    values = torch.cat(rows, dim=1)
    spread = (values.amax(1) - values.amin(1)).max()
    largest = max(float(x.abs().max()) for x in seen) or 1.0
    return values[:, 0].clone() if float(spread) <= CONSTANT * largest else None


def _folds(part: nn.Module) -> bool:
    """Does a constant channel in give a constant out?"""
    if isinstance(part, nn.Linear):
        return True
    assert isinstance(part, nn.modules.conv._ConvNd)
    padded = part.padding_mode == "zeros" and (
        part.padding != "valid" if isinstance(part.padding, str) else any(part.padding)
    )
    return part.groups == 1 and not padded


@torch.no_grad()
def _add_bias(part: nn.Module, shift: Tensor) -> None:
    if not shift.any():
        return
    if getattr(part, "bias", None) is None:
        part.bias = nn.Parameter(torch.zeros_like(shift))
    part.bias.add_(shift)  # type: ignore[operator]
