"""What a strategy's plan buys: its rivals are judged as it is, at its latency, and are on the page of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_planning import Formula
from test_report import full
from test_searching import brightness, subject_in

from edgeprune import allocate, allocators, importance, report, rivals, surgery
from edgeprune.asked import Asked
from edgeprune.config import SearchSection
from edgeprune.planning import Aim, Chosen
from edgeprune.records import Budget
from edgeprune.rivals import Rival
from edgeprune.runs import Run
from edgeprune.watch import Silent

ASKED = Asked(
    Budget(None, 2.0),
    "rl",
    "l2",
    1,
    (),
    0.0,
    False,
    None,
    {},
    0,
    0,
    search=SearchSection(images=16),  # type: ignore[call-arg]
)


def test_the_knapsack_and_uniform_widths_are_judged_beside_the_plan_at_its_latency(tmp_path: Path) -> None:
    subject, space = subject_in(tmp_path / "step-1")
    costs = space.costs
    bench = Formula(costs, 1.3)
    plan = allocators.named("random", 3)(costs, subject.scores, 0.6 * costs.predict_ms(costs.dense), ())
    chosen = Chosen(plan, importance.best(subject.scores, plan.widths), 1.0, (), "")
    found = rivals.compare(subject, subject.scores, Aim(bench, costs, 1.0), chosen, ASKED, Silent())
    assert [r.strategy for r in found] == ["rl", "knapsack", "uniform"]
    assert found[0].widths == dict(plan.widths)
    assert found[1].widths == dict(allocate.solve(costs, subject.scores, plan.predicted_ms, ()).widths)
    for rival in found:
        assert rival.predicted_ms <= plan.predicted_ms
        assert rival.measured_ms == pytest.approx(bench.milliseconds({**costs.dense, **rival.widths}))
        cut = surgery.cut(subject.dense, subject.graph, importance.best(subject.scores, rival.widths))
        subject.task.adapt(cut)
        assert rival.accuracy == pytest.approx(brightness(cut))
    assert len({r.accuracy for r in found}) > 1
    assert rivals.last(Run(tmp_path)) == found


def test_they_are_on_the_page_and_a_run_without_them_has_no_such_part(tmp_path: Path) -> None:
    run = full(tmp_path)
    assert rivals.last(run) == []
    assert "What the strategy buys" not in report.render(run)
    beside = [Rival("rl", {"a": 8}, 1.06, 1.051, 2.125, 0.5), Rival("uniform", {"a": 9}, 1.06, 1.049, 2.375, 0.25)]
    for step, found in ((1, beside[:1]), (2, beside)):
        run.write(f"step-{step}/{rivals.NAME}", rivals.FORMAT, {"rivals": found})
    assert rivals.last(run) == beside
    page = report.render(run)
    assert "What the strategy buys" in page
    assert "2.125" in page
    assert "2.375" in page
