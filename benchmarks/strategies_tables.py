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
GLOBAL = "global-l2"  # the channels of least norm go, of all groups together
VALUED = {"knapsack-taylor": "taylor", GLOBAL: "l2"}  # by what these value channels, and rank them
ONCE = ("uniform", "knapsack", MACS, GLOBAL, "magnitude", "soft")  # one plan for all seeds
BY = "-by-accuracy"  # the same candidates, the most accurate one taken instead of that of least loss
TRIED = (
    "rl", "rl-rate-0", "random-search", "genetic",
    f"rl{BY}", f"rl-rate-0{BY}", f"random-search{BY}", f"genetic{BY}",
)  # fmt: skip
OTHERWISE = {"magnitude": "a scan", "soft": "a gradient"}  # what these look at instead of whole candidates
PLAIN = "knapsack-ce"  # the knapsack's plan, trained on labels alone
SCORED = {"channels-l2": "l2", "channels-taylor": "taylor", "channels-random": "random"}  # its widths, other channels
BORROWED = (PLAIN, *SCORED)
ARMS = ("dense", *ONCE, "knapsack-taylor", *BORROWED, "random", *TRIED)
PAIRS = (
    ("rl", "random-search"), ("rl", "rl-rate-0"), ("rl", "uniform"), ("genetic", "random-search"), ("rl", "knapsack"),
    (f"rl{BY}", "rl"), (f"rl{BY}", "knapsack"), (f"rl{BY}", f"rl-rate-0{BY}"), (f"rl{BY}", f"random-search{BY}"),
    (f"rl-rate-0{BY}", "rl-rate-0"), (f"random-search{BY}", "random-search"), (f"genetic{BY}", "genetic"),
    ("knapsack", "uniform"), ("knapsack", MACS), ("knapsack", GLOBAL), ("channels-l2", GLOBAL), (GLOBAL, "uniform"),
    ("knapsack", "knapsack-taylor"), ("channels-taylor", "knapsack-taylor"), ("knapsack-taylor", "uniform"),
    ("knapsack", PLAIN), *(("knapsack", other) for other in SCORED),
)  # fmt: skip
NEAR = 0.02  # latencies of the arms
LEAST_DRAWS = 10  # of random widths, that are called a distribution
GATE = 0.9  # of them that a plan should be above
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
    parts = (searches(), summary(), places(), latencies(), paired(), foretold(), fronts(), rates())
    return "\n\n".join(part for part in parts if part)


def searches() -> str:
    """What each arm reached at the predicted budget, on the images that a search may look at."""
    found = list(results("searches").values())
    rows = []
    for share in sorted({r["share"] for r in found}):
        for arm in ARMS:
            runs = [r for r in found if (r["arm"], r["share"]) == (arm, share)]
            if runs:
                rows.append(_searched(arm, share, runs, _minutes(found, arm, share)))
        rows += _draws(share)
    marks = [str(m) for m in MARKS]
    header = ["budget / dense", "arm", "searches", "evaluations", "loss after " + marks[0], *marks[1:],
              "accuracy, search images", "processor minutes"]  # fmt: skip
    return record.table(header, rows)


def _searched(arm: str, share: float, runs: Sequence[Mapping[str, Any]], minutes: str) -> list[str]:
    def at(mark: int) -> str:
        if arm not in TRIED:
            return spread([r["loss"] for r in runs], 3) if mark == MARKS[0] else ""
        found = [r["best_so_far"].get(str(mark)) for r in runs]
        return spread(found, 3) if None not in found else "-"

    accuracy = spread([100 * r["accuracy"] for r in runs], 1)
    return [f"{share:g}", arm, str(len(runs)), _evaluations(arm, runs), *map(at, MARKS), accuracy, minutes]


