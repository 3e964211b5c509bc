"""The page of a run."""

from __future__ import annotations

from pathlib import Path

from .runs import Run


def write(run: Run) -> Path:
    return run.path("report.html")
