"""Small networks, each written in a style that channel grouping has to survive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))


class PadChannels(nn.Module):
    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))


class BasicBlock(nn.Module):
    def __init__(self, in_ch: int, out_ch: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_ch)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_ch)
        self.shortcut = PadChannels((out_ch - in_ch) // 2) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return F.relu(out)


class OptionA(nn.Module):
    """A CIFAR ResNet: shortcuts subsample and pad channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 16, 2), BasicBlock(16, 32, 2))
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = F.avg_pool2d(x, x.size(3))
        return self.fc(x.view(x.size(0), -1))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.squeeze = nn.Conv2d(12, 4, 1)
        self.excite = nn.Conv2d(4, 12, 1)
        self.conv2 = nn.Conv2d(12, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv1(x))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return self.conv2(x * gate.expand_as(x)).mean((2, 3))


class Dense(nn.Module):
    """Concats of everything before, batch norm first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.fc(F.relu(self.norms[3](torch.cat(features, 1))).mean((2, 3)))


class Shuffle(nn.Module):
    """Split, convolve one half, concat, shuffle channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()) for _ in range(2)
        )
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            left, right = x.chunk(2, dim=1)
            x = torch.cat((left, branch(right)), 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(x.mean((2, 3)))


class Groups(nn.Module):
    """Grouped, depthwise, depthwise with a multiplier, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 24, 3, padding=1, groups=2)
        self.c = nn.Conv2d(24, 48, 3, padding=1, groups=24)
        self.d = nn.ConvTranspose2d(48, 12, 2, 2)
        self.e = nn.ConvTranspose2d(12, 12, 2, 2, groups=12)
        self.f = nn.Conv2d(12, 32, 3, groups=4)
        self.norm = nn.GroupNorm(8, 32)
        self.g = nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        x = self.f(self.e(F.relu(self.d(self.c(x)))))
        return self.g(F.relu(self.norm(x))).flatten(2).sum(-1)


class Pixels(nn.Module):
    """Pixel shuffle, as a module and by hand, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1)
        self.b = nn.Conv2d(8, 16, 3, padding=1)
        self.c = nn.Conv2d(4, 6, 3, padding=1)
        self.d = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(F.pixel_shuffle(self.a(x), 2)))
        n, c, h, w = x.shape
        x = x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)
        return self.d(F.pixel_unshuffle(F.relu(self.c(x)), 2)).amax((2, 3))


class UNet(nn.Module):
    """Skip connections, interpolation, a segmentation head; output is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True), nn.PReLU(8))
        self.down2 = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(16), nn.ELU())
        self.up = nn.Conv2d(24, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        wide = F.interpolate(second, scale_factor=2, mode="bilinear", align_corners=False)
        return {"out": self.head(F.relu(self.up(torch.cat([wide, first], 1)))), "features": second.mean()}


class FusedAttention(nn.Module):
    """One qkv layer, heads by reshape, scores by hand, pre-norm, positions, a class token."""

    def __init__(self, dim: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 17, dim))
        self.norm = nn.LayerNorm(dim)
        self.num_heads, self.head_dim, self.scale = heads, dim // heads, (dim // heads) ** -0.5
        self.attn_dim = dim
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 40), nn.GELU(), nn.Linear(40, dim))
        self.fc = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        n, t, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(n, t, self.attn_dim))
        x = x + self.mlp(x)
        return self.fc(x[:, 0])


class TorchAttention(nn.Module):
    """nn.MultiheadAttention and nn.TransformerEncoderLayer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc(self.encoder(x).mean(1))


class GroupedQuery(nn.Module):
    """Fewer key and value heads than query heads, rotary positions, SwiGLU; RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.norm = nn.RMSNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out = nn.Linear(32, 16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.fc = nn.Linear(16, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        n, t, _ = x.shape
        y = self.norm(x)
        q = self.q(y).view(n, t, 4, 8).transpose(1, 2)
        k, v = (f(y).view(n, t, 2, 8).transpose(1, 2) for f in (self.k, self.v))
        angle = torch.arange(t, dtype=x.dtype)[:, None] * torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=x.dtype)
        q, k = (_rotate(z, angle) for z in (q, k))
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, 32))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.fc(x)


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class WindowAttention(nn.Module):
    """Windows by view and permute, a shift by roll, a bias looked up by index."""

    bias_index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, 2)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(49, 4))
        self.register_buffer("bias_index", torch.randint(0, 49, (256,), generator=torch.Generator().manual_seed(0)))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        y = torch.roll(x, (-2, -2), (1, 2)).view(n, h // 4, 4, w // 4, 4, c)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        qkv = self.qkv(y).reshape(y.shape[0], 16, 3, 4, -1).permute(2, 0, 3, 1, 4)
        scores = qkv[0] @ qkv[1].transpose(-2, -1) * 0.5
        scores = scores + self.table[self.bias_index].view(16, 16, -1).permute(2, 0, 1).unsqueeze(0)
        y = (scores.softmax(-1) @ qkv[2]).transpose(1, 2).flatten(2)
        y = self.proj(y).view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return self.fc((x + torch.roll(y, (2, 2), (1, 2))).mean((1, 2)))


class GatedConv(nn.Module):
    """GLU over channels, a learned scale, a broadcast gate of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 24, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(12, 1, 1) + 0.5)
        self.gate = nn.Conv2d(12, 1, 1)
        self.b = nn.Conv2d(12, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.a(x), dim=1) * self.scale
        return self.b(x * torch.sigmoid(self.gate(x))).mean((2, 3))


