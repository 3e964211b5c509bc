"""How wrong a latency table is about whole networks, and what it costs.

    python benchmarks/table_error.py                           every network that is not in benchmarks/results yet
    python benchmarks/table_error.py --networks resnet18 vgg16 some of them
    python benchmarks/table_error.py --table                   the Markdown tables of what there is

For each network: its table is filled; 30 plans of random widths are built and timed end to end, beside 24 others that
methods may be fitted on and the dense network. All of them stay compiled, each twice, and are visited in turn in a
shuffled order; the two compiled copies are the two halves of the measurement, and what they differ by is its repeat
noise. Errors are of the 30. OpenVINO, f32, one thread; random weights, which do not change latency.

Methods on the same plans: the table (calibrated on whole networks), the same table without calibration, FLOPs in
proportion, and two numbers (FLOPs and bytes at widths rounded up to 16 channels, and a constant) fitted on all 24.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import record
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from scipy.optimize import nnls
from scipy.stats import spearmanr
from torch import nn

from edgeprune import export, importance, measure, model, store, surgery, widths
from edgeprune.allocate import Costs
from edgeprune.errors import AgentError
from edgeprune.graph import trace
from edgeprune.records import Artifact, LayerShape
from edgeprune.target import Target, open_target
from edgeprune.widths import shape_at

Floats = NDArray[np.float64]
HERE = Path(__file__).resolve().parent
NETWORKS = {  # cheap ones first
    "resnet20": 32, "squeezenet1_1": 224, "mobilenet_v3_small": 224, "resnet56": 32, "mobilenet_v2": 224,
    "resnet18": 224, "efficientnet_b0": 224, "resnet50": 224, "vgg16": 224,
}  # fmt: skip
PADDED = ("resnet20", "resnet56")  # how their shortcuts pick and pad channels is a part of the graph: no template
SECOND = {"resnet20": "resnet56", "resnet18": "resnet34", "resnet50": "resnet101"}  # of the family
PLANS, FITTED = 30, 24
CALIBRATION = (6, 12, 24)  # whole networks; 6 is what `edgeprune compress` takes, 12 what the headline uses
CHUNK_BYTES = 2.5e9  # weights of the networks that are compiled together
CHUNK_S = 45.0  # of timing, at most
CHECKED = 9  # two of so many networks are compared with torch before they are timed
AGREES = 2e-3  # a network that is timed against the torch one, of the largest output


class Case:
    """One network with its groups, its device and its table."""

    def __init__(self, name: str, target: Target, folder: Path) -> None:
        self.name, self.target, self.folder = name, target, folder
        self.dense, self.example = build(name)
        self.graph = trace(self.dense, self.example)
        self.candidates = widths.candidates(self.graph.groups, 0.1)
        self.layers = measure.timed(self.graph.layers, target)
        self.scores = importance.score(self.dense, self.graph.groups, "random")

    @property
    def whole(self) -> dict[str, int]:
        return {group: choices[-1] for group, choices in self.candidates.items()}

    def fill(self) -> tuple[Costs, measure.Filled]:
        entries = store.Store(store.default_path())
        table, filled = measure.fill(self.layers, self.candidates, self.target, entries)
        entries.close()
        return measure.costs(self.layers, self.candidates, table, ()), filled


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if name in ("resnet20", "resnet56"):
        made = model.build("resnet.py:build", {"depth": int(name[6:])}, HERE / "cifar")
        return made.eval(), torch.randn(1, 3, 32, 32)
    record.declare_torchvision_operators()
    import torchvision

    return torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)


# ---- networks as files ---------------------------------------------------------------------------------------


class Exporter:
    """A network exported once; a plan's file is the same graph with other weights, or exported where that fails."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.template: Any = None
        if case.name in PADDED:
            return
        module = self._cut(case.whole)
        path = case.folder / "template.onnx"
        export.to_onnx(module, case.example, path)
        self.template = onnx.load(path)
        state = module.state_dict()
        self.scales = {}  # batch norm at its initial values, folded into a convolution, is one factor
        for tensor in self.template.graph.initializer:
            if tensor.name in state:
                folded, plain = numpy_helper.to_array(tensor).ravel(), state[tensor.name].numpy().ravel()
                self.scales[tensor.name] = float(np.dot(folded, plain) / max(np.dot(plain, plain), 1e-30))

    def _cut(self, plan: Mapping[str, int]) -> nn.Module:
        case = self.case
        return surgery.cut(case.dense, case.graph, importance.best(case.scores, plan))

    def write(self, plan: Mapping[str, int], path: Path, check: bool) -> Artifact:
        """The cut network as a file; with `check`, what it computes is compared with torch."""
        cut = self._cut(plan)
        if self.template is None:
            export.to_onnx(cut, self.case.example, path)
            return self._checked(cut, path, check)
        try:
            self._rewrite(cut, path)
            return self._checked(cut, path, check)
        except (AgentError, ValueError):
            export.to_onnx(cut, self.case.example, path)
            return self._checked(cut, path, check)

    def _checked(self, cut: nn.Module, path: Path, check: bool) -> Artifact:
        """Raises ValueError when the file computes something else than the module."""
        case = self.case
        artifact = Artifact(str(path), (str(path),), "", path.stat().st_size, "onnx", "f32")
        if not check:
            return artifact
        with torch.inference_mode():
            wanted = cut(case.example).numpy()
        found = case.target.run(artifact, [case.example.numpy()])
        off = np.abs(found - wanted).max() / np.abs(wanted).max()
        if not off < AGREES:
            raise ValueError(f"{case.name}: {path.name} computes something else than torch ({off:.2g})")
        return artifact

    def _rewrite(self, cut: nn.Module, path: Path) -> None:
        state = cut.state_dict()
        made = onnx.ModelProto()
        made.CopyFrom(self.template)
        reshapes = {node.input[1] for node in made.graph.node if node.op_type == "Reshape"}
        biased = {
            n.input[2]: n.input[1] for n in made.graph.node if n.op_type in ("Conv", "Gemm") and len(n.input) == 3
        }
        modules = dict(cut.named_modules())
        for node in made.graph.node:
            owner = modules.get(node.input[1].removesuffix(".weight")) if node.op_type == "Conv" else None
            if isinstance(owner, nn.Conv2d):
                group = next(a for a in node.attribute if a.name == "group")
                group.i = owner.groups
        del made.graph.value_info[:]
        for tensor in made.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if tensor.name in state:
                array = state[tensor.name].numpy() * np.float32(self.scales[tensor.name])
            elif tensor.name in reshapes:
                array = np.array([1, -1], dtype=np.int64)
            elif tensor.name in biased:
                array = np.zeros(len(state[biased[tensor.name]]), dtype=np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        onnx.save(made, path)


# ---- truth ---------------------------------------------------------------------------------------------------


def measure_truth(case: Case) -> dict[str, Any]:
    """Every plan's latency, from two compiled copies of each; a chunk that was timed before is not timed again."""
    plans = [case.whole, *measure.samples(case.candidates, FITTED - 1, seed=1)]
    plans += measure.random_plans(case.candidates, PLANS, seed=2)
    began = time.monotonic()
    exporter = Exporter(case)
    artifacts = [
        exporter.write(plan, case.folder / f"plan{at}.onnx", at % CHECKED in (0, 1)) for at, plan in enumerate(plans)
    ]
    exported_s = time.monotonic() - began
    halves = np.zeros((len(plans), 2))
    for number, chunk in enumerate(chunks(artifacts)):
        both = _timed(case, f"part-{case.name}-{number}", [artifacts[0], *(artifacts[at] for at in chunk)])
        halves[0] = both[0] if not halves[0].any() else halves[0]
        halves[chunk] = both[1:] * (halves[0].mean() / both[0].mean())  # as if the dense one took what it took first
    state = case.target.state()
    return {
        "plans": [list(plan.values()) for plan in plans], "groups": list(case.candidates), "halves_ms": halves.tolist(),
        "export_s": exported_s, "seconds": time.monotonic() - began, "load": state.load, "notes": state.notes,
    }  # fmt: skip


def _timed(case: Case, part: str, items: Sequence[Artifact]) -> Floats:
    """Medians, (networks, 2 copies)."""
    known = record.load(f"table_error/{part}")
    if known is None:
        found = case.target.time([*items, *items], 12, 60, 0.004, CHUNK_S)
        known = {"medians_ms": np.array([t.median_ms for t in found]).reshape(2, -1).T.tolist()}
        record.save(f"table_error/{part}", known)
    return np.array(known["medians_ms"])


def chunks(artifacts: Sequence[Artifact]) -> list[list[int]]:
    """Networks that fit into memory together, each chunk over the whole range; the first, dense one is in all."""
    total = sum(2 * a.size_bytes for a in artifacts)
    count = max(1, round(total / CHUNK_BYTES))
    return [list(range(1 + start, len(artifacts), count)) for start in range(count)]


# ---- methods -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """What methods know about plans: (plans,) each."""

    flops: Floats
    snapped_flops: Floats
    snapped_bytes: Floats


def features(case: Case, plans: Sequence[Mapping[str, int]]) -> Features:
    rows = []
    for plan in plans:
        each = [(layer, shape_at(layer, plan)) for layer in case.graph.layers if layer.macs]
        plain = [layer.macs * _share(layer.shape, shape) for layer, shape in each]
        snapped = [layer.macs * _share(layer.shape, shape, 16) for layer, shape in each]
        rows.append((sum(plain), sum(snapped), sum(_bytes(shape) for _, shape in each)))
    return Features(*np.array(rows, dtype=float).T)


def _snap(channels: int, step: int) -> int:
    return -(-channels // step) * step


def _share(dense: LayerShape, cut: LayerShape, step: int = 1) -> float:
    """Of the dense layer's multiplications."""
    whole = dense.in_ch / dense.conv_groups * dense.out_ch
    return cut.in_ch / cut.conv_groups * _snap(cut.out_ch, step) / whole


def _bytes(shape: LayerShape) -> float:
    """Read and written: input, output and weights at snapped output width."""
    out = _snap(shape.out_ch, 16)
    pixels = float(np.prod(shape.spatial)) if shape.spatial else 1.0
    strided = pixels / float(np.prod(shape.stride)) if shape.stride else pixels
    kernel = float(np.prod(shape.kernel)) if shape.kernel else 1.0
    return 4 * (shape.in_ch * pixels + out * strided + kernel * shape.in_ch / shape.conv_groups * out)


def two_numbers(known: Features, measured_ms: Floats, asked: Features) -> Floats:
    def columns(f: Features) -> Floats:
        return np.stack([f.snapped_flops / 1e6, f.snapped_bytes / 1e6, np.ones_like(f.flops)], axis=1)

    found, _ = nnls(columns(known) / measured_ms[:, None], np.ones_like(measured_ms))
    return columns(asked) @ found


def scaled(known: Floats, measured_ms: Floats, asked: Floats) -> Floats:
    """In proportion, by the median of the networks that it is fitted on."""
    return asked * float(np.median(measured_ms / known))


def errors(predicted: Floats, halves: Floats) -> dict[str, float]:
    measured = halves.mean(axis=1)
    off = np.abs(predicted / measured - 1)
    return {
        "median": float(np.median(off)), "p95": float(np.percentile(off, 95)),
        "within5": float((off <= 0.05).mean()), "within10": float((off <= 0.10).mean()),
        "rank": float(spearmanr(predicted, measured).statistic),
    }  # fmt: skip


def compare(case: Case, truth: Mapping[str, Any], costs: Costs) -> dict[str, Any]:
    """Errors of every method on the plans that none was fitted on."""
    plans = [dict(zip(truth["groups"], plan, strict=True)) for plan in truth["plans"]]
    halves = np.array(truth["halves_ms"])
    known, asked = slice(0, FITTED), slice(FITTED, None)
    measured = halves.mean(axis=1)
    tested = halves[asked]
    found: dict[str, Any] = {}
    for count in CALIBRATION:
        some = fitted_on(count)
        calibrated, _ = measure.calibrate(costs, [(plans[at], measured[at]) for at in some])
        found[f"table, {count} networks"] = errors(np.array([calibrated.predict_ms(p) for p in plans[asked]]), tested)
    found["table, no calibration"] = errors(np.array([costs.predict_ms(p) for p in plans[asked]]), tested)
    of_known, of_asked = features(case, plans[known]), features(case, plans[asked])
    found["FLOPs, in proportion"] = errors(scaled(of_known.flops, measured[known], of_asked.flops), tested)
    for count in (12, 24):
        some = fitted_on(count)
        fewer = Features(*(getattr(of_known, f.name)[some] for f in fields(Features)))
        found[f"two numbers, {count} networks"] = errors(two_numbers(fewer, measured[some], of_asked), tested)
    differ = np.abs(tested[:, 0] / tested[:, 1] - 1)
    noise = {"median": float(np.median(differ)), "p95": float(np.percentile(differ, 95))}
    noise["rank"] = float(spearmanr(tested[:, 0], tested[:, 1]).statistic)
    return {"methods": found, "noise": noise, "range": float(tested.max() / tested.min())}


def fitted_on(count: int) -> list[int]:
    """The dense network and others spread evenly over the range."""
    return sorted({0, *np.round(np.linspace(1, FITTED - 1, count - 1)).astype(int).tolist()})


# ---- running -------------------------------------------------------------------------------------------------


def run(name: str, target: Target, truth_only: bool) -> None:
    """Truth and table of one network, each kept when it is done."""
    with tempfile.TemporaryDirectory(prefix=f"edgeprune-{name}-") as folder:
        case = Case(name, target, Path(folder))
        truth = record.load(f"table_error/truth-{name}")
        if truth is None:
            truth = measure_truth(case)
            record.save(f"table_error/truth-{name}", truth)
            for part in (record.RESULTS / "table_error").glob(f"part-{name}-*.json"):
                part.unlink()
        if truth_only:
            return
        cost = record.load(f"table_error/cost-{name}")
        began = time.monotonic()
        costs, filled = case.fill()
        if cost is None:
            cost = _cost(filled, time.monotonic() - began)
            record.save(f"table_error/cost-{name}", cost)
        found = compare(case, truth, costs)
        record.save(f"table_error/{name}", {**found, "load": truth["load"], "notes": truth["notes"]})
        print(full_summary([name]), flush=True)


def _cost(filled: measure.Filled, seconds: float) -> dict[str, Any]:
    return {"entries": filled.entries, "measured": filled.measured, "seconds": seconds, "noise": filled.noise,
            "drifted": filled.drifted, "notes": filled.notes}  # fmt: skip


def fill_second(first: str, target: Target) -> None:
    """The next network of the family, into the store that holds the first: filled here if it was another one."""
    name = SECOND[first]
    if record.load(f"table_error/cost-{name}") is not None:
        return
    Case(first, target, Path()).fill()
    case = Case(name, target, Path())
    began = time.monotonic()
    _, filled = case.fill()
    record.save(f"table_error/cost-{name}", _cost(filled, time.monotonic() - began))


def summary(names: Sequence[str]) -> str:
    """The table beside what it is compared with: one row a network, fitted on 12 networks where anything is fitted."""
    header = [
        "network", "range", "repeat noise", "table: median", "p95", "within 5 %", "within 10 %", "rank (two halves)",
        "not calibrated", "FLOPs", "two numbers: median", "p95", "load",
    ]  # fmt: skip
    rows = []
    for name in names:
        found = record.load(f"table_error/{name}")
        if found is None:
            continue
        m, noise = found["methods"], found["noise"]
        ours, two = m["table, 12 networks"], m.get("two numbers, 12 networks", m["two numbers, 24 networks"])
        rows.append([
            name, f"{found['range']:.1f}x", f"{noise['median']:.1%}", f"{ours['median']:.1%}", f"{ours['p95']:.1%}",
            f"{ours['within5']:.0%}", f"{ours['within10']:.0%}", f"{ours['rank']:.3f} ({noise['rank']:.3f})",
            f"{m['table, no calibration']['median']:.1%}", f"{m['FLOPs, in proportion']['median']:.1%}",
            f"{two['median']:.1%}", f"{two['p95']:.1%}", f"{found['load']:.1f}",
        ])  # fmt: skip
    return record.table(header, rows)


def full_summary(names: Sequence[str]) -> str:
    """Every method, one row each."""
    rows = []
    for name in names:
        found = record.load(f"table_error/{name}")
        for method, e in found["methods"].items() if found is not None else ():
            rows.append([name, method, f"{e['median']:.1%}", f"{e['p95']:.1%}", f"{e['within5']:.0%}",
                         f"{e['within10']:.0%}", f"{e['rank']:.3f}"])  # fmt: skip
    return record.table(["network", "method", "median", "p95", "within 5 %", "within 10 %", "rank"], rows)


def cost_summary() -> str:
    rows = []
    for name in [*NETWORKS, *SECOND.values()]:
        cost = record.load(f"table_error/cost-{name}")
        if cost is not None and [name] not in [row[:1] for row in rows]:
            rows.append([name, str(cost["entries"]), str(cost["measured"]), f"{cost['seconds'] / 60:.1f}",
                         f"{cost['noise']:.1%}", str(cost["drifted"])])  # fmt: skip
    return record.table(["network", "entries", "measured", "minutes", "entry noise", "batches repeated"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--again", action="store_true", help="compare again with the truth that was measured")
    parser.add_argument("--truth-only", action="store_true", help="leave the tables for later")
    parser.add_argument("--full", action="store_true", help="every method, one row each")
    parser.add_argument("--table", action="store_true", help="print the tables of what there is")
    options = parser.parse_args()
    if not options.table:
        os.environ.setdefault("EDGEPRUNE_HOME", str(HERE / "results" / "table_error" / "home"))
        torch.set_num_threads(1)
        target = open_target("cpu", {})
        try:
            for name in options.networks:
                if options.again or record.load(f"table_error/{name}") is None:
                    run(name, target, options.truth_only)
            for first in SECOND:
                if first in options.networks and not options.again:
                    fill_second(first, target)
        finally:
            target.close()
    print(full_summary(options.networks) if options.full else summary(options.networks))
    print()
    print(cost_summary())


if __name__ == "__main__":
    sys.exit(main())
