"""How much each unit of each channel group matters: group id -> (width,) scores, larger is better.

Sources: LAMP (arXiv 2010.07611), SP-LAMP (2305.14403), first-order Taylor as in HALP (2210.06659).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import UsageError
from .records import ChannelGroup, Keep, Member

Importance = Mapping[str, NDArray[np.float64]]
Batches = Iterable[tuple[Tensor, Tensor]]
NAMES = ("sp-lamp", "sp-lamp-log", "l1", "l2", "taylor", "random")


def score(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    name: str = "sp-lamp",
    batches: Batches = (),
    seed: int = 0,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> Importance:
    """Score every unit.

    Args:
        model: the network.
        groups: its channel groups.
        name: "sp-lamp" (LAMP of the unit's energy, once for each layer that makes it), "sp-lamp-log" (the additive
            form), "l1" and "l2" (norms of what makes the channel), "taylor" (first-order change of the loss), "random".
        batches: for "taylor": (inputs, labels), augmented or held out: on images a network has memorised, gradients
            are noise.
        seed: for "random".
        loss: for "taylor".
    Raises:
        UsageError: an unknown name, or "taylor" without batches.
    """
    if name not in NAMES:
        raise UsageError(f"importance {name!r} does not exist; choose one of {', '.join(NAMES)}")
    if name == "random":
        generator = np.random.Generator(np.random.PCG64(seed))
        return {g.id: generator.random(g.width) for g in groups}
    if name == "taylor":
        return _taylor(model, groups, batches, loss)
    state = {n: p.detach() for n, p in model.named_parameters()}
    power = 1 if name == "l1" else 2
    energies = {g.id: _energy(g, state, power, relative=name.startswith("sp-lamp")) for g in groups}
    if name.startswith("sp-lamp"):
        share = lamp if name == "sp-lamp" else lamp_log
        return {g.id: len(_makers(g, state)) * share(energies[g.id]) for g in groups}
    return {group: energy if name == "l1" else np.sqrt(energy) for group, energy in energies.items()}


def lamp(energy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each unit's energy over the summed energy of all that have at least as much, (width,); the largest has 1."""
    order = np.argsort(energy, kind="stable")
    rising = energy[order]
    at_least = np.cumsum(rising[::-1])[::-1]
    scores = np.empty_like(energy)
    scores[order] = np.where(at_least > 0, rising / np.maximum(at_least, np.finfo(float).tiny), 1.0)
    return scores


def lamp_log(energy: NDArray[np.float64]) -> NDArray[np.float64]:
    """-log(1 - LAMP), whose sum over removed units is the log of the energy that is left; the largest is finite."""
    scores = np.minimum(lamp(energy), 1.0 - 1e-6)
    logs: NDArray[np.float64] = -np.log1p(-scores)
    return logs


def best(importance: Importance, widths: Mapping[str, int]) -> Keep:
    """The units to keep: the `widths[g]` highest scores of each group, in ascending order."""
    keep = {}
    for group, width in widths.items():
        scores = importance[group]
        if width < len(scores):
            order = np.argsort(-scores, kind="stable")[:width]
            keep[group] = tuple(sorted(order.tolist()))
    return keep


def kept_value(scores: NDArray[np.float64], widths: Iterable[int]) -> NDArray[np.float64]:
    """The summed score of the best `w` units, for each width, (widths,)."""
    falling = np.concatenate([[0.0], np.cumsum(np.sort(scores)[::-1])])
    values: NDArray[np.float64] = falling[np.array(list(widths), dtype=int)]
    return values


def _energy(group: ChannelGroup, state: Mapping[str, Tensor], power: int, relative: bool) -> NDArray[np.float64]:
    """Sum over producers of |W|^power for each unit, each producer over its own total when `relative`."""
    total = np.zeros(group.width)
    for member in _makers(group, state):
        weights = state[member.tensor]
        energy = _per_unit(weights.abs() if power == 1 else weights.square(), member)
        whole = energy.sum() if relative else 1.0
        total += energy / whole if whole > 0 else 0.0
    return total


def _makers(group: ChannelGroup, state: Mapping[str, Tensor]) -> list[Member]:
    """The weights that make the group's channels; without any, all that belongs to it."""
    makers = [m for m in group.members if m.role == "out" and m.tensor in state and state[m.tensor].dim() > 1]
    return makers or [m for m in group.members if m.tensor in state]


def _per_unit(values: Tensor, member: Member) -> NDArray[np.float64]:
    """Sum a tensor over everything but one axis, then over the positions of each unit, (width,)."""
    other = [d for d in range(values.dim()) if d != member.axis]
    along = values.sum(dim=other, dtype=torch.float64) if other else values.double()
    summed: NDArray[np.float64] = along.cpu().numpy()[member.positions].sum(axis=1)
    return summed


def _taylor(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Batches, loss: Callable[[Tensor, Tensor], Tensor]
) -> Importance:
    """|sum of weight * gradient| over what a unit is proportional to, averaged over batches with finite gradients."""
    was_training = model.training
    model.eval()
    totals = {g.id: np.zeros(g.width) for g in groups}
    seen = count = 0
    parameters = dict(model.named_parameters())
    for x, y in batches:
        seen += 1
        names, tensors = zip(*parameters.items(), strict=True)
        gradients = torch.autograd.grad(loss(model(x), y), tensors, allow_unused=True)
        products = {n: p.detach() * g for n, p, g in zip(names, tensors, gradients, strict=True) if g is not None}
        if not all(bool(torch.isfinite(p).all()) for p in products.values()):
            continue
        for group in groups:
            totals[group.id] += np.abs(_first_order(group, products))
        count += 1
    model.train(was_training)
    if seen and not count:
        raise UsageError(
            f"importance 'taylor': the gradients are not finite in any of {seen} batches; look at the network's loss "
            "on training images, or score channels by their weights (sp-lamp)"
        )
    if not count:
        raise UsageError("importance 'taylor' needs labelled images: give [data], or batches in Python")
    return {group: total / count for group, total in totals.items()}


def _first_order(group: ChannelGroup, products: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """Weight * gradient summed over all layers of a group, (width,): before the absolute value is taken.

    Of the norms' scales and shifts where the group has any; else of what makes it, weights and biases alike.
    """
    makers = [m for m in group.members if m.role == "out" and m.tensor in products]
    modules = {m.tensor.rpartition(".")[0] for m in makers}
    scales = [m for m in group.members if m.role == "scale" and m.tensor in products]
    biases = [m for m in scales if m.tensor.rpartition(".")[0] in modules]
    norms = [m for m in scales if m.tensor.rpartition(".")[0] not in modules]
    total = np.zeros(group.width)
    for member in norms or [*makers, *biases]:
        total += _per_unit(products[member.tensor], member)
    return total
