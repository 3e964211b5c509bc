"""Fronts of a network trained on digits: evolution against random networks of equal number, on images that neither saw.

tools/test --slow tests/test_fronts.py -s prints every hypervolume.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import searching
import torch
from test_allocate import made_up
from test_magnitude import digits
from torch import Tensor, nn
from torch.nn import functional

from edgeprune import allocate, importance, surgery
from edgeprune.config import GeneticSection
from edgeprune.graph import ModelGraph
from edgeprune.records import Evaluation
from edgeprune.search import Space, Trying, front, genetic, genotype
from edgeprune.search.space import Units
from edgeprune.search.trying import Candidate

SIZES, STRIDES = (3, 16, 24, 32, 32, 48), (1, 2, 1, 2, 1)
EVALUATIONS, SEEDS, CHANCE = 400, 3, 0.9  # the last: the error of guessing


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pairs = zip(itertools.pairwise(SIZES), STRIDES, strict=True)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride, 1) for (a, b), stride in pairs)
        self.fc = nn.Linear(SIZES[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.fc(x.mean((2, 3)))


class Digits:
    """The trained network, and its cut ones judged on one of two sets of about 400 images that did not train it."""

    def __init__(self) -> None:
        x, y, *others = (part.view(-1, 1, 8, 8).expand(-1, 3, -1, -1) if part.dim() == 2 else part for part in digits())
        self.sets = {"search": tuple(others[:2]), "final": tuple(others[2:])}
        torch.manual_seed(0)
        self.net = Net()
        adam = torch.optim.Adam(self.net.parameters(), lr=3e-3)
        for epoch in range(12):
            for batch in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(50):
                adam.zero_grad()
                functional.cross_entropy(self.net(x[batch]), y[batch]).backward()
                adam.step()
        self.graph: ModelGraph
        self.graph, costs, scores = made_up(self.net, choices=12)
        self.space = Space(costs, scores, (0.5 * costs.predict_ms(costs.dense),))
        self.memory = searching.Kept()  # a network is judged once, whichever search asks; it counts in each

    @torch.no_grad()
    def judge(self, units: Units, images: str = "search") -> Evaluation:
        x, y = self.sets[images]
        out = surgery.cut(self.net, self.graph, importance.best(self.space.scores, units))(x)
        return Evaluation(float(functional.cross_entropy(out, y)), float((out.argmax(1) == y).float().mean()))

    def trying(self, evaluations: int = EVALUATIONS) -> Trying:
        return searching.trying(self.space, self.judge, evaluations, self.memory)

    def volume(self, candidates: tuple[Candidate, ...], images: str) -> float:
        """Of the search's front, as a share of the area between guessing at the dense latency and no error at once."""
        corner = (CHANCE, self.space.cost_ms(self.space.costs.dense))
        plans = front.of(candidates)
        points = [(1 - self.judge(plan.widths, images).accuracy, plan.predicted_ms) for plan in plans]
        return front.hypervolume(np.array(points), corner) / (corner[0] * corner[1])


@functools.cache
def case() -> Digits:
    return Digits()


def evolved(on: Digits, directed: bool, seed: int) -> tuple[Candidate, ...]:
    trying = on.trying()
    genetic.search(trying, GeneticSection(directed=directed), seed)
    return trying.candidates


def drawn(on: Digits, directed: bool, seed: int, evaluations: int) -> tuple[Candidate, ...]:
    """The same beginning, then random parts of the channels go, at random latencies."""
    trying, costs = on.trying(evaluations), on.space.costs
    draw = np.random.Generator(np.random.PCG64(seed))
    size = genetic.population(EVALUATIONS)
    first = genetic.beginning(trying, GeneticSection(directed=directed), size, draw)
    trying.all([genotype.decode(on.space, genome) for genome in first])
    least_ms, dense_ms = allocate.floor(costs).predicted_ms, costs.predict_ms(costs.dense)
    sizes = np.array([costs.dense[g] for g in on.space.groups], dtype=float)
    while trying.left:
        level = replace(on.space, budgets_ms=(draw.uniform(least_ms, dense_ms),))
        parts = np.maximum(draw.dirichlet(np.ones(len(sizes))) * sizes, 1e-9)
        trying.all([level.removing(dict(zip(on.space.groups, parts.tolist(), strict=True))).widths])
    return trying.candidates


@pytest.mark.slow
@pytest.mark.parametrize("directed", [True, False])
def test_evolution_covers_more_than_random_networks_also_on_other_images(directed: bool) -> None:
    on, gains = case(), []
    for seed in range(SEEDS):
        first = evolved(on, directed, seed)
        both = first, drawn(on, directed, seed, len(first))  # some members of a front are the same at the budget
        assert 0.95 * EVALUATIONS <= len(both[0]) == len(both[1])
        volumes = np.array([[on.volume(candidates, images) for images in on.sets] for candidates in both])
        found = f"evolved {volumes[0].round(4)}, random {volumes[1].round(4)}"
        print(f"directed {directed}, seed {seed}, {len(first)} networks each: {found}")
        gains.append(volumes[0] - volumes[1])
    for gain in np.array(gains).T:  # search images, final images
        assert (gain > 0).sum() >= SEEDS - 1
