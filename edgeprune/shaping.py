"""Strategies that ask the network itself: what pruning by magnitude leaves of each group, or shares by gradient.

Both end in shares of every group, which are carried to a measured budget in the same way as uniform ones are. What was
found is in the step's magnitude.json or soft.json: a run that goes on reads it back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from . import allocators, magnitude, metrics, soft, surgery
from .allocate import Costs
from .config import MagnitudeSection, SoftSection
from .errors import UsageError
from .graph import ModelGraph
from .importance import Importance
from .limits import Limit
from .magnitude import Masks
from .magnitude.dead import dead
from .records import ChannelGroup, Keep
from .search import Subject, workers
from .task import Task
from .watch import Watch

NAMES = ("magnitude", "soft")
MAGNITUDE = "edgeprune.magnitude/1"
SOFT = "edgeprune.soft/1"
LEAST = 1e-3  # of a share: a group never goes whole
LAST = 3  # rounds of the gradient whose shares are cut and judged
TIE = 1e-6  # of a score: what decides between units with equally many connections left


@dataclass(frozen=True)
class Shape:
    """What is left of each group, in proportion, and which units go first."""

    shares: Mapping[str, float]  # of the dense network's units
    scores: Importance


@dataclass(frozen=True)
class Judged:
    """Shares that were cut, at the budget, and judged on the search split, before any training."""

    shares: Mapping[str, float]
    units: Mapping[str, int]
    loss: float
    broken: tuple[str, ...]  # floors
    short: float  # of all floors together, in parts of each


# ---- magnitude -----------------------------------------------------------------------------------------------


def by_magnitude(subject: Subject, settings: MagnitudeSection, watch: Watch) -> Shape:
    """Prune single weights, retrain, and see how many of its connections each unit has left; dead units have none.

    Args:
        subject: the network.
        settings: see [magnitude].
        watch: who is told.
    """
    run = subject.run
    if run.has("magnitude.json"):
        content = run.read("magnitude.json", MAGNITUDE)
        return Shape(content["shares"], {g: np.array(s) for g, s in content["scores"].items()})

    def answers(alone: magnitude.Alone, tried: Sequence[magnitude.Tried]) -> Iterator[tuple[int, tuple[float, float]]]:
        with workers.answering(alone, settings) as found:
            yield from found(tried)

    def retrain(model: nn.Module, number: int) -> None:
        subject.task.train(model, subject.dense, False, run.path(f"magnitude-{number}"), None)

    with watch.stage("prune weights by magnitude, and retrain") as progress:
        pruned = magnitude.prune(
            subject.student, subject.graph.example, settings.ratio,
            functools.partial(_worth, subject.task, settings.images), retrain, settings.rounds, settings.l1, progress,
            answers=answers,
        )  # fmt: skip
    groups = surgery.narrow_groups(subject.graph, subject.keep)
    left = connections(pruned.model, groups, pruned.masks)
    shape = Shape(_of_dense(subject, {g: float(units.mean()) for g, units in left.items()}), _tied(subject, left))
    gone = {g: int((units == 0).sum()) for g, units in left.items()}
    watch.say(f"{sum(gone.values())} dead of {sum(map(len, left.values()))} neurons at {settings.ratio:g}x")
    scores = {g: s.tolist() for g, s in shape.scores.items()}
    content = {"rounds": pruned.rounds, "dead": gone, "shares": shape.shares, "scores": scores}
    run.write("magnitude.json", MAGNITUDE, content)
    return shape


def _worth(task: Task, images: int, model: nn.Module) -> float:
    """On images that may guide choices; it travels to the scan's workers."""
    return -task.judge(model, images).loss


def connections(model: nn.Module, groups: Sequence[ChannelGroup], masks: Masks) -> dict[str, np.ndarray]:
    """The share of its weights that each unit has left, (width,) for each group; 0 where inputs or outputs are gone.

    Args:
        model: the network with zeros in it, whose groups these are.
        groups: of `model`.
        masks: what is left of its weights; a group without such weights counts as whole.
    """
    states = dead(model, groups)
    found = {}
    for group in groups:
        left, of = np.zeros(group.width), np.zeros(group.width)
        for member in group.members:
            if member.tensor not in masks:
                continue
            mask = masks[member.tensor].movedim(member.axis, 0).flatten(1)
            left += mask.sum(1).numpy()[member.positions].sum(1)
            of += member.positions.shape[1] * mask.shape[1]
        share = left / of if of.all() else np.ones(group.width)
        unfed, unread = states.get(group.id, (False, False))
        found[group.id] = np.where(np.logical_or(unfed, unread), 0.0, share)
    return found


def _of_dense(subject: Subject, shares: Mapping[str, float]) -> dict[str, float]:
    """Shares of what the student has left, as shares of the dense network; what is gone whole keeps a trace."""
    dense = {g.id: g.width for g in subject.graph.groups}
    have = {g: len(subject.keep.get(g, range(n))) for g, n in dense.items()}
    return {g: max(LEAST, shares.get(g, 0.0) * have[g] / n) for g, n in dense.items()}


