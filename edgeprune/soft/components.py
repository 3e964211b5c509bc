"""Parts of a network that belong together (encoder, dynamics, decoder), and which channel groups cross between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..graph import ModelGraph

Components = Mapping[str, Sequence[str]]  # name -> module paths


@dataclass(frozen=True)
class Place:
    """Where a group's channels are made, scaled and read."""

    components: tuple[str, ...]  # in the network's order

    @property
    def crosses(self) -> bool:
        """Is it a boundary between components?"""
        return len(self.components) > 1


def of(graph: ModelGraph, named: Components | None = None) -> dict[str, tuple[str, ...]]:
    """The components of a network: those that are named, then every outermost module that none of them names.

    Args:
        graph: of the network.
        named: component -> module paths that belong to it; the longest path that fits decides.
    Raises:
        UsageError: a path without parameters under it, or one that is in two components.
    """
    tensors = [axis.name for axis in graph.trace.axes]
    outermost = list(dict.fromkeys(name.partition(".")[0] for name in tensors))
    found: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    for name, paths in (named or {}).items():
        for path in paths:
            if not any(t.startswith(f"{path}.") for t in tensors):
                known = ", ".join(outermost)
                raise UsageError(
                    f"soft.components: {name} names {path!r}, where no module has parameters; the outermost are {known}"
                )
            if path in owner:
                raise UsageError(
                    f"soft.components: {path!r} is in {owner[path]} and in {name}; leave it in one of them"
                )
            owner[path] = name
        found[name] = tuple(paths)
    for child in outermost:
        if child not in owner and child not in found:
            found[child] = (child,)
    return found


def places(graph: ModelGraph, components: Components) -> dict[str, Place]:
    """For each group the components that its tensors lie in."""
    order = {name: at for at, name in enumerate(components)}
    found = {}
    for group in graph.groups:
        names = {_owner(member.tensor, components) for member in group.members}
        found[group.id] = Place(tuple(sorted(names, key=lambda n: (order.get(n, len(order)), n))))
    return found


def _owner(tensor: str, components: Components) -> str:
    """The component whose path is the longest that the tensor lies under."""
    hits = [(len(p), name) for name, paths in components.items() for p in paths if tensor.startswith(f"{p}.")]
    return max(hits)[1] if hits else tensor.partition(".")[0]
