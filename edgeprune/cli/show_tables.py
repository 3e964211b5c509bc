"""Latency tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..measure import Again
from ..sharing import Difference, Shared, described

SHOWN = 12  # rows of a long list


def _print(table: Table) -> None:
    Console(highlight=False).print(table)


def devices(content: Mapping[str, Any]) -> None:
    print(content["path"])
    rows = Table("", "device", "runtime", "precision", "threads", "entries", "measured")
    for d in content["devices"]:
        f = d["fingerprint"]
        when = f"{d['first_at'][:16]} to {d['last_at'][:16]}"
        rows.add_row(
            str(d["id"]), f["device"], f["runtime"], f["precision"], str(f["threads"]), str(d["entries"]), when
        )
    _print(rows)


def table(shared: Shared) -> None:
    f = shared.fingerprint
    rows = Table(show_header=False)
    for name, value in [
        ("kind", f.kind), ("device", f.device), ("runtime", f.runtime), ("precision", f.precision),
        ("threads", str(f.threads)), *f.details,
    ]:  # fmt: skip
        rows.add_row(name, value)
    _print(rows)
    _sessions(shared)
    _entries(shared)


def _sessions(shared: Shared) -> None:
    rows = Table("session", "began", "entries", "load", "MHz", "°C", "notes")
    for session in shared.sessions[-SHOWN:]:
        count = sum(e.session == session.id for e in shared.entries)
        states = [s for s in (session.began, session.ended) if s is not None]
        notes = list(session.notes) + ([] if session.ended else ["was stopped before its end, or still runs"])
        rows.add_row(
            str(session.id), session.began_at, str(count), *(_range([s.load for s in states], "{:.1f}"),
            _range([s.frequency_mhz for s in states], "{:.0f}"), _range([s.temperature_c for s in states], "{:.0f}")),
            "; ".join(notes),
        )  # fmt: skip
    _print(rows)


def _range(values: list[float], form: str) -> str:
    """Both ends, or nothing where the system does not say (0)."""
    return " to ".join(dict.fromkeys(form.format(v) for v in values)) if any(values) else ""


def _entries(shared: Shared) -> None:
    rows = Table("op", "entries", "ms, from", "to", "95 % interval, median", "widest")
    for op in sorted({e.layer.op for e in shared.entries}):
        timings = [e.timing for e in shared.entries if e.layer.op == op]
        ms, intervals = [t.median_ms for t in timings], [t.interval for t in timings]
        rows.add_row(
            op, str(len(timings)), f"{min(ms):.4f}", f"{max(ms):.4f}", f"±{np.median(intervals):.1%}",
            f"±{max(intervals):.1%}",
        )  # fmt: skip
    _print(rows)


def again(found: Again) -> None:
    if not found.count:
        print("the file is sound; nothing was measured again")
        return
    print(
        f"{found.count} entries measured again: {found.median:.1%} of the table's latency in the median, "
        f"{found.p5:.1%} to {found.p95:.1%} for nine in ten"
    )
    for note in found.notes:
        print(f"note: {note}")


def difference(found: Difference) -> None:
    for field in found.fields:
        print(f"differs: {field}")
    print(
        f"{found.common} entries in both, {found.only_first} only in the first, {found.only_second} only in the second"
    )
    print(f"second over first: {found.median:.3f} in the median, {found.p5:.3f} to {found.p95:.3f} for nine in ten")
    rows = Table("furthest apart", "second over first")
    for layer, ratio in found.furthest:
        rows.add_row(described(layer), f"{ratio:.3f}")
    _print(rows)


def merged(content: Mapping[str, Any]) -> None:
    for device, count in content["added"].items():
        print(f"{device}: {count} entries added")
