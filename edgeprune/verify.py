"""Check the exported networks on the target: do they compute the same, how right are they, how fast are they?"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np
import torch
from torch import nn

from . import measure, metrics
from .finetune import Images
from .graph import Example, as_call
from .metrics import Metric
from .records import Accuracy, Agreement, Artifact, Budget, Floor, NetworkCheck, Progress, Timing, VerifyReport
from .target import Target, peak_memory_bytes

FORMAT = "edgeprune.verify/1"
TOLERANCE = {"f32": 1e-3, "f16": 2e-2, "bf16": 5e-2, "int8": 0.2}  # of the largest output, by precision
AGREEMENT_IMAGES = 64
WASTE = 0.05  # a network this far under its budget could have kept more
DRIFT = 0.015
SESSIONS = 4
COPIES = 5  # each network is loaded this often: see measure.time_networks
BOOTSTRAP = 2000
Z95 = 1.959964


@dataclass(frozen=True)
class Network:
    """A network in both forms, with what is counted once."""

    module: nn.Module
    artifact: Artifact
    params: int
    macs: int


@dataclass(frozen=True)
class Check:
    """One promise and whether it holds."""

    name: str
    passed: bool
    text: str


def verdict(report: VerifyReport) -> list[Check]:
    """Every promise with its figures; the network passes when all hold."""
    limit = budget_ms(report.budget, report.dense.latency.median_ms)
    median = report.pruned.latency.median_ms
    under = 1 - median / limit
    checks = [
        Check(
            "latency",
            median <= limit,
            f"{median:.4g} ms measured, budget {limit:.4g} ms ({abs(under):.1%} {'under' if under >= 0 else 'over'})",
        )
    ]
    if report.budget.size_mb is not None:
        size_mb = report.pruned.size_bytes / 1e6
        text = f"{size_mb:.4g} MB, budget {report.budget.size_mb:.4g} MB"
        checks.append(Check("size", size_mb <= report.budget.size_mb, text))
    for label, network in (("dense", report.dense), ("pruned", report.pruned)):
        a = network.agreement
        checks.append(
            Check(
                f"agreement of the {label} network",
                a.max_difference <= a.tolerance,
                f"largest difference from torch {a.max_difference:.2g} of the largest output (allowed {a.tolerance:g})"
                f", same class on {a.same_class:.1%} of {a.images} images",
            )
        )
    if report.accuracy_floor is not None:
        found, wanted = report.pruned.accuracy, report.accuracy_floor
        text = f"{found.value:.2%} measured" if found is not None else "not measured: there were no final images"
        checks.append(Check("accuracy", found is not None and found.value >= wanted, f"{text}, floor {wanted:.2%}"))
    return checks + [_floor_check(floor) for floor in report.floors]


def _floor_check(floor: Floor) -> Check:
    if floor.pruned is None:
        text = f"not measured: there were no final images, floor {floor.floor:.4g}"
        return Check(floor.name, False, text)
    text = f"{floor.pruned:.4g} measured, floor {floor.floor:.4g} (dense {floor.dense:.4g})"
    return Check(floor.name, floor.pruned >= floor.floor, text)  # NaN is below any floor


def passed(report: VerifyReport) -> bool:
    return all(check.passed for check in verdict(report))


def budget_ms(budget: Budget, dense_ms: float) -> float:
    """The budget in milliseconds, given the dense latency of the same session."""
    if budget.latency_ms is not None:
        return budget.latency_ms
    assert budget.speedup is not None
    return dense_ms / budget.speedup


def check(
    dense: Network,
    pruned: Network,
    target: Target,
    budget: Budget,
    predicted_ms: float,
    dense_reference_ms: float,
    example: Example,
    final: Images | None,
    accuracy_floor: float | None = None,
    progress: Progress | None = None,
    floors: Mapping[str, tuple[float, Metric]] | None = None,
    notes: Sequence[str] = (),
) -> VerifyReport:
    """Measure both networks on the target.

    Args:
        dense, pruned: the networks.
        target: where.
        budget: what was asked for.
        predicted_ms: what the plan promised for the pruned network.
        dense_reference_ms: dense latency when the budget was planned: a session in which it differs by more than
            DRIFT is held again, at most until there are SESSIONS; where it never was itself the nearest one counts.
        example: one input of the network.
        final: labelled images nobody has looked at; None where there are no data.
        accuracy_floor: what the pruned network must reach on them.
        progress: told (images done, of).
        floors: by name, what the pruned network must reach on them, and in which metric.
        notes: what is known already.
    """
    dense_time, pruned_time, noted = _latency(dense, pruned, target, dense_reference_ms)
    speedup, low, high = bootstrap_ratio(dense_time.samples_ms, pruned_time.samples_ms)
    x = _inputs(final, example)
    steps = 2 * (len(final) if final is not None else 0)
    floors = floors or {}
    wanted = {name: metric for name, (_, metric) in floors.items()}
    checks, values = [], []
    for at, (network, timing) in enumerate(((dense, dense_time), (pruned, pruned_time))):
        step = _shifted(progress, at * (steps // 2), steps)
        accuracy, found = judged(network, target, final, wanted, step) if final is not None else (None, {})
        values.append(found)
        checks.append(
            NetworkCheck(
                latency=timing,
                accuracy=accuracy,
                agreement=_agreement(network, target, x),
                params=network.params,
                macs=network.macs,
                size_bytes=network.artifact.size_bytes,
                peak_memory_bytes=peak_memory_bytes(target, network.artifact),
            )
        )
    return VerifyReport(
        budget=budget,
        accuracy_floor=accuracy_floor,
        predicted_ms=predicted_ms,
        dense=checks[0],
        pruned=checks[1],
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        fingerprint=target.fingerprint(),
        state=target.state(),
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        notes=(*notes, *noted),
        floors=tuple(Floor(n, f, values[0].get(n), values[1].get(n)) for n, (f, _) in floors.items()),
    )


def _latency(
    dense: Network, pruned: Network, target: Target, reference_ms: float
) -> tuple[Timing, Timing, tuple[str, ...]]:
    """Both in turn, in as many sessions as it takes; one in which the dense network is not itself is held again."""
    held: list[list[Timing]] = []
    calm: list[list[Timing]] = []
    wanted = 1
    until = time.monotonic() + measure.patience_s()
    while len(calm) < wanted and (len(held) < SESSIONS or time.monotonic() < until):
        held.append(measure.time_networks([dense.artifact, pruned.artifact], target, 30.0, COPIES))
        calm = [timings for timings in held if abs(timings[0].median_ms / reference_ms - 1) <= DRIFT]
        if calm:
            wanted = measure.sessions(statistics.median(measure.spread(t, COPIES) for t in calm), COPIES)
    nearest = min(held, key=lambda timings: abs(timings[0].median_ms / reference_ms - 1))
    dense_time, pruned_time = (measure.pooled(timings) for timings in zip(*(calm or [nearest]), strict=True))
    if calm:
        note = f"measured {len(held)} times: the device had drifted"
        return dense_time, pruned_time, (note,) if len(held) > len(calm) else ()
    off = dense_time.median_ms / reference_ms - 1
    how = "slower" if off > 0 else "faster"
    return dense_time, pruned_time, (f"the device is {abs(off):.1%} {how} now than when the budget was planned",)


def bootstrap_ratio(dense_ms: Sequence[float], pruned_ms: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of medians with its 95 % bootstrap interval."""
    a, b = np.asarray(dense_ms), np.asarray(pruned_ms)
    draw = np.random.Generator(np.random.PCG64(0))
    medians_a = np.median(draw.choice(a, (BOOTSTRAP, len(a))), axis=1)
    medians_b = np.median(draw.choice(b, (BOOTSTRAP, len(b))), axis=1)
    low, high = np.percentile(medians_a / medians_b, [2.5, 97.5])
    return float(np.median(a) / np.median(b)), float(low), float(high)


