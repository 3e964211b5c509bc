"""A device that computes wrongly fails its verification, whatever it says of itself.

Debian 12's QEMU 7.2 emulates its processor `max` wrongly: LiteRT's int8 kernels give other numbers there, those of
32-bit floats do not. The Cortex-A72 of the same emulator is right.
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

import boardnet
import numpy as np
import pytest
import torch
from processors import Processor

from edgeprune import measure, verify
from edgeprune.records import Budget

pytestmark = pytest.mark.board


@pytest.mark.parametrize(
    ("processor", "precision", "right"),
    [("max", "int8", False), ("max", "f32", True), ("cortex-a72", "int8", True)],
)
def test_a_processor_that_computes_wrongly_fails_verification(
    processor: str, precision: str, right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "NETWORK_VISITS", (1, 1))  # its latencies say nothing
    boardnet.make(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = importlib.import_module("model").build().eval()
    example = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    images = np.random.default_rng(0).normal(size=(16, 1, 16, 16)).astype(np.float32)
    tflite = importlib.import_module("edgeprune.targets.tflite")
    device = tflite.Tflite("arm", tflite.Options(precision=precision), Processor(processor, tmp_path))
    with contextlib.closing(device):
        artifact = device.export(model, example, tmp_path / "artifact", [images])
        network = verify.Network(model, artifact, 0, 0)
        report = verify.check(network, network, device, Budget(None, 1.0), 1.0, 1.0, example, None)
    agreed = {check.name: check.passed for check in verify.verdict(report)}
    assert agreed["agreement of the pruned network"] is right
