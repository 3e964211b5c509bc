"""A small real project: a residual network on scikit-learn's digits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from edgeprune import project

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=32, classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(width, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
                               nn.Conv2d(64, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.b = nn.Sequential(nn.Conv2d(width, 96, 3, 2, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU())
        self.fc = nn.Linear(96, classes)

    def forward(self, x):
        x = self.stem(x)
        return self.fc(self.b(torch.relu(x + self.a(x))).mean((2, 3)))


def build(width=32, classes=10):
    torch.manual_seed(0)
    return Net(width, classes)


def not_a_module():
    return "a string"


def raises():
    raise RuntimeError("no licence")


class Flat(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1))


def flat():
    return Flat(7, 10)


def features():
    return nn.Conv2d(1, 4, 3)
"""
TOML = """
[model]
source = "model.py:build"
input = [1, 1, 16, 16]

[data]
source = "digits"
split = [0.6, 0.2, 0.2]

[compress]
speedup = 1.6
steps = 2
min_width = 0.2

[finetune]
epochs = 2
step_epochs = 1
batch_size = 64
bn_images = 128
precision = "32-true"
"""
QUICK = TOML.replace("[1, 1, 16, 16]", "[1, 1, 8, 8]")
"""At the digits' own size a network takes little more than its call, so that a plan is found in few measurements also
on a busy machine: for runs whose subject is not the latency."""


def make(folder: Path, toml: str = TOML) -> Path:
    """Write the project's files; returns its edgeprune.toml."""
    (folder / "model.py").write_text(MODEL)
    path = folder / "edgeprune.toml"
    path.write_text(toml)
    return path


def trained(path: Path, epochs: int = 8) -> None:
    """Train the project's network, and let its edgeprune.toml name the weights."""
    opened = project.read(path)
    model, train = opened.model.train(), opened.data.train
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(epochs):
        for x, y in train.batches(64, shuffle_seed=epoch):
            adam.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            adam.step()
    save_file(model.eval().state_dict(), path.parent / "trained.safetensors")
    path.write_text(path.read_text().replace("input = ", 'weights = "trained.safetensors"\ninput = ', 1))


def command(
    *arguments: str, cwd: Path, environment: dict[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """`edgeprune ...` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **(environment or {})}
    return subprocess.Popen(
        [sys.executable, "-m", "edgeprune", *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )
