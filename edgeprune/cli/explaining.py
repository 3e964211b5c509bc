"""An explanation as text."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from ..explain import Explanation, Stairs, free_speed, saved_share
from ..records import LayerRow

LAYERS = 20  # of a long list
GROUPS = 8
OPERATORS = 8


def text(found: Explanation) -> None:
    """Print it: layers, then what the whole network comes to, then what could change."""
    console = Console(highlight=False)
    console.print(_layers(found))
    for line in [*_sums(found), *_limits(found), *_advice(found), *_inside(found)]:
        console.print(line, soft_wrap=True, markup=False)


def _layers(found: Explanation) -> Table:
    table = Table("layer", "op", "channels", "dense ms", "planned ms", "share", "cannot go", "staircase")
    total = sum(row.layer.planned_ms for row in found.rows) or 1.0
    for row in sorted(found.rows, key=lambda r: -r.layer.planned_ms)[:LAYERS]:
        layer = row.layer
        table.add_row(
            layer.name,
            layer.op,
            _channels(layer),
            f"{layer.dense_ms:.4f}",
            f"{layer.planned_ms:.4f}",
            f"{layer.planned_ms / total:.1%}",
            f"{row.least_ms / layer.dense_ms:.0%}",
            "" if row.stairs is None else standing(row.stairs),
        )
    return table


def _channels(row: LayerRow) -> str:
    dense, planned = f"{row.in_ch} -> {row.out_ch}", f"{row.planned_in} -> {row.planned_out}"
    return dense if dense == planned else f"{dense}, now {planned}"


def standing(stairs: Stairs) -> str:
    """Where a width stands on its staircase, in words."""
    said = []
    if free_speed(stairs):
        said.append(f"{stairs.at} -> {stairs.narrower} would be free speed: {saved_share(stairs):.0%} faster")
    elif stairs.narrower < stairs.at:
        said.append(f"{stairs.at} -> {stairs.narrower} is {saved_share(stairs):.0%} faster")
    if stairs.wider > stairs.at:
        said.append(f"{stairs.at} -> {stairs.wider} costs nothing")
    return ", ".join(said) or "no step near"


def _sums(found: Explanation) -> list[str]:
    dense, planned = (sum(ms) for ms in zip(*((r.layer.dense_ms, r.layer.planned_ms) for r in found.rows), strict=True))
    measured = found.measured
    lines = [
        f"sum of layers: {dense:.4g} ms dense, {planned:.4g} ms now; end to end {measured.dense_ms:.4g} ms dense, "
        f"{measured.planned_ms:.4g} ms now, measured: {_beyond(planned, measured.planned_ms)}"
    ]
    lines.append(
        f"whole networks are predicted at {found.predicted_dense_ms:.4g} ms dense, {found.predicted_ms:.4g} ms now"
        + (f", {found.overhead_ms:.4g} ms of it whatever the widths" if found.overhead_ms else "")
    )
    if found.untimed:
        counted = Counter(op for _, op in found.untimed)
        each = ", ".join(f"{op} ({n})" if n > 1 else op for op, n in counted.most_common())
        lines.append(f"not in the table, only in the end-to-end latency: {each}")
    return lines


def _beyond(summed: float, measured: float) -> str:
    more = measured - summed
    what = "outside the layers: reformats, copies, what is not in the table" if more > 0 else "saved by fusing"
    return f"{abs(more):.4g} ms ({abs(more) / measured:.0%}) {what}"


def _limits(found: Explanation) -> list[str]:
    dense = sum(row.layer.dense_ms for row in found.rows)
    least = sum(row.least_ms for row in found.rows)
    fixed = [row for row in found.rows if row.stairs is None and row.least_ms >= 0.999 * row.layer.dense_ms]
    lines = [f"{least / dense:.0%} of the layers' latency cannot be pruned at the least widths ({least:.4g} ms)"]
    if fixed:
        longest = sorted((row.layer for row in fixed), key=lambda r: -r.dense_ms)[:3]
        named = ", ".join(f"{r.name} {r.dense_ms:.4g} ms" for r in longest)
        count = "1 layer has" if len(fixed) == 1 else f"{len(fixed)} layers have"
        lines.append(f"{count} no width to choose: {named}")
    floor, dense_ms = found.measured.floor_ms, found.measured.dense_ms
    if floor is not None:
        lines.append(f"the floor of this device: {floor:.4g} ms measured ({dense_ms / floor:.2f}x)")
    else:
        speedup = found.predicted_dense_ms / found.predicted_floor_ms
        lines.append(f"the floor of this device: {found.predicted_floor_ms:.4g} ms predicted ({speedup:.2f}x)")
    return lines


def _advice(found: Explanation) -> list[str]:
    """Groups over all layers that they touch: an output channel is the next layer's input channel."""
    free = sorted(
        (g for g in found.groups if free_speed(g.stairs)), key=lambda g: g.stairs.narrower_ms - g.stairs.at_ms
    )
    wider = [g for g in found.groups if g.stairs.wider > g.stairs.at]
    lines = []
    for group in free[:GROUPS]:
        stairs = group.stairs
        lines.append(
            f"group {group.id}: {stairs.at} -> {stairs.narrower} channels would be free speed, "
            f"{stairs.at_ms - stairs.narrower_ms:.4g} ms ({saved_share(stairs):.0%} of the layers it touches)"
        )
    for group in wider[:GROUPS]:
        lines.append(f"group {group.id}: {group.stairs.at} -> {group.stairs.wider} channels costs nothing")
    return lines or ["no group stands at the edge of a step"]


def _inside(found: Explanation) -> list[str]:
    """Where the runtime itself says the time goes: what it has fused, reordered or added shows here only."""
    times, whole_ms = found.operators.times, found.operators.whole_ms
    if not times:
        why = found.operators.why
        return [f"reformats and fallbacks are not listed, nor the runtime's own operators: {why}"] if why else []
    spent: dict[str, float] = {}
    for name, ms in times:
        spent[name] = spent.get(name, 0.0) + ms
    most = sorted(spent.items(), key=lambda pair: -pair[1])[:OPERATORS]
    each = ", ".join(f"{name} {ms:.4g} ms ({ms / whole_ms:.0%})" for name, ms in most)
    summed = sum(ms for _, ms in times)
    return [f"the runtime counts {len(times)} operators, {summed:.4g} of {whole_ms:.4g} ms: {each}"]
