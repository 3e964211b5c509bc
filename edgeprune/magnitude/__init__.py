"""Unstructured pruning by magnitude: train, prune what is small, retrain what is left, again (Han et al., 1506.02626).

    pruned = magnitude.prune(model, example, ratio=12, rounds=1, evaluate=..., retrain=...)
    smaller = magnitude.remove_dead(pruned.model, example)      # neurons without inputs or outputs really go
    magnitude.sparse.save(smaller.model, path)                  # the rest as relative indices and values

How hard each layer is pruned comes from a sensitivity scan: every layer is pruned alone, at several thresholds, and
judged. Of all thresholds that make the network as small as asked, those are taken that lose least by these figures.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..errors import UsageError
from ..graph import Example
from ..records import Progress
from . import masks as masking
from . import sparse
from .dead import Removal, remove_dead
from .masks import Masks, Qualities

__all__ = [
    "Alone",
    "Masks",
    "Pruned",
    "Removal",
    "Round",
    "Sensitivity",
    "choose",
    "prune",
    "remove_dead",
    "scan",
    "sparse",
]

QUALITIES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0)  # thresholds that the scan tries
SETTLE = 40  # halvings until the network is as small as asked
DEAREST = 1e6  # price of a weight, in what `evaluate` is in
FINE = 301  # thresholds between those of the scan
Floats = NDArray[np.float64]
Evaluate = Callable[[nn.Module], float]  # larger is better
Retrain = Callable[[nn.Module, int], object]  # (network, round from 1), in place
Tried = tuple[str, float]  # a layer's weight, and its threshold in standard deviations


@dataclass(frozen=True)
class Sensitivity:
    """One layer pruned alone, at each threshold."""

    qualities: tuple[float, ...]  # thresholds in standard deviations, ascending
    kept: tuple[float, ...]  # share of the layer's weights that was left
    scores: tuple[float, ...]  # what `evaluate` said


@dataclass(frozen=True, eq=False)
class Alone:
    """Prunes one layer of a network and judges it; the network is as before afterwards."""

    model: nn.Module
    masks: Masks  # what is left of it
    evaluate: Evaluate

    def __call__(self, tried: Tried) -> tuple[float, float]:
        """The share of the layer's weights that is left, and what `evaluate` says."""
        name, quality = tried
        weight = self.model.get_parameter(name)
        whole = weight.detach().clone()
        left = masking.tighten(self.model, self.masks, {name: quality})[name]
        weight.data = whole * left
        try:
            return float(left.float().mean()), self.evaluate(self.model)
        finally:
            weight.data = whole

    def named(self, tried: Tried) -> str:
        return f"{tried[0]} pruned at {tried[1]:g} standard deviations"


Answers = Callable[[Alone, Sequence[Tried]], Iterator[tuple[int, tuple[float, float]]]]  # (position, answer), any order


@dataclass(frozen=True)
class Round:
    """What one round of pruning and retraining did."""

    qualities: Mapping[str, float]
    kept: Mapping[str, float]  # weight -> share of it that is left
    left: int
    pruned_score: float  # before retraining
    score: float
    sensitivity: Mapping[str, Sensitivity]


@dataclass(frozen=True, eq=False)
class Pruned:
    """A network with zeros in it."""

    model: nn.Module
    masks: Masks
    rounds: tuple[Round, ...]


