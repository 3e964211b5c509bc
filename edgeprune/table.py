"""A latency table: what layers cost on one device, at the widths that plans may choose.

Latency is a staircase in output channels and nearly linear in input channels, and the steps depend on runtime,
operator and precision. So every output width that a plan may choose is measured; input widths are measured at a few
points and interpolated. A query outside what was measured is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .errors import TableError
from .records import Fingerprint, Layer, LayerShape, Timing
from .widths import shape_at, size

Floats = NDArray[np.float64]
IN_POINTS = 4  # input widths measured, between the least and the full one
OUT_POINTS = 4  # output widths at which they are measured


@dataclass(frozen=True)
class Correction:
    """From summed layers to a whole network: overhead_ms + scale * sum + per_mib_ms * weights in MiB.

    The errors are relative, of networks that the numbers were not fitted on.
    """

    overhead_ms: float
    scale: float
    per_mib_ms: float
    networks: int
    median_error: float
    worst_error: float


IDENTITY = Correction(0.0, 1.0, 0.0, 0, float("nan"), float("nan"))


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Timings of layers on one device."""

    fingerprint: Fingerprint
    timings: Mapping[LayerShape, Timing]
    correction: Correction

    def median_ms(self, shape: LayerShape) -> float:
        """One measured layer; raises TableError when it was not measured."""
        timing = self.timings.get(shape)
        if timing is None:
            raise TableError(
                f"the latency table of {self.fingerprint.device} has no {shape.op} {shape.in_ch} -> {shape.out_ch} at "
                f"{'x'.join(map(str, shape.spatial))}; run `edgeprune profile` to measure it"
            )
        return timing.median_ms


@dataclass(frozen=True, eq=False)
class Surface:
    """One layer's latency over its input and output widths, from the points of a table."""

    layer: Layer
    ins: tuple[int, ...]  # measured input widths, ascending
    outs: tuple[int, ...]  # measured output widths, ascending
    table: LatencyTable

    def at(self, in_ch: int, out_ch: int) -> float:
        """Milliseconds; 0 for a layer that is gone.

        Raises:
            TableError: the width lies outside what was measured.
        """
        if in_ch == 0 or out_ch == 0:
            return 0.0
        if follows_input(self.layer):
            return self._between(in_ch)
        out = next((o for o in self.outs if o >= out_ch), None)
        if out is None or in_ch > self.ins[-1] or in_ch < self.ins[0]:
            raise TableError(
                f"{self.layer.name}: {in_ch} -> {out_ch} channels lies outside the measured {self.ins[0]}.."
                f"{self.ins[-1]} -> {self.outs[0]}..{self.outs[-1]}; profile again with these widths"
            )
        return self._full[out] * self._ratio(in_ch, out)

    @cached_property
    def _full(self) -> dict[int, float]:
        """Latency of each output width at the full input width."""
        return {o: self.table.median_ms(_shape(self.layer, self.ins[-1], o)) for o in self.outs}

    @cached_property
    def _ratios(self) -> tuple[Floats, Floats]:
        """(output widths), (output widths, input widths): latency relative to the full input width."""
        some = spread(self.outs, OUT_POINTS)
        rows = [[self.table.median_ms(_shape(self.layer, i, o)) / self._full[o] for i in self.ins] for o in some]
        return np.array(some, dtype=float), np.array(rows)

    def _ratio(self, in_ch: int, out_ch: int) -> float:
        some, rows = self._ratios
        at_each = np.array([np.interp(in_ch, self.ins, row) for row in rows])
        return float(np.interp(out_ch, some, at_each))

    def _between(self, channels: int) -> float:
        """Channelwise layers: one curve, linear between its points."""
        if not self.ins[0] <= channels <= self.ins[-1]:
            raise TableError(f"{self.layer.name}: {channels} channels lie outside {self.ins[0]}..{self.ins[-1]}")
        return float(np.interp(channels, self.ins, self._curve))

    @cached_property
    def _curve(self) -> Floats:
        return np.array([self.table.median_ms(_shape(self.layer, i, i)) for i in self.ins])


def surface(table: LatencyTable, layer: Layer, candidates: Mapping[str, Sequence[int]]) -> Surface:
    """The latency surface of one layer over the widths that its groups may take."""
    ins, outs = grid(layer, candidates)
    return Surface(layer, ins, outs, table)


