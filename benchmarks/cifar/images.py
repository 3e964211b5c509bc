"""CIFAR-10 from a folder of JPEG archives, decoded once and kept beside this file.

The test images are halved once, with a fixed seed: 5,000 to choose by (search), 5,000 to report (final).
"""

from __future__ import annotations

import io
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CACHE = Path(__file__).resolve().parent / "cifar10.npz"


def splits() -> dict[str, tuple[Any, Any]]:
    """train, val (search) and test (final) as (x, y): uint8 (N, 32, 32, 3) and int64 (N,)."""
    if not CACHE.exists():
        folder = os.environ.get("EDGEPRUNE_DATA")
        if not folder:
            raise SystemExit("set EDGEPRUNE_DATA to the folder that holds cifar10_train.npz and cifar10_test.npz")
        arrays = {}
        for part in ("train", "test"):
            arrays[f"x_{part}"], arrays[f"y_{part}"] = _decode(Path(folder) / f"cifar10_{part}.npz")
        np.savez(CACHE, **arrays)
    with np.load(CACHE) as found:
        x, y, xt, yt = (found[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    order = np.argsort(np.random.PCG64(0).random_raw(len(yt)), kind="stable")
    search, final = np.sort(order[:5000]), np.sort(order[5000:])
    return {"train": (x, y), "val": (xt[search], yt[search]), "test": (xt[final], yt[final])}


def _decode(path: Path) -> tuple[Any, Any]:
    with np.load(path) as archive:
        blob, offset, label = archive["jpeg"].tobytes(), archive["offset"], archive["label"]
    pairs = itertools.pairwise(offset)
    return np.stack([np.asarray(Image.open(io.BytesIO(blob[a:b]))) for a, b in pairs]), label.astype(np.int64)
