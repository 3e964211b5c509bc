"""A table is only as good as the minutes it was taken in: drift, heat and other work are noticed, mended or said."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeprune import cli, measure
from edgeprune.records import DeviceState, Fingerprint, Layer, LayerShape, Timing, Width
from edgeprune.store import Store

HERE = Fingerprint("tflite", "a board", "a runtime 1.0", "f32", 1, ())
SHAPE = LayerShape(
    op="conv", in_ch=3, out_ch=8, batch=1, spatial=(8, 8), kernel=(3, 3), stride=(1, 1), padding=(1, 1),
    dilation=(1, 1), conv_groups=1, fused=(),
)  # fmt: skip
LAYER = Layer("a", SHAPE, Width(3, ()), Width(8, ()), Width(1, ()), 10**6)
WIDE = replace(LAYER, shape=replace(SHAPE, out_ch=64), out_width=Width(0, (("g", 1),)))
WIDTHS = {"g": tuple(range(8, 65, 8))}  # the dense width is one batch, the coarse grid the next


class Device:
    """A target whose latencies are a formula."""

    def __init__(self) -> None:
        self.notes: tuple[str, ...] = ()
        self.batches: list[list[LayerShape]] = []
        self.limits: list[tuple[float, ...]] = []

    def fingerprint(self) -> Fingerprint:
        return HERE

    def state(self) -> DeviceState:
        return DeviceState(3.1, 1500.0, 50.0, 500.0, False, self.notes)

    def time(self, items: Sequence[Any], *limits: float) -> list[Timing]:
        self.batches.append(list(items[1:]))
        self.limits.append(limits)
        factor = self.factor()
        return [timing(factor * milliseconds(shape), self.interval(shape)) for shape in items]

    def factor(self) -> float:
        return 1.0

    def interval(self, shape: LayerShape) -> float:
        return 0.005


def milliseconds(shape: LayerShape) -> float:
    return 0.01 + 0.001 * shape.out_ch * shape.in_ch


def timing(ms: float, interval: float = 0.001) -> Timing:
    return Timing(ms, ms, ms, 40, (ms,), interval)


def filled(
    device: Any, tmp_path: Path, layer: Layer = LAYER, **options: Any
) -> tuple[dict[LayerShape, Timing], measure.Filled]:
    store = Store(tmp_path / "latency.sqlite")
    _, found = measure.fill([layer], WIDTHS if layer is WIDE else {}, device, store, **options)
    return dict(store.entries(HERE)), found


def medians(entries: dict[LayerShape, Timing]) -> dict[int, float]:
    """By output width, without the sentinel's."""
    return {shape.out_ch: t.median_ms for shape, t in entries.items() if shape != measure.SENTINEL}


# ---- a machine that changes ----------------------------------------------------------------------------------


