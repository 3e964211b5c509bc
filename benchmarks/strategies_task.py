"""How benchmarks/strategies.py judges and trains: for every arm the same."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10 import SETTINGS, Case
from numpy.typing import NDArray

from edgeprune import finetune
from edgeprune.finetune import Settings
from edgeprune.records import Evaluation
from edgeprune.task import Classification

BN_IMAGES = 256  # of a candidate; a finished arm has those of the recipe


class Judged(Classification):
    """The task with the last two axes inside, which halves what judging a network takes, and a training by batches."""

    def __init__(self, case: Case, seed: int, batches: int) -> None:
        images, settings = case.images, Settings(**{**asdict(SETTINGS), "seed": seed})
        super().__init__(images.train, images.search, images.final, settings, 0, 0)
        self.count = batches

    def adapt(self, model: torch.nn.Module) -> None:
        inside(model)
        finetune.reestimate_batch_norm(model, islice(self.batches(), BN_IMAGES // SETTINGS.batch_size))

    def judge(self, model: torch.nn.Module, images: int) -> Evaluation:
        return super().judge(inside(model), images)

    def train(
        self, student: torch.nn.Module, teacher: torch.nn.Module, last: bool, folder: Path, progress: Any
    ) -> list[finetune.Epoch]:
        short(student, teacher, self._train, self.settings.seed, self.count)
        return []


def short(
    module: torch.nn.Module,
    teacher: torch.nn.Module,
    train: finetune.Images,
    seed: int,
    count: int,
    distillation: float = SETTINGS.distillation,
) -> None:
    """The recipe of benchmarks/cifar10.py over so many batches instead of an epoch."""
    optimiser = torch.optim.SGD(
        module.parameters(), lr=SETTINGS.learning_rate, momentum=SETTINGS.momentum,
        weight_decay=SETTINGS.weight_decay, nesterov=True,
    )  # fmt: skip
    module.train()
    batches = train.batches(SETTINGS.batch_size, shuffle_seed=1000 * seed, augment=True)
    for at, (x, y) in zip(range(count), batches, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = finetune.cosine(SETTINGS.learning_rate, at, count)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                answer = teacher(x).float()
            out = module(x).float()
        loss = finetune.distillation_loss(out, answer, y, distillation, SETTINGS.temperature)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    module.eval()


def inside(module: torch.nn.Module) -> torch.nn.Module:
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@torch.no_grad()
def right(module: torch.nn.Module, images: finetune.Images) -> NDArray[np.bool_]:
    """Which images it gets right, (images,)."""
    found = [(module.eval()(x).argmax(1) == y).numpy() for x, y in images.batches(250)]
    return np.concatenate(found)
