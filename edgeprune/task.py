"""What the pipeline needs to know about training: from a project's data, or from your own callables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import finetune, metrics
from .errors import UsageError
from .finetune import Epoch, Images, Settings
from .metrics import Metric
from .records import Evaluation, Progress

Batches = Iterable[tuple[Tensor, Tensor]]
CALIBRATION = 64  # images


class Task(Protocol):
    """Adapts, trains and judges networks."""

    final: Images | None  # labelled images for the last check
    metrics: Mapping[str, Metric]  # what floors can be set for

    def batches(self) -> Batches:
        """Some training images, augmented: for gradients and batch norm."""

    def calibration(self) -> list[NDArray[Any]]:
        """Some training images, (images, ...), for exports that need to know their range; [] where there are none."""

    def adapt(self, model: nn.Module) -> None:
        """What a fresh cut needs before anything else, in place: batch norm."""

    def train(
        self, student: nn.Module, teacher: nn.Module, last: bool, folder: Path, progress: Progress | None
    ) -> list[Epoch]:
        """Train in place, after an earlier step or the last one; resumable from `folder`."""

    def evaluate(self, model: nn.Module) -> float | None:
        """Accuracy (0..1) on images that may guide choices; None when unknown."""

    def judge(self, model: nn.Module, images: int) -> Evaluation:
        """Loss and accuracy on at most so many of the images that may guide choices, always the same ones."""

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Every metric, on images that may guide choices; empty when there are none."""

    def describe(self) -> dict[str, Any]:
        """The recipe, for the record."""


class Classification:
    """Images and labels of a project: cross entropy and distillation."""

    def __init__(
        self,
        train: Images,
        search: Images,
        final: Images,
        settings: Settings,
        epochs: int,
        step_epochs: int,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        self._train, self._search = train, search
        self.final: Images | None = final
        self.metrics = metrics or {}
        self.settings, self.epochs, self.step_epochs = settings, epochs, step_epochs

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = min(self.settings.batch_size, len(self._train))
        count = max(1, round(self.settings.bn_images / size))
        return islice(self._train.batches(size, shuffle_seed=self.settings.seed, augment=True), count)

    def calibration(self) -> list[NDArray[Any]]:
        return _some_of(self._train.batches(min(CALIBRATION, len(self._train)), shuffle_seed=self.settings.seed))

    def adapt(self, model: nn.Module) -> None:
        if self.settings.bn_images:
            finetune.reestimate_batch_norm(model, self.batches())

    def train(
        self, student: nn.Module, teacher: nn.Module, last: bool, folder: Path, progress: Progress | None
    ) -> list[Epoch]:
        epochs = self.epochs if last else self.step_epochs
        return finetune.train(student, teacher, self._train, self._search, epochs, self.settings, folder, progress)

    def evaluate(self, model: nn.Module) -> float | None:
        return finetune.accuracy(model, self._search)

    def judge(self, model: nn.Module, images: int) -> Evaluation:
        return finetune.judge(model, self._search, images, self.settings.seed)

    def measure(self, model: nn.Module) -> dict[str, float]:
        return measured(model, self._search, self.metrics)

    def describe(self) -> dict[str, Any]:
        images = {"train": len(self._train), "search": len(self._search), "final": len(self.final or ())}
        return {**asdict(self.settings), "epochs": self.epochs, "step_epochs": self.step_epochs, "images": images}


class Callables:
    """Your own loop: `train(model)` in place, `evaluate(model)` -> float, `batches` to re-estimate batch norm on."""

    def __init__(
        self,
        train: Callable[[nn.Module], object] | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        batches: Callable[[], Batches] | None = None,
        search: Images | None = None,
        final: Images | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        self._train, self._evaluate, self._batches = train, evaluate, batches
        self._search, self.final, self.metrics = search, final, metrics or {}

    def batches(self) -> Batches:
        return self._batches() if self._batches is not None else ()

    def calibration(self) -> list[NDArray[Any]]:
        return _some_of(self.batches())

    def adapt(self, model: nn.Module) -> None:
        if self._batches is not None:
            finetune.reestimate_batch_norm(model, self._batches())

    def train(
        self, student: nn.Module, teacher: nn.Module, last: bool, folder: Path, progress: Progress | None
    ) -> list[Epoch]:
        if self._train is not None:
            self._train(student)
        return []

    def evaluate(self, model: nn.Module) -> float | None:
        return float(self._evaluate(model)) if self._evaluate is not None else None

    def judge(self, model: nn.Module, images: int) -> Evaluation:
        if self._evaluate is None:
            raise UsageError("a search judges networks by their accuracy: give evaluate, or another strategy")
        accuracy = float(self._evaluate(model))
        return Evaluation(1 - accuracy, accuracy)

    def measure(self, model: nn.Module) -> dict[str, float]:
        return measured(model, self._search, self.metrics) if self._search is not None else {}

    def describe(self) -> dict[str, Any]:
        return {"loop": "your own" if self._train is not None else "none"}


def _some_of(batches: Batches) -> list[NDArray[Any]]:
    found: list[NDArray[Any]] = []
    for x, _ in batches:
        found.append(x.detach().cpu().numpy())
        if sum(map(len, found)) >= CALIBRATION:
            break
    return [np.concatenate(found)[:CALIBRATION]] if found else []


@torch.no_grad()
def measured(model: nn.Module, images: Images, wanted: Mapping[str, Metric]) -> dict[str, float]:
    """Every metric of a network's outputs on images, in evaluation mode."""
    if not wanted:
        return {}
    was_training = model.training
    model.eval()
    parts = [(model(x), y, x) for x, y in images.batches(256)]
    model.train(was_training)
    outputs, labels, inputs = (torch.cat(part).float().numpy() for part in zip(*parts, strict=True))
    return metrics.measure(wanted, outputs, labels, inputs)
