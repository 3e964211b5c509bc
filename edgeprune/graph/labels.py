"""Channel identities: which parameter slice each position of a tensor stands or falls with.

A `Label` of labels is an int64 array that broadcasts to its tensor's shape: size 1 along axes whose positions are
alike, an id for each position along axes that carry channels. `FIXED` marks positions that always stay. A tensor has
several labels when its positions depend on several channels at once (a weight on its outputs and its inputs); a
position is removed when any of its ids is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .unions import Ids

Shape = tuple[int, ...]


def any_zero(flags: tuple[bool, ...]) -> bool:
    """A product is zero where any factor is."""
    return any(flags)


@dataclass(slots=True, eq=False)  # not frozen: that takes three times as long to make, and there are thousands
class Label:
    """Ids for the positions of one tensor; never changed."""

    ids: Ids  # ndim of the tensor, size 1 along axes whose positions are alike
    vanishes: bool  # with a channel's parameters at zero, its positions are exactly zero
    copies: bool = False  # `expand` made the positions: there may be as few as the partner needs
    axes: tuple[int, ...] = field(init=False)  # along which ids differ

    def on(self, ids: Ids) -> Label:
        """The same label after its positions moved."""
        return Label(ids, self.vanishes, self.copies)

    def __post_init__(self) -> None:
        self.axes = tuple([d for d, n in enumerate(self.ids.shape) if n > 1])


Labels = tuple[Label, ...]
Operand = tuple[Labels, Shape]


def along(labels: Labels, axis: int) -> Label | None:
    """The label that varies along `axis`, if any."""
    return next((label for label in labels if axis in label.axes), None)


def compress(full: Ids) -> Ids:
    """Narrow axes whose positions are alike to size 1: first those with stride 0, then by comparing."""
    for axis, size in enumerate(full.shape):
        if size > 1 and full.strides[axis] == 0:
            full = first_along(full, axis)
    for axis, size in enumerate(full.shape):
        if size > 1:
            first = first_along(full, axis)
            second = full[(slice(None),) * axis + (slice(1, 2),)]
            if (first == second).all() and (first == full).all():
                full = first
    return full


def first_along(ids: Ids, axis: int) -> Ids:
    """The first position along an axis, which stays with size 1."""
    return ids[(slice(None),) * axis + (slice(0, 1),)]


def as_tensor(ids: Ids) -> Tensor:
    """The same memory, where it may be written."""
    return torch.from_numpy(ids if ids.flags.writeable else ids.copy())


def on_axis(ids: Ids, axis: int, ndim: int) -> Ids:
    """`ids`, shape (n,), along one of `ndim` axes; the others have size 1."""
    return ids.reshape((1,) * axis + (-1,) + (1,) * (ndim - 1 - axis)) if ndim > 1 else ids
