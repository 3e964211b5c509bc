"""What a Jetson says about itself, read from its own tools' text: board, release, power mode, clocks, heat.

Nothing here changes anything; what cannot be read is left out. Tools differ between boards and releases.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
from typing import Any

MODEL, RELEASE = "/proc/device-tree/model", "/etc/nv_tegra_release"
TOOL_S = 10.0
MODE = re.compile(r"^NV Power Mode\s*:\s*(?P<name>\S.*?)\s*\n\s*(?P<id>\d+)\s*$", re.M)
NAMED = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>")
TEGRA = re.compile(r"#\s*R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)")
CLOCK = re.compile(r"^(\w+)\s.*?MinFreq=(\d+)\s+MaxFreq=(\d+)\s+CurrentFreq=(\d+)", re.M)
CPU = re.compile(r"^(cpu\d+):.*?MinFreq=(\d+)\s+MaxFreq=(\d+)\s+CurrentFreq=(\d+)", re.M)
GPU_LOAD = re.compile(r"GR3D_FREQ (\d+)%(?:@\[?(\d+)(?:,\d+)*\]?)?")
MEMORY = re.compile(r"\bRAM (\d+)/(\d+)MB")
HEAT = re.compile(r"\b([A-Za-z][\w-]*)@(-?\d+(?:\.\d+)?)C\b")
RAIL = re.compile(r"\b((?:VDD|VIN|POM)_\w+) (\d+)(?:mW)?/(\d+)(?:mW)?\b")
ABSENT_C = -200.0  # a sensor that is off reads -256
FIXED = "PMIC"  # a sensor that always reads 50 or 100
COOLERS = ("gpu", "cpufreq", "devfreq", "balanced")  # cooling devices that slow something down; others are fans
DIGITS = 12  # more is no number that a tool means


# ---- reading -------------------------------------------------------------------------------------------------


def power_mode(text: str) -> tuple[str, int] | None:
    """Name and number from `nvpmodel -q`; warnings may stand before them. None: it says no mode."""
    found = MODE.search(text.replace("\r", ""))
    return (found.group("name"), int(found.group("id")[:DIGITS])) if found else None


def power_modes(text: str) -> dict[str, int]:
    """Names and numbers of all modes, from nvpmodel.conf or `nvpmodel -p --verbose`."""
    return {name: int(number[:DIGITS]) for number, name in NAMED.findall(text)}


def release(text: str) -> str:
    """`35.4.1` from /etc/nv_tegra_release; "" where it says none."""
    found = TEGRA.search(text)
    return "%s.%s" % found.groups() if found else ""


def clocks(text: str) -> dict[str, tuple[float, float, float]]:
    """(least, most, now) in MHz of each clock from `jetson_clocks --show`, as gpu, emc, cpu0, ..."""
    found = {}
    for name, *numbers in CPU.findall(text):
        found[name] = tuple(float(n[:DIGITS]) / 1e3 for n in numbers)  # kHz
    for name, *numbers in CLOCK.findall(text):
        if name in ("GPU", "EMC"):
            found[name.lower()] = tuple(float(n[:DIGITS]) / 1e6 for n in numbers)  # Hz
    return found  # type: ignore[return-value]


def tegrastats(line: str) -> dict[str, Any]:
    """One line of tegrastats: what of it can be read. Fields come and go with boards and releases."""
    found: dict[str, Any] = {}
    load = GPU_LOAD.search(line)
    if load:
        found["gpu_load"] = int(load.group(1)[:DIGITS])
        if load.group(2):
            found["gpu_mhz"] = float(load.group(2)[:DIGITS])
    memory = MEMORY.search(line)
    if memory:
        used, total = (int(n[:DIGITS]) for n in memory.groups())
        found["memory_free_mb"] = float(total - used)
    heat = {name: float(c[:DIGITS]) for name, c in HEAT.findall(line)}
    found["temperatures_c"] = {name: c for name, c in heat.items() if c > ABSENT_C and name != FIXED}
    found["power_mw"] = {name: int(now[:DIGITS]) for name, now, _ in RAIL.findall(line)}
    return found


# ---- the board -----------------------------------------------------------------------------------------------


def is_one() -> bool:
    return os.path.exists(RELEASE) or "jetson" in read(MODEL).lower()


def describe() -> dict[str, str]:
    """What a latency depends on and stays as it is: board, release, power mode, limits of the clocks."""
    found = {"board": read(MODEL), "l4t": release(read(RELEASE))}
    found["power_mode"] = mode_now()
    shown = clocks(said(["jetson_clocks", "--show"], root=True))
    for name in ("gpu", "emc"):
        if name in shown:
            found[name + "_mhz"] = "%.0f-%.0f" % shown[name][:2]  # the same twice: locked
    return {key: text for key, text in found.items() if text}


def mode_now() -> str:
    """The power mode, as it stands in descriptions; "" where there is none."""
    mode = power_mode(said(["nvpmodel", "-q"]))
    return "%s (%d)" % mode if mode else ""


def throttled(root: str = "/sys/class/thermal") -> list[str]:
    """What the kernel slows down now, because of heat."""
    found = []
    for folder in sorted(glob.glob(root + "/cooling_device*")):
        kind, level = read(folder + "/type"), read(folder + "/cur_state")
        if any(word in kind.lower() for word in COOLERS) and level not in ("", "0"):
            found.append("%s is slowed down by %s" % (kind, level))
    return found


def state() -> dict[str, Any]:
    """What tegrastats says now; {} where there is none."""
    program = tool("tegrastats")
    if program is None:
        return {}
    watched = subprocess.Popen([program, "--interval", "500"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert watched.stdout is not None
    try:
        line = watched.stdout.readline().decode("utf-8", "replace")
    finally:
        watched.kill()
        watched.communicate()
    return tegrastats(line)


# ---- inside --------------------------------------------------------------------------------------------------


def as_root(command: list[str]) -> list[str]:
    return command if os.geteuid() == 0 else ["sudo", "-n", *command]


def said(command: list[str], root: bool = False) -> str:
    """What a tool prints; "" where it is missing or refuses."""
    program = tool(command[0])
    if program is None:
        return ""
    command = [program, *command[1:]]
    try:
        done = subprocess.run(
            as_root(command) if root else command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=TOOL_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def tool(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin:/sbin")


def read(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            return stream.read().decode("utf-8", "replace").strip("\x00\n ")
    except OSError:
        return ""
