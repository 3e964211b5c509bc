"""A latency table: what layers cost on one device, at the widths that plans may choose.

Latency is a staircase in output channels and nearly linear in input channels, and the steps depend on runtime,
operator and precision. So the steps are looked for: a coarse grid is measured first, then more widths wherever the
curve bends. What lies between points on a line is interpolated; a query outside what was measured is refused.
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
COARSE = 5  # output widths measured of every layer
IN_COARSE, OUT_ROWS = 4, 3  # input widths, and output widths at which they are measured
STEEP = 1.7  # of a stair, over the slope of the whole curve
STRAIGHT = 0.02  # a curve bends where it is this far off the line between its neighbours


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
    ins: tuple[int, ...]  # input widths that plans may choose, ascending
    outs: tuple[int, ...]  # output widths, ascending
    table: LatencyTable

    def at(self, in_ch: int, out_ch: int) -> float:
        """Milliseconds; 0 for a layer that is gone. Between the widths of plans, an output counts as the next one up.

        Raises:
            TableError: the width lies outside what was measured.
        """
        if in_ch == 0 or out_ch == 0:
            return 0.0
        if follows_input(self.layer):
            out_ch = in_ch
        out = next((o for o in self.outs if o >= out_ch), None)
        if out is None or in_ch > self.ins[-1] or in_ch < self.ins[0]:
            raise TableError(
                f"{self.layer.name}: {in_ch} -> {out_ch} channels lies outside the measured {self.ins[0]}.."
                f"{self.ins[-1]} -> {self.outs[0]}..{self.outs[-1]}; profile again with these widths"
            )
        if follows_input(self.layer):
            return float(np.interp(in_ch, *self.curve))
        return self._at_input(in_ch, float(np.interp(out, *self.curve)))

    @cached_property
    def curve(self) -> tuple[Floats, Floats]:
        """Measured output widths at the full input width, ascending, and their milliseconds."""
        known = [(o, self.ms_at(self._full_in(o), o)) for o in self.outs]
        measured = [(o, ms) for o, ms in known if ms is not None]
        if not measured or measured[-1][0] != self.outs[-1] or measured[0][0] != self.outs[0]:
            self.table.median_ms(_shape(self.layer, self.ins[-1], self.outs[-1]))
            self.table.median_ms(_shape(self.layer, self._full_in(self.outs[0]), self.outs[0]))
        widths, ms = zip(*measured, strict=True)
        return np.array(widths, dtype=float), np.array(ms)

    def _full_in(self, out_ch: int) -> int:
        return out_ch if follows_input(self.layer) else self.ins[-1]

    def ms_at(self, in_ch: int, out_ch: int) -> float | None:
        """What was measured at exactly these widths, if anything."""
        timing = self.table.timings.get(_shape(self.layer, in_ch, out_ch))
        return timing.median_ms if timing is not None else None

    def _at_input(self, in_ch: int, full_ms: float) -> float:
        """Latency at an input width, of an output width that takes `full_ms` at the full one.

        At each input width it is nearly linear in `full_ms`, whatever the staircase looks like: latency is a constant
        and a part that grows with input channels times output steps.
        """
        full, rows = self._rows
        inside = float(np.clip(full_ms, full[0], full[-1]))
        return float(np.interp(inside, full, [np.interp(in_ch, *row) for row in rows])) * full_ms / inside

    @cached_property
    def _rows(self) -> tuple[Floats, list[tuple[Floats, Floats]]]:
        """For some output widths: milliseconds at the full input width, ascending; input widths and milliseconds."""
        found = []
        for out in self.outs:
            points = [(i, ms) for i in self.ins if (ms := self.ms_at(i, out)) is not None]
            if points and points[0][0] == self.ins[0] and points[-1][0] == self.ins[-1]:
                widths, ms = np.array(points, dtype=float).T
                found.append((float(ms[-1]), widths, ms))
        if not found:
            self.table.median_ms(_shape(self.layer, self.ins[0], self.outs[-1]))
        found.sort(key=lambda row: row[0])
        return np.array([row[0] for row in found]), [(widths, ms) for _, widths, ms in found]


def surface(table: LatencyTable, layer: Layer, candidates: Mapping[str, Sequence[int]]) -> Surface:
    """The latency surface of one layer over the widths that its groups may take."""
    return Surface(layer, *reach(layer, candidates), table)


def reach(layer: Layer, candidates: Mapping[str, Sequence[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The input and output widths that a layer can take, ascending."""
    ins = _reach(layer, candidates, "in")
    return ins, ins if follows_input(layer) else _reach(layer, candidates, "out")


# ---- what to measure -----------------------------------------------------------------------------------------


