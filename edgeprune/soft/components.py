"""Parts of a network that belong together (encoder, dynamics, decoder), and which channel groups cross between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import UsageError
from ..records import ChannelGroup

Components = Mapping[str, Sequence[str]]  # name -> module paths


@dataclass(frozen=True)
class Place:
    """Where a group's channels are made, scaled and read."""

    components: tuple[str, ...]  # in the network's order

    @property
    def crosses(self) -> bool:
        """Is it a boundary between components?"""
        return len(self.components) > 1


def of(model: nn.Module, named: Components | None = None) -> dict[str, tuple[str, ...]]:
    """The components of a network: those that are named, then every top-level module that is in none of them.

    Args:
        model: the network.
        named: component -> module paths that belong to it.
    Raises:
        UsageError: a path that is no module, or that is in two components.
    """
    found = {name: tuple(paths) for name, paths in (named or {}).items()}
    modules = dict(model.named_modules())
    owner: dict[str, str] = {}
    for name, paths in found.items():
        for path in paths:
            if path not in modules or not path:
                known = ", ".join(n for n, _ in model.named_children())
                raise UsageError(
                    f"soft.components: {name} names {path!r}, which is no module; the outermost are {known}"
                )
            if path in owner:
                raise UsageError(
                    f"soft.components: {path!r} is in {owner[path]} and in {name}; leave it in one of them"
                )
            owner[path] = name
    for child, _ in model.named_children():
        if not any(path == child or path.startswith(f"{child}.") for path in owner):
            found.setdefault(child, (child,))
    return found


def places(groups: Sequence[ChannelGroup], components: Components) -> dict[str, Place]:
    """For each group the components that its tensors lie in; a tensor of none counts as one named after it."""
    order = {name: at for at, name in enumerate(components)}
    found = {}
    for group in groups:
        names = {_owner(member.tensor, components) for member in group.members}
        found[group.id] = Place(tuple(sorted(names, key=lambda n: (order.get(n, len(order)), n))))
    return found


def _owner(tensor: str, components: Components) -> str:
    """The component whose path is the longest that the tensor lies under."""
    hits = [(len(p), name) for name, paths in components.items() for p in paths if tensor.startswith(f"{p}.")]
    return max(hits)[1] if hits else tensor.partition(".")[0]
