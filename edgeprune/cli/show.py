"""Results as tables for people, or as one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .. import files, rivals, verify
from ..errors import MissedError
from ..search import front

if TYPE_CHECKING:
    from ..pipeline import Outcome
    from ..profiling import Profile
    from ..records import NetworkCheck, VerifyReport
    from ..rivals import Rival
    from ..series import Series

SHOWN = 12  # rows of a long list


def result(content: Any, as_json: bool, for_people: Callable[[Any], None]) -> None:
    """Print a result to standard output."""
    if as_json:
        print(json.dumps(files.plain(content)))
    else:
        for_people(content)


def _console() -> Console:
    return Console(highlight=False)


def targets(content: Mapping[str, Any]) -> None:
    table = Table("target", "kind", "keys")
    for name, keys in content["targets"].items():
        rest = ", ".join(f"{k} = {v}" for k, v in keys.items() if k != "kind")
        table.add_row(name, keys["kind"], rest)
    _console().print(table)
    _console().print(f"kinds: {', '.join(content['kinds'])}")


def steps(found: Iterator[tuple[str, str]], as_json: bool) -> None:
    """Each step as it is done; as one object in the end."""
    done = {}
    for name, text in found:
        done[name] = text
        if not as_json:
            print(f"{name:<9} {text}", flush=True)
    if as_json:
        print(json.dumps(done))


def target(content: Mapping[str, Any]) -> None:
    table = Table(show_header=False)
    fingerprint, state = content["fingerprint"], content["state"]
    for key in ("kind", "device", "runtime", "precision", "threads"):
        table.add_row(key, str(fingerprint[key]))
    for key, value in fingerprint["details"]:
        table.add_row(key, value)
    table.add_row("load", f"{state['load']:.2f}")
    for note in state["notes"]:
        table.add_row("note", note)
    _console().print(table)


def profile(found: Profile) -> None:
    table = Table("layer", "op", "channels", "dense ms", "share", "at half the channels")
    total = sum(row.dense_ms for row in found.rows)
    for row in sorted(found.rows, key=lambda r: -r.dense_ms)[: 2 * SHOWN]:
        shape = row.layer.shape
        table.add_row(
            row.layer.name,
            shape.op,
            f"{shape.in_ch} -> {shape.out_ch}",
            f"{row.dense_ms:.4f}",
            f"{row.dense_ms / total:.1%}",
            f"{row.half_ms:.4f}",
        )
    _console().print(table)
    print(
        f"{found.filled.entries} entries, {found.filled.measured} measured now, 95 % interval of the median "
        f"±{found.filled.noise:.1%} (median entry); "
        f"sum of layers {total:.4g} ms; smallest network predicted at {found.floor_ms:.4g} ms"
    )
    for note in found.filled.notes:
        print(f"note: {note}")
    if found.check is not None:
        c = found.check
        print(
            f"against {c.networks} whole networks of random widths, its correction fitted on {c.fitted} others: median "
            f"error {c.median_error:.1%}, p95 {c.p95_error:.1%}, {c.within_5:.0%} within 5 %, {c.within_10:.0%} within "
            f"10 %, rank correlation {c.rank_correlation:.3f}; copies of one network differ by {c.noise:.1%}"
        )


def finished(outcome: Outcome, page: Path, as_json: bool) -> None:
    """The verdict; raises MissedError when the network did not pass."""
    result(verdict(outcome, page), as_json, lambda _: _finished(outcome, page))
    if problems := missed(outcome):
        raise MissedError("; ".join(problems))


def verdict(outcome: Outcome, page: Path) -> dict[str, Any]:
    """A finished run for programs."""
    others = [{"target": name, **_checked(report)} for name, report in outcome.others]
    return {**_checked(outcome.report), "run": outcome.run.folder, "page": page, "others": others}


def _checked(report: VerifyReport) -> dict[str, Any]:
    return {"passed": verify.passed(report), "checks": verify.verdict(report), "report": report}


def missed(outcome: Outcome) -> list[str]:
    """What the network did not keep, on all its targets."""
    reports = [("", outcome.report), *((f"{name}: ", report) for name, report in outcome.others)]
    return [f"{at}{c.name}: {c.text}" for at, report in reports for c in verify.verdict(report) if not c.passed]


def _finished(outcome: Outcome, page: Path) -> None:
    if (path := outcome.run.path(f"step-1/{front.NAME}.json")).exists():
        _front(front.read(path), path.with_suffix(".html"))
    if beside := rivals.last(outcome.run):
        _rivals(beside)
    _report(outcome.report)
    for name, report in outcome.others:
        print(f"\non {name}:")
        _report(report)
    print(f"report: {page}")


def _front(choices: Sequence[front.Choice], picture: Path) -> None:
    """What a genetic search offers: a plan's latency is a budget to ask for."""
    table = Table("predicted ms", "accuracy before training", "loss", title="no network was better in both")
    for choice in choices:
        table.add_row(f"{choice.predicted_ms:.4g}", f"{choice.accuracy:.2%}", f"{choice.loss:.3f}")
    _console().print(table)
    print(f"front: {picture} (another of its plans: edgeprune compress --latency-ms MS)")


