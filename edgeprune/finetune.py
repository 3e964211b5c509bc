"""Win back accuracy after a cut: re-estimate batch norm, then train with distillation from the dense network."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from . import files, together
from .errors import RunError
from .records import Evaluation, Progress

FORMAT = "edgeprune.epoch/1"
BEST = "best.safetensors"
Batches = Iterable[tuple[Tensor, Tensor]]


class Images(Protocol):
    """A labelled set that can be gone through (see `data.Subset`)."""

    def __len__(self) -> int: ...

    def batches(
        self, batch_size: int, shuffle_seed: int | None = None, augment: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Settings:
    """How to train; see [finetune] in the project file."""

    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    distillation: float
    temperature: float
    precision: str
    bn_images: int
    devices: int
    seed: int


@dataclass(frozen=True)
class Epoch:
    """What one epoch reached."""

    epoch: int
    loss: float
    search_accuracy: float
    seconds: float


def reestimate_batch_norm(model: nn.Module, batches: Batches) -> None:
    """Give batch norm the statistics of the cut network: plain averages over the batches, in place.

    Statistics of a dense network describe channels that other channels fed. A few hundred images are enough.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    before = [m.momentum for m in norms]
    was_training = model.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    model.train()
    seen = 0
    with torch.no_grad():
        for x, _ in batches:
            model(x)
            seen += 1
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    model.train(was_training)
    if not seen:
        raise RunError("batch norm needs images to be re-estimated on; [data] has none for training")


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, batch_size: int = 256) -> float:
    """Top-1 accuracy in evaluation mode, 0..1."""
    was_training = model.training
    model.eval()
    correct = total = 0
    for x, y in images.batches(batch_size):
        correct += int((model(x).argmax(1) == y).sum())
        total += len(y)
    model.train(was_training)
    return correct / max(total, 1)


@torch.no_grad()
def judge(model: nn.Module, images: Images, count: int, seed: int, batch_size: int = 250) -> Evaluation:
    """Cross-entropy and top-1 accuracy in evaluation mode on `count` of the images, drawn by `seed`."""
    was_training = model.training
    model.eval()
    correct, loss, total = 0, 0.0, 0
    for x, y in images.batches(batch_size, shuffle_seed=seed):
        x, y = x[: count - total], y[: count - total]
        out = model(x)
        correct += int((out.argmax(1) == y).sum())
        loss += float(functional.cross_entropy(out, y, reduction="sum"))
        total += len(y)
        if total >= count:
            break
    model.train(was_training)
    return Evaluation(loss / max(total, 1), correct / max(total, 1))


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, share: float, temperature: float) -> Tensor:
    """(1 - share) * cross entropy + share * T^2 * KL(teacher || student), both softened by T.

    Args:
        student, teacher: logits, (batch, classes).
        labels: (batch,).
    Source: Hinton et al., arXiv 1503.02531.
    """
    hard = functional.cross_entropy(student, labels)
    if share == 0:
        return hard
    soft = functional.kl_div(
        functional.log_softmax(student / temperature, dim=1),
        functional.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - share) * hard + share * temperature**2 * soft


def train(
    student: nn.Module,
    teacher: nn.Module | None,
    train_images: Images,
    search_images: Images,
    epochs: int,
    settings: Settings,
    folder: Path,
    progress: Progress | None = None,
) -> list[Epoch]:
    """Train in place for `epochs` with a cosine schedule; the best on the search split is what stays.

    Each epoch's weights and optimiser are in `folder` when it ends; a run that was killed goes on from there.

    Args:
        student: the cut network.
        teacher: the dense network to follow, or None.
        train_images, search_images: where to learn, and where to choose the best epoch.
        folder: for checkpoints.
        progress: told (batches done, of).
    Raises:
        RunError: a damaged checkpoint, or a loss that is not finite.
    """
    if epochs == 0:
        return []
    fabric = _fabric(student, train_images, settings)
    course = _Course(train_images, search_images, epochs, settings, folder)
    if settings.devices == 1:
        history = _train(fabric, student, teacher, course, progress)
    else:
        history = together.launch(fabric, _train, student, teacher, course)
    load_state(student, read_tensors(folder / BEST), folder)
    return history


@dataclass(frozen=True)
class _Course:
    """What a network learns from, for how long, and how."""

    train_images: Images
    search_images: Images
    epochs: int
    settings: Settings
    folder: Path


