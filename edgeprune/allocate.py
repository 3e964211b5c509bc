"""From a network's layers, a latency table and channel scores to a plan: how many units each group keeps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from . import knapsack
from .errors import UnreachableBudget
from .importance import Importance, kept_value
from .limits import Limit, Part, dropped_layers
from .polish import Values, polished
from .records import Block, Layer, LayerRow, Plan
from .table import IDENTITY, Correction, Surface, follows_input, layer_ms, predict_ms
from .widths import shape_at, size

Floats = NDArray[np.float64]
Candidates = Mapping[str, tuple[int, ...]]
Units = Mapping[str, int]
PRODUCTS = 1024  # combinations of widths that a layer is priced at one by one; beyond, its concat is taken as linear
ROUGHLY = 5e-3  # gap to which a problem priced by lines is solved: they are off by more
LATENCY = "latency in ms"


class Allocator(Protocol):
    """Chooses widths."""

    def __call__(self, costs: Costs, importance: Importance, budget_ms: float, limits: Sequence[Limit] = (), /) -> Plan:
        """Choose.

        Args:
            costs: of the network on its device.
            importance: group -> (width,) scores.
            budget_ms: of the predicted latency.
            limits: further budgets: other devices' latencies, size.
        Raises:
            UnreachableBudget: not even the smallest network meets them.
        """


@dataclass(frozen=True, eq=False)
class Costs:
    """What every choice of widths costs on one device: the layers' surfaces over the candidate widths."""

    surfaces: tuple[Surface, ...]
    candidates: Candidates
    blocks: tuple[Block, ...]
    dense: Mapping[str, int]  # units of the uncut network

    @property
    def correction(self) -> Correction:
        """From summed layers to whole networks."""
        return self.surfaces[0].table.correction if self.surfaces else IDENTITY

    def predict_ms(self, units: Mapping[str, int]) -> float:
        return predict_ms(self.present(units), units)

    def present(self, units: Mapping[str, int]) -> list[Surface]:
        """The layers that are left when dropped blocks are gone."""
        gone = dropped_layers(self.blocks, units)
        return [s for s in self.surfaces if s.layer.name not in gone]

    def rows(self, units: Mapping[str, int]) -> list[LayerRow]:
        """Each layer by the table, without correction: uncut, and under a plan; one that is gone takes 0 ms."""
        gone = dropped_layers(self.blocks, units)
        rows = []
        for s in self.surfaces:
            a, b = shape_at(s.layer, self.dense), shape_at(s.layer, units)
            planned_ms = 0.0 if s.layer.name in gone else s.at(b.in_ch, b.out_ch)
            dense_ms = s.at(a.in_ch, a.out_ch)
            rows.append(LayerRow(s.layer.name, a.op, a.in_ch, a.out_ch, b.in_ch, b.out_ch, dense_ms, planned_ms))
        return rows

    def limit(self, name: str, budget_ms: float) -> Limit:
        """This device's latency as a budget."""
        parts = tuple(Part(s.layer, s.ins, s.outs, partial(layer_ms, s)) for s in self.surfaces)
        return Limit(name, parts, self.correction.overhead_ms, budget_ms)


def solve(
    costs: Costs, importance: Importance, budget_ms: float, limits: Sequence[Limit] = (), gap: float = knapsack.GAP
) -> Plan:
    """The plan with the highest summed score within the budget and the further limits.

    Exact, but for layers behind concats of many groups: these are priced by lines through their curves, and the plan is
    polished by the curves themselves. Its gap is then to what lines below them would allow.

    Raises:
        UnreachableBudget: not even the smallest network meets them.
    """
    problem = problem_of(costs, importance, limits)
    budgets = [budget_ms, *(limit.budget for limit in limits)]
    if not any(cost.sums for cost in problem.costs):
        solution = knapsack.solve(problem, budgets, gap)
        return _plan(costs, _units(costs, solution), solution.value, solution.gap)
    values, every = values_of(costs, importance), [costs.limit(LATENCY, budget_ms), *limits]
    starts = _starts(costs, problem, budgets, max(gap, ROUGHLY))
    ends = (polished(values, every, costs.blocks, start) for start in starts)
    units = next((units for units in ends if units is not None), None)
    if units is None:
        raise UnreachableBudget(too_small(floor(costs).widths, costs, budget_ms, limits))
    value = math.fsum(values[g][w] for g, w in units.items())
    best = knapsack.upper_bound(problem_of(costs, importance, limits, below), budgets)
    return _plan(costs, units, value, max(0.0, best - value) / max(abs(best), 1e-12))


