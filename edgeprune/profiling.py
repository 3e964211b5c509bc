"""The latency table of one network on one target, layer by layer, and how far it is from whole networks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from torch import nn

from . import allocate, files, importance, measure, store, widths
from .allocate import Costs
from .config import CompressSection
from .graph import Example, ModelGraph, trace
from .measure import Filled
from .planning import Bench
from .records import Layer
from .table import IDENTITY, Surface
from .target import Target
from .watch import Watch
from .widths import shape_at


@dataclass(frozen=True)
class Row:
    """One layer: dense, and with half of every group's channels."""

    layer: Layer
    dense_ms: float
    half_ms: float


@dataclass(frozen=True)
class Check:
    """The table against whole networks: it was calibrated on the even ones, errors are of the odd ones."""

    networks: int
    median_error: float
    worst_error: float
    rank_correlation: float
    noise: float
    predicted_ms: tuple[float, ...]
    measured_ms: tuple[float, ...]


@dataclass(frozen=True)
class Profile:
    rows: tuple[Row, ...]
    filled: Filled
    floor_ms: float
    check: Check | None


def profile(
    model: nn.Module, example: Example, target: Target, section: CompressSection, check: int, watch: Watch
) -> Profile:
    """Measure every layer width that plans may choose; with `check`, time that many whole networks as well."""
    graph = trace(model, example, section.protected)
    candidates = widths.candidates(graph.groups, section.min_width, section.protected)
    layers = measure.timed(graph.layers, target)
    table_store = store.Store(store.default_path())
    with watch.stage("measure layers") as progress:
        table, filled = measure.fill(layers, candidates, target, table_store, progress)
    costs = measure.costs(layers, candidates, table, ())
    half = {g: measure.nearest(w, w[-1] / 2) for g, w in candidates.items()}
    rows = tuple(
        Row(s.layer, _at(s, costs.dense), _at(s, half)) for s in costs.surfaces
    )  # fmt: skip
    compared = _compare(model, graph, costs, target, check, watch) if check else None
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


def _compare(model: nn.Module, graph: ModelGraph, costs: Costs, target: Target, count: int, watch: Watch) -> Check:
    scores = importance.score(model, graph.groups, "random")
    plans = [dict(costs.dense), *measure.samples(costs.candidates, max(count - 1, 3), seed=1)]
    folder = Path(tempfile.mkdtemp(prefix="edgeprune-check-"))
    try:
        bench = Bench(model, graph, target, folder)
        with watch.stage(f"time {len(plans)} whole networks") as progress:
            progress(0, 1)
            cut_ms = bench.time([importance.best(scores, plan) for plan in plans[1:]])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    measured = np.array([bench.reference_ms, *cut_ms])
    known = [(plan, ms) for plan, ms in list(zip(plans, measured, strict=True))[::2]]
    fitted, _ = measure.calibrate(costs, known)
    predicted = np.array([fitted.predict_ms(plan) for plan in plans])
    errors = np.abs(predicted / measured - 1)[1::2]
    assert costs.surfaces[0].table.correction == IDENTITY
    return Check(
        networks=len(plans),
        median_error=float(np.median(errors)),
        worst_error=float(errors.max()),
        rank_correlation=float(spearmanr(predicted, measured).statistic),
        noise=bench.noise,
        predicted_ms=tuple(predicted.tolist()),
        measured_ms=tuple(measured.tolist()),
    )
