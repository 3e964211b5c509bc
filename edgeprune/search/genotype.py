"""Widths as genes: the index of a group's width among those on offer, so that each genome is one network and no other.

GeneCAI's genes are pruning rates, many of which mean the same width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .space import Space, Units
from .trying import Trying

Genome = NDArray[np.int64]  # (genes,)
HALVINGS = 4  # of the widths on offer, to find what a group alone can bear
PART = 0.25  # of the evaluations, at most, for that


def decode(space: Space, genome: Genome) -> dict[str, int]:
    """The widths; groups without a choice have no gene."""
    assert ((genome >= 0) & (genome < sizes(space))).all(), "a gene below 0 would be read from the other end"
    genes = dict(zip(space.groups, genome.tolist(), strict=True))
    return {g: widths[genes.get(g, 0)] for g, widths in space.widths.items()}


def encode(space: Space, units: Units) -> Genome:
    return np.array([space.widths[g].index(units[g]) for g in space.groups], dtype=np.int64)


def sizes(space: Space) -> Genome:
    """How many values each gene has."""
    return np.array([len(space.widths[g]) for g in space.groups], dtype=np.int64)


def boundary(trying: Trying, tolerance: float) -> dict[str, float]:
    """What may be cut from each group alone: the largest share that costs no more accuracy than `tolerance`.

    Halves the widths on offer, all groups at once, within a part of the evaluations; with too few of them, half of
    every group is assumed.
    """
    space = trying.space
    rounds = min(HALVINGS, int(PART * trying.left) // max(len(space.groups), 1))
    if not rounds:
        return dict.fromkeys(space.groups, 0.5)
    (dense,) = trying.all([space.costs.dense])
    low = dict.fromkeys(space.groups, -1)  # an index that costs too much
    high = {g: len(space.widths[g]) - 1 for g in space.groups}  # one that does not
    for _ in range(rounds):
        middle = {g: (low[g] + high[g]) // 2 for g in space.groups if high[g] - low[g] > 1}
        found = trying.all([{**space.costs.dense, g: space.widths[g][at]} for g, at in middle.items()])
        for (g, at), candidate in zip(middle.items(), found, strict=False):
            if candidate.evaluation.accuracy >= dense.evaluation.accuracy - tolerance:
                high[g] = at
            else:
                low[g] = at
    return {g: 1 - space.widths[g][high[g]] / space.costs.dense[g] for g in space.groups}


def directed(space: Space, cut: Mapping[str, float], draw: np.random.Generator) -> Genome:
    """A network around half of what each group alone could bear: normal, with half of that as deviation."""
    units = dict(space.costs.dense)
    for g in space.groups:
        rate = draw.normal(cut[g] / 2, cut[g] / 4)
        wanted = (1 - min(1.0, max(0.0, rate))) * units[g]
        units[g] = min(space.widths[g], key=lambda w: abs(w - wanted))
    return encode(space, units)


def anywhere(space: Space, draw: np.random.Generator) -> Genome:
    genome: Genome = draw.integers(0, sizes(space))
    return genome