def _starts(costs: Costs, problem: knapsack.Problem, budgets: Sequence[float], gap: float) -> Iterator[Units]:
    """Where to polish from: the best by the lines; should that lead nowhere, the cheapest."""
    with suppress(UnreachableBudget):
        yield _units(costs, knapsack.solve(problem, budgets, gap))
    yield _units(costs, knapsack.cheapest(problem))


def _plan(costs: Costs, units: Units, value: float, gap: float) -> Plan:
    return Plan(units, costs.predict_ms(units), costs.predict_ms(costs.dense), value, gap)


def floor(costs: Costs) -> Plan:
    """The fastest plan."""
    problem = problem_of(costs, {g: np.ones(w[-1]) for g, w in costs.candidates.items()})
    return _plan(costs, _units(costs, knapsack.cheapest(problem)), 0.0, 0.0)


def values_of(costs: Costs, importance: Importance) -> Values:
    """What each width of each group is worth."""
    return {
        g: dict(zip(widths, kept_value(importance[g], widths).tolist(), strict=True))
        for g, widths in costs.candidates.items()
    }


def too_small(smallest: Units, costs: Costs, budget_ms: float, limits: Sequence[Limit]) -> str:
    """Why not even the smallest network will do."""
    others = "".join(
        f"; {limit.name} {limit.predict(smallest, costs.blocks):.4g}, the budget is {limit.budget:.4g}"
        for limit in limits
    )
    return (
        f"the smallest network is predicted at {costs.predict_ms(smallest):.4g} ms, the budget is {budget_ms:.4g} ms"
        f"{others}"
    )


def at_most(costs: Costs, units: Mapping[str, int]) -> Costs:
    """The same costs for the widths that are still there."""
    left = {g: tuple(w for w in choices if w <= units[g]) for g, choices in costs.candidates.items()}
    return replace(costs, candidates=left)


def _units(costs: Costs, solution: knapsack.Solution) -> dict[str, int]:
    return {g: w[c] for (g, w), c in zip(costs.candidates.items(), solution.choice, strict=True)}


# ---- the problem as arrays -----------------------------------------------------------------------------------


def through(distances: Floats) -> float:
    """How far a fitted line is moved: not at all ..."""
    return 0.0


def below(distances: Floats) -> float:
    """... or to lie nowhere above a curve."""
    return min(float(distances.min()), 0.0)


def problem_of(
    costs: Costs, importance: Importance, limits: Sequence[Limit] = (), side: Callable[[Floats], float] = through
) -> knapsack.Problem:
    """Values and costs of every choice, for `knapsack.solve`: the device's latency first, then the further limits.

    The groups of a block go together or not at all, and gone they are worth nothing (see `Block`).

    Args:
        costs, importance, limits: as the plan's.
        side: where the lines lie that price layers behind concats of many groups, in every cost.
    """
    number = {g: i for i, g in enumerate(costs.candidates)}
    values = tuple(kept_value(importance[g], widths) for g, widths in costs.candidates.items())
    together = []
    for block in costs.blocks:
        inside = [g for g in block.groups if 0 in costs.candidates[g]]
        together += [((number[a], 0), (number[b], 0)) for a, b in itertools.pairwise(inside)]
    each = []
    for limit in (costs.limit(LATENCY, 0.0), *limits):
        builder = _Terms(costs, number, side)
        for part in limit.parts:
            builder.add(part)
        each.append(knapsack.Cost(limit.name, tuple(builder.terms), tuple(builder.sums), limit.constant))
    return knapsack.Problem(values, tuple(each), tuple(together))


