"""A network's forward pass as data: a list of operators over numbered values.

What a network has hundreds of is a NamedTuple, which takes a third of the time that a frozen dataclass takes to make.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload


@dataclass(frozen=True)
class Ref:
    """Stands for value number `value` in the arguments of an operator."""

    value: int


def refs_in(tree: Any) -> list[Ref]:
    """All references in a tree of arguments, in order."""
    if isinstance(tree, Ref):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [ref for item in tree for ref in refs_in(item)]


class Value(NamedTuple):
    """A tensor seen while recording."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str  # "op", "input", "constant", or "state" for a parameter or buffer
    name: str  # of the parameter or buffer, else ""
    from_input: bool  # depends on the network's input
    constant: Tensor | None  # the data itself, kept for constants and integer buffers only


class Op(NamedTuple):
    """One operator call."""

    func: OpOverload[..., Any]
    args: tuple[Any, ...]  # tensors replaced by Ref
    kwargs: dict[str, Any]
    refs: tuple[Ref, ...]  # all tensor operands, in order, those inside lists too
    outputs: tuple[int, ...]  # value numbers, -1 for an output that is no tensor
    module: str  # path of the innermost module that was running
    aliases: bool  # wrote into a view of another tensor


class Call(NamedTuple):
    """One call of a submodule: the operators `first <= i < last` ran inside."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any  # tensors replaced by Ref
    first: int
    last: int


@dataclass
class Recording:
    """A network's forward pass as data."""

    ops: list[Op] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    output: Any = None  # the forward's result, tensors replaced by Ref
    state: dict[str, int] = field(default_factory=dict)  # parameter or buffer name -> value number
    parameters: tuple[str, ...] = ()  # the names in `state` that are parameters
    reads: dict[int, str] = field(default_factory=dict)  # op index -> where a scalar was read from data
    training: bool = False
    with_data: bool = False  # whether the tensors that depend on the input had data

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter and buffer."""
        return {name: self.values[number].shape for name, number in self.state.items()}
