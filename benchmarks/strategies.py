"""ResNet-20 on CIFAR-10 at half its measured latency: every way to choose widths, at equal evaluations and recipe.

    python benchmarks/strategies.py --data DIR --search     find widths for every arm: needs no quiet machine
    python benchmarks/strategies.py --data DIR --fit        carry them all to the measured latency: needs a quiet one
    python benchmarks/strategies.py --data DIR              train and judge what has been carried there
    python benchmarks/strategies.py --data DIR --latency    time the networks of all results, in one session
    python benchmarks/strategies.py --data DIR --fronts     search fronts, genetic and random; judge them once more
    python benchmarks/strategies.py --data DIR --rates      evaluations a minute with one and with two workers
    python benchmarks/strategies.py --table                 the tables of what there is

Arms: uniform, knapsack, magnitude and soft, which give one plan for all seeds; random, one draw a seed; and four that
judge the same number of different networks on images of the search split, anew for each seed: rl, rl with rate 0 (the
same samples without learning), random-search, genetic. Before a candidate is judged its batch norm is re-estimated on
256 images. *-by-accuracy are the most accurate ones of the same candidates, instead of those of least loss; of rl's
own, for it moves towards them.
knapsack-macs prices channels by multiply-adds, as many of them as the latency allows; knapsack-taylor is the knapsack
with Taylor's scores, anew for each seed, as the values and as the ranking; from global-l2 the channels of least L2 norm
go, of all groups together, until the latency fits. knapsack-ce is the knapsack's plan, trained on labels alone;
channels-* are its widths with channels ranked otherwise. Draws of random widths beyond the third (--arms random --seeds
0 1 ... 19) are trained too: the tables say where among them each arm lies. Accuracy is of the final half
of the test images, with batch norm re-estimated on 1,024 images, and after the same short training with distillation.
Every piece is kept, and one that was stopped goes on. The table's correction is measured once and kept, so that a
search that goes on has the same costs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import arms
import cifar10
import numpy as np
import record
import strategies_fronts as fronts
import strategies_tables as tables
import torch
from cifar10 import EXAMPLE, SETTINGS, Case
from strategies_tables import ARMS, BORROWED, BY, FOLDER, GLOBAL, MACS, NEAR, ONCE, PLAIN, SCORED, TRIED, VALUED
from strategies_task import Judged, inside, right, short

from edgeprune import allocate, allocators, finetune, importance, measure, search, shaping, surgery
from edgeprune.allocate import Allocator, Costs
from edgeprune.config import MagnitudeSection, RLSection, SearchSection, SoftSection
from edgeprune.importance import Importance
from edgeprune.records import Evaluation
from edgeprune.runs import Run
from edgeprune.search import Space, Subject, workers
from edgeprune.watch import Silent

ROUNDS = 4  # of carrying plans to the measured latency
SESSION_S = 45.0  # of timing all of them in turn
LATENCY_S = 90.0  # of timing the networks of all results
SCAN_IMAGES = 250  # by which magnitude's scan judges each layer at each threshold: 240 evaluations of them
SOFT_STEPS = 150  # of the gradient, half of what is the default: time
TAYLOR_IMAGES = 2048  # by whose gradients channels are ranked
DRAWS = 20  # further ones of random widths, judged before training only
TRAININGS = 3  # orders of images; random draws beyond the third are trained by these in turn


class Comparison:
    """The case with costs that stay the same from one start to the next."""

    def __init__(self, case: Case, options: argparse.Namespace) -> None:
        self.case, self.options = case, options
        setup = record.load(f"{FOLDER}/setup")
        if setup is None:
            plans = [dict(allocate.floor(case.costs).widths), *measure.samples(case.costs.candidates, 4, 0)]
            found = case.bench.time([importance.best(case.scores, p) for p in plans])
            known = [*zip(plans, found, strict=True), (dict(case.costs.dense), case.bench.reference_ms)]
            setup = {"known": known, "dense_ms": case.bench.reference_ms}
            record.save(f"{FOLDER}/setup", setup)
        self.costs: Costs = measure.calibrate(case.costs, [(units, ms) for units, ms in setup["known"]])[0]
        self.dense_ms: float = setup["dense_ms"]

    def names(self) -> list[tuple[str, float, int]]:
        """(arm, share of the dense latency, seed) of everything that is asked for."""
        return [(a, share, seed) for share in self.options.share for seed in self.options.seeds for a in _arms(self)]

    # ---- finding widths ----

    def search(self, arm: str, share: float, seed: int) -> dict[str, Any]:
        """The arm's widths at the budget as predicted, judged on the search images; kept."""
        if arm in ONCE:
            seed = 0
        name = f"{FOLDER}/searches/{tables.name(arm, share, seed)}"
        known = record.load(name)
        if known is None:
            began = time.process_time()
            units, found, more = self._found(arm, share, seed)
            known = {
                "arm": arm, "seed": seed, "share": share, "widths": units, "loss": found.loss,
                "accuracy": found.accuracy, "predicted_ms": self.costs.predict_ms(units), "images": self.options.images,
                "processor_seconds": time.process_time() - began, **more,
            }  # fmt: skip
            record.save(name, known)
            print(f"{name}: loss {found.loss:.4f}, accuracy {found.accuracy:.2%}", flush=True)
        if arm in TRIED and known["evaluations"] != self.options.evaluations:
            raise SystemExit(
                f"{name} is of {known['evaluations']} evaluations, not {self.options.evaluations}: delete it, or ask "
                "for as many"
            )
        return known

    def _found(self, arm: str, share: float, seed: int) -> tuple[dict[str, int], Evaluation, dict[str, Any]]:
        budget_ms = share * self.dense_ms
        scores = self._scored(VALUED[arm], seed) if arm in VALUED else self.case.scores
        subject = self.subject(arm, share, seed, scores)
        if arm in TRIED:
            return self._tried(subject, arm, budget_ms, seed)
        if arm in shaping.NAMES:
            shape = self._shape(subject, arm, budget_ms)
            plan = allocators.scaled(shape.shares, self.costs, shape.scores, budget_ms)
            subject = self.subject(arm, share, seed, shape.scores)
            more = _listed(shape.scores) if arm == "magnitude" else {}
            return dict(plan.widths), subject.judge(plan.widths, self.options.images), more
        plan = _allocator(arm, seed)(self.costs, scores, budget_ms, ())
        more = _listed(scores) if arm in VALUED else {}
        return dict(plan.widths), subject.judge(plan.widths, self.options.images), more

    def _tried(
        self, subject: Subject, arm: str, budget_ms: float, seed: int
    ) -> tuple[dict[str, int], Evaluation, dict[str, Any]]:
        settings = SearchSection(  # type: ignore[call-arg]
            evaluations=self.options.evaluations,
            images=self.options.images,
            workers=self.options.workers,
            by="accuracy" if arm.endswith(BY) else "loss",
            rl=RLSection(rate=0.0 if "-rate-0" in arm else 0.5),  # type: ignore[call-arg]
        )
        path = subject.run.path(search.JOURNAL)
        before = len(list(search.journal.read(path))) if path.exists() else 0
        space = Space(self.costs, self.case.scores, (budget_ms,))
        strategy = arm.removesuffix(BY).removesuffix("-rate-0")
        found = search.find(subject, space, strategy, settings, 1, seed, Silent())
        judged = list(search.journal.read(path))
        curve = tables.best_so_far([(self.costs.predict_ms(space.units(k)), e.loss) for k, e in judged], budget_ms)
        more = {"evaluations": len(judged), "judged_now": len(judged) - before, "best_so_far": curve}
        return dict(found.units), found.evaluation, more

    def _shape(self, subject: Subject, arm: str, budget_ms: float) -> shaping.Shape:
        if arm == "magnitude":
            scanned = MagnitudeSection(images=SCAN_IMAGES)  # type: ignore[call-arg]
            return shaping.by_magnitude(subject, scanned, Silent())
        settings = SoftSection(images=self.options.images, steps=SOFT_STEPS)  # type: ignore[call-arg]
        return shaping.by_gradient(subject, self.costs, budget_ms, (), {}, settings, Silent())

    def subject(self, arm: str, share: float, seed: int, scores: Importance | None = None) -> Subject:
        case, task = self.case, Judged(self.case, 0, self.options.batches)
        same = arm if arm == f"rl{BY}" else arm.removesuffix(BY)  # candidates; where rl goes depends on them
        folder = Run(record.RESULTS / FOLDER / "journals" / tables.name(same, share, seed))
        return Subject(case.dense, case.graph, case.dense, {}, scores or case.scores, task, folder)

    def draws(self, share: float) -> None:
        """What random widths lose before training: the bar for plans that judge nothing."""
        name = f"{FOLDER}/draws-{share:g}"
        if record.load(name) is None:
            subject, losses = self.subject("random", share, 0), []
            for seed in range(100, 100 + DRAWS):
                plan = allocators.named("random", seed)(self.costs, self.case.scores, share * self.dense_ms)
                losses.append(subject.judge(plan.widths, self.options.images).loss)
            record.save(name, {"share": share, "losses": losses})

    # ---- carrying them to the measured latency ----

    def fit(self) -> None:
        """All plans that are off are made again for another predicted budget, and timed in turn with the dense one.

        One that has been trained stays as it was.
        """
        found = {tables.name(*n): (n, self.search(*n)) for n in self._distinct()}
        for _ in range(ROUNDS):
            plans = {name: record.load(f"{FOLDER}/plans/{name}") for name in found}
            off = [name for name, plan in plans.items() if plan is None or abs(plan["ratio"] - 1) > NEAR / 2]
            if not off:
                return
            made = {name: self._made(*found[name], plans[name]) for name in off}
            timed = self._timed([(plan["widths"], found[name][1]) for name, plan in made.items()])
            for (name, plan), ms in zip(made.items(), timed[1:], strict=True):
                ratio = ms.median_ms / timed[0].median_ms / found[name][0][1]
                attempts = [
                    *plan["attempts"],
                    {"budget_ms": plan["budget_ms"], "widths": plan["widths"], "ratio": ratio},
                ]
                best = min(attempts, key=lambda a: abs(a["ratio"] - 1))
                record.save(f"{FOLDER}/plans/{name}", {**best, "attempts": attempts})
                print(f"{name}: {ratio:.3f} of the budget", flush=True)

    def _distinct(self) -> list[tuple[str, float, int]]:
        """Of what has been searched, and not trained yet."""
        names = dict.fromkeys((a, share, 0 if a in ONCE else seed) for a, share, seed in self.names())
        results = tables.results().values()
        trained = {(r["arm"], r["share"], 0 if r["arm"] in ONCE else r["seed"]) for r in results}
        found = [n for n in names if record.load(f"{FOLDER}/searches/{tables.name(*n)}") is not None]
        return [n for n in found if n not in trained]

    def _made(self, name: tuple[str, float, int], found: Mapping[str, Any], before: Any) -> dict[str, Any]:
        arm, share, seed = name
        budget_ms = share * self.dense_ms
        attempts = before["attempts"] if before else []
        if attempts:
            budget_ms = attempts[-1]["budget_ms"] / attempts[-1]["ratio"]
        plan = self._how(arm, seed, found)(self.costs, self._scores_of(found), budget_ms, ())
        return {"widths": dict(plan.widths), "budget_ms": budget_ms, "attempts": attempts}

    def _how(self, arm: str, seed: int, found: Mapping[str, Any]) -> Allocator:
        if arm in TRIED or arm in shaping.NAMES:
            return allocators.to_shares(allocators.shares_of(self.costs, found["widths"]))
        return _allocator(arm, seed)

    def _timed(
        self, networks: list[tuple[Mapping[str, int], Mapping[str, Any]]], session_s: float = SESSION_S
    ) -> list[measure.Timing]:
        """The dense network, then these."""
        case = self.case
        artifacts = [
            case.target.export(self.cut(widths, found), EXAMPLE, case.folder / f"timed-{at}")
            for at, (widths, found) in enumerate(networks)
        ]
        return measure.time_networks([case.bench.dense, *artifacts], case.target, session_s)

    def cut(self, widths: Mapping[str, int], found: Mapping[str, Any]) -> torch.nn.Module:
        case = self.case
        return surgery.cut(case.dense, case.graph, importance.best(self._scores_of(found), widths))

    def _scores_of(self, found: Mapping[str, Any]) -> Importance:
        """The arm's own, or those of the case."""
        return {g: np.array(s) for g, s in found["scores"].items()} if "scores" in found else self.case.scores

    # ---- training ----

    def run(self, arm: str, share: float, seed: int) -> None:
        """Judge the network at the measured latency, train it, judge it again."""
        name = f"{FOLDER}/{tables.name(arm, share, seed)}"
        if record.load(name) is not None:
            return
        found: Mapping[str, Any] = {}
        plan: dict[str, Any] | None = {"widths": dict(self.costs.dense), "ratio": 1 / share}
        if arm != "dense":
            source = "knapsack" if arm in BORROWED else arm
            at = tables.name(source, share, 0 if source in ONCE else seed)
            plan = record.load(f"{FOLDER}/plans/{at}")
            if plan is None:
                print(f"{name} has no plan at the measured latency yet: --search and --fit make one", flush=True)
                return
            found = self.search(source, share, seed)
        if arm in SCORED:
            found = {**found, "scores": self._scored(SCORED[arm], seed)}
        trained = self._trained(self.cut(plan["widths"], found), arm, seed % TRAININGS)
        result = {
            "arm": arm, "share": share, "seed": seed, "widths": plan["widths"], "ratio": plan["ratio"],
            "batches": self.options.batches, **trained,
        }  # fmt: skip
        record.save(name, result)
        print(f"{name}: {result['accuracy_bn']:.2%} -> {result['accuracy']:.2%}", flush=True)

    def _scored(self, score: str, seed: int) -> Importance:
        case = self.case
        batches = case.images.train.batches(SETTINGS.batch_size, shuffle_seed=20_000 + seed, augment=True)
        some = list(islice(batches, TAYLOR_IMAGES // SETTINGS.batch_size)) if score == "taylor" else ()
        return importance.score(case.dense, case.graph.groups, score, some, seed)

    def _trained(self, module: torch.nn.Module, arm: str, seed: int) -> dict[str, Any]:
        """Accuracy on the final images with batch norm alone and after the short training, and what it gets right."""
        images = self.case.images
        inside(module)
        if arm != "dense":
            batches = images.train.batches(SETTINGS.batch_size, shuffle_seed=10_000 + seed, augment=True)
            finetune.reestimate_batch_norm(module, islice(batches, SETTINGS.bn_images // SETTINGS.batch_size))
        before = finetune.accuracy(module, images.final)
        began = time.process_time()
        distillation = 0.0 if arm == PLAIN else SETTINGS.distillation
        short(module, self.case.teacher(seed), images.train, seed, self.options.batches, distillation)
        seconds = time.process_time() - began
        found = right(module, images.final)
        return {
            "accuracy_bn": before, "accuracy": float(found.mean()), "right": np.packbits(found).tobytes().hex(),
            "training_seconds": seconds,
        }  # fmt: skip

    # ---- latencies, rates ----

    def time_results(self) -> None:
        """All networks in turn, in one session."""
        found = {name: r for name, r in tables.results().items() if r["arm"] != "dense"}
        distinct = {tables.key(r): r for r in found.values()}
        dense, *timed = self._timed([(r["widths"], self._search_of(r)) for r in distinct.values()], LATENCY_S)
        known = dict(zip(distinct, timed, strict=True))
        networks = {}
        for name, result in found.items():
            one = known[tables.key(result)]
            networks[name] = {"latency_ms": one.median_ms, "p10_ms": one.p10_ms, "p90_ms": one.p90_ms}
        noise = measure.spread([dense, *timed])
        record.save(f"{FOLDER}/latency", {"dense_ms": dense.median_ms, "noise": noise, "networks": networks})

    def _search_of(self, result: Mapping[str, Any]) -> dict[str, Any]:
        return self.search("knapsack" if result["arm"] in BORROWED else result["arm"], result["share"], result["seed"])

    def rates(self, count: int = 16) -> None:
        """The same candidates judged by one process and by two workers, in turn; answers must be the same."""
        subject = self.subject("random", 0.5, 0)
        asked = [
            allocators.named("random", 200 + at)(self.costs, self.case.scores, 0.5 * self.dense_ms).widths
            for at in range(count)
        ]
        minutes: dict[int, list[float]] = {1: [], 2: []}
        answers: dict[int, list[Evaluation]] = {}
        for number in (1, 2, 1, 2):
            settings = SearchSection(images=self.options.images, workers=number)  # type: ignore[call-arg]
            with workers.judges(subject, settings) as judges:
                list(judges(asked[:number]))  # workers have started when these are back
                began = time.monotonic()
                answers[number] = [e for _, e in sorted(judges(asked), key=lambda found: found[0])]
                minutes[number].append(count / (time.monotonic() - began) * 60)
        if answers[1] != answers[2]:
            raise RuntimeError("two workers did not answer as one process does")
        record.save(f"{FOLDER}/rates", {"evaluations": count, "images": self.options.images, "per_minute": minutes})


def _allocator(arm: str, seed: int) -> Allocator:
    own: dict[str, Allocator] = {MACS: arms.by_macs, GLOBAL: arms.globally}
    return own.get(arm) or allocators.named("knapsack" if arm in VALUED else arm, seed)


def _listed(scores: Importance) -> dict[str, Any]:
    return {"scores": {g: s.tolist() for g, s in scores.items()}}


def _arms(comparison: Comparison) -> list[str]:
    return [arm for arm in comparison.options.arms if arm not in ("dense", *BORROWED)]


def work(comparison: Comparison, options: argparse.Namespace) -> None:
    if options.search:
        for share in options.share:
            comparison.draws(share)
        for name in comparison.names():
            comparison.search(*name)
    elif options.fit:
        comparison.fit()
    elif options.latency:
        comparison.time_results()
    elif options.rates:
        comparison.rates()
    elif options.fronts:
        for seed in options.seeds:
            fronts.both(comparison, 0.5, seed)
    else:
        for name in comparison.names():
            comparison.run(*name)
        for arm in BORROWED:
            for share in options.share if arm in options.arms else ():
                for seed in options.seeds:
                    comparison.run(arm, share, seed)
        if "dense" in options.arms:
            for seed in options.seeds:
                comparison.run("dense", 1.0, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cifar10_*.npz and the adapted checkpoints")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--share", type=float, nargs="*", default=[0.5], help="of the dense latency")
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--front-evaluations", type=int, default=400)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=100, help="of 128 images, of the short training")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of training")
    parser.add_argument("--search", action="store_true", help="find widths for every arm")
    parser.add_argument("--fit", action="store_true", help="carry them to the measured latency")
    parser.add_argument("--latency", action="store_true", help="time the networks of all results in one session")
    parser.add_argument("--fronts", action="store_true", help="search fronts, genetic and random, and judge them again")
    parser.add_argument("--rates", action="store_true", help="evaluations a minute with one and two workers")
    parser.add_argument("--table", action="store_true", help="print the tables of what there is")
    options = parser.parse_args()
    if not options.table:
        if options.data is None or not (options.data / "cifar10_train.npz").exists():
            parser.error("--data DIR must hold cifar10_train.npz, cifar10_test.npz and the checkpoints")
        os.environ["EDGEPRUNE_DATA"] = str(options.data)
        torch.set_num_threads(options.threads)
        case = cifar10.Case(20, options.data)
        try:
            work(Comparison(case, options), options)
        finally:
            case.close()
    print(tables.all_of_them())


if __name__ == "__main__":
    main()
