"""Searches on made-up networks: real costs by formula, answers by formula, nothing on the disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from test_allocate import made_up
from torch import Tensor, nn

from edgeprune.records import Evaluation
from edgeprune.search import Space, Trying
from edgeprune.search.journal import Key
from edgeprune.search.space import Units


class Chain(nn.Module):
    """Ten layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [3, *(16 + 8 * (i % 3) for i in range(10))]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(sizes))
        self.fc = nn.Linear(sizes[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.fc(x.mean((2, 3)))


class Kept:
    """A memory without a file."""

    def __init__(self) -> None:
        self.known: dict[Key, Evaluation] = {}

    def add(self, key: Key, found: Evaluation) -> None:
        self.known[key] = found


@cache
def space(network: type[nn.Module] = Chain, choices: int = 8, share: float = 0.5, steps: int = 1) -> Space:
    """Its budgets: `share` of the dense latency, and that again for each further step."""
    _, costs, scores = made_up(network(), choices=choices)
    dense = costs.predict_ms(costs.dense)
    return Space(costs, scores, tuple(dense * share ** (step + 1) for step in range(steps)))


def trying(
    where: Space, answer: Callable[[Units], Evaluation], evaluations: int, memory: Kept | None = None, by: str = "loss"
) -> Trying:
    def judges(asked: Sequence[Units]) -> Iterator[tuple[int, Evaluation]]:
        return ((at, answer(units)) for at, units in enumerate(asked))

    return Trying(where, judges, memory or Kept(), evaluations, lambda done, of: None, by)
