"""Rebuild a cut network from its recording, for modules with a size written into their `forward`.

Submodules whose operators need no new size are called as they are, so they keep their class, their training mode and
their drop path. The others are opened: their operators follow one by one with sizes recomputed, batch norm and dropout
as modules that obey `.train()`, and sizes that count the batch taken from the input.
"""

from __future__ import annotations

import inspect
import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import TraceError
from ..graph import Example, ModelGraph, as_call
from ..graph.blocks import branch_ops
from ..graph.recording import Call, Op, Recording, Ref, Value
from ..graph.rules import name_of
from ..graph.run import arguments
from ..records import Block
from . import origin
from .rewrite import Arguments, Rewriter, numbers_in, selects

aten = torch.ops.aten
SPLITS = ("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split")


class ChannelMap(nn.Module):
    """Fetch channels by number along one axis; zeros where there is none (-1)."""

    def __init__(self, source: list[int], size: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        chosen = torch.zeros(len(source), size)
        for row, column in enumerate(source):
            if column >= 0:
                chosen[row, column] = 1.0
        self.register_buffer("chosen", chosen, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size, ...) -> (..., len(source), ...) along `axis`; a 1x1 convolution, so every runtime has it."""
        chosen = self.get_buffer("chosen").to(x.dtype)
        if x.dim() == 4 and self.axis == 1:
            return functional.conv2d(x, chosen[:, :, None, None])
        return functional.linear(x.movedim(self.axis, -1), chosen).movedim(-1, self.axis)


class Constant(nn.Module):
    """A tensor that the network holds outside of its state dict; it stays outside."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> Tensor:
        return self.get_buffer("value")


class BatchNorm(nn.Module):
    """batch_norm over tensors that are handed in, in the mode of the network."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
        return functional.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)


def build(
    model: nn.Module, root: nn.Module, graph: ModelGraph, rewriter: Rewriter, dropped: tuple[Block, ...]
) -> nn.Module:
    """The cut network as a graph module.

    Args:
        model: the dense network, to find out whether the recording is its own, and which sizes count the batch.
        root: a copy of it with sliced tensors, whose submodules and parameters are used.
        graph, rewriter: the recording and what the cut makes of it.
        dropped: blocks to leave out.
    Raises:
        SurgeryError: the recording is of another network.
        TraceError: it decides on its data, or keeps tensors between calls.
    """
    if dropped:  # a shortcut that is written in place would overwrite what others still read
        for part in root.modules():
            if hasattr(part, "inplace"):
                setattr(part, "inplace", False)  # noqa: B010
    builder = _Builder(root, graph.example, rewriter, dropped)
    builder.doubled = origin.doubled(model, graph.example, rewriter.recording)
    return builder.build()


class _Builder:
    """Walks the recording once and adds a node for each operator or whole module."""

    def __init__(self, root: nn.Module, example: Example, rewriter: Rewriter, dropped: tuple[Block, ...]) -> None:
        self.root, self.example, self.rewriter = root, example, rewriter
        self.recording: Recording = rewriter.recording
        self.doubled: Recording | None = None
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.changes = [rewriter.changed(op) for op in self.recording.ops]
        self.skip = {at for block in dropped for at in branch_ops(self.recording, block)}
        self.shortcuts = {b.op: self.recording.ops[b.op].refs[1 - b.branch] for b in dropped}
        self.readers: dict[int, list[int]] = defaultdict(list)
        for at, op in enumerate(self.recording.ops):
            for ref in op.refs:
                self.readers[ref.value].append(at)
        for ref in _leaves(self.recording.output):
            self.readers[ref.value].append(len(self.recording.ops))

    def build(self) -> fx.GraphModule:
        self._placeholders()
        starting: dict[int, list[Call]] = defaultdict(list)
        for call in self.recording.calls:  # inner calls were recorded first: outermost last
            starting[call.first].insert(0, call)
        at, ops = 0, self.recording.ops
        while at <= len(ops):
            for call in starting[at]:
                self._pass_through(call)
            whole = next((c for c in starting[at] if c.last > at and self._stays_whole(c)), None)
            if whole is not None:
                self._call(whole)
                at = whole.last
                continue
            if at < len(ops) and at not in self.skip:
                self._operator(at, ops[at])
            at += 1
        self.graph.output(self._nodes(self.recording.output))
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, type(self.root).__name__)

    # -- values ----------------------------------------------------------------------------------------------

    def _placeholders(self) -> None:
        args, kwargs = as_call(self.example)
        names = list(inspect.signature(self.root.forward).parameters)[: len(args)] + list(kwargs)
        numbers = iter(self.recording.inputs)
        for name, item in zip(names, [*args, *kwargs.values()], strict=True):
            if isinstance(item, Tensor):
                self.nodes[next(numbers)] = self.graph.placeholder(name)
        self.first_input = self.nodes[self.recording.inputs[0]]
        self.batch_size = self.recording.values[self.recording.inputs[0]].shape[0]

    def _node(self, ref: Ref) -> fx.Node:
        if ref.value not in self.nodes:
            value = self.recording.values[ref.value]
            held = self._held(value)
            if held is None:
                self.nodes[ref.value] = self.graph.get_attr(value.name)
            else:
                self.nodes[ref.value] = self._new_module(f"_constant_{ref.value}", Constant(held.clone()), ())
        return self.nodes[ref.value]

    def _held(self, value: Value) -> Tensor | None:
        """A tensor that is no part of the network's state dict, and must be none of the cut one's."""
        if value.source == "state":
            path, _, key = value.name.rpartition(".")
            owner = self.root.get_submodule(path)
            return owner.get_buffer(key) if key in owner._non_persistent_buffers_set else None
        if value.constant is None:
            raise TraceError("this network keeps tensors between calls; wrap it so that its forward makes them anew")
        return value.constant

    def _nodes(self, tree: Any) -> Any:
        if isinstance(tree, Ref):
            return self._node(tree)
        if type(tree) in (tuple, list):
            return type(tree)([self._nodes(item) for item in tree])
        if type(tree) is dict:
            return {key: self._nodes(item) for key, item in tree.items()}
        if isinstance(tree, (tuple, list, dict)):  # of a kind of its own
            return tree_map(lambda leaf: self._node(leaf) if isinstance(leaf, Ref) else leaf, tree)
        return tree

    def _new_module(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> fx.Node:
        while hasattr(self.root, name):  # of a network that was rebuilt before
            name += "_"
        self.root.add_module(name, module)
        return self.graph.call_module(name, args)

    # -- modules ---------------------------------------------------------------------------------------------

    def _stays_whole(self, call: Call) -> bool:
        """Can this submodule be called as it is: nothing to change inside, nothing but tensors in and out?"""
        inside = range(call.first, call.last)
        if not call.module or any(self.changes[at] is not None for at in inside):
            return False
        if any(at in self.skip or at in self.shortcuts for at in inside) or self._may_count(inside):
            return False
        plain = (Ref, bool, float, str, type(None))
        given, _ = tree_flatten((call.args, call.kwargs))
        returned, _ = tree_flatten(call.output)
        if not all(isinstance(leaf, plain) for leaf in given) or not _leaves(call.output):
            return False
        made = {n for at in inside for n in self.recording.ops[at].outputs}
        read = {ref.value for at in inside for ref in self.recording.ops[at].refs}
        known = {leaf.value for leaf in given if isinstance(leaf, Ref)}
        hidden = [n for n in read - made - known if self.recording.values[n].from_input]
        leaking = [n for n in made if any(at >= call.last for at in self.readers[n])]
        out = {leaf.value for leaf in returned if isinstance(leaf, Ref)}
        return not hidden and set(leaking) <= out

    def _may_count(self, inside: range) -> bool:
        """Could the user's Python work out another number from a shape that the cut changes?"""
        ops = [self.recording.ops[at] for at in inside]
        if not any(self._reshaped(n) for op in ops for n in (*op.outputs, *(ref.value for ref in op.refs))):
            return False
        theirs = [op for op in ops if not _is_layer(self.root.get_submodule(op.module))]
        return any(numbers_in((op.args, op.kwargs)) for op in theirs)

    def _reshaped(self, value: int) -> bool:
        return value >= 0 and self.rewriter.shape(value) != self.recording.values[value].shape

    def _call(self, call: Call) -> None:
        node = self.graph.call_module(call.module, self._nodes(call.args), self._nodes(call.kwargs))
        self._unpack(call.output, node)

    def _unpack(self, output: Any, node: fx.Node) -> None:
        if isinstance(output, Ref):
            self.nodes[output.value] = node
        elif isinstance(output, dict):
            for key, item in output.items():
                self._unpack(item, self.graph.call_function(operator.getitem, (node, key)))
        elif isinstance(output, (list, tuple)):
            for at, item in enumerate(output):
                self._unpack(item, self.graph.call_function(operator.getitem, (node, at)))

    def _pass_through(self, call: Call) -> None:
        """Drop path and the like do nothing in evaluation; they are kept for training."""
        if call.first != call.last or len(call.args) != 1 or call.output != call.args[0] or call.kwargs:
            return
        module, value = self.root.get_submodule(call.module), call.args[0]
        only_reader = isinstance(value, Ref) and len([a for a in self.readers[value.value] if a >= call.first]) == 1
        known = only_reader and value.value in self.nodes
        if known and not isinstance(module, nn.Identity) and not list(module.children()):
            self.nodes[value.value] = self.graph.call_module(call.module, (self.nodes[value.value],))

    # -- operators -------------------------------------------------------------------------------------------

    def _operator(self, at: int, op: Op) -> None:
        name = name_of(op.func)
        if at in self.recording.reads:
            raise TraceError(_decides(type(self.root).__name__, self.recording.reads[at]))
        if selects(self.recording, op):
            raise TraceError(_counts(type(self.root).__name__, name, op.module))
        if at in self.shortcuts:
            self.nodes[op.outputs[0]] = self._node(self.shortcuts[at])
        elif name in ("dropout", "feature_dropout"):
            kind = nn.Dropout if name == "dropout" else nn.Dropout2d
            self.nodes[op.outputs[0]] = self._new_module(
                f"_dropout_{at}", kind(arguments(op)["p"]), (self._node(op.args[0]),)
            )
        elif name == "batch_norm" and not arguments(op)["training"]:
            self._batch_norm(at, op)
        elif self.rewriter.channel_map(op) is not None:
            self._map_channels(at, op)
        else:
            self._function(at, op, name)

    def _batch_norm(self, at: int, op: Op) -> None:
        a = arguments(op)
        tensors = [a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"]]
        module = BatchNorm(a["momentum"], a["eps"])
        nodes = tuple(None if ref is None else self._node(ref) for ref in tensors)
        self.nodes[op.outputs[0]] = self._new_module(f"_batch_norm_{at}", module, nodes)

    def _map_channels(self, at: int, op: Op) -> None:
        found = self.rewriter.channel_map(op)
        assert found is not None
        axis, source, size, rest = found
        node = self._new_module(f"_channels_{at}", ChannelMap(source, size, axis), (self._node(op.args[0]),))
        if any(rest):
            node = self.graph.call_function(aten.constant_pad_nd.default, (node, rest))
        self.nodes[op.outputs[0]] = node

    def _function(self, at: int, op: Op, name: str) -> None:
        args, kwargs = self.changes[at] or (op.args, op.kwargs)
        func: OpOverload[..., Any] = op.func
        if name in SPLITS and self.changes[at] is not None:
            func = aten.split_with_sizes.default
        elif func in (aten.view.default, aten._unsafe_view.default):
            func = aten.reshape.default  # tensors with data may lie in memory in another order than those without
        elif func._schema.is_mutable and self.shortcuts and not op.aliases:
            func = _out_of_place(func)
        if self.doubled is not None:
            args, kwargs = self._count_batch(at, op, (args, kwargs))
        node = self.graph.call_function(func, self._nodes(args), self._nodes(kwargs))
        several = len(func._schema.returns) > 1 or "[]" in str(func._schema.returns[0].type)
        several = several or isinstance(func._schema.returns[0].type, torch.ListType)
        for place, number in enumerate(op.outputs):
            if number >= 0:
                out = self.graph.call_function(operator.getitem, (node, place)) if several else node
                self.nodes[number] = out

    def _count_batch(self, at: int, op: Op, new: Arguments) -> Arguments:
        """Replace sizes that doubled with the batch by multiples of the input's own batch."""
        assert self.doubled is not None
        twin = self.doubled.ops[at]
        args: tuple[Any, ...] = self._scaled(op.args, twin.args, new[0])
        kwargs: dict[str, Any] = self._scaled(op.kwargs, twin.kwargs, new[1])
        return args, kwargs

    def _scaled(self, old: Any, twice: Any, new: Any) -> Any:
        if type(old) is int and type(new) is int:
            return self._times_batch(new) if old != twice and twice == 2 * old else new
        if isinstance(old, dict) and isinstance(new, dict):
            return {k: self._scaled(old.get(k), twice.get(k), v) for k, v in new.items()}
        if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
            return type(new)(self._scaled(o, t, n) for o, t, n in zip(old, twice, new, strict=True))
        return new

    def _times_batch(self, size: int) -> fx.Node:
        batch = self.graph.call_method("size", (self.first_input, 0))
        if size == self.batch_size:
            return batch
        scaled = self.graph.call_function(operator.mul, (batch, size))
        return self.graph.call_function(operator.floordiv, (scaled, self.batch_size))


def _is_layer(part: nn.Module) -> bool:
    """One of PyTorch's own layers, whose sizes are set with its tensors."""
    home = type(part).__module__
    return home.startswith("torch.nn") and not isinstance(part, nn.MultiheadAttention) and "transformer" not in home


def _decides(name: str, line: str) -> str:
    return (
        f"{name} has sizes written into its forward, so that only its recorded operators can be cut, and it decides on "
        f"the data at {line}, which recorded operators cannot. Freeze the channels before that line with --frozen "
        "MODULE, or move the decision out, into a wrapper around the network."
    )


def _counts(name: str, operator_name: str, module: str) -> str:
    return (
        f"how many values {name} goes on with is decided by its data, at the operator {operator_name}"
        f"{f' in {module}' if module else ''}: its forward does not follow the cut as it is, and its recorded "
        "operators hold the sizes of one input. Move that part out, into a wrapper around the network, or freeze the "
        "channels before it with --frozen MODULE."
    )


def _leaves(tree: Any) -> list[Ref]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Ref)]


def _out_of_place(func: OpOverload[..., Any]) -> OpOverload[..., Any]:
    packet = getattr(aten, name_of(func), None)
    found = getattr(packet, func._overloadname, None)
    return found if found is not None else func
