"""Shares by gradient on an MNIST autoencoder, against the same share of every group and a global ranking by L2 norm.

    python benchmarks/soft.py --data DIR     every case that is not in the results yet; --most 1: one, then stop
    python benchmarks/soft.py --table        the table alone

DIR holds mnist_train.npz and mnist_test.npz (x: uint8 images). The network is 784-256-64-256-784; 55,000 training
images train it and steer the shares, 10,000 test images give the PSNR and nothing was chosen on them. Every arm ends
within 0.2 points of the same sparsity (parameters removed), uses the same channel scores (L2), is really cut, and then
gets the same epoch of training. Against grids of shares: benchmarks/soft_grids.py.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from magnitude import pixels_of
from torch import Tensor, nn
from torch.nn import functional

from edgeprune import importance, metrics, soft, surgery
from edgeprune.graph import ModelGraph, trace
from edgeprune.importance import Importance
from edgeprune.soft import Goal, amounts

RESULT = "soft"
SPARSITIES, SEEDS, ARMS = (0.3, 0.5, 0.7), 3, ("uniform", "global", "soft")
EPOCHS, BATCH, RATE = 8, 100, 1e-3
TRAINED = 55_000  # of the 60,000 training images
MOST, TOLERANCE, EQUAL = 0.9, 0.02, 0.002
SETTINGS = soft.Settings(300, 0.1)


class Coder(nn.Module):
    """784-256-64-256-784, or with more layers before the last two."""

    def __init__(self, *more: int) -> None:
        super().__init__()
        sizes = (64, *more, 256)
        self.encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU())
        inner = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        self.decoder = nn.Sequential(*inner, nn.Linear(256, 784))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


@functools.cache
def images(folder: Path, split: str) -> Tensor:
    """(images, 784)."""
    with np.load(folder / f"mnist_{split}.npz") as stored:
        return pixels_of(stored["x"]).flatten(1)


def train(model: nn.Module, x: Tensor, epochs: int, seed: int) -> None:
    adam, draw = torch.optim.Adam(model.parameters(), lr=RATE), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=draw).split(BATCH):
            adam.zero_grad()
            functional.mse_loss(model(x[batch]), x[batch]).backward()
            adam.step()


@torch.no_grad()
def psnr(model: nn.Module, x: Tensor) -> float:
    return metrics.psnr(model(x).numpy(), x.numpy(), x.numpy())


def run(folder: Path, seed: int, sparsity: float, dense: nn.Module) -> dict[str, Any]:
    x, test = images(folder, "train")[:TRAINED], images(folder, "test")
    graph = trace(dense, x[:1])
    scores = importance.score(dense, graph.groups, "l2")
    goal = amounts.sparsity_goal(dense, graph.groups, sparsity, EQUAL)
    found: dict[str, Any] = {"dense": psnr(dense, test)}
    for arm in ARMS:
        began = time.process_time()
        units = _units(arm, dense, graph, scores, goal, x, seed)
        spent = time.process_time() - began
        cut = surgery.cut(dense, graph, importance.best(scores, units))
        params = sum(p.numel() for p in cut.parameters())
        before = psnr(cut, test)
        train(cut, x, 1, seed)
        found[arm] = {"units": units, "params": params, "psnr": before, "trained": psnr(cut, test), "cpu_s": spent}
    return found


def _units(
    arm: str, model: nn.Module, graph: ModelGraph, scores: Importance, goal: Goal, x: Tensor, seed: int
) -> Mapping[str, int]:
    gates, most = soft.Gates(model, graph.groups, scores), dict.fromkeys(scores, MOST)
    if arm == "uniform":
        return soft.harden(goal, graph.groups, soft.start(gates, goal, most), most)
    if arm == "global":
        return _globally(scores, goal)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(2 * BATCH):
            yield x[batch], x[batch]

    near = replace(goal, tolerance=TOLERANCE)
    found = soft.optimise(gates, near, most, soft.task_loss, batches, {}, SETTINGS)
    return soft.harden(goal, graph.groups, found.rounds[-1], most)


def _globally(scores: Importance, goal: Goal) -> Mapping[str, int]:
    """The units of least norm go first, wherever they are, down to a tenth of each group."""
    units = {g: len(s) for g, s in scores.items()}
    for _, g in sorted((float(v), g) for g, s in scores.items() for v in s):
        if float(goal.amount({n: torch.tensor(float(u)) for n, u in units.items()})) <= goal.wanted:
            break
        if units[g] > (1 - MOST) * len(scores[g]) + 1:
            units[g] -= 1
    return units


def table(results: Mapping[str, Any]) -> str:
    header = ["sparsity", "seeds", "dense", *(f"{arm}: as cut" for arm in ARMS), *(f"{arm}: 1 epoch" for arm in ARMS)]
    rows = []
    for sparsity in SPARSITIES:
        found = [r for k, r in results.items() if k.startswith(f"{sparsity}/")]
        if found:
            cells = [_mean([r[arm][what] for r in found]) for what in ("psnr", "trained") for arm in ARMS]
            rows.append([f"{sparsity:g}", str(len(found)), _mean([r["dense"] for r in found]), *cells])
    return record.table(header, rows)


def _mean(values: list[float]) -> str:
    found = torch.tensor(values)
    return f"{found.mean():.2f}" + (f" ± {found.std():.2f}" if len(values) > 1 else "")


def filled(
    doc: str,
    name: str,
    seeds: Sequence[int],
    build: Callable[[], Coder],
    judge: Callable[[Path, int, float, Coder], dict[str, Any]],
) -> dict[str, Any]:
    """The results of benchmarks/NAME.py, with what its command line asks for and was not in them, seed by seed."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--most", type=int, default=1000, help="seeds in this call")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    results: dict[str, Any] = (record.load(name) or {}).get("results", {})
    todo = [s for s in seeds if any(f"{p}/{s}" not in results for p in SPARSITIES)][: asked.most]
    for seed in [] if asked.table else todo:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        dense = build()
        train(dense, images(asked.data, "train")[:TRAINED], EPOCHS, seed)
        for sparsity in SPARSITIES:
            results[f"{sparsity}/{seed}"] = judge(asked.data, seed, sparsity, copy.deepcopy(dense).eval())
            record.save(name, {"command": f"python benchmarks/{name}.py --data DIR", "results": results})
    return results


if __name__ == "__main__":
    print(table(filled(__doc__, RESULT, range(SEEDS), Coder, run)))
