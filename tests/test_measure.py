"""A device that is hot or throttled is waited for, and what it measured meanwhile is measured again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgeprune import measure
from edgeprune.records import DeviceState, Fingerprint, Layer, LayerShape, Timing, Width
from edgeprune.store import Store

HERE = Fingerprint("tflite", "a board", "a runtime 1.0", "f32", 1, ())
SHAPE = LayerShape(
    op="conv", in_ch=3, out_ch=8, batch=1, spatial=(8, 8), kernel=(3, 3), stride=(1, 1), padding=(1, 1),
    dilation=(1, 1), conv_groups=1, fused=(),
)  # fmt: skip
LAYER = Layer("a", SHAPE, Width(3, ()), Width(8, ()), Width(1, ()), 10**6)


class Oven:
    """A device of which only heat is known: a temperature for each time that it is asked."""

    def __init__(self, temperatures: Iterator[float]) -> None:
        self._temperatures = temperatures
        self.measured_at: list[float] = []
        self.now_c = 0.0

    def fingerprint(self) -> Fingerprint:
        return HERE

    def state(self) -> DeviceState:
        self.now_c = next(self._temperatures)
        return DeviceState(0.0, 1500.0, self.now_c, 500.0, False, ())

    def time(self, items: Sequence[Any], *limits: float) -> list[Timing]:
        self.measured_at.append(self.now_c)
        return [Timing(2.0 if self.now_c >= 85 else 1.0, 1.0, 1.0, 40, (1.0,), 0.001) for _ in items]


def filled(oven: Oven, tmp_path: Path) -> tuple[dict[LayerShape, Timing], measure.Filled]:
    store = Store(tmp_path / "latency.sqlite")
    _, found = measure.fill([LAYER], {}, oven, store)  # type: ignore[arg-type]
    return dict(store.entries(HERE)), found


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "COOL_STEP_S", 0.001)


def temperatures(*first: float, then: float) -> Iterator[float]:
    yield from first
    while True:
        yield then


def test_a_hot_board_is_waited_for(tmp_path: Path) -> None:
    oven = Oven(temperatures(90.0, 90.0, 88.0, then=60.0))
    _, found = filled(oven, tmp_path)
    assert oven.measured_at == [60.0]
    assert found.notes == ()


def test_a_batch_that_got_hot_is_measured_again(tmp_path: Path) -> None:
    oven = Oven(temperatures(60.0, 60.0, 86.0, then=60.0))  # at the start, before the batch, after it
    _, found = filled(oven, tmp_path)
    assert len(oven.measured_at) == 2
    assert found.drifted == 1
    assert found.notes == ()


def test_a_board_that_stays_hot_is_measured_as_it_is_and_the_table_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "COOL_S", 0.01)
    entries, found = filled(Oven(temperatures(then=90.0)), tmp_path)
    assert entries[SHAPE].median_ms == 2.0
    assert "some entries were measured while the device was hot or throttled" in found.notes
    assert any("the device stayed hot or throttled" in note for note in found.notes)
