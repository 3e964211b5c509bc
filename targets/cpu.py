"""The processor of this machine, through OpenVINO."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from .. import export, files
from ..errors import RuntimeMissing
from ..graph import Example
from ..host import Here, Host
from ..records import Artifact, DeviceState, Fingerprint, LayerShape, Operators, Progress, Timing
from ..target import SILENCE_S, Target, fingerprint_of, record_of

LAYERS = (
    "conv", "conv_transpose", "linear", "max_pool", "avg_pool", "global_pool", "scale", "add", "mul", "gate", "concat",
    "relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu", "leaky_relu", "elu", "tanh", "mish",
)  # fmt: skip
INSTALL = "pip install 'edgeprune[openvino]'"


class Options(BaseModel):
    """[target.NAME] kind = "cpu"."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["cpu"] = "cpu"
    threads: PositiveInt = Field(1, description="threads of one inference")
    precision: Literal["f32", "bf16"] = Field("f32", description="of the computation; weights are stored as f32")


def open_target(name: str, options: Options) -> Target:
    return Cpu(name, options)


class Cpu:
    """OpenVINO in a process of its own, on as many processors as it has threads."""

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self.host: Host = Here()
        self.runtime = "openvino"
        self.opening: Mapping[str, Any] = {"threads": options.threads, "precision": options.precision}
        try:
            self._agent = self.host.start(self.runtime)
        except RuntimeMissing as error:
            raise RuntimeMissing(f"target {name} needs OpenVINO ({error}); install it with: {INSTALL}") from error
        opened = self._agent.call("open", SILENCE_S, **self.opening)
        self._machine: dict[str, str] = opened["machine"]

    def fingerprint(self) -> Fingerprint:
        return fingerprint_of("cpu", self.options.precision, self.options.threads, self._machine)

    def timed_as(self, shape: LayerShape) -> LayerShape | None:
        """Without its residual sum: fused into the convolution it costs next to nothing, alone it cannot be shown."""
        known = shape.op in LAYERS and all(f in LAYERS or f == "add" for f in shape.fused)
        return dataclasses.replace(shape, fused=tuple(f for f in shape.fused if f != "add")) if known else None

    def time(
        self, items: Sequence[LayerShape | Artifact], least: int, most: int, interval: float, budget_s: float
    ) -> list[Timing]:
        wire = [{"layer": files.plain(i)} if isinstance(i, LayerShape) else {"model": i.path} for i in items]
        reply = self._agent.call(
            "time", SILENCE_S + 3 * budget_s, items=wire, least=least, most=most, interval=interval, budget_s=budget_s
        )
        return [record_of(Timing, timing) for timing in reply["timings"]]

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

    def run(
        self, artifact: Artifact, inputs: Sequence[NDArray[Any]], progress: Progress | None = None
    ) -> NDArray[np.float32]:
        def on_event(event: Any) -> None:
            if progress is not None:
                progress(int(event["done"]), int(event["of"]))

        with tempfile.TemporaryDirectory(prefix="edgeprune-run-") as folder:
            names = [f"{folder}/input{i}.npy" for i in range(len(inputs))]
            for name, array in zip(names, inputs, strict=True):
                np.save(name, array)
            output = f"{folder}/output.npy"
            self._agent.call("run", SILENCE_S, on_event, path=artifact.path, inputs=names, output=output)
            return np.asarray(np.load(output, allow_pickle=False), dtype=np.float32)

    def stored(self, inputs: NDArray[Any]) -> NDArray[Any]:
        return inputs

    def operators(self, folder: Path) -> Operators:
        """None: OpenVINO fuses by its own plan, and its counters are averages since a network was loaded."""
        return Operators((), 0.0, "")

    def state(self) -> DeviceState:
        return record_of(DeviceState, self._agent.call("state", SILENCE_S))

    def close(self) -> None:
        self._agent.close()
