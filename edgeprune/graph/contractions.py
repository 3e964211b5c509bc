"""Operators that sum over channels: convolutions, linear layers, matrix products, attention.

They bind the weight's input axis to the incoming ids and hand out the ids of its output axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .labels import Label, Labels, Operand, Shape, along, any_zero
from .recording import Op, Ref
from .run import Run, arguments, as_axis, channel_ids, ids_along, single_along
from .unions import Ids


def conv(run: Run, op: Op) -> list[Labels]:
    """conv1d/2d/3d, their transposes, and the general convolution."""
    a = arguments(op)
    x, weight = a["input"], a["weight"]
    transposed = bool(a.get("transposed")) or "transpose" in op.func._schema.name
    w_shape, x_shape = run.shape(weight), run.shape(x)
    axis = len(x_shape) - (len(w_shape) - 2) - 1
    x_labels = _slid_over(run, op, run.of(x), axis)
    x_ids, rest = channel_ids(run, x_labels, axis, x_shape[axis], run.why("channels mixed with the batch"))
    rows, columns = _weight_ids(run, weight)
    out = _bind(run, x_ids, rows, columns, int(a["groups"]), transposed, _fed_by(run, x))
    _bind_bias(run, a["bias"], out)
    return [(*as_axis(run, out, axis, len(x_shape), True), *rest)]


def _slid_over(run: Run, op: Op, labels: Labels, axis: int) -> Labels:
    """Labels along the axes that a convolution slides over.

    A convolution over channels (efficient channel attention) that keeps their number still works on fewer: it then
    mixes other neighbours, so they are marked inexact. Everything else must be alike along these axes.
    """
    if all(label.axes == (axis,) for label in labels):
        return labels
    before, after = run.shape(op.args[0]), run.recording.values[op.outputs[0]].shape
    made: list[Label] = []
    for label in labels:
        slid = [d for d in label.axes if d > axis]
        if len(slid) == 1 and len(label.axes) == 1 and before[slid[0]] == after[slid[0]]:
            run.ledger.mark_inexact(label.ids, run.why("a convolution slides over the channels that are cut"))
            made.append(Label(label.ids, False))
            continue
        left = run.ledger.uniform(label, slid, run.why("a convolution slides over this axis")) if slid else label
        made += [left] if left is not None else []
    return tuple(made)


def _weight_ids(run: Run, weight: Ref) -> tuple[Ids, Ids]:
    """The ids along a convolution weight's first two axes."""
    shape = run.shape(weight)
    kernel = run.why("positions of a convolution kernel")
    labels = run.of(weight)
    if len(shape) > 2:
        labels = run.ledger.uniform_all(labels, range(2, len(shape)), kernel)
    rows, columns = along(labels, 0), along(labels, 1)
    if rows is not None and rows is columns:
        run.ledger.freeze(rows.ids, run.why("a computed weight mixes its inputs and outputs"))
        rows = columns = None
    return ids_along(rows, 0, shape[0]), ids_along(columns, 1, shape[1])


def _fed_by(run: Run, x: Ref) -> str:
    if run.value(x).source == "input":
        return run.why("reads the network's input")
    return run.why("reads positions that cannot be removed")


def _bind(run: Run, x: Ids, rows: Ids, columns: Ids, groups: int, transposed: bool, fed_by: str) -> Ids:
    """Bind a weight (rows: first axis, columns: second) to incoming ids; returns the outgoing ids."""
    reads, makes = (rows, columns) if transposed else (columns, rows)
    run.play(reads, "in")
    run.play(makes, "out")
    if groups == 1:
        run.ledger.unite(x, reads, fed_by)
        return makes
    if transposed:
        return _bind_transposed_groups(run, x, rows, columns, groups, fed_by)
    x_grid, out_grid = x.reshape(groups, -1), rows.reshape(groups, -1)
    if x_grid.shape[1] == 1:  # depthwise, with its multiplier
        run.ledger.unite(x_grid, out_grid, fed_by)
    elif groups >= min(x_grid.shape[1], out_grid.shape[1]):  # whole groups: more units than equal offsets
        run.ledger.unite(x_grid, x_grid[:, :1], fed_by)
        run.ledger.unite(out_grid, x_grid[:, :1], fed_by)
        run.ledger.freeze(columns, run.why("inside a convolution group: whole groups are cut"))
    else:  # equal offsets of all groups
        run.ledger.unite(x_grid, columns.reshape(1, -1), fed_by)
        run.ledger.unite(out_grid, out_grid[:1], fed_by)
    return rows


