"""Run operators on tensors without data: shapes flow, nothing is computed.

What depends on the network's input has no data (PyTorch's "meta" device); what does not is computed as ever, since the
sizes and indices that a network works out for itself are part of its structure.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

META = torch.device("meta")
SHAPE_STAYS = (
    "batch_norm", "layer_norm", "group_norm", "instance_norm", "dropout", "feature_dropout", "alpha_dropout", "relu",
    "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu", "sigmoid", "tanh", "elu", "selu", "celu",
    "leaky_relu", "mish", "softplus", "exp", "sqrt", "rsqrt", "neg",
)  # fmt: skip  # PyTorch's own way to their shapes takes longer than a small network's whole forward pass
BROADCAST = ("add", "sub", "mul", "div")
PLAIN = (int, float, str, type(None))


class NeedsData(Exception):
    """The network does something that only tensors with data can do."""


class Dataless:
    """Stand-ins without data for the tensors of one forward pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device  # of the real example
        self._known: Any = WeakIdKeyDictionary()

    def example(self, tree: Any) -> Any:
        return self._hollow(tree, META)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], from_input: bool) -> Any:
        """Run an operator: with data where it has nothing to do with the input, else without.

        Raises:
            NeedsData: what depends on the input would be written into a tensor that has data.
        """
        if not from_input:
            args, kwargs = self._hollow((args, kwargs), self.device, tensors=False)
            return func(*args, **kwargs)
        if func._schema.is_mutable and _writes_to_data(func, args, kwargs):
            raise NeedsData(f"{func} writes into a tensor that has data")
        args, kwargs = self._hollow((args, kwargs), META)
        shape = _known_shape(func, args)
        if shape is None or not args[0].is_floating_point():
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return args[0]
        return torch.empty_like(args[0]) if shape == args[0].shape else args[0].new_empty(shape)

    def _hollow(self, tree: Any, device: torch.device, tensors: bool = True) -> Any:
        """The tree with its devices changed, and its tensors without data."""

        def change(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return self._without_data(leaf) if tensors else leaf
            return device if isinstance(leaf, torch.device) else leaf

        if isinstance(tree, (Tensor, torch.device)):
            return change(tree)
        if isinstance(tree, PLAIN):
            return tree
        if type(tree) in (tuple, list):
            return type(tree)(self._hollow(item, device, tensors) for item in tree)
        if type(tree) is dict:
            return {key: self._hollow(item, device, tensors) for key, item in tree.items()}
        return tree_map(change, tree)

    def _without_data(self, tensor: Tensor) -> Tensor:
        if tensor.device == META:
            return tensor
        hollow: Tensor | None = self._known.get(tensor)
        if hollow is None:
            hollow = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
            self._known[tensor] = hollow
        return hollow


def _known_shape(func: Any, args: tuple[Any, ...]) -> tuple[int, ...] | None:
    """The shape of a result that has the type of the first operand, for the most frequent operators."""
    name = func._schema.name.removeprefix("aten::")
    name = name.removesuffix("_") if func._schema.is_mutable else name
    if name in SHAPE_STAYS:
        return tuple(args[0].shape)
    if name in BROADCAST and all(isinstance(a, Tensor) and a.dtype == args[0].dtype for a in args):
        return tuple(torch.broadcast_shapes(*(a.shape for a in args)))
    if name == "linear":
        return (*args[0].shape[:-1], args[1].shape[0])
    return None


def _writes_to_data(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    specs = func._schema.arguments
    written = [a for a, spec in zip(args, specs, strict=False) if spec.alias_info and spec.alias_info.is_write]
    written += [kwargs[s.name] for s in specs if s.name in kwargs and s.alias_info and s.alias_info.is_write]
    return any(isinstance(t, Tensor) and t.device != META for t in written)
