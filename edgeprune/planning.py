"""Plans that hold on the device: whole networks are built and timed before anything is trained.

Predictions come from single layers. The floor, the plan and a few networks between them are exported and measured end
to end, in turn with the dense one; the prediction is corrected by them, and a plan that misses is solved again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from . import allocate, importance, measure, surgery
from .allocate import Costs
from .errors import BudgetError, UnreachableBudget
from .graph import ModelGraph
from .importance import Importance
from .records import Artifact, Budget, Keep, Plan
from .runs import Run, as_record
from .target import Target
from .verify import WASTE, budget_ms
from .watch import Watch

PREFLIGHT = "edgeprune.preflight/1"
SAMPLES = 4  # networks between the floor and the dense one that calibrate the prediction
TRIES = 6
MARGIN = 0.025  # aimed under the budget: the middle of what is neither over it nor wasteful
CLOSE = 0.0075  # to either end of that: what the next measurement of the same network may differ by


@dataclass(frozen=True)
class Measured:
    """A whole network: units kept, and its latency at the dense network's reference speed."""

    units: Mapping[str, int]
    predicted_ms: float
    measured_ms: float


@dataclass(frozen=True)
class Preflight:
    """What the device can do, known before any training."""

    dense_ms: float
    noise: float  # relative difference of two halves of the dense network's samples
    floor: Measured
    networks: tuple[Measured, ...]


@dataclass(frozen=True)
class Chosen:
    """A plan, the units it keeps, and every attempt that led to it."""

    plan: Plan
    keep: Keep
    measured_ms: float
    attempts: tuple[Measured, ...]
    note: str


class Bench:
    """Exports cut networks and times them in turn with the dense one, relative to its first latency."""

    def __init__(self, model: nn.Module, graph: ModelGraph, target: Target, folder: Path) -> None:
        self.model, self.graph, self.target, self.folder = model, graph, target, folder
        self.dense: Artifact = target.export(model, graph.example, folder / "dense")
        self.reference_ms = 0.0
        self.noise = 0.0

    def time(self, keeps: Sequence[Keep]) -> list[float]:
        """Milliseconds of each cut network, as if the dense one took `reference_ms` as it did at first."""
        with_files = []
        try:
            for at, keep in enumerate(keeps):
                module = surgery.cut(self.model, self.graph, keep)
                with_files.append(self.target.export(module, self.graph.example, self.folder / f"plan-{at}"))
            dense, *cut = measure.time_networks([self.dense, *with_files], self.target)
        finally:
            for at in range(len(keeps)):
                shutil.rmtree(self.folder / f"plan-{at}", ignore_errors=True)
        if not self.reference_ms:
            self.reference_ms = dense.median_ms
            halves = np.median(dense.samples_ms[::2]), np.median(dense.samples_ms[1::2])
            self.noise = float(abs(halves[0] / halves[1] - 1))
        return [timing.median_ms * self.reference_ms / dense.median_ms for timing in cut]


def preflight(
    bench: Bench, costs: Costs, scores: Importance, run: Run, watch: Watch, seed: int
) -> tuple[Preflight, Costs]:
    """Measure the floor and some networks between, and correct the predictions by them. Kept in the run folder."""
    if run.has("preflight.json"):
        found = as_record(Preflight, run.read("preflight.json", PREFLIGHT))
        bench.reference_ms, bench.noise = found.dense_ms, found.noise
    else:
        units = [dict(allocate.floor(costs).widths), *measure.samples(costs.candidates, SAMPLES, seed)]
        with watch.stage("time the floor, the dense network and some between") as progress:
            progress(0, 1)
            measured = bench.time([importance.best(scores, u) for u in units])
        networks = tuple(Measured(u, costs.predict_ms(u), ms) for u, ms in zip(units, measured, strict=True))
        found = Preflight(bench.reference_ms, bench.noise, networks[0], networks)
        run.write("preflight.json", PREFLIGHT, found)
    known = [(n.units, n.measured_ms) for n in found.networks] + [(costs.dense, found.dense_ms)]
    return found, measure.calibrate(costs, known)[0]