def _bind_transposed_groups(run: Run, x: Ids, rows: Ids, columns: Ids, groups: int, fed_by: str) -> Ids:
    run.ledger.unite(x, rows, fed_by)
    grid = rows.reshape(groups, -1)
    run.ledger.unite(grid, grid[:, :1], fed_by)
    run.ledger.freeze(columns, run.why("inside a convolution group: whole groups are cut"))
    return np.broadcast_to(grid[:, :1], (groups, columns.size)).reshape(-1)


def _bind_bias(run: Run, bias: Ref | None, out: Ids) -> None:
    if bias is not None and not run.follow(bias, out):
        ids, _ = channel_ids(run, run.of(bias), 0, run.shape(bias)[0], run.why("a computed bias"))
        run.ledger.unite(ids, out, run.why("a bias of positions that cannot be removed"))


def linear(run: Run, op: Op) -> list[Labels]:
    a = arguments(op)
    x, weight = a["input"], a["weight"]
    x_shape, w_shape = run.shape(x), run.shape(weight)
    axis = len(x_shape) - 1
    x_ids, rest = channel_ids(run, run.of(x), axis, x_shape[axis], run.why("channels mixed with other axes"))
    rows, columns = _weight_ids(run, weight)
    run.play(columns, "in")
    run.play(rows, "out")
    run.ledger.unite(x_ids, columns, _fed_by(run, x))
    _bind_bias(run, a["bias"], rows)
    assert rows.size == w_shape[0]
    return [(*as_axis(run, rows, axis, len(x_shape), True), *rest)]


def embedding(run: Run, op: Op) -> list[Labels]:
    """Rows are looked up by number, so they stay; the embedded axis is cut like any layer's output."""
    a = arguments(op)
    weight = a["weight"]
    run.ledger.freeze_all(tuple(label for label in run.of(weight) if 0 in label.axes), run.why("rows of an embedding"))
    ids = ids_along(along(run.of(weight), 1), 1, run.shape(weight)[1])
    run.play(ids, "out")
    ndim = len(run.recording.values[op.outputs[0]].shape)
    return [as_axis(run, ids, ndim - 1, ndim, True)]


def recurrent(run: Run, op: Op) -> list[Labels]:
    """lstm, gru, rnn: what the first layer reads can be cut; its states and outputs stay."""
    a = arguments(op)
    x, parameters = a["input"], list(a["params"])
    axis = len(run.shape(x)) - 1
    fixed = run.why("a recurrent layer keeps its states")
    x_ids, rest = channel_ids(run, run.of(x), axis, run.shape(x)[axis], fixed)
    run.ledger.freeze_all(rest, fixed)
    for ref in parameters:
        shape = run.shape(ref)
        reads = len(shape) == 2 and shape[1] == run.shape(x)[axis] and ref in _first_layer(parameters, a)
        for label in run.of(ref):
            if reads and label.axes == (1,):
                run.play(label.ids, "in")
                run.ledger.unite(label.ids.reshape(-1), x_ids, _fed_by(run, x))
            else:
                run.ledger.freeze(label.ids, fixed)
    states = a["hx"] if isinstance(a["hx"], (list, tuple)) else [a["hx"]]
    for ref in states:
        run.ledger.freeze_all(run.of(ref), fixed)
    return [() for _ in op.outputs]


