"""How wrong a LiteRT table is about whole networks.

    python benchmarks/tflite_error.py --prepare      convert every network that has no file yet (minutes)
    python benchmarks/tflite_error.py                time what is prepared and not in benchmarks/results yet
    python benchmarks/tflite_error.py --table        the Markdown table of what there is

The plans, the methods and what the columns mean are those of table_error.py: 30 plans of random widths are judged, 12
other networks are fitted on, every network is loaded twice and all are visited in turn. x86 LiteRT with XNNPACK, one
thread, f32 and int8; random weights (int8 ranges from random inputs), which do not change latency. Conversions are
compared with torch; networks of one outline are converted once and rewritten, three of them compared with conversions.
`--networks`, `--precisions` choose; `--files FOLDER` says where networks lie.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import record
import table_error
import torch

from edgeprune import flatbuffer, litert, measure, surgery
from edgeprune.importance import best
from edgeprune.records import Artifact, LayerShape
from edgeprune.target import Target, open_target
from edgeprune.widths import shape_at

HERE = Path(__file__).resolve().parent
NETWORKS = ("resnet20", "mobilenet_v3_small", "mobilenet_v2", "resnet18")
PRECISIONS = ("f32", "int8")
FITTED = 12
CHECKED = (0, 20, 41)  # of the networks that are rewritten, those that are converted too
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
CALIBRATION = 4  # random inputs that int8 ranges are taken from


def opened(precision: str) -> Target:
    return open_target("lite", {"lite": {"kind": "tflite", "precision": precision}})


def plans_of(case: table_error.Case) -> list[dict[str, int]]:
    """The dense network, others to fit on, and those that are judged."""
    known = [case.whole, *measure.samples(case.candidates, table_error.FITTED - 1, seed=1)]
    chosen = [known[at] for at in table_error.fitted_on(FITTED)]
    return chosen + measure.random_plans(case.candidates, table_error.PLANS, seed=2)


# ---- files ---------------------------------------------------------------------------------------------------


class Template:
    """A converted network, rewritten for a plan: the same operators on other widths, in milliseconds.

    Networks whose shortcuts pick channels have other operators at other widths and are converted each.
    """

    def __init__(self, case: table_error.Case) -> None:
        self.case = case
        self.rewritten = case.name not in ("resnet20", "resnet56")
        self.content = litert.convert(case.dense, case.example) if self.rewritten else b""
        self.layers = [layer for layer in case.graph.layers if layer.macs]

    def write(self, plan: Mapping[str, int], check: bool) -> bytes:
        """The network of a plan as a model; with `check`, also converted, and both have to be alike."""
        made = self.rewrite(plan) if self.rewritten else b""
        if check or not self.rewritten:
            case = self.case
            cut = surgery.cut(case.dense, case.graph, best(case.scores, plan))
            converted = litert.convert(cut, case.example)
            if self.rewritten and outline(converted) != outline(made):
                raise ValueError(f"{case.name}: a rewritten network is not what the converter makes of it")
            return converted
        return made

    def rewrite(self, plan: Mapping[str, int]) -> bytes:
        s = flatbuffer.schema()
        model = s.ModelT.InitFromPackedBuf(self.content, 0)
        graph = model.subgraphs[0]
        names = flatbuffer.operators(self.content)
        weighted = [op for op, name in zip(graph.operators, names, strict=True) if name in WEIGHTED]
        shapes = {id(op): shape_at(la, plan) for op, la in zip(weighted, self.layers, strict=True)}
        channels = {int(at): graph.tensors[at].shape[-1] for at in graph.inputs}
        for op, name in zip(graph.operators, names, strict=True):
            if id(op) in shapes:
                self._weights(model, op, name, shapes[id(op)])
            out = shapes[id(op)].out_ch if id(op) in shapes else max(channels.get(int(i), 0) for i in op.inputs)
            for at in op.outputs:
                channels[int(at)] = out
                size = list(graph.tensors[at].shape)
                size[1 if name == "TRANSPOSE" else -1] = out
                graph.tensors[at].shape = size
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def _weights(self, model: Any, op: Any, name: str, shape: LayerShape) -> None:
        """New weights and bias of the layer's widths; old ones may be shared with other layers."""
        graph, (_, weight, bias) = model.subgraphs[0], op.inputs
        op.inputs = list(op.inputs)
        size = [int(n) for n in graph.tensors[weight].shape]
        if name == "DEPTHWISE_CONV_2D":
            size[-1] = shape.out_ch
        else:
            size[0], size[-1] = shape.out_ch, shape.in_ch // shape.conv_groups
        fan_in = np.prod(size[:-1] if name == "DEPTHWISE_CONV_2D" else size[1:])
        values = flatbuffer.weights(*size) * np.float32(np.sqrt(2 / fan_in) / 0.05)  # activations keep their size
        for place, old, data in ((1, weight, values), (2, bias, np.zeros(shape.out_ch, np.float32))):
            tensor, buffer = copy.copy(graph.tensors[old]), flatbuffer.schema().BufferT()
            buffer.data = np.frombuffer(data.tobytes(), np.uint8)
            model.buffers.append(buffer)
            tensor.shape, tensor.buffer = list(data.shape), len(model.buffers) - 1
            tensor.name = f"weights{len(graph.tensors)}"
            graph.tensors.append(tensor)
            op.inputs[place] = len(graph.tensors) - 1


def outline(content: bytes) -> list[Any]:
    """Every operator with the shapes of what it reads and makes, biases aside: equal ones are shared."""
    graph = flatbuffer.schema().ModelT.InitFromPackedBuf(content, 0).subgraphs[0]
    return [
        (name, [[int(n) for n in graph.tensors[at].shape] for at in (*op.inputs[:2], *op.outputs)])
        for name, op in zip(flatbuffer.operators(content), graph.operators, strict=True)
    ]


