"""Which rule labels which operator, and the loop that runs a recording through them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from . import contractions, norms, structure
from .labels import Label, Labels
from .recording import Op, Ref
from .run import Run

Rule = Callable[[Run, Op], list[Labels]]


def pointwise(run: Run, op: Op) -> list[Labels]:
    """Element-wise operators: operands' ids are united position by position."""
    if len(op.refs) == 1 and len(labels := run.of(op.refs[0])) == 1 and not labels[0].copies:
        zero = zero_where(run, op, (labels[0].vanishes,))
        return [labels if zero == labels[0].vanishes else (Label(labels[0].ids, zero),)]
    operands = [(run.of(ref), run.shape(ref)) for ref in op.refs]

    def vanishes(zero: tuple[bool, ...]) -> bool:
        return zero_where(run, op, zero)

    return [run.ledger.merge(operands, vanishes, run.why("combined with positions that cannot be removed"))]


def zero_where(run: Run, op: Op, zero: tuple[bool, ...]) -> bool:
    """Is the result zero when the operands flagged in `zero` are? Found by trying, once for each kind of operator."""
    if not any(zero):
        return False
    key = (op.func, zero, _kinds(run, op.args), _kinds(run, op.kwargs))
    if key not in run.zeros:
        run.zeros[key] = _is_zero_where(run, op, zero)
    return run.zeros[key]


def _kinds(run: Run, tree: Any) -> Any:
    """The arguments with each tensor's type in its place, as something that can be looked up."""
    if isinstance(tree, Ref):
        return run.value(tree).dtype
    if isinstance(tree, (tuple, list)):
        return tuple([_kinds(run, item) for item in tree])
    return repr(tree) if not isinstance(tree, dict) else tuple([(k, _kinds(run, v)) for k, v in tree.items()])


