"""Training in several processes, by Fabric's launcher: each works on a part of every batch, gradients are averaged.

The parts' losses are weighted by their sizes, so that the average is the gradient of the whole batch. Batch norm sees
its own part only: with it, several processes train a little differently from one, as smaller batches would.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import userfile
from .errors import RunError

T = TypeVar("T")


def fabric(devices: int, precision: Any) -> Any:
    """Fabric for so many GPUs, or processes where there is none.

    Raises:
        RunError: there are GPUs, but not so many.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy

    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and devices > torch.cuda.device_count():
        raise RunError(
            f"finetune.devices is {devices}, but this machine has {torch.cuda.device_count()} GPUs; lower it"
        )
    if devices == 1:
        return Fabric(accelerator=accelerator, devices=1, precision=precision)
    strategy = DDPStrategy(start_method="spawn", find_unused_parameters=True)
    return Fabric(accelerator=accelerator, devices=devices, precision=precision, strategy=strategy)


def launch(fabric: Any, function: Callable[..., T], *arguments: object) -> T:
    """What `function(fabric, *arguments)` returns in the first process; nothing it changes in `arguments` comes back.

    Args:
        fabric: from `fabric`, for more than one device.
        function: at the top of a module.
        arguments: all of them go to every process; networks of the user's own files too.
    Raises:
        RunError: a process failed; its last words are in the message.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

    try:
        result = fabric.launch(_called, _Sealed((_UsersFiles(), function, arguments)))
    except (ProcessRaisedException, ProcessExitedException) as error:
        last = str(error).strip().splitlines()[-1]
        raise RunError(f"training in {fabric.world_size} processes failed: {last}") from error
    value: T = result.content
    return value


def part(fabric: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """This process's images and labels of a batch, and what its mean loss weighs so that all average to the batch's.

    None, in every process, for a batch with less than two images for each.
    """
    rank, of = fabric.global_rank, fabric.world_size
    if of == 1:
        return x, y, 1.0
    if len(y) < 2 * of:
        return None
    return x[rank::of], y[rank::of], len(y[rank::of]) * of / len(y)


class _UsersFiles:
    """The user's own files that were imported; what is unpickled after this finds them."""

    def __reduce__(self) -> tuple[Any, ...]:
        names = (name for name in list(sys.modules) if name.startswith(userfile.PREFIX))
        return _import_again, ([str(sys.modules[name].__file__) for name in names],)


def _import_again(paths: list[str]) -> _UsersFiles:
    for path in paths:
        userfile.import_file(Path(path), RunError)
    return _UsersFiles()


class _Sealed:
    """Fabric looks for tensors in what it passes on, and refuses frozen records; it does not look in here."""

    def __init__(self, content: Any) -> None:
        self.content = content


def _called(fabric: Any, sealed: _Sealed) -> _Sealed:
    _, function, arguments = sealed.content
    own = [copy.deepcopy(a) if isinstance(a, nn.Module) else a for a in arguments]  # weights came in shared memory
    return _Sealed(function(fabric, *own))
