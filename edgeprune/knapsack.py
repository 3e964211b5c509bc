"""Choose one option for each group: the most value within one budget or several, exactly, with a certificate.

    max sum_g values[g][c_g]   subject to   cost_k(c) <= budget_k   for every cost k

A group is anything that takes one of several choices: the width of a channel group, the precision of a layer. A cost
is what one budget limits (milliseconds on a device, bytes) and is a sum of layers. What a layer costs depends on its
groups jointly (`Term`: input width, output width, precision, ...), or on the sum of many groups that feed it through a
concat (`Sum`: linear in that sum, for each choice of the output). Arrays in, arrays out: no network, no device.

Source: multiple-choice knapsack with products of choices, as a mixed-integer program (see `program`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UnreachableBudget
from .program import Cost, Floats, Problem, Program, Sum, Term, costs_of, fits

__all__ = [
    "Cost",
    "Floats",
    "Problem",
    "Solution",
    "Sum",
    "Term",
    "cheapest",
    "costs_of",
    "fits",
    "solve",
    "upper_bound",
    "value_of",
]

GAP = 1e-3  # relative: what a choice may be worth less than the best there is
TIME_LIMIT_S = 60.0
SHARPER = 0.1  # of the gap: where few choices are left


@dataclass(frozen=True, eq=False)
class Solution:
    choice: tuple[int, ...]
    value: float
    costs: tuple[float, ...]  # added up again from the terms, not taken from the solver
    bound: float  # no choice within the budgets is worth more
    gap: float  # (bound - value) / |bound|


def solve(problem: Problem, budgets: Sequence[float], gap: float = GAP, time_limit_s: float = TIME_LIMIT_S) -> Solution:
    """The most valuable choice within the budgets.

    The relaxation, whose optimum is a bound and nearly integral, comes first; then the choices near it, exactly. Where
    that does not close the gap, all choices are searched for something better.

    Args:
        problem: values and costs, any numbers: zero, negative and non-monotone costs are fine.
        budgets: one for each cost, its constant included; infinite where there is none.
        gap: stop when the value is certified within this of the optimum, relative.
        time_limit_s: for each search; what was found by then is returned, with the gap that was reached.
    Raises:
        UnreachableBudget: even the cheapest choice costs more; the message says how much.
        BudgetError: the solver found nothing in the time it had.
    """
    program = Program(problem)
    bound, relaxed = program.relaxation(budgets, time_limit_s)
    near = program.near(relaxed) if relaxed is not None else program.all
    choice = None
    if not near.all():
        choice, _ = program.best(budgets, near, SHARPER * gap, time_limit_s)
    if choice is None:
        choice, found = program.best(budgets, program.all, gap, time_limit_s)
        bound = min(bound, found)
    elif bound - value_of(problem, choice) > gap * abs(bound):
        more = value_of(problem, choice) + gap * min(abs(bound), abs(value_of(problem, choice)))
        better, found = program.best(budgets, program.all, gap, time_limit_s, more)
        choice, bound = better or choice, min(bound, max(found, more))
    if choice is None:
        return _cheapest_within(problem, budgets, bound, time_limit_s)
    return _solution(problem, choice, bound)


def upper_bound(problem: Problem, budgets: Sequence[float], time_limit_s: float = TIME_LIMIT_S) -> float:
    """No choice within the budgets is worth more: the optimum of the relaxation."""
    return Program(problem).relaxation(budgets, time_limit_s)[0]


def cheapest(problem: Problem, cost: int = 0, time_limit_s: float = TIME_LIMIT_S) -> Solution:
    """The choice with the least of one cost, whatever the others: the floor of its budget."""
    program = Program(problem)
    return _solution(problem, program.cheapest(cost, time_limit_s), math.inf)


def _cheapest_within(problem: Problem, budgets: Sequence[float], bound: float, time_limit_s: float) -> Solution:
    """A floor that meets every budget, or the reason why there is none."""
    floors = [cheapest(problem, k, time_limit_s) for k in range(len(budgets))]
    for k, floor in enumerate(floors):
        if fits(floor.costs, budgets):
            return _solution(problem, floor.choice, bound)
        if floor.costs[k] > budgets[k]:
            raise UnreachableBudget(
                f"{problem.costs[k].name}: the cheapest choice of widths costs {floor.costs[k]:.6g}, the budget is "
                f"{budgets[k]:.6g}"
            )
    each = ", ".join(
        f"{cost.name} {budget:.6g} (alone {floor.costs[k]:.6g} can be reached)"
        for k, (cost, budget, floor) in enumerate(zip(problem.costs, budgets, floors, strict=True))
    )
    raise UnreachableBudget(f"no choice of widths meets all budgets at once: {each}")


def value_of(problem: Problem, choice: Sequence[int]) -> float:
    return math.fsum(values[c] for values, c in zip(problem.values, choice, strict=True))


def _solution(problem: Problem, choice: tuple[int, ...], bound: float) -> Solution:
    value = value_of(problem, choice)
    bound = max(bound, value)
    gap = (bound - value) / max(abs(bound), 1e-12) if math.isfinite(bound) else math.inf
    return Solution(choice, value, costs_of(problem, choice), bound, gap)
