"""The last check's sessions, on a device whose clock is told what to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn

from edgeprune import verify
from edgeprune.records import Artifact, Timing

NET = verify.Network(nn.Identity(), Artifact("", (), "", 0, "onnx", "f32"), 0, 0)


class Told:
    """Answers with (dense ms, pruned ms, how far copies lie apart), session by session."""

    def __init__(self, *sessions: tuple[float, float, float]) -> None:
        self.left = list(sessions)

    def time(self, items: Sequence[Any], *bounds: float) -> list[Timing]:
        dense, pruned, apart = self.left.pop(0)
        each = [ms * (1 + apart * (copy % 3 - 1)) for copy in range(len(items) // 2) for ms in (dense, pruned)]
        return [Timing(ms, ms, ms, 1, (ms,), 0.0) for ms in each]


def latency(device: Any) -> tuple[float, float, tuple[str, ...]]:
    dense, pruned, notes = verify._latency(NET, NET, device, 10.0)
    return dense.median_ms, pruned.median_ms, notes


def test_where_copies_agree_one_session_is_enough() -> None:
    device = Told((10.0, 5.0, 0.0), (10.0, 5.0, 0.0))
    assert latency(device) == (10.0, 5.0, ())
    assert len(device.left) == 1


def test_where_copies_differ_further_sessions_are_pooled() -> None:
    device = Told(*[(10.0, ms, 0.05) for ms in (4.0, 5.0, 5.0, 6.0)], (10.0, 1.0, 0.0))
    assert latency(device) == (pytest.approx(10.0), pytest.approx(5.0), ())
    assert len(device.left) == 1
    assert verify.SESSIONS == 4


def test_a_session_in_which_the_dense_network_is_not_itself_is_held_again_and_said() -> None:
    device = Told((11.0, 9.0, 0.0), (10.1, 5.0, 0.0), (10.0, 1.0, 0.0))
    assert latency(device) == (10.1, 5.0, ("measured 2 times: the device had drifted",))
    assert len(device.left) == 1


def test_on_a_device_that_never_is_itself_the_nearest_session_counts_and_the_verdict_says_so() -> None:
    device = Told((12.0, 9.0, 0.0), (11.0, 6.0, 0.0), (13.0, 9.0, 0.0), (12.0, 9.0, 0.0))
    dense, pruned, notes = latency(device)
    assert (dense, pruned) == (11.0, 6.0)
    assert notes == ("the device is 10.0% slower now than when the budget was planned",)
