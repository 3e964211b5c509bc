"""Floors while compressing: after training every metric is measured on the search split, never on the final one.

A network that breaks a floor is planned again with a larger latency, `back_off` times at most. It can then no longer
meet the budget, and the verdict says so: the run shows what the floor costs, and never passes by leaving it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import metrics, runs
from .runs import Run

FORMAT = "edgeprune.floors/1"
FILE = "floors.json"


@dataclass(frozen=True)
class Try:
    """One trained network."""

    step: int  # whose folder it is in
    budget_ms: float
    measured: Mapping[str, float]  # on the search split; empty when there are no such images
    broken: tuple[str, ...]


def judge(step: int, budget_ms: float, floors: Mapping[str, float], measured: Mapping[str, float]) -> Try:
    """Hold a network's metrics against the floors."""
    return Try(step, budget_ms, measured, tuple(metrics.broken(floors, measured)) if measured else ())


def relaxed(budget_ms: float, start_ms: float) -> float:
    """The next budget to try: half of the speed-up, in proportion, is given back."""
    return math.sqrt(budget_ms * start_ms)


def write(run: Run, tries: Sequence[Try]) -> None:
    run.write(FILE, FORMAT, {"tries": tries})


def read(run: Run) -> tuple[Try, ...]:
    """What was tried; nothing where no floor was asked for."""
    content = run.read(FILE, FORMAT)["tries"] if run.has(FILE) else []
    return tuple(runs.as_record(Try, item) for item in content)


def last_step(run: Run, steps: int) -> int:
    """The step whose network is the run's."""
    tries = read(run)
    return tries[-1].step if tries else steps


def notes(run: Run) -> list[str]:
    """What a reader of the verdict should know."""
    tries = read(run)
    found = []
    if len(tries) > 1:
        first = "; ".join(tries[0].broken)
        found.append(
            f"backed off from {tries[0].budget_ms:.4g} ms to {tries[-1].budget_ms:.4g} ms for a floor (search split: "
            f"{first})"
        )
    if tries and tries[-1].broken:
        found.append(f"on the search split, too: {'; '.join(tries[-1].broken)}")
    if tries and not tries[-1].measured:
        found.append("the floors could not be looked at while compressing: there are no search images")
    return found
