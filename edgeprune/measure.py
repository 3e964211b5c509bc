"""Fill a latency table on a target, and find out how far it is from whole networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .allocate import Candidates, Costs
from .records import Artifact, Block, Layer, LayerShape, Progress, Timing
from .store import Store
from .table import IDENTITY, Correction, LatencyTable, fit, points, summed_ms, surface, weights_mib
from .target import Target
from .widths import shape_at

BATCH = 12  # layers measured in turn
LAYER_INTERVAL = 0.01  # the 95 % interval of a layer's median, relative
LAYER_S = 0.15  # at most, a layer
DRIFT = 0.04  # a sentinel this far from its reference spoils the batch it was measured with
TRIES = 3
COPIES = 3  # a network is loaded this often to be timed
SENTINEL = LayerShape(
    op="conv", in_ch=64, out_ch=64, batch=1, spatial=(14, 14), kernel=(3, 3), stride=(1, 1), padding=(1, 1),
    dilation=(1, 1), conv_groups=1, fused=("relu",),
)  # fmt: skip


@dataclass(frozen=True)
class Filled:
    """What filling a table took."""

    entries: int  # needed by this network
    measured: int  # of them, now
    drifted: int  # batches measured again because the machine had changed
    noise: float  # median relative spread (p90 - p10) / 2 of the entries
    notes: tuple[str, ...]  # what the device said about itself: busy, throttled ...


def timed(layers: Sequence[Layer], target: Target) -> list[Layer]:
    """The layers that the target can time alone, in the form in which it does."""
    forms = [(layer, target.timed_as(layer.shape)) for layer in layers]
    return [replace(layer, shape=form) for layer, form in forms if form is not None]


def needed(layers: Sequence[Layer], candidates: Candidates) -> list[LayerShape]:
    """Every layer shape that plans for this network can ask for: the dense ones first, then the rest."""
    each = [points(layer, candidates) for layer in layers]
    dense, rest = [p[0] for p in each], [shape for p in each for shape in p[1:]]
    return list(dict.fromkeys(dense + rest))


def fill(
    layers: Sequence[Layer],
    candidates: Candidates,
    target: Target,
    store: Store,
    progress: Progress | None = None,
) -> tuple[LatencyTable, Filled]:
    """Measure what the store does not have yet; every batch is on disk when it is done.

    Args:
        layers: of the network, as `timed` gives them.
        candidates: widths that plans may choose.
        target: where to measure.
        store: shared by all networks on the device.
        progress: told (entries done, of).
    """
    fingerprint = target.fingerprint()
    have = store.entries(fingerprint)
    wanted = needed(layers, candidates)
    missing = [shape for shape in wanted if shape not in have]
    batches = [missing[i : i + BATCH] for i in range(0, len(missing), BATCH)]
    reference = have.get(SENTINEL)
    drifted, notes = 0, set(target.state().notes)
    for batch in batches:
        timings, again = _steady(batch, target, reference)
        drifted += again
        if reference is None:
            reference = timings[0]
            store.add(fingerprint, {SENTINEL: reference})
        measured = dict(zip(batch, timings[1:], strict=True))
        store.add(fingerprint, {shape: _brief(timing) for shape, timing in measured.items()})
        have.update(measured)
        if progress is not None:
            progress(len(wanted) - len(missing) + sum(s in have for s in missing), len(wanted))
    notes |= set(target.state().notes)
    table = LatencyTable(fingerprint, {s: have[s] for s in wanted}, IDENTITY)
    spreads = [(t.p90_ms - t.p10_ms) / 2 / t.median_ms for t in table.timings.values()]
    noise = float(np.median(spreads)) if spreads else 0.0
    return table, Filled(len(wanted), len(missing), drifted, noise, tuple(sorted(notes)))


def _brief(timing: Timing) -> Timing:
    """Entries keep their summary; samples are for comparisons."""
    return replace(timing, samples_ms=())


def _steady(batch: Sequence[LayerShape], target: Target, reference: Timing | None) -> tuple[list[Timing], int]:
    """Time a batch with the sentinel; again when the sentinel says that the machine was not itself."""
    best: tuple[float, list[Timing]] | None = None
    for again in range(TRIES):
        timings = target.time([SENTINEL, *batch], 7, 40, LAYER_INTERVAL, LAYER_S * (len(batch) + 1))
        off = abs(timings[0].median_ms / reference.median_ms - 1) if reference else 0.0
        if best is None or off < best[0]:
            best = (off, timings)
        if off <= DRIFT:
            return timings, again
    assert best is not None
    return best[1], TRIES - 1


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
    timings = target.time(list(artifacts) * copies, 25, 200, 0.004, budget_s)
    return [pooled(timings[at :: len(artifacts)]) for at in range(len(artifacts))]


def pooled(timings: Sequence[Timing]) -> Timing:
    """One timing from those of several copies of a network; each copy counts alike, however often it was visited."""
    least = min(len(t.samples_ms) for t in timings)
    places = [np.linspace(0, len(t.samples_ms) - 1, least).round().astype(int) for t in timings]
    samples = [t.samples_ms[place[at]] for at in range(least) for t, place in zip(timings, places, strict=True)]
    p10, median, p90 = (float(np.percentile(samples, q)) for q in (10, 50, 90))
    return Timing(median, p10, p90, sum(t.runs for t in timings), tuple(samples))


def spread(timings: Sequence[Timing], copies: int = COPIES) -> float:
    """How far the medians of copies of one network lie apart: their relative standard deviation over all networks.

    Args:
        timings: as `time_networks` pools them: the copies' visits take turns.
        copies: of each network.
    """
    medians = np.array([[np.median(t.samples_ms[at::copies]) for at in range(copies)] for t in timings])
    return float(np.sqrt((medians.var(axis=1, ddof=1) / medians.mean(axis=1) ** 2).mean()))


def calibrate(costs_: Costs, networks: Sequence[tuple[Mapping[str, int], float]]) -> tuple[Costs, Correction]:
    """Fit the table's correction on whole networks: (units kept, measured ms) each."""
    present = [costs_.present(units) for units, _ in networks]
    summed = np.array([summed_ms(p, units) for p, (units, _) in zip(present, networks, strict=True)])
    mib = np.array(
        [sum(weights_mib(shape_at(s.layer, units)) for s in p) for p, (units, _) in zip(present, networks, strict=True)]
    )
    correction = fit(summed, mib, np.array([ms for _, ms in networks]))
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


def nearest(widths: Sequence[int], wanted: float) -> int:
    return min((w for w in widths if w), key=lambda w: abs(w - wanted))
