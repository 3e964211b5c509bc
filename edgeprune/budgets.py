"""What a budget may be: one number, several for nested plans, or one for each of several targets.

latency_ms = 8                        one network
latency_ms = [8, 6, 4]                one after the other, each a subset of the one before     --latency-ms 8,6,4
latency_ms = { cpu = 8, pi = 20 }     one network for several targets                          --latency-ms cpu=8,pi=20
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import BudgetError
from .records import Budget

Numbers = float | Sequence[float] | Mapping[str, float]
FORMS = "write one number (8), several (8,6,4), or one for each target (cpu=8,pi=20)"
KINDS = "a latency in milliseconds (--latency-ms 8) or a speed-up (--speedup 2)"


@dataclass(frozen=True)
class Request:
    """Budgets, the loosest first; each holds one for every target."""

    targets: tuple[str, ...]
    levels: tuple[tuple[Budget, ...], ...]


def parse(text: str) -> Numbers:
    """`8`, `8,6,4` or `cpu=8,pi=20`.

    Raises:
        BudgetError: it is none of these.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        if all("=" in part for part in parts):
            return {name.strip(): float(number) for name, _, number in (part.partition("=") for part in parts)}
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        raise BudgetError(f"a budget of {text!r} cannot be read: {FORMS}") from None
    return numbers if len(numbers) > 1 else numbers[0]


def names(target: str) -> tuple[str, ...]:
    """The targets in `cpu` or `cpu,pi`."""
    return tuple(name.strip() for name in target.split(",") if name.strip())


def requested(
    target: str, latency_ms: Numbers | None, speedup: Numbers | None, size_mb: float | None = None
) -> Request:
    """Check what was asked for.

    Args:
        target: one name, or several with commas between.
        latency_ms, speedup: one of them.
        size_mb: of the exported file, at most, beside it.
    Raises:
        BudgetError: none or both were given, or they make no sense; the message says which.
    """
    if (latency_ms is None) == (speedup is None):
        raise BudgetError(f"give one budget: {KINDS}")
    targets = names(target)
    numbers = latency_ms if latency_ms is not None else speedup
    assert numbers is not None
    levels = [_budget(each, latency_ms is not None, size_mb) for each in _levels(targets, numbers)]
    loosest_first = sorted(levels, key=lambda level: -(level[0].latency_ms or 1 / (level[0].speedup or 1)))
    if len(set(loosest_first)) < len(loosest_first):
        raise BudgetError("the same budget is given twice; nested plans need different ones")
    return Request(targets, tuple(loosest_first))


def _levels(targets: Sequence[str], numbers: Numbers) -> list[tuple[float, ...]]:
    if isinstance(numbers, Mapping):
        if set(numbers) != set(targets):
            raise BudgetError(
                f"there are budgets for {', '.join(numbers)} and the targets are {', '.join(targets)}: give each "
                f"target one, as in --target {','.join(numbers)}"
            )
        return [tuple(numbers[name] for name in targets)]
    if isinstance(numbers, Sequence):
        if len(targets) > 1:
            raise BudgetError(
                f"several budgets for several targets cannot be told apart; give each target one: "
                f"{','.join(f'{name}={n:g}' for name, n in zip(targets, numbers, strict=False))}"
            )
        return [(n,) for n in numbers]
    return [(numbers,) * len(targets)]


def _budget(numbers: Sequence[float], is_latency: bool, size_mb: float | None) -> tuple[Budget, ...]:
    for number in numbers:
        if is_latency and not number > 0:
            raise BudgetError(
                f"a budget of {number:g} ms makes no sense; it is the median latency of one input, above 0"
            )
        if not is_latency and not number > 1:
            raise BudgetError(f"a speed-up of {number:g} asks for nothing; 2 means half the dense network's latency")
    return tuple(Budget(n, None, size_mb) if is_latency else Budget(None, n, size_mb) for n in numbers)


def label(budget: Budget) -> str:
    """`8ms`, `2x`: also the name of a run's folder."""
    return f"{budget.latency_ms:g}ms" if budget.latency_ms is not None else f"{budget.speedup:g}x"


def size_bytes(budget: Budget) -> float | None:
    """Of the exported file, at most."""
    return None if budget.size_mb is None else 1e6 * budget.size_mb
