"""Measure latencies that can be compared: everything in turn, preempted visits discarded, repeated until sure.

What is measured one after the other drifts apart with the machine; what is measured in turn drifts together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

MIN_VISIT_S = 0.0005  # a visit repeats a run until the clock can resolve it
RUNS_PER_VISIT = 3
PREEMPTED = 0.95  # processor time / wall time below this: something else ran on our processor


def in_turn(
    runs: Sequence[Callable[[], Any]],
    threads: int,
    min_visits: int,
    max_visits: int,
    interval: float,
    budget_s: float,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Time each callable in round robin, in an order shuffled every round.

    Args:
        runs: what to time; each has been run before.
        threads: how many threads they use: their processor time says whether they had the processors to themselves.
        min_visits, max_visits: bounds on the undisturbed visits of each.
        interval: stop one when the 95 % interval of its median is this narrow, relative to the median.
        budget_s: stop after this long in any case, once each has `min_visits`.
    Returns:
        For each: median_ms, p10_ms, p90_ms, runs, samples_ms (one a visit), interval (reached), disturbed (visits).
    """
    order = np.random.RandomState(seed)
    samples: list[list[float]] = [[] for _ in runs]
    counts, disturbed = [0] * len(runs), [0] * len(runs)
    began, rounds = time.perf_counter(), 0
    while True:
        rounds += 1
        late = time.perf_counter() - began > budget_s
        open_ = [i for i in range(len(runs)) if _wants_more(samples[i], min_visits, max_visits, interval, late)]
        if not open_ or rounds > 3 * max_visits:
            break
        for i in order.permutation(open_):
            wall_s, clean, ran = _visit(runs[i], threads)
            counts[i] += ran
            if clean or rounds > 2 * max_visits:  # a machine that is never quiet is measured as it is
                samples[i].append(wall_s * 1000.0)
            else:
                disturbed[i] += 1
    return [_summary(s, counts[i], disturbed[i]) for i, s in enumerate(samples)]


def take_off(found: dict[str, Any], call_ms: float) -> None:
    """Subtract what calling the runtime takes from a timing; a layer takes at least a hundredth of its reading."""
    for key in ("median_ms", "p10_ms", "p90_ms"):
        found[key] = max(found[key] - call_ms, found[key] / 100.0)
    found["samples_ms"] = [max(s - call_ms, s / 100.0) for s in found["samples_ms"]]


def _visit(run: Callable[[], Any], threads: int) -> tuple[float, bool, int]:
    """One warm run, then the median of a few; was the processor ours?"""
    run()
    times: list[float] = []
    cpu, wall = time.process_time(), time.perf_counter()
    while len(times) < RUNS_PER_VISIT or time.perf_counter() - wall < MIN_VISIT_S:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    ratio = (time.process_time() - cpu) / (time.perf_counter() - wall)
    clean = ratio >= PREEMPTED if threads == 1 else True
    return float(np.median(times)), clean, len(times) + 1


def _wants_more(samples: list[float], least: int, most: int, interval: float, late: bool) -> bool:
    if len(samples) < least:
        return True
    return len(samples) < most and not late and width(samples) > interval


def width(samples: Sequence[float]) -> float:
    """Relative half-width of the 95 % interval of the median, from the median absolute deviation."""
    values = np.asarray(samples)
    middle = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - middle)))
    return float(1.96 * 1.2533 * spread / (middle * np.sqrt(len(values))))


def _summary(samples: list[float], runs: int, disturbed: int) -> dict[str, Any]:
    p10, median, p90 = (float(np.percentile(samples, q)) for q in (10, 50, 90))
    return {
        "median_ms": median,
        "p10_ms": p10,
        "p90_ms": p90,
        "runs": runs,
        "samples_ms": samples,
        "interval": width(samples),
        "disturbed": disturbed,
    }