def _first_layer(parameters: Sequence[Ref], a: dict[str, Any]) -> list[Ref]:
    """The input weights of the first layer, one for each direction: every (4 or 2)th tensor holds one."""
    each = 4 if a["has_biases"] else 2
    directions = 2 if a["bidirectional"] else 1
    return [parameters[each * d] for d in range(directions)]


# ---- matrix products -----------------------------------------------------------------------------------------


def product(run: Run, a: Operand, b: Operand) -> Operand:
    """Labels and shape of `a @ b` for a (..., M, K) and b (..., K, N): K is contracted, the rest carried on."""
    (a_labels, a_shape), (b_labels, b_shape) = a, b
    mixed = run.why("a contracted axis mixed with rows or columns")
    a_labels = _separate(run, a_labels, len(a_shape) - 1, len(a_shape) - 2, mixed)
    b_labels = _separate(run, b_labels, len(b_shape) - 2, len(b_shape) - 1, mixed)
    a_inner, a_others = single_along(run, a_labels, len(a_shape) - 1, mixed)
    b_inner, b_others = single_along(run, b_labels, len(b_shape) - 2, mixed)
    a_rest, b_rest = list(a_others), list(b_others)
    if a_inner is not None and b_inner is not None:
        inner = _contract(run, a_inner, b_inner, len(a_shape), len(b_shape))
        if inner is not None:  # whole heads: what is left varies along batch axes, and both sides carry it
            a_rest.append(inner)
            b_rest.append(inner)
    else:  # one side sums over positions that stay: it can be cut along other axes only
        a_rest += _stays_along(run, a_inner, len(a_shape) - 1)
        b_rest += _stays_along(run, b_inner, len(b_shape) - 2)
    rows: Shape = (*a_shape[:-1], 1)
    columns: Shape = (*b_shape[:-2], 1, b_shape[-1])
    before = len(run.ledger.beside)
    labels = run.ledger.merge(
        [(tuple(a_rest), rows), (tuple(b_rest), columns)], any_zero, run.why("a product with positions that stay")
    )
    run.ledger.heads += run.ledger.beside[before:]
    ndim = max(len(rows), len(columns))
    batch = np.broadcast_shapes(rows, columns)
    return tuple(_widen(label, ndim) for label in labels), tuple(batch)


def _separate(run: Run, labels: Labels, inner: int, outer: int, reason: str) -> Labels:
    """Labels along the contracted axis must not vary along the kept matrix axis as well."""
    return tuple(
        made
        for label in labels
        if (made := run.ledger.uniform(label, [outer], reason) if inner in label.axes else label) is not None
    )


def _stays_along(run: Run, label: Label | None, axis: int) -> Labels:
    """The label made alike along a contracted axis that the other side cannot give up."""
    if label is None:
        return ()
    left = run.ledger.uniform(label, [axis], run.why("contracted with positions that cannot be removed"))
    return () if left is None else (left,)


def _contract(run: Run, a: Label, b: Label, a_ndim: int, b_ndim: int) -> Label | None:
    """Unite both operands' ids along the contracted axis; returns what varies along batch axes, if anything."""
    reason = run.why("contracted with positions that cannot be removed")
    ndim = max(a_ndim, b_ndim)
    left = _widen(a, ndim)
    right = _widen(b.on(b.ids.swapaxes(-1, -2)), ndim)
    run.ledger.unite(left.ids, right.ids, reason)
    ids = np.maximum(left.ids, right.ids)
    joint = Label(ids, left.vanishes or right.vanishes)
    if joint.axes == (ndim - 1,):
        if not joint.vanishes:
            run.ledger.freeze(ids, run.why("a sum over channels that are not zero when their weights are"))
        return None
    return run.ledger.uniform(joint, [ndim - 1], reason)


