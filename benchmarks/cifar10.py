"""ResNet-20 and ResNet-56 on CIFAR-10: accuracy at equal measured latency and equal recipe.

    python benchmarks/cifar10.py --data DIR                        every arm that is not in benchmarks/results yet
    python benchmarks/cifar10.py --data DIR --depth 20 --seeds 3   a part of it; the table shows what there is
    python benchmarks/cifar10.py --data DIR --plans                only choose their networks: wants a quiet machine
    python benchmarks/cifar10.py --data DIR --latency              time the networks of all results again, in turn
    python benchmarks/cifar10.py --table                           the table alone

Arms: edgeprune's knapsack; uniform widths and random allocations with the same channel scores; Torch-Pruning's group
magnitude, uniform and global; the dense network with the same extra epoch. Uniform widths are brought to 1/2 and 1/3 of
the dense latency (OpenVINO f32, one thread); every other arm is brought to the latency of that network, both timed in
turn. Recipe: batch norm re-estimated, then one epoch with distillation from the dense network. Accuracy is of the final
half of the test images (5,000); nothing was chosen on it. The images are JPEG-compressed and the dense networks adapted
to them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from torch import nn

from edgeprune import allocate, data, finetune, importance, measure, model, planning, store, surgery, widths
from edgeprune.allocate import Costs
from edgeprune.bench import Bench
from edgeprune.config import DataSection
from edgeprune.finetune import Settings
from edgeprune.graph import ModelGraph, trace
from edgeprune.importance import Importance
from edgeprune.records import Artifact
from edgeprune.target import open_target

HERE = Path(__file__).resolve().parent / "cifar"
EXAMPLE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SPEEDUPS = (3.0, 2.0)
CLOSE = 0.02  # arms within this of the budget are compared
BISECTIONS = 9
ARMS = ("uniform", "knapsack", "random", "tp-uniform", "tp-global")
SETTINGS = Settings(
    batch_size=128, learning_rate=0.05, momentum=0.9, weight_decay=5e-4, distillation=0.7, temperature=4.0,
    precision="bf16-mixed", bn_images=1024, devices=1, seed=0,
)  # fmt: skip


class Case:
    """One dense network with its images, its groups and its device."""

    def __init__(self, depth: int, folder: Path) -> None:
        self.depth = depth
        self.dense = model.build("resnet.py:build", {"depth": depth}, HERE).eval()
        model.load_weights(self.dense, folder / f"resnet{depth}_cifar10_adapted.safetensors")
        section = DataSection(
            source="images.py:splits", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop=4, flip=True
        )
        self.images = data.load(section, HERE, (1, 3, 32, 32))
        self.graph: ModelGraph = trace(self.dense, EXAMPLE)
        self.scores: Importance = importance.score(self.dense, self.graph.groups)
        self.target = open_target("cpu", {})
        self.folder = Path(tempfile.mkdtemp(prefix="edgeprune-cifar10-"))
        self.bench = Bench(self.dense, self.graph, self.target, self.folder)
        self.bench.time([])
        self.costs = self._costs()
        self.anchors: dict[float, tuple[Artifact, float]] = {}
        self.teachers: dict[int, Remembered] = {}

    def _costs(self) -> Costs:
        candidates = widths.candidates(self.graph.groups, 0.1)
        layers = measure.timed(self.graph.layers, self.target)
        table, filled = measure.fill(layers, candidates, self.target, store.Store(store.default_path()))
        print(f"table: {filled.entries} entries, {filled.measured} measured now", flush=True)
        return measure.costs(layers, candidates, table, ())

    def ratio(self, module: nn.Module, speedup: float) -> float:
        """Its latency over that of the uniform network, or times `speedup` over the dense one's."""
        artifact = self.target.export(module, EXAMPLE, self.folder / "arm")
        other, scale = self.anchors.get(speedup, (self.bench.dense, speedup))
        first, cut = measure.time_networks([other, artifact], self.target)
        return scale * cut.median_ms / first.median_ms

    def anchor(self, speedup: float, uniform: nn.Module) -> None:
        """From now on, arms at this speed-up are compared with this network."""
        self.anchors[speedup] = (self.target.export(uniform, EXAMPLE, self.folder / f"uniform-{speedup:g}x"), 1.0)

    def teacher(self, seed: int) -> Remembered:
        teacher = self.teachers.setdefault(seed, Remembered(self.dense))
        teacher.begin()
        return teacher

    def close(self) -> None:
        self.target.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Remembered(nn.Module):
    """The dense network as a teacher; all arms of a seed see the same batches, so it is asked once for each."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.dense = dense
        self.answers: list[tuple[float, torch.Tensor]] = []
        self.at = 0

    def begin(self) -> None:
        self.at = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mark = float(x.double().sum())
        if self.at == len(self.answers):
            self.answers.append((mark, self.dense(x)))
        self.at += 1
        known, answer = self.answers[self.at - 1]
        if known != mark:
            raise RuntimeError(f"batch {self.at} differs from that of an earlier arm of this seed")
        return answer


# ---- arms: a network of the wanted latency ----------------------------------------------------------------------

How = dict[str, Any]  # what the network of an arm is made from: widths, or a pruning ratio


def knapsack(case: Case, speedup: float, seed: int) -> How:
    costs, budget_ms = _calibrated(case), case.bench.reference_ms / speedup
    tried: list[tuple[float, How]] = []
    for _ in range(planning.TRIES):
        how = {"widths": dict(allocate.solve(costs, case.scores, budget_ms).widths)}
        ratio = case.ratio(again(case, how), speedup)
        tried.append((abs(ratio - 1 + CLOSE / 2), how))
        if tried[-1][0] <= CLOSE / 2:  # at the wanted latency, not above it
            break
        budget_ms *= (1 - CLOSE / 2) / ratio
    return min(tried, key=lambda t: t[0])[1]


def _calibrated(case: Case) -> Costs:
    plans = [dict(allocate.floor(case.costs).widths), *measure.samples(case.costs.candidates, 4, 0)]
    found = case.bench.time([importance.best(case.scores, p) for p in plans])
    known = [*zip(plans, found, strict=True), (case.costs.dense, case.bench.reference_ms)]
    return measure.calibrate(case.costs, known)[0]


def uniform(case: Case, speedup: float, seed: int) -> How:
    return _scaled(case, speedup, dict.fromkeys(case.scores, 1.0))[1]


def random(case: Case, speedup: float, seed: int) -> How:
    """The first of four draws that can be brought to the wanted latency, or the nearest."""
    draw = np.random.Generator(np.random.PCG64(1000 + seed))
    tried: list[tuple[float, How]] = []
    for _ in range(4):
        tried.append(_scaled(case, speedup, {group: 0.2 + 0.8 * draw.random() for group in case.scores}))
        if tried[-1][0] <= CLOSE / 2:
            break
    return min(tried, key=lambda t: t[0])[1]


def _scaled(case: Case, speedup: float, shape: Mapping[str, float]) -> tuple[float, How]:
    """Widths in proportion to `shape`, any integer; the same channel scores as the knapsack.

    Rounding is spread over the groups: rounded alike, all groups of a stage would step at once, and no share would
    give the wanted latency.
    """
    groups = case.graph.groups
    spread = {g.id: at / len(groups) for at, g in enumerate(groups)}

    def make(share: float) -> How:
        wanted = {g.id: share * g.width * shape[g.id] / max(shape.values()) for g in groups}
        return {"widths": {g.id: max(1, min(g.width, int(wanted[g.id] + spread[g.id]))) for g in groups}}

    return _bisect(case, speedup, make)


def torch_pruning(case: Case, speedup: float, seed: int, uniformly: bool) -> How:
    return _bisect(case, speedup, lambda share: {"pruning_ratio": 1 - share, "uniformly": uniformly})[1]


def _torch_pruned(case: Case, pruning_ratio: float, uniformly: bool) -> nn.Module:
    import torch_pruning as tp

    module = copy.deepcopy(case.dense)
    pruner = tp.pruner.MagnitudePruner(
        module,
        EXAMPLE,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=pruning_ratio,
        global_pruning=not uniformly,
        ignored_layers=[module.linear],
    )
    pruner.step()
    return module


def again(case: Case, how: How) -> nn.Module:
    """The network that a recipe makes; an empty one makes the dense network."""
    if not how:
        return copy.deepcopy(case.dense)
    if "pruning_ratio" in how:
        return _torch_pruned(case, how["pruning_ratio"], how["uniformly"])
    return surgery.cut(case.dense, case.graph, importance.best(case.scores, how["widths"]))


def _bisect(case: Case, speedup: float, make: Callable[[float], How]) -> tuple[float, How]:
    """The share of channels whose measured latency is nearest to the wanted one, and how far off it is.

    Latency leaps at widths where a kernel's step ends, and those are whole shares: they are tried too.
    """
    low, high = 0.02, 1.0
    tried: list[tuple[float, float, How]] = []

    def attempt(share: float) -> float:
        how = make(share)
        ratio = case.ratio(again(case, how), speedup)
        tried.append((abs(ratio - 1), share, how))
        return ratio

    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if attempt(middle) > 1 else (middle, high)
        if tried[-1][0] <= CLOSE / 2:
            break
    off, share, how = min(tried, key=lambda t: t[0])
    if off > CLOSE / 2:
        attempt(round(16 * share) / 16)
        off, share, how = min(tried, key=lambda t: t[0])
    return off, how


MAKERS: dict[str, Callable[[Case, float, int], How]] = {
    "uniform": uniform,
    "knapsack": knapsack,
    "random": random,
    "tp-uniform": functools.partial(torch_pruning, uniformly=True),
    "tp-global": functools.partial(torch_pruning, uniformly=False),
}


def plan(case: Case, arm: str, speedup: float, seed: int) -> How:
    """What an arm's network is made from; made once for all seeds, but for random allocations. Kept as a result."""
    if arm == "dense":
        return {}
    name = f"cifar10-plans/resnet{case.depth}-{arm}-{speedup:g}x" + (f"-seed{seed}" if arm == "random" else "")
    found = record.load(name)
    if found is None:
        if arm != "uniform" and speedup not in case.anchors:
            case.anchor(speedup, again(case, plan(case, "uniform", speedup, 0)))
        how = MAKERS[arm](case, speedup, seed)
        record.save(name, {"how": how, "ratio": case.ratio(again(case, how), speedup)})
        return how
    return dict(found["how"])


