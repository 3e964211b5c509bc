"""What a plan must stay within: a budget for something summed over layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from .records import Block, Layer, LayerShape
from .table import reach, weights_mib
from .widths import shape_at


@dataclass(frozen=True, eq=False)
class Part:
    """What one layer adds to a cost, by its input and output channels."""

    layer: Layer
    ins: tuple[int, ...]  # least ... most input channels
    outs: tuple[int, ...]
    at: Callable[[int, int], float]  # 0 for a layer that is gone


@dataclass(frozen=True, eq=False)
class Limit:
    """Something summed over layers that must stay within a budget: latency on a device, bytes."""

    name: str  # with its unit, for messages
    parts: tuple[Part, ...]
    constant: float
    budget: float

    def predict(self, units: Mapping[str, int], blocks: Sequence[Block]) -> float:
        gone = dropped_layers(blocks, units)
        shapes = ((p, shape_at(p.layer, units)) for p in self.parts if p.layer.name not in gone)
        return self.constant + sum(p.at(shape.in_ch, shape.out_ch) for p, shape in shapes)


def dropped_layers(blocks: Iterable[Block], units: Mapping[str, int]) -> set[str]:
    """Layers of blocks whose groups are all gone."""
    return {name for b in blocks if all(units[g] == 0 for g in b.groups) for name in b.layers}


def size_limit(
    layers: Sequence[Layer],
    candidates: Mapping[str, tuple[int, ...]],
    dense: Mapping[str, int],
    dense_bytes: int,
    budget_bytes: float,
) -> Limit:
    """The size of the exported file as a budget.

    Args:
        layers: all of the network.
        candidates: widths that plans may choose; a later step offers fewer.
        dense: units of the uncut network.
        dense_bytes: of the uncut network's file: what its layers' weights do not explain stays.
        budget_bytes: for the file.
    """
    every = {g: tuple(sorted({*widths, dense[g]})) for g, widths in candidates.items()}
    parts = tuple(Part(layer, *reach(layer, every), partial(_bytes_at, layer)) for layer in layers)
    rest = dense_bytes - Limit("", parts, 0.0, 0.0).predict(dense, ())
    return Limit("size in bytes", parts, rest, budget_bytes)


def _bytes_at(layer: Layer, in_ch: int, out_ch: int) -> float:
    return 2**20 * weights_mib(_resized(layer, in_ch, out_ch))


def _resized(layer: Layer, in_ch: int, out_ch: int) -> LayerShape:
    shape = layer.shape
    groups = shape.conv_groups * in_ch // shape.in_ch if layer.groups_width.terms else shape.conv_groups
    return replace(shape, in_ch=in_ch, out_ch=out_ch, conv_groups=groups)
