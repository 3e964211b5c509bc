"""From classes of ids to channel groups: which slices of which tensors go together, and which must stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..records import ChannelGroup, FrozenChannels, Member
from .labels import Ids, Ledger
from .run import StateAxis

Shapes = Mapping[str, tuple[int, ...]]
ONE_UNIT = "all its channels go together, and one must stay"


class Slices:
    """Every slice of every parameter axis with its class, sorted by class, axis, position."""

    def __init__(self, axes: Sequence[StateAxis], classes: Ids) -> None:
        self.axes = axes
        axis = np.repeat(np.arange(len(axes)), [a.size for a in axes])
        position = np.concatenate([np.arange(a.size) for a in axes])
        ids = np.concatenate([np.arange(a.first, a.first + a.size) for a in axes])
        order = np.lexsort((position, axis, classes[ids]))
        self.axis, self.position, self.ids = axis[order], position[order], ids[order]
        self.cls = classes[self.ids]
        self.first = np.flatnonzero(np.diff(self.cls, prepend=-1))  # where each class begins
        self.size = np.diff(self.first, append=len(self.cls))  # its number of slices

    def signatures(self) -> NDArray[np.uint64]:
        """A hash of which axes each class has slices in, and how many: equal for units of one group."""
        new = np.diff(self.cls, prepend=-1).astype(bool) | np.diff(self.axis, prepend=-1).astype(bool)
        run = np.flatnonzero(new)
        count = np.diff(run, append=len(self.cls))
        hashed = _mix(self.axis[run].astype(np.uint64) << np.uint64(32) | count.astype(np.uint64))
        total = np.cumsum(hashed, dtype=np.uint64)
        last = np.append(np.searchsorted(run, self.first[1:]), len(run)) - 1
        sums: NDArray[np.uint64] = np.diff(total[last], prepend=np.uint64(0))
        return sums


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: sums of its values do not collide in practice."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def build(
    ledger: Ledger, classes: Ids, axes: Sequence[StateAxis], roles: NDArray[np.str_]
) -> tuple[list[ChannelGroup], list[Ids], list[FrozenChannels]]:
    """Partition the ids of parameter slices into channel groups and frozen channels.

    Args:
        ledger: the demands, for the reasons.
        classes: class of each id, (ids,).
        axes: which ids are slices of which parameter axis.
        roles: "out", "in", "scale" or "" of each id, (ids,).
    Returns:
        The groups, the class of each of their units (width,), and the frozen channels.
    """
    slices = Slices(axes, classes)
    stay = _marked(ledger.stay, classes)
    inexact = _marked(ledger.inexact, classes)
    names = slices.cls[slices.first]
    free = np.flatnonzero(stay[names] < 0)
    _, bucket = np.unique(slices.signatures()[free], return_inverse=True)
    groups: list[ChannelGroup] = []
    units: list[Ids] = []
    reasons = [reason for _, reason in ledger.stay] + [ONE_UNIT]
    by_bucket = np.split(free[np.argsort(bucket, kind="stable")], np.cumsum(np.bincount(bucket))[:-1])
    for members in sorted((b for b in by_bucket if len(b)), key=lambda b: int(slices.ids[slices.first[b]].min())):
        members = members[np.argsort(slices.position[slices.first[members]], kind="stable")]
        if len(members) < 2:
            stay[names[members]] = len(reasons) - 1
            continue
        marks = inexact[names[members]]
        why = ledger.inexact[int(marks.max())][1] if marks.max() >= 0 else ""
        groups.append(_group(slices, members, roles, why))
        units.append(names[members])
    return _named(groups), units, _frozen(stay, slices, reasons)


def _marked(marks: Sequence[tuple[Tensor, str]], classes: Ids) -> Ids:
    """For each class the number of the first mark on it, or -1."""
    found = np.full(int(classes.max(initial=-1)) + 1, -1, dtype=np.int64)
    for number in range(len(marks) - 1, -1, -1):
        found[classes[marks[number][0].numpy()]] = number
    return found


def _group(slices: Slices, members: Ids, roles: NDArray[np.str_], inexact: str) -> ChannelGroup:
    width, per_unit = len(members), int(slices.size[members[0]])
    at = slices.first[members][:, None] + np.arange(per_unit)  # (width, slices a unit)
    made = []
    for number in np.unique(slices.axis[at[0]]):
        axis = slices.axes[number]
        columns = at[:, slices.axis[at[0]] == number]
        role = str(roles[slices.ids[columns[0, 0]]]) or "scale"
        made.append(Member(axis.name, axis.axis, role, slices.position[columns]))
    makers = [m for m in made if m.role == "out"] or made
    widest = max(m.positions.shape[1] for m in makers)
    return ChannelGroup(makers[0].tensor, width, widest, tuple(made), inexact)


def _named(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Name groups by the module that makes them; several of one module by their first channel."""
    modules = [group.id.rpartition(".")[0] or group.id for group in groups]
    several = Counter(modules)
    named = []
    for group, module in zip(groups, modules, strict=True):
        maker = next(m for m in group.members if m.tensor == group.id)
        named.append(module if several[module] == 1 else f"{module}[{maker.positions.min()}]")
    again = Counter(named)
    unique = [n if again[n] == 1 else f"{n}#{i}" for i, n in enumerate(named)]  # two axes of one tensor
    return [replace(group, id=name) for group, name in zip(groups, unique, strict=True)]


def _frozen(stay: Ids, slices: Slices, reasons: list[str]) -> list[FrozenChannels]:
    """Frozen channels by reason, most channels first."""
    reason = stay[slices.cls]
    found: dict[str, tuple[int, set[str]]] = {}
    for number, axis in np.unique(np.stack([reason, slices.axis])[:, reason >= 0], axis=1).T.tolist():
        count, tensors = found.get(reasons[number], (0, set()))
        here = int(np.count_nonzero((reason == number) & (slices.axis == axis)))
        found[reasons[number]] = (count + here, tensors | {slices.axes[axis].name})
    frozen = [FrozenChannels(tuple(sorted(t)), n, why) for why, (n, t) in found.items()]
    return sorted(frozen, key=lambda f: -f.channels)


def prunable(axes: Sequence[StateAxis], free: NDArray[np.bool_], shapes: Shapes) -> dict[str, int]:
    """Elements of each tensor that lie in a slice of some unit: what cutting every unit would remove.

    Args:
        axes: which ids are slices of which parameter axis.
        free: whether each id belongs to a unit, (ids,).
        shapes: of each tensor.
    """
    stays = {name: float(np.prod(shape)) for name, shape in shapes.items()}
    for axis in axes:
        stays[axis.name] *= 1.0 - float(free[axis.first : axis.first + axis.size].mean())
    return {name: round(float(np.prod(shapes[name])) - left) for name, left in stays.items()}