# ---- running -------------------------------------------------------------------------------------------------


def run_arm(case: Case, arm: str, speedup: float, seed: int, epochs: int) -> None:
    """Make the network, re-estimate batch norm, train; everything into one result file."""
    name = f"cifar10/resnet{case.depth}-{arm}-{speedup:g}x-seed{seed}"
    if record.load(name) is not None:
        return
    began = time.monotonic()
    torch.manual_seed(seed)
    how = plan(case, arm, speedup, seed)
    module = again(case, how)
    smaller = trace(module, EXAMPLE)
    settings = Settings(**{**asdict(SETTINGS), "seed": seed})
    batches = case.images.train.batches(128, shuffle_seed=10_000 + seed, augment=True)
    if arm != "dense":
        finetune.reestimate_batch_norm(module, (next(batches) for _ in range(settings.bn_images // 128)))
    before = finetune.accuracy(module, case.images.final)
    with tempfile.TemporaryDirectory() as folder:
        train, search = case.images.train, case.images.search
        finetune.train(module, case.teacher(seed), train, search, epochs, settings, Path(folder))
    result = {
        "depth": case.depth, "arm": arm, "speedup": speedup, "seed": seed, "epochs": epochs, "how": how,
        "macs": smaller.total_macs, "dense_macs": case.graph.total_macs, "params": smaller.total_params,
        "accuracy_bn": before, "accuracy": finetune.accuracy(module, case.images.final),
        "seconds": time.monotonic() - began,
    }  # fmt: skip
    record.save(name, result)
    print(
        f"{name}: {before:.2%} -> {result['accuracy']:.2%}, {result['seconds']:.0f} s",
        flush=True,
    )


def time_results(case: Case) -> None:
    """Time the networks of all results in turn, in one session, and write what was found into the results."""
    paths = sorted((record.RESULTS / "cifar10").glob(f"resnet{case.depth}-*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    distinct = {_key(r): r for r in results}
    artifacts = [
        case.target.export(again(case, r["how"]), EXAMPLE, case.folder / f"result-{at}")
        for at, r in enumerate(distinct.values())
    ]
    dense, *found = measure.time_networks([case.bench.dense, *artifacts], case.target, 240.0)
    timed = dict(zip(distinct, found, strict=True))
    noise = measure.spread([dense, *found])
    for path, result in zip(paths, results, strict=True):
        own = timed[_key(result)]
        result |= {"latency_ms": own.median_ms, "p10_ms": own.p10_ms, "p90_ms": own.p90_ms}
        result |= {"dense_ms": dense.median_ms, "noise": noise}
        record.save(f"cifar10/{path.stem}", result)
        print(f"{path.stem}: {result['latency_ms']:.4f} ms ({result['dense_ms'] / result['latency_ms']:.3f}x)")
    print(f"copies of one network differed by {noise:.2%}")


def _key(result: Mapping[str, Any]) -> str:
    return json.dumps([result["arm"], result["how"]], sort_keys=True)


def summary() -> str:
    """Mean and spread over the seeds, and how much of the MACs reduction arrives as speed."""
    found = [r for p in sorted((record.RESULTS / "cifar10").glob("*.json")) if (r := record.load(f"cifar10/{p.stem}"))]
    rows = []
    for depth in sorted({r["depth"] for r in found}):
        for speedup in sorted({r["speedup"] for r in found}):
            for arm in ("dense", *ARMS):
                runs = [r for r in found if (r["depth"], r["speedup"], r["arm"]) == (depth, speedup, arm)]
                if runs:
                    rows.append(_row(depth, speedup, arm, runs))
    header = ["network", "arm", "accuracy, BN only", "after 1 epoch", "speed-up", "MACs /", "speed-up over MACs /"]
    return record.table(header, rows)


def _row(depth: int, speedup: float, arm: str, runs: list[dict[str, Any]]) -> list[str]:
    def spread(key: str) -> str:
        values = 100 * np.array([r[key] for r in runs])
        wide = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
        return f"{values.mean():.2f}{wide}"

    faster = float(np.mean([r["dense_ms"] / r["latency_ms"] if "latency_ms" in r else np.nan for r in runs]))
    fewer = float(np.mean([r["dense_macs"] / r["macs"] for r in runs]))
    name = f"ResNet-{depth}" if arm == "dense" else f"ResNet-{depth} at {speedup:g}x"
    gain = "" if arm == "dense" else f"{faster / fewer:.2f}"
    seeds = f"{arm} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
    return [name, seeds, spread("accuracy_bn"), spread("accuracy"), f"{faster:.2f}x", f"{fewer:.2f}x", gain]


def _arms(wanted: list[str]) -> list[tuple[float, str]]:
    pruned = [(speedup, arm) for speedup in SPEEDUPS for arm in wanted if arm != "dense"]
    return pruned + [(1.0, "dense")] * ("dense" in wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cifar10_*.npz and the adapted checkpoints")
    parser.add_argument("--depth", type=int, nargs="*", default=[20, 56])
    parser.add_argument("--arms", nargs="*", default=["dense", *ARMS])
    parser.add_argument("--seeds", type=int, help="default: 3 for ResNet-20, 1 for ResNet-56")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of training")
    parser.add_argument("--plans", action="store_true", help="choose the networks of the arms, train none")
    parser.add_argument("--latency", action="store_true", help="time the networks of all results again, in turn")
    parser.add_argument("--table", action="store_true", help="print the table of what there is")
    options = parser.parse_args()
    if not options.table:
        if options.data is None or not (options.data / "cifar10_train.npz").exists():
            parser.error("--data DIR must hold cifar10_train.npz, cifar10_test.npz and the checkpoints")
        os.environ["EDGEPRUNE_DATA"] = str(options.data)
        torch.set_num_threads(options.threads)
        for depth in options.depth:
            case = Case(depth, options.data)
            try:
                if options.latency:
                    time_results(case)
                    continue
                for seed in range(options.seeds or (3 if depth == 20 else 1)):
                    for speedup, arm in _arms(options.arms):
                        if options.plans:
                            plan(case, arm, speedup, seed)
                        else:
                            run_arm(case, arm, speedup, seed, options.epochs)
            finally:
                case.close()
    print(summary())


if __name__ == "__main__":
    main()
