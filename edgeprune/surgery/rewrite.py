"""What a cut makes of every recorded operator: the shapes to expect, and its arguments with sizes recomputed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..graph import ModelGraph
from ..graph.recording import Op, Recording
from ..graph.rules import name_of
from ..graph.run import StateAxis, arguments, signature
from ..records import Keep

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
NUMBERS = frozenset([bool, int, float, str])
SEQUENCES = frozenset([tuple, list])
SELECTING = (
    "index", "masked_select", "nonzero", "nonzero_numpy", "unique_dim", "unique_consecutive", "_unique", "_unique2",
    "nms",
)  # fmt: skip
COMPARED = NUMBERS | SEQUENCES | {dict}


class Rewriter:
    """One cut of one network, seen from its recording."""

    def __init__(self, graph: ModelGraph, keep: Keep) -> None:
        self.recording = graph.trace.recording
        self._labels = graph.trace.labels
        self._unions = graph.trace.run.ledger.ids
        self._alive = graph.trace.kept(keep)
        self._before = np.concatenate([[0], np.cumsum(self._alive)])  # how many ids before each one stay
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._changes: dict[int, Arguments | None] = {}  # by the operator's id()
        self.positions: dict[tuple[str, int], Tensor] = {}  # (tensor, axis) -> indices kept, where some are not
        kept_of: dict[int, Tensor] = {}  # by the first of the ranges that are one
        for axis in _losing(graph.trace.axes, self._before):
            leader = self._unions.leader(self._unions.at(axis.first))
            if leader not in kept_of:
                alive = self._alive[axis.first : axis.first + axis.size]
                kept_of[leader] = torch.from_numpy(np.flatnonzero(alive))
            self.positions[axis.name, axis.axis] = kept_of[leader]

    # -- shapes ----------------------------------------------------------------------------------------------

    def _count(self, first: int, size: int) -> int:
        """How many of the ids `first <= id < first + size` stay."""
        return int(self._before[first + size] - self._before[first])

    def kept_along(self, value: int, axis: int) -> NDArray[np.bool_]:
        """Which positions of a value stay along one axis, (size,)."""
        kept = np.ones(self.recording.values[value].shape[axis], dtype=bool)
        for label in self._labels.get(value, ()):
            if axis in label.axes:
                ids = label.ids
                alive = np.where(ids >= 0, self._alive[ids], True)
                kept &= alive.any(axis=tuple(d for d in range(alive.ndim) if d != axis))
        return kept

    def shape(self, value: int) -> tuple[int, ...]:
        """The shape that a value has in the cut network."""
        known = self._shapes.get(value)
        if known is None:
            known = self._shapes[value] = self._shape(value)
        return known

    def _shape(self, value: int) -> tuple[int, ...]:
        dense, labels = self.recording.values[value].shape, self._labels.get(value, ())
        if not labels:
            return dense
        new = list(dense)
        varying = [axis for label in labels for axis in label.axes]
        for label in labels:
            for axis in label.axes:
                if varying.count(axis) == len(label.axes) == 1 and self._unions.whole(label.ids) is not None:
                    new[axis] = self._count(label.ids.item(0), dense[axis])
                else:
                    new[axis] = int(self.kept_along(value, axis).sum())
        return tuple(new)

    # -- arguments -------------------------------------------------------------------------------------------

    def changed(self, op: Op) -> Arguments | None:
        """The operator's new arguments, or None where the old ones still hold."""
        if id(op) not in self._changes:
            rewrite = REWRITES.get(name_of(op.func))
            new = rewrite(self, op, arguments(op)) if rewrite is not None else None
            self._changes[id(op)] = None if new == (op.args, op.kwargs) else new
        return self._changes[id(op)]

    def channel_map(self, op: Op) -> tuple[int, list[int], int, list[int]] | None:
        """For a padding of channels that a cut reaches: (axis, source of each channel or -1, size, other padding)."""
        if name_of(op.func) not in ("pad", "constant_pad_nd"):
            return None
        x, out, amounts = op.args[0].value, op.outputs[0], list(arguments(op)["pad"])
        ndim = len(self.recording.values[x].shape)
        for axis in range(ndim):
            at = 2 * (ndim - 1 - axis)
            if at + 1 >= len(amounts) or not (amounts[at] or amounts[at + 1]):
                continue
            have, want = self.kept_along(x, axis), self.kept_along(out, axis)
            if have.all() and want.all():
                continue
            number = np.where(have, np.cumsum(have) - 1, -1)
            source = np.full(len(want), -1)
            source[amounts[at] : amounts[at] + len(have)] = number
            rest = [n if i not in (at, at + 1) else 0 for i, n in enumerate(amounts)]
            return axis, source[want].tolist(), int(have.sum()), rest
        return None


