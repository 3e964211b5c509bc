"""Operators that move positions without computing: run as they are on the ids.

Flattening repeats each id, a concat concatenates, a shuffle permutes: no rule is needed for what an operator means,
only for the few whose arguments count channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .labels import Label, Labels, Shape, as_tensor, compress, on_axis
from .recording import Op, Ref
from .run import Run, arguments, dims_of
from .unions import FIXED, Ids

PICKED = "positions picked by their number"


def as_is(run: Run, op: Op) -> list[Labels]:
    """Permutations, slices, splits: the operator itself, on ids."""
    x = op.args[0]
    rest, kwargs = _plain(run, op.args[1:]), _plain(run, op.kwargs)
    reason = run.why(PICKED)
    labels = run.of(x)
    if op.func._schema.name in ("aten::select", "aten::unbind"):
        labels = _whole_along(run, labels, _dim(op), reason)
    if op.func._schema.name == "aten::slice" and arguments(op)["step"] != 1:  # every other channel, by its number
        labels = run.ledger.uniform_all(labels, [_dim(op) % len(run.shape(x))], reason)
    results = run.ledger.through(labels, run.shape(x), lambda full: op.func(full, *rest, **kwargs), reason)
    return [_without_merged_copies(made) for made in results] or [() for _ in op.outputs]


def view(run: Run, op: Op) -> list[Labels]:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: the same positions in the same order."""
    before, after = run.shape(op.args[0]), run.recording.values[op.outputs[0]].shape
    if math.prod(before) != math.prod(after):
        run.ledger.freeze_all(run.of(op.args[0]), run.why("numbers seen as several of another type"))
        return [()]
    made: list[Label] = []
    for label in run.of(op.args[0]):
        made += run.ledger.moved(label, reshaped(label.ids, before, after), run.why(PICKED))
    return [_without_merged_copies(tuple(made))]


def reshaped(ids: Ids, before: Shape, after: Shape) -> Ids:
    """Ids of a tensor of shape `before` when it is seen with shape `after`, narrow where they were.

    Runs of axes that are merged or split among themselves are told apart: those along which ids are alike stay narrow.
    """
    wide: list[int] = []  # what the ids are expanded to
    seen: list[int] = []  # what they are seen as then
    for old, new in _runs(before, after):
        varies = any(ids.shape[axis] > 1 for axis in old)
        wide += [before[axis] if varies else 1 for axis in old]
        seen += [after[axis] if varies else 1 for axis in new]
    return (ids if ids.shape == tuple(wide) else np.broadcast_to(ids, wide)).reshape(seen)


def _runs(before: Shape, after: Shape) -> list[tuple[range, range]]:
    """The shortest runs of axes of both shapes that hold the same number of positions."""
    runs = []
    i = j = 0
    while i < len(before) or j < len(after):
        first_i, first_j, have, want = i, j, 1, 1
        while (i == first_i and j == first_j) or have != want:
            if i < len(before) and (have <= want or j == len(after)):
                have, i = have * before[i], i + 1
            else:
                want, j = want * after[j], j + 1
        runs.append((range(first_i, i), range(first_j, j)))
    return runs


def _without_merged_copies(labels: Labels) -> Labels:
    """Copies that were folded into an axis with channels of its own go with those."""
    taken = {axis for label in labels if not label.copies for axis in label.axes}
    return tuple(label for label in labels if not (label.copies and taken & set(label.axes)))


def _dim(op: Op) -> int:
    return int(arguments(op).get("dim") or 0)


def _whole_along(run: Run, labels: Labels, dim: int, reason: str) -> Labels:
    """An axis that is taken apart by number stays whole; labels that vary along it alone are frozen by `through`."""
    made = []
    for label in labels:
        axis = dim % label.ids.ndim
        several = axis in label.axes and len(label.axes) > 1
        kept = run.ledger.uniform(label, [axis], reason) if several else label
        if kept is not None:
            made.append(kept)
    return tuple(made)


def _plain(run: Run, tree: Any) -> Any:
    """Arguments with tensor operands replaced by their constants (index tensors)."""
    if isinstance(tree, Ref):
        constant = run.value(tree).constant
        return constant if constant is not None else torch.zeros(run.shape(tree), dtype=torch.int64)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_plain(run, item) for item in tree)
    if isinstance(tree, dict):
        return {key: _plain(run, item) for key, item in tree.items()}
    return tree


def same(run: Run, op: Op) -> list[Labels]:
    """clone, contiguous, to, dropout ...: the positions are the operand's."""
    return [run.of(op.args[0]) for _ in op.outputs]


