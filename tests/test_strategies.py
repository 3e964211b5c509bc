"""Every strategy from the command line to a verdict, on real data: tools/test --slow tests/test_strategies.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import small
import torch

import edgeprune
from edgeprune import importance, project, rivals, runs, search, strategies, verify
from edgeprune.config import CompressSection
from edgeprune.graph import trace
from edgeprune.records import VerifyReport
from edgeprune.runs import Run

NAMES = get_args(CompressSection.model_fields["strategy"].annotation)
LITTLE = (
    *("compress.steps=1", "finetune.epochs=1", "search.evaluations=14", "search.images=200"),
    *("soft.steps=50", "soft.images=200", "magnitude.ratio=8.0", "magnitude.images=200"),
)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", NAMES)
def test_compress_goes_from_a_project_to_a_verdict_with(strategy: str, tmp_path: Path) -> None:
    run = compressed(tmp_path, "--strategy", strategy)
    beside = [rival.strategy for rival in rivals.last(run)]
    assert beside == ([strategy, "knapsack", "uniform"] if strategy in strategies.LOOKING else [])
    journal = run.path(f"step-1/{search.JOURNAL}")
    assert journal.exists() == (strategy in search.NAMES)
    if journal.exists():
        assert 2 <= len(list(search.journal.read(journal))) <= 14


@pytest.mark.slow
@pytest.mark.parametrize("score", ["sp-lamp-log", "taylor"])
def test_compress_goes_from_a_project_to_a_verdict_by_scores(score: str, tmp_path: Path) -> None:
    """And keeps the channels that score highest."""
    run = compressed(tmp_path, "--importance", score)
    opened = project.read(tmp_path / "edgeprune.toml")
    graph = trace(opened.model, opened.example)
    scores = importance.score(opened.model, graph.groups, score, opened.task().batches())
    plan = run.read("step-1/plan.json", "edgeprune.step/1")["chosen"]
    for group in graph.groups:
        kept = plan["keep"].get(group.id, range(group.width))
        assert len(kept) == plan["plan"]["widths"][group.id]
        least = min(scores[group.id][list(kept)])
        gone = np.delete(scores[group.id], list(kept))
        assert gone.max(initial=-np.inf) <= least * (1 + 1e-5)
    assert sum(len(plan["keep"][g]) for g in plan["keep"]) < sum(group.width for group in graph.groups)


def compressed(folder: Path, *arguments: str) -> Run:
    """A run of the command line, whose verdict is right about everything but what a busy machine may miss."""
    small.make(folder, small.QUICK)
    little = [word for setting in LITTLE for word in ("--set", setting)]
    process = small.command("compress", *arguments, "--json", *little, cwd=folder)
    out, err = process.communicate(timeout=900)
    assert process.returncode in (0, 1), err  # measured on a machine that may be busy
    assert json.loads(out)["passed"] == (process.returncode == 0)
    run = Run(folder / "runs/001")
    report = runs.as_record(VerifyReport, run.read("verify.json", verify.FORMAT))
    assert report.speedup > 1.3
    assert all(check.passed for check in verify.verdict(report) if check.name != "latency")
    opened = project.read(folder / "edgeprune.toml")
    module = edgeprune.load(run.folder, opened.model)
    with torch.inference_mode():
        right = sum(int((module(x).argmax(1) == y).sum()) for x, y in opened.data.final.batches(64))
    assert report.pruned.accuracy is not None
    assert abs(report.pruned.accuracy.correct - right) <= 1  # a tie may fall to either side
    return run
