"""What a target is: the one interface between pruning and devices, and the one place where a device is chosen.

A target knows files and milliseconds, not pruning. `time` serves single layers, whole models and verification alike,
so a prediction and its measurement come from one path.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from .errors import ConfigError, UsageError
from .host import Host
from .records import Artifact, DeviceState, Fingerprint, LayerShape, Operators, Progress, Timing

if TYPE_CHECKING:
    from torch import nn

    from .graph import Example

T = TypeVar("T")
SILENCE_S = 300.0  # without a word from the device program for this long, it hangs


class Target(Protocol):
    """A device with a runtime. Opened with `open_target`, closed when done."""

    name: str
    host: Host  # where its device program runs
    runtime: str  # of the device program: the name of a file in profilers/
    opening: Mapping[str, Any]  # the arguments of the device program's `open`

    def fingerprint(self) -> Fingerprint:
        """What a measurement here depends on."""

    def time(
        self,
        items: Sequence[LayerShape | Artifact],
        least: int,
        most: int,
        interval: float,
        budget_s: float,
    ) -> list[Timing]:
        """Median latencies of layers and whole models, measured in turn on the device.

        Args:
            items: what to time.
            least, most: bounds on the visits to each.
            interval: visits end when the 95 % interval of the median is this narrow, relative to it.
            budget_s: they end after this long in any case.
        Raises:
            TargetError: the device could not measure something; nothing is ever a default.
        """

    def timed_as(self, shape: LayerShape) -> LayerShape | None:
        """The form in which a layer can be timed alone, or None: what cannot ends up in the table's correction."""

    def export(
        self, module: nn.Module, example: Example, folder: Path, calibration: Sequence[NDArray[Any]] = ()
    ) -> Artifact:
        """Write `module` as the files this target's runtime loads, into `folder`.

        Args:
            module: in torch.
            example: one input; its batch size is fixed in the files.
            folder: made where it is missing.
            calibration: of every input, some real ones (images, ...), for precisions that need to know their range.
        """

    def run(
        self, artifact: Artifact, inputs: Sequence[NDArray[Any]], progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Inference on the device: (N, ...) arrays in, (N, outputs) out."""

    def stored(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Inputs of torch, (N, channels, ...), as the exported files take them."""

    def operators(self, folder: Path) -> Operators:
        """What each operator of the network that was exported into a folder takes, by the runtime's own profiler."""

    def state(self) -> DeviceState:
        """Load, clock and temperature now."""

    def close(self) -> None: ...


def calibrated(target: Target) -> bool:
    """Do this target's exports need to know the range of real inputs?"""
    return target.fingerprint().precision == "int8"


def peak_memory_bytes(target: Target, artifact: Artifact) -> int | None:
    """The most memory of a process that does nothing on the device but load a network and run it, Python included.

    None where the device program does not count it: a network that runs on a GPU is not in its processor's memory.
    """
    with target.host.start(target.runtime, "-memory") as agent:
        agent.call("open", SILENCE_S, **target.opening)
        if "peak_memory_bytes" not in agent.call("state", SILENCE_S):
            return None
        items = [{"model": target.host.put(Path(artifact.path))}]
        reply = agent.call("time", SILENCE_S, items=items, least=1, most=1, interval=1.0, budget_s=0.0)
    return int(reply["peak_memory_bytes"])


def fingerprint_of(kind: str, precision: str, threads: int, machine: Mapping[str, str]) -> Fingerprint:
    """What a device program says about its machine when it is opened, as what a measurement there depends on."""
    apart = ("processor", "runtime", "python", "model")
    details = tuple(sorted((key, text) for key, text in machine.items() if key not in apart))
    return Fingerprint(kind, machine["processor"], machine["runtime"], precision, threads, details)


def record_of(kind: type[T], reply: Mapping[str, Any]) -> T:
    """A record from those fields of a device program's reply that it has."""
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in reply.items() if k in names})


def kinds() -> list[str]:
    """The target kinds: the files in `targets/`."""
    return sorted(m.name for m in pkgutil.iter_modules(importlib.import_module("edgeprune.targets").__path__))


def check_options(name: str, keys: Mapping[str, Any]) -> BaseModel:
    """Validate the keys of a [target.NAME] section by its kind; raises ConfigError naming the key."""
    options: type[BaseModel] = _module(str(keys["kind"])).Options
    try:
        return options.model_validate(dict(keys))
    except ValidationError as error:
        allowed = ", ".join(options.model_fields)
        problems = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"]))
            unknown = problem["type"] == "extra_forbidden"
            problems.append(f"unknown key {key}" if unknown else f"{key}: {problem['msg'].lower()}")
        raise ConfigError(f"[target.{name}]: {'; '.join(problems)} (allowed for {keys['kind']}: {allowed})") from error


def open_target(name: str, sections: Mapping[str, Mapping[str, Any]]) -> Target:
    """Open a target by its name in the project file; `cpu` exists without being written there.

    Args:
        name: of the target.
        sections: the [target.*] sections by name, each with `kind` and that kind's keys.
    Raises:
        UsageError: no such target; ConfigError: a key its kind does not have; TargetError: it cannot be reached.
    """
    known = {"cpu": {"kind": "cpu"}, **sections}
    if name not in known:
        raise UsageError(f"there is no target {name!r}; edgeprune.toml has {', '.join(sorted(known))}")
    options = check_options(name, known[name])
    target: Target = _module(str(known[name]["kind"])).open_target(name, options)
    return target


def _module(kind: str) -> Any:
    if kind not in kinds():
        raise ConfigError(f"{kind!r} is no kind of target; there are: {', '.join(kinds())}")
    return importlib.import_module(f"edgeprune.targets.{kind}")
