"""The solver against brute force, on costs of every nasty kind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeprune import knapsack
from edgeprune.errors import UnreachableBudget
from edgeprune.knapsack import Cost, Problem, Sum, Term

Floats = NDArray[np.float64]
KINDS = ("plain", "staircase", "negative", "zero", "non-monotone")
EXACT = 1e-9  # a gap that leaves no choice


def everything(problem: Problem) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Values (choices,), costs (budgets, choices) and choices (groups, choices) of all that is allowed, by numpy."""
    sizes = [len(v) for v in problem.values]
    c = np.indices(sizes).reshape(len(sizes), -1)
    allowed = np.ones(c.shape[1], dtype=bool)
    for (g, i), (h, j) in problem.together:
        allowed &= (c[g] == i) == (c[h] == j)
    c = c[:, allowed]
    value = np.sum([v[c[g]] for g, v in enumerate(problem.values)], axis=0)
    costs = []
    for cost in problem.costs:
        total = np.full(c.shape[1], cost.constant)
        for term in cost.terms:
            total += term.cost[tuple(c[g] for g in term.groups)]
        for part in cost.sums:
            size = part.fixed + np.sum([s[c[g]] for g, s in part.sizes], axis=0)
            at = c[part.b] if part.b >= 0 else np.zeros(c.shape[1], dtype=int)
            total += part.base[at] + part.slope[at] * size
        costs.append(total)
    return value, np.array(costs), c


def best(problem: Problem, *budgets: float) -> float:
    """The best value within the budgets, by trying everything; -inf when nothing fits."""
    value, costs, _ = everything(problem)
    fits = (costs <= np.array(budgets)[:, None] + 1e-9).all(axis=0)
    return float(value[fits].max(initial=-math.inf))


def numbers(draw: np.random.Generator, kind: str) -> Callable[..., Floats]:
    """A maker of cost arrays; whole numbers, so that sums are the same in any order."""

    def cost(*shape: int) -> Floats:
        drawn = draw.integers(0, 10, size=shape).astype(float)
        if kind == "plain":
            for axis in range(len(shape)):
                drawn = np.cumsum(drawn, axis=axis)
            return drawn
        if kind == "staircase":
            return np.floor(drawn / 4) * 4
        if kind == "negative":
            return drawn - 4
        if kind == "zero":
            return drawn * (draw.random(shape) < 0.4)
        return drawn

    return cost


def instance(seed: int, kind: str, budgets: int = 1) -> Problem:
    """Up to 5 groups of up to 5 choices, one of them perhaps protected; terms of up to 3 groups, sums, a block."""
    draw = np.random.default_rng(seed)
    cost = numbers(draw, kind)
    sizes = draw.integers(1, 6, size=int(draw.integers(1, 6)))
    costs = []
    for _ in range(budgets):
        terms, sums = [], []
        for _ in range(int(draw.integers(1, 7))):
            groups = [int(g) for g in draw.integers(len(sizes), size=int(draw.integers(0, 4)))]
            terms.append(Term(tuple(groups), cost(*(int(sizes[g]) for g in groups))))
        for _ in range(int(draw.integers(0, 3))):
            members = draw.choice(len(sizes), size=int(draw.integers(1, len(sizes) + 1)), replace=False)
            b = int(draw.integers(-1, len(sizes)))
            width = int(sizes[b]) if b >= 0 else 1
            parts = tuple((int(g), np.sort(draw.integers(0, 5, size=sizes[g])).astype(float)) for g in members)
            sums.append(Sum(parts, float(draw.integers(3)), b, cost(width), cost(width)))
        costs.append(Cost("time", tuple(terms), tuple(sums), float(draw.integers(3))))
    together = (((0, 0), (1, 0)),) if len(sizes) > 1 and min(sizes[:2]) > 1 and draw.random() < 0.4 else ()
    values = tuple(np.cumsum(draw.random(s)) if draw.random() < 0.7 else draw.normal(size=s) for s in sizes)
    return Problem(values, tuple(costs), together)


@pytest.mark.parametrize("kind", KINDS)
def test_the_solution_is_the_best_of_all_choices(kind: str) -> None:
    """2,000 instances in all."""
    for seed in range(400):
        problem = instance(seed, kind)
        floor = float(everything(problem)[1].min())
        budget = floor + seed % 25
        solution = knapsack.solve(problem, [budget], EXACT)
        assert solution.value == pytest.approx(best(problem, budget), abs=1e-7), seed
        assert solution.costs[0] <= budget, seed
        assert solution.bound >= solution.value, seed
        assert solution.gap <= 1e-6, seed


