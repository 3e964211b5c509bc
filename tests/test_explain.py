"""What an explanation says, word for word, of a network made up for it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from edgeprune import files
from edgeprune.cli import explaining
from edgeprune.explain import Explanation, GroupRow, Measured, Row, Stairs
from edgeprune.records import FrozenChannels, LayerRow, Operators

EDGE = Stairs(at=40, wider=40, narrower=32, at_ms=0.9, narrower_ms=0.7)  # 22 % faster for 20 % ... below FREE
CLIFF = Stairs(at=40, wider=40, narrower=32, at_ms=1.0, narrower_ms=0.6)
TREAD = Stairs(at=40, wider=48, narrower=40, at_ms=1.0, narrower_ms=1.0)
FOUND = Explanation(
    rows=(
        Row(LayerRow("conv1", "conv", 3, 64, 3, 40, 2.0, 1.0), 0.5, CLIFF),
        Row(LayerRow("conv2", "conv", 64, 48, 40, 40, 4.0, 2.0), 0.5, TREAD),
        Row(LayerRow("conv3", "conv", 48, 40, 40, 40, 1.0, 0.9), 0.5, EDGE),
        Row(LayerRow("fc", "linear", 40, 10, 40, 10, 0.5, 0.5), 0.5, None),
    ),
    groups=(GroupRow("conv1", 64, CLIFF), GroupRow("conv2", 48, TREAD)),
    untimed=(("add", "add"), ("add_1", "add"), ("cat", "concat")),
    frozen=(FrozenChannels(("fc.weight",), 10, "the network's output"),),
    overhead_ms=0.1,
    predicted_dense_ms=7.9,
    predicted_ms=4.6,
    predicted_floor_ms=2.2,
    measured=Measured(dense_ms=8.0, planned_ms=5.0, floor_ms=2.5),
    operators=Operators((), 0.0, ""),
)


def said(found: Explanation, capsys: pytest.CaptureFixture[str]) -> str:
    explaining.text(found)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("stairs", "text"),
    [
        (CLIFF, "40 -> 32 would be free speed: 40% faster"),
        (TREAD, "40 -> 48 costs nothing"),
        (EDGE, "40 -> 32 is 22% faster"),
        (replace(CLIFF, wider=48), "40 -> 32 would be free speed: 40% faster, 40 -> 48 costs nothing"),
        (replace(TREAD, wider=40), "no step near"),
    ],
)
def test_where_a_width_stands_is_said_in_words(stairs: Stairs, text: str) -> None:
    assert explaining.standing(stairs) == text


def test_the_runtime_s_own_operators_are_summed_by_name_or_it_is_said_why_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = (("Convolution", 2.0), ("Transpose", 0.25), ("Convolution", 1.75))
    text = said(replace(FOUND, operators=Operators(times, 5.0, "")), capsys)
    assert "the runtime counts 3 operators, 4 of 5 ms: Convolution 3.75 ms (75%), Transpose 0.25 ms (5%)" in text
    text = said(replace(FOUND, operators=Operators((), 0.0, "they are read with one thread")), capsys)
    said_why = "reformats and fallbacks are not listed, nor the runtime's own operators: they are read with one thread"
    assert said_why in text
    assert "operators" not in said(FOUND, capsys)


def test_the_sum_of_layers_stands_beside_the_whole_network(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(FOUND, capsys)
    assert "sum of layers: 7.5 ms dense, 4.4 ms now; end to end 8 ms dense, 5 ms now, measured: " in text
    assert "0.6 ms (12%) outside the layers: reformats, copies, what is not in the table" in text
    assert "predicted at 7.9 ms dense, 4.6 ms now, 0.1 ms of it whatever the widths" in text
    assert "not in the table, only in the end-to-end latency: add (2), concat" in text


def test_what_cannot_go_and_the_floor_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(FOUND, capsys)
    assert "27% of the layers' latency cannot be pruned at the least widths (2 ms)" in text
    assert "1 layer has no width to choose: fc 0.5 ms" in text
    assert "the floor of this device: 2.5 ms measured (3.20x)" in text
    without = said(replace(FOUND, measured=replace(FOUND.measured, floor_ms=None)), capsys)
    assert "the floor of this device: 2.2 ms predicted (3.59x)" in without


def test_groups_at_the_edge_of_a_step_are_named_with_what_it_saves(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(FOUND, capsys)
    assert "group conv1: 40 -> 32 channels would be free speed, 0.4 ms (40% of the layers it touches)" in text
    assert "group conv2: 40 -> 48 channels costs nothing" in text
    assert "no group stands at the edge of a step" in said(replace(FOUND, groups=()), capsys)


def test_programs_get_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(json.dumps(files.plain(FOUND)))
    assert found["rows"][0]["stairs"] == {"at": 40, "wider": 40, "narrower": 32, "at_ms": 1.0, "narrower_ms": 0.6}
    assert found["measured"] == {"dense_ms": 8.0, "planned_ms": 5.0, "floor_ms": 2.5}