def expand(run: Run, op: Op) -> list[Labels]:
    """expand and repeat: copies made along an axis of size 1 can be fewer, so each gets an id of its own."""
    x, out = run.shape(op.args[0]), run.recording.values[op.outputs[0]].shape
    labels = as_is(run, op)[0]
    lead = len(out) - len(x)
    grown = [d for d, size in enumerate(out) if size > 1 and (d < lead or x[d - lead] == 1)]
    fresh = []
    for axis in grown:
        fresh.append(Label(on_axis(run.ledger.ids.fresh(out[axis]), axis, len(out)), False, copies=True))
    return [(*labels, *fresh)]


def concat(run: Run, op: Op) -> list[Labels]:
    """Along the axis, ids follow each other; along the others, the operands must agree."""
    parts: Sequence[Ref] = op.args[0]
    parts = [ref for ref in parts if run.shape(ref) != (0,)]
    ndim = len(run.shape(parts[0]))
    axis = int(arguments(op).get("dim") or 0) % ndim
    across = [(tuple(b for b in run.of(ref) if axis not in b.axes), _thin(run.shape(ref), axis)) for ref in parts]
    others = run.ledger.merge(across, all, run.why("concatenated with positions that stay"))
    return [(*others, *_joined(run, parts, axis, ndim))]


def _thin(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], 1, *shape[axis + 1 :])


def _joined(run: Run, parts: Sequence[Ref], axis: int, ndim: int) -> Labels:
    """The label along the concatenated axis: each operand's ids, FIXED (or fresh for zeros) where it has none."""
    pieces: list[Ids] = []
    vanishes, any_ids = True, False
    for ref in parts:
        size = run.shape(ref)[axis]
        varying = [b for b in run.of(ref) if axis in b.axes]
        if len(varying) == 1:
            any_ids, vanishes = True, vanishes and varying[0].vanishes
            pieces.append(varying[0].ids)
            continue
        for label in varying:
            run.ledger.freeze(label.ids, run.why("several channels along one axis"))
        if _is_zero(run, ref):  # there may be fewer zeros
            ids = on_axis(run.ledger.ids.fresh(size), axis, ndim)
            run.labels[ref.value] = (*run.of(ref), Label(ids, True))
        else:
            ids = on_axis(np.full(size, FIXED), axis, ndim)
        pieces.append(ids)
    if not any_ids:
        return ()
    full = [max([p.shape[d] for p in pieces]) for d in range(ndim)]
    wide = [np.broadcast_to(p, (*full[:axis], p.shape[axis], *full[axis + 1 :])) for p in pieces]
    ids = compress(np.concatenate(wide, axis))
    return (Label(ids, vanishes),)


def _is_zero(run: Run, ref: Ref) -> bool:
    """A tensor that `zeros` made: its positions can be fewer."""
    made_by = next((op for op in reversed(run.recording.ops) if ref.value in op.outputs), None)
    return made_by is not None and made_by.func._schema.name in (
        "aten::zeros", "aten::new_zeros", "aten::zeros_like",
    )  # fmt: skip


def stack(run: Run, op: Op) -> list[Labels]:
    """Operands side by side along a new axis: along all others they must agree."""
    parts: Sequence[Ref] = op.args[0]
    operands = [(run.of(ref), run.shape(ref)) for ref in parts]
    merged = run.ledger.merge(operands, all, run.why("stacked with positions that stay"))
    ndim = len(operands[0][1]) + 1
    axis = int(arguments(op).get("dim") or 0) % ndim
    return [tuple(label.on(np.expand_dims(label.ids, axis)) for label in merged)]


