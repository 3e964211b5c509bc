"""What a run folder holds, read for its page: parts that no stage has written are None or empty."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .. import finetune, pipeline, planning, rivals, runs, verify
from ..errors import RunError
from ..finetune import Epoch
from ..planning import Chosen, Preflight
from ..records import LayerRow, VerifyReport
from ..rivals import Rival
from ..runs import Run
from ..table import Correction

Json = dict[str, Any]


@dataclass(frozen=True)
class GroupRow:
    """Units of one channel group; `dense` is None where the folder does not say."""

    id: str
    dense: int | None
    kept: int


@dataclass(frozen=True)
class Layers:
    """layers.json: in network order. `correction` leads from the sum of the layers to the whole network."""

    rows: tuple[LayerRow, ...]
    groups: tuple[GroupRow, ...]
    correction: Correction | None


@dataclass(frozen=True)
class Step:
    """One step of the schedule; accuracies are of the search split, None when unknown."""

    chosen: Chosen
    budget_ms: float
    before: float | None
    cut: float | None
    epochs: tuple[Epoch, ...]
    rivals: tuple[Rival, ...]  # the step's plan and the plain ones beside it, of strategies that judge networks


@dataclass(frozen=True)
class Prediction:
    """A whole network, predicted and measured."""

    kind: str
    name: str
    predicted_ms: float
    measured_ms: float


@dataclass(frozen=True)
class Found:
    """All of it."""

    report: VerifyReport
    asked: Json  # run.json
    preflight: Preflight | None
    filled: Json  # of table.json
    layers: Layers
    steps: tuple[Step, ...]


def read(run: Run) -> Found:
    """Read a finished run.

    Raises:
        RunError: it has not been verified, or one of its files is damaged.
    """
    if not run.has("verify.json"):
        raise RunError(
            f"{run.folder} holds no verify.json: the run is not finished; go on with `edgeprune compress --resume`"
        )
    preflight = _optional(run, "preflight.json", planning.PREFLIGHT)
    layers: Json = {"rows": [], "groups": [], "correction": None} | _optional(run, "layers.json", pipeline.LAYERS)
    return Found(
        report=runs.as_record(VerifyReport, run.read("verify.json", verify.FORMAT)),
        asked=_optional(run, "run.json", runs.RUN),
        preflight=runs.as_record(Preflight, preflight) if preflight else None,
        filled=_optional(run, "table.json", pipeline.FILLED).get("filled", {}),
        layers=runs.as_record(Layers, layers),
        steps=tuple(_steps(run)),
    )


def _steps(run: Run) -> Iterator[Step]:
    number = 1
    while run.has(f"step-{number}/plan.json"):
        plan = run.read(f"step-{number}/plan.json", pipeline.STEP)
        accuracy = plan.get("accuracy", {})
        epochs = _optional(run, f"step-{number}/epochs.json", finetune.FORMAT).get("epochs", [])
        yield Step(
            chosen=runs.as_record(Chosen, plan["chosen"]),
            budget_ms=plan["budget_ms"],
            before=_known(accuracy.get("before")),
            cut=_known(accuracy.get("cut")),
            epochs=tuple(runs.as_record(Epoch, epoch) for epoch in epochs),
            rivals=tuple(rivals.read(run, number)),
        )
        number += 1


def _known(share: float | None) -> float | None:
    """A user's own `evaluate` may answer anything; what is not a number was not measured."""
    return share if share is not None and math.isfinite(share) else None


def _optional(run: Run, name: str, format_name: str) -> Json:
    return run.read(name, format_name) if run.has(name) else {}


def groups(found: Found) -> tuple[GroupRow, ...]:
    """Every channel group in network order; without layers.json only what is kept is known."""
    if found.layers.groups or not found.steps:
        return found.layers.groups
    return tuple(GroupRow(group, None, kept) for group, kept in found.steps[-1].chosen.plan.widths.items())


def predictions(found: Found) -> Iterator[Prediction]:
    """Every whole network that was predicted and measured, in time order; the result is the last one."""
    for number, network in enumerate(found.preflight.networks if found.preflight else ()):
        name = f"sample {number}" if number else "floor"
        yield Prediction("before correction", name, network.predicted_ms, network.measured_ms)
    for step in found.steps:
        for number, network in enumerate(step.chosen.attempts, 1):
            yield Prediction("corrected", f"attempt {number}", network.predicted_ms, network.measured_ms)
    report = found.report
    yield Prediction("verified", "the result", report.predicted_ms, report.pruned.latency.median_ms)
