"""Pruning by magnitude on MNIST, as Han et al. (1506.02626) report it: LeNet-300-100 and LeNet-5.

    python benchmarks/magnitude.py --data DIR                  every arm that is not in the results yet
    python benchmarks/magnitude.py --data DIR --net lenet-5 --seeds 1 --most 1    a part of it; one arm, then stop
    python benchmarks/magnitude.py --data DIR --recipe full    the same, retrained at the dense network's learning rate
    python benchmarks/magnitude.py --table                     the tables alone

DIR holds mnist_train.npz and mnist_test.npz (x: uint8 images, y: labels). The rule by which thresholds are chosen was
settled after errors on MNIST's test images had been seen, for seeds 0 to 2. So the error is of other images: 10,000 of
the 60,000 training images, always the same ones, which nothing was chosen by; the test images join the other 50,000, of
which 5,000 steer (the sensitivity scan judges by their cross entropy) and 55,000 train; and seeds begin at 3. Every arm
of a seed starts from the same dense network and retrains for the same number of steps, at a tenth of its learning rate
(recipe "tenth", the paper's) or at all of it ("full", chosen by benchmarks/magnitude_recipes.py, with seeds from 6 for
LeNet-300-100, where those before had been looked at). Each round of retraining takes its rate from the full one to
zero; what has no rounds takes as many of these as `rounds` under "full", and one under "tenth":

    dense        the reference, and with the extra training that every other arm gets
    once-12      12x in one round; also its error before retraining
    bare-12      12x in one round, and no retraining
    random-12    as many weights of each layer as once-12 ("full": rounds-12), drawn at random
    rounds-12    12x in 5 rounds
    l1-12        12x in one round, absolute weights instead of squares in the loss; l1-rounds-12 in 5
    once-20      20x in one round
    rounds-20    20x in 5 rounds
    local-12     LeNet-5, 12x: linear layers while convolutions are frozen, then convolutions while those are
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import record
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from edgeprune import finetune, magnitude
from edgeprune.magnitude import masks, sparse

HERE = Path(__file__).resolve().parent / "mnist"
ARMS = (
    *("dense", "bare-12", "once-12", "rounds-12", "random-12", "once-20", "rounds-20", "l1-12", "l1-rounds-12"),
    *("local-12",),
)
LOCAL = ((["0", "2"], 14.0), (["5", "7"], 3.7))  # what is frozen, and how much of the rest is pruned: 12x in all
HELD_OUT = 10_000
BATCH, DECAY, L1, ROUNDS = 100, 5e-4, 2e-5, 5
Result = dict[str, Any]


def lenet_300_100() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet_5() -> nn.Module:
    """Caffe's, which the paper prunes: 431 thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


NETS: dict[str, tuple[Callable[[], nn.Module], float, int, int]] = {  # how, learning rate, epochs, epochs of retraining
    "lenet-300-100": (lenet_300_100, 0.1, 25, 20),
    "lenet-5": (lenet_5, 0.05, 6, 5),
}


@dataclass(frozen=True)
class Recipe:
    """How networks are trained again."""

    result: str
    rate: float  # of the dense network's
    cycles: int  # from this rate to zero, where there are no rounds
    drawn_as: str  # the arm whose share of each layer random ones have
    first_seed: Mapping[str, int]


RECIPES = {
    "tenth": Recipe("magnitude", 0.1, 1, "once-12", {"lenet-300-100": 3, "lenet-5": 3}),
    "full": Recipe("magnitude-full", 1.0, ROUNDS, "rounds-12", {"lenet-300-100": 6, "lenet-5": 3}),
}


