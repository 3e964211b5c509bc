"""Random search: the bar that every other search has to beat."""

from __future__ import annotations

import numpy as np

from .trying import Candidate, Trying

ROUND = 10  # candidates judged at once


def search(trying: Trying, seed: int) -> Candidate:
    """Each group's part of the channels that go is drawn anew from a flat Dirichlet distribution."""
    space, draw = trying.space, np.random.Generator(np.random.PCG64(seed))
    sizes = np.array([space.costs.dense[g] for g in space.groups], dtype=float)
    while trying.left:
        parts = [draw.dirichlet(np.ones(len(sizes))) * sizes for _ in range(ROUND)]
        plans = [space.removing(dict(zip(space.groups, np.maximum(p, 1e-9).tolist(), strict=True))) for p in parts]
        trying.all([plan.widths for plan in plans])
    return trying.best(trying.candidates)
