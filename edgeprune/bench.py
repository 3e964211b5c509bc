"""Whole networks built and timed, so that latencies of different minutes can be compared.

What else runs on a machine takes small networks longer by a fifth and large ones hardly at all, for seconds or for
minutes. So every network is timed in turn with the largest and the smallest, and read off between them.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from . import measure, surgery
from .graph import ModelGraph
from .records import Artifact, Keep, Progress, Timing
from .target import Target
from .watch import unwatched

ALIKE, TIMES = 16, 2.0  # spreads tell how far copies lie apart: the nearest in latency, up to so many times it
PLAIN = 2.0  # a network this many times its error away from where it should be is not measured on
DISTURBED = 0.015  # a session in which the dense network is slower than this over the calm ones is held again, ...
CALM = 25  # ... the fastest quarter of all sessions, in percent, ...
AGAIN = 2  # ... at most this many of a measurement, and as long as there is patience
TWICE = 2  # sessions at least of a settled measurement: copies in one session are disturbed alike
SESSION_S = 6.0


class Bench:
    """Exports cut networks and times them in turn with the dense one and, once there is one, the floor.

    All latencies are as if these two took what they did at first. A latency between theirs is longer by milliseconds
    that lie between, in proportion: what disturbs a network is partly a share of its time, partly the same for all.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ModelGraph,
        target: Target,
        folder: Path,
        calibration: Sequence[NDArray[Any]] = (),
    ) -> None:
        self.model, self.graph, self.target, self.folder = model, graph, target, folder
        self.calibration = calibration
        self.dense = self.export(model, folder / "dense")
        self.floor: Artifact | None = None
        self.reference_ms, self.floor_ms = 0.0, 0.0  # what they took at first
        self.dense_ms: list[float] = []  # in each session, disturbed or not
        self.spreads: list[tuple[float, float]] = []  # (ms, between copies) of each network, each time it was measured
        self.patience_s = measure.patience_s()  # that is left for disturbed sessions
        self.patient = self.patience_s > 0  # without any, each measurement is one session

    def anchor(self, floor: Keep) -> float:
        """From now on time this network, the smallest, beside the dense one; its milliseconds, settled."""
        self.floor = self.cut(floor, self.folder / "floor")
        self.timed([], settled=True)
        return self.floor_ms

    def refer(self, dense_ms: float, noise: float, floor: Keep, floor_ms: float) -> None:
        """Go on from what an earlier bench measured: latencies are as if the networks took what they did there."""
        self.floor = self.cut(floor, self.folder / "floor")
        self.reference_ms, self.floor_ms = dense_ms, floor_ms
        self.dense_ms.append(dense_ms)
        self.spreads.append((dense_ms, noise))

    @property
    def noise(self) -> float:
        """How far copies of any one network lie apart; one that was disturbed does not count."""
        return statistics.median(spread for _, spread in self.spreads) if self.spreads else 0.0

    def noise_of(self, network_ms: float) -> float:
        """The same of a network of this latency: it is more for small ones."""
        return _alike(network_ms, self.spreads)

    def error_of(self, network_ms: float) -> float:
        """Of a settled measurement, relative: the more the copies differ, the more of them it takes."""
        noise = self.noise_of(network_ms)
        return measure.error(noise, measure.COPIES * _sessions(noise))

    def time(self, keeps: Sequence[Keep], progress: Progress = unwatched, settled: bool = False) -> list[float]:
        """Milliseconds of each cut network, see `timed`."""
        with self.built(keeps, progress) as artifacts:
            return self.timed(artifacts, settled)

    @contextmanager
    def built(self, keeps: Sequence[Keep], progress: Progress = unwatched) -> Iterator[list[Artifact]]:
        """The cut networks as files, for as long as they are needed. Timing them is the last part of the progress."""
        folders = [self.folder / f"plan-{at}" for at in range(len(keeps))]
        try:
            artifacts = []
            for at, (keep, folder) in enumerate(zip(keeps, folders, strict=True)):
                progress(at, len(keeps) + 1)
                artifacts.append(self.cut(keep, folder))
            progress(len(keeps), len(keeps) + 1)
            yield artifacts
        finally:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)

    def cut(self, keep: Keep, folder: Path) -> Artifact:
        return self.export(surgery.cut(self.model, self.graph, keep), folder)

    def export(self, module: nn.Module, folder: Path) -> Artifact:
        return self.target.export(module, self.graph.example, folder, self.calibration)

    @property
    def calm_ms(self) -> float:
        """What the dense network takes where nothing disturbs it, as far as was seen."""
        return float(np.percentile(self.dense_ms, CALM)) if self.dense_ms else math.inf

    def timed(
        self, artifacts: Sequence[Artifact], settled: bool = False, between: tuple[float, float] | None = None
    ) -> list[float]:
        """In one session or, settled, in as many as their spread asks for; the median.

        Sessions in which the dense network is slower than it was are held again: what is read off between two networks
        is less sure where they have moved far.

        Args:
            artifacts: what is timed beside the dense network and the floor.
            settled: until it is as certain as it can become.
            between: ms; as soon as it is plain that no network lies there, no more sessions are held.
        """
        marks = [self.dense] if self.floor is None else [self.dense, self.floor]
        held: list[list[Timing]] = []
        calm: list[list[Timing]] = []
        wanted = TWICE if settled and self.patient else 1
        while len(calm) < wanted and (len(held) < wanted + AGAIN * self.patient or self.patience_s > 0):
            began = time.monotonic()
            held.append(measure.time_networks([*marks, *artifacts], self.target, SESSION_S))
            self.dense_ms.append(held[-1][0].median_ms)
            calm = [timings for timings in held if timings[0].median_ms <= self.calm_ms * (1 + DISTURBED)]
            if held[-1] not in calm:
                self.patience_s -= time.monotonic() - began
            if settled and self.patient and calm:
                seen = [*self.spreads, *self._spreads(calm)]
                noise = max(_alike(timing.median_ms, seen) for timing in calm[-1])
                wanted = _sessions(noise)
                if between and self._outside(calm, between, noise):
                    break
        counted = calm or [min(held, key=lambda timings: timings[0].median_ms)]
        self.spreads += self._spreads(counted)
        self.reference_ms = self._dense_ms(counted)
        found = self._found_ms(counted)
        if self.floor is not None:
            self.floor_ms = self.floor_ms or found[1]
        return found[len(marks) :]

    def _dense_ms(self, sessions: Sequence[Sequence[Timing]]) -> float:
        """What the dense network took at first; these sessions are the first where there was none."""
        return self.reference_ms or statistics.median(timings[0].median_ms for timings in sessions)

    def at_first(self, sessions: Sequence[Sequence[Timing]]) -> list[list[float]]:
        """Milliseconds of every network in each session, as if dense and floor had taken what they did at first."""
        dense_ms = self._dense_ms(sessions)
        found = []
        for timings in sessions:
            each = [timing.median_ms for timing in timings]
            marks = [(each[0], each[0] - dense_ms), (each[1], each[1] - self.floor_ms) if self.floor_ms else (0.0, 0.0)]
            at, longer = zip(*sorted(marks), strict=True)
            found.append([ms - float(np.interp(ms, at, longer)) for ms in each])
        return found

    def _found_ms(self, sessions: Sequence[Sequence[Timing]]) -> list[float]:
        return [statistics.median(of_one) for of_one in zip(*self.at_first(sessions), strict=True)]

    def _outside(self, sessions: Sequence[Sequence[Timing]], between: tuple[float, float], noise: float) -> bool:
        """Whether every network is further from there than two measurements that lie `noise` apart are uncertain."""
        unsure = PLAIN * math.sqrt(2) * measure.error(noise, measure.COPIES * len(sessions))
        low, high = between[0] * (1 - unsure), between[1] * (1 + unsure)
        return not any(low <= ms <= high for ms in self._found_ms(sessions))

    def _spreads(self, sessions: Sequence[Sequence[Timing]]) -> list[tuple[float, float]]:
        """Of each network: how far its copies lie apart, or would have to for sessions to lie as far apart as they do.

        Where the dense network and the floor are what sessions are corrected by, theirs is that of copies.
        """
        found = []
        for at, each_ms in enumerate(zip(*self.at_first(sessions), strict=True)):
            middle_ms, times = statistics.median(each_ms), len(each_ms)
            copies = [measure.spread([timings[at]]) for timings in sessions]
            apart = math.hypot(*copies) / math.sqrt(times) / _middle(times * (measure.COPIES - 1))
            if times > 1:
                between = statistics.stdev(each_ms) / middle_ms / _middle(times - 1)
                apart = max(apart, between / math.sqrt(2) / measure.error(1.0, measure.COPIES))
            found.append((middle_ms, apart))
        return found


def _alike(network_ms: float, seen: Sequence[tuple[float, float]]) -> float:
    """The middle spread of those that were seen of about this latency, or come nearest to it; 0: none was."""
    times = [(max(ms / network_ms, network_ms / ms), spread) for ms, spread in seen]
    nearest = sorted(times, key=lambda one: one[0])[:ALIKE]
    like = [one for one in nearest if one[0] <= TIMES] or nearest
    return statistics.median(spread for _, spread in like) if like else 0.0


def _sessions(noise: float) -> int:
    """How many a settled measurement takes."""
    return max(measure.sessions(noise), TWICE)


def _middle(freedom: int) -> float:
    """The middle one of many standard deviations that samples show, in true ones, by their degrees of freedom.

    Wilson and Hilferty, "The distribution of chi-square", 1931.
    """
    return float((1 - 2 / (9 * freedom)) ** 1.5)
