"""TensorRT on an NVIDIA GPU: a Jetson behind ssh, or this machine's."""

from __future__ import annotations

import base64
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from .. import files, trtgraph, trtlayer
from ..errors import RuntimeMissing, TargetError, UsageError
from ..graph import Example
from ..host import Here, Host, Ssh
from ..profilers import onnx_inputs, trt_names
from ..records import Artifact, DeviceState, Fingerprint, LayerShape, Operators, Progress, Timing
from ..target import Target, fingerprint_of, record_of

SILENCE_S = 300.0  # without a word from the device program for this long, it hangs: builds give signs of life
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


class Jetson:
    """TensorRT in a process of its own, below the device program."""

    def __init__(self, name: str, options: Options, host: Host) -> None:
        self.name, self.options, self.host = name, options, host
        self.runtime = "tensorrt"
        kept = ("precision", "device", "backend", "tf32", "external_tactics", "workspace_mib")
        self.opening: Mapping[str, Any] = {
            **{key: getattr(options, key) for key in kept},
            "dla": -1 if options.dla is None else options.dla,
            "power_mode": "",  # a smoke test of an installed model switches nothing
        }
        try:
            self._agent = host.start(self.runtime)
            opened = self._agent.call("open", SILENCE_S, **{**self.opening, "power_mode": options.power_mode})
        except TargetError as error:
            host.close()
            if isinstance(error, RuntimeMissing):
                raise RuntimeMissing(f"target {name} cannot run its device program ({error})") from error
            raise
        self._machine: dict[str, str] = opened["machine"]

    def fingerprint(self) -> Fingerprint:
        """The power mode and the limits of the clocks are a part of it: a table of one mode serves no other."""
        return fingerprint_of("jetson", self.options.precision, 1, self._machine)

    def timed_as(self, shape: LayerShape) -> LayerShape | None:
        return shape if trtlayer.buildable(shape) else None

    def time(
        self, items: Sequence[LayerShape | Artifact], least: int, most: int, interval: float, budget_s: float
    ) -> list[Timing]:
        wire = [
            {"forms": self._packed(i)} if isinstance(i, LayerShape) else {"model": self.host.put(Path(i.path))}
            for i in items
        ]
        reply = self._agent.call(
            "time", SILENCE_S + 3 * budget_s, items=wire, least=least, most=most, interval=interval, budget_s=budget_s
        )
        return [record_of(Timing, timing) for timing in reply["timings"]]

    def _packed(self, shape: LayerShape) -> list[tuple[str, list[str]]]:
        made = trtlayer.forms(shape, self.options.precision)
        return [(base64.b64encode(zlib.compress(content)).decode(), nodes) for content, nodes in made]

    def export(self, module: Any, example: Example, folder: Path, calibration: Sequence[NDArray[Any]] = ()) -> Artifact:
        """model.onnx: the engine is built on the device, and kept there."""
        int8 = self.options.precision == "int8"
        if int8 and not calibration:
            raise UsageError(
                f"target {self.name} has precision int8, which is calibrated on images: give the project a [data] "
                "section, or `batches` to edgeprune.compress; or choose precision f32 or f16"
            )
        folder.mkdir(parents=True, exist_ok=True)
        samples = trtgraph.slices(calibration, example) if int8 else ()
        content = trtgraph.convert(module, example, self.options.precision, samples)
        path = folder / MODEL
        with files.writing(path) as beside:
            beside.write_bytes(content)
        return Artifact(
            path=str(path),
            files=(str(path),),
            sha256=files.sha256(path),
            size_bytes=path.stat().st_size,
            format="onnx",
            precision=self.options.precision,
        )

    def run(
        self, artifact: Artifact, inputs: Sequence[NDArray[Any]], progress: Progress | None = None
    ) -> NDArray[np.float32]:
        def on_event(event: Any) -> None:
            if progress is not None and "done" in event:
                progress(int(event["done"]), int(event["of"]))

        with tempfile.TemporaryDirectory(prefix="edgeprune-run-") as folder:
            sent = []
            for at, array in enumerate(inputs):
                np.save(f"{folder}/input{at}.npy", array)
                sent.append(self.host.put(Path(f"{folder}/input{at}.npy")))
            model, output = self.host.put(Path(artifact.path)), self.host.place("output.npy")
            self._agent.call("run", SILENCE_S, on_event, path=model, inputs=sent, output=output)
            self.host.get(output, Path(f"{folder}/output.npy"))
            return np.asarray(np.load(f"{folder}/output.npy", allow_pickle=False), dtype=np.float32)

    def stored(self, inputs: NDArray[Any]) -> NDArray[Any]:
        return inputs

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

    def state(self) -> DeviceState:
        return record_of(DeviceState, self._agent.call("state", SILENCE_S))

    def close(self) -> None:
        """The device program ends, and with it a power mode that was asked for."""
        self._agent.close()
        self.host.close()


def calibrated(
    rows: Sequence[tuple[str, float]], names: trt_names.Names, kinds: dict[str, str], whole_ms: float
) -> list[tuple[str, float]]:
    """A profile by module and bucket, scaled to a time end to end that was measured without the profiler."""
    found = trt_names.gathered(rows, names, kinds)
    total = sum(found.values())
    return [(owner, ms * whole_ms / total) for owner, ms in found.items()] if total > 0 else []
