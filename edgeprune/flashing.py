"""Install a finished run with what a reader needs to know, on one device or several, tested by running it there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from . import host, runs, verify
from .data import Data
from .errors import DeployError, TargetError, UsageError
from .host import Host
from .records import VerifyReport
from .runs import Run
from .target import Target

IMAGES = 8
INPUTS, OUTPUTS, PROGRAM = "smoke_inputs.npy", "smoke_outputs.npy", "run.py"
MODELS = ("model.xml", "model.tflite", "model.onnx", "model.ts")  # what a runtime loads
T = TypeVar("T")
PLACE = re.compile(r"(?P<host>[^/:]+):(?P<folder>.+)")


@dataclass(frozen=True)
class Place:
    """Where to install: a folder of the target's own device, or of another one that ssh reaches."""

    host: str  # "" for the target's device
    folder: str

    def __str__(self) -> str:
        return f"{self.host}:{self.folder}" if self.host else self.folder


def places(texts: Sequence[str]) -> list[Place]:
    """Read FOLDER or HOST:FOLDER, several with commas between; raises UsageError."""
    found = []
    for text in (part.strip() for whole in texts for part in whole.split(",")):
        elsewhere = PLACE.fullmatch(text)
        if not text or (":" in text.partition("/")[0] and elsewhere is None):
            raise UsageError(f"{text!r} is no place to install; write FOLDER or HOST:FOLDER, as in pi@board:/opt/model")
        found.append(Place(elsewhere["host"], elsewhere["folder"]) if elsewhere else Place("", text))
    return found


@contextmanager
def opened(place: Place, target: Target) -> Iterator[Host]:
    """The host of a place."""
    if not place.host:
        yield target.host
    else:
        with closing(host.reach(place.host, target.host)) as other:
            yield other


def everywhere(target: Target, where: Sequence[Place], act: Callable[[Host, str], T]) -> list[T]:
    """Do something on one device after the other; stop at the first that fails.

    Args:
        target: whose device is meant where a place names none.
        where: the places.
        act: gets a host and a folder there.
    Raises:
        DeployError, TargetError: of several places, with those that are done and those that were not touched.
    """
    results: list[T] = []
    for at, place in enumerate(where):
        try:
            with opened(place, target) as device:
                results.append(act(device, place.folder))
        except (DeployError, TargetError) as error:
            if len(where) == 1:
                raise
            done, rest = (", ".join(map(str, part)) or "none" for part in (where[:at], where[at + 1 :]))
            raise type(error)(f"{place}: {error}. Done before it: {done}; not touched: {rest}") from error
    return results


def package(run: Run, dense: nn.Module, data: Data, target: Target) -> tuple[dict[str, Path], dict[str, Any]]:
    """What is installed of a finished run: its files, and its manifest.

    Beside the exported network: recorded inputs with torch's own outputs for the smoke test, and a program that runs
    the network with the device's runtime.

    Args:
        run: a finished run.
        dense: the original network, to rebuild the pruned one from.
        data: for the recorded inputs, the labels and the preprocessing.
        target: whose runtime runs it.
    """
    report = runs.as_record(VerifyReport, run.read("verify.json", verify.FORMAT))
    module = runs.load_model(run, dense)
    x, _ = next(iter(data.final.batches(min(IMAGES, len(data.final)))))
    with torch.inference_mode():
        expected = module(x)
    recorded = run.path("smoke")
    recorded.mkdir(exist_ok=True)
    inputs = target.stored(x.numpy())
    np.save(recorded / INPUTS, inputs)
    np.save(recorded / OUTPUTS, expected.numpy())
    program = resources.files("edgeprune") / "templates" / f"run_{target.runtime}.py"
    (recorded / PROGRAM).write_text(program.read_text(encoding="utf-8"), encoding="utf-8")
    source = run.path("artifact")
    files = {p.name: p for p in sorted(source.iterdir()) if p.is_file() and not p.name.startswith(".")}
    model = next((name for name in MODELS if name in files), None)
    if model is None:
        raise DeployError(f"{source} has none of {', '.join(MODELS)}; export the run again with `edgeprune verify`")
    files |= {name: recorded / name for name in (INPUTS, OUTPUTS, PROGRAM)}
    precision = report.fingerprint.precision
    manifest = {
        "model": model,
        "input": {
            "shape": [1, *inputs.shape[1:]],
            "type": "float32",
            "layout": "NCHW" if inputs.shape == x.shape else "NHWC",
        },
        "output": {"shape": [1, expected.shape[1]], "labels": list(data.classes)},
        "preprocessing": {"scale": "pixels / 255", "mean": list(data.mean), "std": list(data.std)},
        "measured": {
            "latency_ms": report.pruned.latency.median_ms,
            "accuracy": report.pruned.accuracy.value if report.pruned.accuracy else None,
            "speedup": report.speedup,
            "device": report.fingerprint.device,
            "runtime": report.fingerprint.runtime,
        },
        "precision": precision,
        "run": run.folder.name,
        "smoke": {
            "runtime": target.runtime,
            "open": dict(target.opening),
            "model": model,
            "inputs": [INPUTS],
            "outputs": OUTPUTS,
            "tolerance": verify.TOLERANCE.get(precision, verify.TOLERANCE["f32"]),
        },
    }
    return files, manifest