def grid(layer: Layer, candidates: Mapping[str, Sequence[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The input and output widths at which a layer is measured, ascending."""
    ins, outs = _reach(layer, candidates, "in"), _reach(layer, candidates, "out")
    if follows_input(layer):
        return (ins, ins)
    return tuple(int(i) for i in spread(ins, IN_POINTS)), outs


def points(layer: Layer, candidates: Mapping[str, Sequence[int]]) -> list[LayerShape]:
    """What has to be measured for a layer: all output widths at the full input, a few at fewer inputs."""
    ins, outs = grid(layer, candidates)
    if follows_input(layer):
        return [_shape(layer, i, i) for i in ins]
    full = [_shape(layer, ins[-1], o) for o in reversed(outs)]
    rest = [_shape(layer, i, o) for o in spread(outs, OUT_POINTS) for i in ins[:-1]]
    return full + rest


def follows_input(layer: Layer) -> bool:
    """Depthwise convolutions, whole cut groups, pooling ...: one width, not two."""
    return bool(layer.groups_width.terms) or layer.shape.op not in ("conv", "conv_transpose", "linear")


def spread(values: Sequence[int], count: int) -> tuple[int, ...]:
    """At most `count` of ascending values, evenly spread, both ends among them."""
    if len(values) <= count:
        return tuple(values)
    places = np.unique(np.round(np.linspace(0, len(values) - 1, count)).astype(int))
    return tuple(values[p] for p in places)


def _reach(layer: Layer, candidates: Mapping[str, Sequence[int]], side: str) -> tuple[int, ...]:
    """The widths one side can take: exactly for one group, on a grid of 16 channels for several."""
    width = layer.in_width if side == "in" else layer.out_width
    if not width.terms:
        return (width.fixed,)
    if len(width.terms) == 1:
        ((group, per_unit),) = width.terms
        return tuple(sorted({width.fixed + per_unit * u for u in candidates[group] if u}))
    least = size(width, {g: min(u for u in candidates[g] if u) for g, _ in width.terms})
    most = size(width, {g: max(candidates[g]) for g, _ in width.terms})
    empty = any(0 in candidates[g] for g, _ in width.terms)
    least = max(width.fixed, 1) if empty else least
    step = max(1, -(-(most - least) // 16))
    return tuple(sorted({*range(most, least, -step), least}))


def _shape(layer: Layer, in_ch: int, out_ch: int) -> LayerShape:
    shape = layer.shape
    if follows_input(layer):
        groups = shape.conv_groups * in_ch // shape.in_ch if layer.groups_width.terms else shape.conv_groups
        return replace(shape, in_ch=in_ch, out_ch=shape.out_ch * in_ch // shape.in_ch, conv_groups=groups)
    return replace(shape, in_ch=in_ch, out_ch=out_ch)


# ---- whole networks ------------------------------------------------------------------------------------------


def weights_mib(shape: LayerShape) -> float:
    """MiB of 32-bit weights that a layer reads."""
    if shape.op not in ("conv", "conv_transpose", "linear"):
        return 0.0
    kernel = float(np.prod(shape.kernel)) if shape.kernel else 1.0
    return shape.in_ch * shape.out_ch * kernel / max(shape.conv_groups, 1) * 4 / 2**20


def summed_ms(surfaces: Iterable[Surface], units: Mapping[str, int]) -> float:
    """Layer by layer, without correction."""
    return sum(s.at(shape.in_ch, shape.out_ch) for s in surfaces for shape in (shape_at(s.layer, units),))


def predict_ms(surfaces: Sequence[Surface], units: Mapping[str, int]) -> float:
    """A whole network under a plan, with the table's correction."""
    if not surfaces:
        return 0.0
    c = surfaces[0].table.correction
    mib = sum(weights_mib(shape_at(s.layer, units)) for s in surfaces)
    return c.overhead_ms + c.scale * summed_ms(surfaces, units) + c.per_mib_ms * mib


def fit(summed: Floats, mib: Floats, measured_ms: Floats) -> Correction:
    """The correction that explains whole networks, and its error on each when fitted on the others.

    Args:
        summed: table sums, (networks,).
        mib: weights, (networks,).
        measured_ms: end to end, (networks,).
    """
    numbers = _least_squares(summed, mib, measured_ms)
    errors = []
    for left_out in range(len(measured_ms)):
        rest = np.arange(len(measured_ms)) != left_out
        if rest.sum() < 3:
            continue
        o, s, m = _least_squares(summed[rest], mib[rest], measured_ms[rest])
        predicted = o + s * summed[left_out] + m * mib[left_out]
        errors.append(abs(predicted / measured_ms[left_out] - 1))
    worst, median = (max(errors), float(np.median(errors))) if errors else (float("nan"), float("nan"))
    return Correction(*numbers, len(measured_ms), median, worst)


def _least_squares(summed: Floats, mib: Floats, measured_ms: Floats) -> tuple[float, float, float]:
    """Non-negative least squares of relative errors."""
    from scipy.optimize import nnls

    columns = np.stack([np.ones_like(summed), summed, mib], axis=1)[:, : min(3, len(summed))]
    if len(summed) < 3:
        return 0.0, float(np.median(measured_ms / summed)), 0.0
    found, _ = nnls(columns / measured_ms[:, None], np.ones_like(measured_ms))
    if found[1] <= 0:  # the sum must count, or plans could not be told apart
        return 0.0, float(np.median(measured_ms / summed)), 0.0
    return float(found[0]), float(found[1]), float(found[2])