def _widen(label: Label, ndim: int) -> Label:
    ids = label.ids
    return Label(ids.reshape((1,) * (ndim - ids.ndim) + ids.shape), label.vanishes)


def matmul(run: Run, op: Op) -> list[Labels]:
    """matmul, bmm, mm, mv and dot: vectors become matrices for the while."""
    first, second = op.args[0], op.args[1]
    a, b = (run.of(first), run.shape(first)), (run.of(second), run.shape(second))
    _play_weight(run, first, -2, -1)
    _play_weight(run, second, -1, -2)
    a_vector, b_vector = len(a[1]) == 1, len(b[1]) == 1
    if a_vector:
        a = (tuple(label.on(label.ids[None]) for label in a[0]), (1, *a[1]))
    if b_vector:
        b = (tuple(label.on(label.ids[:, None]) for label in b[0]), (*b[1], 1))
    labels, _ = product(run, a, b)
    if a_vector:
        labels = tuple(label.on(label.ids.squeeze(-2)) for label in labels)
    if b_vector:
        labels = tuple(label.on(label.ids.squeeze(-1)) for label in labels)
    return [labels]


def addmm(run: Run, op: Op) -> list[Labels]:
    """bias + a @ b, batched or not."""
    bias, first, second = op.args[0], op.args[1], op.args[2]
    _play_weight(run, second, -1, -2)
    result = product(run, (run.of(first), run.shape(first)), (run.of(second), run.shape(second)))
    operands = [(run.of(bias), run.shape(bias)), result]
    return [run.ledger.merge(operands, all, run.why("added to positions that stay"))]


def _play_weight(run: Run, ref: Ref, makes: int, reads: int) -> None:
    value = run.value(ref)
    if value.source == "state" and len(value.shape) > 1:
        for role, axis in (("out", makes), ("in", reads)):
            label = along(run.of(ref), axis % len(value.shape))
            if label is not None:
                run.play(label.ids, role)


def attention(run: Run, op: Op) -> list[Labels]:
    """scaled_dot_product_attention: q (..., L, E), k (..., S, E), v (..., S, Ev) -> (..., L, Ev)."""
    a = arguments(op)
    q, k, v = ((run.of(a[n]), run.shape(a[n])) for n in ("query", "key", "value"))
    if a.get("enable_gqa") and q[1][-3] != k[1][-3]:
        k, v = _repeat_heads(k, q[1][-3]), _repeat_heads(v, q[1][-3])
    if a["scale"] is None:
        q, k = (_whole_heads_only(run, operand) for operand in (q, k))
    flipped = tuple(label.on(label.ids.swapaxes(-1, -2)) for label in k[0])
    scores = product(run, q, (flipped, (*k[1][:-2], k[1][-1], k[1][-2])))
    mask = a["attn_mask"]
    if mask is not None:
        merged = run.ledger.merge([scores, (run.of(mask), run.shape(mask))], any_zero, run.why("an attention mask"))
        scores = (merged, scores[1])
    keys = len(scores[1]) - 1
    weights = run.ledger.uniform_all(scores[0], [keys], run.why("softmax over this axis"))
    attended = tuple(Label(label.ids, False) for label in weights)
    return [product(run, (attended, scores[1]), v)[0]]


def _whole_heads_only(run: Run, operand: Operand) -> Operand:
    """The default scale is one over the root of the head width: cutting inside a head would change it."""
    labels, shape = operand
    reason = run.why("inside an attention head: whole heads are cut")
    return run.ledger.uniform_all(labels, [len(shape) - 1], reason), shape


def _repeat_heads(operand: Operand, heads: int) -> Operand:
    labels, shape = operand
    axis = len(shape) - 3
    repeats = heads // shape[axis]
    wide: Sequence[Label] = [
        label.on(label.ids.repeat(repeats, axis)) if axis in label.axes else label for label in labels
    ]
    return tuple(wide), (*shape[:axis], heads, *shape[axis + 1 :])
