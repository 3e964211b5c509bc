"""Everything that has to be measured on an NVIDIA GPU, in the order of its worth, within a time limit.

    tools/gpu_check pack OUT              here, with a network: TensorRT 8.6 and what else the machine lacks, in pieces
    tools/gpu_check run --out FOLDER      there, offline: what fits into --minutes; again, to go on where it stopped
    tools/gpu_check table --out FOLDER    the Markdown tables of what there is
    tools/gpu_check rehearse --out FOLDER the same jobs on this machine's processor, small: shows that they run

Jobs: fixtures for tests/fixtures/nvidia; the table against --plans networks of random widths, for ResNet-50,
MobileNetV2 and VGG-16, batch 1 and 8, f32 and f16, through TensorRT and through plain CUDA; each cut to half its
measured latency, with the speed-up over the MACs; and ResNet-56 on CIFAR-10 (JPEG-compressed images, a dense network
adapted to them), at half its latency and at 2.1 times fewer MACs, trained --epochs. A job that is done has a file in
FOLDER and is not run again; latency entries lie in FOLDER/latency.sqlite. Jobs that no time was left for are listed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from torch import nn

import edgeprune
from edgeprune import files, model, profiling, target, verify
from edgeprune.agent import Agent, local_program
from edgeprune.config import CompressSection
from edgeprune.errors import EdgepruneError
from edgeprune.host import Here
from edgeprune.link import Process
from edgeprune.records import VerifyReport
from edgeprune.watch import Silent

HERE = Path(__file__).resolve().parent
NETWORKS = {"mobilenet_v2": 224, "resnet50": 224, "vgg16": 224}
CIFAR = ("resnet8", "resnet56")
PUBLISHED = (
    "Torch-Pruning, ResNet-56 at 2.1x fewer MACs: 93.46 (L1), 93.77 (group sparsity); its images are the originals"
)
LEAST_S = {"fixtures": 60, "check": 120, "half": 90, "cifar": 300}  # a job is not begun with less time left


@dataclass(frozen=True)
class Case:
    """One network on one runtime."""

    runtime: str  # tensorrt, cuda; cpu in rehearsals
    network: str
    precision: str
    batch: int

    def __str__(self) -> str:
        return f"{self.runtime}-{self.network}-{self.precision}-b{self.batch}"


@dataclass(frozen=True)
class Settings:
    out: Path
    tree: Path | None  # of TensorRT, unpacked
    plans: int
    epochs: int
    device: int
    rehearsal: bool


class Tree(Here):
    """This machine, with the Python and the TensorRT of an unpacked tree for device programs."""

    def __init__(self, tree: Path) -> None:
        super().__init__()
        self._tree = tree.absolute()

    def start(self, runtime: str) -> Agent:
        tree = self._tree
        drivers = os.environ.get("LD_LIBRARY_PATH", "")
        usual = "/usr/local/nvidia/lib64:/usr/lib/x86_64-linux-gnu"
        environment = {
            "PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/tmp"), "PYTHONHOME": f"{tree}/python",
            "PYTHONPATH": f"{tree}/site", "LD_LIBRARY_PATH": f"{tree}/python/lib:{tree}/stubs:{drivers}:{usual}",
        }  # fmt: skip
        command = [f"{tree}/python/bin/python3.10", "-u", str(local_program()), runtime]
        return Agent(lambda: Process(command, environment))


def opened(case: Case, settings: Settings) -> target.Target:
    if case.runtime == "cpu":
        return target.open_target("cpu", {})
    keys = {"precision": case.precision, "device": settings.device}
    if case.runtime == "cuda" or settings.tree is None:
        kind = "cuda" if case.runtime == "cuda" else "jetson"
        return target.open_target("gpu", {"gpu": {"kind": kind, **keys}})
    jetson: Any = importlib.import_module("edgeprune.targets.jetson")
    options = jetson.Options(**keys, external_tactics=False)  # the tree has no cuDNN
    found: target.Target = jetson.Jetson("gpu", options, Tree(settings.tree))
    return found


def built(case: Case) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if case.network in CIFAR:
        module = model.build("resnet.py:build", {"depth": int(case.network[6:])}, HERE / "cifar").eval()
        size = 32
    else:
        if not torch.cuda.is_available():
            record.declare_torchvision_operators()
        module = model.build(f"torchvision:{case.network}", {"weights": None}, HERE).eval()
        size = NETWORKS[case.network]
    return module, torch.randn(case.batch, 3, size, size, generator=torch.Generator().manual_seed(0))


# ---- jobs ----------------------------------------------------------------------------------------------------


def fixtures(cases: Sequence[Case], settings: Settings) -> dict[str, Any]:
    """What TensorRT says about real engines: for tests/fixtures/nvidia."""
    found = {}
    for case in cases:
        module, example = built(case)
        with closing(opened(case, settings)) as device:
            artifact = device.export(module, example, settings.out / "fixtures" / str(case))
            operators = device.operators(settings.out / "fixtures" / str(case))
            agent: Any = getattr(device, "_agent", None)
            raw = agent.call("operators", 300, path=artifact.path) if case.runtime == "tensorrt" else {}
            found[str(case)] = {
                "modules": operators.times, "whole_ms": operators.whole_ms, "engine": raw,
                "fingerprint": files.plain(device.fingerprint()), "state": files.plain(device.state()),
            }  # fmt: skip
    return found


def check(case: Case, settings: Settings) -> dict[str, Any]:
    """The latency table against whole networks of random widths."""
    module, example = built(case)
    began = time.monotonic()
    with closing(opened(case, settings)) as device:
        found = profiling.profile(module, example, device, CompressSection(), settings.plans, Silent())  # type: ignore[call-arg]
        about = files.plain(device.fingerprint())
    assert found.check is not None
    return {
        "check": files.plain(found.check), "filled": files.plain(found.filled), "fingerprint": about,
        "seconds": time.monotonic() - began,
    }  # fmt: skip


def half(case: Case, settings: Settings) -> dict[str, Any]:
    """Cut to half the measured latency, without training: the speed-up that was measured, over the MACs."""
    module, example = built(case)
    noise = [(torch.randn(example.shape, generator=torch.Generator().manual_seed(s)), torch.zeros(1)) for s in range(4)]
    with closing(opened(case, settings)) as device:
        done = edgeprune.compress(
            module, example, device, speedup=2.0, run=settings.out / f"half-{case}", resume=True, steps=1,
            importance="l2", batches=lambda: noise,
        )  # fmt: skip
    return summary_of(done.report)


def cifar(case: Case, settings: Settings, fewer_macs: float | None) -> dict[str, Any]:
    """ResNet-56, trained: at half its measured latency, or at so many times fewer MACs, by `edgeprune compress`."""
    folder = settings.out / ("cifar-macs" if fewer_macs else "cifar-latency")
    speedup = 2.0 if fewer_macs is None else latency_for(case, settings, fewer_macs)
    toml = HERE / "cifar" / "edgeprune.toml"
    weights = Path(os.environ.get("EDGEPRUNE_DATA", "."), "resnet56_cifar10_adapted.safetensors").absolute()
    kind = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "jetson"}[case.runtime]
    sets = [
        "model.arguments={depth=56}", f"model.weights='{weights}'", f"model.input=[{case.batch},3,32,32]",
        f"target.gpu.kind='{kind}'", f"compress.speedup={speedup}", "compress.steps=3",
        f"finetune.epochs={settings.epochs}", "finetune.step_epochs=2",
    ]  # fmt: skip
    command = [sys.executable, "-m", "edgeprune", "compress", "--json", "--target", "gpu"]
    command += ["--project", str(toml), "--run", str(folder)]
    command += [part for text in sets for part in ("--set", text)] + ["--resume"] * folder.exists()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    report = folder / "verify.json"
    if not report.exists():
        raise EdgepruneError(f"the run ended with status {done.returncode}: {done.stdout[-300:]}")
    content = files.read_json(report, verify.FORMAT)
    return {"report": content, "epochs": settings.epochs, "asked": speedup, "published": PUBLISHED}


def latency_for(case: Case, settings: Settings, fewer_macs: float) -> float:
    """The speed-up at which the plan, by the table, has so many times fewer MACs."""
    from edgeprune import allocate, importance, measure, store, widths
    from edgeprune.graph import trace
    from edgeprune.widths import shape_at

    module, example = built(case)
    graph = trace(module, example)
    candidates = widths.candidates(graph.groups, 0.1)
    with closing(opened(case, settings)) as device:
        layers = measure.timed(graph.layers, device)
        table, _ = measure.fill(layers, candidates, device, store.Store(store.default_path()))
    costs, scores = measure.costs(layers, candidates, table, ()), importance.score(module, graph.groups)
    dense_ms = costs.predict_ms(costs.dense)

    def macs(units: Any) -> float:
        shapes = [(shape_at(la, units), la) for la in graph.layers if la.macs]
        return sum(la.macs * s.in_ch * s.out_ch / (la.shape.in_ch * la.shape.out_ch) for s, la in shapes)

    low, high = 1.0, dense_ms / allocate.floor(costs).predicted_ms
    for _ in range(12):
        middle = (low + high) / 2
        plan = allocate.solve(costs, scores, dense_ms / middle)
        low, high = (middle, high) if macs(costs.dense) / macs(plan.widths) < fewer_macs else (low, middle)
    return round(high, 3)


def summary_of(report: VerifyReport) -> dict[str, Any]:
    return {
        "dense_ms": report.dense.latency.median_ms, "pruned_ms": report.pruned.latency.median_ms,
        "speedup": report.speedup, "interval": [report.speedup_low, report.speedup_high],
        "fewer_macs": report.dense.macs / report.pruned.macs, "predicted_ms": report.predicted_ms,
        "agreement": report.pruned.agreement.max_difference, "fingerprint": files.plain(report.fingerprint),
    }  # fmt: skip


# ---- all of them ---------------------------------------------------------------------------------------------


def jobs(settings: Settings) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names and jobs, the most valuable first."""
    if settings.rehearsal:
        small = Case("cpu", "resnet8", "f32", 1)
        yield f"check-{small}", lambda: check(small, settings)
        yield f"half-{small}", lambda: half(small, settings)
        return
    first = [Case("tensorrt", name, "f16", 1) for name in NETWORKS]
    yield "fixtures", lambda: fixtures(first, settings)
    order = [("cuda", "f16", 1), ("tensorrt", "f16", 1), ("cuda", "f32", 1), ("tensorrt", "f32", 1)]
    order += [("cuda", "f16", 8), ("tensorrt", "f16", 8), ("cuda", "f32", 8), ("tensorrt", "f32", 8)]
    cases = [Case(runtime, name, precision, batch) for runtime, precision, batch in order for name in NETWORKS]
    for case in cases[:6]:
        yield from _of(case, settings)
    trained = Case("cuda", "resnet56", "f32", 128)
    yield "cifar-latency", lambda: cifar(trained, settings, None)
    yield "cifar-macs", lambda: cifar(trained, settings, 2.1)
    for case in cases[6:]:
        yield from _of(case, settings)


