"""Measure latencies that can be compared: everything in turn, preempted visits discarded, repeated until sure.

What is measured one after the other drifts apart with the machine; what is measured in turn drifts together.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

MIN_VISIT_S = 0.0005  # a visit repeats a run until the clock can resolve it
RUNS_PER_VISIT = 3
OFTEN, SHARE, SHORT_S = 4, 0.25, 0.01  # see `_times_a_round`
PREEMPTED = 0.95  # processor time / wall time of a run below this: something else ran on our processor


def in_turn(
    runs: Sequence[Callable[[], Any]],
    threads: int,
    least: int,
    most: int,
    interval: float,
    budget_s: float,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Time each callable in round robin, in an order shuffled every round.

    Args:
        runs: what to time; each has been run before.
        threads: how many threads they use: their processor time says whether they had the processors to themselves.
        least, most: bounds on the undisturbed visits of each.
        interval: stop one when the 95 % interval of its median is this narrow, relative to the median.
        budget_s: stop after this long in any case, once each has `least`, disturbed ones included.
    Returns:
        For each: median_ms, p10_ms, p90_ms, runs, samples_ms (one a visit), interval (reached), disturbed (visits).
    """
    each = [functools.partial(_visit, run, threads) for run in runs]
    return visited_in_turn(each, least, most, interval, budget_s, seed)


def visited_in_turn(
    visit: Sequence[Callable[[], tuple[float, bool, int]]],
    least: int,
    most: int,
    interval: float,
    budget_s: float,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The same for what times itself: each gives seconds, whether it was undisturbed, and how often it ran."""
    order = np.random.RandomState(seed)
    visits: list[list[tuple[float, bool]]] = [[] for _ in visit]  # (milliseconds, undisturbed)
    counts, took_s = [0] * len(visit), [0.0] * len(visit)
    often: list[int] = []  # a round; known after the first one
    began = time.perf_counter()
    while True:
        times = often or [1] * len(visit)
        late = time.perf_counter() - began > budget_s
        bounds = [(1 + (least - 1) * n, 1 + (most - 1) * n) for n in times]  # the first round had one visit
        open_ = [i for i, v in enumerate(visits) if _wants_more(v, *bounds[i], interval, late)]
        if not open_:
            break
        for i in order.permutation(np.repeat(open_, [times[i] for i in open_])):
            start = time.perf_counter()
            seconds, clean, ran = visit[i]()
            took_s[i] = time.perf_counter() - start
            counts[i] += ran
            visits[i].append((seconds * 1000.0, clean))
        often = often or _times_a_round(took_s)
    return [summary(_kept(v, least), counts[i], sum(not clean for _, clean in v)) for i, v in enumerate(visits)]


def _times_a_round(took_s: Sequence[float]) -> list[int]:
    """How often to visit each, by how long that takes: what is fast beside something slow, several times.

    What disturbs a machine comes and goes within a second; a fast one would see little of it, and another part each
    time. Short visits count as SHORT_S; all of one's together take at most SHARE of the longest.
    """
    longest_s = max(took_s, default=0.0)
    return [min(max(int(SHARE * longest_s / max(one_s, SHORT_S)), 1), OFTEN) for one_s in took_s]


def take_off(found: dict[str, Any], call_ms: float) -> None:
    """Subtract what calling the runtime takes from a timing; a layer takes at least a hundredth of its reading."""
    for key in ("median_ms", "p10_ms", "p90_ms"):
        found[key] = max(found[key] - call_ms, found[key] / 100.0)
    found["samples_ms"] = [max(s - call_ms, s / 100.0) for s in found["samples_ms"]]


def scale(found: dict[str, Any], share: float) -> None:
    """Keep a share of a timing."""
    for key in ("median_ms", "p10_ms", "p90_ms"):
        found[key] *= share
    found["samples_ms"] = [s * share for s in found["samples_ms"]]


def _visit(run: Callable[[], Any], threads: int) -> tuple[float, bool, int]:
    """One warm run, then the median of a few; was the processor ours in one of them?

    When it was in none, the processor time that they took: what others did meanwhile is not in it, though they left
    their data in the caches.
    """
    run()
    runs: list[tuple[float, float]] = []  # (wall, processor) seconds
    began = time.perf_counter()
    while len(runs) < RUNS_PER_VISIT or time.perf_counter() - began < MIN_VISIT_S:
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        runs.append((wall, cpu))
    ours = [wall for wall, cpu in runs if threads > 1 or cpu >= PREEMPTED * wall]
    return float(np.median(ours or [cpu for _, cpu in runs])), bool(ours), len(runs) + 1


def _wants_more(visits: list[tuple[float, bool]], least: int, most: int, interval: float, late: bool) -> bool:
    if late:
        return len(visits) < least
    clean = [ms for ms, undisturbed in visits if undisturbed]
    return len(clean) < least or (len(clean) < most and width(clean) > interval)


def _kept(visits: list[tuple[float, bool]], least: int) -> list[float]:
    """The undisturbed visits; all of them where the machine was never quiet for long enough."""
    clean = [ms for ms, undisturbed in visits if undisturbed]
    return clean if len(clean) >= least else [ms for ms, _ in visits]


def width(samples: Sequence[float]) -> float:
    """Relative half-width of the 95 % interval of the median, from the median absolute deviation."""
    values = np.asarray(samples)
    middle = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - middle)))
    return float(1.96 * 1.2533 * spread / (middle * np.sqrt(len(values))))


def summary(samples: Sequence[float], runs: int, disturbed: int) -> dict[str, Any]:
    """A timing from the milliseconds of its visits, in time order."""
    p10, median, p90 = (float(np.percentile(samples, q)) for q in (10, 50, 90))
    return {
        "median_ms": median,
        "p10_ms": p10,
        "p90_ms": p90,
        "runs": runs,
        "samples_ms": list(samples),
        "interval": width(samples),
        "disturbed": disturbed,
    }
