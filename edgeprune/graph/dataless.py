"""Run operators on tensors without data: shapes flow, nothing is computed.

What depends on the network's input has no data (PyTorch's "meta" device); what does not is computed as ever, since the
sizes and indices that a network works out for itself are part of its structure.

PyTorch's own way to the shape of a result often takes longer than a small network's whole forward pass. The shapes of
the most frequent operators are therefore worked out here, and those of the others remembered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map

META = torch.device("meta")
PLAIN = (int, float, str, type(None))
Shape = Sequence[int]
ShapeOf = Callable[[tuple[Any, ...]], Shape | None]  # of the result, from the operator's positional arguments


class NeedsData(Exception):
    """The network does something that only tensors with data can do."""


class Dataless:
    """Stand-ins without data for the tensors of one forward pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device  # of the real example
        self._stand_ins: dict[int, tuple[Tensor, Tensor]] = {}  # by id(): a tensor with data, kept alive, and its own
        self._results: dict[Any, tuple[Shape, Shape, torch.dtype]] = {}  # by what `_signature` says

    @classmethod
    def beside(cls, leaves: Sequence[Tensor]) -> Dataless:
        """For a network that is called on these tensors."""
        return cls(leaves[0].device if leaves else torch.device("cpu"))

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
        written, pure, shape_of = _facts(func)
        mutable = bool(written)
        if mutable and _have_data([args[at] if at < len(args) else kwargs.get(name) for at, name in written]):
            raise NeedsData(f"{func} writes into a tensor that has data")
        if shape_of is not None and not kwargs:
            shape, first = shape_of(args), args[0]
            if shape is not None and not mutable:
                dtype = first.dtype if isinstance(first, Tensor) else first[0].dtype
                return torch.empty(shape, dtype=dtype, device=META)
            if shape is not None and shape == first.shape:
                return first
        return self._remembered(func, args, kwargs) if pure else self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = self._hollow((args, kwargs), META)
        return func(*args, **kwargs)

    def _remembered(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Another tensor like the one that the operator made of the like before."""
        key = (func, _signature(args), _signature(kwargs))
        known = self._results.get(key)
        if known is None:
            result = self._run(func, args, kwargs)
            if isinstance(result, Tensor):
                self._results[key] = (result.shape, result.stride(), result.dtype)
            return result
        shape, stride, dtype = known
        return torch.empty_strided(shape, stride, dtype=dtype, device=META)

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
            return type(tree)([self._hollow(item, device, tensors) for item in tree])
        if type(tree) is dict:
            return {key: self._hollow(item, device, tensors) for key, item in tree.items()}
        return tree_map(change, tree)

    def _without_data(self, tensor: Tensor) -> Tensor:
        if tensor.device == META:
            return tensor
        known = self._stand_ins.get(id(tensor))
        if known is None:
            hollow = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
            known = self._stand_ins[id(tensor)] = (tensor, hollow)
        return known[1]


@functools.cache
def _facts(func: OpOverload[..., Any]) -> tuple[tuple[tuple[int, str], ...], bool, ShapeOf | None]:
    """(operands it writes into, does it make a new tensor of its operands' shapes and numbers alone, its shape)."""
    schema = func._schema
    aliases = any(a.alias_info is not None for a in (*schema.arguments, *schema.returns))
    written = [(at, a.name) for at, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
    name = schema.name.removeprefix("aten::")
    name = name.removesuffix("_") if schema.is_mutable else name
    return tuple(written), not aliases, SHAPES.get(name)


def _signature(tree: Any) -> Any:
    """What the shape of a result depends on: equal for calls with results alike."""
    if isinstance(tree, Tensor):
        return (tree.shape, tree.stride(), tree.dtype)
    if isinstance(tree, (tuple, list)):
        return tuple([_signature(item) for item in tree])
    if isinstance(tree, dict):
        return tuple([(key, _signature(item)) for key, item in tree.items()])
    return (type(tree), tree)


def _have_data(written: Sequence[Any]) -> bool:
    if len(written) == 1 and isinstance(written[0], Tensor):
        return not written[0].is_meta
    return any(not leaf.is_meta for leaf in tree_leaves(written) if isinstance(leaf, Tensor))


# ---- shapes; None: let PyTorch find it, or say what is wrong -----------------------------------------------------


def _stays(args: tuple[Any, ...]) -> Shape | None:
    """Element by element, floating-point numbers in order."""
    x: Tensor = args[0]
    return x.shape if x.is_floating_point() and x.is_contiguous() else None


def _broadcast(args: tuple[Any, ...]) -> Shape | None:
    x, y = args[0], args[1]
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.is_contiguous():
        return None
    if not isinstance(y, Tensor):
        return x.shape if isinstance(y, (int, float)) else None
    if x.dtype != y.dtype or not y.is_contiguous():
        return None
    return x.shape if x.shape == y.shape else _together(x.shape, y.shape)


def _together(a: Shape, b: Shape) -> Shape | None:
    """The shape that two tensors have together: axes of size 1 are repeated, missing ones come first."""
    ndim = max(len(a), len(b))
    pairs = list(zip((1,) * (ndim - len(a)) + tuple(a), (1,) * (ndim - len(b)) + tuple(b), strict=True))
    fits = all(m == n or 1 in (m, n) for m, n in pairs)
    return tuple([n if m == 1 else m for m, n in pairs]) if fits else None


def _per_channel(args: tuple[Any, ...]) -> Shape | None:
    """batch_norm: one number a channel of each of its tensors."""
    channels = args[0].shape[1:2]
    fits = bool(channels) and all(t is None or t.shape == channels for t in args[1:5])
    return _stays(args) if fits else None


def _over_last(args: tuple[Any, ...]) -> Shape | None:
    """layer_norm: scales of the normalised shape."""
    x, normalised = args[0], tuple(args[1])
    fits = x.shape[-len(normalised) :] == normalised and all(
        not isinstance(t, Tensor) or t.shape == normalised for t in args[2:4]
    )
    return _stays(args) if fits else None


def _linear(args: tuple[Any, ...]) -> Shape | None:
    x, weight = args[0], args[1]
    fits = weight.dim() == 2 and x.shape[-1:] == weight.shape[1:] and x.dtype == weight.dtype
    fits = fits and (len(args) < 3 or args[2] is None or args[2].shape == weight.shape[:1])
    return (*x.shape[:-1], weight.shape[0]) if fits and _stays(args) else None


def _conv(args: tuple[Any, ...]) -> Shape | None:
    """(input, weight, bias, stride, padding, dilation, groups), defaults left out from the end."""
    x, weight, bias, stride, padding, dilation, groups = args + CONV_DEFAULTS[len(args) :]
    shape, of_weight = x.shape, weight.shape
    if len(shape) != len(of_weight) or len(shape) < 3:
        return None
    rows, columns, *kernel = of_weight
    alike = x.dtype == weight.dtype and weight.is_contiguous() and _stays(args) is not None
    fits = alike and shape[1] == columns * groups and rows % groups == 0
    if not fits or isinstance(padding, str) or (bias is not None and bias.shape != (rows,)):
        return None
    count = len(kernel)
    steps = zip(shape[2:], kernel, _each(stride, count), _each(padding, count), _each(dilation, count), strict=True)
    out = [(size + 2 * pad - wide * (k - 1) - 1) // step + 1 for size, k, step, pad, wide in steps]
    return (shape[0], rows, *out) if min(out, default=0) > 0 else None


CONV_DEFAULTS: tuple[Any, ...] = (None, None, None, (1,), (0,), (1,), 1)


def _each(numbers: Sequence[int], count: int) -> Sequence[int]:
    return numbers if len(numbers) == count else tuple(numbers) * count


def _joined(args: tuple[Any, ...]) -> Shape | None:
    """cat: the sizes along the axis add up."""
    parts = args[0]
    x = parts[0]
    axis = args[1] % x.dim() if len(args) > 1 and x.dim() else 0
    across = (*x.shape[:axis], *x.shape[axis + 1 :])
    for part in parts:
        alike = part.dtype == x.dtype and part.dim() == x.dim() > 1 and part.is_contiguous()
        if not alike or (*part.shape[:axis], *part.shape[axis + 1 :]) != across:
            return None
    return (*x.shape[:axis], sum([part.shape[axis] for part in parts]), *x.shape[axis + 1 :])


def _pooled(args: tuple[Any, ...]) -> Shape | None:
    """adaptive_avg_pool: the last sizes as they are asked for."""
    x, sizes = args[0], args[1]
    return (*x.shape[: -len(sizes)], *sizes) if x.dim() == len(sizes) + 2 and _stays(args) is not None else None


def _mean(args: tuple[Any, ...]) -> Shape | None:
    """mean over some axes."""
    x, dims = args[0], args[1] if len(args) > 1 else None
    if not isinstance(dims, list) or not dims or _stays(args) is None:
        return None
    keeps = len(args) > 2 and args[2]
    gone = {d % x.dim() for d in dims}
    return tuple([1 if d in gone else n for d, n in enumerate(x.shape) if keeps or d not in gone])


SHAPES: dict[str, ShapeOf] = {
    **dict.fromkeys(
        ("dropout", "feature_dropout", "alpha_dropout", "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid",
         "silu", "gelu", "sigmoid", "tanh", "elu", "selu", "celu", "leaky_relu", "mish", "softplus", "exp", "sqrt",
         "rsqrt", "neg"), _stays),
    **dict.fromkeys(("add", "sub", "mul", "div"), _broadcast),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    "batch_norm": _per_channel,
    "layer_norm": _over_last,
    "linear": _linear,
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _pooled),
    "mean": _mean,
    "cat": _joined,
}  # fmt: skip