def _rivals(beside: Sequence[Rival]) -> None:
    """What a strategy's plan buys over those that judge nothing."""
    table = Table("strategy", "predicted ms", "measured ms", "loss", "accuracy before training")
    for rival in beside:
        times = (f"{rival.predicted_ms:.4g}", f"{rival.measured_ms:.4g}")
        table.add_row(rival.strategy, *times, f"{rival.loss:.3f}", f"{rival.accuracy:.2%}")
    _console().print(table)


def _report(report: VerifyReport) -> None:
    _networks(report.dense, report.pruned, report.speedup)
    for check in verify.verdict(report):
        print(f"{'pass' if check.passed else 'MISS'}  {check.name}: {check.text}")
    low, high = report.speedup_low, report.speedup_high
    print(f"speed-up {report.speedup:.2f}x (95 % interval {low:.2f} to {high:.2f})")
    for note in report.notes:
        print(f"note: {note}")


def series(found: Series) -> None:
    """One row for each budget."""
    table = Table("budget", "measured ms", "accuracy", "score kept", "kept by itself", "", "run")
    for point, outcome in zip(found.curve, found.outcomes, strict=True):
        pruned = outcome.report.pruned
        table.add_row(
            f"{point.budget_ms:.4g} ms",
            f"{pruned.latency.median_ms:.4g}",
            "" if pruned.accuracy is None else f"{pruned.accuracy.value:.2%}",
            f"{point.kept:.2%}",
            f"{point.alone:.2%}",
            "pass" if verify.passed(outcome.report) else "MISS",
            str(outcome.run.folder),
        )
    _console().print(table)


def _networks(dense: NetworkCheck, pruned: NetworkCheck, speedup: float) -> None:
    table = Table("", "dense", "pruned", "")
    rows: list[tuple[str, Callable[[NetworkCheck], str], str]] = [
        ("latency, median ms", lambda n: f"{n.latency.median_ms:.4f}", f"{speedup:.2f}x faster"),
        ("latency, p10 to p90", lambda n: f"{n.latency.p10_ms:.4f} to {n.latency.p90_ms:.4f}", ""),
        ("accuracy", _accuracy, ""),
        ("parameters", lambda n: f"{n.params:,}", f"{dense.params / pruned.params:.2f}x fewer"),
        ("MACs", lambda n: f"{n.macs / 1e6:,.1f} M", f"{dense.macs / max(pruned.macs, 1):.2f}x fewer"),
        ("size", lambda n: f"{n.size_bytes / 1e6:.2f} MB", f"{dense.size_bytes / pruned.size_bytes:.2f}x smaller"),
        ("peak memory of a process", _memory, ""),
    ]
    for name, of, note in rows:
        table.add_row(name, of(dense), of(pruned), note)
    _console().print(table)


def _accuracy(network: NetworkCheck) -> str:
    a = network.accuracy
    return "unknown" if a is None else f"{a.value:.2%} ({a.low:.2%} to {a.high:.2%}, {a.total} images)"


def _memory(network: NetworkCheck) -> str:
    return "unknown" if network.peak_memory_bytes is None else f"{network.peak_memory_bytes / 1e6:.1f} MB"


def artifact(content: Mapping[str, Any]) -> None:
    for name in content["files"]:
        print(name)


def each(where: Sequence[Any], contents: Sequence[Any], as_json: bool, for_people: Callable[[Any], None]) -> None:
    """What was found in one place or in several, each with its name."""
    if len(where) == 1:
        result(contents[0], as_json, for_people)
    elif as_json:
        print(
            json.dumps({"places": [{"place": str(p), **content} for p, content in zip(where, contents, strict=True)]})
        )
    else:
        for place, content in zip(where, contents, strict=True):
            print(f"{place}:")
            for_people(content)


def versions(content: Mapping[str, Any]) -> None:
    table = Table("", "version", "installed", "size", "measured")
    for version in content["versions"]:
        measured = version["manifest"].get("measured", {})
        latency = f"{measured['latency_ms']:.4g} ms" if "latency_ms" in measured else ""
        size = f"{version['size_bytes'] / 1e6:.2f} MB"
        table.add_row("current" if version["current"] else "", version["name"], version["installed_at"], size, latency)
    _console().print(table)


def receipt(content: Mapping[str, Any]) -> None:
    print(f"{content['folder']}/current -> versions/{content['version']}")
    if content["previous"]:
        print(f"before: {content['previous']} (go back with `edgeprune flash --rollback --to {content['folder']}`)")
