"""Numbers as people read them: a unit with each, and no more digits than mean something."""

from __future__ import annotations

import math

NBSP = "\u00a0"  # between number and unit: they stay on one line


def ms(value: float) -> str:
    """Four digits, and never a power of ten: 1.027 ms, 0.1753 ms, 12340 ms."""
    if not math.isfinite(value):
        return "not measured"
    decimals = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(max(decimals, 0), 6)}f}{NBSP}ms"


def span(low_ms: float, high_ms: float) -> str:
    """0.897 to 1.248 ms: both with the digits of the larger one."""
    high = ms(high_ms)
    decimals = len(high.partition(".")[2]) - len(f"{NBSP}ms") if "." in high else 0
    return f"{low_ms:.{decimals}f} to {high}"


def percent(share: float, sign: str = "") -> str:
    """98.6 %; with `sign` "+" a change: +3.4 %."""
    return f"{share * 100:{sign}.1f}{NBSP}%".replace("-", "−")


def count(number: int) -> str:
    """696,042; 46.9 M."""
    return f"{number / 1e6:,.1f}{NBSP}M" if number >= 10_000_000 else f"{number:,}"


def size(size_bytes: int) -> str:
    """2.82 MB; 4.2 kB; 318 bytes."""
    if size_bytes < 1000:
        return f"{size_bytes}{NBSP}bytes"
    return f"{size_bytes / 1e3:.1f}{NBSP}kB" if size_bytes < 100_000 else f"{size_bytes / 1e6:.2f}{NBSP}MB"


def ratio(value: float, more: str, less: str) -> str:
    """2.07x faster; a ratio below 1 turned around: 1.25x slower."""
    return f"{value:.2f}x {more}" if value >= 1 else f"{1 / value:.2f}x {less}"
