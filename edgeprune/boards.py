"""Boards behind ssh: write one into the project file, and find out what one lacks."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import config, files, target
from .errors import AgentError, ConfigError, RuntimeMissing, TargetError, UsageError
from .host import Here, Host, Ssh

OLDEST = (3, 8)
FREE_MB = 100  # less is too little for a few models
CLOCK_S = 120.0  # a clock that is further off is worth a word
QUICK_S = 60.0
FACTS = (
    "import json, os, sys, time; s = os.statvfs(os.path.expanduser('~')); "
    "print(json.dumps([sys.version_info[:3], s.f_bavail * s.f_frsize / 1e6, time.time()]))"
)
Step = tuple[str, str]  # what was looked at, and what was found


def add(path: Path, name: str, keys: Mapping[str, Any]) -> None:
    """Append [target.NAME] to a project file; the rest of the file stays as it is.

    Args:
        path: of the project file, which is there.
        name: of the target.
        keys: of its section: `kind`, `host`, ...; None for those that are not given.
    Raises:
        UsageError: the name is taken, or cannot be one. ConfigError: a key that its kind does not have.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UsageError(f"{name!r} cannot be a target's name; use letters, digits, - and _")
    known = config.read(path).target
    if name in known:
        raise UsageError(f"{path} has [target.{name}] already; change it there, or choose another name")
    given = {key: value for key, value in keys.items() if value is not None}
    target.check_options(name, given)
    lines = [f"[target.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in given.items())]
    text = path.read_text(encoding="utf-8")
    gap = "" if text.endswith("\n\n") else "\n" if text.endswith("\n") else "\n\n"
    with files.writing(path) as beside:
        beside.write_text(text + gap + "\n".join(lines) + "\n", encoding="utf-8")
        config.read(beside)


def walk(name: str, section: Mapping[str, Any]) -> Iterator[Step]:
    """Look at everything that a board needs, in the order in which it is needed.

    Args:
        name: of the target.
        section: its keys.
    Raises:
        TargetError: at the first thing that is missing, with what to do about it.
    """
    destination = section.get("host")
    if not destination and section["kind"] == "jetson":
        yield from _nvidia(Here(), section)
        yield from _runtime("this machine", name, section)
        return
    if not destination:
        raise ConfigError(f"[target.{name}] has no host: it is this machine")
    ssh_config = section.get("ssh_config")
    board = Ssh(str(destination), None if ssh_config is None else Path(ssh_config))
    try:
        board.connect()
        yield "ssh", f"{destination} answers, and its key is the known one"
        yield from _machine(board)
        if section["kind"] == "jetson":
            yield from _nvidia(board, section)
        yield from _runtime(board.name, name, section)
    finally:
        board.close()


def _machine(board: Ssh) -> Iterator[Step]:
    try:
        said = board.run(["python3", "-c", FACTS], QUICK_S)
        version, free_mb, clock_s = json.loads(said.strip().splitlines()[-1])
    except TargetError as error:
        if "not found" not in str(error):
            raise
        raise board.without_python() from error
    text = ".".join(map(str, version))
    if tuple(version) < OLDEST:
        raise TargetError(f"{board.name} has Python {text}; 3.8 or newer is needed: upgrade its system")
    yield "python3", text
    if free_mb < FREE_MB:
        raise TargetError(f"{board.name} has {free_mb:.0f} MB free in its home folder; {FREE_MB} are needed: make room")
    yield "disk", f"{free_mb:,.0f} MB free"
    off_s = abs(clock_s - time.time())
    yield "clock", "right" if off_s < CLOCK_S else f"{off_s:,.0f} s off (harmless here; ssh and apt may mind)"


def _nvidia(host: Host, section: Mapping[str, Any]) -> Iterator[Step]:
    """Driver, TensorRT's module or else its program, and the power mode."""
    with host.start("nvidia_steps") as agent:

        def asked(step: str, **arguments: Any) -> str:
            try:
                return str(agent.call(step, QUICK_S, **arguments))
            except AgentError as error:
                raise TargetError(f"{host.name}: {step}: {error}") from error

        yield "driver", asked("driver", device=section.get("device", 0))
        module, program = asked("module"), asked("program")
        yield "tensorrt", module or "no Python module"
        yield "trtexec", program or "none"
        if not module and not program:
            raise TargetError(
                f"{host.name} has no TensorRT; on a Jetson: sudo apt install nvidia-jetpack python3-libnvinfer"
            )
        yield "power mode", asked("power") or "no Jetson"


def _runtime(board: str, name: str, section: Mapping[str, Any]) -> Iterator[Step]:
    """The runtime runs a model here: one that can be imported may still not work."""
    try:
        opened = target.open_target(name, {name: section})
    except RuntimeMissing as error:
        raise RuntimeMissing(f"{board}: {error}") from error
    try:
        found, state = opened.fingerprint(), opened.state()
        details = dict(found.details)
        yield "runtime", f"{found.runtime}, {found.precision}, {found.threads} thread" + "s" * (found.threads > 1)
        yield "device", f"{found.device}, {details.get('cores', '?')} cores, {state.memory_mb:,.0f} MB of memory free"
        governor = details.get("governor", "unknown")
        frequency = f"{state.frequency_mhz:.0f} MHz" if state.frequency_mhz else "frequency unknown"
        steady = governor in ("performance", "unknown")
        yield "governor", f"{governor}, {frequency}" + ("" if steady else ": `performance` gives steadier latencies")
        heat = f"{state.temperature_c:.0f} °C" if state.temperature_c else "temperature unknown"
        yield "state", "; ".join([heat, *state.notes])
    finally:
        opened.close()
