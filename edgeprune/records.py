"""The records that flow between the stages: frozen, without logic, units in their names.

Every stage reads records and returns new ones. Those that are written to a run folder are JSON objects with a
`format` field (see `edgeprune.files`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Progress = Callable[[int, int], None]  # told (done, of)

# ---- the network ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Width:
    """A channel count that follows the plan: `fixed + sum(channels_per_unit * units kept of group)`."""

    fixed: int
    terms: tuple[tuple[str, int], ...]  # (group id, channels per unit)


@dataclass(frozen=True)
class LayerShape:
    """What a layer costs on a device: the key of a latency table."""

    op: str  # conv, linear, ... (the names that profilers understand)
    in_ch: int
    out_ch: int
    batch: int
    spatial: tuple[int, ...]  # of the input: (height, width); () for linear over one vector
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    conv_groups: int
    fused: tuple[str, ...]  # what a runtime merges into it, in order: "add", "relu", ...


@dataclass(frozen=True)
class Layer:
    """One use of a layer in the network: its dense shape, and how its widths follow the plan."""

    name: str  # module path
    shape: LayerShape
    in_width: Width
    out_width: Width
    groups_width: Width  # of `conv_groups`: fixed unless depthwise or whole groups are cut
    macs: int


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one parameter or buffer whose slices belong to the units of a group."""

    tensor: str  # name in the state dict
    axis: int
    role: str  # "out" (makes the channel), "in" (reads it), "scale" (one number a channel)
    positions: NDArray[np.int64]  # (width, slices a unit): indices along the axis


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that can only be removed together, unit by unit."""

    id: str
    width: int  # units
    channels_per_unit: int  # of its widest producer
    members: tuple[Member, ...]
    inexact: str  # why the cut is not equal to the masked model; "" when it is


@dataclass(frozen=True)
class FrozenChannels:
    """Parameter slices that must stay, and why."""

    tensors: tuple[str, ...]
    channels: int
    reason: str


@dataclass(frozen=True)
class Block:
    """A residual branch that can be dropped whole; then its groups have width 0.

    By that a plan loses all that its groups are worth: every unit, the best one too, which stays under any other width.
    What the branch's last layer adds to residual channels is worth what those channels are, and is not taken off while
    they stay (MDP, arXiv 2504.02168, takes that layer's share off as well); the next step scores them without it.
    """

    id: str  # module path of the addition
    op: int  # index of the addition in the recording
    branch: int  # which operand of the addition is dropped
    groups: tuple[str, ...]  # groups that live inside the branch only
    layers: tuple[str, ...]


# ---- choices -------------------------------------------------------------------------------------------------

Keep = Mapping[str, tuple[int, ...]]  # group id -> units kept, ascending; groups not named stay whole


@dataclass(frozen=True)
class Plan:
    """How many units each group keeps, and what that should cost."""

    widths: Mapping[str, int]
    predicted_ms: float
    dense_ms: float  # predicted for the dense network, by the same table
    value: float
    gap: float  # certified relative distance of `value` from the optimum


@dataclass(frozen=True)
class LayerRow:
    """One layer by the latency table, before and after; one that is gone takes 0 ms."""

    name: str
    op: str
    in_ch: int
    out_ch: int
    planned_in: int
    planned_out: int
    dense_ms: float
    planned_ms: float


# ---- measurements --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """One thing's latency on a device. `samples_ms` are medians of consecutive visits, in time order."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    samples_ms: tuple[float, ...]
    interval: float  # half the width of the median's 95 % interval, relative to the median


@dataclass(frozen=True)
class Operators:
    """What a runtime spends inside one network: (its own name of an operator, ms) in the order they run."""

    times: tuple[tuple[str, float], ...]
    whole_ms: float  # end to end, while it was watched
    why: str  # there are no times; "" too where its operators are the layers of the table


@dataclass(frozen=True)
class Fingerprint:
    """What a measurement depends on besides the layer: two tables mix only when these are equal."""

    kind: str  # the target family
    device: str  # processor model
    runtime: str  # name and version
    precision: str
    threads: int
    details: tuple[tuple[str, str], ...]  # clocks, governor, instruction set ...: recorded, compared


@dataclass(frozen=True)
class DeviceState:
    """What may change from one minute to the next: recorded with each measurement, never compared."""

    load: float
    frequency_mhz: float
    temperature_c: float
    memory_mb: float  # that programs could still have
    throttled: bool  # slowed down by its own protection: heat, or too low a voltage
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Artifact:
    """An exported network: `path` is what the target's runtime loads, `files` all that belongs to it."""

    path: str
    files: tuple[str, ...]
    sha256: str
    size_bytes: int
    format: str
    precision: str


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy with a 95 % Wilson interval."""

    correct: int
    total: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Receipt:
    """What an installation did."""

    folder: str
    version: str
    sha256: str
    previous: str


@dataclass(frozen=True)
class Evaluation:
    """A network on images that may guide choices."""

    loss: float  # cross-entropy, or 1 - accuracy where only that is known
    accuracy: float  # 0..1


# ---- verification --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What the caller asked for: one of the first two, and perhaps a size of the exported file."""

    latency_ms: float | None
    speedup: float | None
    size_mb: float | None = None  # 10^6 bytes


@dataclass(frozen=True)
class Agreement:
    """The exported network on the target against the torch module, on the same real inputs."""

    images: int
    max_difference: float  # largest absolute difference over the largest absolute output
    same_class: float  # share of inputs with the same largest output
    tolerance: float  # of max_difference, for the target's precision


@dataclass(frozen=True)
class Floor:
    """A metric that the pruned network must not fall below, on the final split, by the target's runtime."""

    name: str
    floor: float
    dense: float | None  # None where there were no final images
    pruned: float | None


@dataclass(frozen=True)
class NetworkCheck:
    """One network on the target."""

    latency: Timing
    accuracy: Accuracy | None  # on the final split, by the target's runtime
    agreement: Agreement
    params: int
    macs: int
    size_bytes: int
    peak_memory_bytes: int | None = None  # of a process that runs it on the device; None on GPUs and in older files


@dataclass(frozen=True)
class VerifyReport:
    """Dense beside pruned on the target. Whether it passed is computed: `verify.verdict(report)`."""

    budget: Budget
    accuracy_floor: float | None
    predicted_ms: float
    dense: NetworkCheck
    pruned: NetworkCheck
    speedup: float
    speedup_low: float  # 95 % bootstrap interval
    speedup_high: float
    fingerprint: Fingerprint
    state: DeviceState
    measured_at: str  # UTC, ISO 8601
    notes: tuple[str, ...]
    floors: tuple[Floor, ...] = ()  # none in the files of older runs
