"""Does an installed model answer its recorded inputs as it should? By itself: what a runtime does to it stays here."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from typing import Any

import numpy as np


def main(version: str) -> int:
    """Run the model of a version's folder as its manifest says; 1 and a line on standard error when it is wrong."""
    with open(os.path.join(version, "manifest.json"), encoding="utf-8") as stream:
        spec = json.load(stream).get("smoke")
    if spec is None:
        print("its manifest has no smoke test: an older edgeprune installed it", file=sys.stderr)
        return 1
    expected = np.load(os.path.join(version, spec["outputs"]), allow_pickle=False)
    found = _answers(version, spec)
    off = float(np.abs(found - expected).max()) / (float(np.abs(expected).max()) or 1.0)
    if not off <= spec["tolerance"]:
        print("it answers its recorded inputs with a difference of %.2g of the largest output" % off, file=sys.stderr)
        return 1
    return 0


def _answers(version: str, spec: dict[str, Any]) -> Any:
    calls = importlib.import_module("." + spec["runtime"], __package__).Program().calls()
    calls["open"](_ignore, **spec["open"])
    with tempfile.TemporaryDirectory(prefix="edgeprune-smoke-") as folder:
        output = os.path.join(folder, "output.npy")
        inputs = [os.path.join(version, name) for name in spec["inputs"]]
        calls["run"](_ignore, path=os.path.join(version, spec["model"]), inputs=inputs, output=output)
        return np.load(output, allow_pickle=False).astype(np.float32)


def _ignore(event: Any) -> None:
    pass
