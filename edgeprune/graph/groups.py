"""From classes of ids to channel groups: which slices of which tensors go together, and which must stay."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from ..records import ChannelGroup, FrozenChannels, Member
from .ledger import Ledger, marks
from .run import StateAxis
from .unions import Ids, Unions

Shapes = Mapping[str, tuple[int, ...]]
RoleOf = Callable[[int, int], str]  # number of an axis, position -> role
ONE_UNIT = "all its channels go together, and one must stay"


class Slices:
    """Every slice of every leading axis with its class, sorted by class, axis, position.

    Axes whose slices go together one by one (a convolution's outputs, the norm's scales after it) have one leader.
    """

    def __init__(self, axes: Sequence[StateAxis], unions: Unions) -> None:
        classes = unions.classes()
        self.axes = axes
        leaders: dict[int, int] = {}  # range -> number of the first axis with it
        self.followers: dict[int, list[int]] = {}  # leading axis -> all axes that it stands for, itself first
        for number, each in enumerate(axes):
            leader = leaders.setdefault(unions.leader(unions.at(each.first)), number)
            self.followers.setdefault(leader, []).append(number)
        sizes = [axes[number].size for number in self.followers]
        axis = np.repeat(list(self.followers), sizes)
        first = np.repeat([axes[number].first for number in self.followers], sizes)
        position = np.arange(len(axis)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        ids = first + position
        order = by_number(classes[ids])  # stable: axes and positions follow each other already
        self.axis, self.position, self.ids = axis[order], position[order], ids[order]
        self.cls = classes[self.ids]
        self.first = np.flatnonzero(np.diff(self.cls, prepend=-1))  # where each class begins
        self.size = np.diff(self.first, append=len(self.cls))  # its number of slices

    def signatures(self) -> NDArray[np.uint64]:
        """A hash of which leading axes each class has slices in, and how many: equal for units of one group."""
        new = np.diff(self.cls, prepend=-1).astype(bool) | np.diff(self.axis, prepend=-1).astype(bool)
        run = np.flatnonzero(new)
        count = np.diff(run, append=len(self.cls))
        hashed = _mix(self.axis[run].astype(np.uint64) << np.uint64(32) | count.astype(np.uint64))
        total = np.cumsum(hashed, dtype=np.uint64)
        last = np.cumsum(new)[np.append(self.first[1:], len(self.cls)) - 1] - 1  # where each class ends
        sums: NDArray[np.uint64] = np.diff(total[last], prepend=np.uint64(0))
        return sums


def by_number(numbers: Ids) -> Ids:
    """The order that sorts small numbers, equal ones as they came: a counting sort."""
    shape = (int(numbers.max(initial=-1)) + 1, len(numbers))
    sorting = csr_matrix((np.ones(len(numbers), dtype=np.int8), (numbers, np.arange(len(numbers)))), shape=shape)
    order: Ids = sorting.indices.astype(np.int64)
    return order


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: sums of its values do not collide in practice."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, eq=False)
class Partition:
    """The slices of all parameters: in channel groups, or frozen."""

    groups: tuple[ChannelGroup, ...]
    units: tuple[Ids, ...]  # of each group: the class of each unit, (width,)
    slices: Slices
    stay: Ids  # of each class: the number of the reason why it stays, or -1
    reasons: tuple[str, ...]


def build(ledger: Ledger, axes: Sequence[StateAxis], roles: Sequence[tuple[Ids, str]]) -> Partition:
    """Partition the ids of parameter slices into channel groups and frozen channels.

    Args:
        ledger: the demands, settled.
        axes: which ids are slices of which parameter axis.
        roles: ids, and whether a layer makes ("out"), reads ("in") or scales ("scale") them.
    """
    classes = ledger.ids.classes()
    slices = Slices(axes, ledger.ids)
    role_of = _roles(slices, ledger.ids, roles)
    stay = _first_mark([(a, b) for a, b, _ in ledger.stay], classes)
    inexact = _first_mark([(a, None) for a, _ in ledger.inexact], classes)
    names = slices.cls[slices.first]
    free = np.flatnonzero(stay[names] < 0)
    members_of = _alike(slices.signatures()[free], slices.position[slices.first[free]])
    groups: list[ChannelGroup] = []
    units: list[Ids] = []
    reasons = [reason for _, _, reason in ledger.stay] + [ONE_UNIT]
    for members in sorted([free[each] for each in members_of], key=lambda m: int(slices.ids[slices.first[m]].min())):
        if len(members) < 2:
            stay[names[members]] = len(reasons) - 1
            continue
        unit_classes = names[members]
        mark = int(inexact[unit_classes].max())
        why = ledger.inexact[mark][1] if mark >= 0 else ""
        groups.append(_group(slices, members, role_of, why))
        units.append(unit_classes)
    return Partition(tuple(_named(groups)), tuple(units), slices, stay, tuple(reasons))


def _alike(signatures: NDArray[np.uint64], position: Ids) -> list[Ids]:
    """Where equal signatures stand, by position; they mostly follow each other."""
    if not len(signatures):
        return []
    begin = np.flatnonzero(np.append(True, signatures[1:] != signatures[:-1]))
    _, number = np.unique(signatures[begin], return_inverse=True)
    bucket = np.repeat(number, np.diff(begin, append=len(signatures)))
    return np.split(np.lexsort((position, bucket)), np.cumsum(np.bincount(bucket))[:-1])


def _first_mark(parts: Sequence[tuple[Ids, Ids | None]], classes: Ids) -> Ids:
    """For each class the number of the first part with an id of it (see `marks`), or -1."""
    found = np.full(int(classes.max(initial=-1)) + 1, -1)
    ids, number = marks(parts)
    found[classes[ids[::-1]]] = number[::-1]
    return found


def _roles(slices: Slices, unions: Unions, roles: Sequence[tuple[Ids, str]]) -> RoleOf:
    """The role of an axis at one of its positions: the first that was played there."""
    whole: dict[int, str] = {}
    parts: dict[int, str] = {}
    for ids, role in roles:
        number = unions.whole(ids)
        if number is not None:
            whole.setdefault(number, role)
            continue
        for each in ids.reshape(-1).tolist():
            parts.setdefault(each, role)

    def role_of(number: int, position: int) -> str:
        first = slices.axes[number].first
        if slices.axes[number].follows:
            return "scale"
        return parts.get(first + position) or whole.get(unions.at(first)) or "scale"

    return role_of


def _group(slices: Slices, members: Ids, role_of: RoleOf, inexact: str) -> ChannelGroup:
    width, per_unit = len(members), int(slices.size[members[0]])
    at = slices.first[members]  # (width,)
    axes = slices.axis[at[0] : at[0] + per_unit].tolist()  # (slices a unit,), ascending
    table = slices.position[at[:, None] + np.arange(per_unit)]  # (width, slices a unit)
    first = [place for place, axis in enumerate(axes) if not place or axis != axes[place - 1]]
    positions: dict[int, Ids] = {}
    for begin, end in zip(first, [*first[1:], per_unit], strict=True):
        positions |= dict.fromkeys(slices.followers[axes[begin]], table[:, begin:end])
    made = []
    for number in sorted(positions):
        axis, where = slices.axes[number], positions[number]
        made.append(Member(axis.name, axis.axis, role_of(number, int(where[0, 0])), where))
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


def frozen(partition: Partition) -> list[FrozenChannels]:
    """Frozen channels by reason, most channels first."""
    stay, slices, reasons = partition.stay, partition.slices, partition.reasons
    number = stay[slices.cls]
    number, axis = number[number >= 0], slices.axis[number >= 0]
    used = np.bincount(number, minlength=len(reasons)) > 0
    pair = (np.cumsum(used) - 1)[number] * len(slices.axes) + axis
    counts = np.bincount(pair)
    numbers = np.flatnonzero(used).tolist()
    found: dict[str, tuple[int, set[str]]] = {}
    for each in np.flatnonzero(counts).tolist():
        why = reasons[numbers[each // len(slices.axes)]]
        followers = slices.followers[each % len(slices.axes)]
        count, tensors = found.get(why, (0, set()))
        count += int(counts[each]) * len(followers)
        found[why] = (count, tensors | {slices.axes[leader].name for leader in followers})
    made = [FrozenChannels(tuple(sorted(t)), n, why) for why, (n, t) in found.items()]
    return sorted(made, key=lambda f: -f.channels)


def prunable(axes: Sequence[StateAxis], free: NDArray[np.bool_], shapes: Shapes) -> dict[str, int]:
    """Elements of each tensor that lie in a slice of some unit: what cutting every unit would remove.

    Args:
        axes: which ids are slices of which parameter axis.
        free: whether each id belongs to a unit, (ids,).
        shapes: of each tensor.
    """
    before = np.concatenate([[0], np.cumsum(free)])  # ids in units before each id
    stays = {name: float(math.prod(shape)) for name, shape in shapes.items()}
    first, size = (np.array(each, dtype=np.int64) for each in ([a.first for a in axes], [a.size for a in axes]))
    shares = (before[first + size] - before[first]) / size
    for axis, share in zip(axes, shares.tolist(), strict=True):
        stays[axis.name] *= 1.0 - share
    return {name: round(math.prod(shapes[name]) - left) for name, left in stays.items()}
