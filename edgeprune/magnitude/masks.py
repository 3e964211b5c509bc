"""Which weights stay: thresholds by the spread of a layer's weights, and masks that hold through training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..graph import Example, as_call

Masks = Mapping[str, Tensor]  # weight -> which of its entries stay, bool, of its shape
Qualities = Mapping[str, float]  # weight -> threshold, in standard deviations of it
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
DROPOUTS = (nn.modules.dropout._DropoutNd,)


def full(model: nn.Module, frozen: Sequence[str] = ()) -> dict[str, Tensor]:
    """Masks that keep everything: one for the weight of every linear and convolution layer, in the network's order.

    Biases and the scales of norms are few and are never pruned.

    Args:
        model: the network.
        frozen: paths of modules without masks.
    """
    found = {
        f"{n}.weight" if n else "weight": m.weight
        for n, m in model.named_modules()
        if isinstance(m, LAYERS) and not _within(n, frozen)
    }
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in found.items()}


def threshold(weight: Tensor, quality: float, mask: Tensor) -> float:
    """`quality` times the standard deviation of the weights that are left (Han et al., arXiv 1506.02626).

    Args:
        weight, mask: of one shape.
    """
    return quality * float(weight[mask].std(unbiased=False)) if bool(mask.any()) else 0.0


def tighten(model: nn.Module, masks: Masks, qualities: Qualities) -> dict[str, Tensor]:
    """New masks: weights that were left and reach their layer's threshold. What is gone never comes back.

    At least the largest weight of a layer stays.
    """
    tightened = dict(masks)
    for name, quality in qualities.items():
        weight, mask = model.get_parameter(name).detach(), masks[name]
        size = torch.where(mask, weight.abs(), -1.0)
        tightened[name] = (size >= min(threshold(weight, quality, mask), float(size.max()))) & mask
    return tightened


def kept(masks: Masks) -> tuple[int, int]:
    """(weights left, weights)."""
    return sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())


@torch.no_grad()
def apply(model: nn.Module, masks: Masks) -> None:
    """Set what is masked to exactly 0, in place."""
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        parameter.masked_fill_(~mask.to(parameter.device), 0.0)


@contextmanager
def held(model: nn.Module, masks: Masks, l1: float = 0.0) -> Iterator[None]:
    """While this lasts, masked weights are exactly 0 after every optimiser's step, whatever its momentum or decay.

    Args:
        model: trained in place, by any loop.
        masks: what stays.
        l1: weight of the sum of absolute weights that is added to the loss; decay by squares (L2) is the optimiser's.
    """
    handles = [register_optimizer_step_post_hook(lambda *_: apply(model, masks))]
    for name, mask in masks.items():
        handles.append(model.get_parameter(name).register_hook(_gradient(model, name, mask, l1)))
    apply(model, masks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        apply(model, masks)


@contextmanager
def still(model: nn.Module, frozen: Sequence[str]) -> Iterator[None]:
    """While this lasts, the parameters of these modules have no gradients, so that no optimiser moves them."""
    stopped = [p for n, p in model.named_parameters() if _within(n, frozen) and p.requires_grad]
    for parameter in stopped:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter in stopped:
            parameter.requires_grad_(True)


def _within(name: str, paths: Sequence[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _gradient(model: nn.Module, name: str, mask: Tensor, l1: float) -> Callable[[Tensor], Tensor]:
    def masked(gradient: Tensor) -> Tensor:
        pull = l1 * model.get_parameter(name).detach().sign() if l1 else 0.0
        return (gradient + pull).masked_fill(~mask.to(gradient.device), 0.0)

    return masked


# ---- dropout -------------------------------------------------------------------------------------------------


def dropout_rate(dense_rate: float, left: int, of: int) -> float:
    """The dropout of a layer with fewer connections: D_r = D_o * sqrt(C_r / C_o); a sparse layer overfits less."""
    return dense_rate * math.sqrt(left / of)


def dropouts(model: nn.Module, example: Example) -> dict[str, str]:
    """Each dropout module and the weight that reads what it drops: of the next layer that runs."""
    order: list[tuple[str, nn.Module]] = []
    kinds = (*LAYERS, *DROPOUTS)
    handles = [
        part.register_forward_pre_hook(lambda module, _, n=name: order.append((n, module)))
        for name, part in model.named_modules()
        if isinstance(part, kinds)
    ]
    args, kwargs = as_call(example)
    was_training = model.training
    with torch.inference_mode():
        model.eval()(*args, **kwargs)
    model.train(was_training)
    for handle in handles:
        handle.remove()
    found: dict[str, str] = {}
    for at, (name, part) in enumerate(order):
        reader = next((n for n, m in order[at + 1 :] if isinstance(m, LAYERS)), None)
        if isinstance(part, DROPOUTS) and reader is not None:
            found[name] = f"{reader}.weight" if reader else "weight"
    return found


def rescale_dropout(
    model: nn.Module, dense_rates: Mapping[str, float], readers: Mapping[str, str], masks: Masks
) -> None:
    """Set every dropout's rate to what its layer's connections warrant, in place.

    Args:
        model: the network.
        dense_rates: dropout module -> its rate in the dense network.
        readers: see `dropouts`.
        masks: connections that are left.
    """
    for name, weight in readers.items():
        part = model.get_submodule(name)
        assert isinstance(part, nn.modules.dropout._DropoutNd)
        part.p = dropout_rate(dense_rates[name], int(masks[weight].sum()), masks[weight].numel())
