"""Plans improved by the true costs: within every limit, and at no step that still gains and fits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from test_allocate import Concat, Residual, made_up

from edgeprune import allocate
from edgeprune.allocate import Costs
from edgeprune.errors import UnreachableBudget
from edgeprune.limits import Limit, size_limit
from edgeprune.polish import polished


def within(costs: Costs, limits: Sequence[Limit], units: dict[str, int]) -> bool:
    return all(limit.predict(units, costs.blocks) <= limit.budget * (1 + 1e-12) for limit in limits)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("begin", ["dense", "smallest", "random"])
def test_a_polished_plan_is_within_every_limit_and_no_next_width_gains_and_fits(share: float, begin: str) -> None:
    graph, costs, scores = made_up(Residual(), choices=6)
    dense_bytes = 4 * graph.total_params
    latencies = [costs.predict_ms(allocate.floor(costs).widths), costs.predict_ms(costs.dense)]
    budget = latencies[0] + share * (latencies[1] - latencies[0])
    limits = [
        costs.limit("ms", budget),
        size_limit(graph.layers, costs.candidates, costs.dense, dense_bytes, 0.7 * dense_bytes),
    ]
    draw = np.random.Generator(np.random.PCG64(0))
    units = {
        g: {"dense": widths[-1], "smallest": widths[0], "random": int(draw.choice(widths))}[begin]
        for g, widths in costs.candidates.items()
    }
    found = polished(allocate.values_of(costs, scores), limits, costs.blocks, units)
    assert found is not None
    assert within(costs, limits, found)
    for g, widths in costs.candidates.items():
        larger = next((w for w in widths if w > found[g]), None)
        assert larger is None or not within(costs, limits, {**found, g: larger})


def test_blocks_stay_dropped_or_kept() -> None:
    _, costs, scores = made_up(Residual(), choices=4, blocks=True)
    block = costs.blocks[0]
    units = {g: 0 if g in block.groups else w[-1] for g, w in costs.candidates.items()}
    budget = 0.7 * costs.predict_ms(units)
    found = polished(allocate.values_of(costs, scores), [costs.limit("ms", budget)], costs.blocks, units)
    assert found is not None
    assert costs.predict_ms(found) <= budget * (1 + 1e-12)
    assert all((found[g] == 0) == (g in block.groups) for g in found)


def test_what_cannot_be_met_by_any_step_is_none() -> None:
    _, costs, scores = made_up(Residual(), choices=4)
    least = costs.predict_ms({g: w[0] for g, w in costs.candidates.items()})
    assert (
        polished(allocate.values_of(costs, scores), [costs.limit("ms", 0.99 * least)], costs.blocks, costs.dense)
        is None
    )


def test_behind_concats_a_budget_below_the_floor_is_refused_with_the_true_least_and_not_that_of_the_lines() -> None:
    graph, costs, scores = made_up(Concat(), choices=6)
    least = costs.predict_ms({g: w[0] for g, w in costs.candidates.items()})
    size = size_limit(graph.layers, costs.candidates, costs.dense, 4 * graph.total_params, 100.0)
    for budget in (0.5 * least, 0.999 * least):
        said = rf"smallest network is predicted at {least:.4g} ms, the budget is {budget:.4g} ms"
        with pytest.raises(UnreachableBudget, match=said):
            allocate.solve(costs, scores, budget)
    with pytest.raises(UnreachableBudget, match=r"size in bytes \S+, the budget is 100"):
        allocate.solve(costs, scores, 10 * least, [size])


def test_behind_concats_further_limits_hold_by_their_true_costs_too() -> None:
    graph, costs, scores = made_up(Concat(), choices=6)
    dense_bytes = 4 * graph.total_params
    for share in (0.5, 0.7, 0.9):
        limit = size_limit(graph.layers, costs.candidates, costs.dense, dense_bytes, share * dense_bytes)
        plan = allocate.solve(costs, scores, 0.8 * costs.predict_ms(costs.dense), [limit])
        assert limit.predict(plan.widths, costs.blocks) <= limit.budget
        assert plan.predicted_ms <= 0.8 * costs.predict_ms(costs.dense) * (1 + 1e-12)
