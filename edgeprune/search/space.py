"""What a search may choose from: widths of every group, and what they cost; every candidate is scaled to a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .. import allocators
from ..allocate import Costs
from ..importance import Importance
from ..limits import Limit
from ..records import Plan

Units = Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Space:
    """Groups, scores and costs of one network on one device."""

    costs: Costs
    scores: Importance
    budgets_ms: tuple[float, ...]  # predicted: this step's of the schedule, then those of later steps
    limits: tuple[Limit, ...] = ()  # further budgets of this step

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Those with a choice."""
        return tuple(g for g, widths in self.widths.items() if len(widths) > 1)

    @cached_property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """What each group may keep; no search drops a block whole."""
        return {g: tuple(w for w in widths if w) or (0,) for g, widths in self.costs.candidates.items()}

    def removing(self, removed: Mapping[str, float], step: int = 0) -> Plan:
        """Take away channels in these proportions, as few as the budget needs.

        Args:
            removed: group -> above 0: its part of the channels that go; groups not named stay whole.
            step: of the schedule, from this one on.
        """
        dense = self.costs.dense
        most = max(dense[g] / part for g, part in removed.items())  # at which every group is gone

        def path(at: float) -> dict[str, float]:
            return {g: 1 - (1 - at) * most * removed.get(g, 0.0) / dense[g] for g in dense}

        limits = () if step else self.limits
        return allocators.along(path, self.costs, self.scores, self.budgets_ms[step], limits)

    def scaled(self, units: Units) -> Plan:
        """These widths, carried to the budget in proportion."""
        shares = allocators.shares_of(self.costs, units)
        return allocators.scaled(shares, self.costs, self.scores, self.budgets_ms[0], self.limits)

    def cost_ms(self, units: Units) -> float:
        return self.costs.predict_ms(units)

    def key(self, units: Units) -> tuple[int, ...]:
        """Widths in the groups' own order."""
        return tuple(units[g] for g in self.costs.candidates)

    def units(self, key: Sequence[int]) -> dict[str, int]:
        return dict(zip(self.costs.candidates, key, strict=True))
