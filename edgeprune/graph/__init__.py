"""Which channels must be removed together: run the network on channel identities.

    graph = trace(model, torch.randn(1, 3, 224, 224))

`record` runs the network once and writes down its operators; the rules run those on the ids of `labels`; `ledger` and
`unions` gather what must go together; `groups` turns that into channel groups; `layers` lists what a latency table has
to know.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import SurgeryError, TraceError
from ..records import Block, ChannelGroup, FrozenChannels, Keep, Layer, Width
from . import blocks as blocking
from . import groups as grouping
from . import layers as layering
from .labels import Labels
from .ledger import Ledger
from .record import Example, as_call, record
from .recording import Recording, Ref
from .rules import has_rule, run_labels
from .run import Run, StateAxis
from .unions import Ids

__all__ = ["Example", "ModelGraph", "Trace", "as_call", "trace"]

KERNEL = "positions of a convolution kernel"


@dataclass(frozen=True, eq=False)
class Trace:
    """The recording with the class of every position: what surgery needs besides the groups."""

    run: Run  # the recording, and the labels of its values
    axes: tuple[StateAxis, ...]
    classes: Ids  # class of each id, (ids,)
    units: dict[str, Ids]  # group -> class of each unit, (width,)
    partition: grouping.Partition

    @property
    def recording(self) -> Recording:
        return self.run.recording

    @property
    def labels(self) -> dict[int, Labels]:
        return self.run.labels

    @property
    def free(self) -> NDArray[np.bool_]:
        """Whether each id belongs to a unit of some group, (ids,)."""
        free = np.zeros(int(self.classes.max(initial=-1)) + 1, dtype=bool)
        for classes in self.units.values():
            free[classes] = True
        return free[self.classes]

    def kept(self, keep: Keep) -> NDArray[np.bool_]:
        """Whether each id stays under `keep`, (ids,)."""
        alive = np.ones(int(self.classes.max(initial=-1)) + 1, dtype=bool)
        for group, kept in keep.items():
            alive[self.units[group]] = False
            alive[self.units[group][np.fromiter(kept, np.int64, len(kept))]] = True
        return alive[self.classes]


@dataclass(frozen=True, eq=False)
class ModelGraph:
    """A network's channel groups, frozen channels and layers."""

    groups: tuple[ChannelGroup, ...]
    notes: tuple[str, ...]
    example: Example
    trace: Trace
    protected: tuple[str, ...]  # module paths (or parameter names) whose channels were asked to stay

    @cached_property
    def frozen(self) -> tuple[FrozenChannels, ...]:
        """What must stay, and why."""
        return tuple(f for f in grouping.frozen(self.trace.partition) if not f.reason.startswith(KERNEL))

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """What a latency table has to know, in the order it runs."""
        return tuple(layering.extract(self.trace.run, _widths(self.trace, self.groups)))

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Residual branches that can be dropped whole: none that holds something protected."""
        return tuple(blocking.find(self.trace.run, self.groups, self.layers, self.protected))

    @cached_property
    def fingerprint(self) -> str:
        """Of the structure: plans made for another network are refused."""
        return _fingerprint(self.groups, self.trace.recording.shapes)

    @property
    def total_params(self) -> int:
        return sum(self._sizes[name][0] for name in self.trace.recording.parameters)

    @property
    def prunable_params(self) -> int:
        return sum(self._sizes[name][1] for name in self.trace.recording.parameters)

    @property
    def total_weights(self) -> int:
        """Of the convolution and linear weights."""
        return sum(self._sizes[name][0] for name in self._weights)

    @property
    def prunable_weights(self) -> int:
        return sum(self._sizes[name][1] for name in self._weights)

    @cached_property
    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Elements of each tensor, and how many of them cutting every unit would remove."""
        shapes = self.trace.recording.shapes
        prunable = grouping.prunable(self.trace.axes, self.trace.free, shapes)
        return {name: (math.prod(shape), prunable[name]) for name, shape in shapes.items()}

    @property
    def _weights(self) -> set[str]:
        """Parameters of two axes or more that the forward pass uses."""
        shapes, parameters = self.trace.recording.shapes, set(self.trace.recording.parameters)
        return {axis.name for axis in self.trace.axes if axis.name in parameters and len(shapes[axis.name]) > 1}

    @cached_property
    def total_macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @cached_property
    def prunable_macs(self) -> int:
        """Of layers whose input or output can be cut."""
        return sum(x.macs for x in self.layers if x.in_width.terms or x.out_width.terms)

    @cached_property
    def _by_id(self) -> dict[str, ChannelGroup]:
        return {group.id: group for group in self.groups}

    def group(self, group_id: str) -> ChannelGroup:
        if group_id in self._by_id:
            return self._by_id[group_id]
        names = ", ".join(g.id for g in self.groups[:8])
        raise SurgeryError(f"no channel group is called {group_id!r}; this network has {names} ...")


