"""How LeNet-300-100 should be trained again at 12x, chosen on images that no published error is of.

    python benchmarks/magnitude_recipes.py --data DIR [--seeds 100 101] [--recipes NAME ...]
    python benchmarks/magnitude_recipes.py --table

The images held out by benchmarks/magnitude.py are not read. Of those that it learns by, 10,000 are taken away here to
compare recipes by, and 45,000 train. A recipe is ROUNDS-RATE-EPOCHS: rounds of pruning and retraining; the part of the
dense network's learning rate that each round begins with, and takes to zero; epochs of retraining in all. "dense" is
the network as it was, "dense-RATE-EPOCHS" that network trained further without pruning.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import magnitude as bench
import record
import torch
from torch import nn
from torch.nn import functional

from edgeprune import magnitude

RESULT = "magnitude-recipes"
NET, RATIO, COMPARED = "lenet-300-100", 12.0, 10_000
RECIPES = ("dense", "1-0.1-20", "1-1-20", "5-0.1-20", "5-1-20", "dense-1-20", "5-0.3-20")


class Case(bench.Case):
    """One dense network, trained on fewer images, and others to compare recipes by."""

    def __init__(self, seed: int, folder: Path) -> None:
        super().__init__(NET, seed, folder, bench.RECIPES["full"])
        compared, self.learn = self.learn[:COMPARED], self.learn[COMPARED:]
        self.test = (self.x[compared], self.y[compared])

    def trained(self, name: str) -> nn.Module:
        if name == "dense":
            return self.dense
        rounds, rate, epochs = name.split("-")

        def retrain(model: nn.Module, number: int) -> None:
            count = 1 if rounds == "dense" else int(rounds)
            self.train(model, int(epochs) // count, self.rate * float(rate), number)

        if rounds != "dense":
            return magnitude.prune(self.dense, self.x[:1], RATIO, self.judge, retrain, int(rounds)).model
        model = self.build()
        model.load_state_dict(self.dense.state_dict())
        retrain(model, 1)
        return model

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        return float(functional.cross_entropy(model(self.test[0]), self.test[1]))


def known() -> dict[str, dict[str, float]]:
    return (record.load(RESULT) or {}).get("results", {})


def table() -> str:
    rows = []
    for name in RECIPES:
        found = [r for key, r in known().items() if key.partition("/")[2] == name]
        if found:
            each = [[r[what] for r in found] for what in ("error", "loss")]
            means = [f"{statistics.mean(v):.3f}" for v in each]
            rows.append([name, str(len(found)), *means, " / ".join(f"{e:.2f}" for e in each[0])])
    return record.table(["recipe", "seeds", "error %", "cross entropy", "error % by seed"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[100, 101])
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for seed in [] if asked.table else asked.seeds:
        case = Case(seed, asked.data)
        for name in asked.recipes:
            if f"{seed}/{name}" not in known():
                began = time.process_time()
                model = case.trained(name)
                found = {"error": case.error(model), "loss": case.loss(model), "cpu_s": time.process_time() - began}
                results = {**known(), f"{seed}/{name}": found}
                record.save(
                    RESULT, {"command": "python benchmarks/magnitude_recipes.py --data DIR", "results": results}
                )
                print(f"{seed}/{name}", found, flush=True)
    print(table())


if __name__ == "__main__":
    main()
