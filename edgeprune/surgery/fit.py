"""Slice the tensors of the user's own module, and set the attributes that repeat a size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.copies import Parts
from ..graph.rules import name_of
from ..graph.run import signature
from .rewrite import Rewriter

LARGE_BYTES, BLOCK_BYTES = 1 << 20, 1 << 19  # new memory for what lies between would take longer than the copying
# attribute <- axis of the weight of PyTorch's own layers; `groups`, `num_groups` come from the recorded operators
SIZES = {"in_features": 1, "out_features": 0, "num_channels": 0, "num_parameters": 0, "embedding_dim": 1}


def sliced(found: Parts, positions: Mapping[tuple[str, int], Tensor]) -> dict[int, Tensor]:
    """Sliced copies of parameters and buffers, by the id() of the dense ones; tied ones stay tied.

    Args:
        found: of the dense network.
        positions: (name, axis) -> indices kept.
    """
    kept: dict[str, dict[int, Tensor]] = {}  # tensor -> axis -> indices
    for (owner, axis), index in positions.items():
        kept.setdefault(owner, {})[axis] = index
    new: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, old in found.state.items():
            tensor = _selected(old, kept[name]) if name in kept else old.clone()
            new[id(old)] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    return new


def _selected(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The indices kept along some axes; of a large tensor some rows at a time, so that what lies between is small."""
    rows = kept.get(0)
    if rows is None or len(kept) == 1 or tensor.nbytes < LARGE_BYTES:
        for axis, index in kept.items():
            tensor = tensor.index_select(axis, index if tensor.is_cpu else index.to(tensor.device))
        return tensor
    *others, (last, last_index) = [(axis, index.to(tensor.device)) for axis, index in kept.items() if axis]
    shape = [len(kept[axis]) if axis in kept else size for axis, size in enumerate(tensor.shape)]
    selected, at = tensor.new_empty(shape), 0
    for some in rows.to(tensor.device).split(max(1, BLOCK_BYTES // tensor[0].nbytes)):
        part = tensor.index_select(0, some)
        for axis, index in others:
            part = part.index_select(axis, index)
        torch.index_select(part, last, last_index, out=selected[at : at + len(some)])
        at += len(some)
    return selected


def set_sizes(copied: Parts, rewriter: Rewriter, use_attributes: bool) -> bool:
    """Set the attributes that repeat a size; says whether `use_attributes` set any.

    Args:
        copied: the network with sliced tensors.
        rewriter: the cut.
        use_attributes: also set integer attributes of modules whose operators need a new size, where an attribute
            holds the old one (`num_heads`, `hidden_dim` ... whatever they are called).
    """
    modules = copied.modules
    for part in modules.values():
        _set_layer_sizes(part)
    wanted: dict[str, dict[int, set[int]]] = {}
    for op in rewriter.recording.ops:
        name, part = name_of(op.func), modules[op.module]
        if name in ("instance_norm", "batch_norm") and isinstance(getattr(part, "num_features", None), int):
            vars(part)["num_features"] = rewriter.shape(op.outputs[0])[1]  # it may have no tensors of its own
        changed = rewriter.changed(op)
        if changed is None:
            continue
        _set_groups(part, name, changed, op.func)
        if use_attributes:
            sizes = wanted.setdefault(op.module, {})
            for old, fresh in _numbers((op.args, op.kwargs), changed):
                sizes.setdefault(old, set()).add(fresh)
    news = [_set_attributes(modules[path], sizes) for path, sizes in wanted.items()]
    return any(news)


def _set_layer_sizes(part: nn.Module) -> None:
    own = vars(part)
    weight: Tensor | None = part._parameters.get("weight")
    computed = "parametrizations" in part._modules
    without = weight is None and not computed and not isinstance(part, nn.RNNBase)
    if without or not type(part).__module__.startswith("torch.nn"):
        return
    if weight is None and computed:
        weight = getattr(part, "weight", None)
    if isinstance(part, nn.modules.conv._ConvNd) and weight is not None:
        rows, columns = weight.shape[0], weight.shape[1] * part.groups
        own["in_channels"], own["out_channels"] = (rows, columns) if part.transposed else (columns, rows)
        return
    if isinstance(part, nn.RNNBase):
        part.input_size = int(part.get_parameter("weight_ih_l0").shape[1])
        part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]
    if weight is None:
        return
    if isinstance(part, nn.LayerNorm):
        part.normalized_shape = tuple(weight.shape)
    for attribute, axis in SIZES.items():
        if isinstance(own.get(attribute), int) and weight.dim() > axis:
            own[attribute] = int(weight.shape[axis])


def _set_groups(part: nn.Module, name: str, changed: Any, func: Any) -> None:
    key = {"group_norm": "num_groups"}.get(name, "groups" if name.startswith("conv") else "")
    if not key or not isinstance(getattr(part, key, None), int):
        return
    args, kwargs = changed
    at = signature(func)[0].index(key)
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


def _set_attributes(part: nn.Module, sizes: dict[int, set[int]]) -> bool:
    news = False
    for name, value in list(vars(part).items()):
        if isinstance(value, int) and not isinstance(value, bool) and len(sizes.get(value, ())) == 1:
            setattr(part, name, next(iter(sizes[value])))
            news = True
    return news