class _Terms:
    """Collects the cost terms of layers."""

    def __init__(self, costs: Costs, number: Mapping[str, int], side: Callable[[Floats], float]) -> None:
        self.candidates, self.number, self.side = costs.candidates, number, side
        self.terms: list[knapsack.Term] = []
        self.sums: list[knapsack.Sum] = []
        self.gate = {name: b.groups[0] for b in costs.blocks for name in b.layers if 0 in costs.candidates[b.groups[0]]}

    def add(self, part: Part) -> None:
        layer = part.layer
        ins = [g for g, _ in layer.in_width.terms if len(self.candidates[g]) > 1]
        outs = [g for g, _ in layer.out_width.terms if len(self.candidates[g]) > 1]
        involved = list(dict.fromkeys(ins + outs))
        gate = self.gate.get(layer.name)
        if gate is not None and gate not in involved:
            involved.append(gate)
        if math.prod(len(self.candidates[g]) for g in involved) <= PRODUCTS:
            self._term(part, involved, gate)
        else:
            self._sum(part, ins, outs)

    def _term(self, part: Part, involved: Sequence[str], gate: str | None) -> None:
        """Every combination of the groups' widths at its own cost; a single width counts as no choice."""
        units = {g: w[-1] for g, w in self.candidates.items()}
        cost = np.zeros([len(self.candidates[g]) for g in involved])
        for at in np.ndindex(*cost.shape):
            units |= {g: self.candidates[g][c] for g, c in zip(involved, at, strict=True)}
            if gate is None or units[gate]:
                cost[at] = part.at(*_channels(part.layer, units))
        self.terms.append(knapsack.Term(tuple(self.number[g] for g in involved), cost))

    def _sum(self, part: Part, ins: Sequence[str], outs: Sequence[str]) -> None:
        """Many groups meet in a concat: linear in their sum, for each choice of the output."""
        layer = part.layer
        if follows_input(layer):
            outs = ()
        if len(outs) > 1:
            self._plane(part, ins, outs)
            return
        fixed = {g: w[-1] for g, w in self.candidates.items()}
        out = outs[0] if outs else None
        choices = self.candidates[out] if out else (0,)
        widths = [size(layer.out_width, {**fixed, **({out: c} if out else {})}) for c in choices]
        lines = [_line(part, width, self.side) for width in widths]
        sizes, rest = self._sizes(layer.in_width.terms, ins, layer.in_width.fixed)
        base, slope = np.array(lines).T
        self.sums.append(knapsack.Sum(sizes, rest, self.number[out] if out else -1, base, slope))

    def _sizes(
        self, terms: Sequence[tuple[str, int]], free: Sequence[str], fixed: int
    ) -> tuple[tuple[tuple[int, Floats], ...], float]:
        sizes = tuple((self.number[g], per * np.array(self.candidates[g], float)) for g, per in terms if g in free)
        rest = fixed + sum(per * self.candidates[g][-1] for g, per in terms if g not in free)
        return sizes, float(rest)

    def _plane(self, part: Part, ins: Sequence[str], outs: Sequence[str]) -> None:
        """Several groups on both sides: a + b in + c out + d in out, fitted to the layer, and moved aside."""
        layer = part.layer
        points = [(i, o) for i in part.ins for o in part.outs]
        rows = np.array([[1.0, i, o, i * o] for i, o in points])
        y = np.array([part.at(i, o) for i, o in points])
        fitted = np.linalg.lstsq(rows, y, rcond=None)[0]
        a, b, c, d = fitted + [self.side(y - rows @ fitted), 0.0, 0.0, 0.0]
        in_sizes, in_rest = self._sizes(layer.in_width.terms, ins, layer.in_width.fixed)
        out_sizes, out_rest = self._sizes(layer.out_width.terms, outs, layer.out_width.fixed)
        self.sums.append(knapsack.Sum(out_sizes, out_rest, -1, np.array([a]), np.array([c])))
        self.sums.append(knapsack.Sum(in_sizes, in_rest, -1, np.array([0.0]), np.array([b + d * out_rest])))
        for number, size_of in out_sizes:
            self.sums.append(knapsack.Sum(in_sizes, in_rest, number, np.zeros(len(size_of)), d * size_of))


def _channels(layer: Layer, units: Mapping[str, int]) -> tuple[int, int]:
    return size(layer.in_width, units), size(layer.out_width, units)


def _line(part: Part, out_ch: int, side: Callable[[Floats], float]) -> tuple[float, float]:
    """(base, slope) of a line over the input channels, by the layer's cost; 0 for a layer that is gone."""
    if not out_ch:
        return 0.0, 0.0
    shape, follows = part.layer.shape, follows_input(part.layer)
    ins = np.array(part.ins, dtype=float)
    costs = np.array([part.at(i, i * shape.out_ch // shape.in_ch if follows else out_ch) for i in part.ins])
    slope, base = np.polyfit(ins, costs, 1) if len(ins) > 1 else (0.0, costs[0])
    return base + side(costs - slope * ins - base), slope
