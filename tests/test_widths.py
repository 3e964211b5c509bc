"""Widths that plans may choose, against every width that there is, looked at one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import widths
from edgeprune.records import Block, ChannelGroup, Member


def group(width: int, channels_per_unit: int = 1, id_: str = "g", tensors: tuple[str, ...] = ()) -> ChannelGroup:
    members = tuple(Member(t, 0, "out", np.arange(width)[:, None]) for t in tensors)
    return ChannelGroup(id_, width, channels_per_unit, members, "")


def of(one: ChannelGroup, least_share: float = 0.0) -> tuple[int, ...]:
    return widths.candidates([one], least_share)[one.id]


def stepped(channels: int) -> int:
    """Channels between choices: a sixteenth of them, rounded up to 1, 2, 4, 8 or a multiple of 16."""
    return next(s for s in (1, 2, 4, 8, *range(16, 10**5, 16)) if 16 * s >= channels)


@pytest.mark.parametrize("least_share", [0.0, 0.1, 0.25, 0.5, 0.93])
def test_every_step_from_the_least_width_on_is_a_choice_and_nothing_else(least_share: float) -> None:
    for width in [*range(1, 300), 512, 513, 1000, 1024, 2048]:
        step = stepped(width)
        every = [w for w in range(1, width + 1) if w == width or (w % step == 0 and w >= least_share * width)]
        assert of(group(width), least_share) == tuple(every), width


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 512), st.integers(1, 64), st.floats(0, 0.99))
def test_units_of_several_channels_step_by_whole_units_that_come_nearest(
    width: int, per_unit: int, least_share: float
) -> None:
    wanted = stepped(width * per_unit) / per_unit  # units between choices, not whole
    near = [s for s in range(1, width + 1) if abs(s - wanted) <= 0.5] or [1 if wanted < 1 else width]
    allowed = [
        tuple(w for w in range(1, width + 1) if w == width or (w % s == 0 and w >= least_share * width)) for s in near
    ]
    assert of(group(width, per_unit), least_share) in allowed


def test_there_are_at_most_sixteen_choices_and_more_than_eight_where_there_are_as_many_widths() -> None:
    assert all(min(width, 9) <= len(of(group(width))) <= widths.CHOICES for width in range(1, 4097))


@pytest.mark.parametrize(
    ("width", "least_share", "first"),
    [
        (64, 0.0, 4),  # the step
        (64, 0.1, 8),  # 6.4 channels, rounded up to a step
        (64, 0.125, 8),  # 8 channels, and 8 it is
        (64, 0.13, 12),
        (64, 0.94, 64),  # above the last step: no choice is left
        (10, 0.25, 3),  # 2.5 channels of a group that steps by one
        (3, 0.0, 1),
        (1, 0.9, 1),
    ],
)
def test_no_group_is_cut_below_the_least_share_of_its_width(width: int, least_share: float, first: int) -> None:
    assert of(group(width), least_share)[0] == first


def test_groups_that_belong_to_a_protected_module_stay_whole() -> None:
    inside = group(64, id_="inside", tensors=("layer1.0.conv.weight",))
    itself = group(64, id_="itself", tensors=("layer1.weight",))
    tensor = group(64, id_="tensor", tensors=("layer1",))
    second = group(64, id_="second", tensors=("stem.weight", "layer1.0.norm.weight"))
    beside = group(64, id_="beside", tensors=("layer10.weight", "prefix.layer1.weight"))
    found = widths.candidates([inside, itself, tensor, second, beside], 0.0, ["layer1"])
    assert [g for g, choices in found.items() if choices == (64,)] == ["inside", "itself", "tensor", "second"]
    assert found["beside"] == of(beside)


def test_only_what_lies_in_a_block_that_may_be_dropped_can_vanish_and_not_when_it_is_protected() -> None:
    inner, kept, outer = (group(32, id_=name, tensors=(f"{name}.weight",)) for name in ("inner", "kept", "outer"))
    block = Block("add", 0, 1, ("inner", "kept"), ("inner", "kept"))
    found = widths.candidates([inner, kept, outer], 0.5, ["kept"], [block])
    assert found == {"inner": (0, *range(16, 33, 2)), "kept": (32,), "outer": tuple(range(16, 33, 2))}
