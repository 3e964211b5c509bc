"""Plans that hold on the device: whole networks are built and timed before anything is trained.

Predictions come from single layers. The floor, the plan and a few networks between them are exported and measured end
to end, in turn with the dense one and the floor; the prediction is corrected by them, and a plan that misses is solved
again.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from . import allocate, importance, measure
from .allocate import Allocator, Costs
from .bench import DISTURBED, Bench
from .errors import BudgetError, UnreachableBudget
from .importance import Importance
from .limits import Limit, size_limit
from .records import Budget, Keep, Plan
from .runs import Run, as_record
from .verify import WASTE, budget_ms
from .watch import Watch

PREFLIGHT = "edgeprune.preflight/1"
SAMPLES = 4  # networks between the floor and the dense one that calibrate the prediction
TRIES = 6
UNUSED = 0.03  # of a budget, at most: a plan further below it is improved
CLOSE = 0.0075  # a plan is this far under its budget, at least: what its next measurement may differ by ...
NOISY = 3.5  # ... or this many times the error of a measurement, where that is more ...
CALL_MS = 0.0008  # ... or this, by which calling the runtime differs from one session to the next


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
    noise: float  # relative spread between copies of one network, see measure.spread
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
    others_ms: tuple[float, ...] = ()  # measured on further targets, in their order


@dataclass(frozen=True, eq=False)
class Aim:
    """A latency to reach on a target."""

    bench: Bench
    costs: Costs
    wanted_ms: float


def preflight(
    bench: Bench, costs: Costs, scores: Importance, run: Run, watch: Watch, seed: int
) -> tuple[Preflight, Costs]:
    """Measure the floor and some networks between, and correct the predictions by them. Kept in the run folder."""
    if run.has("preflight.json"):
        found = as_record(Preflight, run.read("preflight.json", PREFLIGHT))
        bench.refer(found.dense_ms, found.noise, importance.best(scores, found.floor.units), found.floor.measured_ms)
    else:
        units = [dict(allocate.floor(costs).widths), *measure.samples(costs.candidates, SAMPLES, seed)]
        floor, *others = [importance.best(scores, u) for u in units]
        with watch.stage("time the dense network and the floor"):
            floor_ms = bench.anchor(floor)
        with watch.stage("time some networks between") as progress:  # they correct predictions: one session will do
            measured = [floor_ms, *bench.time(others, progress)]
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
    aims: Sequence[Aim],
    scores: Importance,
    allocator: Allocator,
    watch: Watch,
    size_bytes: float | None = None,
) -> Chosen:
    """Solve, build, measure, correct and solve again, until what is measured meets every budget.

    Args:
        aims: the target and its latency; further targets that the same network has to satisfy.
        scores: group -> (width,).
        allocator: chooses the widths.
        watch: who is told.
        size_bytes: of the exported file, at most.
    Raises:
        UnreachableBudget: no plan that was tried meets them; the message holds what was measured.
    """
    tries: list[Try] = []
    bias = [1.0] * len(aims)
    with watch.stage("find a plan that holds on the device") as progress:
        for attempt in range(TRIES):
            progress(attempt, TRIES)
            before = [aim.bench.calm_ms for aim in aims]
            budgets = [aim.wanted_ms * (1 - sum(_window(aims)) / 2) / b for aim, b in zip(aims, bias, strict=True)]
            plan = within_reach(aims, scores, allocator, budgets, size_bytes)
            tries.append(_tried(plan, aims, importance.best(scores, plan.widths), size_bytes))
            bias = [_bias(tries, aims, at) for at in range(len(aims))]
            calmer = any(aim.bench.calm_ms < ms * (1 - DISTURBED) for aim, ms in zip(aims, before, strict=True))
            if calmer and attempt < TRIES - 1:
                tries.clear()  # what was measured until now was disturbed
            elif tries[-1].enough or (len(tries) > 1 and tries[-1].plan.widths == tries[-2].plan.widths):
                break  # or the widths on offer have no plan between
    if not any(t.fits for t in tries) and len(aims) == 1:  # of several targets, each has a floor of its own
        tries.append(_smallest(aims, scores, size_bytes))
    good = [t for t in tries if t.fits]
    if not good:
        raise UnreachableBudget(_out_of_reach(tries, aims, size_bytes))
    best = max(good, key=lambda t: max(_shares(t.each_ms, aims)))
    under = 1 - max(_shares(best.each_ms, aims))
    spare = under > WASTE and not best.enough
    note = f"{under:.1%} under the budget: the widths on offer have no plan between" if spare else ""
    attempts = tuple(Measured(t.plan.widths, t.plan.predicted_ms, t.each_ms[0]) for t in tries)
    return Chosen(best.plan, best.keep, best.each_ms[0], attempts, note, best.each_ms[1:])


@dataclass(frozen=True)
class Try:
    """A plan as measured."""

    plan: Plan
    keep: Keep
    each_ms: tuple[float, ...]  # on each target
    size_bytes: int
    fits: bool
    enough: bool  # it fits, and one of the budgets is used up


def _tried(plan: Plan, aims: Sequence[Aim], keep: Keep, size_bytes: float | None) -> Try:
    window = _window(aims)
    measured = [_confirmed(aim.bench, keep, (aim.wanted_ms * (1 - window[1]), aim.wanted_ms)) for aim in aims]
    each_ms, size = tuple(ms for ms, _ in measured), measured[0][1]
    used, window = max(_shares(each_ms, aims)), _window(aims)
    fits = used <= 1 - window[0] and (size_bytes is None or size <= size_bytes)
    full = size_bytes is not None and size >= size_bytes * (1 - UNUSED)
    return Try(plan, keep, each_ms, size, fits, fits and (full or used >= 1 - window[1]))


def _bias(tries: Sequence[Try], aims: Sequence[Aim], at: int) -> float:
    """How far a target's predictions are off around its budget: the mean of the two nearest plans, for one is noisy."""
    aim = aims[at]
    near = sorted(tries, key=lambda t: abs(t.each_ms[at] / aim.wanted_ms - 1))[:2]
    return statistics.fmean(t.each_ms[at] / aim.costs.predict_ms(t.plan.widths) for t in near)


