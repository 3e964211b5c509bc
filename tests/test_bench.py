"""Whole networks timed in sessions, on devices that are formulas: how long each session takes is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_allocate import Residual, made_up

from edgeprune import allocate, measure, planning
from edgeprune import bench as benches
from edgeprune.bench import Bench
from edgeprune.errors import UsageError
from edgeprune.records import Keep, Timing
from edgeprune.runs import Run
from edgeprune.watch import Silent


class Made(Bench):
    """Its device is made up: `time` is what a target's would be. The dense network took 10 ms so far."""

    def __init__(self, sessions: int = 1, patience_s: float = 0.0) -> None:
        self.dense: Any = self
        self.floor: Any = None
        self.target: Any = self
        self.reference_ms, self.floor_ms = 10.0, 0.0
        self.dense_ms, self.spreads = [10.0] * sessions, []
        self.patience_s, self.patient = patience_s, True


class Sessions(Made):
    """Times the networks as it is told, session by session."""

    def __init__(self, *sessions: tuple[float, ...]) -> None:
        super().__init__(sessions=9)
        self.left = list(sessions)

    def time(self, items: Sequence[Any], *bounds: float) -> list[Timing]:
        return [Timing(ms, ms, ms, 1, (ms,), 0.0) for ms in self.left.pop(0)] * (len(items) // 2)


def test_a_session_in_which_the_dense_network_was_slower_than_before_is_held_again() -> None:
    bench = Sessions((12.0, 9.0), (10.1, 5.05), (10.0, 1.0))
    assert bench.timed([None]) == pytest.approx([5.0])
    assert len(bench.left) == 1
    assert len(bench.spreads) == 2


def test_on_a_device_that_stays_busy_the_least_disturbed_of_three_sessions_counts() -> None:
    bench = Sessions((12.0, 9.0), (11.0, 5.5), (13.0, 9.0), (10.0, 1.0))
    assert bench.timed([None]) == pytest.approx([5.0])
    assert len(bench.left) == 1
    assert len(bench.spreads) == 2


class Copies(Made):
    """Two networks, of 10 and 5 ms, whose copies lie `apart`, at random."""

    def __init__(self, apart: float, draw: np.random.Generator) -> None:
        super().__init__()
        self.apart, self.draw, self.sessions = apart, draw, 0

    def time(self, items: Sequence[Any], *bounds: float) -> list[Timing]:
        self.sessions += 1
        each = [ms * self.draw.normal(1, self.apart) for ms in [10.0, 5.0] * (len(items) // 2)]
        return [Timing(ms, ms, ms, 1, (ms,), 0.0) for ms in each]


@pytest.mark.parametrize(("apart", "sessions"), [(0.001, 2), (0.007, 3), (0.03, measure.SESSIONS)])
def test_where_copies_differ_more_a_settled_measurement_takes_more_of_them(
    apart: float, sessions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its error is what `error` says: of a ratio of two, the root of twice its square."""
    monkeypatch.setattr(benches, "DISTURBED", 10.0)
    bench = Copies(apart, np.random.Generator(np.random.PCG64(0)))
    found = []
    for _ in range(400):
        bench.spreads = [(10.0, apart), (5.0, apart)] * 50
        found.append(bench.timed([None], settled=True)[0])
    assert bench.sessions == 400 * sessions
    assert float(np.std(found)) / 5.0 == pytest.approx(2**0.5 * bench.error_of(5.0), rel=0.2)
    assert bench.error_of(5.0) <= measure.SETTLED or sessions == measure.SESSIONS


def test_a_network_is_as_uncertain_as_those_of_about_its_latency() -> None:
    bench = Copies(0.0, np.random.Generator(np.random.PCG64(0)))
    bench.spreads = [(10.0, 0.003), (5.0, 0.004), (0.5, 0.02)] * 20
    assert bench.noise_of(4.0) == 0.004
    assert bench.noise_of(0.9) == 0.02
    assert bench.error_of(4.0) < bench.error_of(0.9)
    assert bench.noise_of(0.01) == bench.noise_of(0.9)


@pytest.mark.parametrize(("between", "sessions"), [((4.9, 5.1), 8), ((5.0, 9.0), 8), ((5.4, 6.0), 1), ((4.0, 4.6), 1)])
def test_a_network_that_is_plainly_off_is_not_measured_on(
    between: tuple[float, float], sessions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 5 ms, and one session is within 1.5 % of that with two of three: 5.4 is eight in a hundred above."""
    monkeypatch.setattr(benches, "DISTURBED", 10.0)
    held = []
    for seed in range(50):
        bench = Copies(0.015, np.random.Generator(np.random.PCG64(seed)))
        bench.spreads = [(10.0, 0.015), (5.0, 0.015)] * 50
        bench.timed([None], settled=True, between=between)
        held.append(bench.sessions)
    assert np.median(held) == sessions


class Disturbed(Made):
    """Networks of `ms`; from one session to the next all take a share longer and a time besides, both at random.

    Nothing else differs, not between copies either. The dense network and the floor are the first two.
    """

    def __init__(self, *ms: float, share: float = 0.0, besides_ms: float = 0.0) -> None:
        super().__init__()
        self.ms, self.share, self.besides_ms = (10.0, *ms), share, besides_ms
        self.draw, self.sessions = np.random.Generator(np.random.PCG64(0)), 0

    def time(self, items: Sequence[Any], *bounds: float) -> list[Timing]:
        self.sessions += 1
        share, besides_ms = self.draw.normal(1.0, self.share), self.draw.normal(0.0, self.besides_ms)
        each = [ms * share + besides_ms for ms in self.ms[: len(items) // measure.COPIES]]
        return [Timing(ms, ms, ms, 1, (ms,), 0.0) for ms in each] * measure.COPIES


def test_what_disturbs_every_network_is_seen_by_the_dense_one_and_the_floor_and_taken_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The floor is off by 10 %, the dense network by 3 %."""
    monkeypatch.setattr(benches, "DISTURBED", 10.0)
    bench = Disturbed(1.0, 1.0, 1.02, 3.0, 9.0, 10.0, share=0.03, besides_ms=0.1)
    bench.floor, bench.floor_ms = bench, 1.0
    for _ in range(20):
        assert bench.timed([None] * 5) == pytest.approx([1.0, 1.02, 3.0, 9.0, 10.0], rel=1e-9)
    bench.floor, bench.floor_ms, bench.ms = None, 0.0, (10.0, 1.0)
    assert max(bench.timed([None])[0] for _ in range(20)) > 1.1


def test_where_there_is_no_floor_a_latency_is_divided_by_that_of_the_dense_network() -> None:
    bench = Sessions((10.1, 5.05, 10.1))
    assert bench.timed([None, None]) == pytest.approx([5.0, 10.0])


@pytest.mark.parametrize("floor_ms", [10.0, 12.0])
def test_a_floor_that_is_no_faster_than_the_dense_network_does_no_harm(floor_ms: float) -> None:
    bench = Sessions((10.1, 1.01 * floor_ms, 1.01 * floor_ms, 10.1))
    bench.floor, bench.floor_ms = bench, floor_ms
    assert bench.timed([None, None]) == pytest.approx([floor_ms, 10.0])


def test_the_floor_is_measured_until_it_is_settled_and_is_a_reference_from_then_on(tmp_path: Path) -> None:
    bench = Disturbed(1.0, 1.5, besides_ms=0.05)
    bench.folder = tmp_path
    bench.cut = lambda keep, folder: bench  # type: ignore[method-assign]
    floor_ms = bench.anchor({})
    assert bench.sessions == measure.SESSIONS
    assert 0.9 < floor_ms == bench.floor_ms < 1.1
    found = [bench.timed([None])[0] for _ in range(9)]
    assert np.ptp(found) < 1e-9
    again = Disturbed(1.0, 1.5, besides_ms=0.05)
    again.folder, again.cut = tmp_path, bench.cut  # type: ignore[method-assign]
    again.refer(bench.reference_ms, bench.noise, {}, floor_ms)
    assert again.timed([None]) == pytest.approx(found[:1])


def test_sessions_that_lie_further_apart_than_copies_ask_for_more_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a settled measurement is as uncertain as it says, though copies agree in every session."""
    monkeypatch.setattr(benches, "DISTURBED", 10.0)
    bench = Disturbed(2.0, besides_ms=0.06)
    for _ in range(20):
        bench.timed([None], settled=True)  # what it has seen
    bench.sessions = 0
    found = [bench.timed([None], settled=True)[0] for _ in range(200)]
    assert bench.sessions == 200 * measure.SESSIONS
    assert float(np.std(found)) / 2.0 == pytest.approx(math.sqrt(2) * bench.error_of(2.0), rel=0.25)
    calm = Disturbed(2.0)
    assert calm.timed([None], settled=True) == pytest.approx([2.0])
    assert calm.sessions == benches.TWICE


class Loaded(Copies):
    """Any number of networks; knows how many there were in each session."""

    def __init__(self) -> None:
        super().__init__(0.03, np.random.Generator(np.random.PCG64(0)))
        self.reference_ms, self.dense_ms, self.held = 0.0, [], list[int]()
        self.target = SimpleNamespace(time=self.visited)
        self.folder = Path()

    def cut(self, keep: Keep, folder: Path) -> Any:
        return keep

    time = Bench.time

    def visited(self, items: Sequence[Any], *bounds: float) -> list[Timing]:
        self.held.append(len(items) // measure.COPIES)
        each = [(10.0 if item is self else 5.0) * self.draw.normal(1, self.apart) for item in items]
        return [Timing(ms, ms, ms, 1, (ms,), 0.0) for ms in each]


def test_the_floor_is_timed_until_it_is_settled_and_what_only_corrects_predictions_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benches, "DISTURBED", 10.0)
    _, costs, scores = made_up(Residual(), choices=8)
    bench = Loaded()
    start, _ = planning.preflight(bench, costs, scores, Run(tmp_path), Silent(), seed=0)
    assert bench.held == [2] * measure.SESSIONS + [2 + planning.SAMPLES]
    assert dict(start.floor.units) == dict(allocate.floor(costs).widths)
    assert start.floor.measured_ms / start.dense_ms == pytest.approx(0.5, rel=0.04)


class Clock:
    """Time passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Busy(Made):
    """The dense network takes 12 ms for the first minute, then 10; the other one half as long, and 8 ms at first."""

    def __init__(self, clock: Clock, patience_s: float) -> None:
        super().__init__(99, patience_s)
        self.clock = clock

    def time(self, items: Sequence[Any], *bounds: float) -> list[Timing]:
        self.clock.sleep(1.0)
        each = (12.0, 8.0) if self.clock.now < 60 else (10.0, 5.0)
        return [Timing(ms, ms, ms, 1, (ms,), 0.0) for ms in (each * len(items))[: len(items)]]


@pytest.mark.parametrize(("patience_s", "found_ms"), [(600.0, 5.0), (20.0, 8 / 1.2)])
def test_disturbed_sessions_are_held_again_until_there_is_no_patience_left(
    patience_s: float, found_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benches, "time", clock := Clock())
    bench = Busy(clock, patience_s)
    assert bench.timed([None]) == pytest.approx([found_ms])
    assert clock.now == pytest.approx(min(patience_s, 60.0), abs=1)
    assert bench.patience_s == pytest.approx(max(patience_s - 60, 0), abs=1)


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_patience_that_is_no_number_of_seconds_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(measure.PATIENCE, text)
    with pytest.raises(UsageError, match=f"EDGEPRUNE_PATIENCE_S={text}: give the seconds"):
        measure.patience_s()


def test_without_patience_each_measurement_is_one_session() -> None:
    bench = Sessions((12.0, 9.0), (10.0, 5.0))
    bench.patient = False
    assert bench.timed([None], settled=True) == pytest.approx([7.5])
    assert len(bench.left) == 1
