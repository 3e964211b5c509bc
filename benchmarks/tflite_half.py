"""Half the latency on LiteRT, and the network that reached it in two other runtimes.

    python benchmarks/tflite_half.py --prune     prune what is not pruned yet, export it for each runtime (minutes each)
    python benchmarks/tflite_half.py             time what is pruned and not in benchmarks/results yet (a minute each)
    python benchmarks/tflite_half.py --table     the Markdown table of what there is

Pruned by `edgeprune.compress` on x86 LiteRT with XNNPACK, one thread, f32 and int8; weights are random, so there is no
training. What others do on the machine meanwhile costs latency that could have been kept, so the plan that was accepted
is timed once more afterwards: dense and pruned in LiteRT, OpenVINO and ONNX Runtime in turn, one thread each, loaded
anew in every round. The latter two in f32, whatever LiteRT has; their outputs were compared with torch before.
`--networks`, `--precisions` choose; `--files FOLDER` says where networks lie.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import record
import table_error
import tflite_error
import torch
from edgeprune.profilers import timing

import edgeprune
from edgeprune import files, runs
from edgeprune.planning import PREFLIGHT, Preflight
from edgeprune.records import Artifact
from edgeprune.runs import Run
from edgeprune.target import open_target
from edgeprune.verify import FORMAT, VerifyReport

PAIR = ("dense", "artifact")  # folders of a run: the dense network, the pruned one
COMPARED = "compared"  # a file that a run has when both networks compute in every runtime what torch computes
VISITS = (20, 60, 0.004)  # at least, at most, until the interval of the median is this narrow
PAIR_S = 4.0  # at most, for both networks in one runtime
ROUNDS = 5


def prune(name: str, precision: str, folder: Path) -> None:
    """Reach half the latency; write both networks for every runtime. Goes on where it was stopped."""
    dense, example = table_error.build(name)
    seeds = range(tflite_error.CALIBRATION)
    images = [torch.randn(*example.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    with closing(tflite_error.opened(precision)) as target:
        target.export = remembered(target.export, folder.with_name(f"{folder.name}-converted"), precision)
        done = edgeprune.compress(
            dense, example, target, speedup=2.0, run=folder, resume=True, steps=1, importance="random",
            batches=lambda: [(x, torch.zeros(1)) for x in images],
        )  # fmt: skip
    for module, part in zip((dense, done.model), PAIR, strict=True):
        export(module, example, folder / part / "others")
    (folder / COMPARED).touch()


def remembered(convert: Callable[..., Artifact], folder: Path, precision: str) -> Callable[..., Artifact]:
    """Conversions of one network's cuts, kept by their weights: a run that is stopped would make them all again."""

    def export(module: torch.nn.Module, example: torch.Tensor, where: Path, calibration: Any = ()) -> Artifact:
        digest = hashlib.sha256()
        for tensor in module.state_dict().values():
            digest.update(repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
        kept = folder / f"{digest.hexdigest()[:16]}.tflite"
        if not kept.exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(convert(module, example, where, calibration).path, kept.with_suffix(".part"))
            kept.with_suffix(".part").replace(kept)
        where.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept, where / "model.tflite")
        made = tflite_error.artifact(where / "model.tflite", precision)
        return replace(made, sha256=files.sha256(where / "model.tflite"))

    return export


def export(module: torch.nn.Module, example: torch.Tensor, folder: Path) -> None:
    """A network as ONNX and as OpenVINO IR; both compute what torch computes."""
    with closing(open_target("cpu", {})) as cpu:
        artifact = cpu.export(module, example, folder)
        answers = (cpu.run(artifact, [example.numpy()]), session(folder)(example.numpy()))
    with torch.inference_mode():
        wanted = module.eval()(example).numpy()
    for found in answers:
        off = np.abs(found - wanted).max() / np.abs(wanted).max()
        if not off < table_error.AGREES:
            raise ValueError(f"{folder} computes something else than torch ({off:.2g} of the largest output)")


