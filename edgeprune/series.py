"""Several budgets, one after the other: each network keeps a subset of the channels of the one before.

The folder of a series holds `series.json`, the budgets; `curve.json`, what each of them is worth, known before any
training; and one whole run for each (`8ms/`, `6ms/`), which is reported, verified, exported and installed like any
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from . import allocate, budgets, importance, pipeline, planning, strategies
from .allocate import Allocator, Costs
from .asked import Asked
from .config import INTERVAL
from .errors import RunError
from .graph import Example, trace
from .importance import Importance
from .pipeline import Outcome
from .runs import Run
from .store import Store
from .target import Target
from .task import Task
from .watch import Watch

SERIES = "edgeprune.series/1"
CURVE = "edgeprune.curve/1"


@dataclass(frozen=True)
class Point:
    """What one budget is worth: shares of the dense network's summed score."""

    budget_ms: float
    predicted_ms: float
    kept: float  # within the channels of the budget before
    alone: float  # the most that this budget could keep by itself
    gap: float


@dataclass(frozen=True, eq=False)
class Series:
    run: Run
    curve: tuple[Point, ...]
    outcomes: tuple[Outcome, ...]


def compress(
    model: nn.Module,
    example: Example,
    target: Target,
    task: Task,
    asked: Sequence[Asked],
    run: Run,
    store: Store,
    watch: Watch,
    resume: bool = False,
    interval: float = INTERVAL,
) -> Series:
    """Prune `model` to each budget in turn, starting each from the network before.

    Args:
        asked: the same but for the budget, loosest first.
        run: the folder of the series.
        resume: go on in a folder that holds this series already.
        model, example, target, task, store, watch, interval: see `pipeline.compress`.
    Raises:
        UnreachableBudget: before any training, when one of the budgets cannot be reached.
        RunError: the folder holds something else.
    """
    claim(run, [budgets.label(one.budget) for one in asked], resume)
    curve = _planned(model, example, target, task, asked, run, store, watch, interval)
    outcomes: list[Outcome] = []
    for one in asked:
        part = Run(run.path(budgets.label(one.budget)))
        watch.say(f"budget {budgets.label(one.budget)}: {part.folder}")
        before = outcomes[-1].run if outcomes else None
        outcomes.append(
            pipeline.compress(
                model,
                example,
                target,
                task,
                one,
                part,
                store,
                watch,
                resume,
                within=before,
                measured=run,
                interval=interval,
            )
        )
    return Series(run, curve, tuple(outcomes))


def claim(run: Run, labels: Sequence[str], resume: bool) -> None:
    """Make a folder this series' own, or go on in it.

    Raises:
        RunError: it holds something else, or a series of other budgets, or a series and `resume` is off.
    """
    if not run.has("series.json"):
        if run.folder.exists() and any(not path.name.startswith(".series.json.") for path in run.folder.iterdir()):
            raise RunError(f"{run.folder} is not empty and holds no series of budgets; give another folder with --run")
        run.write("series.json", SERIES, {"budgets": list(labels)})
        return
    found = run.read("series.json", SERIES)["budgets"]
    if found != list(labels):
        raise RunError(
            f"{run.folder} was started with the budgets {', '.join(found)}, not {', '.join(labels)}; set them back, or "
            "start a new run"
        )
    if not resume:
        raise RunError(f"{run.folder} holds a series already; go on with --resume, or give another folder with --run")


def _planned(
    model: nn.Module,
    example: Example,
    target: Target,
    task: Task,
    asked: Sequence[Asked],
    run: Run,
    store: Store,
    watch: Watch,
    interval: float,
) -> tuple[Point, ...]:
    """Check every budget against the floor, and solve all of them."""
    first = asked[0]
    graph = trace(model, example, first.protected)
    job = pipeline.Job(model, graph, task, first, run, watch, interval)
    costs = pipeline.latency_costs(job, target, store)
    scores = importance.score(model, graph.groups, first.importance, task.batches(), first.seed)
    bench = pipeline.bench_on(job, target, run)
    start, costs = planning.preflight(bench, costs, scores, run, watch, first.seed)
    wanted = [planning.check_budget(one.budget, start) for one in asked]
    found = curve(costs, scores, strategies.forecast(first), wanted)
    run.write("curve.json", CURVE, {"dense_ms": start.dense_ms, "floor_ms": start.floor.measured_ms, "points": found})
    for point in found:
        watch.say(f"{point.budget_ms:.4g} ms keeps {point.kept:.2%} of the score ({point.alone:.2%} by itself)")
    return found


def curve(costs: Costs, scores: Importance, allocator: Allocator, budgets_ms: Sequence[float]) -> tuple[Point, ...]:
    """Nested plans, each solved within the widths of the one before, and what each budget could keep by itself.

    Args:
        costs: of the network on its device.
        scores: group -> (width,).
        allocator: chooses the widths.
        budgets_ms: descending.
    """
    whole = sum(float(s.sum()) for s in scores.values())
    points, left = [], costs
    for budget_ms in budgets_ms:
        plan = allocator(left, scores, budget_ms)
        alone = plan if left is costs else allocator(costs, scores, budget_ms)
        left = allocate.at_most(costs, plan.widths)
        best = max(plan.value, alone.value)  # both are within the gap of their optimum
        points.append(Point(budget_ms, plan.predicted_ms, plan.value / whole, best / whole, plan.gap))
    return tuple(points)
