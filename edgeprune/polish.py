"""A plan made better by the true costs, one width at a time: what a priced problem leaves over or oversteps."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

from .limits import Limit, Part, dropped_layers
from .records import Block
from .widths import shape_at

Values = Mapping[str, Mapping[int, float]]  # group -> width -> value, ascending widths
SWEEPS = 5  # over all groups, at most


@dataclass(frozen=True)
class Move:
    """One group takes another width."""

    group: str
    width: int
    value: float  # gained
    costs: tuple[float, ...]  # added to each limit


def polished(
    values: Values, limits: Sequence[Limit], blocks: Sequence[Block], units: Mapping[str, int]
) -> dict[str, int] | None:
    """A plan within all limits, by other widths, one group at a time; None when none is found from here.

    First what loses least value for what it saves, until all limits hold; then what gains most for what it costs, as
    long as they hold.

    Args:
        values: of every width that a group may take.
        limits: with their budgets.
        blocks: that may be dropped: dropped or not, they stay as they are.
        units: where to begin, within the limits or not.
    """
    plan = _Plan(values, limits, blocks, units)
    for _ in range(SWEEPS):
        if plan.fits():
            break
        saving = [m for m in plan.moves(operator.lt) if plan.saved(m) > 0]
        for move in sorted(saving, key=lambda m: -m.value / plan.saved(m)):
            if not plan.fits() and move.width < plan.units[move.group]:
                plan.take(move)
    if not plan.fits():
        return None
    for _ in range(SWEEPS):
        gaining = sorted(plan.moves(operator.gt), key=lambda m: -m.value / max(-plan.saved(m), 1e-12))
        if not sum(plan.take_if_better(move) for move in gaining):
            break
    return plan.units


class _Plan:
    """Where the search is."""

    def __init__(
        self, values: Values, limits: Sequence[Limit], blocks: Sequence[Block], units: Mapping[str, int]
    ) -> None:
        self.values, self.limits, self.units = values, limits, dict(units)
        self.costs = [limit.predict(units, blocks) for limit in limits]
        gone = dropped_layers(blocks, units)
        self.parts = [_by_group(limit, gone) for limit in limits]

    def fits(self, more: Sequence[float] | None = None) -> bool:
        more = more or [0.0] * len(self.costs)
        return all(c + m <= limit.budget for c, m, limit in zip(self.costs, more, self.limits, strict=True))

    def saved(self, move: Move) -> float:
        """In parts of the budgets: of those that are overstepped, or of all where none is."""
        over = [limit.budget < cost for limit, cost in zip(self.limits, self.costs, strict=True)]
        each = zip(self.limits, move.costs, over, strict=True)
        return math.fsum(-cost / max(limit.budget, 1e-12) for limit, cost, is_over in each if is_over or not any(over))

    def moves(self, direction: Callable[[int, int], bool]) -> list[Move]:
        """To every width that is smaller, or larger."""
        return [
            self._move(g, width)
            for g, values in self.values.items()
            for width in values
            if width and self.units[g] and direction(width, self.units[g])
        ]

    def _move(self, group: str, width: int) -> Move:
        after = {**self.units, group: width}
        costs = tuple(math.fsum(_at(p, after) - _at(p, self.units) for p in by_group[group]) for by_group in self.parts)
        return Move(group, width, self.values[group][width] - self.values[group][self.units[group]], costs)

    def take(self, move: Move) -> None:
        move = self._move(move.group, move.width)  # what it costs has changed with the moves before
        self.costs = [c + m for c, m in zip(self.costs, move.costs, strict=True)]
        self.units[move.group] = move.width

    def take_if_better(self, move: Move) -> bool:
        now = self._move(move.group, move.width)
        better = now.value > 0 and self.fits(now.costs)
        if better:
            self.take(now)
        return better


def _by_group(limit: Limit, gone: Container[str]) -> dict[str, list[Part]]:
    """The parts whose costs a group's width decides."""
    found = defaultdict(list)
    for part in limit.parts:
        layer = part.layer
        for g in {g for g, _ in (*layer.in_width.terms, *layer.out_width.terms, *layer.groups_width.terms)}:
            if layer.name not in gone:
                found[g].append(part)
    return found


def _at(part: Part, units: Mapping[str, int]) -> float:
    shape = shape_at(part.layer, units)
    return part.at(shape.in_ch, shape.out_ch)
