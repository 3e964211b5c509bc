"""What the device is, and the state it is in: read from /proc and /sys, nothing installed."""

from __future__ import annotations

import glob
import os
import platform
import shutil
import subprocess
from typing import Any

THROTTLED = {1: "too low a voltage", 2: "its frequency is capped", 4: "slowed down", 8: "at its limit of temperature"}


def describe() -> dict[str, str]:
    """What a latency depends on and does not change by itself."""
    cpu = _cpu_fields()
    return {
        "model": _first(["/proc/device-tree/model"])
        or cpu.get("model name")
        or cpu.get("Hardware")
        or platform.machine(),
        "architecture": platform.machine(),
        "cores": str(os.cpu_count() or 1),
        "instructions": _instructions(cpu.get("flags") or cpu.get("Features") or ""),
        "governor": _first(glob.glob("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")) or "unknown",
        "python": platform.python_version(),
        "system": platform.system(),
    }


def state() -> dict[str, Any]:
    """What may change from one minute to the next. Numbers that cannot be read are 0."""
    notes: list[str] = []
    load = os.getloadavg()[0]
    cores = os.cpu_count() or 1
    if load > 0.75 * cores:
        notes.append("busy: load %.1f on %d cores" % (load, cores))
    flags = _throttled()
    notes += ["throttled: " + text for bit, text in THROTTLED.items() if flags & bit]
    return {
        "load": load,
        "frequency_mhz": _frequency_mhz(),
        "temperature_c": _temperature_c(),
        "memory_mb": _memory_mb(),
        "throttled": flags != 0,
        "notes": notes,
    }


def peak_memory_bytes() -> int:
    """The largest resident size of this program so far; the system's own count begins with whoever started it."""
    for line in (_first(["/proc/self/status"]) or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def pin(threads: int) -> list[int]:
    """Stay on as many processors as there are threads: the last ones allowed, for the first serve interrupts."""
    allowed = sorted(os.sched_getaffinity(0))
    chosen = allowed[-threads:] if threads > 0 else allowed
    os.sched_setaffinity(0, chosen)
    return chosen


def _cpu_fields() -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in (_first(["/proc/cpuinfo"]) or "").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _instructions(flags: str) -> str:
    """The vector extensions that kernels are chosen by."""
    known = (
        "avx2",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx_vnni",
        "amx_int8",
        "amx_bf16",
        "amx_tile",
        "asimd",
        "asimddp",
        "asimdhp",
        "sve",
        "i8mm",
        "bf16",
        "neon",
    )
    have = set(flags.split())
    return " ".join(name for name in known if name in have)


def _frequency_mhz() -> float:
    text = _first(["/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"])
    if text:
        return int(text) / 1000.0
    return float(_cpu_fields().get("cpu MHz") or 0)


def _temperature_c() -> float:
    readings = [_first([path]) for path in glob.glob("/sys/class/thermal/thermal_zone*/temp")]
    numbers = [int(text) for text in readings if text and text.lstrip("-").isdigit()]
    return max(numbers) / 1000.0 if numbers else 0.0


def _memory_mb() -> float:
    """What programs could still have, by the kernel's own estimate."""
    for line in (_first(["/proc/meminfo"]) or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def _throttled() -> int:
    """What slows a Raspberry Pi down now: the low bits of its firmware's flags; other devices do not say."""
    text = _first(["/sys/devices/platform/soc/soc:firmware/get_throttled"])
    if text is None and shutil.which("vcgencmd"):
        said = subprocess.run(
            ["vcgencmd", "get_throttled"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10
        )
        text = said.stdout.decode("ascii", "replace").strip()  # throttled=0x50005
    try:
        return int((text or "0").rpartition("=")[2], 16) & sum(THROTTLED)
    except ValueError:
        return 0


def _first(paths: list[str]) -> str | None:
    """The content of the first file that can be read."""
    for path in paths:
        try:
            with open(path, "rb") as stream:
                return stream.read().decode("utf-8", "replace").strip("\x00\n ")
        except OSError:
            continue
    return None