def session(folder: Path) -> Any:
    """The ONNX file of a folder, as a function of its input."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    loaded = onnxruntime.InferenceSession(str(folder / "model.onnx"), settings, providers=["CPUExecutionProvider"])
    name = loaded.get_inputs()[0].name
    return lambda x: loaded.run(None, {name: x})[0]


def compare(name: str, precision: str, folder: Path) -> dict[str, Any]:
    """Both networks in three runtimes, in turn."""
    _, example = table_error.build(name)
    lite = [tflite_error.artifact(folder / part / "model.tflite", precision) for part in PAIR]
    ir = [_ir(folder / part / "others") for part in PAIR]
    visits: dict[str, list[list[float]]] = {"litert": [], "openvino": [], "onnxruntime": []}
    with closing(tflite_error.opened(precision)) as target, closing(open_target("cpu", {})) as cpu:
        for _ in range(ROUNDS):
            for runtime, where, pair in (("litert", target, lite), ("openvino", cpu, ir)):
                visits[runtime].append([t.median_ms for t in where.time(pair, *VISITS, PAIR_S)])
            visits["onnxruntime"].append(_onnxruntime(folder, example.numpy()))
        state = target.state()
    found = Run(folder)
    start = runs.as_record(Preflight, found.read("preflight.json", PREFLIGHT))
    report = runs.as_record(VerifyReport, found.read("verify.json", FORMAT))
    return {
        "rounds_ms": visits,
        "runtimes_ms": {runtime: np.median(ms, axis=0).tolist() for runtime, ms in visits.items()},
        "floor_speedup": start.dense_ms / start.floor.measured_ms,
        "when_pruned": {
            "speedup": report.speedup, "predicted_ms": report.predicted_ms, "load": report.state.load,
            "median_ms": [report.dense.latency.median_ms, report.pruned.latency.median_ms],
            "from_torch": [report.dense.agreement.max_difference, report.pruned.agreement.max_difference],
        },
        "load": state.load,
        "notes": state.notes,
    }  # fmt: skip


def _ir(folder: Path) -> Artifact:
    path = folder / "model.xml"
    return Artifact(str(path), (str(path),), "", 0, "openvino-ir", "f32")


def _onnxruntime(folder: Path, x: Any) -> list[float]:
    loaded = [session(folder / part / "others") for part in PAIR]
    for run in loaded:
        run(x)
    timings = timing.in_turn([lambda run=run: run(x) for run in loaded], 1, *VISITS, PAIR_S)
    return [t["median_ms"] for t in timings]


def summary(networks: Sequence[str], precisions: Sequence[str]) -> str:
    rows = []
    for name in networks:
        for precision in precisions:
            found = record.load(f"tflite_half/{name}-{precision}")
            if found is None:
                continue
            each = [f"{dense:.3g} / {cut:.3g} ({dense / cut:.2f}x)" for dense, cut in found["runtimes_ms"].values()]
            rows.append([name, precision, f"{found['floor_speedup']:.1f}x", *each, f"{found['load']:.1f}"])
    header = ["network", "LiteRT's precision", "floor", "LiteRT: dense / pruned ms", "OpenVINO f32",
              "ONNX Runtime f32", "load"]  # fmt: skip
    return record.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(tflite_error.NETWORKS), choices=tflite_error.NETWORKS)
    parser.add_argument(
        "--precisions", nargs="*", default=list(tflite_error.PRECISIONS), choices=tflite_error.PRECISIONS
    )
    parser.add_argument("--files", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-tflite-half")
    parser.add_argument("--prune", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("EDGEPRUNE_HOME", str(record.RESULTS / "tflite_error" / "home"))
    torch.set_num_threads(1)
    each = [(n, p, options.files / f"{n}-{p}") for n in options.networks for p in options.precisions]
    for name, precision, folder in () if options.table else each:
        ready = (folder / COMPARED).exists()
        if options.prune and not ready:
            prune(name, precision, folder)
        elif not options.prune and record.load(f"tflite_half/{name}-{precision}") is None:
            if ready:
                record.save(f"tflite_half/{name}-{precision}", compare(name, precision, folder))
            else:
                print(f"{name} {precision}: not pruned yet; run with --prune first")
    print(summary(options.networks, options.precisions))


if __name__ == "__main__":
    main()
