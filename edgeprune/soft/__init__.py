"""Shares by gradient: how much of each group goes, so that an application's loss stays low and a goal is met.

    found = soft.optimise(gates, goal, most, loss, batches, floors)     # shares, then hardened, cut and measured

After "component-aware pruning via soft coefficients" (Sundaram et al., arXiv 2507.14882): groups of the dependency
graph, told apart by whether they lie inside a component or between two; a coefficient for each; the coefficients are
found by gradient under constraints. The paper's text was not at hand: the algorithm is a reconstruction.

    minimise  loss(network with gates)   subject to   |amount - wanted| <= tolerance,   metric_j >= floor_j

by an augmented Lagrangian, over logits of the shares, with the weights as they are. The floors' metrics are smoothed
for this (`surrogate`); whether they hold is only ever said of networks that are really cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..metrics import RECALL
from ..records import ChannelGroup, Progress
from . import amounts, components
from .amounts import Goal
from .gates import Gates

__all__ = [
    "Found",
    "Gates",
    "Goal",
    "Settings",
    "amounts",
    "components",
    "harden",
    "optimise",
    "start",
    "surrogate",
    "task_loss",
]

Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs, labels)
Batches = Iterable[tuple[Tensor, Tensor]]
Surrogate = Callable[[Tensor, Tensor, Tensor], Tensor | None]  # (outputs, labels, inputs); None: nothing to say
ROUNDS = 10  # of updates of the multipliers
WARM, COLD = 0.1, 0.01  # temperatures, from the first step to the last
STIFF = 10.0  # of the penalty, at first; it doubles when a round does not halve the miss
MOST_STIFF = 1e5
EDGE = 0.02  # shares start at least this far from their ends, where a gradient is lost
HALVINGS = 50


@dataclass(frozen=True)
class Settings:
    """How to optimise."""

    steps: int
    rate: float  # of Adam, on logits


@dataclass(frozen=True)
class Found:
    """Shares of each group's units that go, at the end of each round, the last one last."""

    rounds: tuple[Mapping[str, float], ...]
    losses: tuple[float, ...]  # of every step
    misses: tuple[float, ...]  # of the goal, outside its tolerance, at the end of each round
    multipliers: Mapping[str, float]  # of the floors, at the end


