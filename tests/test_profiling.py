"""A table's own error: what is said of predictions, by hand and by counting; and a real one, against real networks."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgeprune import cli, files, measure, profiling
from edgeprune.cli import show
from edgeprune.measure import Filled
from edgeprune.profiling import Profile

MODEL = """
from torch import nn


def build():
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
"""
TOML = """
[model]
source = "model.py:build"
input = [1, 3, 32, 32]

[profile]
interval = 0.05
"""


def share_within(predicted: Sequence[float], measured: Sequence[float], limit: float) -> float:
    return sum(abs(p - m) <= limit * m for p, m in zip(predicted, measured, strict=True)) / len(measured)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks."""
    at = percent / 100 * (len(values) - 1)
    low, rising = int(at), sorted(values)
    high = min(low + 1, len(values) - 1)
    return rising[low] + (at - low) * (rising[high] - rising[low])


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """By Spearman's own formula, which holds where no two are equal."""
    ranks = [[sorted(values).index(v) for v in values] for values in (first, second)]
    apart = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    return 1 - 6 * apart / (len(first) ** 3 - len(first))


def test_predictions_are_judged_as_by_hand() -> None:
    predicted, measured = np.array([1.04, 1.84, 3.6, 3.92]), np.array([1.0, 2.0, 3.0, 4.0])
    found = profiling.judge(predicted, measured, fitted=9, noise=0.013)
    assert found.median_error == pytest.approx(0.06)  # of 2, 4, 8 and 20 %
    assert found.p95_error == pytest.approx(0.182)  # 85 % of the way from 8 to 20
    assert (found.within_5, found.within_10) == (0.5, 0.75)
    assert found.rank_correlation == pytest.approx(1.0)
    assert (found.networks, found.fitted, found.noise) == (4, 9, 0.013)
    assert found.predicted_ms == (1.04, 1.84, 3.6, 3.92)
    assert profiling.judge(predicted[::-1], measured, 9, 0.0).rank_correlation == pytest.approx(-1.0)


@pytest.mark.parametrize("seed", range(5))
def test_errors_shares_and_ranks_are_those_that_are_counted_one_by_one(seed: int) -> None:
    draw = np.random.Generator(np.random.PCG64(seed))
    measured = draw.uniform(1, 8, 30)
    predicted = measured * draw.normal(1, 0.08, 30)
    found = profiling.judge(predicted, measured, fitted=9, noise=0.0)
    pairs = predicted.tolist(), measured.tolist()
    errors = [abs(p - m) / m for p, m in zip(*pairs, strict=True)]
    assert found.median_error == pytest.approx(statistics.median(errors))
    assert found.p95_error == pytest.approx(percentile(errors, 95))
    assert found.within_5 == pytest.approx(share_within(*pairs, 0.05))
    assert found.within_10 == pytest.approx(share_within(*pairs, 0.10))
    assert 0 < found.within_5 < found.within_10 < 1
    assert found.rank_correlation == pytest.approx(spearman(*pairs))


def test_two_networks_have_no_rank_correlation() -> None:
    found = profiling.judge(np.array([1.0, 2.0]), np.array([1.0, 2.0]), 9, 0.0)
    assert math.isnan(found.rank_correlation)


def test_what_was_found_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    check = profiling.judge(np.array([1.04, 1.84, 3.6, 3.92]), np.array([1.0, 2.0, 3.0, 4.0]), 9, 0.013)
    notes = ("12 of 135 entries did not get within 1%", "busy: load 3.1 on 2 cores")
    show.profile(Profile((), Filled(135, 40, 2, 0.01, 0.007, 12, notes), 0.5, check))
    text = capsys.readouterr().out
    assert "135 entries, 40 measured now, 95 % interval of the median ±0.7% (median entry)" in text
    assert "note: 12 of 135 entries did not get within 1%\nnote: busy: load 3.1 on 2 cores\n" in text
    assert (
        "against 4 whole networks of random widths, its correction fitted on 9 others: median error 6.0%, p95 18.2%, "
        "50% within 5 %, 75% within 10 %, rank correlation 1.000; copies of one network differ by 1.3%"
    ) in text


def test_a_table_is_checked_against_whole_networks_on_this_processor(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEPRUNE_HOME", str(folder / "home"))
    monkeypatch.setattr(measure, "NETWORK_VISITS", (10, 20))  # this is about the path, not about the last percent:
    monkeypatch.setattr(profiling, "FITTED", 2)  # fewer networks to export
    Path("model.py").write_text(MODEL)
    Path("edgeprune.toml").write_text(TOML)
    assert cli.run(["profile", "--check", "4", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["filled"]["measured"] == found["filled"]["entries"] > 10
    assert found["filled"]["interval"] == 0.05
    check = found["check"]
    assert (check["networks"], check["fitted"]) == (4, 3)  # two, and the dense one
    assert len(check["predicted_ms"]) == len(check["measured_ms"]) == 4
    again = profiling.judge(np.array(check["predicted_ms"]), np.array(check["measured_ms"]), 3, check["noise"])
    assert check == json.loads(json.dumps(files.plain(again)))
    assert max(check["measured_ms"]) > 1.5 * min(check["measured_ms"]), "networks of different widths"
    assert check["median_error"] < 0.2, "and predictions of just these, also on a busy machine"
    assert found["floor_ms"] < min(check["measured_ms"])
