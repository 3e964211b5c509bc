"""Which ids are the same channel.

Most operators unite whole axes, position by position. Such unions are kept as pairs of *ranges*: the ids of one axis,
as they were handed out. What is left, parts of axes and axes in another order, is united id by id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

FIXED = -1
Ids = NDArray[np.int64]
Pair = tuple[Ids, Ids]


class Unions:
    """Hands out ids and gathers which of them are one; after the first look at the classes no more are handed out."""

    def __init__(self) -> None:
        self.count = 0  # ids handed out
        self._ranges: list[Ids] = []
        self._number: dict[int, int] = {}  # id() of a range's array -> its number
        self._at: dict[int, int] = {}  # first id -> number of its range
        self._parent: list[int] = []  # of each range, in a forest whose roots are the first of their kind
        self._links: list[Pair] = []  # parts of ranges that are one, not in `_classes` yet
        self._classes: Ids | None = None

    def fresh(self, size: int) -> Ids:
        """`size` new ids, shape (size,)."""
        assert self._classes is None
        ids = np.arange(self.count, self.count + size)
        number = len(self._ranges)
        self._ranges.append(ids)
        self._number[id(ids)] = self._at[self.count] = number
        self._parent.append(number)
        self.count += size
        return ids

    def whole(self, ids: Ids) -> int | None:
        """The number of the range whose ids these are, all of them and in order; None where it cannot be told."""
        base = ids.base
        number = self._number.get(id(ids if base is None else base))
        if base is None or number is None:
            return number
        if ids.size != self._ranges[number].size or not ids.flags.c_contiguous:
            return None
        return number

    def at(self, first: int) -> int:
        """The number of the range that begins at id `first`."""
        return self._at[first]

    def leader(self, number: int) -> int:
        """The first of the ranges that are one with this one, position by position."""
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def unite(self, a: Ids, b: Ids) -> bool:
        """Positions of `a` and `b`, of one shape, are the same channel. Were both whole ranges, which hold no FIXED?"""
        one, other = self.whole(a), self.whole(b)
        ranges = one is not None and other is not None
        if ranges and self._classes is None:
            one, other = self.leader(one), self.leader(other)  # type: ignore[arg-type]
            self._parent[max(one, other)] = min(one, other)
        else:
            self._links.append((a, b))
        return ranges

    def simpler(self, a: Ids, b: Ids) -> Ids:
        """Of united positions the ids `a`, or `b` where those are a whole range and `a` has nothing FIXED."""
        better = self.whole(a) is None and a.shape == b.shape and self.whole(b) is not None and (a >= 0).all()
        return b if better else a

    def classes(self) -> Ids:
        """The class of each id, shape (count,): ids of one class go together."""
        if self._classes is None:
            self._classes = self._by_ranges()
        if self._links:
            self._classes = _joined(self._classes, self._links)
            self._links = []
        return self._classes

    def _by_ranges(self) -> Ids:
        sizes = np.array([len(ids) for ids in self._ranges], dtype=np.int64)
        first = np.cumsum(sizes) - sizes
        roots = np.array([self.leader(number) for number in range(len(sizes))], dtype=np.int64)
        own = np.where(roots == np.arange(len(roots)), sizes, 0)
        named = np.cumsum(own) - own  # the class of a root's first id: the roots' ids are numbered one after the other
        classes: Ids = np.arange(self.count) + np.repeat(named[roots] - first, sizes)
        return classes


def _joined(classes: Ids, links: Sequence[Pair]) -> Ids:
    """Coarser classes: those of linked ids are one."""
    a = np.concatenate([x.reshape(-1) for x, _ in links])
    b = np.concatenate([y.reshape(-1) for _, y in links])
    both = (a >= 0) & (b >= 0)
    a, b = classes[a[both]], classes[b[both]]
    a, b = a[a != b], b[a != b]
    count = int(classes.max(initial=-1)) + 1
    touched = np.zeros(count, dtype=bool)
    touched[a] = touched[b] = True
    names = np.flatnonzero(touched)
    at = np.cumsum(touched) - 1
    graph = csr_matrix((np.ones(len(a)), (at[a], at[b])), shape=(len(names), len(names)))
    component = connected_components(graph, directed=False)[1]
    table = np.arange(count)
    table[names] = names[np.unique(component, return_index=True)[1]][component]  # the lowest class of each
    joined: Ids = table[classes]
    return joined
