"""A network small enough for an emulated processor: three convolutions, 0.9 million multiplications."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv(in_ch: int, out_ch: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_ch, out_ch, 3, stride, 1, bias=False), nn.BatchNorm2d(out_ch), nn.ReLU())


class Net(nn.Module):
    """(N, 1, 16, 16) grey images -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(1, 16), conv(16, 32, 2), conv(32, 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(self.b(self.a(x))).mean((2, 3)))


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net()
