"""The state that a machine with an NVIDIA GPU is in, from what it has: tegrastats on a Jetson, nvidia-smi elsewhere."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

from . import jetson, machine

QUERY = "clocks.sm,temperature.gpu,clocks_throttle_reasons.active"
SLOWED = {0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat (hardware)", 0x80: "power brake"}
CAPPED = 0x4  # at its limit of power: usual under full load, and told as a note only
TOOL_S = 10.0


def state(device: int = 0) -> dict[str, Any]:
    """As `machine.state`, with the GPU's clock and heat in the place of the processor's."""
    found = machine.state()
    notes: list[str] = list(found["notes"])
    if jetson.is_one():
        read = jetson.state()
        if "gpu_mhz" in read:
            found["frequency_mhz"] = read["gpu_mhz"]
        found["temperature_c"] = max(read.get("temperatures_c", {}).values(), default=found["temperature_c"])
        slowed = jetson.throttled()
        notes += ["throttled: " + text for text in slowed]
        return dict(found, throttled=bool(found["throttled"] or slowed), notes=notes)
    clock_mhz, heat_c, reasons = smi(_asked(device))
    slowed = [text for bit, text in SLOWED.items() if reasons & bit]
    notes += ["throttled: " + text for text in slowed]
    notes += ["the GPU is at its limit of power"] if reasons & CAPPED else []
    return dict(
        found, frequency_mhz=clock_mhz or found["frequency_mhz"], temperature_c=heat_c or found["temperature_c"],
        throttled=bool(found["throttled"] or slowed), notes=notes,
    )  # fmt: skip


def smi(line: str) -> tuple[float, float, int]:
    """Clock in MHz, degrees Celsius and reasons from one line of nvidia-smi's CSV; 0 for what it does not say."""
    fields = [field.strip() for field in line.split(",")] + [""] * 3
    return _number(fields[0]), _number(fields[1]), _bits(fields[2])


def _number(text: str) -> float:
    try:
        return max(float(text[:12]), 0.0) if text[:1].isdigit() else 0.0
    except ValueError:
        return 0.0


def _bits(text: str) -> int:
    try:
        return int(text[:20], 16)
    except ValueError:
        return 0


def _asked(device: int) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-gpu=" + QUERY, "--format=csv,noheader,nounits", "--id=%d" % device]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=TOOL_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace").strip()
