"""The tables of benchmarks/strategies.py, from its result files alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import record
from numpy.typing import NDArray
from scipy.stats import binomtest, spearmanr

FOLDER = "strategies"
MACS = "knapsack-macs"  # priced by multiply-adds, as many of them as the latency allows
ONCE = ("uniform", "knapsack", MACS, "magnitude", "soft")  # one plan for all seeds
BY = "-by-accuracy"  # the same candidates, the most accurate one taken instead of that of least loss
TRIED = ("rl", "rl-rate-0", "random-search", "genetic", f"rl{BY}", f"random-search{BY}", f"genetic{BY}")
PLAIN = "knapsack-ce"  # the knapsack's plan, trained on labels alone
SCORED = {"channels-l2": "l2", "channels-taylor": "taylor", "channels-random": "random"}  # its widths, other channels
BORROWED = (PLAIN, *SCORED)
ARMS = ("dense", *ONCE, *BORROWED, "random", *TRIED)
PAIRS = (
    ("rl", "random-search"), ("rl", "rl-rate-0"), ("rl", "uniform"), ("genetic", "random-search"), ("rl", "knapsack"),
    (f"rl{BY}", "rl"), (f"rl{BY}", "knapsack"), (f"random-search{BY}", "random-search"), (f"genetic{BY}", "genetic"),
    ("knapsack", "uniform"), ("knapsack", MACS),
    ("knapsack", PLAIN), *(("knapsack", other) for other in SCORED),
)  # fmt: skip
MARKS = (25, 50, 100, 150, 200, 300)  # evaluations after which the best so far is noted


def name(arm: str, share: float, seed: int) -> str:
    return f"{arm}-{share:g}-seed{seed}"


def key(result: Mapping[str, Any]) -> str:
    return json.dumps([result["arm"], result["widths"]], sort_keys=True)


def results(part: str = "") -> dict[str, dict[str, Any]]:
    paths = sorted((record.RESULTS / FOLDER / part).glob("*-seed*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def best_so_far(judged: Sequence[tuple[float, float]], budget_ms: float) -> dict[str, float | None]:
    """The least loss within the budget after so many evaluations; None before there was any.

    Args:
        judged: (predicted ms, loss) in order.
    """
    within = [loss if ms <= budget_ms * (1 + 1e-9) else np.inf for ms, loss in judged]
    least = list(itertools.accumulate(within, min))
    return {str(at): float(least[at - 1]) if np.isfinite(least[at - 1]) else None for at in MARKS if at <= len(least)}


def all_of_them() -> str:
    return "\n\n".join(part for part in (searches(), summary(), paired(), foretold(), fronts(), rates()) if part)


def searches() -> str:
    """What each arm reached at the predicted budget, on the images that a search may look at."""
    found = results("searches").values()
    rows = []
    for share in sorted({r["share"] for r in found}):
        for arm in ARMS:
            runs = [r for r in found if (r["arm"], r["share"]) == (arm, share)]
            if runs:
                rows.append(_searched(arm, share, runs))
        rows += _draws(share)
    marks = [str(m) for m in MARKS]
    header = ["budget / dense", "arm", "searches", "loss after " + marks[0], *marks[1:], "accuracy, search images",
              "processor minutes"]  # fmt: skip
    return record.table(header, rows)


def _searched(arm: str, share: float, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    def at(mark: int) -> str:
        if arm not in TRIED:
            return spread([r["loss"] for r in runs], 3) if mark == MARKS[0] else ""
        found = [r["best_so_far"].get(str(mark)) for r in runs]
        return spread(found, 3) if None not in found else "-"

    own = [r for r in runs if r.get("judged_now", 1)]  # others took what was judged for another arm
    minutes = [r["processor_seconds"] / 60 * r.get("evaluations", 1) / r.get("judged_now", 1) for r in own]
    return [
        f"{share:g}", arm, str(len(runs)), *map(at, MARKS), spread([100 * r["accuracy"] for r in runs], 1),
        f"{np.mean(minutes):.1f}" if own else "-",
    ]  # fmt: skip


def _draws(share: float) -> list[list[str]]:
    found = record.load(f"{FOLDER}/draws-{share:g}")
    if found is None:
        return []
    best, middle, worst = np.quantile(found["losses"], [0.1, 0.5, 0.9])
    text = f"{middle:.3f} (best tenth {best:.3f}, worst {worst:.3f})"
    return [[f"{share:g}", f"{len(found['losses'])} random draws", "", text, *[""] * (len(MARKS) + 1)]]


def summary() -> str:
    """Means and spreads over the seeds, on the final images."""
    found = results().values()
    rows = []
    for share in sorted({r["share"] for r in found}):
        for arm in ARMS:
            runs = [r for r in found if (r["arm"], r["share"]) == (arm, share)]
            if runs:
                rows.append(_row(arm, runs))
    header = ["budget / dense", "arm", "seeds", "plans", "measured latency / dense", "accuracy, BN only",
              "after training"]  # fmt: skip
    return record.table(header, rows)


def _row(arm: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    shares = [r["latency_ms"] / r["dense_ms"] if "latency_ms" in r else r["ratio"] * r["share"] for r in runs]
    accuracies = [spread([100 * r[key] for r in runs], 2) for key in ("accuracy_bn", "accuracy")]
    plans = len({key(r) for r in runs})
    latency = "1" if arm == "dense" else f"{min(shares):.3f} to {max(shares):.3f}" if plans > 1 else f"{shares[0]:.3f}"
    return [f"{runs[0]['share']:g}", arm, str(len(runs)), str(plans), latency, *accuracies]


def paired() -> str:
    """Two arms on the same final images, after training, seed by seed: McNemar's exact test."""
    found, rows = results(), []
    for share in sorted({r["share"] for r in found.values() if r["arm"] != "dense"}):
        for one, other in PAIRS:
            for seed in sorted({r["seed"] for r in found.values()}):
                both = [found.get(name(arm, share, seed)) for arm in (one, other)]
                if both[0] and both[1]:
                    rows.append([f"{share:g}", f"{one} - {other}", str(seed), *_mcnemar(*map(_right, both))])
    header = ["budget / dense", "arms", "seed", "points", "only the first right", "only the second", "p"]
    return record.table(header, rows) if rows else ""


