"""Residual branches that can be dropped whole: what remains is the shortcut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..records import Block, ChannelGroup, Layer
from .recording import Op, Recording, Ref, refs_in
from .rules import name_of, pointwise, rule_for, zero_where
from .run import Run, arguments

LAYERS = ("conv", "linear")  # prefixes of the operators that make a branch worth dropping
SUMS = ("conv", "linear")  # prefixes of products with something added
SCALES = ("batch_norm", "instance_norm", "layer_norm", "rms_norm", "group_norm")
NEVER_ZERO = ("softmax", "log_softmax", "logsumexp", "cumprod")  # of operands that are all zero


@dataclass(frozen=True)
class Branch:
    """The operators that work for one operand of an addition only, and the values they start from."""

    ops: frozenset[int]
    sources: frozenset[int]


def find(
    run: Run, groups: Sequence[ChannelGroup], layers: Sequence[Layer], protected: Sequence[str] = ()
) -> list[Block]:
    """Additions of a branch to what it started from (or to a projection of it), outermost operand first.

    Args:
        run, groups, layers: of the network.
        protected: module paths, or parameter names; a branch that holds one of them stays.
    """
    recording = run.recording
    readers = _readers(recording)
    blocks: list[Block] = []
    for at, op in enumerate(recording.ops):
        operands = op.refs
        if name_of(op.func) != "add" or len(operands) != 2 or operands[0] == operands[1]:
            continue
        branches = [_exclusive(recording, readers, at, ref) for ref in operands]
        dropped = _droppable(recording, operands, branches)
        if dropped is None or not _vanishes(run, readers, branches[dropped], operands[dropped]):
            continue
        tensors = _state(recording, readers, branches[dropped])
        inside = [g.id for g in groups if all(m.tensor in tensors for m in g.members)]
        names = {t.rpartition(".")[0] for t in tensors}
        if inside and not any(lies_in(t, path) for t in tensors for path in protected):
            owned = tuple(dict.fromkeys(x.name for x in layers if x.name in names))
            blocks.append(Block(_unique(op.module, blocks), at, dropped, tuple(inside), owned))
    return blocks


def lies_in(tensor: str, path: str) -> bool:
    """Is the path the tensor's own name, or that of a module which holds it?"""
    return tensor == path or tensor.startswith(f"{path}.")


def _unique(module: str, blocks: Sequence[Block]) -> str:
    taken = sum(1 for b in blocks if b.id.partition("+")[0] == module)
    return module if not taken else f"{module}+{taken}"


def branch_ops(recording: Recording, block: Block) -> frozenset[int]:
    """The operators that dropping a block removes."""
    ref = recording.ops[block.op].refs[block.branch]
    return _exclusive(recording, _readers(recording), block.op, ref).ops


def branch_state(recording: Recording, block: Block) -> set[str]:
    """Parameters and buffers that only the branch uses."""
    ref, readers = recording.ops[block.op].refs[block.branch], _readers(recording)
    return _state(recording, readers, _exclusive(recording, readers, block.op, ref))


def _readers(recording: Recording) -> dict[int, set[int]]:
    readers: dict[int, set[int]] = {}
    for at, op in enumerate(recording.ops):
        for ref in op.refs:
            readers.setdefault(ref.value, set()).add(at)
    for leaf in _output_values(recording):
        readers.setdefault(leaf, set()).add(len(recording.ops))  # the caller reads it
    return readers


def _output_values(recording: Recording) -> set[int]:
    return {ref.value for ref in refs_in(recording.output)}


def _exclusive(recording: Recording, readers: dict[int, set[int]], addition: int, operand: Ref) -> Branch:
    """Operators whose results only the operand needs, walking backwards from the addition."""
    ops: set[int] = set()
    for at in range(addition - 1, -1, -1):
        outputs = [n for n in recording.ops[at].outputs if n >= 0]
        used = set().union(*(readers.get(n, set()) for n in outputs))
        direct = any(addition in readers.get(n, ()) and n != operand.value for n in outputs)
        if used and used <= ops | {addition} and not direct:
            ops.add(at)
    made = {n for at in ops for n in recording.ops[at].outputs}
    read = {ref.value for at in ops for ref in recording.ops[at].refs}
    values = recording.values
    return Branch(frozenset(ops), frozenset(n for n in read - made if values[n].from_input))


def _droppable(recording: Recording, operands: Sequence[Ref], branches: Sequence[Branch]) -> int | None:
    """The operand whose branch can go: the longer one that starts where the other one starts."""
    shapes = {recording.values[ref.value].shape for ref in operands}
    if len(shapes) > 1:
        return None
    candidates = []
    for here, other in ((0, 1), (1, 0)):
        from_there = {operands[other].value} if not branches[other].ops else branches[other].sources
        heavy = sum(1 for at in branches[here].ops if name_of(recording.ops[at].func).startswith(LAYERS))
        if heavy and len(branches[here].sources) == 1 and branches[here].sources == from_there:
            candidates.append((heavy, here))
    return max(candidates)[1] if candidates else None


def _vanishes(run: Run, readers: Mapping[int, set[int]], branch: Branch, operand: Ref) -> bool:
    """Is the branch exactly zero when its own parameters are? Else the addition does more than the shortcut alone."""
    zero = {run.recording.state[name] for name in _state(run.recording, readers, branch)}
    for at in sorted(branch.ops):
        op = run.recording.ops[at]
        if _makes_zero(run, op, [ref.value in zero for ref in op.refs], zero):
            zero.update(op.outputs)
    return operand.value in zero


def _makes_zero(run: Run, op: Op, flags: Sequence[bool], zero: set[int]) -> bool:
    rule = rule_for(op.func)
    if not flags or not any(flags):
        return False
    if rule is pointwise:
        return zero_where(run, op, tuple(flags))
    if all(flags):
        return rule is not None and name_of(op.func) not in NEVER_ZERO
    if name_of(op.func).startswith(SUMS):  # a zero factor is enough, but what is added has to be zero too
        bias = arguments(op).get("bias")
        return bias is None or bias.value in zero
    if name_of(op.func) in SCALES:
        a = arguments(op)
        scales = [a["weight"], a.get("bias")]
        return scales[0] is not None and all(ref is None or ref.value in zero for ref in scales)
    return name_of(op.func) in ("matmul", "bmm")


def _state(recording: Recording, readers: Mapping[int, set[int]], branch: Branch) -> set[str]:
    """Parameters and buffers that only the branch uses."""
    read = {ref.value for at in branch.ops for ref in recording.ops[at].refs}
    values = recording.values
    return {values[n].name for n in read if values[n].source == "state" and readers[n] <= branch.ops}
