"""A choice problem, and the mixed-integer program that it becomes.

The product of one-hot choices is a block of continuous variables with marginal rows (for two: sum_b z_ab = y_a, sum_a
z_ab = y_b), which is exact where y is integral and tighter than McCormick's bounds where it is not. Each group of a sum
is split into one variable for each choice of the output. Solved with HiGHS.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from .errors import BudgetError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]
TIGHTENED = (0.0, 1e-6, 1e-5, 1e-4)  # relative: asked of the solver when it oversteps by its own tolerance
NEAR = 1  # choices on either side of the relaxation's that count as near it
PART = 1e-6  # of a choice: less is none


@dataclass(frozen=True, eq=False)
class Term:
    """cost[i, j, ...] when groups[0] takes choice i, groups[1] choice j, ..."""

    groups: tuple[int, ...]
    cost: Floats  # (choices of groups[0], choices of groups[1], ...)


@dataclass(frozen=True, eq=False)
class Sum:
    """base[j] + slope[j] * (fixed + sum of size[c_g] over the groups in `sizes`) when group `b` takes choice j.

    b = -1: nothing follows the output; base and slope have one element.
    """

    sizes: tuple[tuple[int, Floats], ...]  # (group, (choices,))
    fixed: float  # part of the sum that no group decides
    b: int
    base: Floats  # (choices of b,)
    slope: Floats  # (choices of b,)


@dataclass(frozen=True, eq=False)
class Cost:
    """What one budget limits."""

    name: str  # with its unit, for messages
    terms: tuple[Term, ...]
    sums: tuple[Sum, ...]
    constant: float


@dataclass(frozen=True, eq=False)
class Problem:
    """One value per group and choice; costs; and choices that are taken together or not at all (blocks)."""

    values: tuple[Floats, ...]  # (choices,) each
    costs: tuple[Cost, ...]
    together: tuple[tuple[tuple[int, int], tuple[int, int]], ...]  # ((group, choice), (group, choice))


def fits(costs: Sequence[float], budgets: Sequence[float]) -> bool:
    return all(cost <= budget for cost, budget in zip(costs, budgets, strict=True))


def costs_of(problem: Problem, choice: Sequence[int]) -> tuple[float, ...]:
    """Every cost of a choice, added up term by term and rounded once."""
    return tuple(_cost_of(cost, choice) for cost in problem.costs)


def _cost_of(cost: Cost, choice: Sequence[int]) -> float:
    parts = [cost.constant]
    parts += [float(term.cost[tuple(choice[g] for g in term.groups)]) for term in cost.terms]
    for term in cost.sums:
        size = term.fixed + sum(float(sizes[choice[g]]) for g, sizes in term.sizes)
        at = choice[term.b] if term.b >= 0 else 0
        parts.append(float(term.base[at] + term.slope[at] * size))
    return math.fsum(parts)


class Program:
    """Variables: one-hot y for every group; z for every product of groups; v for every sum and output choice."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.start = np.concatenate([[0], np.cumsum([len(v) for v in problem.values])]).astype(int)
        self.binary = self.columns = int(self.start[-1])
        self._lower = [np.zeros(self.binary)]
        self._costs: list[tuple[Integers, Floats]] = []  # (columns,), (costs, columns)
        self._rows = _Rows()
        for g in range(len(problem.values)):
            self._rows.add(self._y(g)[None, :], 1.0, 1.0, 1.0)
        for (g, c), (h, d) in problem.together:
            self._rows.add(np.array([[self.start[g] + c, self.start[h] + d]]), np.array([[1.0, -1.0]]), 0.0, 0.0)
        self.constant = np.array([cost.constant for cost in problem.costs])
        for groups, cost in _merged_terms(problem.costs).items():
            self._term(groups, cost)
        for (g, b, _), (sizes, slope) in _merged_sums(problem.costs).items():
            self._sum(g, sizes, b, slope)
        self.cost = np.zeros((len(problem.costs), self.columns))
        for columns, numbers in self._costs:
            self.cost[:, columns] += numbers

    def _y(self, group: int) -> Integers:
        return np.arange(self.start[group], self.start[group + 1])

    def _new(self, *shape: int, lower: float = 0.0) -> Integers:
        first = self.columns
        self.columns += math.prod(shape)
        self._lower.append(np.full(self.columns - first, lower))
        return np.arange(first, self.columns).reshape(shape)

    def _term(self, groups: tuple[int, ...], cost: Floats) -> None:
        if not groups:
            self.constant = self.constant + cost
        elif len(groups) == 1:
            self._costs.append((self._y(groups[0]), cost))
        else:
            z = self._new(*cost.shape[1:])
            self._costs.append((z.ravel(), cost.reshape(len(cost), -1)))
            for axis, group in enumerate(groups):
                flat = np.moveaxis(z, axis, 0).reshape(z.shape[axis], -1)
                signs = np.concatenate([np.ones(flat.shape[1]), [-1.0]])
                self._rows.add(np.column_stack([flat, self._y(group)]), signs, 0.0, 0.0)

    def _sum(self, g: int, sizes: Floats, b: int, slope: Floats) -> None:
        """v[j] is the size of group g where group b takes choice j, else 0, in units of its largest size.

        Args:
            g, sizes: a group of the sum, (choices of g,).
            b, slope: the group that decides the slope, (costs, choices of b).
        """
        unit = max(float(np.abs(sizes).max(initial=0.0)), 1e-12)
        least, most = float(sizes.min()) / unit, float(sizes.max()) / unit
        v, y = self._new(slope.shape[1], lower=min(0.0, least)), self._y(b)
        self._costs.append((v, slope * unit))
        self._rows.add(np.column_stack([v, y]), np.array([1.0, -most]), -np.inf, 0.0)
        self._rows.add(np.column_stack([v, y]), np.array([1.0, -least]), 0.0, np.inf)
        columns = np.concatenate([v, self._y(g)])
        self._rows.add(columns[None, :], np.concatenate([np.ones(len(v)), -sizes / unit]), 0.0, 0.0)

    @property
    def all(self) -> Booleans:
        """Every choice may be taken, (choices of all groups,)."""
        return np.ones(self.binary, dtype=bool)

    def relaxation(self, budgets: Sequence[float], time_limit_s: float) -> tuple[float, Floats | None]:
        """A bound on the value, and the fractional choice that reaches it; None when there is none."""
        result = self._run(-self._value, self._within(budgets), self.all, False, 0.0, time_limit_s)
        return (math.inf, None) if result.x is None else (-float(result.fun), result.x[: self.binary])

    def near(self, relaxed: Floats) -> Booleans:
        """The choices within NEAR of those that the relaxation takes a part of."""
        allowed = np.zeros(self.binary, dtype=bool)
        for g in range(len(self.problem.values)):
            taken = np.flatnonzero(relaxed[self._y(g)] > PART)
            low, high = max(taken[0] - NEAR, 0), taken[-1] + NEAR + 1
            allowed[self._y(g)[low:high]] = True
        for (g, c), (h, d) in self.problem.together:
            allowed[[self.start[g] + c, self.start[h] + d]] = allowed[[self.start[g] + c, self.start[h] + d]].any()
        return allowed

    def best(
        self,
        budgets: Sequence[float],
        allowed: Booleans,
        gap: float,
        time_limit_s: float,
        least: float = -math.inf,
    ) -> tuple[tuple[int, ...] | None, float]:
        """The most valuable of the allowed choices, and a bound on their value; None when none meets the budgets.

        Args:
            least: what it must be worth.
        """
        bound = -math.inf
        for tightened in TIGHTENED:
            result = self._run(-self._value, self._within(budgets, tightened, least), allowed, True, gap, time_limit_s)
            if result.status == 1 and not tightened:
                bound = math.inf
            if not tightened and result.mip_dual_bound is not None and math.isfinite(result.mip_dual_bound):
                bound = -float(result.mip_dual_bound)
            if result.status == 1 and result.x is None and math.isinf(least):
                raise BudgetError(
                    f"no plan was found within {time_limit_s:.0f} s; give the solver more time or fewer widths"
                )
            if result.x is None:
                return None, bound
            choice = self._choice(result.x)
            if fits(costs_of(self.problem, choice), budgets):
                return choice, bound
        return None, bound

    def cheapest(self, cost: int, time_limit_s: float) -> tuple[int, ...]:
        result = self._run(self.cost[cost], self._rows, self.all, True, 1e-6, time_limit_s)
        if result.x is None:
            raise BudgetError(f"the cheapest plan was not found within {time_limit_s:.0f} s")
        return self._choice(result.x)

    @property
    def _value(self) -> Floats:
        return np.concatenate([*self.problem.values, np.zeros(self.columns - self.binary)])

    def _within(self, budgets: Sequence[float], tightened: float = 0.0, least: float = -math.inf) -> _Rows:
        rows = self._rows.copy()
        for cost, budget, constant in zip(self.cost, budgets, self.constant, strict=True):
            if math.isfinite(budget):
                allowed = budget - constant - tightened * max(abs(budget - constant), 1e-12)
                rows.scaled(cost, -math.inf, allowed)
        if math.isfinite(least):
            rows.scaled(self._value, least, math.inf)
        return rows

    def _run(
        self,
        objective: Floats,
        rows: _Rows,
        allowed: Booleans,
        integral: bool,
        gap: float,
        time_limit_s: float,
    ) -> Any:
        scale = max(float(np.abs(objective).max(initial=0.0)), 1e-12)
        upper = np.ones(self.columns)
        upper[: self.binary] = allowed
        with _stdout_kept_clean():
            result = milp(
                objective / scale,
                constraints=rows.constraint(self.columns),
                bounds=Bounds(np.concatenate(self._lower), upper),
                integrality=integral * (np.arange(self.columns) < self.binary),
                options={"mip_rel_gap": gap, "time_limit": time_limit_s},
            )
        if result.fun is not None:
            result.fun *= scale
        if result.mip_dual_bound is not None:
            result.mip_dual_bound *= scale
        return result

    def _choice(self, x: Floats) -> tuple[int, ...]:
        return tuple(int(np.argmax(x[self._y(g)])) for g in range(len(self.problem.values)))