def optimise(
    gates: Gates,
    goal: Goal,
    most: Mapping[str, float],
    loss: Loss,
    batches: Callable[[], Batches],
    floors: Mapping[str, float],
    settings: Settings,
    progress: Progress | None = None,
) -> Found:
    """Find shares by gradient.

    Args:
        gates: the network with its gates.
        goal: what is to be reached, in units kept.
        most: group -> the share that may go at most; 0 keeps it whole.
        loss: of outputs and labels.
        batches: gives images and labels, again each time it is called.
        floors: metric -> least value; one without a `surrogate` has no say here.
        settings: steps, rate.
        progress: told (steps done, of).
    """
    begin, free = start(gates, goal, most), [g for g in gates.ranks if most[g] > 0]
    logits = torch.tensor([_logit(begin[g] / most[g]) for g in free], dtype=torch.float64, requires_grad=True)
    ceilings = torch.tensor([most[g] for g in free], dtype=torch.float64)
    adam, lagrangian = torch.optim.Adam([logits], lr=settings.rate), _Lagrangian(goal, floors)
    source = itertools.chain.from_iterable(batches() for _ in itertools.count())
    per_round = max(1, settings.steps // ROUNDS)
    steps = ROUNDS * per_round
    rounds, losses, misses = list[Mapping[str, float]](), [], []

    def shares() -> dict[str, Tensor]:
        fixed = torch.zeros((), dtype=torch.float64)
        return {**dict.fromkeys(gates.ranks, fixed), **dict(zip(free, ceilings * torch.sigmoid(logits), strict=True))}

    with _evaluating(gates.model):
        for step in range(steps):
            x, y = next(source)
            now = shares()
            out = gates.run(x, gates.openings(now, WARM * (COLD / WARM) ** (step / max(steps - 1, 1))))
            value = loss(out, y)
            adam.zero_grad()
            torch.autograd.backward(value + lagrangian.penalty(_kept(gates, now), out, y, x))
            adam.step()
            losses.append(float(value.detach()))
            if (step + 1) % per_round == 0:
                reached = {g: share.detach() for g, share in shares().items()}
                rounds.append({g: float(share) for g, share in reached.items()})
                misses.append(lagrangian.end_round(_kept(gates, reached)))
            if progress is not None:
                progress(step + 1, steps)
    return Found(tuple(rounds), tuple(losses), tuple(misses), lagrangian.pulls)


class _Lagrangian:
    """Multipliers and penalties of the goal and of the floors that have a surrogate."""

    def __init__(self, goal: Goal, floors: Mapping[str, float]) -> None:
        self.goal, self.floors = goal, floors
        self.smooth = {name: s for name in floors if (s := surrogate(name)) is not None}
        self.pulls = dict.fromkeys(self.smooth, 0.0)
        self._short = {name: list[float]() for name in self.smooth}
        self._pull, self._stiff, self._miss = 0.0, STIFF, math.inf

    def penalty(self, kept: amounts.Kept, outputs: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        miss = self.goal.miss(kept)
        total = self._pull * miss + self._stiff / 2 * miss**2
        for name, smooth in self.smooth.items():
            value = smooth(outputs, labels, inputs)
            if value is not None:
                short = (self.floors[name] - value) / max(abs(self.floors[name]), 1e-9)
                self._short[name].append(float(short.detach()))
                total = total + self.pulls[name] * short + STIFF / 2 * short.clamp(min=0.0) ** 2
        return total

    def end_round(self, kept: amounts.Kept) -> float:
        """Raise the multipliers of what is missed, and lower those of floors that hold; returns the goal's miss."""
        miss = float(self.goal.miss(kept))
        self._pull += self._stiff * miss
        if miss > self._miss / 2:
            self._stiff = min(2 * self._stiff, MOST_STIFF)
        self._miss = miss
        for name, seen in self._short.items():
            self.pulls[name] = max(0.0, self.pulls[name] + STIFF * sum(seen) / max(len(seen), 1))
            seen.clear()
        return miss


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def start(gates: Gates, goal: Goal, most: Mapping[str, float]) -> dict[str, float]:
    """The same share of every group, as far as it may go, at which the goal is met as nearly as that allows."""

    def at(share: float) -> dict[str, float]:
        return {g: min(share, most[g]) for g in gates.ranks}

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        kept = {g: _real(len(r) * (1 - at(middle)[g])) for g, r in gates.ranks.items()}
        low, high = (middle, high) if float(goal.amount(kept)) > goal.wanted else (low, middle)
    return at(high)


def surrogate(name: str) -> Surrogate | None:
    """A smooth stand-in for a metric; None for a user's own function, which only accepts or rejects."""
    if name == "psnr":
        return _psnr
    found = RECALL.fullmatch(name)
    if found is None and name != "accuracy":
        return None
    wanted = None if found is None else int(found[1])

    def certainty(outputs: Tensor, labels: Tensor, inputs: Tensor) -> Tensor | None:
        """The mean probability given to the right class, of the images that count."""
        right = outputs.softmax(1).gather(1, labels[:, None])[:, 0]
        counts = torch.ones_like(labels, dtype=torch.bool) if wanted is None else labels == wanted
        return right[counts].mean() if bool(counts.any()) else None

    return certainty


def harden(
    goal: Goal, groups: Sequence[ChannelGroup], shares: Mapping[str, float], most: Mapping[str, float]
) -> dict[str, int]:
    """Whole units: the nearest ones, then single units more or less until the goal is met, the least wrong ones first.

    Returns:
        group -> units kept; the goal may still be missed where no single unit brings it nearer.
    """
    width = {g.id: g.width for g in groups}
    least = {g: max(1, math.ceil(width[g] * (1 - most[g]) - 1e-9)) for g in width}
    units = {g: min(width[g], max(least[g], round(width[g] * (1 - shares[g])))) for g in width}

    def off(candidate: Mapping[str, int]) -> float:
        return float(goal.amount({g: _real(n) for g, n in candidate.items()})) - goal.wanted

    while abs(off(units)) > goal.tolerance * goal.scale:
        step = -1 if off(units) > 0 else 1
        tries = [{**units, g: n + step} for g, n in units.items() if least[g] <= n + step <= width[g]]
        nearer = [t for t in tries if abs(off(t)) < abs(off(units))]
        if not nearer:
            break
        units = min(nearer, key=lambda t: sum((t[g] / width[g] - 1 + shares[g]) ** 2 for g in width))
    return units


def task_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy for class numbers, squared error for anything else."""
    if labels.dtype == torch.int64 and labels.dim() == 1:
        return functional.cross_entropy(outputs, labels)
    return functional.mse_loss(outputs, labels)


def _psnr(outputs: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
    peak = inputs.max() - inputs.min()
    return 10 * torch.log10(peak**2 / (outputs - inputs).square().mean().clamp(min=1e-12))


def _kept(gates: Gates, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {g: len(rank) * (1 - shares[g]) for g, rank in gates.ranks.items()}


def _logit(share: float) -> float:
    inside = min(max(share, EDGE), 1 - EDGE)
    return math.log(inside / (1 - inside))


def _real(units: float) -> Tensor:
    return torch.tensor(float(units), dtype=torch.float64)
