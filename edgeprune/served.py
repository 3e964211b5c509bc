"""What all targets have in common whose device program is one of `profilers/`: open, send, ask, fetch, close."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from . import files
from .errors import RuntimeMissing, TargetError, UsageError
from .graph import Example, as_call
from .host import Host
from .records import Artifact, DeviceState, Fingerprint, LayerShape, Progress, Timing
from .target import SILENCE_S, fingerprint_of, record_of


class Served(ABC):
    """A device program in a process of its own, on a host. A kind of target adds layers, exporting and operators.

    Args:
        name: of the target.
        host: where the program runs; closed with it.
        runtime: a file in profilers/.
        opening: the arguments of the program's `open`.
        needs: what is said before the reason when the runtime is missing there.
        only_now: arguments of this opening that differ from `opening`.
    Raises:
        RuntimeMissing: the runtime cannot be loaded there; TargetError: the host cannot be reached, the program fails.
    """

    part_bytes: int | None = None  # of inputs that are on the device at a time; None: all of them

    def __init__(
        self,
        name: str,
        host: Host,
        runtime: str,
        opening: Mapping[str, Any],
        needs: str,
        only_now: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.host, self.runtime, self.opening = name, host, runtime, opening
        try:
            self._agent = host.start(runtime)
            opened = self._agent.call("open", SILENCE_S, **{**opening, **(only_now or {})})
        except TargetError as error:
            host.close()
            if isinstance(error, RuntimeMissing):
                raise RuntimeMissing(f"target {name} {needs} ({error})") from error
            raise
        self._machine: dict[str, str] = opened["machine"]

    @abstractmethod
    def packed(self, shape: LayerShape) -> dict[str, Any]:
        """A layer as the device program takes it."""

    def stored(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Inputs of torch, (N, channels, ...), as the exported files take them."""
        return inputs

    def fingerprint_as(self, kind: str, precision: str, threads: int) -> Fingerprint:
        return fingerprint_of(kind, precision, threads, self._machine)

    def time(
        self, items: Sequence[LayerShape | Artifact], least: int, most: int, interval: float, budget_s: float
    ) -> list[Timing]:
        wire = [self.packed(i) if isinstance(i, LayerShape) else {"model": self.host.put(Path(i.path))} for i in items]
        reply = self._agent.call(
            "time", SILENCE_S + 3 * budget_s, items=wire, least=least, most=most, interval=interval, budget_s=budget_s
        )
        return [record_of(Timing, timing) for timing in reply["timings"]]

    def samples(
        self, calibration: Sequence[NDArray[Any]], example: Example, precision: str
    ) -> list[list[NDArray[np.float32]]]:
        """Real inputs for a precision that has to know their range, cut into the network's batches; others need none.

        Args:
            calibration: of every input, (images, ...).
            example: whose batch size the network has.
        Raises:
            UsageError: there are none.
        """
        if precision != "int8":
            return []
        if not calibration:
            raise UsageError(
                f"target {self.name} has precision int8, which is calibrated on images: give the project a [data] "
                "section, or `batches` to edgeprune.compress; or choose precision f32 or f16"
            )
        args, kwargs = as_call(example)
        batch = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).shape[0]
        starts = range(0, len(calibration[0]) - batch + 1, batch)
        return [[self.stored(np.asarray(a[s : s + batch], dtype=np.float32)) for a in calibration] for s in starts]

    def run(
        self, artifact: Artifact, inputs: Sequence[NDArray[Any]], progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """A part at a time. Parts are kept there for the next network when there is only one."""
        model, count = self.host.put(Path(artifact.path)), len(inputs[0])
        size = count
        if self.part_bytes is not None:
            size = max(1, self.part_bytes * count // sum(array.nbytes for array in inputs))
        found = []
        for start in range(0, count, size):

            def on_event(event: Any, start: int = start) -> None:
                if progress is not None and "done" in event:
                    progress(start + int(event["done"]), count)

            part = [self.stored(array[start : start + size]) for array in inputs]
            found.append(self._run(model, part, on_event, keep=size >= count))
        return np.concatenate(found)

    def _run(
        self, model: str, inputs: Sequence[NDArray[Any]], on_event: Callable[[Any], None], keep: bool
    ) -> NDArray[np.float32]:
        with tempfile.TemporaryDirectory(prefix="edgeprune-run-") as folder:
            sent = []
            for at, array in enumerate(inputs):
                np.save(f"{folder}/input{at}.npy", array)
                sent.append(self.host.put(Path(f"{folder}/input{at}.npy")))
            output = self.host.place("output.npy")
            self._agent.call("run", SILENCE_S, on_event, path=model, inputs=sent, output=output)
            self.host.get(output, Path(f"{folder}/output.npy"))
            for copy in () if keep else sent:
                self.host.drop(copy)
            return np.asarray(np.load(f"{folder}/output.npy", allow_pickle=False), dtype=np.float32)

    def state(self) -> DeviceState:
        return record_of(DeviceState, self._agent.call("state", SILENCE_S))

    def close(self) -> None:
        """The device program ends, and what it set on the device is put back."""
        self._agent.close()
        self.host.close()


def exported(path: Path, format: str, precision: str) -> Artifact:
    """The record of a network that is one file."""
    return Artifact(
        path=str(path),
        files=(str(path),),
        sha256=files.sha256(path),
        size_bytes=path.stat().st_size,
        format=format,
        precision=precision,
    )
