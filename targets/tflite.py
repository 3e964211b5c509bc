"""A processor through LiteRT (TensorFlow Lite) and XNNPACK: this machine's, or a board's."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from .. import files, flatbuffer, litert
from ..graph import Example
from ..host import Here, Host, Ssh
from ..records import Artifact, Fingerprint, LayerShape, Operators, Progress
from ..served import Served, exported
from ..target import SILENCE_S, Target

MODEL = "model.tflite"


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


class Tflite(Served):
    """LiteRT in a process of its own, on as many processors as it has threads."""

    part_bytes = 16 << 20  # a board's disk may be small

    def __init__(self, name: str, options: Options, host: Host) -> None:
        self.options = options
        opening = {"threads": options.threads, "xnnpack": options.xnnpack}
        super().__init__(name, host, "tflite", opening, "needs LiteRT")

    def fingerprint(self) -> Fingerprint:
        return self.fingerprint_as("tflite", self.options.precision, self.options.threads)

    def timed_as(self, shape: LayerShape) -> LayerShape | None:
        """As it is, its sum too: here that is an operator of its own."""
        return shape if flatbuffer.buildable(shape) else None

    def packed(self, shape: LayerShape) -> dict[str, Any]:
        """A layer as the device gets it: a model, quantised as whole networks are, small enough for a line of text."""
        content = flatbuffer.layer_model(shape)
        random = np.random.Generator(np.random.PCG64(0))
        sizes = flatbuffer.input_shapes(content)
        noise = [random.standard_normal(size).astype(np.float32) for size in sizes]
        made = litert.quantise(content, self.options.precision, [noise])
        return {"layer": base64.b64encode(zlib.compress(made)).decode()}

    def export(self, module: Any, example: Example, folder: Path, calibration: Sequence[NDArray[Any]] = ()) -> Artifact:
        """model.tflite."""
        samples = self.samples(calibration, example, self.options.precision)
        folder.mkdir(parents=True, exist_ok=True)
        content = litert.convert(module, example)
        with files.writing(folder / MODEL) as beside:
            beside.write_bytes(litert.quantise(content, self.options.precision, samples))
        return exported(folder / MODEL, "tflite", self.options.precision)

    def run(
        self, artifact: Artifact, inputs: Sequence[NDArray[Any]], progress: Progress | None = None
    ) -> NDArray[np.float32]:
        return litert.channels_first(super().run(artifact, inputs, progress))

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
