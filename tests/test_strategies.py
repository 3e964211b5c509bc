"""Every strategy from the command line to a verdict, on real data: tools/test --slow tests/test_strategies.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import small
import torch

import edgeprune
from edgeprune import project, rivals, runs, search, strategies, verify
from edgeprune.config import CompressSection
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
    small.make(tmp_path, small.QUICK)
    little = [word for setting in LITTLE for word in ("--set", setting)]
    process = small.command("compress", "--strategy", strategy, "--json", *little, cwd=tmp_path)
    out, err = process.communicate(timeout=900)
    assert process.returncode in (0, 1), err  # measured on a machine that may be busy
    assert json.loads(out)["passed"] == (process.returncode == 0)
    run = Run(tmp_path / "runs/001")
    report = runs.as_record(VerifyReport, run.read("verify.json", verify.FORMAT))
    assert report.speedup > 1.3
    assert all(check.passed for check in verify.verdict(report) if check.name != "latency")
    opened = project.read(tmp_path / "edgeprune.toml")
    module = edgeprune.load(run.folder, opened.model)
    with torch.inference_mode():
        right = sum(int((module(x).argmax(1) == y).sum()) for x, y in opened.data.final.batches(64))
    assert report.pruned.accuracy is not None
    assert abs(report.pruned.accuracy.correct - right) <= 1  # a tie may fall to either side
    beside = [rival.strategy for rival in rivals.last(run)]
    assert beside == ([strategy, "knapsack", "uniform"] if strategy in strategies.LOOKING else [])
    journal = run.path(f"step-1/{search.JOURNAL}")
    assert journal.exists() == (strategy in search.NAMES)
    if journal.exists():
        assert 2 <= len(list(search.journal.read(journal))) <= 14
