"""Normalisations and reductions: what they do to the channels they average over.

Batch and instance norm work channel by channel: cutting is exact. Layer norm and a mean over channels divide by their
number, so cutting changes the statistics: those channels are marked inexact. Group norm is cut by whole groups, which
is exact.
"""

from __future__ import annotations

from .labels import Label, Labels, along
from .recording import Op, Ref
from .run import Run, arguments, as_axis, channel_ids, dims_of
from .unions import FIXED, Ids

EXACT_SUMS = ("sum", "linalg_vector_norm", "norm")


def _bind_scales(run: Run, scales: list[Ref | None], channel: Ids) -> Ids:
    """One number a channel: weights, biases and running statistics follow it. Returns the ids to go on with."""
    for scale in scales:
        if scale is None or run.follow(scale, channel):
            continue
        ids, _ = channel_ids(run, run.of(scale), 0, run.shape(scale)[0], run.why("a computed scale"))
        run.play(ids, "scale")
        run.ledger.unite(ids, channel, run.why("scales positions that cannot be removed"))
        channel = run.ledger.ids.simpler(channel, ids)
    return channel


def per_channel(run: Run, op: Op) -> list[Labels]:
    """batch_norm and instance_norm: (N, C, ...) with one scale, bias, mean and variance a channel."""
    a = arguments(op)
    shape = run.shape(a["input"])
    labels = _averaged_over(run, run.of(a["input"]), len(shape), a["running_mean"] is None)
    ids, rest = channel_ids(run, labels, 1, shape[1], run.why("channels mixed with the batch"))
    scales = [a["weight"], a["bias"], a["running_mean"], a["running_var"]]
    before = along(labels, 1)
    ids = _bind_scales(run, scales, ids)
    own = as_axis(run, ids, 1, len(shape), a["weight"] is not None or bool(before and before.vanishes))
    return [(*own, *rest)]


def _averaged_over(run: Run, labels: Labels, ndim: int, live: bool) -> Labels:
    """Labels along the axes that statistics are taken over.

    Standardised weights are averaged over their inputs while the network runs: cutting those is inexact.
    """
    made: list[Label] = []
    for label in labels:
        averaged = [d for d in label.axes if d >= 2]
        if live and averaged and len(label.axes) == 1:
            run.ledger.mark_inexact(label.ids, run.why("statistics are taken over the channels that are cut"))
            made.append(Label(label.ids, False))
            continue
        left = (
            run.ledger.uniform(label, averaged, run.why("statistics are taken over this axis")) if averaged else label
        )
        made += [left] if left is not None else []
    return tuple(made)


def layer_norm(run: Run, op: Op) -> list[Labels]:
    """layer_norm and rms_norm over the last axes."""
    a = arguments(op)
    shape, count = run.shape(a["input"]), len(a["normalized_shape"])
    normalised = range(len(shape) - count, len(shape))
    kept: list[Label] = []
    rest: list[Label] = []
    for label in run.of(a["input"]):
        (kept if any(d in label.axes for d in normalised) else rest).append(label)
    outside = list(range(len(shape) - count))
    inside = run.ledger.uniform_all(tuple(kept), outside, run.why("normalised together with other axes"))
    for label in inside:
        run.ledger.mark_inexact(label.ids, run.why("layer norm averages over the channels that are cut"))
    scales = [ref for ref in (a["weight"], a.get("bias")) if ref is not None]
    for ref in scales:
        for label in run.of(ref):
            run.play(label.ids, "scale")
    operands = [(inside, shape), *((run.of(ref), run.shape(ref)) for ref in scales)]
    scaled = bool(scales)
    merged = run.ledger.merge(operands, lambda _: scaled, run.why("scales positions that cannot be removed"))
    return [(*merged, *rest)]


def group_norm(run: Run, op: Op) -> list[Labels]:
    """Whole groups are cut; with a single group it is a layer norm over the channels."""
    a = arguments(op)
    shape, groups = run.shape(a["input"]), int(a["num_groups"])
    labels = run.ledger.uniform_all(
        run.of(a["input"]), range(2, len(shape)), run.why("statistics are taken over this axis")
    )
    ids, rest = channel_ids(run, labels, 1, shape[1], run.why("channels mixed with the batch"))
    if groups == 1:
        run.ledger.mark_inexact(ids, run.why("group norm averages over the channels that are cut"))
    else:
        grid = ids.reshape(groups, -1)
        run.ledger.unite(grid, grid[:, :1], run.why("normalised with positions that cannot be removed"))
    ids = _bind_scales(run, [a["weight"], a["bias"]], ids)
    own = as_axis(run, ids, 1, len(shape), a["weight"] is not None)
    return [(*own, *rest)]


