"""A network whose channels fade out: each group loses its least important channels to a real-numbered share.

Whatever makes, scales or reads channel i of n, ranked by importance from the least, is multiplied by
sigmoid((rank_i - share) / temperature), with rank_i = (i + 1/2) / n. At a low temperature, and a share of k / n, that
is the network without its k least channels. (Not quite where a shortcut pads channels: what it brings into a channel
that is gone passes on to the next such shortcut.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..importance import Importance
from ..records import ChannelGroup, Member

Shares = Mapping[str, Tensor]  # group -> share of its units that goes, 0..1


class Gates:
    """The gates of one network; its weights are read, never changed."""

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], scores: Importance) -> None:
        self.model = model
        self.parameters = {name: p.detach() for name, p in model.named_parameters()}
        self.ranks = {g.id: torch.from_numpy(_ranks(scores[g.id])) for g in groups}
        self._owners: dict[tuple[str, int], Tensor] = {}  # (tensor, axis) -> which gate, the last one is always open
        first, count = 0, sum(g.width for g in groups)
        for group in groups:
            for member in _gated(group, self.parameters):
                key, size = (member.tensor, member.axis), self.parameters[member.tensor].shape[member.axis]
                owner = self._owners.setdefault(key, torch.full((size,), count))
                owner[torch.from_numpy(member.positions)] = first + torch.arange(group.width)[:, None]
            first += group.width

    def openings(self, shares: Shares, temperature: float) -> dict[str, Tensor]:
        """How far each unit is open, group -> (width,)."""
        return {g: torch.sigmoid((rank - shares[g]) / temperature) for g, rank in self.ranks.items()}

    def run(self, x: Tensor, openings: Mapping[str, Tensor]) -> Tensor:
        """The network's output with its channels so far open; call it in evaluation mode."""
        gates = torch.cat([*(openings[g] for g in self.ranks), torch.ones(1, dtype=torch.float64)])
        weights = dict(self.parameters)
        for (name, axis), owner in self._owners.items():
            shape = [-1 if d == axis else 1 for d in range(weights[name].dim())]
            weights[name] = weights[name] * gates[owner].view(shape).to(weights[name].dtype)
        out: Tensor = functional_call(self.model, weights, (x,))
        return out


def _ranks(scores: np.ndarray) -> np.ndarray:
    """(i + 1/2) / n for the i-th least of (n,) scores; equal ones in the order in which plans drop them."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(-scores, kind="stable")] = np.arange(len(scores), 0, -1) - 0.5
    return ranks / len(scores)


def _gated(group: ChannelGroup, parameters: Mapping[str, Tensor]) -> list[Member]:
    """Where a channel is multiplied: in all that make, scale and read it, so that no way around a gate is left open."""
    return [m for m in group.members if m.tensor in parameters]
