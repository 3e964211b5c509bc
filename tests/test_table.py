"""A latency table finds the steps of a staircase it is not told about, and refuses what it does not know."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from edgeprune import table
from edgeprune.errors import TableError
from edgeprune.records import Fingerprint, Layer, LayerShape, Timing, Width
from edgeprune.table import IDENTITY, LatencyTable

HERE = Fingerprint("cpu", "a processor", "a runtime 1.0", "f32", 1, (("governor", "performance"),))
OUTS = tuple(range(8, 129, 8))
INS = tuple(range(16, 65, 4))
CANDIDATES = {"in": INS, "out": OUTS}
Cost = Callable[[int, int], float]


def conv(depthwise: bool = False) -> Layer:
    """A convolution between the groups `in` and `out`, or one that follows `in`."""
    shape = LayerShape(
        op="conv", in_ch=64, out_ch=64 if depthwise else 128, batch=1, spatial=(28, 28), kernel=(3, 3), stride=(1, 1),
        padding=(1, 1), dilation=(1, 1), conv_groups=64 if depthwise else 1, fused=("relu",),
    )  # fmt: skip
    ins, outs = Width(0, (("in", 1),)), Width(0, (("out", 1),))
    return Layer("body.conv", shape, ins, ins if depthwise else outs, ins if depthwise else Width(1, ()), 10**8)


def timing(ms: float) -> Timing:
    return Timing(ms, 0.98 * ms, 1.02 * ms, 40, (), 0.005)


def stairs(step: int) -> Cost:
    """Linear in the input; in the output, every `step` channels cost the same."""
    return lambda in_ch, out_ch: 0.01 + 0.001 * in_ch * math.ceil(out_ch / step) * step / 128


def measured(layer: Layer, cost: Cost, rounds: int = 99) -> tuple[table.Surface, int]:
    """Measure what the table asks for, for so many rounds; returns the surface and the number of entries."""
    entries: dict[LayerShape, Timing] = {}
    for _ in range(rounds):
        surface = table.surface(LatencyTable(HERE, entries, IDENTITY), layer, CANDIDATES)
        missing = table.wanted(surface)
        if not missing:
            break
        assert not set(missing) & entries.keys(), "nothing is asked for twice"
        entries |= {shape: timing(cost(shape.in_ch, shape.out_ch)) for shape in missing}
    return table.surface(LatencyTable(HERE, dict(entries), IDENTITY), layer, CANDIDATES), len(entries)


@pytest.mark.parametrize("step", [8, 16, 32, 64])
def test_a_staircase_is_found_wherever_its_steps_are(step: int) -> None:
    surface, _ = measured(conv(), stairs(step))
    off = [abs(surface.at(i, o) / stairs(step)(i, o) - 1) for i in INS for o in OUTS]
    assert max(off) < 0.05, "between the 2 % that count as a line, twice"


def test_a_line_takes_fewer_entries_than_a_staircase() -> None:
    _, of_line = measured(conv(), stairs(1))
    _, of_stairs = measured(conv(), stairs(32))
    assert of_line < of_stairs < len(INS) * len(OUTS) / 3


def test_the_dense_layer_comes_first_then_a_coarse_table_that_answers_already() -> None:
    layer = conv()
    empty = table.surface(LatencyTable(HERE, {}, IDENTITY), layer, CANDIDATES)
    assert table.wanted(empty) == [layer.shape]
    coarse, _ = measured(layer, stairs(16), rounds=3)
    worst = max(abs(coarse.at(i, o) / stairs(16)(i, o) - 1) for i in INS for o in OUTS)
    assert 0.05 < worst < 0.6, "usable, and coarser than the finished table"


def test_a_layer_that_follows_its_input_has_one_curve() -> None:
    surface, entries = measured(conv(depthwise=True), lambda i, o: 0.02 + 0.001 * math.ceil(i / 16) * 16)
    assert entries <= len(INS)
    assert surface.at(48, 48) == pytest.approx(0.02 + 0.048)
    assert surface.at(20, 20) == pytest.approx(0.02 + 0.032)


def test_an_output_between_the_widths_of_plans_counts_as_the_next_one_up() -> None:
    surface, _ = measured(conv(), stairs(8))
    assert surface.at(64, 41) == surface.at(64, 48)
    assert surface.at(0, 41) == surface.at(64, 0) == 0.0


@pytest.mark.parametrize(("in_ch", "out_ch"), [(8, 64), (65, 64), (32, 129)])
def test_a_width_outside_what_was_measured_is_refused(in_ch: int, out_ch: int) -> None:
    surface, _ = measured(conv(), stairs(8))
    message = rf"body.conv: {in_ch} -> {out_ch} channels lies outside the measured 16..64 -> 8..128; profile again"
    with pytest.raises(TableError, match=message):
        surface.at(in_ch, out_ch)


def test_a_layer_that_was_not_measured_is_refused() -> None:
    surface = table.surface(LatencyTable(HERE, {}, IDENTITY), conv(), CANDIDATES)
    message = "the latency table of a processor has no conv 64 -> 128 at 28x28; run `edgeprune profile` to measure it"
    with pytest.raises(TableError, match=message):
        surface.at(64, 128)


def test_stairs_are_named_and_lines_have_none() -> None:
    curve = [stairs(32)(64, o) for o in OUTS]
    assert table.jumps(OUTS, curve) == [(32, 40), (64, 72), (96, 104)]
    assert table.jumps(OUTS, [0.01 * o for o in OUTS]) == []
    assert table.jumps((8, 16), (0.5, 0.4)) == []


# ---- whole networks


def numbers(correction: table.Correction) -> list[float]:
    return [correction.overhead_ms, correction.scale, correction.per_mib_ms]


@pytest.mark.parametrize("truth", [(0.2, 0.9, 0.05), (0.0, 1.1, 0.0), (0.1, 0.5, 0.5)])
def test_the_correction_that_made_the_latencies_is_found(truth: tuple[float, ...]) -> None:
    draw = np.random.default_rng(0)
    summed = draw.uniform(1, 9, (12, 2))
    found = table.fit(summed, np.concatenate([np.ones((12, 1)), summed], axis=1) @ np.array(truth))
    assert numbers(found) == pytest.approx(truth, abs=1e-9)
    assert found.networks == 12
    assert found.worst_error < 1e-9


def test_the_error_of_a_correction_is_of_networks_it_was_not_fitted_on() -> None:
    draw = np.random.default_rng(1)
    summed = np.stack([np.linspace(1, 9, 8)] * 2, axis=1)
    measured_ms = summed[:, 0] * draw.uniform(0.9, 1.1, 8)
    found = table.fit(summed, measured_ms)
    alone = table.fit(np.delete(summed, 7, axis=0), np.delete(measured_ms, 7))
    overhead, *scales = numbers(alone)
    assert found.worst_error >= abs((overhead + np.dot(scales, summed[7])) / measured_ms[7] - 1) - 1e-12


def test_with_two_networks_only_the_scale_is_fitted() -> None:
    found = table.fit(np.array([[2.0, 1.0], [4.0, 2.0]]), np.array([3.0, 6.0]))
    assert numbers(found) == [0.0, 1.5, 0.0]


def test_what_layers_cost_adds_up_to_what_the_network_costs() -> None:
    surface, _ = measured(conv(), stairs(16))
    correction = table.Correction(0.3, 0.5, 0.02, 6, 0.01, 0.02)
    corrected = table.surface(LatencyTable(HERE, surface.table.timings, correction), surface.layer, CANDIDATES)
    units: Mapping[str, int] = {"in": 32, "out": 72}
    whole = table.predict_ms([corrected, corrected], units)
    assert whole == pytest.approx(0.3 + 2 * table.layer_ms(corrected, 32, 72))
    cost = stairs(16)(32, 72)
    mib = 32 * 72 * 9 * 4 / 2**20
    assert whole == pytest.approx(0.3 + 2 * (0.5 * cost + 0.02 * mib), rel=0.02)
