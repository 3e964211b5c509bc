"""A processor through LiteRT (TensorFlow Lite) and XNNPACK: this machine's, or a board's."""

from __future__ import annotations

import base64
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from .. import files, flatbuffer, litert
from ..errors import RuntimeMissing, TargetError, UsageError
from ..graph import Example
from ..host import Here, Host, Ssh
from ..records import Artifact, DeviceState, Fingerprint, LayerShape, Operators, Progress, Timing
from ..target import SILENCE_S, Target, fingerprint_of, record_of

MODEL = "model.tflite"
PART_BYTES = 16 << 20  # of inputs that are on a device at a time when there are more: its disk may be small


class Options(BaseModel):
    """[target.NAME] kind = "tflite"."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["tflite"] = "tflite"
    threads: PositiveInt = Field(1, description="threads of one inference")
    precision: Literal["f32", "f16", "int8"] = Field(
        "f32", description="f16: weights only; int8: weights and activations, calibrated on training images"
    )
    xnnpack: bool = Field(True, description="the kernels of XNNPACK; without them, the runtime's own")
    host: str | None = Field(None, description="a board, as ssh takes it: pi@raspberrypi.local; default: this machine")
    ssh_config: Path | None = Field(None, description="in the place of ~/.ssh/config")


def open_target(name: str, options: Options) -> Target:
    return Tflite(name, options, Here() if options.host is None else Ssh(options.host, options.ssh_config))


class Tflite:
    """LiteRT in a process of its own, on as many processors as it has threads."""

    def __init__(self, name: str, options: Options, host: Host) -> None:
        self.name, self.options, self.host = name, options, host
        self.runtime = "tflite"
        self.opening: Mapping[str, Any] = {"threads": options.threads, "xnnpack": options.xnnpack}
        try:
            self._agent = host.start(self.runtime)
            opened = self._agent.call("open", SILENCE_S, **self.opening)
        except TargetError as error:
            host.close()
            if isinstance(error, RuntimeMissing):
                raise RuntimeMissing(f"target {name} needs LiteRT ({error})") from error
            raise
        self._machine: dict[str, str] = opened["machine"]

    def fingerprint(self) -> Fingerprint:
        return fingerprint_of("tflite", self.options.precision, self.options.threads, self._machine)

    def timed_as(self, shape: LayerShape) -> LayerShape | None:
        """As it is, its sum too: here that is an operator of its own."""
        return shape if flatbuffer.buildable(shape) else None

    def time(
        self, items: Sequence[LayerShape | Artifact], least: int, most: int, interval: float, budget_s: float
    ) -> list[Timing]:
        wire = [
            {"layer": self._packed(i)} if isinstance(i, LayerShape) else {"model": self.host.put(Path(i.path))}
            for i in items
        ]
        reply = self._agent.call(
            "time", SILENCE_S + 3 * budget_s, items=wire, least=least, most=most, interval=interval, budget_s=budget_s
        )
        return [record_of(Timing, timing) for timing in reply["timings"]]

    def _packed(self, shape: LayerShape) -> str:
        """A layer as the device gets it: a model, quantised as whole networks are, small enough for a line of text."""
        content = flatbuffer.layer_model(shape)
        random = np.random.Generator(np.random.PCG64(0))
        sizes = flatbuffer.input_shapes(content)
        noise = [random.standard_normal(size).astype(np.float32) for size in sizes]
        return base64.b64encode(zlib.compress(litert.quantise(content, self.options.precision, [noise]))).decode()

    def export(self, module: Any, example: Example, folder: Path, calibration: Sequence[NDArray[Any]] = ()) -> Artifact:
        """model.tflite."""
        int8 = self.options.precision == "int8"
        if int8 and not calibration:
            raise UsageError(
                f"target {self.name} has precision int8, which is calibrated on images: give the project a [data] "
                "section, or `batches` to edgeprune.compress; or choose precision f32 or f16"
            )
        folder.mkdir(parents=True, exist_ok=True)
        content = litert.convert(module, example)
        samples = litert.slices(calibration, example) if int8 else ()
        with files.writing(folder / MODEL) as beside:
            beside.write_bytes(litert.quantise(content, self.options.precision, samples))
        path = folder / MODEL
        return Artifact(
            path=str(path),
            files=(str(path),),
            sha256=files.sha256(path),
            size_bytes=path.stat().st_size,
            format="tflite",
            precision=self.options.precision,
        )

    def run(
        self, artifact: Artifact, inputs: Sequence[NDArray[Any]], progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """A part at a time. Parts are kept there for the next network when there is only one."""
        model, count = self.host.put(Path(artifact.path)), len(inputs[0])
        size = max(1, PART_BYTES * count // sum(array.nbytes for array in inputs))
        found = []
        for start in range(0, count, size):

            def on_event(event: Any, start: int = start) -> None:
                if progress is not None:
                    progress(start + int(event["done"]), count)

            part = [litert.channels_last(array[start : start + size]) for array in inputs]
            found.append(self._run(model, part, on_event, keep=size >= count))
        return litert.channels_first(np.concatenate(found))

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

    def stored(self, inputs: NDArray[Any]) -> NDArray[Any]:
        return litert.channels_last(inputs)

    def operators(self, folder: Path) -> Operators:
        """By the C profiler of the releases it is known on."""
        if not (folder / MODEL).exists():
            return Operators((), 0.0, f"{folder} has no {MODEL}")
        found = self._agent.call("operators", SILENCE_S, path=self.host.put(folder / MODEL))
        if "why" in found:
            return Operators((), 0.0, str(found["why"]))
        return Operators(tuple((name, us / 1000) for name, us in found["operators"]), found["whole_us"] / 1000, "")

    def state(self) -> DeviceState:
        return record_of(DeviceState, self._agent.call("state", SILENCE_S))

    def close(self) -> None:
        self._agent.close()
        self.host.close()