def _losing(axes: Sequence[StateAxis], before: NDArray[np.int64]) -> list[StateAxis]:
    """The axes of which some slices go, by how many ids before each one stay."""
    first, size = np.array([(axis.first, axis.size) for axis in axes]).T
    loses = before[first + size] - before[first] < size
    return [axis for axis, some in zip(axes, loses.tolist(), strict=True) if some]


def selects(recording: Recording, op: Op) -> bool:
    """Does the data decide how many values come out?"""
    name, values = name_of(op.func), [recording.values[ref.value] for ref in op.refs]
    if name == "index":  # by a mask
        values = [value for value in values[1:] if value.dtype in (torch.bool, torch.uint8)]
    return name in SELECTING and any(value.from_input for value in values)


def alike(given: Any, expected: Any) -> bool:
    """Do two trees of arguments hold the same numbers and words, at the same places?"""
    have, want = type(given), type(expected)
    if have not in COMPARED and want not in COMPARED:  # tensors, devices, types
        return True
    if have in NUMBERS and want in NUMBERS:
        return bool(given == expected)
    if have in SEQUENCES and want in SEQUENCES:
        return len(given) == len(expected) and all(map(alike, given, expected))
    if have is dict and want is dict:
        return given.keys() == expected.keys() and all(alike(given[key], expected[key]) for key in expected)
    return False


def numbers_in(tree: Any) -> list[Any]:
    """All numbers and words among an operator's arguments, in order."""
    if isinstance(tree, (bool, int, float, str)):
        return [tree]
    if isinstance(tree, dict):
        return [number for key in sorted(tree) for number in numbers_in(tree[key])]
    if isinstance(tree, (list, tuple)):
        return [number for item in tree for number in numbers_in(item)]
    return []


def _set(op: Op, **values: Any) -> Arguments:
    """The operator's arguments with some replaced, where they stand."""
    names, _ = signature(op.func)
    args, kwargs = list(op.args), dict(op.kwargs)
    for name, value in values.items():
        at = names.index(name)
        if at < len(args):
            args[at] = value
        else:
            kwargs[name] = value
    return tuple(args), kwargs


def _sizes(old: list[int], new: tuple[int, ...]) -> list[int]:
    return [o if o == -1 else n for o, n in zip(old, new, strict=True)]


def _view(cut: Rewriter, op: Op, a: dict[str, Any]) -> Arguments:
    name = "size" if "size" in a else "shape"
    return _set(op, **{name: _sizes(list(a[name]), cut.shape(op.outputs[0]))})


def _unflatten(cut: Rewriter, op: Op, a: dict[str, Any]) -> Arguments:
    new = cut.shape(op.outputs[0])
    dim = a["dim"] % (len(new) - len(a["sizes"]) + 1)
    return _set(op, sizes=_sizes(list(a["sizes"]), new[dim : dim + len(a["sizes"])]))