def _mcnemar(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> list[str]:
    first, second = int((a & ~b).sum()), int((b & ~a).sum())
    p = binomtest(first, first + second).pvalue if first + second else 1.0
    return [f"{100 * (a.mean() - b.mean()):+.2f}", str(first), str(second), f"{p:.2g}"]


def _right(result: Mapping[str, Any]) -> NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(bytes.fromhex(result["right"]), dtype=np.uint8)).astype(bool)


def foretold() -> str:
    """How well plans are ranked, before any training, by what searches may go by: against accuracy after training."""
    searched, trained, rows = results("searches"), results().values(), []
    for share in sorted({r["share"] for r in searched.values()}):
        plans = [r for r in searched.values() if r["share"] == share]
        after = [[r["accuracy"] for r in trained if _of(r, plan)] for plan in plans]
        known = [(-p["loss"], p["accuracy"], np.mean(a)) for p, a in zip(plans, after, strict=True) if a]
        if len(known) > 3:
            loss, accuracy, final = np.array(known).T
            ranks = [spearmanr(before, final) for before in (loss, accuracy)]
            rows.append([f"{share:g}", str(len(known)), *(f"{r.statistic:.2f} (p = {r.pvalue:.2g})" for r in ranks)])
    header = ["budget / dense", "plans", "loss before, accuracy after: Spearman", "accuracy before, accuracy after"]
    return record.table(header, rows) if rows else ""


def _of(result: Mapping[str, Any], plan: Mapping[str, Any]) -> bool:
    same = (result["arm"], result["share"]) == (plan["arm"], plan["share"])
    return same and (plan["arm"] in ONCE or result["seed"] == plan["seed"])


def fronts() -> str:
    """Accuracies before training of plans for all latencies, on the images they were chosen by and on others."""
    rows = []
    for r in results("fronts").values():
        gaps = [100 * (p["accuracy"] - p["final_accuracy"]) for p in r["plans"]]
        volumes = [f"{r[key]:.4f}" for key in ("accuracy", "final_accuracy")]
        lost = f"{np.mean(gaps):.1f} ({min(gaps):.1f} to {max(gaps):.1f})"
        rows.append([r["arm"], str(r["seed"]), str(r["evaluations"]), str(len(gaps)), *volumes, lost])
    header = ["networks", "seed", "judged", "plans on the front", "hypervolume, search images", "final images",
              "accuracy lost, points"]  # fmt: skip
    return record.table(header, rows) if rows else ""


def rates() -> str:
    found = record.load(f"{FOLDER}/rates")
    if found is None:
        return ""
    rows = [[workers, " ".join(f"{rate:.0f}" for rate in each)] for workers, each in found["per_minute"].items()]
    return record.table(["workers", f"evaluations a minute, {found['images']} images"], rows)


def spread(values: Sequence[float], digits: int) -> str:
    wide = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{wide}"