class _Rows:
    """Rows of the constraint matrix, several of one form at a time."""

    def __init__(self) -> None:
        self._columns: list[Integers] = []  # (rows, entries) each
        self._numbers: list[Floats] = []
        self._low: list[Floats] = []
        self._high: list[Floats] = []

    def add(self, columns: Integers, numbers: Floats | float, low: float, high: float) -> None:
        self._columns.append(columns)
        self._numbers.append(np.broadcast_to(numbers, columns.shape))
        self._low.append(np.full(len(columns), low))
        self._high.append(np.full(len(columns), high))

    def scaled(self, numbers: Floats, low: float, high: float) -> None:
        """low <= numbers @ x <= high, with 1 as the largest number."""
        used, scale = np.flatnonzero(numbers), max(float(np.abs(numbers).max(initial=0.0)), 1e-12)
        self.add(used[None, :], numbers[used] / scale, low / scale, high / scale)

    def copy(self) -> _Rows:
        twin = _Rows()
        twin._columns, twin._numbers = list(self._columns), list(self._numbers)
        twin._low, twin._high = list(self._low), list(self._high)
        return twin

    def constraint(self, columns: int) -> LinearConstraint:
        entries = np.concatenate([np.full(len(c), c.shape[1]) for c in self._columns])
        places = (
            np.concatenate([n.ravel() for n in self._numbers]),
            np.concatenate([c.ravel() for c in self._columns]),
            np.concatenate([[0], np.cumsum(entries)]),
        )
        matrix = csr_matrix(places, shape=(len(entries), columns))
        return LinearConstraint(matrix, np.concatenate(self._low), np.concatenate(self._high))


@contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """HiGHS prints a line now and then whatever it is told: send it to standard error, for results go to the other."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what the C library holds back is written before the way back is opened
        os.dup2(kept, 1)
        os.close(kept)


def _merged_terms(costs: Sequence[Cost]) -> dict[tuple[int, ...], Floats]:
    """Groups in ascending order -> (costs, choices, ...): terms over the same groups share their variables."""
    merged: dict[tuple[int, ...], Floats] = {}
    for k, cost in enumerate(costs):
        for term in (*cost.terms, *(plain for sum_ in cost.sums for plain in _plain_terms(sum_))):
            groups = tuple(sorted(set(term.groups)))
            letters = dict(zip(groups, ascii_lowercase, strict=False))
            axes = "".join(letters[g] for g in term.groups)
            numbers = np.einsum(f"{axes}->{''.join(letters.values())}", term.cost)  # a repeated group: the diagonal
            if groups not in merged:
                merged[groups] = np.zeros((len(costs), *numbers.shape))
            merged[groups][k] += numbers
    return merged


def _plain_terms(sum_: Sum) -> Iterator[Term]:
    """What a sum costs without products: all of it where no group follows."""
    if sum_.b >= 0:
        yield Term((sum_.b,), sum_.base + sum_.slope * sum_.fixed)
        yield from (Term((g,), sum_.slope * sizes) for g, sizes in sum_.sizes if g == sum_.b)
        return
    yield Term((), np.array(sum_.base[0] + sum_.slope[0] * sum_.fixed))
    yield from (Term((g,), sum_.slope[0] * sizes) for g, sizes in sum_.sizes)


def _merged_sums(costs: Sequence[Cost]) -> dict[tuple[int, int, bytes], tuple[Floats, Floats]]:
    """(group, following group, sizes) -> sizes and slopes (costs, choices): the same products share variables."""
    merged: dict[tuple[int, int, bytes], tuple[Floats, Floats]] = {}
    for k, cost in enumerate(costs):
        for sum_ in cost.sums:
            for g, sizes in sum_.sizes:
                if sum_.b in (-1, g):
                    continue
                slopes = merged.setdefault(
                    (g, sum_.b, sizes.tobytes()), (sizes, np.zeros((len(costs), len(sum_.slope))))
                )
                slopes[1][k] += sum_.slope
    return merged