class Shared(nn.Module):
    """One layer used twice, one weight in two places, two inputs, a tuple out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.left, self.right = nn.Linear(8, 12), nn.Linear(8, 12)
        self.right.weight = self.left.weight
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = (self.twice(F.relu(self.twice(F.relu(self.stem(z))))).mean((2, 3)) for z in (x, y))
        return self.fc(F.relu(self.left(x) - self.right(y))), self.fc(torch.maximum(self.left(x), self.right(y)))


class Computed(nn.Module):
    """Weights that are computed: weight norm, weight standardisation."""

    def __init__(self) -> None:
        super().__init__()
        self.a = weight_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.b = nn.Conv2d(8, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        w = self.b.weight
        w = w - w.mean((2, 3), keepdim=True)
        w = w / (w.pow(2).sum((2, 3), keepdim=True) + 1e-3).sqrt()
        return self.fc(F.relu(F.conv2d(F.relu(self.a(x)), w, self.b.bias, padding=1)).mean((2, 3)))


class Fixed(nn.Module):
    """Sizes written into the forward: views, slices, splits."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 20, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(12, 8, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        left, right = x[:, :8], torch.split(x, [8, 12], 1)[1]
        x = self.drop(F.max_pool2d(self.b(left) + self.c(right), 4))
        return self.fc(x.view(-1, 8 * 4 * 4))


class Stacked(nn.Module):
    """Branches stacked along a new axis and weighed (selective kernels)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.b = nn.Conv2d(3, 12, 5, padding=2)
        self.squeeze, self.choose = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 24, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        weights = self.choose(F.relu(self.squeeze(both.sum(1).mean((2, 3), keepdim=True))))
        weights = weights.view(x.shape[0], 2, 12, 1, 1).softmax(1)
        return self.fc((both * weights).sum(1).mean((2, 3)))


class Signals(nn.Module):
    """1d convolutions over time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(4, 16, 5, padding="same"), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(16, 16, 3, groups=16), nn.Conv1d(16, 8, 1), nn.Hardswish(), nn.AdaptiveAvgPool1d(2), nn.Flatten(),
            nn.Linear(16, 12), nn.BatchNorm1d(12), nn.LeakyReLU(), nn.Linear(12, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Volume(nn.Module):
    """3d convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(6, 8, 3), nn.ReLU(),
            nn.ConvTranspose3d(8, 4, 2, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Statistics(nn.Module):
    """Attention maps from means and maxima over channels: those channels are inexact, never wrong in shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.map = nn.Conv2d(2, 1, 7, padding=3)
        self.b = nn.Conv2d(12, 10, 3)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.fc(F.relu(self.b(x * torch.sigmoid(self.map(pooled)))).mean((2, 3)))


class WrittenInPlace(nn.Module):
    """Channels written into a tensor made beforehand: nothing can be said, so they stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.c = nn.Conv2d(10, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.zeros(x.shape[0], 10, x.shape[2], x.shape[3], dtype=x.dtype)
        both[:, :4] = self.a(x)
        both[:, 4:] = self.b(x)
        return self.fc(F.relu(self.c(both)).mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM keeps its states."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.rnn = nn.LSTM(8, 10, batch_first=True)
        self.b, self.fc = nn.Linear(10, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.rnn(F.relu(self.a(x)))
        return self.fc(F.relu(self.b(x[:, -1])))


class Decides(nn.Module):
    """Chooses by the data: what comes after stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.c, self.d = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        x = self.c(x) if x.sum() > 0 else self.d(x)
        return self.fc(x.mean((2, 3)))


class Auxiliary(nn.Module):
    """A head that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
        self.aux = nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.aux_fc, self.fc = nn.Linear(6, 5), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        out = self.fc(F.relu(self.b(x)).mean((2, 3)))
        return (out, self.aux_fc(self.aux(x))) if self.training else out


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[0], 1, 1, 1) > 0.5) if self.training else x


class Stochastic(nn.Module):
    """Drop path in a network with a size written into its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.path = DropPath()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.path(self.c(F.relu(self.b(x))))
        return self.fc(x.mean((2, 3)).view(-1, 8))


NETS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "option-a": (OptionA, image()),
    "squeeze-excite": (SqueezeExcite, image()),
    "dense": (Dense, image()),
    "shuffle": (Shuffle, image()),
    "groups": (Groups, image(2, 3, 8, 8)),
    "pixels": (Pixels, image(2, 3, 8, 8)),
    "unet": (UNet, image()),
    "fused attention": (FusedAttention, image()),
    "torch attention": (TorchAttention, image(2, 7, 6)),
    "grouped query": (GroupedQuery, torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(0))),
    "window attention": (WindowAttention, image()),
    "gated": (GatedConv, image()),
    "shared": (Shared, (image(), image() * 0.5)),
    "computed": (Computed, image()),
    "fixed sizes": (Fixed, image()),
    "stacked": (Stacked, image()),
    "signals": (Signals, image(2, 4, 20)),
    "volume": (Volume, image(2, 1, 8, 8, 8)),
    "statistics": (Statistics, image()),
    "written in place": (WrittenInPlace, image()),
    "recurrent": (Recurrent, image(2, 7, 6)),
    "decides": (Decides, image()),
    "auxiliary": (Auxiliary, image()),
    "stochastic": (Stochastic, image()),
}
