"""The state of running a recording on labels: what each rule reads and writes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch._ops import OpOverload

from .labels import Label, Labels, Shape, on_axis
from .ledger import Ledger
from .recording import Op, Recording, Ref, Value
from .unions import FIXED, Ids


class StateAxis(NamedTuple):
    """The ids `first <= id < first + size` are the slices of one axis of a parameter or buffer."""

    name: str
    axis: int
    first: int
    size: int
    follows: bool  # the ids were handed out to another axis, which it scales or is added to


@dataclass
class Run:
    """One recording on its way through the rules."""

    recording: Recording
    ledger: Ledger
    state_axes: list[StateAxis]  # shared between the recordings of one network
    state_labels: dict[str, Labels]  # likewise: a parameter has the same ids in each
    roles: list[tuple[Ids, str]] = field(default_factory=list)  # ids that a layer makes or reads
    labels: dict[int, Labels] = field(default_factory=dict)  # by value number
    zeros: dict[Any, bool] = field(default_factory=dict)  # operator, operands that are zero -> is its result?
    module: str = ""  # where the current operator runs

    def value(self, ref: Ref) -> Value:
        return self.recording.values[ref.value]

    def shape(self, ref: Ref) -> Shape:
        return self.value(ref).shape

    def of(self, ref: Any) -> Labels:
        """The labels of an operand; parameters and floating-point buffers get theirs when first read."""
        if not isinstance(ref, Ref):
            return ()
        known = self.labels.get(ref.value)
        if known is None:
            value = self.value(ref)
            floats = value.source == "state" and value.dtype.is_floating_point
            known = self.labels[ref.value] = self._of_state(value) if floats else ()
        return known

    def _of_state(self, value: Value) -> Labels:
        if value.name not in self.state_labels:
            made = []
            for axis, size in enumerate(value.shape):
                if size > 1:
                    self.state_axes.append(StateAxis(value.name, axis, self.ledger.ids.count, size, False))
                    ids = self.ledger.ids.fresh(size)
                    made.append(Label(on_axis(ids, axis, len(value.shape)), True))
            self.state_labels[value.name] = tuple(made)
        return self.state_labels[value.name]

    def follow(self, ref: Ref, channel: Ids) -> bool:
        """Give one number a channel, of a parameter that nothing has read yet, the ids of those channels.

        Only where the channels are a whole range: what is to be one anyway need not be united. Says whether it was.
        """
        value = self.recording.values[ref.value]
        unread = value.source == "state" and value.name not in self.state_labels and value.dtype.is_floating_point
        if not unread or channel.size < 2 or value.shape != channel.shape or self.ledger.ids.whole(channel) is None:
            return False
        self.state_axes.append(StateAxis(value.name, 0, channel.item(0), channel.size, True))
        self.state_labels[value.name] = (Label(channel, True),)
        return True

    def why(self, text: str) -> str:
        return f"{text} (in {self.module})" if self.module else text

    def play(self, ids: Ids, role: str) -> None:
        """Remember that a layer makes ("out") or reads ("in") these channels."""
        self.roles.append((ids, role))


def arguments(op: Op) -> dict[str, Any]:
    """The operator's arguments by the names of its schema, defaults filled in."""
    names, defaults = signature(op.func)
    return {**defaults, **dict(zip(names, op.args, strict=False)), **op.kwargs}


@functools.cache
def signature(func: OpOverload[..., Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of an operator's arguments, in order, and the default of each (None where it has none)."""
    specs = func._schema.arguments
    return tuple(s.name for s in specs), {s.name: s.default_value if s.has_default_value() else None for s in specs}


def ids_along(label: Label | None, axis: int, size: int) -> Ids:
    """The ids of a label that varies along `axis` alone, shape (size,); FIXED without one."""
    if label is None:
        return np.full(size, FIXED)
    return label.ids.reshape(-1) if label.axes == (axis,) else np.moveaxis(label.ids, axis, 0).reshape(-1)


def channel_ids(run: Run, labels: Labels, axis: int, size: int, reason: str) -> tuple[Ids, Labels]:
    """Split labels into the ids along a channel axis, shape (size,), and the labels along other axes."""
    if len(labels) == 1 and labels[0].axes == (axis,):
        ids = labels[0].ids
        return ids if ids.ndim == 1 else ids.reshape(-1), ()
    label, rest = single_along(run, labels, axis, reason)
    if label is not None and len(label.axes) > 1:
        label = run.ledger.uniform(label, [d for d in label.axes if d != axis], reason)
    return ids_along(label, axis, size), rest


def single_along(run: Run, labels: Labels, axis: int, reason: str) -> tuple[Label | None, Labels]:
    """The label that varies along an axis, and the labels that do not; further ones along it are frozen."""
    varying = [label for label in labels if axis in label.axes]
    for label in varying[1:]:
        run.ledger.freeze(label.ids, reason)
    rest = tuple([label for label in labels if axis not in label.axes])
    return (varying[0] if varying else None), rest


def as_axis(run: Run, ids: Ids, axis: int, ndim: int, vanishes: bool) -> Labels:
    """Labels that carry `ids` along one axis of a tensor with `ndim` axes; none where nothing can be cut."""
    if ids.size < 2 or (run.ledger.ids.whole(ids) is None and (ids < 0).all()):
        return ()
    return (Label(on_axis(ids, axis, ndim), vanishes),)


def dims_of(dims: Any, ndim: int) -> list[int]:
    """Dimension arguments (one, several, or None for all) as non-negative numbers."""
    if dims is None or (isinstance(dims, Sequence) and not len(dims)):
        return list(range(ndim))
    numbers = [dims] if isinstance(dims, int) else list(dims)
    return [d % ndim if ndim else 0 for d in numbers]
