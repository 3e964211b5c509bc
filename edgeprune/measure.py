"""Fill a latency table on a target, and find out how far it is from whole networks."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .allocate import Candidates, Costs
from .config import INTERVAL
from .errors import UsageError
from .records import Artifact, Block, DeviceState, Fingerprint, Layer, LayerShape, Progress, Timing
from .store import Entry, Store
from .table import IDENTITY, Correction, LatencyTable, fit, known, sums, surface, wanted
from .target import Target

BATCH = 12  # layers measured in turn
VISITS = (7, 60)  # of a layer, at least and at most
LAYER_S = 0.2  # at most, a layer
NETWORK_VISITS, NETWORK_INTERVAL = (25, 200), 0.004  # the same, of a whole network
DRIFT = 0.04  # a sentinel this far from its reference spoils the batch it was measured with
TRIES = 3
HOT_C, HOT = 85.0, 1e3  # small boards slow down from here on; what a batch that was measured hot is worth
COOL_S, COOL_STEP_S = 180.0, 5.0  # at most, and a look
COPIES = 3  # a network is loaded this often to be timed ...
SETTLED = 0.003  # ... and again, in further sessions, until its latency is this certain ...
SESSIONS = 8  # ... or it was in this many
PATIENCE, PATIENCE_S = "EDGEPRUNE_PATIENCE_S", 60.0  # in all, for a busy device to become calm
SENTINEL = LayerShape(
    op="conv", in_ch=64, out_ch=64, batch=1, spatial=(14, 14), kernel=(3, 3), stride=(1, 1), padding=(1, 1),
    dilation=(1, 1), conv_groups=1, fused=("relu",),
)  # fmt: skip
_NOWHERE = Fingerprint("", "", "", "", 0, ())  # of a table that is only looked into


@dataclass(frozen=True)
class Filled:
    """What filling a table took, and how far it can be trusted."""

    entries: int  # that this network uses
    measured: int  # of them, now
    drifted: int  # batches measured again because the machine had changed
    interval: float  # that was asked for: half the width of an entry's 95 % interval, relative
    noise: float  # median half-width of the entries' 95 % intervals, relative
    unsure: int  # entries whose interval is wider than was asked for
    notes: tuple[str, ...]  # what the device said about itself, now or when entries were measured: busy, throttled ...


def timed(layers: Sequence[Layer], target: Target) -> list[Layer]:
    """The layers that the target can time alone, in the form in which it does."""
    forms = [(layer, target.timed_as(layer.shape)) for layer in layers]
    return [replace(layer, shape=form) for layer, form in forms if form is not None]


def fill(
    layers: Sequence[Layer],
    candidates: Candidates,
    target: Target,
    store: Store,
    progress: Progress | None = None,
    interval: float = INTERVAL,
) -> tuple[LatencyTable, Filled]:
    """Measure what the store does not have yet, until the table can answer every plan.

    Dense layers come first, then a coarse grid of widths, then the steps of each staircase, so that a table that was
    interrupted is the same table, only coarser. Entries are on disk as soon as they are measured.

    Args:
        layers: of the network, as `timed` gives them.
        candidates: widths that plans may choose.
        target: where to measure.
        store: shared by all networks on the device.
        progress: told (entries done, of): what is known to be missing grows while steps are found.
        interval: a layer is measured until the 95 % interval of its median is this narrow, relative to it.
    """
    work = _Work(target, store, interval)
    while missing := _missing(layers, candidates, work.entries):
        known = len(_used(layers, candidates, work.entries))
        for done in work.measure(missing):
            if progress is not None:
                progress(known + done, known + len(missing))
    work.finish()
    used = {shape: work.entries[shape] for shape in _used(layers, candidates, work.entries)}
    unsure = sum(t.interval > interval for t in used.values())
    wider = f"{unsure} of {len(used)} entries did not get within {100 * interval:g}%"
    notes = {*work.notes, *work.noted_before(used), *([wider] if unsure else [])}
    noise = float(np.median([t.interval for t in used.values()])) if used else 0.0
    filled = Filled(len(used), work.measured, work.repeated, interval, noise, unsure, tuple(sorted(notes)))
    return LatencyTable(work.fingerprint, used, IDENTITY), filled


def _missing(layers: Sequence[Layer], candidates: Candidates, entries: Mapping[LayerShape, Timing]) -> list[LayerShape]:
    """What every layer wants next, once each: all of one stage before any of the next, the costliest layers first."""
    table = LatencyTable(_NOWHERE, entries, IDENTITY)
    each = [wanted(surface(table, layer, candidates)) for layer in sorted(layers, key=lambda la: -la.macs)]
    return list(dict.fromkeys(shape for shapes in each for shape in shapes))


def _used(layers: Sequence[Layer], candidates: Candidates, entries: Mapping[LayerShape, Timing]) -> list[LayerShape]:
    """The entries that this network's surfaces rest on."""
    table = LatencyTable(_NOWHERE, entries, IDENTITY)
    each = [known(surface(table, layer, candidates)) for layer in layers]
    return list(dict.fromkeys(shape for shapes in each for shape in shapes))


