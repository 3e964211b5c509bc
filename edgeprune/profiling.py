"""The latency table of one network on one target, layer by layer, and how far it is from whole networks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

from . import allocate, files, importance, measure, store, widths
from .allocate import Costs
from .bench import Bench
from .config import INTERVAL, CompressSection
from .graph import Example, ModelGraph, trace
from .measure import Filled
from .records import Layer
from .table import Surface
from .target import Target
from .watch import Watch
from .widths import shape_at

FITTED = 8  # networks that a check fits the correction on, besides those it is judged on and the dense one


@dataclass(frozen=True)
class Row:
    """One layer: dense, and with half of every group's channels."""

    layer: Layer
    dense_ms: float
    half_ms: float


@dataclass(frozen=True)
class Check:
    """The table against whole networks; errors are relative, of networks that its correction was not fitted on."""

    networks: int  # that the errors are of
    fitted: int  # others, that the correction was fitted on
    median_error: float
    p95_error: float
    within_5: float  # share of the networks within 5 %
    within_10: float
    rank_correlation: float  # Spearman, of predicted with measured
    noise: float  # spread between copies of one network: the floor of any error
    predicted_ms: tuple[float, ...]
    measured_ms: tuple[float, ...]


@dataclass(frozen=True)
class Profile:
    rows: tuple[Row, ...]
    filled: Filled
    floor_ms: float
    check: Check | None


def profile(
    model: nn.Module,
    example: Example,
    target: Target,
    section: CompressSection,
    check: int,
    watch: Watch,
    calibration: Sequence[NDArray[Any]] = (),
    interval: float = INTERVAL,
) -> Profile:
    """Measure every layer width that plans may choose; with `check`, time that many whole networks as well."""
    graph = trace(model, example, section.protected)
    candidates = widths.candidates(graph.groups, section.min_width, section.protected)
    layers = measure.timed(graph.layers, target)
    table_store = store.Store(store.default_path())
    with watch.stage("measure layers") as progress:
        table, filled = measure.fill(layers, candidates, target, table_store, progress, interval)
    costs = measure.costs(layers, candidates, table, ())
    half = {g: measure.nearest(w, w[-1] / 2) for g, w in candidates.items()}
    rows = tuple(Row(s.layer, _at(s, costs.dense), _at(s, half)) for s in costs.surfaces)
    compared = _compare(model, graph, costs, target, check, watch, calibration) if check else None
    return Profile(rows, filled, allocate.floor(costs).predicted_ms, compared)


def as_json(found: Profile) -> dict[str, Any]:
    return {
        "layers": [
            {
                "name": r.layer.name,
                "shape": files.plain(r.layer.shape),
                "dense_ms": r.dense_ms,
                "half_ms": r.half_ms,
            }
            for r in found.rows
        ],
        "filled": files.plain(found.filled),
        "floor_ms": found.floor_ms,
        "check": files.plain(found.check),
    }


def _at(surface: Surface, units: Mapping[str, int]) -> float:
    shape = shape_at(surface.layer, units)
    return surface.at(shape.in_ch, shape.out_ch)


def _compare(
    model: nn.Module,
    graph: ModelGraph,
    costs: Costs,
    target: Target,
    count: int,
    watch: Watch,
    calibration: Sequence[NDArray[Any]],
) -> Check:
    """Build and time whole networks of random widths, in turn; fit the correction on some, judge it on the others."""
    scores = importance.score(model, graph.groups, "random")
    tested = measure.random_plans(costs.candidates, count, seed=2)
    fitted_on = measure.samples(costs.candidates, FITTED, seed=1)
    plans = [*tested, *fitted_on]
    folder = Path(tempfile.mkdtemp(prefix="edgeprune-check-"))
    try:
        bench = Bench(model, graph, target, folder, calibration)
        with watch.stage(f"build and time {len(plans) + 1} whole networks") as progress:
            measured = np.array(bench.time([importance.best(scores, plan) for plan in plans], progress))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    known = [*zip(fitted_on, measured[count:], strict=True), (costs.dense, bench.reference_ms)]
    fitted, _ = measure.calibrate(costs, known)
    predicted = np.array([fitted.predict_ms(plan) for plan in tested])
    return judge(predicted, measured[:count], len(known), bench.noise)


def judge(predicted: NDArray[np.float64], measured: NDArray[np.float64], fitted: int, noise: float) -> Check:
    """What is said about predictions.

    Args:
        predicted, measured: milliseconds, (networks,).
        fitted: networks, others than these, that the predictions were fitted on.
        noise: relative, of a measurement.
    """
    errors = np.abs(predicted / measured - 1)
    together = float(spearmanr(predicted, measured).statistic) if len(errors) > 2 else float("nan")
    return Check(
        networks=len(errors),
        fitted=fitted,
        median_error=float(np.median(errors)),
        p95_error=float(np.percentile(errors, 95)),
        within_5=float((errors <= 0.05).mean()),
        within_10=float((errors <= 0.10).mean()),
        rank_correlation=together,
        noise=noise,
        predicted_ms=tuple(predicted.tolist()),
        measured_ms=tuple(measured.tolist()),
    )
