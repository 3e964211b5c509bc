"""The page of a run: one HTML file that opens offline, for whoever decides and for whoever has to explain it.

`found` reads the run folder, `charts` draws, `templates/report.html` lays out and prints the records.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import files, verify
from ..records import VerifyReport
from ..runs import Run
from . import charts, units
from . import found as found_
from .found import Found

TEMPLATES = Path(__file__).parent.parent / "templates"
PAGE = "report.html"
WHAT = (
    ("run.json", "what was asked for"),
    ("example.safetensors", "the input that the network was traced with"),
    ("preflight.json", "dense latency, floor, and the networks that correct the prediction"),
    ("table.json", "the device, and what filling its latency table took"),
    ("layers.json", "latency of each layer and width of each group, before and after"),
    ("step-*/plan.json", "widths, units kept, every attempt"),
    ("step-*/epochs.json", "loss and accuracy of each epoch"),
    ("step-*/*.safetensors", "checkpoint"),
    ("floors.json", "the floors' metrics on the search split, of each network that was trained"),
    ("step-*/search.jsonl", "every network that the search judged"),
    ("step-*/rivals.json", "the strategy's plan, the knapsack's and uniform widths, judged alike before training"),
    ("step-*/front.*", "networks that none beats in both accuracy and latency"),
    ("model.safetensors", "weights of the pruned network"),
    ("recipe.json", "units kept: with the weights it rebuilds the pruned network from its original class"),
    ("dense/*", "the dense network as the device loads it"),
    ("artifact/*", "the pruned network as the device loads it"),
    ("verify.json", "the last check on the device, with every sample"),
)


def write(run: Run) -> Path:
    """Write `report.html` into the folder of a finished run.

    Raises:
        RunError: the run is not finished, or one of its files is damaged.
    """
    content = render(run)
    with files.writing(run.path(PAGE)) as beside:
        beside.write_text(content, encoding="utf-8")
    return run.path(PAGE)


def render(run: Run) -> str:
    """The page as text: one HTML document that refers to no other file."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    found = found_.read(run)
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.policies["json.dumps_kwargs"] = {"allow_nan": False}
    env.filters |= {f.__name__: f for f in (units.ms, units.span, units.percent, units.count, units.size, units.ratio)}
    groups, networks = found_.groups(found), list(found_.predictions(found))
    return env.get_template(PAGE).render(
        **vars(found),
        run=run,
        checks=verify.verdict(found.report),
        passed=verify.passed(found.report),
        headline=headline(found.report),
        limit_ms=verify.budget_ms(found.report.budget, found.report.dense.latency.median_ms),
        notes=notes(found),
        groups=groups,
        networks=networks,
        charts=charts.draw(found, groups, networks),
        settings=[*flat(found.asked.get("asked", {})), *flat(found.asked.get("training", {}), "training.")],
        versions=list(versions(found)),
        contents=list(contents(run)),
        plotly=Markup(get_plotlyjs()),
    )


def headline(report: VerifyReport) -> str:
    """The verdict in one sentence."""
    dense, pruned = report.dense, report.pruned
    missed = [check.name for check in verify.verdict(report) if not check.passed]
    accuracy = "accuracy not measured"
    if pruned.accuracy is not None:
        was = f" (was {units.percent(dense.accuracy.value)})" if dense.accuracy is not None else ""
        accuracy = f"accuracy {units.percent(pruned.accuracy.value)}{was}"
    return (
        f"{'Missed ' + ' and '.join(missed) if missed else 'Passed'}: "
        f"{units.ratio(report.speedup, 'faster', 'slower')}, {units.ms(pruned.latency.median_ms)} measured on "
        f"{report.fingerprint.device} "
        f"(budget {units.ms(verify.budget_ms(report.budget, dense.latency.median_ms))}), {accuracy}"
    )


def notes(found: Found) -> list[str]:
    """What a reader should know before trusting the figures."""
    report = found.report
    planned_for = found.asked.get("asked", {}).get("target", files.plain(report.fingerprint))
    moved = planned_for != files.plain(report.fingerprint)
    plan = found.steps[-1].chosen.note if found.steps else ""
    return [
        *(["verified on another device, or with other settings of it, than planned for"] if moved else []),
        *report.notes,
        *report.state.notes,
        *([f"the plan is {plan}"] if plan else []),
    ]


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted key, text), without the device: it has its own section."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.") if key != "target" else ()
        elif isinstance(value, list):
            yield f"{prefix}{key}", ", ".join(map(str, value)) or "none"
        elif isinstance(value, bool):
            yield f"{prefix}{key}", "yes" if value else "no"
        else:
            yield f"{prefix}{key}", "not set" if value is None else str(value)


def versions(found: Found) -> Iterator[tuple[str, str]]:
    """Of what made the run, where that was recorded, and of what wrote this page."""
    yield "on the device", found.report.fingerprint.runtime
    for name, version in found.asked.get("versions", {}).items():
        yield f"{name}, made the run", str(version)
    for name in ("edgeprune", "torch", "plotly"):
        yield f"{name}, wrote this page", metadata.version(name)
    yield "python, wrote this page", platform.python_version()


def contents(run: Run) -> Iterator[tuple[str, int, str]]:
    """(path in the run folder, bytes, what it is) of each file but this page."""
    for path in sorted(p for p in run.folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        name = path.relative_to(run.folder).as_posix()
        if name != PAGE:
            yield name, path.stat().st_size, next((what for pattern, what in WHAT if fnmatch(name, pattern)), "")