class _Work:
    """One filling of a device's table: what is known, what was measured, how steady the machine was."""

    def __init__(self, target: Target, store: Store, interval: float) -> None:
        self.target, self.store, self.interval = target, store, interval
        self.fingerprint = target.fingerprint()
        self.entries = store.entries(self.fingerprint)
        self.reference = self.entries.get(SENTINEL)
        self.measured, self.repeated, self.unsteady = 0, 0, 0
        self.session, self.patience_s = 0, COOL_S
        self.notes: set[str] = set()

    def measure(self, missing: Sequence[LayerShape]) -> Iterator[int]:
        """Measure in batches and keep each; yields how many are done."""
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            if not self.session:
                self.session = self.store.begin(self.fingerprint, self._state())
            timings = self._steady(batch)
            found = dict(zip(batch, timings[1:], strict=True))
            if self.reference is None:
                self.reference = found[SENTINEL] = timings[0]
            brief = {shape: replace(timing, samples_ms=()) for shape, timing in found.items()}
            self.store.add(self.fingerprint, brief, self.session)
            self.entries |= brief
            self.measured += len(batch)
            yield start + len(batch)

    def _steady(self, batch: Sequence[LayerShape]) -> list[Timing]:
        """Time a batch with the sentinel; again when that says that the machine was not itself.

        A machine that stays another is measured as it is, and the table says so.
        """
        best: tuple[float, list[Timing]] | None = None
        tries = TRIES if self.unsteady < TRIES else 1
        for again in range(tries):
            self._cool()
            timings = self.target.time([SENTINEL, *batch], *VISITS, self.interval, LAYER_S * (len(batch) + 1))
            off = abs(timings[0].median_ms / self.reference.median_ms - 1) if self.reference else 0.0
            if self._hot(self._state()):
                off += HOT  # worse than any that was not
            if best is None or off < best[0]:
                best = (off, timings)
            self.repeated += again > 0
            if off <= DRIFT:
                self.unsteady = 0
                return timings
        assert best is not None
        self.unsteady += 1
        self.notes.add(
            "some entries were measured while the device was hot or throttled"
            if best[0] >= HOT
            else "some entries were measured while the sentinel layer ran more than 4 % off its first latency"
        )
        return best[1]

    def _cool(self) -> None:
        """Wait for a device that is too hot or throttled, but not for ever."""
        deadline_s = time.monotonic() + self.patience_s
        while self._hot(self._state()):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                self.patience_s = 0.0  # it does not cool down: waiting before every batch would help no one
                self.notes.add(f"the device stayed hot or throttled, also after {COOL_S:g} s of waiting")
                return
            time.sleep(min(COOL_STEP_S, left_s))

    def _hot(self, state: DeviceState) -> bool:
        return state.throttled or state.temperature_c >= HOT_C

    def _state(self) -> DeviceState:
        state = self.target.state()
        self.notes |= set(state.notes)
        return state

    def noted_before(self, used: Mapping[LayerShape, Timing]) -> set[str]:
        """What earlier sessions noted that measured some of these entries."""
        took = {e.session for e in self.store.records(self.fingerprint) if e.layer in used} - {self.session}
        sessions = [s for s in self.store.sessions(self.fingerprint) if s.id in took]
        return {f"{note} (on {s.began_at[:10]})" for s in sessions for note in (*s.began.notes, *s.notes)}

    def finish(self) -> None:
        """Record the state that the device was in at the end."""
        if self.session:
            self.store.finish(self.session, self._state(), sorted(self.notes))


@dataclass(frozen=True)
class Again:
    """Entries measured again: latency now over latency in the table."""

    count: int
    median: float
    p5: float
    p95: float
    notes: tuple[str, ...]


def again(entries: Sequence[Entry], target: Target) -> Again:
    """Measure entries of a table again, in turn."""
    if not entries:
        return Again(0, 1.0, 1.0, 1.0, ())
    batches = [entries[at : at + BATCH] for at in range(0, len(entries), BATCH)]
    ratios = []
    for batch in batches:
        timings = target.time([e.layer for e in batch], *VISITS, INTERVAL, LAYER_S * len(batch))
        ratios += [t.median_ms / e.timing.median_ms for t, e in zip(timings, batch, strict=True)]
    p5, median, p95 = np.percentile(ratios, [5, 50, 95])
    return Again(len(entries), float(median), float(p5), float(p95), tuple(target.state().notes))