@pytest.mark.parametrize("kind", KINDS)
def test_a_loose_gap_is_a_certificate_all_the_same(kind: str) -> None:
    for seed in range(40):
        problem = instance(seed, kind)
        budget = float(everything(problem)[1].min()) + seed % 15
        solution = knapsack.solve(problem, [budget], gap=0.2)
        optimum = best(problem, budget)
        assert solution.bound >= optimum - 1e-7, seed
        assert optimum - solution.value <= 0.2 * abs(solution.bound) + 1e-7, seed
        assert solution.costs[0] <= budget, seed


def test_several_budgets_hold_at_once() -> None:
    reached = 0
    for seed in range(150):
        problem = instance(seed, KINDS[seed % len(KINDS)], budgets=2)
        _, costs, _ = everything(problem)
        budgets = [float(cost.min()) + seed % 12 for cost in costs]
        optimum = best(problem, *budgets)
        if math.isinf(optimum):
            with pytest.raises(
                UnreachableBudget, match=r"at once: time [-\d.]+ \(alone [-\d.]+ can be reached\), time"
            ):
                knapsack.solve(problem, budgets, EXACT)
            continue
        solution = knapsack.solve(problem, budgets, EXACT)
        assert solution.value == pytest.approx(optimum, abs=1e-7), seed
        assert all(cost <= budget for cost, budget in zip(solution.costs, budgets, strict=True))
        reached += 1
    assert 50 < reached < 150  # both cases were seen


def residual(draw: np.random.Generator, stages: int, blocks: int, widths: int) -> tuple[Problem, float]:
    """A residual network: a layer costs input width times stepped output width, each block has one inner width."""
    units = np.arange(1, widths + 1).astype(float)
    stepped = np.ceil(units / 2) * 2
    values, terms = [], []
    for stage in range(stages):
        outer = len(values)
        values.append(np.cumsum(np.sort(draw.random(widths))[::-1]) * blocks)
        if stage:
            before = outer - blocks - 1
            terms.append(Term((before, outer), draw.uniform(0.5, 2) * np.outer(units, stepped)))
        for _ in range(blocks):
            inner = len(values)
            values.append(np.cumsum(np.sort(draw.random(widths))[::-1]))
            terms.append(Term((outer, inner), draw.uniform(0.5, 2) * np.outer(units, stepped)))
            terms.append(Term((inner, outer), draw.uniform(0.5, 2) * np.outer(units, stepped)))
    problem = Problem(tuple(values), (Cost("time", tuple(terms), (), 1.0),), ())
    dense = knapsack.costs_of(problem, [widths - 1] * len(values))[0]
    return problem, dense


def test_a_residual_network_is_solved_as_by_brute_force_at_every_budget() -> None:
    for seed in range(6):
        problem, dense = residual(np.random.default_rng(seed), stages=2, blocks=2, widths=5)
        for share in (0.15, 0.3, 0.5, 0.7, 0.9):
            solution = knapsack.solve(problem, [share * dense], EXACT)
            assert solution.value == pytest.approx(best(problem, share * dense), abs=1e-7), (seed, share)


def test_a_layers_precision_is_one_more_choice() -> None:
    """Narrower numbers are faster and worth less; each layer has its own latency for each (in, out, precision)."""
    speed = np.array([1.0, 0.6, 0.35])  # float, half, integer
    for seed in range(20):
        draw = np.random.default_rng(seed)
        widths = [np.cumsum(draw.random(4)) for _ in range(3)]
        loss = [-np.sort(draw.random(3)) * 0.5 for _ in range(2)]
        grid = np.outer(np.arange(1, 5), np.ceil(np.arange(1, 5) / 2))
        terms = tuple(
            Term((layer, layer + 1, 3 + layer), grid[:, :, None] * speed * draw.uniform(0.8, 1.2, size=3))
            for layer in range(2)
        )
        problem = Problem((*widths, *loss), (Cost("time", terms, (), 0.0),), ())
        budget = float(draw.uniform(1, 10))
        solution = knapsack.solve(problem, [budget], EXACT)
        assert solution.value == pytest.approx(best(problem, budget), abs=1e-7), seed
    assert any(p for p in solution.choice[3:])  # a narrow type was worth taking


def test_a_block_vanishes_whole_or_not_at_all() -> None:
    """Two inner groups at width 0 free the block's cost; one of them alone must not."""
    cost = np.array([[0.0, 0.0], [0.0, 9.0]])
    values = (np.array([0.0, 5.0]), np.array([4.0, 5.0]), np.array([0.0, 3.0]))
    terms = (Term((0, 1), cost), Term((2,), np.array([0.0, 5.0])))
    problem = Problem(values, (Cost("time", terms, (), 0.0),), (((0, 0), (1, 0)),))
    assert knapsack.solve(problem, [9.0]).choice == (1, 1, 0)
    assert knapsack.solve(problem, [8.9]).choice == (0, 0, 1)