def _is_zero_where(run: Run, op: Op, zero: tuple[bool, ...]) -> bool:
    flags = iter(zero)
    generator = torch.Generator().manual_seed(0)

    def probe(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        dtype = run.value(leaf).dtype
        if next(flags):
            return torch.zeros(8, dtype=dtype)
        return (torch.randn(8, generator=generator) * 3).to(dtype)

    try:
        result = op.func(*tree_map(probe, op.args), **tree_map(probe, op.kwargs))
    except (RuntimeError, TypeError, IndexError, ValueError):
        return False
    return bool((result == 0).all())


def unknown(run: Run, op: Op) -> list[Labels]:
    """Nothing is known, so nothing that comes in or goes out may change."""
    for ref in op.refs:
        run.ledger.freeze_all(run.of(ref), run.why(f"no rule for the operator {name_of(op.func)}"))
    return [() for _ in op.outputs]


def constant(run: Run, op: Op) -> list[Labels]:
    """New tensors that take nothing but a type from their operand."""
    return [() for _ in op.outputs]


def like(run: Run, op: Op) -> list[Labels]:
    """zeros_like, fill ...: new values, as many as the operand has."""
    zeros = name_of(op.func) in ("zeros_like", "zero")
    return [tuple(Label(label.ids, zeros, label.copies) for label in run.of(op.refs[0]))]


@functools.cache
def name_of(func: OpOverload[..., Any]) -> str:
    """The operator's name without its overload; in-place variants share the rule of the plain one."""
    name = func._schema.name
    plain = name[:-1] if name.endswith("_") and func._schema.is_mutable else name
    return plain.removeprefix("aten::")


def _named(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_named("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d",
             contractions.conv),
    **_named("linear", contractions.linear),
    **_named("matmul bmm mm mv dot", contractions.matmul),
    **_named("addmm baddbmm", contractions.addmm),
    **_named("scaled_dot_product_attention", contractions.attention),
    **_named("embedding", contractions.embedding),
    **_named("batch_norm instance_norm", norms.per_channel),
    **_named("layer_norm rms_norm", norms.layer_norm),
    **_named("group_norm", norms.group_norm),
    **_named("mean sum amax amin max min var std var_mean std_mean norm linalg_vector_norm logsumexp prod any all "
             "argmax argmin median kthvalue", norms.reduce),
    **_named("softmax log_softmax cumsum cumprod topk sort argsort", norms.softmax),
    **_named("glu", norms.glu),
    **_named("_weight_norm_interface", norms.weight_norm),
    **_named("prelu", norms.prelu),
    **_named("permute transpose t select slice split split_with_sizes chunk narrow unbind movedim swapaxes diagonal",
             structure.as_is),
    **_named("view _unsafe_view reshape flatten unflatten squeeze unsqueeze", structure.view),
    **_named("clone contiguous alias detach to _to_copy lift_fresh lift_fresh_copy dropout feature_dropout "
             "native_dropout alpha_dropout requires_grad", structure.same),
    **_named("expand repeat", structure.expand),
    **_named("cat concat", structure.concat),
    **_named("stack", structure.stack),
    **_named("pad constant_pad_nd", structure.pad),
    **_named("roll flip", structure.roll),
    **_named("index", structure.index),
    **_named("index_select", structure.index_select),
    **_named("pixel_shuffle pixel_unshuffle", structure.pixel_shuffle),
    **_named("im2col", structure.unfold_patches),
    **_named("unfold", structure.windows),
    **_named("max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
             "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
             "adaptive_max_pool3d max_pool2d_with_indices upsample_nearest1d upsample_nearest2d "
             "upsample_nearest3d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d "
             "_upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_linear1d upsample_trilinear3d "
             "grid_sampler reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d",
             structure.spatial),
    **_named("empty_like zeros_like ones_like full_like rand_like randn_like bernoulli uniform normal fill zero",
             like),
    **_named("new_empty new_zeros new_ones new_full", constant),
    **_named("lstm gru rnn_tanh rnn_relu", contractions.recurrent),
    **_named("lstm_cell gru_cell", unknown),
}  # fmt: skip

# these label their first operand alone: channels of any other one (a sampling grid, an index) have to stay
OF_ONE_OPERAND = frozenset([
    structure.as_is, structure.view, structure.same, structure.expand, structure.roll, structure.index,
    structure.index_select, structure.pixel_shuffle, structure.windows, structure.unfold_patches, structure.spatial,
    structure.pad, norms.reduce, norms.softmax, like, constant,
])  # fmt: skip

# not tagged as element-wise by PyTorch, though they are
MORE_POINTWISE = frozenset(
    [
        "copy",
        "masked_fill",
        "where",
        "clamp",
        "hardtanh",
        "relu6",
        "threshold",
        "hardswish",
        "hardsigmoid",
        "hardshrink",
        "softshrink",
        "softplus",
        "celu",
        "selu",
        "rrelu",
        "log_sigmoid",
        "mish",
    ]
)


@functools.cache
def rule_for(func: OpOverload[..., Any]) -> Rule | None:
    """The rule of an operator, or None: then a composite is decomposed, and anything else freezes."""
    name = name_of(func)
    if name in ("max", "min") and len(func._schema.arguments) == 2 and func._overloadname == "other":
        return pointwise
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in func.tags or name in MORE_POINTWISE:
        return pointwise
    return None


def has_rule(func: OpOverload[..., Any]) -> bool:
    return rule_for(func) is not None


def run_labels(run: Run) -> None:
    """Label every value of the recording; what the operators demand is in `run.ledger` afterwards."""
    doubt = ""
    for at, op in enumerate(run.recording.ops):
        run.module = op.module
        if at in run.recording.reads:
            doubt = f"follows a decision on the data at {run.recording.reads[at]}"
        if not any(run.of(ref) for ref in op.refs):  # the others are read by the rule
            continue
        if doubt:
            for ref in op.refs:
                run.ledger.freeze_all(run.of(ref), doubt)
        rule = rule_for(op.func) or unknown
        if rule in OF_ONE_OPERAND:
            for ref in op.refs[1:]:
                run.ledger.freeze_all(run.of(ref), run.why(f"steers the operator {name_of(op.func)}"))
        outputs = rule(run, op)
        labelled = [ref for ref in op.refs if run.of(ref)] if op.aliases else []
        if labelled and (any(ref != op.args[0] for ref in labelled) or _fills_zeros(run, op, outputs)):
            for ref in labelled:
                run.ledger.freeze_all(run.of(ref), run.why("written in place into part of another tensor"))
        for number, labels in zip(op.outputs, outputs, strict=True):
            if number >= 0:
                run.labels[number] = labels
                _check(run, number, labels, op)


def _fills_zeros(run: Run, op: Op, outputs: list[Labels]) -> bool:
    """Did an operator in place make something of channels that were zero? The whole tensor's labels do not say so."""
    before = any(label.vanishes for label in run.of(op.args[0]))
    return before and not all(label.vanishes for label in outputs[0])


def _check(run: Run, number: int, labels: Labels, op: Op) -> None:
    shape = run.recording.values[number].shape
    for label in labels:
        have = label.ids.shape
        fits = len(have) == len(shape) and all(have[axis] == shape[axis] for axis in label.axes)
        assert fits, f"{name_of(op.func)}: ids {have} for a tensor of shape {shape}"
