"""What benchmarks share: torchvision on a CPU build of torch, results as JSON, tables on standard output."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
_library: Any = None


def declare_torchvision_operators() -> None:
    """torchvision's wheel is built for CUDA; on a CPU build of torch its operators are declared before it imports."""
    global _library
    if _library is None:
        import torch

        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def save(name: str, content: Mapping[str, Any]) -> Path:
    """Write a result with what it was measured on."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    full = {**content, "machine": machine(), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(full, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)
    return path


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def machine() -> dict[str, str]:
    found = {"python": platform.python_version(), "processor": _processor()}
    for package in (
        "edgeprune",
        "torch",
        "openvino",
        "ai-edge-litert",
        "onnxruntime",
        "torchvision",
        "timm",
        "torch-pruning",
        "scipy",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(header), ["---"] * len(header), *[list(row) for row in rows]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
