"""Random networks: a recipe of steps, each a small module that keeps the image size and may change the channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 6
WIDTHS = (4, 6, 8, 12)


@dataclass(frozen=True)
class Step:
    """One part of a network: what it does, with how many channels, and the steps inside it."""

    kind: str
    width: int
    flag: bool
    inner: tuple[Step, ...] = ()


LEAVES = ("conv", "depthwise", "grouped", "halves", "shuffle", "excite", "twice", "attend", "norm", "gate", "slice")


def steps() -> st.SearchStrategy[tuple[Step, ...]]:
    """Chains of up to five steps, with residuals and concats of chains inside."""
    leaf = st.builds(Step, st.sampled_from(LEAVES), st.sampled_from(WIDTHS), st.booleans())

    def nest(inner: st.SearchStrategy[Step]) -> st.SearchStrategy[Step]:
        chain = st.lists(inner, min_size=1, max_size=2).map(tuple)
        return st.builds(Step, st.sampled_from(("residual", "concat")), st.sampled_from(WIDTHS), st.booleans(), chain)

    return st.lists(st.recursive(leaf, nest, max_leaves=4), min_size=1, max_size=5).map(tuple)


class RandomNet(nn.Module):
    """A stem, the steps, and a head over pooled or flattened features."""

    def __init__(self, recipe: tuple[Step, ...], flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body, width = chain(recipe, 8)
        self.head = nn.Linear(width * (SIDE * SIDE if flat else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.stem(x)))
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


def chain(recipe: tuple[Step, ...], width: int) -> tuple[nn.Sequential, int]:
    parts = []
    for step in recipe:
        part, width = PARTS[step.kind](step, width)
        parts.append(part)
    return nn.Sequential(*parts), width


def _conv(step: Step, width: int) -> tuple[nn.Module, int]:
    kernel = 3 if step.flag else 1
    made = nn.Conv2d(width, step.width, kernel, padding=kernel // 2, bias=step.flag)
    return nn.Sequential(made, nn.BatchNorm2d(step.width), nn.SiLU()), step.width


def _depthwise(step: Step, width: int) -> tuple[nn.Module, int]:
    times = 2 if step.flag and width <= 8 else 1
    return nn.Conv2d(width, width * times, 3, padding=1, groups=width), width * times


def _grouped(step: Step, width: int) -> tuple[nn.Module, int]:
    return nn.Sequential(nn.Conv2d(width, step.width, 3, padding=1, groups=2), nn.PReLU(step.width)), step.width


def _norm(step: Step, width: int) -> tuple[nn.Module, int]:
    return (nn.GroupNorm(2, width) if step.flag else nn.InstanceNorm2d(width, affine=True)), width


class Twice(nn.Module):
    """One layer used two times."""

    def __init__(self, step: Step, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.gelu(self.conv(x)))


class Halves(nn.Module):
    """Convolve one half of the channels, or swap the halves."""

    def __init__(self, step: Step, width: int) -> None:
        super().__init__()
        self.half = width // 2
        self.conv = nn.Conv2d(self.half, self.half, 1) if step.flag else None

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return torch.cat([right, left if self.conv is None else self.conv(left)], 1)


class Sliced(nn.Module):
    """Split at a size written into the module."""

    def __init__(self, step: Step, width: int) -> None:
        super().__init__()
        self.first = width // 2 - 1 if step.flag else width // 2
        self.conv = nn.Conv2d(self.first, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x[:, : self.first])) + x


class Shuffle(nn.Module):
    def __init__(self, step: Step, width: int) -> None:
        super().__init__()
        self.groups = 2

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Excite(nn.Module):
    def __init__(self, step: Step, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()[:, :, None, None]


class Gate(nn.Module):
    """A gated linear unit over channels, back to the old width."""

    def __init__(self, step: Step, width: int) -> None:
        super().__init__()
        self.wide, self.back = nn.Conv2d(width, 2 * step.width, 1), nn.Conv2d(step.width, width, 1, bias=step.flag)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(F.glu(self.wide(x), 1))


class Attend(nn.Module):
    """Self-attention over positions, by a fused or by separate layers, on the residual stream."""

    def __init__(self, step: Step, width: int) -> None:
        super().__init__()
        self.heads, self.fused = 2, step.flag
        self.qkv = nn.Linear(width, 3 * step.width)
        self.out = nn.Linear(step.width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        if self.fused:
            q, k, v = self.qkv(tokens).reshape(n, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(tokens).chunk(3, -1))
            mixed = (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(n, -1, h, w)


class Residual(nn.Module):
    def __init__(self, step: Step, width: int) -> None:
        super().__init__()
        self.branch, out = chain(step.inner, width)
        self.last = nn.Conv2d(out, width if step.flag else step.width, 1)
        self.shortcut = nn.Identity() if step.flag else nn.Conv2d(width, step.width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.last(self.branch(x)))


class Concat(nn.Module):
    def __init__(self, step: Step, width: int) -> None:
        super().__init__()
        self.branch, self.out = chain(step.inner, width)
        self.other = nn.Identity() if step.flag and width + self.out <= 16 else nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.other(x), self.branch(x)], 1)


def _residual(step: Step, width: int) -> tuple[nn.Module, int]:
    return Residual(step, width), width if step.flag else step.width


def _concat(step: Step, width: int) -> tuple[nn.Module, int]:
    made = Concat(step, width)
    kept = width if isinstance(made.other, nn.Identity) else 4
    return made, kept + made.out


def _same(kind: type[nn.Module]):
    return lambda step, width: (kind(step, width), width)


PARTS = {
    "conv": _conv, "depthwise": _depthwise, "grouped": _grouped, "norm": _norm, "residual": _residual,
    "concat": _concat, "halves": _same(Halves), "slice": _same(Sliced), "shuffle": _same(Shuffle),
    "excite": _same(Excite), "twice": _same(Twice), "attend": _same(Attend), "gate": _same(Gate),
}  # fmt: skip
