"""ResNet-20 on CIFAR-10 at half its measured latency: every way to choose widths, at equal evaluations and recipe.

    python benchmarks/strategies.py --data DIR              search, cut, train every arm that has no result yet
    python benchmarks/strategies.py --data DIR --search     only the searches: they share nothing with a quiet machine
    python benchmarks/strategies.py --data DIR --latency    time the networks of all results again, in turn
    python benchmarks/strategies.py --table                 the tables of what there is

Arms: knapsack, uniform and one random draw, which judge nothing; rl, rl with rate 0 (the same samples without
learning), a flat random search, and genetic, which judge the same number of different networks on images of the search
split (batch norm re-estimated). Each arm's plan is carried to the same measured latency. Accuracy is of the final half
of the test images, with batch norm re-estimated, and after the same short training with distillation. The table's
correction is measured once and kept, so that a search that was stopped goes on with the same costs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cifar10
import numpy as np
import record
import torch
from cifar10 import EXAMPLE, SETTINGS, Case

from edgeprune import allocate, allocators, finetune, importance, measure, planning, search
from edgeprune.allocate import Allocator, Costs
from edgeprune.config import RLSection, SearchSection
from edgeprune.finetune import Settings
from edgeprune.records import Evaluation
from edgeprune.runs import Run
from edgeprune.search import Space, Subject
from edgeprune.surgery import cut
from edgeprune.task import Classification
from edgeprune.watch import Silent

FOLDER = "strategies"
TRIED = ("rl", "rl-rate-0", "random-search", "genetic")
ARMS = ("uniform", "random", "knapsack", *TRIED)
BN_IMAGES = 512  # of a candidate; a finished arm has those of the recipe
NEAR = 0.02  # latencies of the arms


class Comparison:
    """The case with costs that stay the same from one start to the next."""

    def __init__(self, case: Case, options: argparse.Namespace) -> None:
        self.case, self.speedup, self.options = case, options.speedup, options
        setup = record.load(f"{FOLDER}/setup")
        if setup is None:
            plans = [dict(allocate.floor(case.costs).widths), *measure.samples(case.costs.candidates, 4, 0)]
            found = case.bench.time([importance.best(case.scores, p) for p in plans])
            known = [*zip(plans, found, strict=True), (dict(case.costs.dense), case.bench.reference_ms)]
            setup = {"known": known, "dense_ms": case.bench.reference_ms}
            record.save(f"{FOLDER}/setup", setup)
        self.costs: Costs = measure.calibrate(case.costs, [(units, ms) for units, ms in setup["known"]])[0]
        self.budget_ms = setup["dense_ms"] / self.speedup
        self.path = record.RESULTS / FOLDER

    def name(self, arm: str, seed: int) -> str:
        tried = f"-{self.options.evaluations}" if arm in TRIED else ""
        return f"{arm}{tried}-{self.speedup:g}x-seed{seed}"

    def search(self, arm: str, seed: int) -> dict[str, Any]:
        """The arm's widths at the budget as predicted, judged on the search images; kept."""
        name = f"{FOLDER}/searches/{self.name(arm, seed)}"
        known = record.load(name)
        if known is None:
            units, found = self._tried(arm, seed) if arm in TRIED else self._planned(arm, seed)
            known = {
                "arm": arm, "seed": seed, "speedup": self.speedup, "widths": units, "loss": found.loss,
                "accuracy": found.accuracy, "predicted_ms": self.costs.predict_ms(units),
                "evaluations": self.options.evaluations if arm in TRIED else 0, "images": self.options.images,
            }  # fmt: skip
            record.save(name, known)
            print(f"{name}: loss {found.loss:.4f}, accuracy {found.accuracy:.2%}", flush=True)
        return known

    def _planned(self, arm: str, seed: int) -> tuple[Mapping[str, int], Evaluation]:
        plan = allocators.named(arm, seed)(self.costs, self.case.scores, self.budget_ms)
        return plan.widths, self._subject(arm, seed).judge(plan.widths, self.options.images)

    def _tried(self, arm: str, seed: int) -> tuple[Mapping[str, int], Evaluation]:
        settings = SearchSection(  # type: ignore[call-arg]
            evaluations=self.options.evaluations,
            images=self.options.images,
            workers=self.options.workers,
            rl=RLSection(rate=0.0 if arm == "rl-rate-0" else 0.5),  # type: ignore[call-arg]
        )
        space = Space(self.costs, self.case.scores, (self.budget_ms,))
        strategy = "rl" if arm == "rl-rate-0" else arm
        found = search.find(self._subject(arm, seed), space, strategy, settings, 1, seed, Silent())
        return found.units, found.evaluation

    def _subject(self, arm: str, seed: int) -> Subject:
        case, images = self.case, self.case.images
        task = Classification(
            images.train, images.search, images.final, Settings(**{**asdict(SETTINGS), "bn_images": BN_IMAGES}), 0, 0
        )
        folder = Run(self.path / "journals" / self.name(arm, seed))
        return Subject(case.dense, case.graph, case.dense, {}, case.scores, task, folder)

    def run(self, arm: str, seed: int) -> None:
        """Search, carry the widths to the measured latency, judge, train, judge."""
        name = f"{FOLDER}/{self.name(arm, seed)}"
        found = self.search(arm, seed)
        if self.options.search or record.load(name) is not None:
            return
        plan = self.plan(arm, seed, found)
        before, after, seconds = self._trained(plan["widths"], seed)
        result = {
            **found, **plan, "batches": self.options.batches, "accuracy_bn": before, "accuracy": after,
            "search_loss": found["loss"], "search_accuracy": found["accuracy"], "training_seconds": seconds,
        }  # fmt: skip
        record.save(name, result)
        print(f"{name}: {before:.2%} -> {after:.2%} at {plan['ratio']:.3f} of the budget", flush=True)

    def plan(self, arm: str, seed: int, found: Mapping[str, Any]) -> dict[str, Any]:
        """Widths at the measured latency; kept, for the training takes as long again."""
        name = f"{FOLDER}/plans/{self.name(arm, seed)}"
        known = record.load(name)
        if known is None:
            shares = allocators.shares_of(self.costs, found["widths"])
            how = allocators.to_shares(shares) if arm in TRIED else allocators.named(arm, seed)
            widths, ratio = self._at_the_latency(how)
            known = {"widths": widths, "ratio": ratio}
            record.save(name, known)
        return {"widths": known["widths"], "ratio": known["ratio"]}

    def _at_the_latency(self, allocator: Allocator) -> tuple[dict[str, int], float]:
        budget_ms, tried = self.budget_ms, []
        for _ in range(planning.TRIES):
            widths = dict(allocator(self.costs, self.case.scores, budget_ms, ()).widths)
            ratio = self.case.ratio(self._cut(widths), self.speedup)
            tried.append((abs(ratio - 1), ratio, widths))
            if tried[-1][0] <= NEAR / 2:
                break
            budget_ms /= ratio
        _, ratio, widths = min(tried, key=lambda t: t[0])
        return widths, ratio

    def _cut(self, widths: Mapping[str, int]) -> torch.nn.Module:
        return cut(self.case.dense, self.case.graph, importance.best(self.case.scores, widths))

    def _trained(self, widths: Mapping[str, int], seed: int) -> tuple[float, float, float]:
        """(accuracy with batch norm alone, accuracy after the short training, its seconds) on the final images."""
        case, torch_seed = self.case, seed
        torch.manual_seed(torch_seed)
        module = self._cut(widths)
        batches = list(case.images.train.batches(128, shuffle_seed=10_000 + seed, augment=True))[:8]
        finetune.reestimate_batch_norm(module, batches)
        before = finetune.accuracy(module, case.images.final)
        began = time.monotonic()
        _short(module, case, seed, self.options.batches)
        return before, finetune.accuracy(module, case.images.final), time.monotonic() - began


