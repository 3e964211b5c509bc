"""Ways to choose widths besides the exact one: shares of every group, scaled together until they meet a budget.

Whatever a search finds is carried to a measured budget in the same way as uniform and random widths are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from . import allocate
from .allocate import Allocator, Candidates, Costs
from .errors import UnreachableBudget, UsageError
from .importance import Importance, kept_value
from .limits import Limit
from .records import Plan

SETTLE = 60  # halvings of a share until a budget is met
GOLDEN = 0.6180339887498949  # its multiples are spread evenly, modulo 1


def named(strategy: str, seed: int = 0) -> Allocator:
    """How widths are chosen without looking at a network's answers.

    Args:
        strategy: "knapsack" (exact), "uniform" (the same share of every group), "random" (shares drawn at random).
        seed: for "random".
    """
    if strategy == "knapsack":
        return allocate.solve
    if strategy in ("uniform", "random"):
        return partial(_drawn, 1.0 if strategy == "uniform" else 0.2, seed)
    raise UsageError(f"strategy {strategy!r} does not exist; choose knapsack, uniform or random")


def to_shares(shares: Mapping[str, float]) -> Allocator:
    """Widths in these proportions, as many as a budget allows; what a search has found is carried to a budget so."""
    return partial(scaled, shares)


def scaled(
    shares: Mapping[str, float], costs: Costs, importance: Importance, budget_ms: float, limits: Sequence[Limit] = ()
) -> Plan:
    """Shares of widths, all multiplied by one number: the largest that meets the budgets.

    Args:
        shares: group -> above 0: what it keeps of its units, up to that number.
        costs, importance, budget_ms, limits: see `Allocator`.
    Raises:
        UnreachableBudget: not even the smallest network meets them.
    """
    most = max(shares.values())
    last = most / min(shares.values())

    def path(at: float) -> dict[str, float]:
        return {g: min(1.0, at * last * shares[g] / most) for g in costs.candidates}

    return along(path, costs, importance, budget_ms, limits)


def along(
    path: Callable[[float], Mapping[str, float]],
    costs: Costs,
    importance: Importance,
    budget_ms: float,
    limits: Sequence[Limit] = (),
) -> Plan:
    """The largest network on a way from the smallest to the dense one that meets the budgets.

    Widths are rounded down to those on offer; then the groups that lost most by it are rounded up while the budgets
    last, so that groups of one width need not all step at once.

    Args:
        path: of a number in 0..1, share of its units that each group keeps; all rise with the number.
        costs, importance, budget_ms, limits: see `Allocator`.
    Raises:
        UnreachableBudget: not even the smallest network meets them.
    """
    choices = {g: tuple(w for w in widths if w) or (0,) for g, widths in costs.candidates.items()}

    def wanted(at: float) -> dict[str, float]:
        return {g: share * costs.dense[g] for g, share in path(at).items()}

    def floored(units: Mapping[str, float]) -> dict[str, int]:
        return {g: max((w for w in choices[g] if w <= units[g]), default=choices[g][0]) for g in choices}

    known: dict[tuple[int, ...], bool] = {}  # most halvings round to widths that were priced before

    def fits(units: Mapping[str, int]) -> bool:
        key = tuple(units.values())
        if key not in known:
            known[key] = costs.predict_ms(units) <= budget_ms and all(
                limit.predict(units, costs.blocks) <= limit.budget for limit in limits
            )
        return known[key]

    smallest = {g: widths[0] for g, widths in choices.items()}
    if not fits(smallest):
        raise UnreachableBudget(allocate.too_small(smallest, costs, budget_ms, limits))
    low, high = 0.0, 1.0
    for _ in range(SETTLE):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(floored(wanted(middle))) else (low, middle)
    units = _rounded_up(floored(wanted(low)), wanted(high), choices, fits)
    value = sum(float(kept_value(importance[g], [w])[0]) for g, w in units.items())
    return Plan(units, costs.predict_ms(units), costs.predict_ms(costs.dense), value, float("nan"))


def shares_of(costs: Costs, units: Mapping[str, int]) -> dict[str, float]:
    """Shares that `scaled` brings back to these widths, at these widths' own latency.

    Each lies somewhere between its width and the next, spread over the groups: otherwise all would step at once as
    soon as a budget is a little tighter.
    """
    shares = {}
    for at, (g, widths) in enumerate(costs.candidates.items()):
        larger = min((w for w in widths if w > units[g]), default=costs.dense[g])
        between = (0.5 + at * GOLDEN) % 1.0
        shares[g] = (units[g] + between * (larger - units[g])) / costs.dense[g]
    return shares


def _drawn(
    least: float,
    seed: int,
    costs: Costs,
    importance: Importance,
    budget_ms: float,
    limits: Sequence[Limit] = (),
) -> Plan:
    """Shares between `least` and 1; the same ones for a seed, whatever the budget."""
    draw = np.random.Generator(np.random.PCG64(seed)).random
    shares = {g: least + (1 - least) * draw() for g in costs.candidates}
    return scaled(shares, costs, importance, budget_ms, limits)


def _rounded_up(
    units: dict[str, int],
    wanted: Mapping[str, float],
    choices: Candidates,
    fits: Callable[[Mapping[str, int]], bool],
) -> dict[str, int]:
    """Take groups to their next width while that fits, the one nearest to it first."""
    larger = {g: min((w for w in choices[g] if w > units[g]), default=0) for g in units}
    rest = {g: (wanted[g] - units[g]) / (larger[g] - units[g]) for g in units if larger[g]}
    for g in sorted(rest, key=lambda g: -rest[g]):
        more = {**units, g: larger[g]}
        if rest[g] > 0 and fits(more):
            units = more
    return units