def _of(case: Case, settings: Settings) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield f"check-{case}", lambda: check(case, settings)
    yield f"half-{case}", lambda: half(case, settings)


def run(settings: Settings, minutes: float) -> int:
    """Every job that is not done and that there is time for."""
    deadline = time.monotonic() + 60 * minutes
    left: list[str] = []
    failed: list[str] = []
    for name, job in jobs(settings):
        path = settings.out / f"{name}.json"
        if path.exists():
            continue
        if deadline - time.monotonic() < (0 if settings.rehearsal else LEAST_S[name.partition("-")[0]]):
            left.append(name)
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            with _limit(deadline - time.monotonic()):
                content = job()
        except (EdgepruneError, TimeoutError) as error:
            (left if isinstance(error, TimeoutError) else failed).append(f"{name}: {error}")
            continue
        content |= {"machine": record.machine(), "took_s": time.monotonic() - began}
        with files.writing(path) as beside:
            beside.write_text(json.dumps(files.plain(content), indent=1) + "\n")
    print(table(settings.out))
    for title, names in (("Failed", failed), ("No time was left for", left)):
        print(f"\n{title}: {'; '.join(names) or 'nothing'}")
    return 1 if failed else 0


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so long: what a table has measured is on disk, and the next call goes on."""
    import signal

    def late(*_: object) -> None:
        raise TimeoutError("its time was up; the next call goes on")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1.0))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(out: Path) -> str:
    """What there is, as Markdown."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    checks, halves, trained = [], [], []
    for name, content in found.items():
        kind, _, case = name.partition("-")
        if kind == "check":
            c = content["check"]
            checks.append([
                case, str(c["networks"]), f"{c['median_error']:.1%}", f"{c['p95_error']:.1%}", f"{c['within_5']:.0%}",
                f"{c['within_10']:.0%}", f"{c['rank_correlation']:.3f}", f"{c['noise']:.1%}",
                str(content["filled"]["entries"]), f"{content['took_s']:.0f}",
            ])  # fmt: skip
        elif kind == "half":
            ratio = content["speedup"] / content["fewer_macs"]
            halves.append([
                case, f"{content['dense_ms']:.4g}", f"{content['pruned_ms']:.4g}", f"{content['speedup']:.2f}x",
                f"{content['fewer_macs']:.2f}x", f"{ratio:.2f}",
            ])  # fmt: skip
        elif kind == "cifar":
            r = content["report"]
            accuracy = [
                r[which]["accuracy"]["value"] if r[which]["accuracy"] else float("nan") for which in ("dense", "pruned")
            ]
            trained.append([
                case, str(content["epochs"]), f"{accuracy[0]:.2%}", f"{accuracy[1]:.2%}", f"{r['speedup']:.2f}x",
                f"{r['dense']['macs'] / r['pruned']['macs']:.2f}x",
            ])  # fmt: skip
    parts = []
    if checks:
        header = [
            "case",
            "networks",
            "median error",
            "p95",
            "within 5 %",
            "within 10 %",
            "rank",
            "noise",
            "entries",
            "s",
        ]
        parts.append(record.table(header, checks))
    if halves:
        parts.append(
            record.table(["case", "dense ms", "pruned ms", "speed-up", "MACs /", "speed-up over MACs /"], halves)
        )
    if trained:
        parts.append(
            record.table(["ResNet-56", "epochs", "dense", "pruned", "speed-up", "MACs /"], trained) + f"\n{PUBLISHED}"
        )
    return "\n\n".join(parts) or "nothing has been measured yet"


def driver(device: int) -> str:
    """The GPU; raises DriverError when there is none."""
    from edgeprune.profilers.cuda_driver import Driver

    about = Driver(device).describe()
    return ", ".join(f"{key} {text}" for key, text in about.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table", "rehearse"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tree", type=Path, help="TensorRT, unpacked; default: what is installed")
    parser.add_argument("--minutes", type=float, default=24.0)
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--device", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["EDGEPRUNE_HOME"] = str(options.out.absolute())
    settings = Settings(
        options.out.absolute(),
        options.tree,
        options.plans,
        options.epochs,
        options.device,
        options.action == "rehearse",
    )
    if options.action == "table":
        print(table(options.out))
        return 0
    if options.action == "run":
        from edgeprune.profilers.cuda_driver import DriverError

        try:
            print(f"GPU: {driver(options.device)}", file=sys.stderr)
        except DriverError as error:
            print(f"gpu_check needs a GPU and found none: {error}", file=sys.stderr)
            return 3
    return run(settings, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
