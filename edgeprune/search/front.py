"""Candidates that none beats in both accuracy and latency: as records, as a picture, as a size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import files
from .space import Units
from .trying import Candidate

FORMAT = "edgeprune.front/1"
NAME = "front"  # of its files
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """A plan on the front: what it would keep and reach before any training."""

    widths: Units
    predicted_ms: float
    accuracy: float  # on the search split: optimistic, for it was chosen there
    loss: float


def of(candidates: Sequence[Candidate]) -> list[Choice]:
    """The candidates that no other one beats, the fastest first."""
    ordered = sorted(candidates, key=lambda c: (c.predicted_ms, -c.evaluation.accuracy, c.evaluation.loss))
    found: list[Choice] = []
    for candidate in ordered:
        accuracy = candidate.evaluation.accuracy
        if not found or accuracy > found[-1].accuracy:
            found.append(Choice(candidate.units, candidate.predicted_ms, accuracy, candidate.evaluation.loss))
    return found


def read(path: Path) -> list[Choice]:
    """A front that was written."""
    return [Choice(**plan) for plan in files.read_json(path, FORMAT)["plans"]]


def hypervolume(points: Floats, reference: tuple[float, float]) -> float:
    """The area between points and a reference that is worse in both, both to be small.

    Args:
        points: (points, 2), as (error, latency).
        reference: (error, latency); points beyond it count nothing.
    """
    area, edge = 0.0, reference[0]
    for error, latency in sorted(map(tuple, points.tolist()), key=lambda p: (p[1], p[0])):
        if latency < reference[1] and error < edge:
            area += (edge - error) * (reference[1] - latency)
            edge = error
    return area


def draw(front: Sequence[Choice], candidates: Sequence[Candidate], budget_ms: float, path: Path) -> None:
    """Write a page with a picture of it."""
    import plotly.graph_objects as go

    others = [(c.predicted_ms, c.evaluation.accuracy) for c in candidates]
    figure = go.Figure(
        [
            go.Scatter(
                x=[ms for ms, _ in others], y=[a for _, a in others], mode="markers", name="judged",
                marker={"color": "#b8b8b8", "size": 5}, hoverinfo="skip",
            ),
            go.Scatter(
                x=[c.predicted_ms for c in front], y=[c.accuracy for c in front], mode="lines+markers", name="front",
                line={"shape": "hv", "color": "#1f6f8b"},
                hovertext=[", ".join(f"{g}: {w}" for g, w in c.widths.items()) for c in front],
            ),
        ]
    )  # fmt: skip
    figure.add_vline(x=budget_ms, line_dash="dot", annotation_text="budget")
    figure.update_layout(
        title="Accuracy before training (search split) and predicted latency",
        xaxis_title="predicted latency, ms",
        yaxis_title="accuracy",
        template="plotly_white",
    )
    with files.writing(path) as beside:
        beside.write_text(figure.to_html(include_plotlyjs=True), encoding="utf-8")
