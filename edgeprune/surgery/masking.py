"""The masked dense network: the oracle that a cut is checked against."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph import ModelGraph
from ..graph.blocks import branch_state
from ..graph.copies import parts, without_weights
from ..graph.rules import has_rule, name_of
from ..graph.run import arguments
from ..records import Keep
from .checks import check, only_cut
from .rewrite import Rewriter


def mask(model: nn.Module, graph: ModelGraph, keep: Keep) -> nn.Module:
    """A dense copy with every removed slice at zero, for evaluation. Its output must equal the cut network's.

    Channels that a padding brings in (option-A shortcuts) are zeroed where their destination is removed.
    """
    dropped = check(parts(model), graph, keep)
    rewriter = Rewriter(graph, only_cut(keep))
    directions = _directions(rewriter)
    zeroed = {name for block in dropped for name in branch_state(graph.trace.recording, block)}
    touched = {name for name, _ in rewriter.positions} | zeroed
    masked = _with_own(model, touched)
    state = dict([*masked.named_parameters(), *masked.named_buffers()])
    with torch.no_grad():
        for (name, axis), kept in rewriter.positions.items():
            if (name, axis) in directions:
                continue
            gone = np.setdiff1d(np.arange(state[name].shape[axis]), kept.numpy())
            state[name].index_fill_(axis, torch.from_numpy(gone), 0)
        for name in zeroed:
            state[name].zero_()
    padded = {}
    for at, op in enumerate(rewriter.recording.ops):
        found = rewriter.channel_map(op)
        if found is not None:
            padded[at] = (found[0], torch.from_numpy(rewriter.kept_along(op.outputs[0], found[0])))
    return _Padded(masked, padded) if padded else masked


def _with_own(model: nn.Module, names: set[str]) -> nn.Module:
    """A copy that shares all parameters but the named ones; tied parameters stay tied."""
    owned = {
        id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for n, p in model.named_parameters() if n in names
    }
    copied = without_weights(parts(model)).root
    for part in copied.modules():
        for key, shared in list(part._parameters.items()):
            if id(shared) in owned:
                setattr(part, key, owned[id(shared)])
    return copied


def _directions(rewriter: Rewriter) -> set[tuple[str, int]]:
    """Weight norm's directions along their axis: the length is zeroed instead, since zero has no direction."""
    values = rewriter.recording.values
    found = set()
    for op in rewriter.recording.ops:
        if name_of(op.func) == "_weight_norm_interface":
            a = arguments(op)
            found.add((values[a["v"].value].name, a["dim"]))
    return found


class _Padded(nn.Module):
    """Runs the masked network and zeroes what some of its paddings fetch."""

    def __init__(self, masked: nn.Module, padded: dict[int, tuple[int, Tensor]]) -> None:
        super().__init__()
        self.masked, self.padded = masked, padded

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(), _ZeroPadded(self.padded):
            return self.masked(*args, **kwargs)


class _ZeroPadded(TorchDispatchMode):
    """Counts operators as the recording did."""

    def __init__(self, padded: dict[int, tuple[int, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.padded, self.at = padded, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not has_rule(func) and func._can_decompose():
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        if self.at in self.padded:
            assert name_of(func) in ("pad", "constant_pad_nd")
            axis, kept = self.padded[self.at]
            shape = [-1 if d == axis else 1 for d in range(result.dim())]
            result = result * kept.to(result.dtype).reshape(shape)
        self.at += 1
        return result
