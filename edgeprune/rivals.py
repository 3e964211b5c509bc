"""What a strategy's plan buys: beside it the exact and the uniform plan of the same predicted latency, judged alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from . import allocators, importance
from .asked import Asked
from .importance import Importance
from .planning import Aim, Chosen
from .runs import Run, as_record
from .search import Subject
from .watch import Watch

FORMAT = "edgeprune.rivals/1"
NAME = "rivals.json"
PLAIN = ("knapsack", "uniform")  # strategies that judge nothing


@dataclass(frozen=True)
class Rival:
    """A plan, timed in turn with the others; loss and accuracy are of the search split, as cut, not yet trained."""

    strategy: str
    widths: Mapping[str, int]
    predicted_ms: float
    measured_ms: float
    loss: float
    accuracy: float


def compare(subject: Subject, scores: Importance, aim: Aim, chosen: Chosen, asked: Asked, watch: Watch) -> list[Rival]:
    """The chosen plan and its rivals; kept in the subject's folder.

    Args:
        subject: the network; its scores rank the rivals' channels.
        scores: by which the strategy ranks channels.
        aim: where they are timed.
        chosen: the strategy's plan.
        asked: its name and settings.
        watch: who is told.
    """
    costs, plan = aim.costs, chosen.plan
    plans = [(asked.strategy, replace(subject, scores=scores), dict(plan.widths))]
    for name in PLAIN:
        widths = allocators.named(name)(costs, subject.scores, plan.predicted_ms, ()).widths
        plans.append((name, subject, dict(widths)))
    settings = asked.search or asked.soft or asked.magnitude
    assert settings is not None  # of a strategy that judges networks
    with watch.stage("judge the knapsack's plan and uniform widths beside it") as progress:
        keeps = [importance.best(of.scores, widths) for _, of, widths in plans]
        measured = aim.bench.time(keeps)
        found = []
        for at, ((name, of, widths), ms) in enumerate(zip(plans, measured, strict=True)):
            progress(at, len(plans))
            judged = of.judge(widths, settings.images)
            found.append(Rival(name, widths, costs.predict_ms(widths), ms, judged.loss, judged.accuracy))
    subject.run.write(NAME, FORMAT, {"rivals": found})
    return found


def read(run: Run, step: int) -> list[Rival]:
    """Of a step; none where it is not the last, or its strategy judges nothing."""
    name = f"step-{step}/{NAME}"
    return [as_record(Rival, r) for r in run.read(name, FORMAT)["rivals"]] if run.has(name) else []


def last(run: Run) -> list[Rival]:
    """Of the last step that has some."""
    steps = [int(path.parent.name.removeprefix("step-")) for path in run.folder.glob(f"step-*/{NAME}")]
    return read(run, max(steps)) if steps else []