def trace(model: nn.Module, example: Example, frozen: Sequence[str] = ()) -> ModelGraph:
    """Find the channel groups of a network.

    Args:
        model: any module; it is not changed.
        example: one input, batch first: a tensor, a tuple of arguments, or a dict of keywords.
        frozen: module paths (or parameter names) whose channels must stay.
    Raises:
        TraceError: the network failed on the example, or holds nothing with parameters.
    Source: after "run the network on channel identities", see README, "How channels are grouped".
    """
    recording = record(model, example, has_rule)
    run = Run(recording, Ledger(), [], {})
    run_labels(run)
    _keep_outputs(run)
    notes = _training_branches(model, example, run)
    for name in frozen:
        _freeze_module(run, name)
    if not run.state_axes:
        raise TraceError(f"{type(model).__name__} has no parameters that its forward pass uses: nothing to prune")
    return _assemble(example, run, notes, tuple(frozen))


def _keep_outputs(run: Run) -> None:
    """What leaves the network keeps its channels: classes, boxes, masks."""
    for ref in _leaves(run.recording.output):
        run.ledger.freeze_all(run.of(ref), "the network's output")


def _leaves(tree: object) -> list[Ref]:
    leaves = torch.utils._pytree.tree_flatten(tree)[0]
    return [leaf for leaf in leaves if isinstance(leaf, Ref)]


def _training_branches(model: nn.Module, example: Example, run: Run) -> list[str]:
    """Record the training-mode forward too when it uses parameters that evaluation does not (auxiliary heads)."""
    used = {a.name for a in run.state_axes}
    known = {name: run.recording.values[run.recording.state[name]] for name in run.recording.parameters}
    unused = [
        n for n, p in known.items() if n not in used and p.dtype.is_floating_point and max(p.shape, default=1) > 1
    ]
    if not unused:
        return []
    try:
        recording = record(model, _twice(example), has_rule, training=True)
    except TraceError as error:
        where = unused[0].rpartition(".")[0] or unused[0]
        return [f"{len(unused)} parameters ({where} ...) are not used in evaluation and stay as they are: {error}"]
    second = Run(recording, run.ledger, run.state_axes, run.state_labels)
    run_labels(second)
    _keep_outputs(second)
    run.roles += second.roles
    return [f"the training forward also uses {unused[0].rpartition('.')[0]} ...: it was traced as well"]


def _twice(example: Example) -> Example:
    """A batch of two: batch norm cannot be trained on one value a channel."""

    def double(item: object) -> object:
        return torch.cat([item, item]) if isinstance(item, Tensor) and item.dim() else item

    args, kwargs = as_call(example)
    return tuple(double(a) for a in args) if args else {k: double(v) for k, v in kwargs.items()}


def _freeze_module(run: Run, name: str) -> None:
    hits = [n for n in run.state_labels if blocking.lies_in(n, name)]
    if not hits:
        known = sorted({n.rpartition(".")[0] for n in run.state_labels})
        raise TraceError(f"--frozen {name}: no module of that name has parameters; there are {', '.join(known)}")
    for hit in hits:
        run.ledger.freeze_all(run.state_labels[hit], f"frozen by request ({name})")


# ---- putting it together -------------------------------------------------------------------------------------


def _assemble(example: Example, run: Run, notes: list[str], protected: tuple[str, ...]) -> ModelGraph:
    axes = tuple(run.state_axes)
    classes = run.ledger.settle_grids()
    found = grouping.build(run.ledger, axes, run.roles)
    units = dict(zip([group.id for group in found.groups], found.units, strict=True))
    return ModelGraph(found.groups, tuple(notes), example, Trace(run, axes, classes, units, found), protected)


def _widths(trace: Trace, groups: Sequence[ChannelGroup]) -> layering.WidthOf:
    classes = trace.classes
    owner = np.full(int(classes.max()) + 1, -1)  # class -> number of its group
    for number, group in enumerate(groups):
        owner[trace.units[group.id]] = number

    def width_of(ids: Ids) -> Width:
        owners = np.where(ids >= 0, owner[classes[ids]], -1)
        numbers, counts = np.unique(owners, return_counts=True)
        fixed = int(counts[numbers < 0].sum())
        terms = [(groups[n].id, int(c) // groups[n].width) for n, c in zip(numbers, counts, strict=True) if n >= 0]
        return Width(fixed, tuple(terms))

    return width_of


def _fingerprint(groups: Sequence[ChannelGroup], shapes: Mapping[str, tuple[int, ...]]) -> str:
    digest = hashlib.sha256()
    for name, shape in sorted(shapes.items()):
        digest.update(f"{name}{shape}".encode())
    for group in groups:
        digest.update(f"{group.id}:{group.width}".encode())
        for member in group.members:
            digest.update(f"{member.tensor}.{member.axis}".encode())
            digest.update(member.positions.tobytes())
    return digest.hexdigest()[:16]
