"""`edgeprune compress` with its targets opened: one budget, several, or several targets."""

from __future__ import annotations

from contextlib import ExitStack

from .. import api, files, pipeline, report, series, store
from ..budgets import Request, label
from ..errors import MissedError
from ..pipeline import Also
from ..project import Project
from ..runs import Run
from ..target import Target
from . import show
from .progress import Bars


def run(opened: Project, request: Request, folder: Run, resume: bool, as_json: bool, quiet: bool) -> None:
    """Run it, write the pages and print the verdicts; raises MissedError when a network did not pass."""
    sections = opened.config.search, opened.config.magnitude, opened.config.soft
    asked = [api.asked(opened.config.compress, level[0], *sections) for level in request.levels]
    entries, watch, interval = store.Store(store.default_path()), Bars(quiet), opened.config.profile.interval
    with ExitStack() as stack:
        with watch.stage("load the network and its images"):
            task = opened.task()
        targets = _open(opened, request, stack)
        if len(asked) > 1:
            found = series.compress(
                opened.model, opened.example, targets[0], task, asked, folder, entries, watch, resume, interval
            )
            _series(found, as_json)
            return
        also = [Also(t, b) for t, b in zip(targets[1:], request.levels[0][1:], strict=True)]
        outcome = pipeline.compress(
            opened.model,
            opened.example,
            targets[0],
            task,
            asked[0],
            folder,
            entries,
            watch,
            resume,
            also,
            interval=interval,
        )
    show.finished(outcome, report.write(outcome.run), as_json)


def _open(opened: Project, request: Request, stack: ExitStack) -> list[Target]:
    targets = []
    for name in request.targets:
        targets.append(opened.open_target(name))
        stack.callback(targets[-1].close)
    return targets


def _series(found: series.Series, as_json: bool) -> None:
    pages = [report.write(outcome.run) for outcome in found.outcomes]
    content = {
        "run": found.run.folder,
        "curve": found.curve,
        "runs": [show.verdict(outcome, page) for outcome, page in zip(found.outcomes, pages, strict=True)],
    }
    show.result(files.plain(content), as_json, lambda _: show.series(found))
    missed = [f"{label(o.report.budget)}: {text}" for o in found.outcomes for text in show.missed(o)]
    if missed:
        raise MissedError("; ".join(missed))
