"""The solver against brute force, on costs of every nasty kind."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import knapsack
from edgeprune.errors import UnreachableBudget
from edgeprune.knapsack import Pair, Problem, Sum


def brute_force(problem: Problem, budget: float) -> float | None:
    """The best value within the budget by trying everything; None when nothing fits."""
    best = None
    for choice in itertools.product(*(range(len(v)) for v in problem.values)):
        if any((choice[g] == c) != (choice[h] == d) for (g, c), (h, d) in problem.together):
            continue
        if knapsack.cost_of(problem, choice) <= budget + 1e-9:
            value = knapsack.value_of(problem, choice)
            best = value if best is None else max(best, value)
    return best


def instance(seed: int, kind: str) -> Problem:
    """A random problem: up to 5 groups of up to 5 widths, pairs, sums over concats, blocks."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 6, size=int(draw.integers(1, 5)))

    def cost(*shape: int) -> np.ndarray:
        numbers = draw.integers(0, 10, size=shape).astype(float)
        if kind == "staircase":
            return np.floor(numbers / 4) * 4
        if kind == "negative":
            return numbers - 4
        if kind == "zero":
            return numbers * (draw.random(shape) < 0.4)
        return numbers

    pairs, sums = [], []
    for _ in range(int(draw.integers(1, 7))):
        a, b = int(draw.integers(len(sizes))), int(draw.integers(-1, len(sizes)))
        pairs.append(Pair(a, b, cost(sizes[a], sizes[b] if b >= 0 else 1)))
    for _ in range(int(draw.integers(0, 3))):
        members = draw.choice(len(sizes), size=int(draw.integers(1, len(sizes) + 1)), replace=False)
        b = int(draw.integers(-1, len(sizes)))
        width = int(sizes[b]) if b >= 0 else 1
        terms = tuple((int(g), np.sort(draw.integers(0, 5, size=sizes[g])).astype(float)) for g in members)
        sums.append(Sum(terms, float(draw.integers(3)), b, cost(width), cost(width)))
    together = (((0, 0), (1, 0)),) if len(sizes) > 1 and draw.random() < 0.4 else ()
    values = tuple(np.cumsum(draw.random(s)) if draw.random() < 0.7 else draw.normal(size=s) for s in sizes)
    return Problem(values, tuple(pairs), tuple(sums), float(draw.integers(3)), together)


@pytest.mark.parametrize("kind", ["plain", "staircase", "negative", "zero"])
def test_the_solution_is_the_best_of_all_choices(kind: str) -> None:
    for seed in range(120):
        problem = instance(seed, kind)
        cheapest = knapsack.cheapest(problem)
        budget = cheapest.cost + seed % 15
        solution = knapsack.solve(problem, budget, gap=1e-9)
        expected = brute_force(problem, budget)
        assert expected is not None
        assert solution.value == pytest.approx(expected, abs=1e-7), seed
        assert solution.cost <= budget + 1e-9
        assert solution.bound >= expected - 1e-7


def test_the_cheapest_choice_is_the_cheapest_of_all() -> None:
    for seed in range(60):
        problem = instance(seed, "negative")
        choices = itertools.product(*(range(len(v)) for v in problem.values))
        allowed = [c for c in choices if all((c[g] == i) == (c[h] == j) for (g, i), (h, j) in problem.together)]
        expected = min(knapsack.cost_of(problem, c) for c in allowed)
        assert knapsack.cheapest(problem).cost == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["plain", "staircase", "negative", "zero"]))
def test_a_larger_budget_is_never_worth_less(seed: int, kind: str) -> None:
    problem = instance(seed, kind)
    floor = knapsack.cheapest(problem).cost
    values = [knapsack.solve(problem, floor + extra, gap=1e-9).value for extra in (0.0, 2.0, 5.0, 20.0)]
    assert values == sorted(values)


def test_a_budget_below_the_cheapest_choice_is_refused_with_its_cost() -> None:
    problem = instance(3, "plain")
    floor = knapsack.cheapest(problem).cost
    with pytest.raises(UnreachableBudget, match=f"the cheapest choice of widths costs {floor:.6g}, the budget is"):
        knapsack.solve(problem, floor - 0.5)


def test_keeping_only_the_best_entry_per_capacity_is_not_optimal() -> None:
    """What HALP's table does: it asks whether the best entry kept the previous item, not whether some entry did.

    Item 2 needs item 1. Alone at capacity 4, item 3 is worth more than item 1, so the best entry there has not kept
    item 1, and item 2 is never added; together items 1 and 2 are worth more.
    """
    values = (np.array([0.0, 3.0, 8.0]), np.array([0.0, 4.0]))  # groups {1, 1+2}, {3}
    problem = Problem(
        values, (Pair(0, -1, np.array([[0.0], [4.0], [6.0]])), Pair(1, -1, np.array([[0.0], [4.0]]))), (), 0.0, ()
    )
    assert knapsack.solve(problem, 6.0).value == 8.0


def test_a_cost_that_couples_both_widths_is_not_linearised() -> None:
    """With the input width frozen while the output shrinks, this plan looks too dear and is missed."""
    cost = np.outer([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])
    problem = Problem((np.array([1.0, 3.0, 4.0]), np.array([1.0, 3.0, 4.0])), (Pair(0, 1, cost),), (), 0.0, ())
    solution = knapsack.solve(problem, 4.0)
    assert solution.choice == (1, 1)
    assert (solution.value, solution.cost) == (6.0, 4.0)


def test_a_network_of_the_size_of_resnet50_is_solved_with_a_certificate() -> None:
    draw = np.random.default_rng(0)
    groups, widths = 37, 16
    steps = np.arange(1, widths + 1)
    values = tuple(np.cumsum(np.sort(draw.random(widths))[::-1]) for _ in range(groups))
    pairs = []
    for layer in range(53):
        a, b = (int(g) for g in draw.choice(groups, 2, replace=False)) if layer else (0, 1)
        pairs.append(Pair(a, b, draw.uniform(0.5, 2) * np.outer(steps, np.ceil(steps / 2) * 2)))
    problem = Problem(values, tuple(pairs), (), 1.0, ())
    dense = knapsack.cost_of(problem, [widths - 1] * groups)
    solution = knapsack.solve(problem, 0.5 * dense, gap=1e-3)
    assert solution.cost <= 0.5 * dense
    assert solution.gap <= 1e-3
