"""Other ways to choose widths than the exact solver: a linearised knapsack, a greedy, multiply-adds, a global ranking.

The linearised knapsack is HALP's (arXiv 2210.06659), from its mathematics: input widths are frozen at those of the step
before, so that a layer's cost belongs to the group that makes its output; K steps of a geometric budget schedule. Each
step's knapsack is solved exactly here, which HALP's own dynamic programme does not always do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgeprune import allocate, knapsack
from edgeprune.allocate import Costs
from edgeprune.errors import UnreachableBudget
from edgeprune.importance import Importance, kept_value
from edgeprune.knapsack import Cost, Problem, Sum, Term
from edgeprune.limits import Limit
from edgeprune.records import Fingerprint, Layer, LayerShape, Plan, Timing
from edgeprune.table import IDENTITY, LatencyTable, Surface, follows_input, layer_ms, surface, wanted
from edgeprune.widths import size

Floats = NDArray[np.float64]
Units = Mapping[str, int]
BISECTIONS = 7  # of the nominal budget
MANY = 1000  # choices: beyond, a linearised plan is taken as it comes
HALVINGS = 12  # of a budget of multiply-adds
COUNTED = Fingerprint("multiply-adds", "none", "none", "f32", 1, ())


def value_of(scores: Importance, units: Units) -> float:
    return sum(float(kept_value(scores[g], [w])[0]) for g, w in units.items())


# ---- linearised ----------------------------------------------------------------------------------------------


def linearised(costs: Costs, scores: Importance, budget_ms: float, steps: int) -> Units:
    """The plan at a nominal budget: what it really costs is another matter."""
    units: Units = dict(costs.dense)
    dense_ms = costs.predict_ms(costs.dense)
    for k in range(1, steps + 1):
        share = k / steps
        units = _step(costs, scores, units, dense_ms ** (1 - share) * budget_ms**share)
    return units


def linearised_within(costs: Costs, scores: Importance, budget_ms: float, steps: int) -> tuple[Units, Units]:
    """(the plan at the nominal budget, the most valuable one found that really meets the budget).

    The nominal budget is raised, by bisection, until the true latency is the budget: the method at its best.
    """
    first = linearised(costs, scores, budget_ms, steps)
    if sum(map(len, costs.candidates.values())) > MANY:
        return first, first
    best: Units | None = first if costs.predict_ms(first) <= budget_ms else None
    low, high = (budget_ms, costs.predict_ms(costs.dense)) if best is not None else (0.5 * budget_ms, budget_ms)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        units = linearised(costs, scores, middle, steps)
        fits = costs.predict_ms(units) <= budget_ms
        low, high = (middle, high) if fits else (low, middle)
        if fits and (best is None or value_of(scores, units) > value_of(scores, best)):
            best = units
    return first, best if best is not None else first


def _step(costs: Costs, scores: Importance, now: Units, budget_ms: float) -> Units:
    left = {g: [w for w in choices if w <= now[g]] for g, choices in costs.candidates.items()}
    groups = list(left)
    constant, linear = costs.correction.overhead_ms, {g: np.zeros(len(w)) for g, w in left.items()}
    for one in costs.surfaces:
        here = _at(one, now, now)
        constant += here
        for g, _ in one.layer.out_width.terms:
            linear[g] += [_at(one, now, {**now, g: w}) - here for w in left[g]]
    values = tuple(kept_value(scores[g], left[g]) for g in groups)
    terms = tuple(Term((n,), linear[g]) for n, g in enumerate(groups))
    problem = Problem(values, (Cost("linearised latency", terms, (), constant),), ())
    try:
        found = knapsack.solve(problem, [budget_ms])
    except UnreachableBudget:  # by this cost, which counts what shrinking inputs saves only later
        found = knapsack.cheapest(problem)
    return {g: left[g][c] for g, c in zip(groups, found.choice, strict=True)}


def _at(one: Surface, ins: Units, outs: Units) -> float:
    layer = one.layer
    in_ch = size(layer.in_width, outs if follows_input(layer) else ins)
    return layer_ms(one, in_ch, size(layer.out_width, outs))


# ---- greedy --------------------------------------------------------------------------------------------------


def greedy(problem: Problem, budgets: list[float]) -> list[tuple[int, ...]]:
    """Choices for descending budgets: the step that loses least value for each millisecond saved, again and again.

    A step takes one group to any smaller width, judged by the true two-dimensional costs; below a budget, what still
    fits is put back, most value first.
    """
    choice = [len(v) - 1 for v in problem.values]
    touching = _touching(problem)
    found = []
    for budget in budgets:
        cost = knapsack.costs_of(problem, choice)[0]
        while cost > budget:
            steps = [_down(problem, touching, choice, g) for g in range(len(choice))]
            _, g, c, saved = min(s for s in steps if s is not None)
            choice[g] = c
            cost -= saved
        found.append(_refilled(problem, touching, list(choice), budget))
    return found


def _down(
    problem: Problem, touching: list[list[Term | Sum]], choice: list[int], g: int
) -> tuple[float, int, int, float] | None:
    """(value lost for each millisecond, group, choice, milliseconds saved) of the group's best step down."""
    now = choice[g]
    costs = _given(touching[g], choice, g, len(problem.values[g]))
    saved = costs[now] - costs[:now]
    lost = problem.values[g][now] - problem.values[g][:now]
    good = np.flatnonzero(saved > 0)
    if not len(good):
        return None
    c = int(good[np.argmin(lost[good] / saved[good])])
    return float(lost[c] / saved[c]), g, c, float(saved[c])