class Drifting(Device):
    """Slower or faster by a factor, batch by batch."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self._factors = itertools.chain(factors, itertools.repeat(factors[-1]))

    def factor(self) -> float:
        return next(self._factors)


@pytest.mark.parametrize("factor", [1.05, 1.5, 0.95])
def test_a_batch_during_which_the_sentinel_drifted_is_measured_again(tmp_path: Path, factor: float) -> None:
    device = Drifting(1.0, factor, 1.0)
    entries, found = filled(device, tmp_path, WIDE)
    assert device.batches[1] == device.batches[2] != device.batches[0]
    assert medians(entries) == {width: milliseconds(replace(SHAPE, out_ch=width)) for width in medians(entries)}
    assert len(medians(entries)) >= 5
    assert (found.drifted, found.measured, found.notes) == (1, found.entries, ())


def test_a_sentinel_that_is_within_four_percent_is_no_drift(tmp_path: Path) -> None:
    device = Drifting(1.0, 1.03, 0.97, 1.0)
    _, found = filled(device, tmp_path, WIDE)
    assert sum(map(len, device.batches)) == found.measured
    assert found.drifted == 0


def test_of_a_machine_that_stays_another_the_least_drifted_try_is_kept_and_the_table_says_so(tmp_path: Path) -> None:
    device = Drifting(1.0, 1.3, 1.06, 1.1, 1.0)
    entries, found = filled(device, tmp_path, WIDE)
    assert device.batches[1] == device.batches[2] == device.batches[3]
    for shape in device.batches[1]:
        assert entries[shape].median_ms == pytest.approx(1.06 * milliseconds(shape))
    assert found.drifted == 2
    note = "some entries were measured while the sentinel layer ran more than 4 % off its first latency"
    assert found.notes == (note,)
    assert Store(tmp_path / "latency.sqlite").sessions(HERE)[0].notes == (note,)


def test_after_three_batches_in_a_row_a_machine_that_stays_another_is_waited_for_no_longer(tmp_path: Path) -> None:
    device = Drifting(1.0, 1.2)
    widths = {"g": tuple(range(1, 257))}
    store = Store(tmp_path / "latency.sqlite")
    stairs = replace(WIDE, shape=replace(SHAPE, out_ch=256))
    many = [replace(stairs, name=str(n), shape=replace(stairs.shape, spatial=(n, n))) for n in range(4, 16)]
    measure.fill(many, widths, device, store)  # type: ignore[arg-type]
    tries = [len(list(group)) for _, group in itertools.groupby(device.batches)]
    assert len(tries) > 5
    assert tries == [1, 3, 3, 3] + [1] * (len(tries) - 4)


# ---- a layer that stays uncertain ----------------------------------------------------------------------------


class Unsure(Device):
    """Layers with more than 32 outputs scatter."""

    def interval(self, shape: LayerShape) -> float:
        return 0.03 if shape.out_ch > 32 and shape != measure.SENTINEL else 0.005


@pytest.mark.parametrize(("interval", "said"), [(0.01, "1%"), (0.025, "2.5%"), (0.05, "")])
def test_entries_whose_median_is_less_certain_than_was_asked_are_counted_and_named(
    tmp_path: Path, interval: float, said: str
) -> None:
    device = Unsure()
    entries, found = filled(device, tmp_path, WIDE, interval=interval)
    wide = sum(width > 32 for width in medians(entries))
    assert wide >= 2
    assert {limits[2] for limits in device.limits} == {interval}, "the device is asked for just that"
    assert found.unsure == (wide if said else 0)
    assert found.notes == ((f"{wide} of {found.entries} entries did not get within {said}",) if said else ())
    assert found.interval == interval
    assert {t.interval for t in entries.values()} == {0.005, 0.03}, "each entry says how certain it is"


# ---- a machine that others use -------------------------------------------------------------------------------


def test_a_table_taken_on_a_busy_machine_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = Device()
    device.notes = ("busy: load 3.1 on 2 cores",)
    _, found = filled(device, tmp_path)
    assert found.notes == device.notes
    (session,) = Store(tmp_path / "latency.sqlite").sessions(HERE)
    assert session.notes == session.began.notes == device.notes
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.run(["table", "show"]) == 0
    assert "busy: load 3.1 on 2 cores" in capsys.readouterr().out


def test_a_table_taken_on_a_busy_machine_says_so_to_the_next_network_that_uses_its_entries(tmp_path: Path) -> None:
    busy, quiet = Device(), Device()
    busy.notes = ("busy: load 3.1 on 2 cores",)
    filled(busy, tmp_path)
    _, same = filled(quiet, tmp_path)
    (session,) = Store(tmp_path / "latency.sqlite").sessions(HERE)
    assert (same.measured, same.notes) == (0, (f"busy: load 3.1 on 2 cores (on {session.began_at[:10]})",))
    other = replace(LAYER, shape=replace(SHAPE, spatial=(4, 4)))
    _, found = filled(quiet, tmp_path, other)
    assert (found.measured, found.notes) == (1, ()), "none of its entries is of that session"


def test_a_machine_that_others_begin_to_use_meanwhile_is_noticed_too(tmp_path: Path) -> None:
    class Joined(Device):
        def time(self, items: Sequence[Any], *limits: float) -> list[Timing]:
            self.notes = ("busy: load 1.9 on 2 cores",) if self.batches else ()
            return super().time(items, *limits)

    _, found = filled(Joined(), tmp_path, WIDE)
    assert found.notes == ("busy: load 1.9 on 2 cores",)


# ---- heat ----------------------------------------------------------------------------------------------------


class Oven(Device):
    """A temperature for each time that it is asked."""

    def __init__(self, temperatures: Iterable[float]) -> None:
        super().__init__()
        self._temperatures = iter(temperatures)
        self.measured_at: list[float] = []
        self.now_c = 0.0

    def state(self) -> DeviceState:
        self.now_c = next(self._temperatures)
        return replace(super().state(), temperature_c=self.now_c)

    def time(self, items: Sequence[Any], *limits: float) -> list[Timing]:
        self.measured_at.append(self.now_c)
        return [timing(2.0 if self.now_c >= 85 else 1.0) for _ in items]


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
