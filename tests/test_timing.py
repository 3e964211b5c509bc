"""Timing in turn on a processor that is a formula: what others take of it is known, and must not be in the result."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from edgeprune.profilers import machine, timing

OWN_S, OTHERS_S = 0.002, 0.005  # of one run
LIMITS = {"least": 7, "most": 60, "interval": 0.01, "budget_s": 1.0}


class Processor:
    """Takes the place of the module `time`: what runs here takes processor time, what others run only wall time."""

    def __init__(self) -> None:
        self.wall_s, self.own_s, self.runs = 0.0, 0.0, 0

    def perf_counter(self) -> float:
        return self.wall_s

    def process_time(self) -> float:
        return self.own_s

    def run(self, own_s: float, others_s: float) -> None:
        self.own_s += own_s
        self.wall_s += own_s + others_s
        self.runs += 1


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Processor:
    made = Processor()
    monkeypatch.setattr(timing, "time", made)
    return made


VISIT = 1 + timing.RUNS_PER_VISIT  # runs: the first is not timed


def test_visits_that_others_disturbed_are_discarded_and_made_again(processor: Processor) -> None:
    """The runs of a disturbed visit are slower too: others left their data in the caches."""

    def run() -> None:
        preempted = processor.runs // VISIT in (0, 3, 4)
        processor.run(1.5 * OWN_S if preempted else OWN_S, OTHERS_S if preempted else 0.0)

    (found,) = timing.in_turn([run], 1, **LIMITS)
    assert found["samples_ms"] == pytest.approx([1e3 * OWN_S] * LIMITS["least"])
    assert found["median_ms"] == pytest.approx(1e3 * OWN_S)
    assert found["disturbed"] == 3
    assert found["runs"] == VISIT * (LIMITS["least"] + 3)


def test_a_visit_counts_by_those_of_its_runs_that_nobody_disturbed(processor: Processor) -> None:
    def run() -> None:
        processor.run(OWN_S, OTHERS_S if processor.runs % VISIT in (1, 2) else 0.0)

    (found,) = timing.in_turn([run], 1, **LIMITS)
    assert found["samples_ms"] == pytest.approx([1e3 * OWN_S] * LIMITS["least"])
    assert found["disturbed"] == 0


def test_on_a_processor_that_is_never_free_the_time_that_was_ours_counts_and_the_visits_are_said_to_be_disturbed(
    processor: Processor,
) -> None:
    def run() -> None:
        processor.run(OWN_S, OTHERS_S)

    (found,) = timing.in_turn([run], 1, **LIMITS)
    assert found["median_ms"] == pytest.approx(1e3 * OWN_S)
    assert found["disturbed"] == len(found["samples_ms"]) >= LIMITS["least"]
    assert processor.wall_s < LIMITS["budget_s"] + VISIT * (OWN_S + OTHERS_S), "it ends after its budget all the same"


def test_things_in_turn_are_visited_equally_often_and_one_that_is_sure_no_more(processor: Processor) -> None:
    draw = np.random.Generator(np.random.PCG64(0))
    visited: list[str] = []

    def of(name: str, spread: float) -> tuple[float, bool, int]:
        visited.append(name)
        processor.run(OWN_S, 0.0)
        return OWN_S * (1 + spread * draw.standard_normal()), True, 4

    timing.visited_in_turn([partial(of, "noisy", 0.2), partial(of, "steady", 0.0)], **LIMITS)
    first = visited[: 2 * LIMITS["least"]]
    assert all({a, b} == {"noisy", "steady"} for a, b in zip(first[::2], first[1::2], strict=True))
    assert visited.count("steady") == LIMITS["least"]
    assert visited.count("noisy") == LIMITS["most"]


def test_beside_something_slow_what_is_fast_is_visited_several_times_a_round(processor: Processor) -> None:
    """But takes no more than a quarter of its time, and a visit of less than 10 ms counts as one of 10."""
    visited: list[float] = []

    def of(ms: float) -> tuple[float, bool, int]:
        visited.append(ms)
        processor.run(ms / 1e3, 0.0)
        return ms / 1e3, True, 4

    found = timing.visited_in_turn([partial(of, ms) for ms in (200.0, 100.0, 20.0, 5.0, 0.1)], 7, 60, 0.01, 60.0)
    assert [len(one["samples_ms"]) for one in found] == [7, 7, 13, 25, 25]
    rounds = [visited[at : at + 12] for at in range(5, len(visited), 12)]  # after the first, of five visits
    assert len(rounds) == 6
    assert all(sorted(one) == sorted([200.0, 100.0] + 2 * [20.0] + 4 * [5.0] + 4 * [0.1]) for one in rounds)
    visited.clear()
    timing.visited_in_turn([partial(of, ms) for ms in (39.0, 0.1)], 7, 60, 0.01, 60.0)
    assert visited.count(39.0) == visited.count(0.1) == 7


def half_width(samples: Sequence[float]) -> float:
    """Of the 95 % interval of the median of normal samples, relative: 1.96 standard errors, each sqrt(pi / 2) times
    that of the mean; the deviation from the median absolute one, of which a normal one has 0.6745."""
    middle = statistics.median(samples)
    deviation = statistics.median(abs(s - middle) for s in samples) / 0.6745
    return 1.96 * math.sqrt(math.pi / 2) * deviation / math.sqrt(len(samples)) / middle


@pytest.mark.parametrize("interval", [0.01, 0.03])
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.3])
def test_visits_go_on_until_the_interval_is_narrow_enough_or_the_timing_says_how_wide_it_is(
    processor: Processor, spread: float, interval: float
) -> None:
    drawn = OWN_S * (1 + spread * np.random.Generator(np.random.PCG64(1)).uniform(-1, 1, 60))
    left = iter(drawn)
    (found,) = timing.visited_in_turn([lambda: (float(next(left)), True, 4)], 7, 60, interval, 10.0)
    enough = [n for n in range(7, 61) if half_width(drawn[:n].tolist()) <= interval]
    assert len(found["samples_ms"]) == (enough[0] if enough else 60)
    assert found["interval"] == pytest.approx(half_width(found["samples_ms"]), rel=1e-3)
    assert (found["interval"] <= interval) == bool(enough)


def test_nineteen_of_twenty_intervals_hold_the_true_median() -> None:
    draw = np.random.Generator(np.random.PCG64(2))
    samples = draw.normal(1.0, 0.05, (4000, 60))
    inside = [abs(np.median(each) - 1.0) <= timing.width(each) * np.median(each) for each in samples]
    assert 0.93 <= np.mean(inside) <= 0.97


# ---- a machine that others use -------------------------------------------------------------------------------


@pytest.mark.parametrize(("load", "cores", "busy"), [(1.4, 2, False), (1.6, 2, True), (1.6, 4, False), (3.1, 4, True)])
def test_a_machine_with_more_to_do_than_three_quarters_of_its_cores_says_that_it_is_busy(
    load: float, cores: int, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: cores)
    found = machine.state()
    assert found["load"] == load
    assert [n for n in found["notes"] if "busy" in n] == ([f"busy: load {load} on {cores} cores"] if busy else [])