def test_the_cheapest_choice_is_the_cheapest_of_all() -> None:
    for seed in range(100):
        problem = instance(seed, "negative", budgets=2)
        _, costs, _ = everything(problem)
        for k in (0, 1):
            assert knapsack.cheapest(problem, k).costs[k] == pytest.approx(costs[k].min())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(KINDS))
def test_a_larger_budget_is_never_worth_less(seed: int, kind: str) -> None:
    problem = instance(seed, kind)
    floor = knapsack.cheapest(problem).costs[0]
    values = [knapsack.solve(problem, [floor + extra], EXACT).value for extra in (0.0, 2.0, 5.0, 20.0)]
    assert values == sorted(values)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_a_solution_never_costs_more_than_the_budget_by_any_amount(seed: int, share: float) -> None:
    """With costs that no binary number holds, and budgets that some choice meets to the last bit."""
    draw = np.random.default_rng(seed)
    sizes = [4, 4, 4, 4]
    terms = tuple(Term((a, b), draw.random((4, 4)) / 3) for a, b in itertools.pairwise(range(4)))
    problem = Problem(tuple(np.cumsum(draw.random(s)) for s in sizes), (Cost("time", terms, (), 0.1),), ())
    choices = list(itertools.product(range(4), repeat=4))
    budget = knapsack.costs_of(problem, choices[int(share * (len(choices) - 1))])[0]
    solution = knapsack.solve(problem, [budget])
    assert knapsack.costs_of(problem, solution.choice)[0] <= budget
    assert knapsack.cheapest(problem).costs[0] <= budget


def test_a_budget_below_the_cheapest_choice_is_refused_with_its_cost() -> None:
    problem = instance(3, "plain")
    floor = knapsack.cheapest(problem).costs[0]
    with pytest.raises(
        UnreachableBudget, match=f"time: the cheapest choice of widths costs {floor:.6g}, the budget is"
    ):
        knapsack.solve(problem, [floor - 0.5])


def test_a_budget_equal_to_the_cheapest_choice_is_met() -> None:
    for seed in range(30):
        problem = instance(seed, "non-monotone")
        floor = float(everything(problem)[1].min())
        assert knapsack.solve(problem, [floor]).costs[0] == floor


def prefix_table(items: list[tuple[int, float, int]], capacity: int) -> float:
    """HALP's dynamic programme: an item may be added to the best entry below it only if that entry kept the item that
    must come before. Items are (group, value, cost), those of a group in order."""
    value = np.zeros(capacity + 1)
    kept = np.zeros((len(items) + 1, capacity + 1), dtype=bool)
    for i, (group, worth, cost) in enumerate(items):
        first = i == 0 or items[i - 1][0] != group
        before = value.copy()
        for room in range(cost, capacity + 1):
            allowed = first or kept[i, room - cost]
            if allowed and before[room - cost] + worth > before[room]:
                value[room] = before[room - cost] + worth
                kept[i + 1, room] = True
    return float(value[capacity])


def test_keeping_only_the_best_entry_per_capacity_is_not_optimal() -> None:
    """The table asks whether the best entry kept the previous item, not whether some entry did.

    Group B's second item needs its first. With 4 units of room group A alone is worth more than B's first item, so the
    best entry there has not kept it, and B's second is never added; both of B's items together are worth more.
    """
    items = [(0, 4.0, 4), (1, 3.0, 4), (1, 5.0, 2)]
    problem = Problem(
        (np.array([0.0, 4.0]), np.array([0.0, 3.0, 8.0])),
        (Cost("time", (Term((0,), np.array([0.0, 4.0])), Term((1,), np.array([0.0, 4.0, 6.0]))), (), 0.0),),
        (),
    )
    assert best(problem, 6.0) == 8.0
    assert prefix_table(items, 6) == 4.0
    assert knapsack.solve(problem, [6.0]).value == 8.0


def test_a_cost_that_couples_both_widths_is_not_linearised() -> None:
    """With the input width frozen while the output shrinks, this plan looks too dear and is missed."""
    cost = np.outer([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])
    problem = Problem((np.array([1.0, 3.0, 4.0]),) * 2, (Cost("time", (Term((0, 1), cost),), (), 0.0),), ())
    solution = knapsack.solve(problem, [4.0])
    assert solution.choice == (1, 1)
    assert (solution.value, solution.costs[0]) == (6.0, 4.0)


def test_a_network_of_the_size_of_resnet50_is_solved_with_a_certificate() -> None:
    problem, dense = residual(np.random.default_rng(0), stages=4, blocks=8, widths=16)
    for share in (0.8, 0.5, 0.3):
        solution = knapsack.solve(problem, [share * dense])
        assert solution.costs[0] <= share * dense
        assert solution.gap <= 1e-3
