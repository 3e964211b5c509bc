"""Training in two processes against the same arithmetic written down in one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_shaping import SETTINGS, Digits
from torch import Tensor, nn

from edgeprune import finetune, together, userfile
from edgeprune.errors import ModelError, RunError

OWN = """
from torch import nn

def build(norm):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(), nn.Flatten(), Own(288, 10)
    )

class Own(nn.Linear):
    pass
"""


class Few(Digits):
    """So that the last batch of 50 has 45 images, which two processes share unequally."""

    def __init__(self, part: int, count: int = 95) -> None:
        super().__init__(part)
        self.x, self.y = self.x[:count], self.y[:count]


class Broken(Few):
    def batches(
        self, size: int, shuffle_seed: int | None = None, augment: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        raise ZeroDivisionError("no more images")


def build(folder: Path, norm: bool) -> nn.Module:
    if not (folder / "own.py").exists():
        (folder / "own.py").write_text(OWN)
    torch.manual_seed(0)
    made = userfile.call(folder / "own.py", "build", ModelError, {"norm": norm})
    assert isinstance(made, nn.Module)
    return made


def trained(model: nn.Module, teacher: nn.Module, devices: int, folder: Path) -> list[finetune.Epoch]:
    settings = replace(SETTINGS, devices=devices, distillation=0.5)
    folder.mkdir()
    return finetune.train(model, teacher, Few(0), Few(1), 2, settings, folder)


def by_hand(model: nn.Module, teacher: nn.Module) -> list[float]:
    """Losses of the epochs: every batch in two parts that do not see each other's statistics, one step for both."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, nesterov=True)
    means, step = [], 0
    for epoch in range(2):
        losses = []
        for x, y in Few(0).batches(50, shuffle_seed=epoch):
            optimiser.param_groups[0]["lr"] = finetune.cosine(0.02, step, 4)
            model.train()
            optimiser.zero_grad()
            total = torch.zeros(())
            for at in (1, 0):  # the first process's statistics are kept
                before = {n: b.clone() for n, b in model.named_buffers()}
                mine, labels = x[at::2], y[at::2]
                out = model(mine)
                loss = finetune.distillation_loss(out, teacher(mine).detach(), labels, 0.5, 4.0) * len(labels) / len(y)
                loss.backward()
                total += loss.detach()
                if at:
                    model.load_state_dict(before, strict=False)
            optimiser.step()
            losses.append(float(total))
            step += 1
        means.append(sum(losses) / 2)
    return means


@pytest.mark.slow
@pytest.mark.parametrize("norm", [True, False])
def test_two_processes_train_as_one_does_on_both_parts_of_every_batch(tmp_path: Path, norm: bool) -> None:
    teacher = build(tmp_path, norm).eval()
    together_, alone, one = (build(tmp_path, norm) for _ in range(3))
    history = trained(together_, teacher, 2, tmp_path / "two")
    losses = by_hand(alone, teacher)
    assert [e.loss for e in history] == pytest.approx(losses, rel=1e-4)
    if history[1].search_accuracy > history[0].search_accuracy:  # otherwise the first epoch's weights are what stays
        for name, value in alone.state_dict().items():
            assert torch.allclose(together_.state_dict()[name].float(), value.float(), atol=1e-4), name
    single = trained(one, teacher, 1, tmp_path / "one")
    same = [e.loss for e in single] == pytest.approx([e.loss for e in history], rel=1e-4)
    assert same == (not norm), "batch norm sees a part of the batch only"


@pytest.mark.slow
def test_what_fails_in_a_process_is_told(tmp_path: Path) -> None:
    model = build(tmp_path, False)
    settings = replace(SETTINGS, devices=2)
    with pytest.raises(RunError, match=r"training in 2 processes failed: ZeroDivisionError: no more images"):
        finetune.train(model, None, Broken(0), Few(1), 1, settings, tmp_path)


def test_the_parts_of_a_batch_average_to_the_batch() -> None:
    for size, of in ((7, 2), (50, 3), (8, 4)):
        x, y = torch.randn(size, 2, dtype=torch.float64), torch.arange(size)
        parts = [together.part(SimpleNamespace(global_rank=r, world_size=of), x, y) for r in range(of)]
        assert sorted(torch.cat([p[1] for p in parts if p]).tolist()) == y.tolist()
        mean = sum(p[2] * p[0].mean(0) for p in parts if p) / of
        assert torch.allclose(mean, x.mean(0))


def test_a_batch_without_two_images_for_each_process_is_left_out_by_all() -> None:
    x, y = torch.randn(5, 2), torch.arange(5)
    assert [together.part(SimpleNamespace(global_rank=r, world_size=3), x, y) for r in range(3)] == [None] * 3