def wanted(one: Surface) -> list[LayerShape]:
    """What has to be measured next for a layer; nothing when its table is good.

    First the dense layer; then a coarse grid of output and input widths; then between widths around which the curve
    bends, until it does not: where it is a staircase that ends at every width that plans may choose.
    """
    full_in, full_out = one.ins[-1], one.outs[-1]
    follows = follows_input(one.layer)
    coarse = spread(one.outs, COARSE)
    stages = [
        [(full_in, full_out)],
        [(o if follows else full_in, o) for o in reversed(coarse)],
        [] if follows else [(i, o) for o in spread(one.outs, OUT_ROWS) for i in reversed(spread(one.ins, IN_COARSE))],
    ]
    for stage in stages:
        missing = [_shape(one.layer, i, o) for i, o in stage if one.ms_at(i, o) is None]
        if missing:
            return missing
    outs = [(o if follows else full_in, o) for o in between(*one.curve, one.outs)]
    widths, ms = np.array([(i, one.ms_at(i, full_out)) for i in one.ins if one.ms_at(i, full_out)], float).T
    ins = [] if follows else [(i, full_out) for i in between(widths, ms, one.ins)]
    return [_shape(one.layer, i, o) for i, o in dict.fromkeys(outs + ins)]


def known(one: Surface) -> list[LayerShape]:
    """The entries of the table that a surface rests on."""
    follows = follows_input(one.layer)
    pairs = [(o, o) for o in one.outs] if follows else [(i, o) for o in one.outs for i in one.ins]
    return [_shape(one.layer, i, o) for i, o in pairs if one.ms_at(i, o) is not None]


def between(widths: Floats, ms: Floats, choices: Sequence[int]) -> list[int]:
    """Widths to measure next: in the middle of the gaps beside a width at which the curve bends.

    Args:
        widths, ms: of a curve, ascending, (points,) each.
        choices: widths that may be measured.
    """
    bends = np.zeros(len(widths), dtype=bool)
    for at in range(1, len(widths) - 1):
        line = np.interp(widths[at], widths[[at - 1, at + 1]], ms[[at - 1, at + 1]])
        bends[at] = abs(line - ms[at]) > STRAIGHT * ms[at]
    found = []
    for at in range(len(widths) - 1):
        inside = [c for c in choices if widths[at] < c < widths[at + 1]]
        if inside and (bends[at] or bends[at + 1]):
            found.append(inside[len(inside) // 2])
    return found


def jumps(widths: Sequence[int], ms: Sequence[float]) -> list[tuple[int, int]]:
    """The stairs of a curve: pairs of neighbouring widths between which latency rises steeply.

    Steep is 1.7 times what the whole curve rises over as many channels, and more than entries are uncertain.

    Args:
        widths, ms: of a curve, ascending.
    """
    whole = (ms[-1] - ms[0]) / max(widths[-1] - widths[0], 1)
    found = []
    for at in range(len(widths) - 1):
        rise, gap = ms[at + 1] - ms[at], widths[at + 1] - widths[at]
        if rise > STEEP * max(whole, 0.0) * gap and rise > STRAIGHT * ms[at + 1]:
            found.append((widths[at], widths[at + 1]))
    return found


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


def layer_ms(one: Surface, in_ch: int, out_ch: int) -> float:
    """A layer's share of a whole network's latency: its entry with the table's correction."""
    c = one.table.correction
    return c.scale * one.at(in_ch, out_ch) + c.per_mib_ms * weights_mib(_shape(one.layer, in_ch, out_ch))


def sums(surfaces: Iterable[Surface], units: Mapping[str, int]) -> tuple[float, float]:
    """Of a plan's layers, without correction: milliseconds, MiB of weights."""
    ms, mib = 0.0, 0.0
    for one in surfaces:
        shape = shape_at(one.layer, units)
        ms += one.at(shape.in_ch, shape.out_ch)
        mib += weights_mib(shape)
    return ms, mib


def predict_ms(surfaces: Sequence[Surface], units: Mapping[str, int]) -> float:
    """A whole network under a plan, with the table's correction."""
    if not surfaces:
        return 0.0
    c = surfaces[0].table.correction
    ms, mib = sums(surfaces, units)
    return c.overhead_ms + c.scale * ms + c.per_mib_ms * mib


def fit(summed: Floats, measured_ms: Floats) -> Correction:
    """The correction that explains whole networks, and its error on each when fitted on the others.

    Args:
        summed: what `sums` gives for each, (networks, 2).
        measured_ms: end to end, (networks,).
    """
    numbers = _least_squares(summed, measured_ms)
    errors = []
    for left_out in range(len(measured_ms)):
        rest = np.arange(len(measured_ms)) != left_out
        if rest.sum() < 3:
            continue
        overhead, *scales = _least_squares(summed[rest], measured_ms[rest])
        predicted = overhead + float(np.dot(scales, summed[left_out]))
        errors.append(abs(predicted / measured_ms[left_out] - 1))
    worst, median = (max(errors), float(np.median(errors))) if errors else (float("nan"), float("nan"))
    return Correction(*numbers, len(measured_ms), median, worst)


def _least_squares(summed: Floats, measured_ms: Floats) -> tuple[float, float, float]:
    """Non-negative least squares of relative errors."""
    from scipy.optimize import nnls

    if len(summed) >= 3:
        columns = np.concatenate([np.ones((len(summed), 1)), summed], axis=1)
        found, _ = nnls(columns / measured_ms[:, None], np.ones_like(measured_ms))
        if found[1] > 0:  # the sum must count, or plans could not be told apart
            return float(found[0]), float(found[1]), float(found[2])
    return 0.0, float(np.median(measured_ms / summed[:, 0])), 0.0
