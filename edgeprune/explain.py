"""Why is it not faster? A plan layer by layer: what each costs, where it stands on its staircase, what cannot go."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import nn

from . import allocate, measure, planning, runs, verify, widths
from .allocate import Costs
from .bench import Bench
from .config import INTERVAL, CompressSection
from .graph import Example, ModelGraph, trace
from .planning import Preflight
from .records import FrozenChannels, LayerRow, Operators, VerifyReport
from .runs import Run
from .store import Store
from .table import Surface, follows_input
from .target import Target
from .watch import Watch
from .widths import shape_at

STEP = 0.03  # relative: a latency this much lower is a step down
SAME = 0.01  # relative: one this much higher is none up
FREE = 1.25  # share of latency over share of channels that makes a step down free speed


@dataclass(frozen=True)
class Stairs:
    """Where one width stands, everything else as it is; `wider` and `narrower` are `at` when there is none."""

    at: int
    wider: int  # the widest that costs nothing more
    narrower: int  # the widest that is a step faster
    at_ms: float
    narrower_ms: float


@dataclass(frozen=True)
class Row:
    """One layer by the latency table, and what could become of it."""

    layer: LayerRow
    least_ms: float  # at the least width of all its groups
    stairs: Stairs | None  # over its output channels; None where they are not free


@dataclass(frozen=True)
class GroupRow:
    """One channel group over all layers that it touches."""

    id: str
    dense: int
    stairs: Stairs  # in units


@dataclass(frozen=True)
class Measured:
    """End to end."""

    dense_ms: float
    planned_ms: float
    floor_ms: float | None  # None: no network at the floor was built


@dataclass(frozen=True)
class Explanation:
    rows: tuple[Row, ...]
    groups: tuple[GroupRow, ...]
    untimed: tuple[tuple[str, str], ...]  # (layer, operator) that the target does not time alone
    frozen: tuple[FrozenChannels, ...]
    overhead_ms: float  # of the calibrated prediction: what no layer explains
    predicted_dense_ms: float
    predicted_ms: float
    predicted_floor_ms: float
    measured: Measured
    operators: Operators  # by the runtime's own profiler, of the network that is explained


def explain(
    model: nn.Module,
    example: Example,
    target: Target,
    section: CompressSection,
    store: Store,
    run: Run | None,
    watch: Watch,
    calibration: Sequence[NDArray[Any]] = (),
    interval: float = INTERVAL,
) -> Explanation:
    """Explain the latency of a finished run's network, or of the dense one.

    Args:
        model: the original network.
        example: one input.
        target: where it runs; what the latency table does not hold yet is measured.
        section: protected modules, least widths.
        store: latency measurements.
        run: a finished run; None for the dense network.
        watch: who is told.
        calibration: of every input, some real ones, where exports for the target need them.
        interval: see `measure.fill`.
    """
    section = section if run is None else _as_run(section, run)
    graph = trace(model, example, section.protected)
    blocks = graph.blocks if section.drop_blocks else ()
    candidates = widths.candidates(graph.groups, section.min_width, section.protected, blocks)
    layers = measure.timed(graph.layers, target)
    with watch.stage("measure layers") as progress:
        table, _ = measure.fill(layers, candidates, target, store, progress, interval)
    costs = measure.costs(layers, candidates, table, blocks)
    if run is None:
        dense, inside = _dense(model, graph, target, calibration)
        return _explained(graph, costs, costs.dense, Measured(dense, dense, None), inside)
    start = runs.as_record(Preflight, run.read("preflight.json", planning.PREFLIGHT))
    report = runs.as_record(VerifyReport, run.read("verify.json", verify.FORMAT))
    known = [(n.units, n.measured_ms) for n in start.networks] + [(costs.dense, start.dense_ms)]
    kept = runs.keep_of(run.read("recipe.json", runs.RECIPE)["keep"])
    units = {**costs.dense, **{g: len(u) for g, u in kept.items()}}
    ms = Measured(report.dense.latency.median_ms, report.pruned.latency.median_ms, start.floor.measured_ms)
    inside = target.operators(run.path("artifact"))
    return _explained(graph, measure.calibrate(costs, known)[0], units, ms, inside)


def free_speed(stairs: Stairs) -> bool:
    """The step down saves a clearly larger share of the latency than of the channels."""
    return stairs.narrower < stairs.at and saved_share(stairs) > FREE * (1 - stairs.narrower / stairs.at)


def saved_share(stairs: Stairs) -> float:
    """What going a step down saves, of the latency."""
    return 1 - stairs.narrower_ms / stairs.at_ms if stairs.at_ms else 0.0


def _as_run(section: CompressSection, run: Run) -> CompressSection:
    """With the settings that decided which widths the run could choose."""
    asked = run.read("run.json", runs.RUN)["asked"]
    return section.model_copy(update={key: asked[key] for key in ("protected", "min_width", "drop_blocks")})


def _dense(
    model: nn.Module, graph: ModelGraph, target: Target, calibration: Sequence[NDArray[Any]]
) -> tuple[float, Operators]:
    with tempfile.TemporaryDirectory(prefix="edgeprune-explain-") as folder:
        bench = Bench(model, graph, target, Path(folder), calibration)
        bench.time([])
        return bench.reference_ms, target.operators(Path(folder) / "dense")


def _explained(
    graph: ModelGraph, costs: Costs, units: Mapping[str, int], measured: Measured, inside: Operators
) -> Explanation:
    floor = allocate.floor(costs)
    timed = {s.layer.name for s in costs.surfaces}
    return Explanation(
        rows=_rows(costs, units, floor.widths),
        groups=tuple(_group(costs, units, g) for g, w in costs.candidates.items() if len(w) > 1 and units[g]),
        untimed=tuple((x.name, x.shape.op) for x in graph.layers if x.name not in timed),
        frozen=graph.frozen,
        overhead_ms=costs.correction.overhead_ms,
        predicted_dense_ms=costs.predict_ms(costs.dense),
        predicted_ms=costs.predict_ms(units),
        predicted_floor_ms=floor.predicted_ms,
        measured=measured,
        operators=inside,
    )


def _rows(costs: Costs, units: Mapping[str, int], least: Mapping[str, int]) -> tuple[Row, ...]:
    present = {s.layer.name for s in costs.present(units)}
    rows = []
    for s, layer, smallest in zip(costs.surfaces, costs.rows(units), costs.rows(least), strict=True):
        stairs_ = _layer_stairs(s, costs, units) if layer.name in present else None
        rows.append(Row(layer, smallest.planned_ms, stairs_))
    return tuple(rows)


def _layer_stairs(s: Surface, costs: Costs, units: Mapping[str, int]) -> Stairs | None:
    """Over the widths of the one group that makes the layer's output; input channels stay as they are."""
    terms = s.layer.out_width.terms
    if len(terms) != 1 or len(costs.candidates[terms[0][0]]) < 2:
        return None
    group = terms[0][0]
    now = shape_at(s.layer, units)
    curve = {}
    for width in costs.candidates[group]:
        shape = shape_at(s.layer, {**units, group: width})
        if shape.out_ch:
            curve[shape.out_ch] = s.at(shape.in_ch if follows_input(s.layer) else now.in_ch, shape.out_ch)
    return stairs(curve, now.out_ch) if now.out_ch in curve else None


def _group(costs: Costs, units: Mapping[str, int], group: str) -> GroupRow:
    touched = [
        s for s in costs.surfaces if any(g == group for g, _ in (*s.layer.in_width.terms, *s.layer.out_width.terms))
    ]
    curve = {}
    for width in costs.candidates[group]:
        shapes = [shape_at(s.layer, {**units, group: width}) for s in touched]
        curve[width] = sum(s.at(x.in_ch, x.out_ch) for s, x in zip(touched, shapes, strict=True))
    return GroupRow(group, costs.dense[group], stairs(curve, units[group]))


def stairs(curve: Mapping[int, float], at: int) -> Stairs:
    """Where `at` stands on a curve of latencies by width.

    Args:
        curve: width -> milliseconds.
        at: one of the widths.
    """
    now = curve[at]
    wider = max((w for w, ms in curve.items() if w >= at and ms <= now * (1 + SAME)), default=at)
    narrower = max((w for w, ms in curve.items() if w < at and ms < now * (1 - STEP)), default=at)
    return Stairs(at, wider, narrower, now, curve[narrower])