def _window(aims: Sequence[Aim]) -> tuple[float, float]:
    """How far under its budget a plan may be measured, by the noise that was seen so far."""
    near = max(max(CLOSE, NOISY * aim.bench.error_of(aim.wanted_ms), CALL_MS / aim.wanted_ms) for aim in aims)
    return near, near + UNUSED - 2 * CLOSE


def _smallest(aims: Sequence[Aim], scores: Importance, size_bytes: float | None) -> Try:
    """The floor: a budget just above it leaves no room to aim below, so here the budget itself is what counts."""
    plan = allocate.floor(aims[0].costs)
    found = _tried(plan, aims, importance.best(scores, plan.widths), size_bytes)
    small = size_bytes is None or found.size_bytes <= size_bytes
    return replace(found, fits=small and max(_shares(found.each_ms, aims)) <= 1)


def _shares(each_ms: Sequence[float], aims: Sequence[Aim]) -> list[float]:
    return [ms / aim.wanted_ms for ms, aim in zip(each_ms, aims, strict=True)]


def _out_of_reach(tries: Sequence[Try], aims: Sequence[Aim], size_bytes: float | None) -> str:
    nearest = min(tries, key=lambda t: max(_shares(t.each_ms, aims)))
    wanted = " and ".join(f"{aim.wanted_ms:.4g} ms{_on(aim, aims)}" for aim in aims)
    found = " and ".join(f"{ms:.4g} ms{_on(aim, aims)}" for ms, aim in zip(nearest.each_ms, aims, strict=True))
    if size_bytes is not None:
        wanted += f" and {size_bytes / 1e6:.4g} MB"
        found += f" and {nearest.size_bytes / 1e6:.4g} MB"
    return (
        f"no plan met {wanted} in {len(tries)} attempts; the nearest was measured at {found}. The device may be busy: "
        "try again, or raise the budget."
    )


def _on(aim: Aim, aims: Sequence[Aim]) -> str:
    return f" on {aim.bench.target.name}" if len(aims) > 1 else ""


def _confirmed(bench: Bench, keep: Keep, between: tuple[float, float]) -> tuple[float, int]:
    """A network's latency and size; one that is where it should be is measured once more, for of several tries the
    luckiest would be taken."""
    with bench.built([keep]) as artifacts:
        (first,) = bench.timed(artifacts, settled=True, between=between)
        if not between[0] <= first <= between[1]:
            return first, artifacts[0].size_bytes
        (second,) = bench.timed(artifacts, settled=True)
        return max(second, (first + second) / 2), artifacts[0].size_bytes


def within_reach(
    aims: Sequence[Aim],
    scores: Importance,
    allocator: Allocator,
    budgets: Sequence[float],
    size_bytes: float | None = None,
) -> Plan:
    """The allocator's plan for predicted budgets; the floor where they have fallen below it."""
    limits = further_limits(aims, budgets, size_bytes)
    try:
        return allocator(aims[0].costs, scores, budgets[0], limits)
    except UnreachableBudget:
        if limits:
            raise
        return allocate.floor(aims[0].costs)


def further_limits(aims: Sequence[Aim], budgets: Sequence[float], size_bytes: float | None) -> list[Limit]:
    """What a plan has to meet besides the first target's latency: further targets' latencies, the file's size."""
    first, *others = aims
    limits = [
        aim.costs.limit(f"latency on {aim.bench.target.name} in ms", budget)
        for aim, budget in zip(others, budgets[1:], strict=True)
    ]
    if size_bytes is not None:
        layers, dense_bytes = first.bench.graph.layers, first.bench.dense.size_bytes
        limits.append(size_limit(layers, first.costs.candidates, first.costs.dense, dense_bytes, size_bytes))
    return limits


def schedule(dense_ms: float, wanted_ms: float, steps: int) -> list[float]:
    """Budgets of each step, geometric from dense to wanted (HALP, arXiv 2210.06659)."""
    return [float(dense_ms ** (1 - k / steps) * wanted_ms ** (k / steps)) for k in range(1, steps + 1)]
