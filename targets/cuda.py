"""An NVIDIA GPU through plain torch: for servers, and for boards without TensorRT."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from .. import files, torchscript
from ..errors import RuntimeMissing, TargetError
from ..graph import Example
from ..host import Here, Host, Ssh
from ..records import Artifact, DeviceState, Fingerprint, LayerShape, Operators, Progress, Timing
from ..target import Target, fingerprint_of, record_of

LAYERS = (
    "conv", "conv_transpose", "linear", "max_pool", "avg_pool", "global_pool", "scale", "add", "mul", "gate", "concat",
    "relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu", "leaky_relu", "elu", "tanh", "mish",
)  # fmt: skip
SILENCE_S = 300.0  # without a word from the device program for this long, it hangs
MODEL = "model.ts"


class Options(BaseModel):
    """[target.NAME] kind = "cuda"."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["cuda"] = "cuda"
    precision: Literal["f32", "f16"] = Field("f32", description="of weights and computation")
    tf32: bool = Field(
        False, description="32-bit layers may compute with 10-bit mantissas; torch's own default is mixed"
    )
    autotune: bool = Field(True, description="cuDNN tries its kernels for each shape and keeps the fastest")
    channels_last: bool = Field(True, description="layout of images and weights on the GPU")
    host: str | None = Field(None, description="a machine, as ssh takes it; default: this one")
    ssh_config: Path | None = Field(None, description="in the place of ~/.ssh/config")
    device: NonNegativeInt = Field(0, description="number of the GPU")
    threads: Literal[1] = 1  # of the host; a GPU is one


def open_target(name: str, options: Options) -> Target:
    return Cuda(name, options, Here() if options.host is None else Ssh(options.host, options.ssh_config))


class Cuda:
    """torch in a process of its own; everything is replayed from CUDA graphs."""

    def __init__(self, name: str, options: Options, host: Host) -> None:
        self.name, self.options, self.host = name, options, host
        self.runtime = "cuda"
        kept = ("precision", "device", "tf32", "autotune", "channels_last")
        self.opening: Mapping[str, Any] = {key: getattr(options, key) for key in kept}
        try:
            self._agent = host.start(self.runtime)
            opened = self._agent.call("open", SILENCE_S, **self.opening)
        except TargetError as error:
            host.close()
            if isinstance(error, RuntimeMissing):
                raise RuntimeMissing(f"target {name} needs torch with CUDA on its device ({error})") from error
            raise
        self._machine: dict[str, str] = opened["machine"]

    def fingerprint(self) -> Fingerprint:
        return fingerprint_of("cuda", self.options.precision, 1, self._machine)

    def timed_as(self, shape: LayerShape) -> LayerShape | None:
        """As it is, its sum too: plain torch fuses nothing."""
        known = shape.op in LAYERS and all(f in LAYERS for f in shape.fused)
        return shape if known and len(shape.spatial) <= 3 else None

    def time(
        self, items: Sequence[LayerShape | Artifact], least: int, most: int, interval: float, budget_s: float
    ) -> list[Timing]:
        wire = [
            {"layer": files.plain(i)} if isinstance(i, LayerShape) else {"model": self.host.put(Path(i.path))}
            for i in items
        ]
        reply = self._agent.call(
            "time", SILENCE_S + 3 * budget_s, items=wire, least=least, most=most, interval=interval, budget_s=budget_s
        )
        return [record_of(Timing, timing) for timing in reply["timings"]]

    def export(self, module: Any, example: Example, folder: Path, calibration: Sequence[NDArray[Any]] = ()) -> Artifact:
        """model.ts: TorchScript, in 32 bits."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / MODEL
        torchscript.write(module, example, path)
        return Artifact(
            path=str(path),
            files=(str(path),),
            sha256=files.sha256(path),
            size_bytes=path.stat().st_size,
            format="torchscript",
            precision=self.options.precision,
        )

    def run(
        self, artifact: Artifact, inputs: Sequence[NDArray[Any]], progress: Progress | None = None
    ) -> NDArray[np.float32]:
        def on_event(event: Any) -> None:
            if progress is not None:
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
        """None: without fusion they are the layers of the table."""
        return Operators((), 0.0, "")

    def state(self) -> DeviceState:
        return record_of(DeviceState, self._agent.call("state", SILENCE_S))

    def close(self) -> None:
        self._agent.close()
        self.host.close()
