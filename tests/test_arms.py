"""What benchmarks/strategies.py compares with: the global ranking, and where an arm lies among random plans."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from test_allocate import Residual, made_up

from edgeprune.errors import UnreachableBudget

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import arms
import record
import strategies_tables as tables


@pytest.mark.parametrize("share", [0.95, 0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3])
def test_what_is_left_of_a_global_ranking_lies_above_one_threshold_and_the_next_lower_one_does_not_fit(
    share: float,
) -> None:
    _, costs, scores = made_up(Residual(), choices=8)
    budget_ms = share * costs.predict_ms(costs.dense)
    found = arms.globally(costs, scores, budget_ms)

    def above(threshold: float) -> dict[str, int]:
        counts = {g: int((s > threshold).sum()) for g, s in scores.items()}
        return {g: next(w for w in costs.candidates[g] if w >= counts[g]) for g in counts}

    each = [above(t) for t in sorted([-1.0, *np.concatenate(list(scores.values()))])]
    fitting = [at for at, units in enumerate(each) if costs.predict_ms(units) <= budget_ms]
    assert found.widths == each[fitting[0]]
    assert costs.predict_ms(each[fitting[0] - 1]) > budget_ms
    assert found.predicted_ms == costs.predict_ms(found.widths) <= budget_ms


def test_a_global_ranking_leaves_every_group_its_narrowest_width_and_says_when_that_does_not_fit() -> None:
    _, costs, scores = made_up(Residual(), choices=8)
    scores = {g: s * 1e-6 if g == "one" else s for g, s in scores.items()}  # all of it would go first
    found = arms.globally(costs, scores, 0.4 * costs.predict_ms(costs.dense))
    assert found.widths["one"] == costs.candidates["one"][0]
    with pytest.raises(UnreachableBudget, match="the smallest network is predicted at"):
        arms.globally(costs, scores, 1e-6)


def test_the_table_of_places_counts_the_random_draws_below_and_seeds_above_the_best_tenth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for seed in range(20):  # 0, 1, ... 19 % before training, and 50 points more after it
        write(tmp_path, "random", seed, seed / 100, 0.5 + seed / 100)
    for seed, after in enumerate((0.68, 0.672, 0.66)):  # the 90th percentile of the draws is 67.1 %
        write(tmp_path, "knapsack", seed, 0.03, after)
    rows = [line.split(" | ") for line in tables.places().splitlines()]
    assert rows[2][2:] == ["1.9, 9.5, 17.1", "", "51.9, 59.5, 67.1", " |"]
    assert rows[3][1:] == ["knapsack", "18", "0 of 3", "90", "2 of 3 |"]  # 17.5 %: three below, one equal; 18 of 20


def test_too_few_random_draws_are_not_called_a_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for seed in range(9):
        write(tmp_path, "random", seed, 0.1, 0.2)
    assert tables.places() == ""


def write(folder: Path, arm: str, seed: int, before: float, after: float) -> None:
    content = {"arm": arm, "share": 0.5, "seed": seed, "accuracy_bn": before, "accuracy": after}
    path = folder / tables.FOLDER / f"{tables.name(arm, 0.5, seed)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
