"""`edgeprune table ...`: look at the measurements on this disk, check them, hand them on."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from .. import config, files, measure, project, sharing, store
from ..errors import MissedError, TableError
from ..sharing import Shared
from ..store import Device, Store
from ..target import Target, open_target
from . import show, show_tables

app = typer.Typer(no_args_is_help=True, help="Latency tables: list, show, check, diff, export, import, merge, plot.")

AGREES = 0.05  # a table whose entries measure this far off, in the median, no longer holds

Which = Annotated[str | None, typer.Argument(help="number in `edgeprune table list`, or an exported file")]
Json = Annotated[bool, typer.Option("--json", help="one machine-readable result on standard output")]
TargetName = Annotated[str | None, typer.Option("--target", "-t", help="a [target.NAME], or cpu")]
ProjectFile = Annotated[Path, typer.Option("--project", "-p", help="the project file")]
PROJECT = Path(config.FILE)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """The tables on this disk: one for each device, runtime, precision and thread count."""
    opened = _store()
    content = {"path": str(opened.path), "devices": files.plain(opened.devices())}
    show.result(content, as_json, show_tables.devices)


@app.command("show")
def show_(which: Which = None, as_json: Json = False) -> None:
    """What a table was measured on, when, in what state the machine was, and how sure its entries are."""
    shared = _table(which)
    show.result(shared, as_json, show_tables.table)


@app.command()
def check(
    which: Which = None,
    count: Annotated[int, typer.Option(min=0, help="entries to measure again")] = 24,
    target: TargetName = None,
    path: ProjectFile = PROJECT,
    as_json: Json = False,
) -> None:
    """Check the file, then measure some entries again: does the table still hold on the target?"""
    opened = _store()
    opened.check()
    shared = _table(which, opened)
    damaged = [e for e in shared.entries if sharing.implausible(e.timing)]
    if damaged:
        problem = sharing.implausible(damaged[0].timing)
        raise TableError(f"{len(damaged)} entries cannot be, such as {sharing.described(damaged[0].layer)}: {problem}")
    with closing(_target(target, path)) as device:
        sharing.check_fits(shared, device.fingerprint(), opened.path)
        found = measure.again(sharing.sample(shared.entries, count, seed=0), device)
    show.result(found, as_json, show_tables.again)
    if found.count and abs(found.median - 1) > AGREES:
        raise MissedError(
            f"the device now runs at {found.median:.1%} of the table's latencies, in the median of {found.count} "
            "entries: take the table again, or find out what changed (load, clocks, temperature)"
        )


@app.command()
def diff(first: str, second: str, as_json: Json = False) -> None:
    """Two tables, by the layers that both have."""
    found = sharing.compare(_table(first), _table(second), show.SHOWN)
    show.result(found, as_json, show_tables.difference)


@app.command()
def export(path: Path, which: Which = None, as_json: Json = False) -> None:
    """Write a table as one JSON file that can be mailed, compared and imported."""
    shared = _table(which)
    sharing.write(shared, path)
    content = {"path": str(path), "entries": len(shared.entries)}
    show.result(content, as_json, lambda c: print(f"{c['path']}: {c['entries']} entries"))


@app.command("import")
def import_(file: Path, target: TargetName = None, path: ProjectFile = PROJECT, as_json: Json = False) -> None:
    """Take over a table that was measured on an equal device; any difference in conditions is refused by name."""
    shared = sharing.read(file)
    with closing(_target(target, path)) as device:
        sharing.check_fits(shared, device.fingerprint(), file)
    added = sharing.add(_store(), shared, file.name)
    content = {"entries": len(shared.entries), "added": added}
    show.result(content, as_json, lambda c: print(f"{c['added']} of {c['entries']} entries added; the rest was known"))


@app.command()
def merge(other: Path, as_json: Json = False) -> None:
    """Take over every table of another store file, each under its own conditions."""
    if not other.exists():
        raise TableError(f"{other} does not exist; name a latency.sqlite of another machine or user")
    opened, source = _store(), Store(other)
    added = {}
    for device in source.devices():
        shared = sharing.taken(source, device.fingerprint)
        added[device.fingerprint.device] = sharing.add(opened, shared, other.name)
    show.result({"added": added}, as_json, show_tables.merged)


@app.command()
def plot(
    which: Which = None,
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("table.html"),
    most: Annotated[int, typer.Option(min=1, help="charts, the costliest layers first")] = 40,
    as_json: Json = False,
) -> None:
    """Draw the staircases: latency over output channels, as one HTML page that opens offline."""
    from ..report import stairs

    charts = stairs.write(_table(which), out, most)
    content = {"page": str(out), "charts": charts}
    show.result(content, as_json, lambda c: print(f"{c['page']}: {c['charts']} charts"))


# ---- shared --------------------------------------------------------------------------------------------------


def _store() -> Store:
    return Store(store.default_path())


def _target(name: str | None, path: Path) -> Target:
    if not path.exists():
        return open_target(name or "cpu", {})
    return project.read(path).open_target(name)


def _table(which: str | None, opened: Store | None = None) -> Shared:
    """By number in the store, or an exported file; without either, the table that was measured last."""
    if which is not None and not which.isdigit():
        return sharing.read(Path(which))
    opened = opened or _store()
    return sharing.taken(opened, _device(opened, which).fingerprint)


def _device(opened: Store, which: str | None) -> Device:
    devices = opened.devices()
    if not devices:
        raise TableError(f"{opened.path} holds no table yet; run `edgeprune profile`")
    if which is None:
        return max(devices, key=lambda d: d.last_at)
    found = next((d for d in devices if d.id == int(which)), None)
    if found is None:
        numbers = ", ".join(str(d.id) for d in devices)
        raise TableError(f"there is no table {which}; {opened.path} has {numbers} (`edgeprune table list`)")
    return found