def _short(module: torch.nn.Module, case: Case, seed: int, count: int) -> None:
    """The recipe of benchmarks/cifar10.py over so many batches instead of an epoch."""
    optimiser = torch.optim.SGD(
        module.parameters(), lr=SETTINGS.learning_rate, momentum=SETTINGS.momentum,
        weight_decay=SETTINGS.weight_decay, nesterov=True,
    )  # fmt: skip
    teacher = case.teacher(seed)
    module.train()
    batches = case.images.train.batches(SETTINGS.batch_size, shuffle_seed=1000 * seed, augment=True)
    for at, (x, y) in zip(range(count), batches, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = finetune.cosine(SETTINGS.learning_rate, at, count)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                answer = teacher(x).float()
            out = module(x).float()
        loss = finetune.distillation_loss(out, answer, y, SETTINGS.distillation, SETTINGS.temperature)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    module.eval()


# ---- what there is -------------------------------------------------------------------------------------------


def results() -> dict[str, dict[str, Any]]:
    paths = sorted((record.RESULTS / FOLDER).glob("*seed*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def time_results(comparison: Comparison) -> None:
    """All networks in turn, in one session."""
    found, case = results(), comparison.case
    artifacts = [
        case.target.export(comparison._cut(result["widths"]), EXAMPLE, case.folder / f"result-{at}")
        for at, result in enumerate(found.values())
    ]
    dense, *timed = measure.time_networks([case.bench.dense, *artifacts], case.target, 240.0)
    for (stem, result), timing in zip(found.items(), timed, strict=True):
        own = {"latency_ms": timing.median_ms, "p10_ms": timing.p10_ms, "p90_ms": timing.p90_ms}
        record.save(f"{FOLDER}/{stem}", {**result, **own, "dense_ms": dense.median_ms})


def searches() -> str:
    """What each arm reached at the predicted budget, on the images that a search may look at."""
    paths = sorted((record.RESULTS / FOLDER / "searches").glob("*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    rows = [
        [r["arm"], str(r["seed"]), str(r["evaluations"]), f"{r['loss']:.3f}", f"{r['accuracy']:.1%}",
         f"{r['predicted_ms']:.4f}"]
        for r in sorted(found, key=lambda r: r["loss"])
    ]  # fmt: skip
    header = ["arm", "seed", "networks judged", "loss, search images", "accuracy, search images", "predicted ms"]
    return record.table(header, rows)


def summary() -> str:
    """Means and spreads over the seeds, on the final images."""
    found = results().values()
    rows = []
    for speedup in sorted({r["speedup"] for r in found}):
        for arm in ARMS:
            runs = [r for r in found if r["arm"] == arm and r["speedup"] == speedup]
            if runs:
                rows.append(_row(arm, speedup, runs))
    header = [
        "arm", "seeds", "networks judged", "loss, search images", "latency", "accuracy, BN only", "after training",
    ]  # fmt: skip
    return record.table(header, rows)


def _row(arm: str, speedup: float, runs: list[dict[str, Any]]) -> list[str]:
    def spread(key: str, scale: float = 100, digits: int = 2) -> str:
        if key not in runs[0]:
            return ""
        values = scale * np.array([r[key] for r in runs])
        wide = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{values.mean():.{digits}f}{wide}"

    timed = [r for r in runs if "latency_ms" in r]
    share = np.mean([r["latency_ms"] / r["dense_ms"] for r in timed]) if timed else np.mean([r["ratio"] for r in runs])
    latency = f"{share:.3f} of dense" if timed else f"{share / speedup:.3f} of dense"
    judged = str(runs[0].get("evaluations", 0))
    return [
        arm, str(len(runs)), judged, spread("search_loss", 1, 3), latency, spread("accuracy_bn"), spread("accuracy"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cifar10_*.npz and the adapted checkpoints")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=100, help="of 128 images, of the short training")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of training")
    parser.add_argument("--search", action="store_true", help="only search")
    parser.add_argument("--latency", action="store_true", help="time the networks of all results again, in turn")
    parser.add_argument("--table", action="store_true", help="print the table of what there is")
    options = parser.parse_args()
    if not options.table:
        if options.data is None or not (options.data / "cifar10_train.npz").exists():
            parser.error("--data DIR must hold cifar10_train.npz, cifar10_test.npz and the checkpoints")
        os.environ["EDGEPRUNE_DATA"] = str(options.data)
        torch.set_num_threads(options.threads)
        case = cifar10.Case(20, options.data)
        try:
            comparison = Comparison(case, options)
            if options.latency:
                time_results(comparison)
            else:
                for seed in options.seeds:
                    for arm in options.arms:
                        comparison.run(arm, seed)
        finally:
            case.close()
    print(searches(), summary(), sep="\n\n")


if __name__ == "__main__":
    main()