def _train(
    fabric: Any, student: nn.Module, teacher: nn.Module | None, course: _Course, progress: Progress | None = None
) -> list[Epoch]:
    """In each of the processes that train together; the first one judges and writes."""
    settings = course.settings
    optimiser = torch.optim.SGD(
        student.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
    checkpoint = _Checkpoint(course.folder, student, optimiser)
    history = checkpoint.resume()
    model, wrapped = fabric.setup(student, optimiser)
    if teacher is not None:
        teacher = fabric.to_device(teacher.eval())
    for epoch in range(len(history), course.epochs):
        began = time.monotonic()
        student.train()
        loss = _epoch(fabric, model, wrapped, teacher, course, epoch, progress)
        if not math.isfinite(loss):
            raise RunError(f"the loss is {loss} in epoch {epoch + 1}; lower finetune.learning_rate")
        if fabric.is_global_zero:
            reached = Epoch(epoch + 1, loss, accuracy(student, course.search_images), time.monotonic() - began)
            history.append(reached)
            checkpoint.save(history)
    return history


def _epoch(
    fabric: Any,
    model: Any,
    optimiser: Any,
    teacher: nn.Module | None,
    course: _Course,
    epoch: int,
    progress: Progress | None,
) -> float:
    """One pass over the training images; the mean loss."""
    settings, losses = course.settings, []
    share = settings.distillation if teacher is not None else 0.0
    per_epoch = math.ceil(len(course.train_images) / settings.batch_size)
    seed = settings.seed * 1000 + epoch
    for at, batch in enumerate(course.train_images.batches(settings.batch_size, shuffle_seed=seed, augment=True)):
        step, steps = epoch * per_epoch + at, course.epochs * per_epoch
        for group in optimiser.param_groups:
            group["lr"] = cosine(settings.learning_rate, step, steps)
        mine = together.part(fabric, *batch)
        if mine is None:
            continue
        x, y = fabric.to_device(mine[:2])
        with torch.no_grad(), fabric.autocast():
            target = teacher(x).float() if teacher is not None else x
        loss = mine[2] * distillation_loss(model(x).float(), target, y, share, settings.temperature)
        optimiser.zero_grad()
        fabric.backward(loss)
        optimiser.step()
        losses.append(float(fabric.all_reduce(loss.detach())))
        if progress is not None:
            progress(step + 1, steps)
    return sum(losses) / max(len(losses), 1)


def cosine(peak: float, step: int, steps: int) -> float:
    """Learning rate at a step: from `peak` to nearly zero along half a cosine."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


# ---- precision -----------------------------------------------------------------------------------------------


def _fabric(model: nn.Module, images: Images, settings: Settings) -> Any:
    precision: Any = settings.precision
    if precision == "auto":
        precision = _faster_precision(model, images, settings)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it reports its precision each time
    return together.fabric(settings.devices, precision)


def _faster_precision(model: nn.Module, images: Images, settings: Settings) -> str:
    """bf16 autocast halves a training step on processors that have it and doubles it on others: try both."""
    x, y = next(iter(images.batches(settings.batch_size, shuffle_seed=0)))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    was_training = model.training
    model.train()
    seconds = {}
    for name, enabled in (("32-true", False), ("bf16-mixed", True), ("32-true", False), ("bf16-mixed", True)):
        began = time.process_time()
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=enabled):
            out = model(x)
        torch.autograd.backward(functional.cross_entropy(out.float(), y))
        seconds[name] = time.process_time() - began  # the second try counts: the first one warms up
        model.zero_grad()
    model.train(was_training)
    model.load_state_dict(state)
    return "bf16-mixed" if seconds["bf16-mixed"] < 0.9 * seconds["32-true"] else "32-true"


# ---- checkpoints ---------------------------------------------------------------------------------------------


class _Checkpoint:
    """After each epoch: the weights, the momentum, and the best weights so far. The history is written last."""

    def __init__(self, folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self.folder, self.model, self.optimiser = folder, model, optimiser

    def save(self, history: list[Epoch]) -> None:
        state = self.model.state_dict()
        best = max(range(len(history)), key=lambda i: history[i].search_accuracy)
        if best == len(history) - 1:
            save_tensors(state, self.folder / BEST)
        momentum = {
            f"momentum.{n}": self.optimiser.state[p]["momentum_buffer"]
            for n, p in self.model.named_parameters()
            if self.optimiser.state.get(p, {}).get("momentum_buffer") is not None
        }
        last = f"epoch-{len(history)}.safetensors"
        save_tensors({**{f"weights.{k}": v for k, v in state.items()}, **momentum}, self.folder / last)
        files.write_json(self.folder / "epochs.json", FORMAT, {"epochs": history, "last": last})
        for old in self.folder.glob("epoch-*.safetensors"):
            if old.name != last:
                old.unlink()

    def resume(self) -> list[Epoch]:
        record = self.folder / "epochs.json"
        if not record.exists():
            return []
        content = files.read_json(record, FORMAT)
        saved = read_tensors(self.folder / content["last"])
        weights = {k.removeprefix("weights."): v for k, v in saved.items() if k.startswith("weights.")}
        load_state(self.model, weights, self.folder)
        for name, parameter in self.model.named_parameters():
            if f"momentum.{name}" in saved:
                self.optimiser.state[parameter]["momentum_buffer"] = saved[f"momentum.{name}"].clone()
        return [Epoch(**epoch) for epoch in content["epochs"]]


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, beside and renamed."""
    unique = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    with files.writing(path) as beside:
        save_file(unique, beside)


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except Exception as error:  # safetensors raises its own kinds
        raise RunError(
            f"{path} is damaged or missing ({error}); delete its folder and that step will be run again"
        ) from error


def load_state(model: nn.Module, state: dict[str, Tensor], where: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(
            f"{where}: the saved weights belong to another network: {str(error).splitlines()[-1].strip()}"
        ) from error
