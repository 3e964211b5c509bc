"""Carrying a plan to a measured budget, on a device whose clock is a formula: what it answers is known beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from test_allocate import Residual, made_up

from edgeprune import allocate, planning
from edgeprune.allocate import Costs
from edgeprune.bench import Bench
from edgeprune.errors import UnreachableBudget
from edgeprune.planning import Aim
from edgeprune.records import Keep
from edgeprune.watch import Silent

NOISE = 0.02


class Formula(Bench):
    """Every network takes `slower` times what is predicted, but for the smallest, which takes just that."""

    def __init__(self, costs: Costs, slower: float) -> None:
        self.costs, self.slower, self.spreads = costs, slower, [(1.0, NOISE)]
        self.dense_ms = [1.0]

    @contextmanager
    def built(self, keeps: Sequence[Keep], progress: Any = None) -> Iterator[list[Any]]:
        yield [SimpleNamespace(keep=keep, size_bytes=1000) for keep in keeps]

    def timed(self, artifacts: Sequence[Any], settled: bool = False, between: Any = None) -> list[float]:
        return [self.milliseconds({**self.costs.dense, **{g: len(k) for g, k in a.keep.items()}}) for a in artifacts]

    def milliseconds(self, units: dict[str, int]) -> float:
        smallest = units == dict(allocate.floor(self.costs).widths)
        return self.costs.predict_ms(units) * (1.0 if smallest else self.slower)


@pytest.mark.parametrize("room", [1.001, 1.02])
def test_a_budget_just_above_the_floor_is_met_by_the_floor(room: float) -> None:
    """Aiming below the budget by twice the noise, as everywhere else, would find nothing there."""
    _, costs, scores = made_up(Residual(), choices=4)
    floor = allocate.floor(costs)
    budget = room * floor.predicted_ms
    chosen = planning.meet([Aim(Formula(costs, 1.3), costs, budget)], scores, allocate.solve, Silent())
    assert dict(chosen.plan.widths) == dict(floor.widths)
    assert chosen.measured_ms <= budget


@pytest.mark.parametrize("slower", [0.8, 1.0, 1.4])
def test_elsewhere_a_plan_ends_below_its_budget_by_more_than_the_noise(slower: float) -> None:
    _, costs, scores = made_up(Residual(), choices=8)
    bench = Formula(costs, slower)
    budget = 0.6 * slower * costs.predict_ms(costs.dense)
    chosen = planning.meet([Aim(bench, costs, budget)], scores, allocate.solve, Silent())
    assert chosen.measured_ms == bench.milliseconds(dict(chosen.plan.widths))
    assert 0.9 * budget <= chosen.measured_ms <= (1 - NOISE) * budget


def test_a_floor_that_no_longer_holds_is_refused_with_what_was_measured() -> None:
    _, costs, scores = made_up(Residual(), choices=4)
    floor_ms = allocate.floor(costs).predicted_ms
    with pytest.raises(UnreachableBudget, match=rf"no plan met .* was measured at {floor_ms:.4g} ms"):
        planning.meet([Aim(Formula(costs, 1.3), costs, 0.99 * floor_ms)], scores, allocate.solve, Silent())


def test_noise_is_that_of_the_middle_session_so_one_that_was_disturbed_does_not_push_plans_down() -> None:
    _, costs, scores = made_up(Residual(), choices=8)
    bench = Formula(costs, 1.0)
    bench.spreads = [(1.0, 0.05)]
    budget = 0.6 * costs.predict_ms(costs.dense)
    disturbed = planning.meet([Aim(bench, costs, budget)], scores, allocate.solve, Silent())
    bench.spreads = [(1.0, 0.05), (1.0, 0.001), (1.0, 0.002)]
    quiet = planning.meet([Aim(bench, costs, budget)], scores, allocate.solve, Silent())
    assert disturbed.measured_ms <= 0.94 * budget < 0.96 * budget <= quiet.measured_ms <= budget


class Calmer(Formula):
    """At first a device on which networks seem a third slower; it is calm from the second plan on."""

    def timed(self, artifacts: Sequence[Any], settled: bool = False, between: Any = None) -> list[float]:
        self.slower, self.dense_ms = (1.3, [1.2]) if self.calm_ms > 1.2 else (1.0, [1.0])
        return super().timed(artifacts)


def test_what_was_measured_before_the_device_became_calm_does_not_count() -> None:
    _, costs, scores = made_up(Residual(), choices=8)
    bench = Calmer(costs, 1.3)
    bench.dense_ms = [1.5]
    budget = 0.6 * costs.predict_ms(costs.dense)
    chosen = planning.meet([Aim(bench, costs, budget)], scores, allocate.solve, Silent())
    assert all(a.measured_ms == bench.milliseconds(dict(a.units)) for a in chosen.attempts)
    assert 0.9 * budget <= chosen.measured_ms <= (1 - NOISE) * budget