def prepare(name: str, files: Path) -> None:
    """Write every plan's network, and quantise it; what is there stays."""
    with_target = opened("f32")
    try:
        case = table_error.Case(name, with_target, files)
        template = Template(case)
        for at, plan in enumerate(plans_of(case)):
            path = files / f"{name}-{at}.tflite"
            if not path.exists():
                write(path, template.write(plan, at in CHECKED))
            small = files / f"{name}-{at}-int8.tflite"
            if not small.exists():
                noise = [np.random.default_rng(s).standard_normal(case.example.shape) for s in range(CALIBRATION)]
                inputs = [[litert.channels_last(x.astype(np.float32))] for x in noise]
                write(small, litert.quantise(path.read_bytes(), "int8", inputs))
            print(f"{name}: {at + 1} of {FITTED + table_error.PLANS}", file=sys.stderr)
    finally:
        with_target.close()


def write(path: Path, content: bytes) -> None:
    beside = path.with_suffix(".part")
    beside.write_bytes(content)
    beside.replace(path)


def artifact(path: Path, precision: str) -> Artifact:
    return Artifact(str(path), (str(path),), "", path.stat().st_size, "tflite", precision)


# ---- the table against whole networks ------------------------------------------------------------------------


def run(name: str, precision: str, files: Path) -> None:
    """Truth and table of one network, each kept when it is done."""
    ending = "" if precision == "f32" else f"-{precision}"
    paths = [files / f"{name}-{at}{ending}.tflite" for at in range(FITTED + table_error.PLANS)]
    if not all(p.exists() for p in paths):
        print(f"{name} {precision}: not prepared yet; run with --prepare first", file=sys.stderr)
        return
    target = opened(precision)
    try:
        case = table_error.Case(name, target, files)
        truth = record.load(f"tflite_error/truth-{name}-{precision}")
        if truth is None:
            items = [artifact(p, precision) for p in paths]
            found = target.time([*items, *items], 12, 60, 0.004, 75.0)
            halves = np.array([t.median_ms for t in found]).reshape(2, -1).T
            truth = {"halves_ms": halves.tolist(), "load": target.state().load, "notes": target.state().notes}
            record.save(f"tflite_error/truth-{name}-{precision}", truth)
        began = time.monotonic()
        costs, filled = case.fill()
        result = compare(case, np.array(truth["halves_ms"]), costs)
        cost = {"entries": filled.entries, "measured": filled.measured, "seconds": time.monotonic() - began}
        result |= {"cost": cost, "noise_of_entries": filled.noise, "load": truth["load"], "notes": filled.notes}
        record.save(f"tflite_error/{name}-{precision}", result)
    finally:
        target.close()


def compare(case: table_error.Case, halves: Any, costs: Any) -> dict[str, Any]:
    """Errors on the plans that nothing was fitted on."""
    plans = plans_of(case)
    measured, tested = halves.mean(axis=1), halves[FITTED:]
    calibrated, _ = measure.calibrate(costs, list(zip(plans[:FITTED], measured[:FITTED], strict=True)))
    known, asked = (table_error.features(case, part) for part in (plans[:FITTED], plans[FITTED:]))
    predicted = {
        "table": np.array([calibrated.predict_ms(p) for p in plans[FITTED:]]),
        "table, no calibration": np.array([costs.predict_ms(p) for p in plans[FITTED:]]),
        "FLOPs": table_error.scaled(known.flops, measured[:FITTED], asked.flops),
        "two numbers": table_error.two_numbers(known, measured[:FITTED], asked),
    }
    differ = np.abs(tested[:, 0] / tested[:, 1] - 1)
    return {
        "methods": {method: table_error.errors(ms, tested) for method, ms in predicted.items()},
        "predicted_ms": {method: ms.tolist() for method, ms in predicted.items()},
        "repeat_noise": float(np.median(differ)),
        "range": float(tested.max() / tested.min()),
        "dense_ms": float(measured[0]),
    }


# ---- tables --------------------------------------------------------------------------------------------------


def summary() -> str:
    rows = []
    for name in NETWORKS:
        for precision in PRECISIONS:
            found = record.load(f"tflite_error/{name}-{precision}")
            if found is None:
                continue
            m = found["methods"]
            ours = m["table"]
            rows.append([
                name, precision, f"{found['dense_ms']:.3g}", f"{found['range']:.1f}x", f"{found['repeat_noise']:.1%}",
                f"{ours['median']:.1%}", f"{ours['p95']:.1%}", f"{ours['within5']:.0%}", f"{ours['within10']:.0%}",
                f"{ours['rank']:.3f}", f"{m['table, no calibration']['median']:.1%}", f"{m['FLOPs']['median']:.1%}",
                f"{m['two numbers']['median']:.1%}", str(found["cost"]["entries"]),
            ])  # fmt: skip
    header = ["network", "precision", "dense ms", "range", "repeat noise", "table: median", "p95", "within 5 %",
              "within 10 %", "rank", "not calibrated", "FLOPs", "two numbers", "entries"]  # fmt: skip
    return record.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--precisions", nargs="*", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--files", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-tflite-error")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("EDGEPRUNE_HOME", str(HERE / "results" / "tflite_error" / "home"))
    torch.set_num_threads(1)
    options.files.mkdir(parents=True, exist_ok=True)
    for name in () if options.table else options.networks:
        if options.prepare:
            prepare(name, options.files)
            continue
        for precision in options.precisions:
            if record.load(f"tflite_error/{name}-{precision}") is None:
                run(name, precision, options.files)
    print(summary())


if __name__ == "__main__":
    main()
