"""Made-up runs to install: a model of one operator with its smoke test, and files of any size beside it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from edgeprune.profilers.tflite import NOTHING


def package(folder: Path, step: str, size_bytes: int = 200_000, wrong: bool = False) -> tuple[dict[str, Path], Any]:
    """Files and manifest of a model whose bytes depend on `step`; a wrong one answers something else than recorded."""
    folder = folder / f"package-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    inputs = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    (folder / "model.tflite").write_bytes(NOTHING)
    (folder / "weights.bin").write_bytes(random.Random(step).randbytes(size_bytes))
    np.save(folder / "inputs.npy", inputs)
    np.save(folder / "outputs.npy", np.maximum(inputs, 0) + (1.0 if wrong else 0.0))
    manifest = {
        "step": step,
        "smoke": {
            "runtime": "tflite",
            "open": {"threads": 1, "xnnpack": True},
            "model": "model.tflite",
            "inputs": ["inputs.npy"],
            "outputs": "outputs.npy",
            "tolerance": 1e-3,
        },
    }
    return {path.name: path for path in sorted(folder.iterdir())}, manifest