def _repeat(cut: Rewriter, op: Op, a: dict[str, Any]) -> Arguments:
    new, x = cut.shape(op.outputs[0]), cut.shape(op.args[0].value)
    x = (1,) * (len(new) - len(x)) + x
    return _set(op, repeats=[n // o for n, o in zip(new, x, strict=True)])


def _axis(cut: Rewriter, op: Op, a: dict[str, Any]) -> tuple[int, NDArray[np.bool_]]:
    value = op.args[0].value
    axis = a["dim"] % len(cut.recording.values[value].shape)
    return axis, cut.kept_along(value, axis)


def _slice(cut: Rewriter, op: Op, a: dict[str, Any]) -> Arguments:
    axis, kept = _axis(cut, op, a)
    if kept.all() or a["step"] != 1:
        return op.args, op.kwargs
    start, size = a["start"] or 0, len(kept)
    start = min(max(start + size if start < 0 else start, 0), size)
    begin = int(kept[:start].sum())
    return _set(op, start=begin, end=begin + cut.shape(op.outputs[0])[axis])


def _narrow(cut: Rewriter, op: Op, a: dict[str, Any]) -> Arguments:
    axis, kept = _axis(cut, op, a)
    return _set(op, start=int(kept[: a["start"]].sum()), length=cut.shape(op.outputs[0])[axis])


def _select(cut: Rewriter, op: Op, a: dict[str, Any]) -> Arguments:
    _, kept = _axis(cut, op, a)
    index = a["index"] % len(kept)
    new = int(kept[:index].sum())
    return (op.args, op.kwargs) if new == index else _set(op, index=new)


def _split(cut: Rewriter, op: Op, a: dict[str, Any]) -> Arguments:
    """The sizes of the pieces that are left: arguments of split_with_sizes."""
    axis, kept = _axis(cut, op, a)
    if kept.all():
        return op.args, op.kwargs
    return (op.args[0], [cut.shape(number)[axis] for number in op.outputs], axis), {}


def _conv(cut: Rewriter, op: Op, a: dict[str, Any]) -> Arguments:
    if a["groups"] == 1:
        return op.args, op.kwargs
    x, weight = a["input"].value, a["weight"].value
    axis = len(cut.recording.values[x].shape) - len(cut.recording.values[weight].shape) + 1
    transposed = bool(a.get("transposed")) or "transpose" in op.func._schema.name
    channels = cut.shape(op.outputs[0] if transposed else x)[axis]
    return _set(op, groups=channels // cut.shape(weight)[1])


def _group_norm(cut: Rewriter, op: Op, a: dict[str, Any]) -> Arguments:
    x, groups = a["input"].value, a["num_groups"]
    if groups == 1:
        return op.args, op.kwargs
    return _set(op, num_groups=cut.shape(x)[1] // (cut.recording.values[x].shape[1] // groups))


def _layer_norm(cut: Rewriter, op: Op, a: dict[str, Any]) -> Arguments:
    return _set(op, normalized_shape=list(cut.shape(op.outputs[0])[-len(a["normalized_shape"]) :]))


def _new(cut: Rewriter, op: Op, a: dict[str, Any]) -> Arguments:
    return _set(op, size=list(cut.shape(op.outputs[0])))


def _pad(cut: Rewriter, op: Op, a: dict[str, Any]) -> Arguments:
    """Padded channels that a cut reaches are fetched by number: no arguments of `pad` say that."""
    return (op.args, op.kwargs) if cut.channel_map(op) is None else ((), {})


Rewrite = Callable[[Rewriter, Op, dict[str, Any]], Arguments]
REWRITES: dict[str, Rewrite] = {
    **dict.fromkeys(["view", "_unsafe_view", "reshape"], _view),
    "unflatten": _unflatten,
    "expand": _view,
    "repeat": _repeat,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split"], _split),
    **dict.fromkeys(["conv1d", "conv2d", "conv3d", "convolution"], _conv),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], _conv),
    "group_norm": _group_norm,
    **dict.fromkeys(["layer_norm", "rms_norm"], _layer_norm),
    **dict.fromkeys(["zeros", "new_zeros"], _new),
    **dict.fromkeys(["pad", "constant_pad_nd"], _pad),
}