def pad(run: Run, op: Op) -> list[Labels]:
    """Zeros around an axis. Along channels they get ids of their own.

    Where a removed channel is exactly zero, the padded tensor needs nothing of its source: all its positions get
    fresh ids, and surgery fetches what the source still has and puts zeros elsewhere (option-A shortcuts).
    """
    a = arguments(op)
    x = a.get("self") or a["input"]
    shape, amounts = run.shape(x), list(a["pad"])
    padded = sorted({len(shape) - 1 - i // 2 for i, n in enumerate(amounts) if n})
    zero = a.get("mode", "constant") == "constant" and not a.get("value")
    made: list[Label] = []
    for label in run.of(x):
        inside = [d for d in padded if d in label.axes]
        if not inside:
            made.append(label)
        elif zero and label.axes == tuple(inside) and len(inside) == 1:
            made.append(_padded_channels(run, label, inside[0], amounts))
        else:
            run.ledger.freeze(label.ids, run.why("padded with something else than zeros"))
    return [tuple(made)]


def _padded_channels(run: Run, label: Label, axis: int, amounts: list[int]) -> Label:
    ndim = label.ids.ndim
    at = 2 * (ndim - 1 - axis)
    before, after = amounts[at], amounts[at + 1]
    size = label.ids.shape[axis] + before + after
    fresh = run.ledger.ids.fresh(size)
    if not label.vanishes:
        kept = on_axis(fresh[before : size - after], axis, ndim)
        run.ledger.unite(kept, label.ids, run.why("padded channels that are not zero"))
    return Label(on_axis(fresh, axis, ndim), True)


def roll(run: Run, op: Op) -> list[Labels]:
    """roll and flip: a move along axes that carry no channels; along channels their numbers matter."""
    dims = dims_of(arguments(op)["dims"], len(run.shape(op.args[0])))
    return [run.ledger.uniform_all(run.of(op.args[0]), dims, run.why(PICKED))]


def index(run: Run, op: Op) -> list[Labels]:
    """Indexing by tensors: channels along an indexed axis are frozen, the others move as they are."""
    x, indices = op.args[0], list(op.args[1])
    shape = run.shape(x)
    indexed = _indexed_axes(run, indices)
    labels = run.ledger.uniform_all(run.of(x), indexed, run.why("indexed by a tensor"))
    out = run.recording.values[op.outputs[0]].shape
    if any(ref is not None and run.value(ref).dtype == torch.bool for ref in indices):
        run.ledger.freeze_all(labels, run.why("selected by a mask"))
        return [()]
    zeros = [None if ref is None else torch.zeros(run.shape(ref), dtype=torch.int64) for ref in indices]
    made = []
    for label in labels:
        small = [shape[d] if d in indexed else label.ids.shape[d] for d in range(len(shape))]
        found = op.func(as_tensor(label.ids).expand(small), zeros).numpy()
        made.append(label.on(compress(found)))
        assert found.ndim == len(out)
    return [tuple(made)]


def _indexed_axes(run: Run, indices: list[Ref | None]) -> list[int]:
    axes: list[int] = []
    at = 0
    for ref in indices:
        if ref is None:
            at += 1
            continue
        width = len(run.shape(ref)) if run.value(ref).dtype == torch.bool else 1
        axes += range(at, at + width)
        at += width
    return axes


def index_select(run: Run, op: Op) -> list[Labels]:
    a = arguments(op)
    dims = dims_of(a["dim"], len(run.shape(op.args[0])))
    return [run.ledger.uniform_all(run.of(op.args[0]), dims, run.why("indexed by a tensor"))]


def spatial(run: Run, op: Op) -> list[Labels]:
    """Pooling, interpolation, grid sampling: windows slide over the last axes, channels pass."""
    x = op.args[0]
    name = op.func._schema.name
    moving = 1 if "1d" in name else 3 if "3d" in name or "trilinear" in name else 2
    ndim = len(run.shape(x))
    labels = run.ledger.uniform_all(run.of(x), range(ndim - moving, ndim), run.why("a window slides here"))
    return [labels for _ in op.outputs]


def pixel_shuffle(run: Run, op: Op) -> list[Labels]:
    """(C r r, H, W) <-> (C, H r, W r): each channel on the side with fewer is one unit."""
    x = op.args[0]
    shape = run.shape(x)
    ndim = len(shape)
    labels = run.ledger.uniform_all(run.of(x), [ndim - 2, ndim - 1], run.why("a window slides here"))
    factor = int(op.args[1])
    small = (*shape[:-2], factor, factor)  # enough to see every position
    results = run.ledger.through(labels, small, lambda full: op.func(full, factor), run.why(PICKED))
    last = [ndim - 2, ndim - 1]
    return [run.ledger.uniform_all(results[0], last, run.why(PICKED)) if results else ()]


def windows(run: Run, op: Op) -> list[Labels]:
    """Tensor.unfold: windows along one axis, their positions on a new last axis."""
    a = arguments(op)
    x = a["self"]
    dim = a["dimension"] % len(run.shape(x))
    labels = run.ledger.uniform_all(run.of(x), [dim], run.why("a window slides here"))
    return [tuple(label.on(label.ids[..., None]) for label in labels)]


def unfold_patches(run: Run, op: Op) -> list[Labels]:
    """im2col: (N, C, H, W) -> (N, C * kernel, positions)."""
    a = arguments(op)
    x = a["self"]
    labels = run.ledger.uniform_all(run.of(x), [2, 3], run.why("a window slides here"))
    patch = int(torch.tensor(a["kernel_size"]).prod())
    made = [b.on(b.ids.repeat(patch, 1).reshape(*b.ids.shape[:1], -1, 1)) for b in labels if 1 in b.axes]
    return [tuple(made)]
