"""From a network's layers, a latency table and channel scores to a plan: how many units each group keeps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from . import knapsack
from .errors import UnreachableBudget, UsageError
from .importance import Importance, kept_value
from .records import Block, Plan
from .table import IDENTITY, Correction, Surface, follows_input, predict_ms, weights_mib
from .widths import shape_at, size

Floats = NDArray[np.float64]
Candidates = Mapping[str, tuple[int, ...]]
SETTLE = 40  # halvings of a share until a budget is met


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
        gone = {name for b in self.blocks if all(units[g] == 0 for g in b.groups) for name in b.layers}
        return [s for s in self.surfaces if s.layer.name not in gone]


def allocate(strategy: str, costs: Costs, importance: Importance, budget_ms: float, seed: int = 0) -> Plan:
    """Choose widths.

    Args:
        strategy: "knapsack" (exact), "uniform" (the same share of every group), "random" (shares drawn at random).
        costs: of the network on its device.
        importance: group -> (width,) scores.
        budget_ms: of the predicted latency.
        seed: for "random".
    Raises:
        UnreachableBudget: not even the smallest network meets it.
    """
    if strategy == "knapsack":
        return solve(costs, importance, budget_ms)
    if strategy == "uniform":
        return _to_budget(costs, importance, budget_ms, dict.fromkeys(costs.candidates, 1.0))
    if strategy == "random":
        draw = np.random.Generator(np.random.PCG64(seed)).random
        return _to_budget(costs, importance, budget_ms, {g: 0.2 + 0.8 * draw() for g in costs.candidates})
    raise UsageError(f"strategy {strategy!r} does not exist; choose knapsack, uniform or random")


def solve(costs: Costs, importance: Importance, budget_ms: float, gap: float = knapsack.GAP) -> Plan:
    """The plan with the highest summed score within the budget."""
    groups = list(costs.candidates)
    problem = problem_of(costs, importance)
    solution = knapsack.solve(problem, [budget_ms], gap)
    widths = {g: costs.candidates[g][c] for g, c in zip(groups, solution.choice, strict=True)}
    return Plan(widths, costs.predict_ms(widths), costs.predict_ms(costs.dense), solution.value, solution.gap)


def floor(costs: Costs) -> Plan:
    """The fastest plan."""
    groups = list(costs.candidates)
    solution = knapsack.cheapest(problem_of(costs, {g: np.ones(w[-1]) for g, w in costs.candidates.items()}))
    widths = {g: costs.candidates[g][c] for g, c in zip(groups, solution.choice, strict=True)}
    return Plan(widths, costs.predict_ms(widths), costs.predict_ms(costs.dense), 0.0, 0.0)


def _to_budget(costs: Costs, importance: Importance, budget_ms: float, shape: Mapping[str, float]) -> Plan:
    """Scale shares of widths, all together, to the largest that meet the budget."""

    def at(share: float) -> dict[str, int]:
        wanted = {g: min(1.0, share * shape[g] / max(shape.values())) * w[-1] for g, w in costs.candidates.items()}
        return {
            g: max((w for w in costs.candidates[g] if 0 < w <= wanted[g]), default=_least(costs.candidates[g]))
            for g in costs.candidates
        }

    low, high = 0.0, 1.0 / min(v / max(shape.values()) for v in shape.values())
    if costs.predict_ms(at(low)) > budget_ms:
        raise UnreachableBudget(
            f"the smallest network is predicted at {costs.predict_ms(at(low)):.4g} ms, the budget is {budget_ms:.4g} ms"
        )
    for _ in range(SETTLE):
        middle = (low + high) / 2
        low, high = (middle, high) if costs.predict_ms(at(middle)) <= budget_ms else (low, middle)
    widths = at(low)
    value = sum(float(kept_value(importance[g], [w])[0]) for g, w in widths.items())
    return Plan(widths, costs.predict_ms(widths), costs.predict_ms(costs.dense), value, float("nan"))


def _least(widths: Sequence[int]) -> int:
    return next(w for w in widths if w)


# ---- the problem as arrays -----------------------------------------------------------------------------------


def problem_of(costs: Costs, importance: Importance) -> knapsack.Problem:
    """Values and costs of every choice, for `knapsack.solve`."""
    groups = list(costs.candidates)
    number = {g: i for i, g in enumerate(groups)}
    values = tuple(kept_value(importance[g], costs.candidates[g]) for g in groups)
    builder = _Terms(costs, number)
    for one in costs.surfaces:
        builder.add(one)
    together = []
    for block in costs.blocks:
        inside = [g for g in block.groups if 0 in costs.candidates[g]]
        together += [((number[a], 0), (number[b], 0)) for a, b in itertools.pairwise(inside)]
    constant = builder.constant + costs.correction.overhead_ms
    cost = knapsack.Cost(tuple(builder.terms), tuple(builder.sums), constant)
    return knapsack.Problem(values, (cost,), tuple(together))


class _Terms:
    """Collects the cost terms of layers."""

    def __init__(self, costs: Costs, number: Mapping[str, int]) -> None:
        self.candidates, self.number = costs.candidates, number
        self.terms: list[knapsack.Term] = []
        self.sums: list[knapsack.Sum] = []
        self.constant = 0.0
        self.gate = {name: b.groups[0] for b in costs.blocks for name in b.layers if 0 in costs.candidates[b.groups[0]]}

    def add(self, surface: Surface) -> None:
        layer = surface.layer
        ins = [g for g, _ in layer.in_width.terms if len(self.candidates[g]) > 1]
        outs = [g for g, _ in layer.out_width.terms if len(self.candidates[g]) > 1]
        involved = list(dict.fromkeys(ins + outs))
        gate = self.gate.get(layer.name)
        if gate is not None and gate not in involved:
            involved.append(gate)
        if len(involved) <= 2:
            self._pair(surface, involved, gate)
        else:
            self._sum(surface, ins, outs)

    def _pair(self, surface: Surface, involved: Sequence[str], gate: str | None) -> None:
        fixed = {g: w[-1] for g, w in self.candidates.items()}

        def cost(units: Mapping[str, int]) -> float:
            if gate is not None and units[gate] == 0:
                return 0.0
            return _corrected(surface, units)

        if not involved:
            self.constant += cost(fixed)
            return
        a, b = involved[0], involved[1] if len(involved) > 1 else None
        columns = self.candidates[b] if b is not None else (0,)
        grid = np.array(
            [[cost({**fixed, a: i, **({b: j} if b is not None else {})}) for j in columns] for i in self.candidates[a]]
        )
        self.terms.append(knapsack.Term(tuple(self.number[g] for g in involved), grid if b else grid[:, 0]))

    def _sum(self, surface: Surface, ins: Sequence[str], outs: Sequence[str]) -> None:
        """Many groups meet in a concat: linear in their sum, for each choice of the output."""
        layer = surface.layer
        if follows_input(layer):
            outs = ()
        if len(outs) > 1:
            self._plane(surface, ins, outs)
            return
        fixed = {g: w[-1] for g, w in self.candidates.items()}
        out = outs[0] if outs else None
        widths = [size(layer.out_width, {**fixed, **({out: c} if out else {})}) for c in self._choices(out)]
        low, high = surface.ins[0], surface.ins[-1]
        base, slope = [], []
        for width in widths:
            at_low, at_high = (_corrected_at(surface, i, width) for i in (low, high))
            slope.append((at_high - at_low) / max(high - low, 1))
            base.append(at_low - slope[-1] * low if width else 0.0)
        sizes, rest = self._sizes(layer.in_width.terms, ins, layer.in_width.fixed)
        number = self.number[out] if out else -1
        self.sums.append(knapsack.Sum(sizes, rest, number, np.array(base), np.array(slope)))

    def _choices(self, group: str | None) -> tuple[int, ...]:
        return self.candidates[group] if group else (0,)

    def _sizes(
        self, terms: Sequence[tuple[str, int]], free: Sequence[str], fixed: int
    ) -> tuple[tuple[tuple[int, Floats], ...], float]:
        sizes = tuple((self.number[g], per * np.array(self.candidates[g], float)) for g, per in terms if g in free)
        rest = fixed + sum(per * self.candidates[g][-1] for g, per in terms if g not in free)
        return sizes, float(rest)

    def _plane(self, surface: Surface, ins: Sequence[str], outs: Sequence[str]) -> None:
        """Several groups on both sides: a + b in + c out + d in out, fitted to the surface."""
        layer = surface.layer
        grid = [(i, o) for i in surface.ins for o in surface.outs]
        rows = np.array([[1.0, i, o, i * o] for i, o in grid])
        y = np.array([_corrected_at(surface, i, o) for i, o in grid])
        a, b, c, d = np.linalg.lstsq(rows, y, rcond=None)[0]
        in_sizes, in_rest = self._sizes(layer.in_width.terms, ins, layer.in_width.fixed)
        out_sizes, out_rest = self._sizes(layer.out_width.terms, outs, layer.out_width.fixed)
        self.sums.append(knapsack.Sum(out_sizes, out_rest, -1, np.array([a]), np.array([c])))
        self.sums.append(knapsack.Sum(in_sizes, in_rest, -1, np.array([0.0]), np.array([b + d * out_rest])))
        for number, size_of in out_sizes:
            self.sums.append(knapsack.Sum(in_sizes, in_rest, number, np.zeros(len(size_of)), d * size_of))


def _corrected(surface: Surface, units: Mapping[str, int]) -> float:
    shape = shape_at(surface.layer, units)
    c = surface.table.correction
    return c.scale * surface.at(shape.in_ch, shape.out_ch) + c.per_mib_ms * weights_mib(shape)


def _corrected_at(surface: Surface, in_ch: int, out_ch: int) -> float:
    c = surface.table.correction
    shape = replace(surface.layer.shape, in_ch=in_ch, out_ch=out_ch)
    return c.scale * surface.at(in_ch, out_ch) + c.per_mib_ms * weights_mib(shape)