def _refilled(problem: Problem, touching: list[list[Term | Sum]], choice: list[int], budget: float) -> tuple[int, ...]:
    while True:
        room = budget - knapsack.costs_of(problem, choice)[0]
        best: tuple[float, int, int] | None = None
        for g, values in enumerate(problem.values):
            costs = _given(touching[g], choice, g, len(values))
            gained = np.where(costs - costs[choice[g]] <= room, values - values[choice[g]], 0.0)
            c = int(np.argmax(gained))
            if gained[c] > 0 and (best is None or gained[c] > best[0]):
                best = (float(gained[c]), g, c)
        if best is None:
            return tuple(choice)
        choice[best[1]] = best[2]


def _touching(problem: Problem) -> list[list[Term | Sum]]:
    found: list[list[Term | Sum]] = [[] for _ in problem.values]
    for term in problem.costs[0].terms:
        for g in set(term.groups):
            found[g].append(term)
    for part in problem.costs[0].sums:
        for g in {part.b, *(g for g, _ in part.sizes)} - {-1}:
            found[g].append(part)
    return found


def _given(parts: list[Term | Sum], choice: list[int], g: int, choices: int) -> Floats:
    """What each choice of one group costs, the other groups as they are, (choices,)."""
    total = np.zeros(choices)
    for part in parts:
        if isinstance(part, Term):
            total += part.cost[tuple(np.arange(choices) if h == g else choice[h] for h in part.groups)]
            continue
        rest = part.fixed + sum(float(s[choice[h]]) for h, s in part.sizes if h != g)
        own = next((s for h, s in part.sizes if h == g), np.zeros(choices))
        at = np.arange(choices) if part.b == g else np.full(choices, choice[part.b] if part.b >= 0 else 0)
        total += part.base[at] + part.slope[at] * (rest + own)
    return total


# ---- a global ranking ----------------------------------------------------------------------------------------


def globally(costs: Costs, scores: Importance, budget_ms: float, limits: Sequence[Limit] = ()) -> Plan:
    """The lowest scores of all groups together go, one by one, until the latency fits: see `Allocator`.

    A group has the narrowest width on offer that holds what is left of it, and never less than its narrowest.
    """
    left, units = dict(costs.dense), dict(costs.dense)
    for _, g in sorted((float(score), group) for group in costs.candidates for score in scores[group]):
        if costs.predict_ms(units) <= budget_ms:
            break
        left[g] -= 1
        units[g] = min(w for w in costs.candidates[g] if w >= max(left[g], 1))
    if costs.predict_ms(units) > budget_ms:
        raise UnreachableBudget(allocate.too_small(units, costs, budget_ms, limits))
    value = value_of(scores, units)
    return Plan(units, costs.predict_ms(units), costs.predict_ms(costs.dense), value, float("nan"))


# ---- multiply-adds -------------------------------------------------------------------------------------------


def by_macs(costs: Costs, scores: Importance, budget_ms: float, limits: Sequence[Limit] = ()) -> Plan:
    """Chosen by multiply-adds, at as many of them as the latency allows: see `Allocator`.

    The same values and the same exact solver; what a channel costs is counted instead of measured.
    """
    counted = in_macs(costs)
    low, high = counted.predict_ms(allocate.floor(counted).widths), counted.predict_ms(counted.dense)
    best = allocate.floor(costs)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        plan = allocate.solve(counted, scores, middle)
        fits = costs.predict_ms(plan.widths) <= budget_ms
        low, high = (middle, high) if fits else (low, middle)
        if fits and value_of(scores, plan.widths) > value_of(scores, best.widths):
            best = plan
    return replace(best, predicted_ms=costs.predict_ms(best.widths), dense_ms=costs.predict_ms(costs.dense))


def in_macs(costs: Costs) -> Costs:
    """Millions of multiply-adds in the place of milliseconds."""
    layers = [s.layer for s in costs.surfaces if s.layer.macs]
    entries: dict[LayerShape, Timing] = {}

    def surfaces() -> tuple[Surface, ...]:
        return tuple(surface(LatencyTable(COUNTED, entries, IDENTITY), layer, costs.candidates) for layer in layers)

    while missing := {shape: one.layer for one in surfaces() for shape in wanted(one)}:
        entries |= {shape: Timing(*[_millions(layer, shape)] * 3, 1, (), 0.0) for shape, layer in missing.items()}
    return replace(costs, surfaces=surfaces())


def _millions(layer: Layer, shape: LayerShape) -> float:
    full = layer.shape
    share = shape.in_ch * shape.out_ch / shape.conv_groups / (full.in_ch * full.out_ch / full.conv_groups)
    return layer.macs * share / 1e6