def wilson(correct: int, total: int) -> Accuracy:
    """Share of successes with its 95 % Wilson interval."""
    p = correct / total
    centre = (p + Z95**2 / (2 * total)) / (1 + Z95**2 / total)
    half = Z95 * math.sqrt(p * (1 - p) / total + Z95**2 / (4 * total**2)) / (1 + Z95**2 / total)
    return Accuracy(correct, total, p, max(0.0, centre - half), min(1.0, centre + half))


def judged(
    network: Network, target: Target, images: Images, wanted: Mapping[str, Metric], progress: Progress | None
) -> tuple[Accuracy | None, dict[str, float]]:
    """Accuracy, of a classifier, and the metrics, from one pass over the images on the target."""
    parts = [(x.numpy(), y.numpy()) for x, y in images.batches(256)]
    x, y = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    outputs = target.run(network.artifact, [x], progress)
    right = wilson(int((outputs.argmax(axis=1) == y).sum()), len(y)) if outputs.ndim == 2 and y.ndim == 1 else None
    return right, metrics.measure(wanted, outputs, y, x)


def _inputs(images: Images | None, example: Example) -> list[torch.Tensor]:
    """Real images where there are some, else the example."""
    if images is not None:
        return [next(iter(images.batches(min(AGREEMENT_IMAGES, len(images)))))[0]]
    args, kwargs = as_call(example)
    return [item for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor)]


def _agreement(network: Network, target: Target, inputs: list[torch.Tensor]) -> Agreement:
    with torch.inference_mode():
        expected = _first(network.module.eval()(*inputs)).float().numpy()
    found = target.run(network.artifact, [x.numpy() for x in inputs])
    scale = float(np.abs(expected).max()) or 1.0
    same = float((expected.reshape(len(expected), -1).argmax(1) == found.reshape(len(found), -1).argmax(1)).mean())
    tolerance = TOLERANCE.get(network.artifact.precision, TOLERANCE["f32"])
    return Agreement(len(expected), float(np.abs(expected - found).max()) / scale, same, tolerance)


def _first(output: object) -> torch.Tensor:
    leaves = torch.utils._pytree.tree_flatten(output)[0]
    return next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def _shifted(progress: Progress | None, done: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda at, of: progress(done + at, total)