def prune(
    model: nn.Module,
    example: Example,
    ratio: float,
    evaluate: Evaluate,
    retrain: Retrain,
    rounds: int = 1,
    l1: float = 0.0,
    progress: Progress | None = None,
    frozen: Sequence[str] = (),
    answers: Answers | None = None,
) -> Pruned:
    """Prune to 1 / `ratio` of the weights, in `rounds` that each prune by the same factor and retrain.

    Weights are never started afresh, and a weight that is gone stays exactly 0 whatever the loop's momentum and decay.

    Args:
        model: a trained network; it is not changed.
        example: one input, batch first.
        ratio: weights of linear and convolution layers, before over after.
        evaluate: judges a network, larger is better, on data that may guide choices. A loss (negative) is finer than
            an accuracy.
        retrain: trains in place; a tenth of the first learning rate is the paper's for small networks.
        rounds: 1 is one-shot.
        l1: weight of the absolute weights in the loss. The paper finds decay by squares, which is the loop's own,
            better once there is retraining.
        progress: told (rounds done, of).
        frozen: module paths that are neither pruned nor trained, and do not count: the paper prunes linear layers while
            convolutions are frozen, and then convolutions while those are.
        answers: who judges in the scan, see there.
    Raises:
        UsageError: nothing to prune, a ratio of 1 or less, no rounds, or a ratio that leaves a layer without a weight.
    """
    if ratio <= 1 or rounds < 1:
        raise UsageError(f"pruning {ratio:g}x in {rounds} rounds asks for nothing; give a ratio above 1, and rounds")
    model = copy.deepcopy(model)
    masks = masking.full(model, frozen)
    total = masking.kept(masks)[1]
    if not masks:
        raise UsageError(f"nothing is left to prune beside {', '.join(frozen) or 'layers without weights'}")
    if total / ratio < len(masks):
        raise UsageError(f"{total} weights in {len(masks)} layers cannot be pruned {ratio:g}x: a layer would be empty")
    readers = {name: weight for name, weight in masking.dropouts(model, example).items() if weight in masks}
    rates = {name: float(model.get_submodule(name).p) for name in readers}  # type: ignore[arg-type]
    done: list[Round] = []
    for number in range(1, rounds + 1):
        found = scan(model, masks, evaluate, answers=answers)
        qualities = choose(model, masks, found, total / ratio ** (number / rounds))
        masks = masking.tighten(model, masks, qualities)
        masking.apply(model, masks)
        masking.rescale_dropout(model, rates, readers, masks)
        before = evaluate(model)
        with masking.held(model, masks, l1), masking.still(model, frozen):
            retrain(model, number)
        shares = {n: float(m.float().mean()) for n, m in masks.items()}
        done.append(Round(qualities, shares, masking.kept(masks)[0], before, evaluate(model), found))
        if progress is not None:
            progress(number, rounds)
    return Pruned(model, masks, tuple(done))


def scan(
    model: nn.Module,
    masks: Masks,
    evaluate: Evaluate,
    qualities: Sequence[float] = QUALITIES,
    answers: Answers | None = None,
) -> dict[str, Sensitivity]:
    """Prune each layer alone, at every threshold, and judge the network.

    Args:
        model: it is as before afterwards.
        masks: what is left of it.
        evaluate: larger is better.
        qualities: thresholds in standard deviations, ascending.
        answers: who judges, in any order: default this process, one after the other.
    """
    tried = [(name, quality) for name in masks for quality in qualities]
    found = dict((answers or _in_turn)(Alone(model, masks, evaluate), tried))
    layers = {}
    for name, first in zip(masks, range(0, len(tried), len(qualities)), strict=True):
        kept, scores = zip(*(found[first + at] for at in range(len(qualities))), strict=True)
        layers[name] = Sensitivity(tuple(qualities), kept, scores)
    return layers


def _in_turn(alone: Alone, tried: Sequence[Tried]) -> Iterator[tuple[int, tuple[float, float]]]:
    return ((at, alone(one)) for at, one in enumerate(tried))


def choose(model: nn.Module, masks: Masks, found: Mapping[str, Sensitivity], left: float) -> dict[str, float]:
    """The thresholds that lose least, all layers' losses added up, with `left` weights in total.

    At the same price of a weight in every layer, each takes the threshold at which what it loses, pruned alone, and the
    price of its weights are least: a layer that is sensitive, or that has few weights to give, is pruned little.

    Args:
        model, masks: the network, and what is left of it.
        found: see `scan`.
        left: weights that should stay, at most.
    """
    curves = {name: _curve(one, int(masks[name].sum())) for name, one in found.items()}

    def at(price: float) -> dict[str, float]:
        return {name: float(q[np.argmin(lost + price * weights)]) for name, (q, weights, lost) in curves.items()}

    def size(qualities: Qualities) -> int:
        return masking.kept(masking.tighten(model, masks, qualities))[0]

    low, high = 0.0, 1.0
    while size(at(high)) > left and high < DEAREST:
        high *= 4
    for _ in range(SETTLE):
        middle = (low + high) / 2
        low, high = (low, middle) if size(at(middle)) <= left else (middle, high)
    return _exactly(at(high), size, left)


def _curve(one: Sensitivity, weights: int) -> tuple[Floats, Floats, Floats]:
    """Thresholds, close together, with the weights left and what the layer loses by them, (FINE,) each."""
    lost = np.maximum.accumulate(one.scores[0] - np.array(one.scores))  # a gain by chance is not a licence
    fine = np.linspace(one.qualities[0], one.qualities[-1], FINE)
    return fine, weights * np.interp(fine, one.qualities, one.kept), np.interp(fine, one.qualities, lost)


def _exactly(qualities: Qualities, size: Callable[[Qualities], int], left: float) -> dict[str, float]:
    """The same thresholds, all lowered or raised by one factor until `left` weights stay."""
    low, high = 0.0, 64.0
    for _ in range(SETTLE):
        middle = (low + high) / 2
        fits = size({n: q * middle for n, q in qualities.items()}) <= left
        low, high = (low, middle) if fits else (middle, high)
    return {n: q * high for n, q in qualities.items()}
