"""RL-Pruner (arXiv 2411.06463): where channels go is a distribution over groups, moved towards the best sample of it.

No gradients and no network: the action is the distribution with noise, the reward the loss (or the accuracy) of the
network that is cut by it, the update a clipped average. Every sample is scaled to the same latency, so that the reward
holds no term for size: one that does learns to cut as much as it may. With rate 0 this is random search around uniform
widths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..config import RLSection
from .space import Space
from .trying import Candidate, Trying

Floats = NDArray[np.float64]
LEAST = 1e-5  # of the distribution, for every group
EXPLORING = 0.1  # of the evaluations: then no move is random any more


@dataclass(frozen=True, eq=False)
class Sample:
    """An action and what it was worth."""

    action: Floats
    reward: float


def search(trying: Trying, settings: RLSection, seed: int) -> Candidate:
    """Move the distribution until the evaluations are used up.

    Args:
        trying: judges candidates.
        settings: see [search.rl].
        seed: of the samples.
    Returns:
        the candidate at this step's budget that is worth most.
    """
    chosen = [candidate for found, _ in moves(trying, settings, seed) for candidate in found]
    return trying.best(chosen)


def moves(trying: Trying, settings: RLSection, seed: int) -> Iterator[tuple[list[Candidate], Floats]]:
    """Candidates of every move at this step's budget, and the distribution after it, (groups,)."""
    draw = np.random.Generator(np.random.PCG64(seed))
    remembered: list[Sample] = []
    distribution = beginning(trying.space)
    while trying.left:
        actions = [noisy(distribution, settings.noise, draw) for _ in range(settings.samples)]
        found, rewards = _judged(trying, actions, 0, settings, draw)
        for action, reward in zip(actions, rewards, strict=False):
            remembered = _remember(remembered, Sample(action, reward), settings.samples)
        towards = _pick(remembered, epsilon(settings.epsilon, trying), draw)
        distribution = moved(distribution, towards.action, settings.rate, settings.clip)
        yield found, distribution


def beginning(space: Space) -> Floats:
    """In proportion to the groups' widths, (groups,): the distribution of uniform widths."""
    units = np.array([space.costs.dense[g] for g in space.groups], dtype=float)
    shares: Floats = units / units.sum()
    return shares


def noisy(distribution: Floats, noise: float, draw: np.random.Generator) -> Floats:
    """A sample around it, (groups,): positive, adding up to 1."""
    size = noise * draw.random()
    return _normal(distribution + size * draw.standard_normal(len(distribution)))


def moved(distribution: Floats, action: Floats, rate: float, clip: float) -> Floats:
    """Towards an action by `rate`, no entry by more than a factor of 1 ± `clip`, then normalised."""
    wanted = _normal(distribution + rate * (action - distribution))
    return _normal(distribution * np.clip(wanted / distribution, 1 - clip, 1 + clip))


def epsilon(first: float, trying: Trying) -> float:
    """The chance of a random move: a cosine from `first` to 0 over the first evaluations."""
    done = 1 - trying.left / trying.evaluations
    return first * 0.5 * (1 + math.cos(math.pi * min(1.0, done / EXPLORING)))


def _judged(
    trying: Trying, actions: Sequence[Floats], step: int, settings: RLSection, draw: np.random.Generator
) -> tuple[list[Candidate], list[float]]:
    """Candidates of the actions, and their rewards: what they are worth, and what their best successor adds.

    A successor continues an action at the next budget of the schedule; there are half as many at each step down.
    """
    space = trying.space
    plans = [space.removing(dict(zip(space.groups, action.tolist(), strict=True)), step) for action in actions]
    found = trying.all([plan.widths for plan in plans])
    rewards = [trying.worth(candidate) for candidate in found]
    if step + 1 < min(settings.lookahead, len(space.budgets_ms)):
        width = max(1, settings.samples >> (step + 1))
        for at in range(len(found)):
            next_actions = [noisy(actions[at], settings.noise, draw) for _ in range(width)]
            _, later = _judged(trying, next_actions, step + 1, settings, draw)
            rewards[at] += settings.discount * max(later, default=rewards[at])
    return found, rewards


def _remember(remembered: Sequence[Sample], new: Sample, size: int) -> list[Sample]:
    """The best `size`; a new one takes the place of the worst when it is as good."""
    if len(remembered) < size:
        return [*remembered, new]
    worst = min(range(size), key=lambda at: remembered[at].reward)
    if new.reward < remembered[worst].reward:
        return list(remembered)
    return [*remembered[:worst], new, *remembered[worst + 1 :]]


def _pick(remembered: Sequence[Sample], chance: float, draw: np.random.Generator) -> Sample:
    at = int(draw.integers(len(remembered)))
    if draw.random() < chance:
        return remembered[at]
    return max(remembered, key=lambda sample: sample.reward)


def _normal(distribution: Floats) -> Floats:
    positive = np.maximum(distribution, LEAST)
    shares: Floats = positive / positive.sum()
    return shares