def _tied(subject: Subject, left: Mapping[str, np.ndarray]) -> Importance:
    """Connections left as scores of the dense network's units; between equal ones the importance decides."""
    scores = {}
    for group, importance in subject.scores.items():
        scores[group] = np.full(len(importance), -1.0)
        if group in left:
            at = list(subject.keep.get(group, range(len(importance))))
            largest = float(np.abs(importance[at]).max()) or 1.0
            scores[group][at] = left[group] + TIE * importance[at] / largest
    return scores


# ---- soft ----------------------------------------------------------------------------------------------------


def isolated(graph: ModelGraph, settings: SoftSection) -> list[str]:
    """Groups that cross between components, where those are to be left alone."""
    if not settings.isolate:
        return []
    return [
        g
        for g, place in soft.components.places(graph, soft.components.of(graph, settings.components)).items()
        if place.crosses
    ]


def by_gradient(
    subject: Subject,
    costs: Costs,
    budget_ms: float,
    limits: Sequence[Limit],
    floors: Mapping[str, float],
    settings: SoftSection,
    watch: Watch,
) -> Shape:
    """Shares by gradient; those of the last rounds, and uniform ones, are cut and judged, and the best are taken.

    Args:
        subject: the network.
        costs: with the widths that are left.
        budget_ms: predicted.
        limits: further budgets.
        floors: metric -> least value.
        settings: see [soft].
        watch: who is told.
    Raises:
        UsageError: without images there is no gradient.
        UnreachableBudget: not even the smallest network meets the budget.
    """
    run = subject.run
    if run.has("soft.json"):
        return Shape(run.read("soft.json", SOFT)["shares"], subject.scores)
    named = soft.components.of(subject.graph, settings.components)
    gates, goal, most = prepared(subject, costs, budget_ms, settings)
    with watch.stage("find shares by gradient") as progress:
        found = soft.optimise(
            gates, goal, most, soft.task_loss, functools.partial(_images, subject), floors,
            soft.Settings(settings.steps, settings.rate), progress,
        )  # fmt: skip
    tries = [*found.rounds[-LAST:], soft.start(gates, goal, most)]
    with watch.stage("cut and judge them") as progress:
        judged = []
        for at, going in enumerate(tries):
            shares = _of_dense(subject, {g: 1 - share for g, share in going.items()})
            plan = allocators.scaled(shares, costs, subject.scores, budget_ms, limits)
            judged.append(_judge(subject, shares, plan.widths, floors, settings.images))
            progress(at + 1, len(tries))
    best = min(judged, key=lambda j: (j.short, j.loss))
    for line in best.broken:
        watch.say(f"before training, on the search split: {line}")
    shares = allocators.shares_of(costs, best.units)
    content = {"components": named, "places": soft.components.places(subject.graph, named), "shares": shares,
               "judged": judged, "misses": found.misses, "multipliers": found.multipliers}  # fmt: skip
    run.write("soft.json", SOFT, content)
    return Shape(shares, subject.scores)


def prepared(
    subject: Subject, costs: Costs, budget_ms: float, settings: SoftSection
) -> tuple[soft.Gates, soft.Goal, dict[str, float]]:
    """The gates of a network, its goal, and the share of each group that may go at most."""
    groups = surgery.narrow_groups(subject.graph, subject.keep)
    scores = {g.id: subject.scores[g.id][list(subject.keep.get(g.id, range(g.width)))] for g in groups}
    goal = soft.amounts.latency_goal(_left(costs, subject.keep), budget_ms, settings.tolerance)
    least = {g.id: min((w for w in costs.candidates[g.id] if w), default=g.width) for g in groups}
    most = {g.id: max(0.0, 1 - least[g.id] / g.width) for g in groups}
    return soft.Gates(subject.student, groups, scores), goal, most


def _left(costs: Costs, keep: Keep) -> Costs:
    """Without the layers of blocks that were dropped before."""
    units = {g: len(keep[g]) if g in keep else n for g, n in costs.dense.items()}
    gone = {g for g, n in units.items() if not n}
    each = [(s, s.layer.in_width.terms + s.layer.out_width.terms) for s in costs.present(units)]
    return replace(costs, surfaces=tuple(s for s, terms in each if not gone & {g for g, _ in terms}))


def _images(subject: Subject) -> Iterable[tuple[Tensor, Tensor]]:
    seen = False
    for pair in subject.task.batches():
        seen = True
        yield pair
    if not seen:
        raise UsageError("strategy 'soft' needs labelled images: give [data], or batches in Python")


def _judge(
    subject: Subject, shares: Mapping[str, float], units: Mapping[str, int], floors: Mapping[str, float], images: int
) -> Judged:
    module = subject.cut(units)
    subject.task.adapt(module)
    measured = subject.task.measure(module) if floors else {}
    broken = tuple(metrics.broken(floors, measured)) if measured else ()
    short = sum(_short(floor, measured[name]) for name, floor in floors.items() if name in measured)
    return Judged(shares, units, subject.task.judge(module, images).loss, broken, short)


def _short(floor: float, value: float) -> float:
    return max(0.0, (floor - value) / max(abs(floor), 1e-9)) if math.isfinite(value) else (0.0 if value > 0 else 1.0)