def _evaluations(arm: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """Candidates judged on the way to a plan; the one that is judged only for these tables is not among them."""
    return OTHERWISE.get(arm) or str(runs[0].get("evaluations", 0))


def _minutes(found: Sequence[Mapping[str, Any]], arm: str, share: float) -> str:
    """Of a processor core, for a search that judges all of its candidates itself."""
    runs = [r for r in found if (r["arm"], r["share"]) == (arm, share) and r.get("judged_now", 1)]
    if not runs and arm.endswith(BY):  # all had been judged for the other one
        return _minutes(found, arm.removesuffix(BY), share)
    each = [r["processor_seconds"] / 60 * r.get("evaluations", 1) / r.get("judged_now", 1) for r in runs]
    return f"{np.mean(each):.1f}" if each else "-"


def _draws(share: float) -> list[list[str]]:
    found = record.load(f"{FOLDER}/draws-{share:g}")
    if found is None:
        return []
    best, middle, worst = np.quantile(found["losses"], [0.1, 0.5, 0.9])
    text = f"{middle:.3f} (best tenth {best:.3f}, worst {worst:.3f})"
    return [[f"{share:g}", f"{len(found['losses'])} other random draws", "", "0", text, *[""] * (len(MARKS) + 1)]]


def summary() -> str:
    """Means and spreads over the seeds, on the final images."""
    found, searched = list(results().values()), list(results("searches").values())
    timed, rows = _timed(), []
    for share in sorted({r["share"] for r in found}):
        for arm in ARMS:
            runs = [r for r in found if (r["arm"], r["share"]) == (arm, share)]
            if runs:
                rows.append(_row(arm, runs, searched, timed))
    header = ["budget / dense", "arm", "seeds", "plans", "evaluations", "processor minutes: search", "training",
              "latency / dense: when chosen", "in one session", "accuracy, BN only", "after training"]  # fmt: skip
    return record.table(header, rows)


def _row(
    arm: str, runs: Sequence[Mapping[str, Any]], searched: Sequence[Mapping[str, Any]], timed: Mapping[str, float]
) -> list[str]:
    share, source = runs[0]["share"], "knapsack" if arm in BORROWED else arm
    judged = [r for r in searched if (r["arm"], r["share"]) == (source, share)]
    search = [_evaluations(source, judged), _minutes(searched, source, share)] if judged else ["", ""]
    training = f"{np.mean([r['training_seconds'] for r in runs]) / 60:.1f}"
    names = [name(arm, share, r["seed"]) for r in runs]
    later = [timed[n] for n in names if n in timed]
    latency = ["1", "1"] if arm == "dense" else [_range([r["ratio"] * share for r in runs]), _range(later)]
    accuracies = [spread([100 * r[key] for r in runs], 2) for key in ("accuracy_bn", "accuracy")]
    plans = len({key(r) for r in runs})
    return [f"{share:g}", arm, str(len(runs)), str(plans), *search, training, *latency, *accuracies]


def _range(values: Sequence[float]) -> str:
    ends = [f"{end:.3f}" for end in (min(values), max(values))] if values else ["-"]
    return " to ".join(dict.fromkeys(ends))


def places() -> str:
    """Where each arm lies among random widths at the same latency, the channels ranked alike for all but a few arms."""
    found, rows = results().values(), []
    for share in sorted({r["share"] for r in found}):
        of = {arm: [r for r in found if (r["arm"], r["share"]) == (arm, share)] for arm in ARMS}
        if len(of["random"]) < LEAST_DRAWS:
            continue
        draws = [np.array([100 * r[key] for r in of["random"]]) for key in ("accuracy_bn", "accuracy")]
        tenths = [", ".join(f"{q:.1f}" for q in np.quantile(d, [0.1, 0.5, GATE])) for d in draws]
        rows.append([f"{share:g}", f"{len(of['random'])} random draws: 10th, 50th, 90th percentile", tenths[0], "",
                     tenths[1], ""])  # fmt: skip
        for arm in ARMS:
            if of[arm] and arm not in ("dense", "random"):
                rows.append([f"{share:g}", arm, *_place(of[arm], "accuracy_bn", draws[0]),
                             *_place(of[arm], "accuracy", draws[1])])  # fmt: skip
    header = ["budget / dense", "arm", "mean accuracy, BN only: percentile", "seeds above the 90th",
              "after training: percentile", "seeds above the 90th"]  # fmt: skip
    return record.table(header, rows) if rows else ""


def _place(runs: Sequence[Mapping[str, Any]], key: str, draws: NDArray[np.float64]) -> list[str]:
    values = [100 * r[key] for r in runs]
    above = sum(v > np.quantile(draws, GATE) for v in values)
    return [f"{percentile(float(np.mean(values)), draws):.0f}", f"{above} of {len(values)}"]


def percentile(value: float, draws: NDArray[np.float64]) -> float:
    """The share of the draws that are below, those that are equal by half, in percent.

    Args:
        draws: (draws,).
    """
    return float(100 * ((draws < value).mean() + (draws == value).mean() / 2))


def _timed() -> dict[str, float]:
    """Shares of the dense latency, all measured in one session."""
    found = record.load(f"{FOLDER}/latency")
    return {n: one["latency_ms"] / found["dense_ms"] for n, one in found["networks"].items()} if found else {}


def latencies() -> str:
    """How far the networks lie from their budget, and from each other, when all are timed in turn in one session."""
    session, timed, found, rows = record.load(f"{FOLDER}/latency"), _timed(), results(), []
    for share in sorted({r["share"] for n, r in found.items() if n in timed}):
        shares = {key(r): (timed[n], n) for n, r in found.items() if n in timed and r["share"] == share}
        values = np.array([value for value, _ in shares.values()])
        off = [f"{n} {value / share - 1:+.1%}" for value, n in sorted(shares.values()) if abs(value / share - 1) > NEAR]
        middle, noise = f"{np.median(values):.4f}", f"{session['noise']:.2%}" if session else ""
        rows.append([f"{share:g}", str(len(values)), noise, middle, f"{values.min():.4f} to {values.max():.4f}",
                     f"{(np.abs(values / np.median(values) - 1) <= NEAR).sum()}", ", ".join(off)])  # fmt: skip
    header = ["budget / dense", "networks", "copies of one apart", "latency / dense in one session: median",
              "range", f"within {NEAR:.0%} of the median", f"further than {NEAR:.0%} from the budget"]  # fmt: skip
    return record.table(header, rows) if rows else ""


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
        judged = f"{r['evaluations']} on {r['images']} images"
        minutes = f"{r['minutes']:.1f} with {r['workers']}"
        rows.append([r["arm"], str(r["seed"]), judged, minutes, str(len(gaps)), *volumes, lost])
    header = ["networks", "seed", "judged", "minutes, and processes", "plans on the front",
              "hypervolume, search images", "final images", "accuracy lost, points"]  # fmt: skip
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
