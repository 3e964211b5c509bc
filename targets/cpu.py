"""The processor of this machine, through OpenVINO."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from .. import export, files
from ..errors import RuntimeMissing
from ..graph import Example
from ..host import Here
from ..records import Artifact, Fingerprint, LayerShape, Operators
from ..served import Served
from ..target import Target

LAYERS = (
    "conv", "conv_transpose", "linear", "max_pool", "avg_pool", "global_pool", "scale", "add", "mul", "gate", "concat",
    "relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu", "leaky_relu", "elu", "tanh", "mish",
)  # fmt: skip
INSTALL = "pip install 'edgeprune[openvino]'"
NOT_COUNTED = (
    "OpenVINO's counters are averages since a network was loaded and are not read; reformats and fallbacks show in the "
    "latency end to end only"
)


class Options(BaseModel):
    """[target.NAME] kind = "cpu"."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["cpu"] = "cpu"
    threads: PositiveInt = Field(1, description="threads of one inference")
    precision: Literal["f32", "bf16"] = Field("f32", description="of the computation; weights are stored as f32")


def open_target(name: str, options: Options) -> Target:
    return Cpu(name, options)


class Cpu(Served):
    """OpenVINO in a process of its own, on as many processors as it has threads."""

    def __init__(self, name: str, options: Options) -> None:
        self.options = options
        opening = {"threads": options.threads, "precision": options.precision}
        super().__init__(name, Here(), "openvino", opening, f"needs OpenVINO; install it with: {INSTALL}")

    def fingerprint(self) -> Fingerprint:
        return self.fingerprint_as("cpu", self.options.precision, self.options.threads)

    def timed_as(self, shape: LayerShape) -> LayerShape | None:
        """Without its residual sum: fused into the convolution it costs next to nothing, alone it cannot be shown."""
        known = shape.op in LAYERS and all(f in LAYERS or f == "add" for f in shape.fused)
        return dataclasses.replace(shape, fused=tuple(f for f in shape.fused if f != "add")) if known else None

    def packed(self, shape: LayerShape) -> dict[str, Any]:
        return {"layer": files.plain(shape)}

    def export(self, module: Any, example: Example, folder: Path, calibration: Sequence[NDArray[Any]] = ()) -> Artifact:
        """model.onnx, and the same network as OpenVINO IR: model.xml with model.bin."""
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # see profilers/openvino.py
        try:
            import openvino
        except ImportError as error:
            raise RuntimeMissing(f"exporting for {self.name} needs OpenVINO; install it with: {INSTALL}") from error
        folder.mkdir(parents=True, exist_ok=True)
        onnx = folder / "model.onnx"
        export.to_onnx(module, example, onnx)
        with files.not_full(folder / "model.xml"), files.folder_beside(folder, "ir") as beside:
            converted = openvino.convert_model(str(onnx))
            openvino.save_model(converted, f"{beside}/model.xml", compress_to_fp16=False)
            for name in ("model.bin", "model.xml"):  # the name that is loaded comes last
                files.sync(Path(beside, name))
                Path(beside, name).replace(folder / name)
        parts = ("model.xml", "model.bin", "model.onnx")
        return Artifact(
            path=str(folder / "model.xml"),
            files=tuple(str(folder / p) for p in parts),
            sha256=files.sha256(folder / "model.bin"),
            size_bytes=sum((folder / p).stat().st_size for p in parts[:2]),
            format="openvino-ir",
            precision=self.options.precision,
        )

    def operators(self, folder: Path) -> Operators:
        """None: OpenVINO fuses by its own plan, and its counters are averages since a network was loaded."""
        return Operators((), 0.0, NOT_COUNTED)
