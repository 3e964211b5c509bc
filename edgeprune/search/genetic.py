"""GeneCAI (arXiv 2004.04249): widths evolve towards networks that none beats in both accuracy and latency.

Two ways, each under its own name: "nsga2" sorts by dominance (Deb et al. 2002, by pymoo) as the paper says; "score" is
the scalar score with roulette selection of the paper's program.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import allocate, allocators
from ..config import GeneticSection
from ..errors import UnreachableBudget, UsageError
from . import front, genotype
from .genotype import Genome
from .space import Space
from .trying import Candidate, Trying

MOST = 50  # networks a generation
LAST = 0.1  # of the evaluations: members of the front, carried to the budget
LEVELS = (0.25, 0.5, 0.75)  # between the floor's and the dense latency: uniform and exact plans to begin with
ETA = 3.0  # of crossover and mutation: larger ones would round back to the width they came from
CROSSOVER, SWAP = 0.2, 0.2  # chance for a pair, and then for each gene
MUTATION, GENE, SPREAD = 0.8, 0.05, 0.2  # chance for a network, for each gene, and by how much of its values


def search(trying: Trying, settings: GeneticSection, seed: int) -> Candidate:
    """Evolve until the evaluations are used up; the last of them carry the front to the budget.

    Args:
        trying: judges candidates.
        settings: see [search.genetic].
        seed: of everything drawn.
    Returns:
        the candidate at the budget that is worth most.
    Raises:
        UsageError: pymoo is not installed.
    """
    space, draw = trying.space, np.random.Generator(np.random.PCG64(seed))
    size = settings.population or population(trying.evaluations)
    keep = max(1, round(LAST * trying.evaluations))
    first = beginning(trying, settings, size, draw)
    evolve = _nsga2 if settings.mode == "nsga2" else _scored
    evolve(trying, first, keep, settings, seed)
    return _at_the_budget(trying, space)


def population(evaluations: int) -> int:
    """Networks a generation, unless the settings say."""
    return min(MOST, max(4, evaluations // 20))


def beginning(trying: Trying, settings: GeneticSection, size: int, draw: np.random.Generator) -> list[Genome]:
    """The first generation: a third uniform and exact plans at a few latencies, a third around what each layer can
    bear, and the rest anywhere, for those two leave fast networks out."""
    space = trying.space
    if not settings.directed:
        return [genotype.anywhere(space, draw) for _ in range(size)]
    cut = genotype.boundary(trying, settings.tolerance)
    plans = [genotype.encode(space, units) for units in _known(space)][: size // 3]
    near = [genotype.directed(space, cut, draw) for _ in range(size // 3)]
    return [*plans, *near, *(genotype.anywhere(space, draw) for _ in range(size - len(plans) - len(near)))]


def _known(space: Space) -> list[dict[str, int]]:
    """Uniform and exact plans, without dropped blocks."""
    least = allocate.floor(space.costs).predicted_ms
    dense = space.cost_ms(space.costs.dense)
    budgets = [space.budgets_ms[0], *(least + level * (dense - least) for level in LEVELS)]
    found = []
    for budget in budgets:
        for name in ("knapsack", "uniform"):
            try:
                units = dict(allocators.named(name)(space.costs, space.scores, budget).widths)
            except UnreachableBudget:
                continue
            if all(units[g] in space.widths[g] for g in units):
                found.append(units)
    return found


def _at_the_budget(trying: Trying, space: Space) -> Candidate:
    """Carry members of the front to the budget, those nearest to it first, as long as evaluations are left."""
    budget = space.budgets_ms[0]
    members = sorted(front.of(trying.candidates), key=lambda c: abs(c.predicted_ms - budget))
    for member in members:
        if not trying.left:
            break
        trying.all([space.scaled(member.widths).widths])
    within = [c for c in trying.candidates if c.predicted_ms <= budget * (1 + 1e-9) and _meets(space, c)]
    if not within:  # the evaluations ended before any
        return min(trying.candidates, key=lambda c: c.predicted_ms)
    return trying.best(within)


def _meets(space: Space, candidate: Candidate) -> bool:
    return all(limit.predict(candidate.units, space.costs.blocks) <= limit.budget for limit in space.limits)


# ---- non-dominated sorting -----------------------------------------------------------------------------------


def _nsga2(trying: Trying, first: Sequence[Genome], keep: int, settings: GeneticSection, seed: int) -> None:
    algorithm = nsga2(trying.space, first, trying.evaluations, seed)
    while trying.left > keep and generation(trying, algorithm):
        pass


def nsga2(space: Space, first: Sequence[Genome], generations: int, seed: int) -> Any:
    """pymoo's algorithm over genomes: its population is as large as the first generation.

    Args:
        space: the genes and their values.
        first: the genomes to begin with.
        generations: at most.
        seed: of everything drawn.
    Raises:
        UsageError: pymoo is not installed.
    """
    if importlib.util.find_spec("pymoo") is None:
        raise UsageError("strategy genetic needs pymoo: pip install 'edgeprune[search]', or search.genetic.mode=score")
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair

    problem = Problem(n_var=len(space.groups), n_obj=2, xl=0, xu=genotype.sizes(space) - 1, vtype=int)
    algorithm = NSGA2(
        pop_size=len(first),
        sampling=np.array(first),
        crossover=SBX(prob=0.9, eta=ETA, vtype=float, repair=RoundingRepair()),
        mutation=PM(eta=ETA, vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
    )
    algorithm.setup(problem, termination=("n_gen", generations), seed=seed, verbose=False)
    return algorithm


def generation(trying: Trying, algorithm: Any) -> bool:
    """Breed, judge, and keep the best of parents and children; says whether there was anything to go on with."""
    asked: Any = algorithm.ask()
    if asked is None or not len(asked):
        return False  # nothing new can be bred
    genomes = [np.rint(g).astype(np.int64) for g in asked.get("X")]
    found = trying.all([genotype.decode(trying.space, g) for g in genomes])
    if len(found) < len(genomes):
        return False
    asked.set("F", np.array([[1 - c.evaluation.accuracy, c.predicted_ms] for c in found]))
    for individual in asked:
        individual.evaluated.add("F")
    algorithm.tell(infills=asked)
    return True


# ---- the scalar score ----------------------------------------------------------------------------------------


def score(saving: float, accuracy: float, dense: float, threshold: float, pressure: float) -> float:
    """exp(pressure * saving) over the accuracy lost, in points, and a punishment below the threshold.

    Args:
        saving: share of the dense latency that is gone; below 0 the score is 0.
        accuracy, dense, threshold: 0..1: the network's, the dense one's, and what is punished below.
        pressure: GeneCAI has 100.
    """
    if saving < 0:
        return 0.0
    lost, below = 100 * abs(dense - accuracy), 100 * (threshold - accuracy)
    return float(np.exp(pressure * saving) / (lost + 1 + (np.exp(below) if below > 0 else 0.0)))


def _scored(trying: Trying, first: Sequence[Genome], keep: int, settings: GeneticSection, seed: int) -> None:
    space, draw = trying.space, np.random.Generator(np.random.PCG64(seed + 1))
    dense = trying.all([space.costs.dense])[0]
    generation = list(first)
    while trying.left > keep:
        found = trying.all([genotype.decode(space, genome) for genome in generation])
        if len(found) < len(generation):
            return
        scores = np.array([_score(c, dense, settings) for c in found])
        chances = scores - scores.min()
        weights = chances / chances.sum() if chances.sum() > 0 else np.full(len(scores), 1 / len(scores))
        parents = draw.choice(len(generation), size=len(generation), p=weights)
        generation = _bred([generation[at] for at in parents], genotype.sizes(space), draw)


def _score(candidate: Candidate, dense: Candidate, settings: GeneticSection) -> float:
    saving = 1 - candidate.predicted_ms / dense.predicted_ms
    return score(
        saving, candidate.evaluation.accuracy, dense.evaluation.accuracy, settings.threshold, settings.pressure
    )


def _bred(parents: Sequence[Genome], values: NDArray[np.int64], draw: np.random.Generator) -> list[Genome]:
    """Neighbours swap genes, then genes shift; every gene stays among its values."""
    children = [parent.copy() for parent in parents]
    for a, b in zip(children[::2], children[1::2], strict=False):
        if draw.random() < CROSSOVER:
            swapped = draw.random(len(a)) < SWAP
            a[swapped], b[swapped] = b[swapped], a[swapped]
    for child in children:
        if draw.random() < MUTATION:
            shifted = draw.random(len(child)) < GENE
            shift = np.rint(draw.normal(0, SPREAD, len(child)) * values).astype(np.int64)
            child[shifted] = np.clip(child + shift, 0, values - 1)[shifted]
    return children