def costs(layers: Sequence[Layer], candidates: Candidates, table: LatencyTable, blocks: Sequence[Block]) -> Costs:
    """What plans cost by this table."""
    surfaces = tuple(surface(table, layer, candidates) for layer in layers)
    dense = {group: widths[-1] for group, widths in candidates.items()}
    return Costs(surfaces, dict(candidates), tuple(blocks), dense)


# ---- whole networks ------------------------------------------------------------------------------------------


def time_networks(
    artifacts: Sequence[Artifact], target: Target, budget_s: float = 20.0, copies: int = COPIES
) -> list[Timing]:
    """End-to-end latencies of whole networks, in turn.

    Each is loaded `copies` times and its visits are pooled: where a runtime puts a network's buffers in memory moves
    its latency by a percent or more, and that is decided anew each time it is loaded.
    """
    timings = target.time(list(artifacts) * copies, *NETWORK_VISITS, NETWORK_INTERVAL, budget_s)
    return [pooled(timings[at :: len(artifacts)]) for at in range(len(artifacts))]


def patience_s() -> float:
    """How long to wait for a device that is busy, in seconds.

    Raises:
        UsageError: EDGEPRUNE_PATIENCE_S is no such number.
    """
    text = os.environ.get(PATIENCE, str(PATIENCE_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise UsageError(f"{PATIENCE}={text}: give the seconds to wait for a busy device to become calm, 0 or more")
    return seconds


def pooled(timings: Sequence[Timing]) -> Timing:
    """One timing from those of several copies of a network; each copy counts alike, however often it was visited."""
    least = min(len(t.samples_ms) for t in timings)
    places = [np.linspace(0, len(t.samples_ms) - 1, least).round().astype(int) for t in timings]
    samples = [t.samples_ms[place[at]] for at in range(least) for t, place in zip(timings, places, strict=True)]
    p10, median, p90 = (float(np.percentile(samples, q)) for q in (10, 50, 90))
    within = float(np.sqrt(np.mean([t.interval**2 for t in timings])))
    apart = 1.96 * float(np.std([t.median_ms for t in timings], ddof=1)) / median if len(timings) > 1 else 0.0
    interval = float(np.hypot(within, apart) / np.sqrt(len(timings)))
    return Timing(median, p10, p90, sum(t.runs for t in timings), tuple(samples), interval)


def spread(timings: Sequence[Timing], copies: int = COPIES) -> float:
    """How far the medians of copies of one network lie apart: their relative standard deviation over all networks.

    Args:
        timings: as `time_networks` pools them: the copies' visits take turns.
        copies: of each network.
    """
    medians = np.array([[np.median(t.samples_ms[at::copies]) for at in range(copies)] for t in timings])
    return float(np.sqrt((medians.var(axis=1, ddof=1) / medians.mean(axis=1) ** 2).mean()))


def error(noise: float, copies: int) -> float:
    """Standard error, relative, of the median of `copies` that lie `noise` apart."""
    return 1.2533 * noise / math.sqrt(copies)


def sessions(noise: float, copies: int = COPIES) -> int:
    """How many it takes, at most SESSIONS, until a latency is as certain as SETTLED."""
    return min(max(math.ceil((error(noise, copies) / SETTLED) ** 2), 1), SESSIONS)


def calibrate(costs_: Costs, networks: Sequence[tuple[Mapping[str, int], float]]) -> tuple[Costs, Correction]:
    """Fit the table's correction on whole networks: (units kept, measured ms) each."""
    summed = np.array([sums(costs_.present(units), units) for units, _ in networks])
    correction = fit(summed, np.array([ms for _, ms in networks]))
    table = replace(costs_.surfaces[0].table, correction=correction)
    corrected = tuple(replace(s, table=table) for s in costs_.surfaces)
    return replace(costs_, surfaces=corrected), correction


def samples(candidates: Candidates, count: int, seed: int) -> list[dict[str, int]]:
    """Plans to calibrate on: all groups at one share, evenly from small to large, and widths drawn at random."""
    draw = np.random.Generator(np.random.PCG64(seed))
    plans = []
    for number in range(count):
        share = 0.25 + 0.6 * number / max(count - 1, 1)
        plans.append(
            {g: nearest(widths, share * widths[-1] * draw.uniform(0.7, 1.3)) for g, widths in candidates.items()}
        )
    return plans


def random_plans(candidates: Candidates, count: int, seed: int) -> list[dict[str, int]]:
    """Plans to judge a table by: each group at its own random width, around a share of 20 to 90 % of the plan's own."""
    draw = np.random.Generator(np.random.PCG64(seed))
    shares = draw.permutation(np.linspace(0.2, 0.9, count))
    return [
        {g: nearest(w, min(1.0, s * draw.uniform(0.5, 1.5)) * w[-1]) for g, w in candidates.items()} for s in shares
    ]


def nearest(widths: Sequence[int], wanted: float) -> int:
    return min((w for w in widths if w), key=lambda w: abs(w - wanted))
