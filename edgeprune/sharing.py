"""Latency tables as files: exported, imported, merged, compared, and measured again.

An exported table is one JSON object, its entries in a fixed order, so that two of them can be compared line by line:

    format       "edgeprune.table/1"
    fingerprint  what every entry depends on: kind, device, runtime, precision, threads, details ([name, value] pairs)
    sessions     id, began_at, notes, began and ended (the device's state: load, frequency_mhz, temperature_c,
                 memory_mb, throttled, notes; ended is null when it was killed)
    entries      layer (op, in_ch, out_ch, batch, spatial, kernel, stride, padding, dilation, conv_groups, fused),
                 timing (median_ms, p10_ms, p90_ms, runs, interval), measured_at, session
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import files, store
from .errors import TableError
from .records import Fingerprint, LayerShape, Timing
from .store import Entry, Session, Store

FORMAT = "edgeprune.table/1"


@dataclass(frozen=True)
class Shared:
    """A table outside the store."""

    fingerprint: Fingerprint
    sessions: tuple[Session, ...]
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Difference:
    """Two tables: entries that both have, as the second's latency over the first's."""

    fields: tuple[str, ...]  # of the fingerprints that differ, with both values
    common: int
    only_first: int
    only_second: int
    median: float
    p5: float
    p95: float
    furthest: tuple[tuple[LayerShape, float], ...]


def taken(open_store: Store, fingerprint: Fingerprint) -> Shared:
    """A table of the store."""
    return Shared(fingerprint, tuple(open_store.sessions(fingerprint)), tuple(open_store.records(fingerprint)))


def write(shared: Shared, path: Path) -> None:
    """Write the exported form."""
    entries = [{**files.plain(e), "timing": _without_samples(e.timing)} for e in shared.entries]
    content = {"fingerprint": shared.fingerprint, "sessions": shared.sessions, "entries": entries}
    files.write_json(path, FORMAT, content)


def _without_samples(timing: Timing) -> dict[str, Any]:
    return {name: value for name, value in asdict(timing).items() if name != "samples_ms"}


def read(path: Path) -> Shared:
    """Read what `write` wrote.

    Raises:
        TableError: the file is missing, damaged, of another format, or holds a timing that none can be.
    """
    content = files.read_json(path, FORMAT, TableError)
    try:
        sessions = tuple(_session(s) for s in content["sessions"])
        entries = tuple(_entry(e) for e in content["entries"])
        shared = Shared(store.fingerprint_of(content["fingerprint"]), sessions, entries)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TableError(f"{path} is no latency table ({type(error).__name__}: {error}); export it again") from error
    numbers = {session.id for session in sessions}
    for entry in entries:
        problem = implausible(entry.timing) or (entry.session not in numbers and "an unknown session")
        if problem:
            raise TableError(f"{path}: {described(entry.layer)} has {problem}; export the table again")
    return shared


def implausible(timing: Timing) -> str:
    """What is wrong with a timing; "" when nothing is."""
    ordered = 0 < timing.p10_ms <= timing.median_ms <= timing.p90_ms < float("inf")
    if ordered and timing.runs > 0 and timing.interval >= 0:
        return ""
    return f"a timing that cannot be: {timing.p10_ms:g} / {timing.median_ms:g} / {timing.p90_ms:g} ms"


def _session(values: Mapping[str, Any]) -> Session:
    ended = store.state_of(values["ended"]) if values["ended"] is not None else None
    notes = tuple(values["notes"])
    return Session(int(values["id"]), str(values["began_at"]), store.state_of(values["began"]), ended, notes)


def _entry(values: Mapping[str, Any]) -> Entry:
    timing = store.timing_of({**values["timing"], "samples_ms": ()})
    return Entry(store.layer_of(values["layer"]), timing, str(values["measured_at"]), int(values["session"]))


# ---- into the store ------------------------------------------------------------------------------------------


def add(open_store: Store, shared: Shared, origin: str) -> int:
    """Add a table's entries to the store's; where both have one, the surer stays. Returns how many were added."""
    have = open_store.entries(shared.fingerprint)
    better = [e for e in shared.entries if e.layer not in have or e.timing.interval < have[e.layer].interval]
    for session in shared.sessions:
        some = [e for e in better if e.session == session.id]
        if not some:
            continue
        notes = [*session.notes, f"from {origin}"]
        number = open_store.begin(shared.fingerprint, session.began, session.began_at, notes)
        open_store.finish(number, session.ended, notes)
        for at in sorted({e.measured_at for e in some}):
            open_store.add(shared.fingerprint, {e.layer: e.timing for e in some if e.measured_at == at}, number, at)
    return len(better)


def check_fits(shared: Shared, here: Fingerprint, path: Path) -> None:
    """Raises TableError, naming the fields, when a table was taken under other conditions than those of the target."""
    found = differences(shared.fingerprint, here)
    if found:
        raise TableError(
            f"{path} was measured under other conditions: {'; '.join(found)}. Its milliseconds do not hold for this "
            "target: name the target that it was measured on with --target, or profile here"
        )


def differences(first: Fingerprint, second: Fingerprint) -> list[str]:
    """The fields in which two fingerprints differ, with both values; clocks, governor and the like by name."""
    a, b = _fields(first), _fields(second)
    return [
        f"{name} is {a.get(name, 'unknown')!r} there and {b.get(name, 'unknown')!r} here"
        for name in dict.fromkeys([*a, *b])
        if a.get(name) != b.get(name)
    ]


def _fields(fingerprint: Fingerprint) -> dict[str, Any]:
    return {**asdict(replace(fingerprint, details=())), **dict(fingerprint.details)}


# ---- compared ------------------------------------------------------------------------------------------------


def compare(first: Shared, second: Shared, shown: int) -> Difference:
    """How far two tables are apart, and the `shown` layers that differ most.

    Raises:
        TableError: they have no entry in common.
    """
    a, b = ({e.layer: e.timing.median_ms for e in shared.entries} for shared in (first, second))
    ratios = {layer: b[layer] / a[layer] for layer in a if layer in b}
    if not ratios:
        raise TableError(f"the tables, of {len(a)} and {len(b)} entries, have none in common")
    furthest = sorted(ratios.items(), key=lambda r: -abs(np.log(r[1])))[:shown]
    p5, median, p95 = np.percentile(list(ratios.values()), [5, 50, 95])
    fields = tuple(differences(first.fingerprint, second.fingerprint))
    return Difference(
        fields, len(ratios), len(a) - len(ratios), len(b) - len(ratios), float(median), float(p5), float(p95),
        tuple(furthest),
    )  # fmt: skip


def sample(entries: Sequence[Entry], count: int, seed: int) -> list[Entry]:
    """Some entries, drawn at random."""
    draw = np.random.Generator(np.random.PCG64(seed))
    return [entries[at] for at in sorted(draw.permutation(len(entries))[:count])]


def described(layer: LayerShape) -> str:
    """A layer in one line: conv 3x3/2 64 -> 128 at 56x56 + relu."""
    kernel = " " + "x".join(map(str, layer.kernel)) if layer.kernel else ""
    stride = f"/{layer.stride[0]}" if layer.stride and max(layer.stride) > 1 else ""
    groups = f" in {layer.conv_groups} groups" if layer.conv_groups > 1 else ""
    at = " at " + "x".join(map(str, layer.spatial)) if layer.spatial else ""
    return f"{layer.op}{kernel}{stride} {layer.in_ch} -> {layer.out_ch}{groups}{at}" + "".join(
        f" + {name}" for name in layer.fused
    )
