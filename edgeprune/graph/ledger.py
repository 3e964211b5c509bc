"""What the operators of a network demand of the ids.

Ids that are the same channel, ids that must stay, ids whose removal is not exact, and grids that must stay
rectangular.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from .labels import Label, Labels, Operand, Shape, as_tensor, compress, first_along
from .unions import FIXED, Ids, Unions


@dataclass
class Ledger:
    """Everything the operators demanded of the ids."""

    ids: Unions = field(default_factory=Unions)
    stay: list[tuple[Ids, Ids | None, str]] = field(default_factory=list)  # ids; or those whose partner is FIXED
    inexact: list[tuple[Ids, str]] = field(default_factory=list)
    grids: list[Ids] = field(default_factory=list)
    beside: list[tuple[Label, Ids]] = field(default_factory=list)  # narrow labels, and wide ids they stand beside
    heads: list[tuple[Label, Ids]] = field(default_factory=list)  # of those: scores of heads beside their values

    def unite(self, a: Ids, b: Ids, reason: str) -> None:
        """Positions of `a` and `b` (broadcast together) are the same channel; a FIXED partner freezes the other."""
        if a is b:
            return
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        if not self.ids.unite(a, b):
            self.stay.append((a, b, reason))

    def freeze(self, ids: Ids, reason: str) -> None:
        self.stay.append((ids, None, reason))

    def freeze_all(self, labels: Labels, reason: str) -> None:
        for label in labels:
            self.freeze(label.ids, reason)

    def mark_inexact(self, ids: Ids, reason: str) -> None:
        self.inexact.append((ids, reason))

    def uniform(self, label: Label, axes: Sequence[int], reason: str) -> Label | None:
        """`label` made alike along `axes`: ids that differ only there become one channel.

        A label that varies along nothing else would become one single channel: it is frozen, and None returned.
        """
        varying = [d for d in axes if d in label.axes]
        if not varying:
            return label
        if set(label.axes) <= set(varying):
            self.freeze(label.ids, reason)
            return None
        first = label.ids
        for axis in varying:
            first = first_along(first, axis)
        self.unite(label.ids, first, reason)
        return label.on(first)

    def uniform_all(self, labels: Labels, axes: Sequence[int], reason: str) -> Labels:
        made = (self.uniform(label, axes, reason) for label in labels)
        return tuple(label for label in made if label is not None)

    # -- merging operands ------------------------------------------------------------------------------------

    def merge(self, operands: Sequence[Operand], vanishes: Callable[[tuple[bool, ...]], bool], reason: str) -> Labels:
        """Labels of an element-wise result: operands' ids united position by position.

        Args:
            operands: labels and shape of each operand; shapes broadcast together.
            vanishes: given which operands are zero at a removed channel, is the result zero?
            reason: for channels that meet positions which always stay.
        """
        alone = [labels[0] for labels, _ in operands if len(labels) == 1 and not labels[0].copies]
        if alone and len(alone) == len(operands) and len({(len(x.ids.shape), x.axes) for x in alone}) == 1:
            return (Label(self._united(alone, reason), vanishes(tuple([label.vanishes for label in alone]))),)
        ndim = max([len(shape) for _, shape in operands], default=0)
        aligned = [
            (labels, shape) if len(shape) == ndim else (_align(labels, ndim), _pad_shape(shape, ndim))
            for labels, shape in operands
        ]
        result: list[Label] = []
        if any(label.copies for labels, _ in aligned for label in labels):
            aligned, result = self._settle_copies(aligned)
        for cluster in _clusters([labels for labels, _ in aligned]):
            merged = self._merge_cluster(cluster, aligned, reason)
            if merged is not None:
                zero = {owner: label.vanishes for owner, label in cluster}
                flags = tuple([zero.get(owner, False) for owner in range(len(aligned))])
                result.append(Label(merged, vanishes(flags)))
        return tuple(result)

    def _settle_copies(self, operands: list[Operand]) -> tuple[list[Operand], list[Label]]:
        """Take copies out of the operands: they follow what they stand beside, or pass when nothing is there."""
        passing: list[Label] = []
        for at, (labels, _) in enumerate(operands):
            for copy in (label for label in labels if label.copies):
                others = [other for i, other in enumerate(operands) if i != at]
                beside = [x for ls, _ in others for x in ls if set(x.axes) & set(copy.axes)]
                self.beside += [(copy, x.ids) for x in beside]
                real = any(shape[axis] > 1 for _, shape in others for axis in copy.axes)
                if not real:
                    passing.append(copy)
        return [(tuple(x for x in labels if not x.copies), shape) for labels, shape in operands], passing

    def _merge_cluster(self, cluster: list[tuple[int, Label]], operands: list[Operand], reason: str) -> Ids | None:
        owners = [owner for owner, _ in cluster]
        if len(set(owners)) < len(owners):
            for _, label in cluster:
                self.freeze(label.ids, reason)
            return None
        axes = sorted({axis for _, label in cluster for axis in label.axes})
        wide = [label for owner, label in cluster if not _narrow(label, axes, operands[owner][1])]
        narrow = [label for owner, label in cluster if wide and _narrow(label, axes, operands[owner][1])]
        merged = self._united(wide or [label for _, label in cluster], reason)
        self.beside += [(label, merged) for label in narrow]
        apart = [shape for owner, (_, shape) in enumerate(operands) if owner not in owners]
        fixed = [axis for axis in axes if any(shape[axis] > 1 for shape in apart)]
        if not fixed:
            return merged
        left = self.uniform(Label(merged, False), fixed, reason)
        return merged if left is None else left.ids

    def _united(self, labels: Sequence[Label], reason: str) -> Ids:
        """The ids of labels that are one, position by position."""
        merged = labels[0].ids
        for label in labels[1:]:
            if label.ids is not merged:
                self.unite(merged, label.ids, reason)
                whole = self.ids.whole(merged) is not None and merged.shape == label.ids.shape
                merged = merged if whole else self.ids.simpler(np.maximum(merged, label.ids), label.ids)
        return merged

    # -- running structure as it is --------------------------------------------------------------------------

    def through(self, labels: Labels, shape: Shape, run: Callable[[Tensor], Any], reason: str) -> list[Labels]:
        """Run a structural operator on each label of a tensor of `shape`; returns the labels of each output.

        A label that is left with one single id stands for a position that was picked by its number: frozen.
        """
        outputs: list[list[Label]] = []
        for label in labels:
            results = run(as_tensor(label.ids).expand(shape))
            results = [results] if isinstance(results, Tensor) else results
            outputs = outputs or [[] for _ in results]
            for out, labels_out in zip(results, outputs, strict=True):
                labels_out += self.moved(label, out.numpy(), reason)
        return [tuple(o) for o in outputs]

    def moved(self, label: Label, ids: Ids, reason: str) -> Labels:
        """A label whose positions moved to where `ids` are; frozen where one single id is left."""
        after = label.on(compress(ids))
        if not after.axes:
            self.freeze(after.ids, reason)
            return ()
        if len(after.axes) > len(label.axes):
            self.grids.append(after.ids)
        return (after,)

    # -- classes ---------------------------------------------------------------------------------------------

    def settle_grids(self) -> Ids:
        """Unite until every grid is rectangular; returns the classes.

        A channel axis that was split into a grid (heads x head width, groups x offset) must keep whole rows or
        whole columns. What the operators did not decide is cut at equal offsets: along the last axis.
        """
        classes = self._settle_rows(self.ids.classes())
        for grid in self.grids:
            varying = _varying(grid, classes)
            if len(varying) > 1:
                self.uniform(Label(grid, False), varying[:-1], "positions of a grid that cannot stay rectangular")
                classes = self.ids.classes()
        return self._settle_narrow(classes)

    def _settle_rows(self, classes: Ids) -> Ids:
        """Whole heads where scores stand beside values: queries and keys can then follow."""
        for narrow, wide in self.heads:
            rows = [d for d in narrow.axes if wide.shape[d] > 1]
            inside = [d for d in _varying(wide, classes) if d not in rows]
            if inside and rows and not narrow.copies and _varying(narrow.ids, classes):
                self.uniform(Label(wide, False), inside, "positions of a grid that cannot stay rectangular")
                classes = self.ids.classes()
        return classes

    def _settle_narrow(self, classes: Ids) -> Ids:
        """Narrow labels follow the wide ones they stand beside, where those are cut along their axes, or else stay."""
        for narrow, wide in self.beside:
            if set(_varying(wide, classes)) & set(narrow.axes):
                self.unite(narrow.ids, wide, "combined with positions that cannot be removed")
            elif not narrow.copies:
                self.freeze(narrow.ids, "varies inside heads or groups that are only cut whole")
        return self.ids.classes() if self.beside else classes


def marks(parts: Sequence[tuple[Ids, Ids | None]]) -> tuple[Ids, Ids]:
    """All ids of `parts`, or those whose partner is FIXED, shape (n,), and the number of the part each is in, (n,)."""
    if not parts:
        return np.arange(0), np.arange(0)
    a = np.concatenate([ids.reshape(-1) for ids, _ in parts])
    b = np.concatenate([np.full(ids.size, FIXED) if other is None else other.reshape(-1) for ids, other in parts])
    number = np.repeat(np.arange(len(parts)), [ids.size for ids, _ in parts])
    one = (a >= 0) ^ (b >= 0)
    return np.maximum(a, b)[one], number[one]


def _varying(ids: Ids, classes: Ids) -> list[int]:
    """The axes along which the classes of ids differ."""
    table = np.where(ids >= 0, classes[ids], FIXED)
    return [d for d in range(table.ndim) if (table != first_along(table, d)).any()]


def _narrow(label: Label, axes: Sequence[int], shape: Shape) -> bool:
    """Broadcast along some of these axes: it has one position there."""
    missing = [axis for axis in axes if axis not in label.axes]
    return bool(missing) and all(shape[axis] == 1 for axis in missing)


def _pad_shape(shape: Shape, ndim: int) -> Shape:
    return (1,) * (ndim - len(shape)) + shape


def _align(labels: Labels, ndim: int) -> Labels:
    return tuple([label.on(label.ids.reshape(_pad_shape(label.ids.shape, ndim))) for label in labels])


def _clusters(operands: Sequence[Labels]) -> list[list[tuple[int, Label]]]:
    """Labels of all operands, grouped by overlapping axes, each with the number of its operand."""
    clusters: list[tuple[set[int], list[tuple[int, Label]]]] = []
    for owner, labels in enumerate(operands):
        for label in labels:
            axes, members = set(label.axes), [(owner, label)]
            apart = []
            for other_axes, other in clusters:
                if axes & other_axes:
                    axes, members = axes | other_axes, other + members
                else:
                    apart.append((other_axes, other))
            clusters = [*apart, (axes, members)]
    return [members for _, members in clusters]
