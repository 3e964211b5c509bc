"""The staircases of a latency table: one chart for each layer geometry, latency over output channels."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..errors import TableError
from ..records import LayerShape
from ..sharing import Shared, described
from ..store import Entry
from ..table import jumps

LEAST = 4  # points that make a curve
LINES = 5  # input widths drawn, besides those with the most points
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1.5rem; color: #1b1f24; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1rem; margin: 0; }
p { margin: .2rem 0 .8rem; color: #57606a; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 1.2rem; }
section { border: 1px solid #d0d7de; border-radius: 6px; padding: .8rem; min-width: 0; }
section p { font-size: .85rem; margin: 0; } .chart { height: 260px; }
"""


@dataclass(frozen=True)
class Chart:
    """One geometry: its title, what its steps are, and plotly's traces."""

    title: str
    caption: str
    axis: str
    traces: list[dict[str, Any]]
    dense_ms: float


def write(shared: Shared, path: Path, most: int) -> int:
    """Write the page; returns the number of charts.

    Raises:
        TableError: no layer was measured at enough widths to make a curve.
    """
    charts = draw(shared.entries)[:most]
    if not charts:
        raise TableError(f"no layer of this table was measured at {LEAST} or more output widths; profile a network")
    with files.writing(path) as beside:
        beside.write_text(page(shared, charts), encoding="utf-8")
    return len(charts)


def draw(entries: Iterable[Entry]) -> list[Chart]:
    """A chart for each geometry that was measured at several widths, the costliest first."""
    geometries: dict[LayerShape, list[Entry]] = {}
    for entry in entries:
        geometries.setdefault(_geometry(entry.layer), []).append(entry)
    charts = [chart for some in geometries.values() if (chart := _chart(some)) is not None]
    return sorted(charts, key=lambda c: -c.dense_ms)


def _geometry(layer: LayerShape) -> LayerShape:
    """A layer without its widths."""
    groups = 0 if layer.conv_groups == layer.in_ch > 1 else layer.conv_groups
    return replace(layer, in_ch=0, out_ch=0, conv_groups=groups)


def _chart(entries: list[Entry]) -> Chart | None:
    depthwise = all(e.layer.in_ch == e.layer.out_ch for e in entries)
    lines: dict[int, list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: e.layer.out_ch):
        lines.setdefault(0 if depthwise else entry.layer.in_ch, []).append(entry)
    best = sorted((line for line in lines.values()), key=lambda line: (-len(line), -line[0].layer.in_ch))[:LINES]
    if not best or len(best[0]) < LEAST:
        return None
    largest = max((line[-1] for line in best), key=lambda e: e.timing.median_ms)
    curve = best[0]
    found = jumps([e.layer.out_ch for e in curve], [e.timing.median_ms for e in curve])
    steps = "Steps up after " + ", ".join(str(a) for a, _ in found[:12]) if found else "No steps: a line"
    return Chart(
        title=described(largest.layer),
        caption=f"{steps} channels." if found else f"{steps}, as far as {len(curve)} widths show.",
        axis="channels" if depthwise else "output channels",
        traces=[_trace(line, depthwise) for line in sorted(best, key=lambda line: -line[0].layer.in_ch)],
        dense_ms=largest.timing.median_ms,
    )


def _trace(line: list[Entry], depthwise: bool) -> dict[str, Any]:
    ms = [e.timing.median_ms for e in line]
    return {
        "type": "scatter", "mode": "lines+markers", "name": "" if depthwise else f"{line[0].layer.in_ch} in",
        "x": [e.layer.out_ch for e in line], "y": ms, "showlegend": not depthwise,
        "error_y": {"type": "data", "array": [e.timing.interval * e.timing.median_ms for e in line], "thickness": 1},
        "hovertemplate": "%{x} channels: %{y:.4f} ms",
    }  # fmt: skip


def page(shared: Shared, charts: list[Chart]) -> str:
    """One HTML document that refers to no other file."""
    from plotly.offline import get_plotlyjs

    f = shared.fingerprint
    what = f"{f.runtime}, {f.precision}, {f.threads} thread{'s' if f.threads > 1 else ''}"
    intervals = [e.timing.interval for e in shared.entries]
    noise = f"{len(intervals)} entries, 95 % interval of the median ±{np.median(intervals):.1%} (median entry)"
    notes = sorted({note for session in shared.sessions for note in session.notes})
    said = html.escape(f"{f.device}; {what}. {noise}." + "".join(f" Note: {note}." for note in notes))
    sections = "\n".join(
        f'<section><h2>{html.escape(c.title)}</h2><p>{html.escape(c.caption)}</p><div class="chart" id="c{at}"></div>'
        "</section>"
        for at, c in enumerate(charts)
    )
    data = json.dumps([{"traces": c.traces, "axis": c.axis} for c in charts]).replace("</", "<\\/")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Latency table: {html.escape(f.device)}</title><style>{STYLE}</style></head><body>
<h1>Latency over channels</h1>
<p>{said}</p>
<main>{sections}</main>
<script>{get_plotlyjs()}</script>
<script>
{data}.forEach((c, at) => Plotly.newPlot("c" + at, c.traces, {{
  margin: {{l: 48, r: 8, t: 8, b: 40}}, font: {{size: 12}}, legend: {{orientation: "h", y: 1.15}},
  xaxis: {{title: {{text: c.axis}}, rangemode: "tozero"}}, yaxis: {{title: {{text: "ms"}}, rangemode: "tozero"}}
}}, {{displayModeBar: false, responsive: true}}));
</script></body></html>
"""