def check_budget(budget: Budget, start: Preflight) -> float:
    """The budget in milliseconds.

    Raises:
        BudgetError: it asks for nothing; UnreachableBudget: this device cannot reach it.
    """
    wanted = budget_ms(budget, start.dense_ms)
    if wanted >= start.dense_ms:
        raise BudgetError(
            f"the budget of {wanted:.4g} ms is above the dense network's latency, {start.dense_ms:.4g} ms measured: "
            "there is nothing to prune"
        )
    if wanted < start.floor.measured_ms:
        raise UnreachableBudget(
            f"the budget of {wanted:.4g} ms cannot be reached by pruning: the fastest this network gets on this device "
            f"is {start.floor.measured_ms:.4g} ms ({start.dense_ms / start.floor.measured_ms:.2f}x), measured with "
            "every group at its least width. Lower compress.min_width, allow compress.drop_blocks, or raise the budget."
        )
    return wanted


def meet(
    bench: Bench, costs: Costs, scores: Importance, strategy: str, wanted_ms: float, seed: int, watch: Watch
) -> Chosen:
    """Solve, build, measure, correct and solve again, until the measured latency meets the budget.

    Raises:
        UnreachableBudget: no plan that was tried meets it; the message holds what was measured.
    """
    attempts: list[Measured] = []
    best: Chosen | None = None
    bias = 1.0
    with watch.stage("find a plan that holds on the device") as progress:
        for attempt in range(TRIES):
            progress(attempt, TRIES)
            plan = within_reach(costs, scores, strategy, wanted_ms * (1 - MARGIN) / bias, seed)
            keep = importance.best(scores, plan.widths)
            measured_ms = _confirmed(bench, keep, wanted_ms)
            attempts.append(Measured(plan.widths, plan.predicted_ms, measured_ms))
            fits = measured_ms <= wanted_ms * (1 - CLOSE)
            if fits and (best is None or measured_ms > best.measured_ms):
                best = Chosen(plan, keep, measured_ms, (), "")
            if fits and measured_ms >= wanted_ms * (1 - WASTE + CLOSE):
                break
            if len(attempts) > 1 and attempts[-1].units == attempts[-2].units:
                break  # the widths on offer have no plan between
            bias = measured_ms / plan.predicted_ms
    if best is None:
        nearest = min(attempts, key=lambda a: a.measured_ms)
        raise UnreachableBudget(
            f"no plan met {wanted_ms:.4g} ms in {len(attempts)} attempts; the nearest was measured at "
            f"{nearest.measured_ms:.4g} ms. The device may be busy: try again, or raise the budget."
        )
    under = 1 - best.measured_ms / wanted_ms
    note = f"{under:.1%} under the budget: the widths on offer have no plan between" if under > WASTE else ""
    return replace(best, attempts=tuple(attempts), note=note)


def _confirmed(bench: Bench, keep: Keep, wanted_ms: float) -> float:
    """A network's latency; one that fits is measured once more, for of several tries the luckiest would be taken."""
    (first,) = bench.time([keep])
    if first > wanted_ms:
        return first
    (second,) = bench.time([keep])
    return max(second, (first + second) / 2)


def within_reach(costs: Costs, scores: Importance, strategy: str, budget: float, seed: int) -> Plan:
    """The strategy's plan; the floor where the corrected budget has fallen below it."""
    try:
        return allocate.allocate(strategy, costs, scores, budget, seed)
    except UnreachableBudget:
        return allocate.floor(costs)


def schedule(dense_ms: float, wanted_ms: float, steps: int) -> list[float]:
    """Budgets of each step, geometric from dense to wanted (HALP, arXiv 2210.06659)."""
    return [float(dense_ms ** (1 - k / steps) * wanted_ms ** (k / steps)) for k in range(1, steps + 1)]