class Case:
    """One dense network of one seed, and its images."""

    def __init__(self, net: str, seed: int, folder: Path, recipe: Recipe) -> None:
        self.net, self.seed, self.recipe = net, seed, recipe
        self.build, self.rate, self.epochs, self.again = NETS[net]
        (self.x, self.y), self.test = images(folder)
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(1000 + seed))
        self.learn, self.steer = order[5000:], (self.x[order[:5000]], self.y[order[:5000]])

    @functools.cached_property
    def dense(self) -> nn.Module:
        torch.manual_seed(self.seed)
        model = self.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        path = HERE / f"{self.net}-{self.seed}.safetensors"
        if path.exists():
            finetune.load_state(model, finetune.read_tensors(path), path)
        else:
            self.train(model, self.epochs, self.rate, 0)
            finetune.save_tensors(model.state_dict(), path)
        return model

    def retrain(self, model: nn.Module, number: int = 1, rounds: int = 1, decay: float = DECAY) -> None:
        """What falls to one of so many rounds; the same images in the same order, however many there are."""
        cycles = max(1, self.recipe.cycles // rounds)
        for cycle in range(cycles):
            self.train(model, self.again // (rounds * cycles), self.rate * self.recipe.rate, number + cycle, decay)

    def train(self, model: nn.Module, epochs: int, rate: float, salt: int, decay: float = DECAY) -> None:
        optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=decay, nesterov=True)
        steps, at = epochs * (len(self.learn) // BATCH), 0
        draw = torch.Generator().manual_seed(10 * self.seed + salt)
        for _ in range(epochs):
            order = self.learn[torch.randperm(len(self.learn), generator=draw)]
            for batch in order.split(BATCH):
                optimiser.param_groups[0]["lr"] = finetune.cosine(rate, at, steps)
                optimiser.zero_grad()
                functional.cross_entropy(model(self.x[batch]), self.y[batch]).backward()
                optimiser.step()
                at += 1

    @torch.no_grad()
    def judge(self, model: nn.Module) -> float:
        return -float(functional.cross_entropy(model(self.steer[0]), self.steer[1]))

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """On the images held out, in percent."""
        x, y = self.test
        wrong = sum(int((model(a).argmax(1) != b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))
        return 100 * wrong / len(y)


@functools.cache
def images(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) to learn and steer by, and those held out."""
    parts = []
    for split in ("train", "test"):
        with np.load(folder / f"mnist_{split}.npz") as stored:
            parts.append((stored["x"], stored["y"].astype(np.int64)))
    held = np.zeros(len(parts[0][1]), dtype=bool)
    held[np.random.Generator(np.random.PCG64(2015)).permutation(len(held))[:HELD_OUT]] = True
    x, y = parts[0]
    learn = [np.concatenate([part[~held], more]) for part, more in zip(parts[0], parts[1], strict=True)]
    return (pixels_of(learn[0]), torch.from_numpy(learn[1])), (pixels_of(x[held]), torch.from_numpy(y[held]))


def pixels_of(x: NDArray[np.uint8]) -> Tensor:
    pixels = torch.from_numpy(x).float().div_(255).unsqueeze(1)
    return ((pixels - 0.1307) / 0.3081).to(memory_format=torch.channels_last)


# ---- arms ----------------------------------------------------------------------------------------------------


def run(case: Case, arm: str, results: Mapping[str, Result]) -> Result:
    if arm == "dense":
        reference = case.error(case.dense)
        model = case.build()
        model.load_state_dict(case.dense.state_dict())
        case.retrain(model)
        params = sum(p.numel() for p in model.parameters())
        return {"reference_error": reference, "error": case.error(model), "params": params}
    if arm.startswith("bare"):
        bare = magnitude.prune(case.dense, case.x[:1], _ratio(arm), case.judge, lambda model, number: None)
        return {"error": case.error(bare.model), "ratio": _ratio(arm), "kept": bare.rounds[-1].kept}
    if arm.startswith("random"):
        return _random(case, results[key(case, case.recipe.drawn_as)]["kept"])
    return _local(case) if arm.startswith("local") else _pruned(case, arm)


def _pruned(case: Case, arm: str) -> Result:
    rounds = ROUNDS if "rounds" in arm else 1
    with_l1 = arm.startswith("l1")
    bare: list[float] = []

    def retrain(model: nn.Module, number: int) -> None:
        bare.append(case.error(model))
        case.retrain(model, number, rounds, 0.0 if with_l1 else DECAY)

    found = magnitude.prune(case.dense, case.x[:1], _ratio(arm), case.judge, retrain, rounds, L1 if with_l1 else 0.0)
    left, total = masks.kept(found.masks)
    return {
        "error": case.error(found.model),
        **({"error_before_retraining": bare[0]} if rounds == 1 else {}),
        "ratio": total / left,
        "kept": found.rounds[-1].kept,
        "rounds": [{"left": r.left, "qualities": r.qualities, "score": r.score} for r in found.rounds],
        **_smaller(case, found.model),
        **(_pixels(case, found.masks["1.weight"]) if case.net == "lenet-300-100" else {}),
    }


def _ratio(arm: str) -> float:
    return float(arm.rpartition("-")[2])


def _local(case: Case) -> Result:
    model, held, bare = case.dense, dict[str, Tensor](), list[float]()

    def retrain(model: nn.Module, number: int) -> None:
        bare.append(case.error(model))
        case.retrain(model, len(bare), len(LOCAL))

    for frozen, ratio in LOCAL:
        found = magnitude.prune(model, case.x[:1], ratio, case.judge, retrain, frozen=frozen)
        model, held = found.model, {**held, **found.masks}
    left, total = masks.kept(held)
    kept = {name: float(held[name].float().mean()) for name in masks.full(model)}
    return {
        "error": case.error(model),
        "error_before_retraining": bare[0],
        "ratio": total / left,
        "kept": kept,
        **_smaller(case, model),
    }


def _random(case: Case, kept: Mapping[str, float]) -> Result:
    model = case.build()
    model.load_state_dict(case.dense.state_dict())
    draw = torch.Generator().manual_seed(case.seed)
    drawn = {}
    for name, share in kept.items():
        shape = model.get_parameter(name).shape
        order = torch.rand(shape.numel(), generator=draw).argsort()
        drawn[name] = (order < round(share * shape.numel())).view(shape)
    with masks.held(model, drawn):
        case.retrain(model)
    left, total = masks.kept(drawn)
    return {"error": case.error(model), "ratio": total / left, "kept": dict(kept)}


def _smaller(case: Case, model: nn.Module) -> Result:
    """Dead neurons gone, and the file."""
    removal = magnitude.remove_dead(model, case.x[:1])
    with torch.no_grad():
        a, b = model.eval()(case.test[0][:1000]), removal.model.eval()(case.test[0][:1000])
    with TemporaryDirectory() as folder:
        sizes = sparse.save(removal.model.state_dict(), Path(folder) / "network.safetensors")
    return {
        "dead": dict(removal.removed),
        "stuck": dict(removal.stuck),
        "dead_difference": float((a - b).abs().max() / a.abs().max()),
        "params_left_dense": removal.params,
        "file_bytes": sizes.stored_bytes,
        "file_index_share": sizes.index_share,
        "dense_bytes": 4 * sum(p.numel() for p in case.dense.parameters()),
    }


def _pixels(case: Case, mask: Tensor) -> Result:
    """Shares of the first layer's weights left, for pixels that are black in every image and for the others."""
    black = (case.x[case.learn] == case.x.min()).all(dim=0).flatten()  # (784,)
    left = mask.float().mean(dim=0)
    return {
        "black_pixels": int(black.sum()),
        "kept_of_black": float(left[black].mean()),
        "kept_of_others": float(left[~black].mean()),
    }


# ---- results -------------------------------------------------------------------------------------------------


def key(case: Case, arm: str) -> str:
    return f"{case.net}/{case.seed}/{arm}"


def table(results: Mapping[str, Result]) -> str:
    rows = []
    for net in NETS:
        for arm in ARMS:
            found = [r for k, r in results.items() if k.startswith(f"{net}/") and k.endswith(f"/{arm}")]
            if not found:
                continue
            if arm == "dense":
                rows.append([net, "dense", str(len(found)), "1", _mean(found, "reference_error"), "", "", ""])
                rows.append([net, "dense, trained further", str(len(found)), "1", _mean(found, "error"), "", "", ""])
                continue
            kept = "/".join(f"{100 * statistics.mean(r['kept'][n] for r in found):.0f}" for n in found[0]["kept"])
            size = (
                f"{found[0]['dense_bytes'] / statistics.mean(r['file_bytes'] for r in found):.1f}x"
                if "file_bytes" in found[0]
                else ""
            )
            rows.append(
                [net, arm, str(len(found)), f"{statistics.mean(r['ratio'] for r in found):.1f}x", _mean(found, "error"),
                 _mean(found, "error_before_retraining"), kept, size]
            )  # fmt: skip
    header = ["network", "arm", "seeds", "weights", "error %", "before retraining", "left by layer %", "file"]
    return record.table(header, rows)


def _mean(found: list[Result], name: str) -> str:
    values = [r[name] for r in found if name in r]
    if not values:
        return ""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--recipe", choices=list(RECIPES), default="tenth")
    parser.add_argument("--net", choices=list(NETS), action="append")
    parser.add_argument("--seeds", type=int, default=3, help="number of them")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--most", type=int, default=1000, help="arms in this call")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if not asked.table:
        torch.set_num_threads(1)
        measure(asked, RECIPES[asked.recipe])
    for name, recipe in RECIPES.items():
        print(f"\nRecipe {name}:\n\n{table(known(recipe))}")


def measure(asked: argparse.Namespace, recipe: Recipe) -> None:
    """What is asked for and not known yet, kept arm by arm."""
    arms = {n: [a for a in asked.arms if n == "lenet-5" or not a.startswith("local")] for n in NETS}
    seeds = {n: range(first, first + asked.seeds) for n, first in recipe.first_seed.items()}
    todo = [(n, s, a) for n in asked.net or NETS for s in seeds[n] for a in arms[n]]
    todo = [t for t in todo if "/".join(map(str, t)) not in known(recipe)][: asked.most]
    cases: dict[tuple[str, int], Case] = {}
    for net, seed, arm in todo:
        case = cases.setdefault((net, seed), Case(net, seed, asked.data, recipe))
        began = time.process_time()
        found = {**run(case, arm, known(recipe)), "cpu_s": time.process_time() - began}
        results = {**known(recipe), key(case, arm): found}  # others may add to it
        record.save(
            recipe.result,
            {"command": f"python benchmarks/magnitude.py --data DIR --recipe {asked.recipe}", "results": results},
        )
        print(key(case, arm), f"{found['error']:.2f} %", flush=True)


def known(recipe: Recipe) -> dict[str, Result]:
    return (record.load(recipe.result) or {}).get("results", {})


if __name__ == "__main__":
    main()
