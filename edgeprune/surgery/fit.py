"""Slice the tensors of the user's own module, set the attributes that repeat a size, and check that it follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import TraceError
from ..graph import ModelGraph
from ..graph.record import record
from ..graph.recording import Op
from ..graph.rules import has_rule, name_of
from ..graph.run import arguments
from .rewrite import Rewriter, numbers_in

# attribute <- (tensor, axis) of PyTorch's own layers; `groups` and `num_groups` come from the recorded operators
SIZES: dict[str, tuple[str, int]] = {
    "in_features": ("weight", 1), "out_features": ("weight", 0),
    "num_channels": ("weight", 0), "num_parameters": ("weight", 0), "embedding_dim": ("weight", 1),
}  # fmt: skip
SHAPES_TELL = ("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split", "new_zeros", "zeros")


def slice_state(module: nn.Module, model: nn.Module, positions: Mapping[tuple[str, int], Tensor]) -> None:
    """Give `module` sliced copies of the tensors of `model`; tied parameters stay tied."""
    new: dict[int, Tensor] = {}
    axes: dict[str, list[int]] = {}
    for owner, axis in positions:
        axes.setdefault(owner, []).append(axis)
    for name, old in [*model.named_parameters(), *model.named_buffers()]:
        tensor = old.detach()
        for axis in axes.get(name, ()):
            tensor = tensor.index_select(axis, positions[name, axis].to(tensor.device))
        tensor = tensor.clone() if tensor.data_ptr() == old.data_ptr() else tensor
        new[id(old)] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    originals = dict(model.named_modules(remove_duplicate=False))
    for path, part in module.named_modules(remove_duplicate=False):
        source = originals[path]
        for key, old in source._parameters.items():
            if old is not None:
                part._parameters[key] = new[id(old)]
        for key, old_buffer in source._buffers.items():
            if old_buffer is not None:
                part._buffers[key] = new[id(old_buffer)]


def set_sizes(module: nn.Module, rewriter: Rewriter, use_attributes: bool) -> None:
    """Set the attributes that repeat a size.

    Args:
        module: the copy with sliced tensors.
        rewriter: the cut.
        use_attributes: also set integer attributes of modules whose operators need a new size, where an attribute
            holds the old one (`num_heads`, `hidden_dim` ... whatever they are called).
    """
    for part in module.modules():
        _set_layer_sizes(part)
    wanted: dict[str, dict[int, set[int]]] = {}
    for op in rewriter.recording.ops:
        if name_of(op.func) in ("instance_norm", "batch_norm"):  # it may have no tensors of its own
            part = module.get_submodule(op.module)
            if isinstance(getattr(part, "num_features", None), int):
                part.num_features = rewriter.shape(op.outputs[0])[1]  # type: ignore[assignment]
        changed = rewriter.changed(op)
        if changed is None:
            continue
        part = module.get_submodule(op.module)
        _set_groups(part, name_of(op.func), changed, op.func)
        if use_attributes:
            sizes = wanted.setdefault(op.module, {})
            for old, fresh in _numbers((op.args, op.kwargs), changed):
                sizes.setdefault(old, set()).add(fresh)
    for path, sizes in wanted.items():
        _set_attributes(module.get_submodule(path), sizes)


def _set_layer_sizes(part: nn.Module) -> None:
    if not type(part).__module__.startswith("torch.nn"):
        return
    weight = part._parameters.get("weight")
    if isinstance(part, nn.modules.conv._ConvNd) and weight is not None:
        flip = part.transposed
        part.in_channels = weight.shape[0] if flip else weight.shape[1] * part.groups
        part.out_channels = weight.shape[1] * part.groups if flip else weight.shape[0]
        return
    if isinstance(part, nn.RNNBase):
        part.input_size = int(part.get_parameter("weight_ih_l0").shape[1])
        part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]
    if isinstance(part, nn.LayerNorm) and weight is not None:
        part.normalized_shape = tuple(weight.shape)
    for attribute, (name, axis) in SIZES.items():
        tensor = getattr(part, name, None)
        if isinstance(getattr(part, attribute, None), int) and isinstance(tensor, Tensor) and tensor.dim() > axis:
            setattr(part, attribute, int(tensor.shape[axis]))


def _set_groups(part: nn.Module, name: str, changed: Any, func: Any) -> None:
    names = [spec.name for spec in func._schema.arguments]
    key = {"group_norm": "num_groups"}.get(name, "groups" if name.startswith("conv") else "")
    if not key or not isinstance(getattr(part, key, None), int):
        return
    args, kwargs = changed
    at = names.index(key)
    setattr(part, key, int(args[at] if at < len(args) else kwargs[key]))
    _set_layer_sizes(part)


def _numbers(old: Any, new: Any) -> list[tuple[int, int]]:
    """Pairs of integers that differ at the same place of two argument trees."""
    if isinstance(old, bool) or isinstance(new, bool):
        return []
    if isinstance(old, int) and isinstance(new, int):
        return [(old, new)] if old != new else []
    if isinstance(old, dict) and isinstance(new, dict):
        return [pair for key in old.keys() & new.keys() for pair in _numbers(old[key], new[key])]
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        return [pair for o, n in zip(old, new, strict=True) for pair in _numbers(o, n)]
    return []


def _set_attributes(part: nn.Module, sizes: dict[int, set[int]]) -> None:
    for name, value in list(vars(part).items()):
        if isinstance(value, int) and not isinstance(value, bool) and len(sizes.get(value, ())) == 1:
            setattr(part, name, next(iter(sizes[value])))


def fits(module: nn.Module, graph: ModelGraph, rewriter: Rewriter) -> bool:
    """Does the module's own `forward` do on the sliced tensors, operator by operator, what the cut expects?"""
    try:
        recording = record(module.eval(), graph.example, has_rule, owned=True)
    except TraceError:
        return False
    decision = min(rewriter.recording.reads, default=None)  # what follows is frozen, whichever way it goes
    ops, dense_ops = recording.ops[:decision], rewriter.recording.ops[:decision]
    if len(ops) != len(dense_ops):
        return False
    for here, dense in zip(ops, dense_ops, strict=True):
        if here.func is not dense.func or not _same_arguments(here, dense, rewriter):
            return False
        for number, dense_number in zip(here.outputs, dense.outputs, strict=True):
            if number >= 0 and recording.values[number].shape != rewriter.shape(dense_number):
                return False
    return True


def _same_arguments(here: Op, dense: Op, rewriter: Rewriter) -> bool:
    """Sizes, starts, groups and scales as the cut expects; how an axis is split shows in the shapes."""
    name = name_of(dense.func)
    if name in SHAPES_TELL:
        return True
    expected = rewriter.changed(dense) or (dense.args, dense.kwargs)
    if name == "slice":
        start = arguments(here)["start"] or 0
        bound = dict(zip([a.name for a in dense.func._schema.arguments], expected[0], strict=False))
        return bool(start == (bound.get("start") or 0))
    return numbers_in((here.args, here.kwargs)) == numbers_in(expected)
