"""Is a recording of this very network? Names and shapes alone do not tell: the layers may run in another order.

The network is recorded again: on twice the batch, which also shows what counts it, or on its example where that fails.
What is compared is how the input flows: which operators it passes, with which parameters and which numbers. What a
network works out of constants alone is left aside, since it may be kept from one call to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SurgeryError, TraceError
from ..graph import Example, as_call
from ..graph.record import record
from ..graph.recording import Op, Recording, refs_in
from ..graph.rules import has_rule, name_of
from .rewrite import COMPARED, NUMBERS, SEQUENCES

COUNTING = ("view", "_unsafe_view", "reshape", "unflatten", "expand", "repeat", "zeros", "new_zeros")
Source = int | frozenset[str]  # of a value: its number along the way of the input, or the parameters it is made of
NOTHING: frozenset[str] = frozenset()
Step = tuple[Op | None, tuple[Source, ...]]  # an operator and what it reads; last, None and what the network returns


def doubled(model: nn.Module, example: Example, recording: Recording) -> Recording | None:
    """The recording on twice the batch; None where the network takes one batch size only.

    Raises:
        SurgeryError: the recording is of another network.
    """
    larger = _larger(model, example, recording)
    if larger is None or difference(recording, larger, twice=True):
        told = difference(recording, record(model, example, has_rule, like=recording), twice=False)
        if told:
            raise SurgeryError(f"this plan belongs to another network: {told}. Trace this model and plan again.")
    same = larger is not None and [op.func for op in larger.ops] == [op.func for op in recording.ops]
    return larger if same else None


def _larger(model: nn.Module, example: Example, recording: Recording) -> Recording | None:
    def double(item: Any) -> Any:
        return torch.cat([item, item]) if isinstance(item, Tensor) and item.dim() else item

    args, kwargs = as_call(example)
    inputs = tuple(map(double, args)) or {k: double(v) for k, v in kwargs.items()}
    try:
        return record(model, inputs, has_rule, like=recording)
    except TraceError:
        return None


def difference(planned: Recording, found: Recording, twice: bool) -> str:
    """Where the input first flows another way; "" where it never does.

    Args:
        planned: the recording that is in question.
        found: the network's.
        twice: `found` is on twice the batch: sizes may be twice as large.
    """
    for at, (ours, theirs) in enumerate(zip_longest(_steps(planned), _steps(found))):
        if ours is None or theirs is None or not _alike(ours, theirs, twice):
            return f"step {at + 1} of its input is {_said(ours)}, in this network it is {_said(theirs)}"
    return ""


def _steps(recording: Recording) -> Iterator[Step]:
    sources: dict[int, Source] = {number: at for at, number in enumerate(recording.inputs)}
    sources |= {number: frozenset([name]) for name, number in recording.state.items()}
    count = len(recording.inputs)
    for op in recording.ops:
        read = tuple([sources.get(ref.value, NOTHING) for ref in op.refs])
        names = [source for source in read if isinstance(source, frozenset)]
        if len(names) == len(read):
            sources |= dict.fromkeys(op.outputs, NOTHING.union(*names))
            continue
        yield op, read
        sources |= {number: count + at for at, number in enumerate(op.outputs)}
        count += len(op.outputs)
    yield None, tuple([sources.get(ref.value, NOTHING) for ref in refs_in(recording.output)])


def _alike(ours: Step, theirs: Step, twice: bool) -> bool:
    first, second = ours[0], theirs[0]
    if first is None or second is None or ours[1] != theirs[1]:
        return first is second and ours[1] == theirs[1]
    twice = twice and name_of(first.func) in COUNTING
    return (
        first.func is second.func
        and _same(first.args, second.args, twice)
        and _same(first.kwargs, second.kwargs, twice)
    )


def _same(ours: Any, theirs: Any, twice: bool) -> bool:
    """Do two trees of arguments hold the same numbers and words, or integers twice as large?"""
    have, want = type(ours), type(theirs)
    if have in NUMBERS and want in NUMBERS:
        both_nan = ours != ours and theirs != theirs
        return bool(ours == theirs or both_nan or (twice and have is int and theirs == 2 * ours))
    if have in SEQUENCES and want in SEQUENCES:
        return len(ours) == len(theirs) and all(_same(a, b, twice) for a, b in zip(ours, theirs, strict=True))
    if have is dict and want is dict:
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key], twice) for key in ours)
    return have not in COMPARED and want not in COMPARED


def _said(step: Step | None) -> str:
    """A step in words."""
    if step is None:
        return "nothing more"
    op, read = step
    if op is None:
        return "the output"
    names = sorted({name for source in read if isinstance(source, frozenset) for name in source})
    numbers = [repr(item) for item in op.args if type(item) in NUMBERS | SEQUENCES and not refs_in(item)]
    said = name_of(op.func) + (f" with {', '.join(names)}" if names else "")
    return said + (f" ({', '.join(numbers)})" if numbers else "")
