"""A project small enough for an emulated processor: a network of three convolutions on scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path

MODEL = """
import torch
from torch import nn


def conv(inputs, outputs, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(1, 16), conv(16, 32, 2), conv(32, 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x))).mean((2, 3)))


def build():
    torch.manual_seed(0)
    return Net()
"""
TOML = """\
# a comment that stays
[model]
source = "model.py:build"
input = [1, 1, 16, 16]

[data]
source = "digits"
split = [0.8, 0.15, 0.05]

[compress]
target = "pi"
speedup = 1.5
steps = 1
min_width = 0.25

[finetune]
epochs = 2
batch_size = 64
bn_images = 128
precision = "32-true"
"""


def make(folder: Path) -> Path:
    """Write the project's files; returns its edgeprune.toml, which has no target yet."""
    (folder / "model.py").write_text(MODEL)
    path = folder / "edgeprune.toml"
    path.write_text(TOML)
    return path
