"""Choose one width for each group: the most value within a latency budget, exactly, with a certificate.

    max sum_g value[g][c_g]   subject to   sum over terms of cost(c_a, c_b)  <=  budget

A term is a layer's latency. It depends on the choice of the group that feeds it and of the group it makes, jointly
(`Pair`); on a sum of many groups that feed it through a concat (`Sum`: linear in that sum, for each output choice); or
on nothing (a constant). Arrays in, arrays out: no network, no device.

Source: multiple-choice knapsack with bilinear costs as a mixed-integer program (HiGHS). The products of two one-hot
choices are continuous variables with marginal rows (sum_b z_ab = y_a, sum_a z_ab = y_b), which is tighter than
McCormick's bounds; a sum is split into one continuous variable for each output choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from .errors import BudgetError, UnreachableBudget

Floats = NDArray[np.float64]
SLACK = 1e-9  # relative: what floating point may add to a sum of costs


@dataclass(frozen=True, eq=False)
class Pair:
    """cost[i, j] when group `a` takes choice i and group `b` choice j; b = -1 and one column: `a` alone."""

    a: int
    b: int
    cost: Floats  # (choices of a, choices of b)


@dataclass(frozen=True, eq=False)
class Sum:
    """base[j] + slope[j] * sum of size[g][c_g] over the groups in `sizes`, when group `b` takes choice j.

    b = -1: nothing follows the output; base and slope have one element.
    """

    sizes: tuple[tuple[int, Floats], ...]  # (group, (choices,))
    fixed: float  # part of the sum that no group decides
    b: int
    base: Floats  # (choices of b,)
    slope: Floats  # (choices of b,)


@dataclass(frozen=True, eq=False)
class Problem:
    """One value per group and choice; costs; and choices that are taken together or not at all (blocks)."""

    values: tuple[Floats, ...]  # (choices,) each
    pairs: tuple[Pair, ...]
    sums: tuple[Sum, ...]
    constant: float
    together: tuple[tuple[tuple[int, int], tuple[int, int]], ...]  # ((group, choice), (group, choice))


@dataclass(frozen=True, eq=False)
class Solution:
    choice: tuple[int, ...]
    value: float
    cost: float  # recomputed from the terms, not taken from the solver
    bound: float  # no choice within the budget is worth more
    gap: float  # (bound - value) / |bound|


def solve(problem: Problem, budget: float, gap: float = 1e-4, time_limit_s: float = 60.0) -> Solution:
    """The best choice within the budget.

    Args:
        problem: values and costs, any numbers: zero, negative and non-monotone costs are fine.
        budget: of the summed cost, the constant included.
        gap: stop when the value is certified within this of the optimum, relative.
        time_limit_s: for the solver.
    Raises:
        UnreachableBudget: even the cheapest choice costs more; the message says how much.
        BudgetError: the solver found nothing in the time it had.
    """
    model = _Model(problem)
    allowed = budget - problem.constant
    scale = max(abs(allowed), 1e-12)
    for tightened in (0.0, 1e-6, 1e-5, 1e-4):  # the solver may overstep by its own tolerance: then ask for less
        result = model.run(model.value, model.cost, allowed - tightened * scale, gap, time_limit_s)
        if result.status == 2 or (result.x is None and result.status != 1):
            floor = cheapest(problem)
            if floor.cost <= budget:
                continue
            raise UnreachableBudget(f"the cheapest choice of widths costs {floor.cost:.6g}, the budget is {budget:.6g}")
        if result.x is None:
            raise BudgetError(
                f"no plan was found within {time_limit_s:.0f} s; give the solver more time or fewer widths"
            )
        choice = model.choice(result.x)
        cost = cost_of(problem, choice)
        if cost <= budget + SLACK * max(abs(budget), 1e-12):
            value = value_of(problem, choice)
            bound = max(-float(result.mip_dual_bound), value)
            return Solution(choice, value, cost, bound, (bound - value) / max(abs(bound), 1e-12))
    floor = cheapest(problem)
    return Solution(floor.choice, floor.value, floor.cost, float("inf"), float("inf"))


def cheapest(problem: Problem, time_limit_s: float = 60.0) -> Solution:
    """The choice with the least cost: the floor of every budget."""
    model = _Model(problem)
    result = model.run(-model.cost, model.cost, np.inf, 1e-6, time_limit_s)
    if result.x is None:
        raise BudgetError(f"the cheapest plan was not found within {time_limit_s:.0f} s")
    choice = model.choice(result.x)
    return Solution(choice, value_of(problem, choice), cost_of(problem, choice), float("inf"), float("inf"))


def value_of(problem: Problem, choice: Sequence[int]) -> float:
    return float(sum(values[c] for values, c in zip(problem.values, choice, strict=True)))


def cost_of(problem: Problem, choice: Sequence[int]) -> float:
    """The summed cost of a choice, term by term."""
    total = problem.constant
    for pair in problem.pairs:
        total += pair.cost[choice[pair.a], choice[pair.b] if pair.b >= 0 else 0]
    for term in problem.sums:
        size = term.fixed + sum(sizes[choice[g]] for g, sizes in term.sizes)
        at = choice[term.b] if term.b >= 0 else 0
        total += term.base[at] + term.slope[at] * size
    return float(total)


class _Model:
    """Variables: one-hot y for every group; z for every coupled pair; v for every sum with an output group."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        sizes = [len(v) for v in problem.values]
        self.start = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self.binary = int(self.start[-1])
        self.value = np.concatenate([*problem.values, np.zeros(0)])
        self.cost = np.zeros(self.binary)
        self.lower: list[float] = [0.0] * self.binary
        self.upper: list[float] = [1.0] * self.binary
        self._rows: list[tuple[list[int], list[float], float, float]] = []
        for g, size in enumerate(sizes):
            self._row(self._y(g), [1.0] * size, 1.0, 1.0)
        for (g, c), (h, d) in problem.together:
            self._row([self.start[g] + c, self.start[h] + d], [1.0, -1.0], 0.0, 0.0)
        for (a, b), cost in _merged(problem.pairs).items():
            self._pair(a, b, cost)
        for term in problem.sums:
            self._sum(term)

    def _y(self, group: int) -> list[int]:
        return list(range(self.start[group], self.start[group + 1]))

    def _row(self, columns: list[int], numbers: list[float], low: float, high: float) -> None:
        self._rows.append((columns, numbers, low, high))

    def _new(self, costs: Floats, lower: float, upper: float) -> list[int]:
        first = len(self.cost)
        self.cost = np.concatenate([self.cost, costs])
        self.value = np.concatenate([self.value, np.zeros(len(costs))])
        self.lower += [lower] * len(costs)
        self.upper += [upper] * len(costs)
        return list(range(first, first + len(costs)))

    def _pair(self, a: int, b: int, cost: Floats) -> None:
        if b < 0:
            self.cost[self._y(a)] += cost[:, 0]
            return
        if a == b:
            self.cost[self._y(a)] += np.diag(cost)
            return
        rows, columns = cost.shape
        z = np.array(self._new(cost.ravel(), 0.0, 1.0)).reshape(rows, columns)
        for i, y in enumerate(self._y(a)):
            self._row([*z[i].tolist(), y], [1.0] * columns + [-1.0], 0.0, 0.0)
        for j, y in enumerate(self._y(b)):
            self._row([*z[:, j].tolist(), y], [1.0] * rows + [-1.0], 0.0, 0.0)

    def _sum(self, term: Sum) -> None:
        """The sum is spread over one variable for each output choice, of which only the chosen one is not zero."""
        columns = [y for g, _ in term.sizes for y in self._y(g)]
        numbers = [float(s) for _, sizes in term.sizes for s in sizes]
        if term.b < 0:
            for column, number in zip(columns, numbers, strict=True):
                self.cost[column] += term.slope[0] * number
            return
        least = term.fixed + sum(float(s.min()) for _, s in term.sizes)
        most = term.fixed + sum(float(s.max()) for _, s in term.sizes)
        self.cost[self._y(term.b)] += term.base
        v = self._new(term.slope.astype(np.float64), 0.0, most)
        for column, y in zip(v, self._y(term.b), strict=True):
            self._row([column, y], [1.0, -most], -np.inf, 0.0)
            self._row([column, y], [1.0, -least], 0.0, np.inf)
        self._row([*v, *columns], [1.0] * len(v) + [-n for n in numbers], term.fixed, term.fixed)

    def run(self, value: Floats, cost: Floats, budget: float, gap: float, time_limit_s: float) -> Any:
        fixed = sum(float(t.base[0] + t.slope[0] * t.fixed) for t in self.problem.sums if t.b < 0)
        rows = list(self._rows)
        if np.isfinite(budget):
            used = np.flatnonzero(cost)
            scale = max(float(np.abs(cost).max(initial=0.0)), 1e-12)
            rows.append((used.tolist(), (cost[used] / scale).tolist(), -np.inf, (budget - fixed) / scale))
        counts = [len(columns) for columns, _, _, _ in rows]
        matrix = csr_matrix(
            (
                np.concatenate([np.asarray(n, dtype=float) for _, n, _, _ in rows]),
                np.concatenate([np.asarray(c, dtype=int) for c, _, _, _ in rows]),
                np.concatenate([[0], np.cumsum(counts)]),
            ),
            shape=(len(rows), len(cost)),
        )
        integrality = np.zeros(len(cost))
        integrality[: self.binary] = 1
        worth = max(float(np.abs(value).max(initial=0.0)), 1e-12)
        result = milp(
            -value / worth,
            constraints=LinearConstraint(matrix, [r[2] for r in rows], [r[3] for r in rows]),
            bounds=Bounds(np.array(self.lower), np.array(self.upper)),
            integrality=integrality,
            options={"mip_rel_gap": gap, "time_limit": time_limit_s},
        )
        if result.mip_dual_bound is not None:
            result.mip_dual_bound *= worth
        return result

    def choice(self, x: Floats) -> tuple[int, ...]:
        return tuple(int(np.argmax(x[self._y(g)])) for g in range(len(self.problem.values)))


def _merged(pairs: Sequence[Pair]) -> dict[tuple[int, int], Floats]:
    """Pairs over the same two groups, summed, so that each product variable exists once."""
    merged: dict[tuple[int, int], Floats] = {}
    for pair in pairs:
        key, cost = (pair.a, pair.b), pair.cost
        if pair.b >= 0 and pair.b < pair.a:
            key, cost = (pair.b, pair.a), pair.cost.T
        merged[key] = merged[key] + cost if key in merged else cost
    return merged
