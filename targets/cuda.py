"""An NVIDIA GPU through plain torch: for servers, and for boards without TensorRT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from .. import files, torchscript
from ..graph import Example
from ..host import Here, Host, Ssh
from ..records import Artifact, Fingerprint, LayerShape, Operators
from ..served import Served, exported
from ..target import Target

LAYERS = (
    "conv", "conv_transpose", "linear", "max_pool", "avg_pool", "global_pool", "scale", "add", "mul", "gate", "concat",
    "relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu", "leaky_relu", "elu", "tanh", "mish",
)  # fmt: skip
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


class Cuda(Served):
    """torch in a process of its own; everything is replayed from CUDA graphs."""

    def __init__(self, name: str, options: Options, host: Host) -> None:
        self.options = options
        kept = ("precision", "device", "tf32", "autotune", "channels_last")
        opening = {key: getattr(options, key) for key in kept}
        super().__init__(name, host, "cuda", opening, "needs torch with CUDA on its device")

    def fingerprint(self) -> Fingerprint:
        return self.fingerprint_as("cuda", self.options.precision, 1)

    def timed_as(self, shape: LayerShape) -> LayerShape | None:
        """As it is, its sum too: plain torch fuses nothing."""
        known = shape.op in LAYERS and all(f in LAYERS for f in shape.fused)
        return shape if known and len(shape.spatial) <= 3 else None

    def packed(self, shape: LayerShape) -> dict[str, Any]:
        return {"layer": files.plain(shape)}

    def export(self, module: Any, example: Example, folder: Path, calibration: Sequence[NDArray[Any]] = ()) -> Artifact:
        """model.ts: TorchScript, in 32 bits."""
        folder.mkdir(parents=True, exist_ok=True)
        torchscript.write(module, example, folder / MODEL)
        return exported(folder / MODEL, "torchscript", self.options.precision)

    def operators(self, folder: Path) -> Operators:
        """None: without fusion they are the layers of the table."""
        return Operators((), 0.0, "")
