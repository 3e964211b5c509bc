"""The networks of the solver's benchmark, untrained, with what each is called in the tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import record
import torch
from torch import nn

from edgeprune import model

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Network:
    name: str
    build: Callable[[], nn.Module]
    size: int  # of the square input

    def example(self) -> torch.Tensor:
        return torch.randn(1, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        record.declare_torchvision_operators()
        torch.manual_seed(0)
        return model.build(f"torchvision:{name}", {"weights": None}, HERE).eval()

    return build


def _cifar(depth: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return model.build("resnet.py:build", {"depth": depth}, HERE / "cifar").eval()

    return build


NETWORKS = {
    n.name: n
    for n in (
        Network("ResNet-20", _cifar(20), 32),
        Network("ResNet-18", _torchvision("resnet18"), 224),
        Network("ResNet-50", _torchvision("resnet50"), 224),
        Network("MobileNetV2", _torchvision("mobilenet_v2"), 224),
        Network("EfficientNet-B0", _torchvision("efficientnet_b0"), 224),
        Network("DenseNet-121", _torchvision("densenet121"), 224),
    )
}
