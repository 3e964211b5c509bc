"""Install a finished run with what a reader needs to know, and test what was installed by running it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import deploy, runs, verify
from .data import Data
from .errors import DeployError
from .records import Artifact, Receipt, VerifyReport
from .runs import Run
from .target import Target

IMAGES = 8
INPUTS, OUTPUTS = "smoke_inputs.npy", "smoke_outputs.npy"


def flash(run: Run, dense: nn.Module, data: Data, target: Target, folder: Path, keep: int) -> Receipt:
    """Install the run's exported network, with recorded inputs and torch's own outputs beside it.

    Args:
        run: a finished run.
        dense: the original network, to rebuild the pruned one from.
        data: for the recorded inputs, the labels and the preprocessing.
        target: whose runtime runs the smoke test.
        folder: to install into.
        keep: versions that stay.
    Raises:
        DeployError: nothing was switched; what was installed before still stands.
    """
    report = runs.as_record(VerifyReport, run.read("verify.json", verify.FORMAT))
    module = runs.load_model(run, dense)
    x, _ = next(iter(data.final.batches(min(IMAGES, len(data.final)))))
    with torch.inference_mode():
        expected = module(x)
    recorded = run.path("smoke")
    recorded.mkdir(exist_ok=True)
    np.save(recorded / INPUTS, x.numpy())
    np.save(recorded / OUTPUTS, expected.numpy())
    source = run.path("artifact")
    files = {p.name: p for p in sorted(source.iterdir()) if p.is_file() and not p.name.startswith(".")}
    files |= {name: recorded / name for name in (INPUTS, OUTPUTS)}
    manifest = {
        "input": {"shape": [1, *x.shape[1:]], "type": "float32", "layout": "NCHW"},
        "output": {"shape": [1, expected.shape[1]], "labels": list(data.classes)},
        "preprocessing": {"scale": "pixels / 255", "mean": list(data.mean), "std": list(data.std)},
        "measured": {
            "latency_ms": report.pruned.latency.median_ms,
            "accuracy": report.pruned.accuracy.value if report.pruned.accuracy else None,
            "speedup": report.speedup,
            "device": report.fingerprint.device,
            "runtime": report.fingerprint.runtime,
        },
        "precision": report.fingerprint.precision,
        "run": run.folder.name,
    }
    return deploy.install(files, manifest, folder, smoke_test(target), keep)


def smoke_test(target: Target) -> Callable[[Path], None]:
    """A test of an installed version: does it answer its recorded inputs as torch did?"""

    def smoke(version: Path) -> None:
        inputs = np.load(version / INPUTS, allow_pickle=False)
        expected = np.load(version / OUTPUTS, allow_pickle=False)
        path = version / "model.xml"
        precision = target.fingerprint().precision
        artifact = Artifact(str(path), (str(path),), "", 0, "openvino-ir", precision)
        found = target.run(artifact, [inputs])
        off = float(np.abs(found - expected).max()) / (float(np.abs(expected).max()) or 1.0)
        if not off <= verify.TOLERANCE.get(precision, verify.TOLERANCE["f32"]):
            raise DeployError(f"the installed model answers its recorded inputs with a difference of {off:.2g}")

    return smoke
