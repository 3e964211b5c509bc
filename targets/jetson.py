"""TensorRT on an NVIDIA GPU: a Jetson behind ssh, or this machine's."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from .. import files, trtgraph, trtlayer
from ..graph import Example
from ..host import Here, Host, Ssh
from ..profilers import onnx_inputs, trt_names
from ..records import Artifact, Fingerprint, LayerShape, Operators
from ..served import Served, exported
from ..target import SILENCE_S, Target

MODEL = "model.onnx"


class Options(BaseModel):
    """[target.NAME] kind = "jetson"."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["jetson"] = "jetson"
    precision: Literal["f32", "f16", "int8"] = Field(
        "f16", description="of the computation; int8 is calibrated on training images; inputs and outputs stay f32"
    )
    tf32: bool = Field(False, description="32-bit layers may compute with 10-bit mantissas")
    host: str | None = Field(None, description="a board, as ssh takes it: user@jetson.local; default: this machine")
    ssh_config: Path | None = Field(None, description="in the place of ~/.ssh/config")
    backend: Literal["auto", "python", "trtexec"] = Field(
        "auto", description="TensorRT's Python module, or its program; auto: the program where the module is missing"
    )
    device: NonNegativeInt = Field(0, description="number of the GPU")
    dla: NonNegativeInt | None = Field(None, description="core of the deep learning accelerator; default: the GPU")
    power_mode: str = Field(
        "", description="nvpmodel's name or number, set while the target is open; default: as it is"
    )
    workspace_mib: PositiveInt = Field(1024, description="memory that a kernel may use besides its tensors")
    external_tactics: bool = Field(True, description="kernels of cuBLAS and cuDNN, where a release has them")
    threads: Literal[1] = 1  # of the host; a GPU is one


def open_target(name: str, options: Options) -> Target:
    return Jetson(name, options, Here() if options.host is None else Ssh(options.host, options.ssh_config))


class Jetson(Served):
    """TensorRT in a process of its own, below the device program, which gives signs of life while it builds."""

    def __init__(self, name: str, options: Options, host: Host) -> None:
        self.options = options
        kept = ("precision", "device", "backend", "tf32", "external_tactics", "workspace_mib")
        opening = {
            **{key: getattr(options, key) for key in kept},
            "dla": -1 if options.dla is None else options.dla,
            "power_mode": "",  # a smoke test of an installed model switches nothing
        }
        asked = {"power_mode": options.power_mode}  # put back when the device program ends
        super().__init__(name, host, "tensorrt", opening, "cannot run its device program", asked)

    def fingerprint(self) -> Fingerprint:
        """The power mode and the limits of the clocks are a part of it: a table of one mode serves no other."""
        return self.fingerprint_as("jetson", self.options.precision, 1)

    def timed_as(self, shape: LayerShape) -> LayerShape | None:
        return shape if trtlayer.buildable(shape) else None

    def packed(self, shape: LayerShape) -> dict[str, Any]:
        made = trtlayer.forms(shape, self.options.precision)
        return {"forms": [(base64.b64encode(zlib.compress(content)).decode(), nodes) for content, nodes in made]}

    def export(self, module: Any, example: Example, folder: Path, calibration: Sequence[NDArray[Any]] = ()) -> Artifact:
        """model.onnx: the engine is built on the device, and kept there."""
        samples = self.samples(calibration, example, self.options.precision)
        folder.mkdir(parents=True, exist_ok=True)
        content = trtgraph.convert(module, example, self.options.precision, samples)
        with files.writing(folder / MODEL) as beside:
            beside.write_bytes(content)
        return exported(folder / MODEL, "onnx", self.options.precision)

    def operators(self, folder: Path) -> Operators:
        """Each module's time in the fused engine, reformats and what cannot be attributed in lines of their own.

        Scaled to add up to the time end to end: the profiler's own sum is larger.
        """
        if not (folder / MODEL).exists():
            return Operators((), 0.0, f"{folder} has no {MODEL}")
        found = self._agent.call("operators", SILENCE_S, path=self.host.put(folder / MODEL))
        names = trt_names.Names(onnx_inputs.nodes((folder / MODEL).read_bytes()))
        rows, kinds = [(n, ms) for n, _, ms in found["layers"]], {n: kind for n, kind, _ in found["layers"]}
        return Operators(tuple(calibrated(rows, names, kinds, found["whole_ms"])), found["whole_ms"], "")


def calibrated(
    rows: Sequence[tuple[str, float]], names: trt_names.Names, kinds: dict[str, str], whole_ms: float
) -> list[tuple[str, float]]:
    """A profile by module and bucket, scaled to a time end to end that was measured without the profiler."""
    found = trt_names.gathered(rows, names, kinds)
    total = sum(found.values())
    return [(owner, ms * whole_ms / total) for owner, ms in found.items()] if total > 0 else []
