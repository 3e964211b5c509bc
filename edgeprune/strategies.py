"""How a step's widths are chosen: what a strategy finds is carried to a budget, and measured there in the last step."""

from __future__ import annotations

from collections.abc import Sequence

from . import allocate, allocators, budgets, importance, planning, search, shaping
from .allocate import Allocator
from .asked import Asked
from .importance import Importance
from .planning import Aim, Chosen
from .records import Plan
from .search import Space, Subject
from .watch import Watch

LOOKING = (*search.NAMES, *shaping.NAMES)  # strategies that look at the network's answers: not before there is time


def forecast(asked: Asked) -> Allocator:
    """What stands for a strategy where the network cannot be asked yet: its plans are taken to be the exact ones."""
    return allocate.solve if asked.strategy in LOOKING else allocators.named(asked.strategy, asked.seed)


def allocator(
    subject: Subject, aims: Sequence[Aim], schedule: Sequence[tuple[float, ...]], asked: Asked, watch: Watch
) -> tuple[Allocator, Importance]:
    """How a step's widths are chosen, and which units go first; a search is over before widths are carried to what is
    measured."""
    costs, scores = aims[0].costs, subject.scores
    limits = planning.further_limits(
        aims, schedule[0], budgets.size_bytes(asked.budget) if len(schedule) == 1 else None
    )
    if asked.magnitude is not None:
        shape = shaping.by_magnitude(subject, asked.magnitude, watch)
        return allocators.to_shares(shape.shares), shape.scores
    if asked.soft is not None:
        shape = shaping.by_gradient(subject, costs, schedule[0][0], limits, asked.floors, asked.soft, watch)
        return allocators.to_shares(shape.shares), scores
    if asked.search is None:
        return allocators.named(asked.strategy, asked.seed), scores
    space = Space(costs, subject.scores, tuple(each[0] for each in schedule), tuple(limits))
    found = search.find(subject, space, asked.strategy, asked.search, asked.steps, asked.seed, watch)
    return allocators.to_shares(allocators.shares_of(costs, found.units)), scores


def choose(
    aims: Sequence[Aim],
    scores: Importance,
    how: Allocator,
    asked: Asked,
    budgets_ms: Sequence[float],
    last: bool,
    watch: Watch,
) -> Chosen:
    """Earlier steps trust the prediction; the last one is measured until it holds."""
    if last:
        return planning.meet(aims, scores, how, watch, budgets.size_bytes(asked.budget))
    plan: Plan = planning.within_reach(aims, scores, how, budgets_ms)
    return Chosen(plan, importance.best(scores, plan.widths), float("nan"), (), "")
