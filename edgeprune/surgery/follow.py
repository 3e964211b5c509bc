"""Does a cut module's own `forward` do, operator by operator, what the cut makes of the dense network's?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..graph import ModelGraph, as_call
from ..graph.copies import Parts, switch
from ..graph.dataless import Dataless
from ..graph.record import undisturbed
from ..graph.recording import Op, Ref
from ..graph.rules import has_rule, name_of
from ..graph.run import signature
from .rewrite import SELECTING, Rewriter, alike, selects

SHAPES_TELL = ("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split", "new_zeros", "zeros")


def fits(copied: Parts, graph: ModelGraph, rewriter: Rewriter) -> bool:
    """Run the module, with sliced tensors, as the dense network was recorded: with data or without.

    Each operator has to read the parameters that the recorded one read: the same shapes alone may be another network's.
    """
    args, kwargs = as_call(graph.example)
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    dataless = None if rewriter.recording.with_data else Dataless.beside(leaves)
    if dataless is not None:
        args, kwargs = dataless.example((args, kwargs))
    follower = _Follower(rewriter, copied.state, dataless)
    try:
        with undisturbed(), follower:
            switch(copied, False)(*args, **kwargs)
    except Exception:  # whatever a forward raises that meets sizes it does not expect
        return False
    return follower.arrived


class _Astray(Exception):
    """Another operator than the one that was expected."""


class _Follower(TorchDispatchMode):
    """Holds each operator against the recorded one."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self, rewriter: Rewriter, state: Mapping[str, Tensor], dataless: Dataless | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rewriter, self._state, self._dataless = rewriter, state, dataless
        decision = min(rewriter.recording.reads, default=None)  # what follows is frozen, whichever way it goes
        self._free = decision is not None
        self._expected = rewriter.recording.ops[:decision]
        self._at = 0
        self._counted: set[int] = set()  # values of which there are as many as the data decides

    @property
    def arrived(self) -> bool:
        return self._at == len(self._expected)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        dense = self._expected[self._at] if self._at < len(self._expected) else None
        as_recorded = dense is not None and func is dense.func  # it was not decomposed then
        if not as_recorded and not has_rule(func) and func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if dense is None and self._free:
            return func(*args, **kwargs)
        if dense is None or not as_recorded or not self._reads(args, dense.args):
            raise _Astray(func)
        name = name_of(func)
        counted = bool(self._counted) and any(ref.value in self._counted for ref in dense.refs)
        if not counted and not _same_arguments(name, args, kwargs, dense, self._rewriter):
            raise _Astray(func)
        values = self._rewriter.recording.values
        if self._dataless is None:
            result = func(*args, **kwargs)
        else:
            from_input = True in [values[ref.value].from_input for ref in dense.refs]
            result = self._dataless.call(func, args, kwargs, from_input)
        leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)
        counted = counted or (name in SELECTING and selects(self._rewriter.recording, dense))
        for leaf, number in zip(leaves, dense.outputs, strict=True):
            if counted and self._untouched(dense, number):
                self._counted.add(number)
            elif number >= 0 and leaf.shape != self._rewriter.shape(number):
                raise _Astray(func)
        self._at += 1
        return result

    def _untouched(self, dense: Op, number: int) -> bool:
        """Does the cut leave an operator and its result alone? Then the data may decide how many values there are."""
        same = number < 0 or self._rewriter.shape(number) == self._rewriter.recording.values[number].shape
        return same and self._rewriter.changed(dense) is None

    def _reads(self, given: Sequence[Any], expected: Sequence[Any]) -> bool:
        """Are the parameters and buffers among the arguments those of the recorded names?"""
        values = self._rewriter.recording.values
        for tensor, ref in zip(given, expected, strict=False):
            kind = type(ref)
            if kind is Ref:
                value = values[ref.value]
                if value.source == "state" and tensor is not self._state.get(value.name):
                    return False
            elif kind is list and ref and type(ref[0]) is Ref and not self._reads(tensor, ref):
                return False
        return True


def _same_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], dense: Op, rewriter: Rewriter) -> bool:
    """Sizes, starts, groups and scales as the cut expects; how an axis is split shows in the shapes."""
    if name in SHAPES_TELL:
        return True
    expected = rewriter.changed(dense) or (dense.args, dense.kwargs)
    if name == "slice":
        names, _ = signature(dense.func)
        starts = [dict(zip(names, given, strict=False)).get("start") or 0 for given in (args, expected[0])]
        return bool(starts[0] == starts[1])
    return alike(args, expected[0]) and alike(kwargs, expected[1])