def weight_norm(run: Run, op: Op) -> list[Labels]:
    """A weight as direction and length: every slice along `dim` has a length of its own."""
    a = arguments(op)
    direction, length = a["v"], a["g"]
    operands = [(run.of(direction), run.shape(direction)), (run.of(length), run.shape(length))]
    merged = run.ledger.merge(operands, any, run.why("scales positions that cannot be removed"))
    norms = tuple(label for label in merged if label.axes == (a["dim"],))
    return [merged, norms]


# ---- reductions ----------------------------------------------------------------------------------------------


def reduce(run: Run, op: Op) -> list[Labels]:
    """mean, sum, max, var, norm ... over some axes; the labels of the other axes pass."""
    a = arguments(op)
    x = a.get("self") or a.get("input") or op.args[0]
    shape = run.shape(x)
    dims = dims_of(a.get("dim"), len(shape))
    name = op.func._schema.name.split("::")[1]
    passed: list[Label] = []
    for label in run.of(x):
        inside = [d for d in dims if d in label.axes]
        if inside and set(label.axes) <= set(dims):
            _reduced_away(run, name, label)
            continue
        left = run.ledger.uniform(label, inside, run.why(f"{name} over this axis")) if inside else label
        if left is not None:
            passed.append(left)
    keeps = bool(a.get("keepdim"))
    outputs = []
    for number in op.outputs:
        ndim = len(run.recording.values[number].shape) if number >= 0 else 0
        squeezed = not keeps and ndim != len(shape)
        outputs.append(tuple(_drop(label, dims if squeezed else []) for label in passed))
    return outputs


def _reduced_away(run: Run, name: str, label: Label) -> None:
    if name in EXACT_SUMS and label.vanishes:
        return
    if name in ("argmax", "argmin", "topk", "sort", "argsort", "median", "kthvalue"):
        run.ledger.freeze(label.ids, run.why(f"{name} numbers these positions"))
        return
    run.ledger.mark_inexact(label.ids, run.why(f"{name} over the channels that are cut"))


def _drop(label: Label, dims: list[int]) -> Label:
    return label.on(label.ids.squeeze(tuple(dims)))


def softmax(run: Run, op: Op) -> list[Labels]:
    """softmax, log_softmax, cumsum ... along one axis: its positions depend on each other."""
    a = arguments(op)
    x = op.args[0]
    dims = dims_of(a["dim"], len(run.shape(x)))
    name = op.func._schema.name.split("::")[1]
    labels = run.ledger.uniform_all(run.of(x), dims, run.why(f"{name} over this axis"))
    return [tuple(Label(label.ids, label.vanishes and name == "cumsum") for label in labels)]


def glu(run: Run, op: Op) -> list[Labels]:
    """One half of an axis gates the other."""
    a = arguments(op)
    shape = run.shape(a["self"])
    axis = a["dim"] % len(shape)
    halves = run.ledger.through(run.of(a["self"]), shape, lambda full: full.chunk(2, axis), run.why("half of an axis"))
    half = (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])
    operands = [(labels, half) for labels in halves]
    return [run.ledger.merge(operands, lambda zero: zero[0], run.why("gated by positions that stay"))]


def prelu(run: Run, op: Op) -> list[Labels]:
    """A slope a channel, or one for all."""
    x, weight = op.args[0], op.args[1]
    labels, shape = run.of(x), run.shape(x)
    if run.value(weight).shape not in ((), (1,)) and len(run.shape(weight)) == 1:
        axis = 1 if len(shape) > 1 else 0
        ids, rest = channel_ids(run, labels, axis, shape[axis], run.why("channels mixed with other axes"))
        before = along(labels, axis)
        ids = _bind_scales(run, [weight], ids)
        own = as_axis(run, ids, axis, len(shape), bool(before and before.vanishes))
        labels = (*own, *rest)
    return [labels]


__all__ = ["FIXED", "glu", "group_norm", "layer_norm", "per_channel", "prelu", "reduce", "softmax"]
