"""A run's charts, as plotly takes them; a colour that begins with -- is a CSS variable of the page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import verify
from ..records import LayerRow, VerifyReport
from . import units
from .found import Found, GroupRow, Json, Prediction, Step

MAX_LABEL = 22  # characters of a layer's name that leave room for its bar on a phone
ROW_PX = 20
SMOOTH = 25  # visits: their running median shows drift and not jitter
TOP = 1.35  # where the samples' axis ends, over the slower network's p90
LOOKS = {  # of predictions: they differ in shape, not by colour alone
    "before correction": ("circle-open", "--muted"),
    "corrected": ("circle", "--after"),
    "verified": ("diamond", "--budget"),
}


@dataclass(frozen=True)
class Chart:
    """A figure, and the line that says what to see in it."""

    caption: str
    height: int
    figure: Json


def draw(found: Found, groups: Sequence[GroupRow], networks: Sequence[Prediction]) -> dict[str, Chart]:
    """The charts of a run by name; one without data is left out."""
    made = {
        "widths": widths(groups) if groups else None,
        "layers": layers(found.layers.rows) if found.layers.rows else None,
        "prediction": prediction(networks),
        "training": training(found.steps),
        "samples": samples(found.report) if found.report.pruned.latency.samples_ms else None,
    }
    return {name: chart for name, chart in made.items() if chart is not None}


def widths(groups: Sequence[GroupRow]) -> Chart:
    """Units that each group keeps."""
    known = [(g.dense, g.kept) for g in groups if g.dense is not None]
    gone = sum(g.kept == 0 for g in groups)
    caption = f"{sum(kept < dense for dense, kept in known)} of {len(groups)} groups were cut"
    caption += f", {gone} of them dropped whole" if gone else ""
    caption += "; channels went where the dark bar is shorter than the pale one."
    if not known:
        caption = f"What each of {len(groups)} groups keeps; the run folder does not say how wide they were."
    return _bars(caption, "units of channels", [(g.id, g.dense, g.kept) for g in groups])


def layers(rows: Sequence[LayerRow]) -> Chart:
    """Latency of each layer."""
    most = max(rows, key=lambda r: r.dense_ms - r.planned_ms)
    caption = (
        f"Timed alone, the layers add up to {units.ms(sum(r.dense_ms for r in rows))} before and "
        f"{units.ms(sum(r.planned_ms for r in rows))} after; {most.name} saves most, "
        f"{units.ms(most.dense_ms - most.planned_ms)}."
    )
    return _bars(caption, "latency, ms", [(r.name, r.dense_ms, r.planned_ms) for r in rows])


def prediction(networks: Sequence[Prediction]) -> Chart:
    """Predicted against measured."""
    end = 1.08 * max(max(n.predicted_ms, n.measured_ms) for n in networks)
    data = []
    for kind, (symbol, color) in LOOKS.items():
        some = [n for n in networks if n.kind == kind]
        if not some:
            continue
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": kind,
                "x": [n.predicted_ms for n in some],
                "y": [n.measured_ms for n in some],
                "customdata": [n.name for n in some],
                "marker": {"symbol": symbol, "color": color, "size": 10, "line": {"color": color, "width": 2}},
                "hovertemplate": "%{customdata}<br>predicted %{x:.4~g} ms<br>measured %{y:.4~g} ms",
            }
        )
    diagonal = {"type": "line", "x0": 0, "y0": 0, "x1": end, "y1": end, **_line("--muted")}
    layout = {
        "xaxis": _axis("predicted, ms", range=[0, end]),
        "yaxis": _axis("measured, ms", range=[0, end]),
        "shapes": [diagonal],
        "showlegend": True,
    }
    errors = [n.predicted_ms / n.measured_ms - 1 for n in networks if n.kind != "before correction"]
    caption = (
        "On the dotted line a prediction is exact, above it the device was slower. "
        f"Corrected predictions were within {units.percent(max(map(abs, errors)))} of the device."
    )
    return Chart(caption, 400, _figure(data, layout))


def training(steps: Sequence[Step]) -> Chart | None:
    """Accuracy on the search split over all steps; None when nobody judged it."""
    points: list[tuple[int, float | None, str]] = []
    cuts: list[Json] = []
    at = 0
    for number, step in enumerate(steps, 1):
        points += [(at, step.before, f"before cut {number}"), (at, step.cut, f"right after cut {number}")]
        points += [(at + e.epoch, e.search_accuracy, f"epoch {e.epoch} after cut {number}") for e in step.epochs]
        label = {"text": f"cut {number}", "textposition": "start", "textangle": 0, "xanchor": "left"}
        line = {"type": "line", "x0": at, "x1": at, "yref": "paper", "y0": 0, "y1": 1, **_line("--muted")}
        cuts.append({**line, "label": label})
        at += max(len(step.epochs), 1)
    if all(share is None for _, share, _ in points):
        return None
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [place for place, _, _ in points],
        "y": [None if share is None else 100 * share for _, share, _ in points],
        "customdata": [words for _, _, words in points],
        "hovertemplate": "%{customdata}<br>%{y:.1f} %<extra></extra>",
        "line": {"color": "--after", "width": 2},
        "marker": {"color": "--after", "size": 7},
    }
    unit = "epochs of fine-tuning, all steps" if any(step.epochs for step in steps) else "steps"
    layout = {
        "xaxis": _axis(unit, range=[-0.03 * at, 1.03 * at], dtick=max(1, round(at / 12)), zeroline=False),
        "yaxis": _axis("accuracy, %"),
        "shapes": cuts,
    }
    return Chart(_training_caption(steps), 300, _figure([trace], layout))


def _training_caption(steps: Sequence[Step]) -> str:
    """The figures that matter: before, after the last cut, and what training won back."""
    last = steps[-1]
    parts = []
    if steps[0].before is not None:
        parts.append(f"{units.percent(steps[0].before)} before the first cut")
    if last.cut is not None:
        parts.append(f"{units.percent(last.cut)} right after the last one")
    if last.epochs:
        best = max(last.epochs, key=lambda e: e.search_accuracy)
        parts.append(f"{units.percent(best.search_accuracy)} in its best epoch ({best.epoch}), which was kept")
    return f"Each cut costs accuracy and training wins it back: {', '.join(parts)}."


def samples(report: VerifyReport) -> Chart:
    """Every visit of the last check, in time order."""
    dense, pruned = report.dense.latency, report.pruned.latency
    limit_ms = verify.budget_ms(report.budget, dense.median_ms)
    top = TOP * max(dense.p90_ms, pruned.p90_ms, limit_ms)
    data: list[Json] = []
    for name, color, timing in (("dense", "--before-line", dense), ("pruned", "--after", pruned)):
        visits = list(range(1, len(timing.samples_ms) + 1))
        common = {"type": "scatter", "x": visits, "legendgroup": name, "name": name}
        dots = {"mode": "markers", "y": list(timing.samples_ms), "showlegend": False, "hoverinfo": "skip"}
        data.append({**common, **dots, "marker": {"color": color, "size": 4, "opacity": 0.45}})
        line = {
            "mode": "lines",
            "y": running_median(timing.samples_ms).tolist(),
            "line": {"color": color, "width": 2.5},
        }
        data.append({**common, **line, "hovertemplate": f"{name}, running median %{{y:.4~g}} ms"})
    most = max(len(dense.samples_ms), len(pruned.samples_ms))
    budget = {"x": [0, most], "y": [limit_ms, limit_ms], "name": f"budget {units.ms(limit_ms)}", "hoverinfo": "skip"}
    data.append({"type": "scatter", "mode": "lines", **budget, "line": {"color": "--budget", "dash": "dash"}})
    layout = {
        "xaxis": _axis("visit, in time order", range=[0, most]),
        "yaxis": _axis("latency, ms", range=[0, top]),
    }
    hidden = sum(s > top for s in (*dense.samples_ms, *pruned.samples_ms))
    caption = (
        f"Each dot is a visit, the line the median of {SMOOTH}: level lines mean that the device did not drift. "
        f"From the first to the last third the dense network moved by {units.percent(drift(dense.samples_ms), '+')}, "
        f"the pruned one by {units.percent(drift(pruned.samples_ms), '+')}."
    )
    caption += f" {hidden} visits above {units.ms(top)} are outside." if hidden else ""
    return Chart(caption, 360, _figure(data, layout))


def running_median(values: Sequence[float]) -> NDArray[np.float64]:
    """Medians of SMOOTH neighbours, (n,); the ends are repeated."""
    padded = np.pad(np.asarray(values, dtype=float), SMOOTH // 2, mode="edge")
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(padded, SMOOTH), axis=1))


def drift(values: Sequence[float]) -> float:
    """Median of the last third over that of the first, minus 1."""
    third = max(1, len(values) // 3)
    return float(np.median(values[-third:]) / np.median(values[:third]) - 1)


# ---- parts of figures ----------------------------------------------------------------------------------------


def _bars(caption: str, unit: str, rows: Sequence[tuple[str, float | None, float]]) -> Chart:
    """For each row, top to bottom, a thin bar (after) on a wide pale one (before)."""
    places = list(range(len(rows)))  # numbers, for names may repeat
    names = [html.escape(name) for name, _, _ in rows]  # plotly renders some HTML
    short = [name if len(name) <= MAX_LABEL else "…" + name[1 - MAX_LABEL :] for name, _, _ in rows]
    common = {"type": "bar", "orientation": "h", "y": places, "customdata": names}
    data = []
    if any(before is not None for _, before, _ in rows):
        data.append({**common, "name": "before", "x": [r[1] for r in rows], "width": 0.8, **_fill("--before")})
    data.append({**common, "name": "after", "x": [r[2] for r in rows], "width": 0.4, **_fill("--after")})
    ticks = {"tickmode": "array", "tickvals": places, "ticktext": [html.escape(name) for name in short]}
    layout = {
        "barmode": "overlay",
        "xaxis": _axis(unit, rangemode="tozero"),
        "yaxis": _axis("", range=[len(rows) - 0.5, -0.5], showgrid=False, zeroline=False, **ticks),
    }
    return Chart(caption, 100 + ROW_PX * len(rows), _figure(data, layout))


def _fill(color: str) -> Json:
    return {"marker": {"color": color}, "hovertemplate": "%{customdata}<br>%{x:.4~g}"}


def _line(color: str) -> Json:
    return {"line": {"color": color, "width": 1.5, "dash": "dot"}, "layer": "below"}


def _axis(title: str, **more: object) -> Json:
    """Fixed, so that a finger on a phone scrolls the page and not the chart; invisible ticks keep labels off it."""
    quiet = {"gridcolor": "--rule", "zerolinecolor": "--rule", "fixedrange": True, "automargin": True}
    quiet |= {"ticks": "outside", "ticklen": 5, "tickcolor": "rgba(0,0,0,0)"}
    return {"title": {"text": title}, **quiet, **more}


def _figure(data: Sequence[Json], layout: Json) -> Json:
    common = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "--ink"},
        "margin": {"l": 8, "r": 12, "t": 36 if len(data) > 1 else 12, "b": 8},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "hoverlabel": {"bgcolor": "--paper", "bordercolor": "--muted", "font": {"color": "--ink"}},
        "dragmode": False,
    }
    return {"data": list(data), "layout": {**common, **layout}}
