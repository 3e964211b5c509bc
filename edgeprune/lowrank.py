"""Layers as products of smaller ones, exactly; the ranks between are channel groups, to be chosen like any widths.

A convolution becomes three (Tucker-2: to its input rank, the kernel, from its output rank), a linear layer or a 1x1
convolution two (singular values). At full rank nothing is lost, and more is computed; a plan then takes ranks away, the
least ones first: what a rank scores is its singular value. So a strategy that chooses widths chooses ranks, as GeneCAI
(arXiv 2004.04249) does in a phase of its own. Tucker-2: Kim et al., arXiv 1511.06530; the factors are those of the
higher-order singular value decomposition (De Lathauwer et al. 2000).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import ModelError

P = TypeVar("P", nn.Linear, nn.Conv2d)
NOTHING = 1e-7  # of the largest singular value: what rounding leaves of a rank that is not there


def factored(model: nn.Module, layers: Sequence[str]) -> nn.Module:
    """A copy with the same outputs whose layers are products.

    Args:
        model: the network; it is not changed.
        layers: module paths; all linear layers and convolutions without groups in them.
    Raises:
        ModelError: nothing there that has a rank.
    """
    made = copy.deepcopy(model)
    for path in layers:
        found = [name for name, part in made.named_modules() if _within(name, path) and _has_rank(part)]
        if not found:
            raise ModelError(
                f"model.low_rank: {path!r} holds no linear layer and no convolution without groups; "
                f"there are {', '.join(n for n, p in model.named_modules() if _has_rank(p)) or 'none'}"
            )
        for name in found:
            parent, _, last = name.rpartition(".")
            setattr(made.get_submodule(parent), last, _product(made.get_submodule(name)))
    return made


def _within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _has_rank(part: nn.Module) -> bool:
    return type(part) is nn.Linear or (type(part) is nn.Conv2d and part.groups == 1)


@torch.no_grad()
def _product(part: nn.Module) -> nn.Sequential:
    weight = part.weight.detach().double()  # type: ignore[operator]
    if isinstance(part, nn.Linear):
        inner, outer = _singular(weight)
        return nn.Sequential(_linear(inner, None, part), _linear(outer, part.bias, part)).train(part.training)
    assert isinstance(part, nn.Conv2d)
    if part.kernel_size == (1, 1):
        inner, outer = _singular(weight[:, :, 0, 0])
        kernel = inner[:, :, None, None]
        factors = [_conv(kernel, None, part, whole=True), _conv(outer[:, :, None, None], part.bias, part, whole=False)]
    else:
        first, core, last = _tucker(weight)
        factors = [
            _conv(first[:, :, None, None], None, part, whole=False),
            _conv(core, None, part, whole=True),
            _conv(last[:, :, None, None], part.bias, part, whole=False),
        ]
    return nn.Sequential(*factors).train(part.training)


def _singular(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rank, in) and (out, rank) whose product is the (out, in) weight; a row of the first is as large as its value."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return values[:, None] * right, left


def _tucker(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(in rank, in), (out rank, in rank, height, width), (out, out rank) whose product is the weight.

    Rows of the first and of the second are as large as the singular values of the weight, unfolded along its inputs
    and its outputs: channel scores then put ranks in order.
    """
    u_out, s_out, _ = torch.linalg.svd(weight.flatten(1), full_matrices=False)  # (out, out rank)
    u_in, s_in, _ = torch.linalg.svd(weight.transpose(0, 1).flatten(1), full_matrices=False)
    core = torch.einsum("oihw,oa,ib->abhw", weight, u_out, u_in)
    core = core * _inverse(s_in)[None, :, None, None]
    sizes = core.flatten(1).norm(dim=1)  # (out rank,)
    core = core * (s_out * _inverse(sizes))[:, None, None, None]
    return s_in[:, None] * u_in.T, core, u_out * (sizes * _inverse(s_out))[None]


def _inverse(values: Tensor) -> Tensor:
    """1 / value, and 0 of what is nothing."""
    there = values > NOTHING * values.max()
    return torch.where(there, 1 / values.clamp(min=torch.finfo(values.dtype).tiny), 0.0)


def _linear(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, like.weight.device, like.weight.dtype)
    return _filled(made, weight, bias)


def _conv(weight: Tensor, bias: Tensor | None, like: nn.Conv2d, whole: bool) -> nn.Conv2d:
    """A convolution with the weight; the `whole` one takes over stride and padding, the others touch single pixels."""
    way: dict[str, Any] = (
        {"stride": like.stride, "padding": like.padding, "dilation": like.dilation, "padding_mode": like.padding_mode}
        if whole
        else {}
    )
    size = (weight.shape[2], weight.shape[3])
    made = nn.Conv2d(
        weight.shape[1], weight.shape[0], size, bias=bias is not None,
        device=like.weight.device, dtype=like.weight.dtype, **way,
    )  # fmt: skip
    return _filled(made, weight, bias)


def _filled(part: P, weight: Tensor, bias: Tensor | None) -> P:
    part.weight.copy_(weight)
    if bias is not None and part.bias is not None:
        part.bias.copy_(bias)
    return part
