"""Small networks with an operator or a habit that no other test has: what cannot be cut has to be frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ODD: dict[str, tuple[Callable[[], nn.Module], Any]] = {}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def odd(example: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Put a network with its example into ODD."""

    def keep(kind: type[nn.Module]) -> type[nn.Module]:
        ODD[kind.__name__] = (kind, example)
        return kind

    return keep


@odd(randn(2, 7, 12))
class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(12, 6)
        self.bi = nn.Bilinear(8, 6, 10)
        self.fc = nn.Linear(10, 5)

    def forward(self, x):
        return self.fc(F.relu(self.bi(F.relu(self.a(x)), F.relu(self.b(x)))))


@odd(randn(2, 7, 12))
class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(12, 24)
        self.k = nn.Linear(12, 24)
        self.v = nn.Linear(12, 24)
        self.o = nn.Linear(24, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        q, k, v = (layer(x).view(2, 7, 4, 6) for layer in (self.q, self.k, self.v))
        a = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.fc(x + self.o(torch.einsum("bhqk,bkhd->bqhd", a, v).reshape(2, 7, 24)))


@odd((randn(2, 7, 16), randn(2, 5, 16)))
class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.i = nn.Linear(16, 16)
        self.d = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x, m):
        return self.fc(self.d(self.i(x), m))


@odd(randn(7, 2, 16))
class Mha(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Linear(16, 16)
        self.m = nn.MultiheadAttention(16, 4, kdim=12, vdim=10)
        self.k = nn.Linear(16, 12)
        self.v = nn.Linear(16, 10)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        o, w = self.m(self.p(x), self.k(x), self.v(x))
        return self.fc(o), w


@odd(randn(2, 3, 8, 8))
class Fold(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.l = nn.Linear(54, 18)
        self.c = nn.Conv2d(2, 5, 1)

    def forward(self, x):
        u = F.unfold(self.a(x), 3, padding=1).transpose(1, 2)
        y = self.l(u).transpose(1, 2)
        return self.c(F.fold(y, (8, 8), 3, padding=1))


@odd(torch.randint(0, 10, (2, 6)))
class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.EmbeddingBag(10, 8)
        self.a = nn.Linear(8, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(F.relu(self.a(self.e(x))))


@odd(randn(2, 7, 12))
class Gather(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.b = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        y = self.b(F.relu(self.a(x)))
        i = y.argsort(1)[:, :3]
        return self.fc(torch.gather(y, 1, i).mean(1))


@odd(randn(2, 7, 12))
class Topk(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(12, 8)
        self.g = nn.Linear(8, 4)
        self.ex = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        y = F.relu(self.a(x))
        w, i = self.g(y).softmax(-1).topk(2, -1)
        out = torch.zeros_like(y)
        for e in range(4):
            m = (i == e).any(-1, keepdim=True).to(y.dtype)
            out = out + m * self.ex[e](y)
        return self.fc(out * w.sum(-1, keepdim=True))


@odd(randn(2, 3, 8, 8))
class Checkpoint(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(checkpoint(self.b, F.relu(self.a(x)), use_reentrant=False).mean((2, 3)))


@odd(randn(2, 3, 8, 8))
class Grid(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.off = nn.Conv2d(8, 2, 1)
        self.c = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        y = self.a(x)
        g = self.off(F.relu(y)).permute(0, 2, 3, 1).tanh()
        return self.fc(F.relu(self.c(F.grid_sample(y, g, align_corners=False))).mean((2, 3)))


@odd(randn(2, 3, 8, 8))
class Gram(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(36, 5)

    def forward(self, x):
        y = self.a(x).flatten(2)
        return self.fc((y @ y.transpose(1, 2)).flatten(1))


@odd(randn(2, 3, 8, 8))
class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3)
        self.p = nn.Linear(6, 8, bias=False)
        self.protos = nn.Parameter(randn(5, 8))

    def forward(self, x):
        y = self.p(F.relu(self.a(x)).mean((2, 3)))
        return torch.cdist(y, self.protos), F.cosine_similarity(y[:, None], self.protos[None], -1)


@odd(randn(2, 3, 8, 8))
class Stn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.t = nn.Linear(4 * 36, 6)
        self.b = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        th = self.t(F.relu(self.a(x)).flatten(1)).view(-1, 2, 3)
        g = F.affine_grid(th, list(x.shape), align_corners=False)
        return self.fc(F.relu(self.b(F.grid_sample(x, g, align_corners=False))).mean((2, 3)))


@odd(randn(2, 9, 6))
class Gru(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.g = nn.GRU(8, 8, 2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.g(F.relu(self.a(x)))[0].amax(1))


@odd(randn(2, 9, 6))
class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.c = nn.LSTMCell(8, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        h = c = torch.zeros(x.shape[0], 8, dtype=x.dtype)
        for t in range(x.shape[1]):
            h, c = self.c(F.relu(self.a(x[:, t])), (h, c))
        return self.fc(h)


@odd(randn(2, 3, 16, 16))
class Wavelet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        y = self.a(x)
        y = torch.cat([y[..., ::2, ::2], y[..., 1::2, ::2], y[..., ::2, 1::2], y[..., 1::2, 1::2]], 1)
        return self.fc(F.relu(self.b(y)).mean((2, 3)))


@odd(randn(2, 3, 16, 16))
class Involution(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.k = nn.Conv2d(8, 9 * 2, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        y = self.a(x)
        n, c, h, w = y.shape
        k = self.k(y).view(n, 2, 1, 9, h, w)
        u = F.unfold(y, 3, padding=1).view(n, 2, c // 2, 9, h, w)
        return self.fc((k * u).sum(3).view(n, c, h, w).mean((2, 3)))


@odd(randn(2, 3, 8, 8))
class Dyn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3)
        self.w = nn.Parameter(randn(4, 8, 6, 3, 3))
        self.r = nn.Linear(6, 4)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        y = self.a(x)
        r = self.r(y.mean((2, 3))).softmax(-1)
        w = (r @ self.w.flatten(1)).view(-1, 6, 3, 3)
        n = y.shape[0]
        o = F.conv2d(y.reshape(1, -1, 6, 6), w, groups=n).view(n, 8, 4, 4)
        return self.fc(F.relu(o).mean((2, 3)))


@odd(randn(2, 8, 6))
class Scan(nn.Module):
    def __init__(self):
        super().__init__()
        self.i = nn.Linear(6, 16)
        self.c = nn.Conv1d(8, 8, 3, padding=2, groups=8)
        self.A = nn.Parameter(randn(8).abs())
        self.o = nn.Linear(8, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        a, z = self.i(x).chunk(2, -1)
        a = self.c(a.transpose(1, 2))[..., :8].transpose(1, 2)
        h = torch.zeros_like(a[:, 0])
        ys = []
        for t in range(8):
            h = h * torch.exp(-self.A) + F.silu(a[:, t])
            ys.append(h)
        return self.fc(self.o(torch.stack(ys, 1) * F.silu(z)) + x)


@odd(randn(2, 3, 8, 8))
class Vq(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Conv2d(3, 6, 3)
        self.book = nn.Embedding(10, 6)
        self.d = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        z = self.e(x).permute(0, 2, 3, 1)
        d = (z.unsqueeze(-2) - self.book.weight).pow(2).sum(-1)
        i = d.argmin(-1)
        return self.d(self.book(i).permute(0, 3, 1, 2))


@odd(randn(2, 3, 8, 8))
class Lrn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.n = nn.LocalResponseNorm(3)
        self.b = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(F.relu(self.b(self.n(self.a(x)))).mean((2, 3)))


@odd(randn(2, 3, 8, 8))
class Ln3(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.n = nn.LayerNorm([8, 6, 6])
        self.b = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(F.relu(self.b(F.layer_norm(self.n(self.a(x)), [8, 6, 6]))).mean((2, 3)))


@odd(randn(2, 3, 8, 8))
class Normalize(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        y = F.normalize(self.a(x), dim=1)
        return self.fc(F.normalize(self.b(y).mean((2, 3)), dim=-1) * y.shape[1] ** 0.5)


@odd(randn(2, 3, 8, 8))
class Perm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 6, 1)
        self.c = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        y = self.a(x)[:, [3, 1, 2, 0, 7, 6, 5, 4]]
        y = self.b(y).flip(1)
        p, q, r = torch.tensor_split(self.c(F.relu(y)), 3, 1)
        return self.fc(torch.cat([r, p, q], 1).mean((2, 3)))


@odd(randn(2, 3, 8, 8))
class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))
        self.b = nn.Conv2d(8, 6, 1)
        self.fc = nn.utils.parametrizations.orthogonal(nn.Linear(6, 5))

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


@odd(randn(2, 3, 8, 8))
class Pools(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv1d(8, 12, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        y = self.b(F.relu(self.a(x)).flatten(2)).transpose(1, 2)
        y = F.avg_pool1d(y, 2)
        return self.fc(y.mean(1))


@odd(randn(2, 4, 10))
class Upsampled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(4, 12, 3, padding=1)
        self.up = nn.ConvTranspose1d(12, 8, 4, 2, padding=1, output_padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.each = nn.ConvTranspose1d(8, 8, 2, 2, groups=8)
        self.some = nn.ConvTranspose1d(8, 12, 3, groups=4)
        self.fc = nn.Conv1d(12, 5, 1)

    def forward(self, x):
        x = self.each(F.relu(self.norm(self.up(F.relu(self.a(x))))))
        return self.fc(F.relu(self.some(x)))


@odd(randn(2, 3, 8, 8))
class Unpool(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 1)
        self.fc = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        y, i = F.max_pool2d(self.a(x), 2, return_indices=True)
        return self.fc(F.max_unpool2d(self.b(y), i, 2))


@odd(randn(2, 3, 8, 8))
class Inplace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        y = self.a(x)
        z = y.clone()
        z[:, ::2] *= 2
        z[:, 3:].add_(1.0)
        y.relu_().mul_(self.b(z)).clamp_(min=-1)
        return self.fc(y.mean((2, 3)))


@odd(randn(2, 3, 8, 8))
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Conv2d(3, 8, 1)
        self.m = nn.Linear(8, 12)
        self.h = nn.Linear(12, 5)

    def forward(self, x):
        y = F.relu(self.m(F.relu(self.e(x)).mean((2, 3))))
        r = F.linear(y, self.m.weight.t())
        return self.h(y), F.conv_transpose2d(r[:, :, None, None], self.e.weight)


@odd({"x": randn(2, 3, 8, 8), "scale": randn(2, 1)})
class Kw(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Linear(1, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x, scale, flag=True):
        return {"y": self.fc((F.relu(self.a(x)) * self.b(scale)[:, :, None, None]).mean((2, 3))), "aux": [scale]}


@odd(randn(2, 3, 8, 8))
class Repeat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.b = nn.Conv2d(12, 6, 1)
        self.c = nn.Conv2d(12, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        y = self.a(x)
        return self.fc(
            (self.b(y.repeat(1, 3, 1, 1)) + self.c(y.repeat_interleave(3, 1)) + self.b(torch.cat([y] * 3, 1))).mean(
                (2, 3)
            )
        )


@odd(randn(2, 3, 8, 8))
class Split4(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 1)
        self.b = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        xs = self.a(x).split(4, 1)
        ys = [xs[0]]
        for c, z in zip(self.b, xs[1:], strict=True):
            ys.append(F.relu(c(z + ys[-1])))
        return self.fc(torch.cat(ys, 1).mean((2, 3)))


@odd(randn(2, 16, 12))
class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.i = nn.Linear(12, 10)
        self.t1 = nn.Linear(16, 20)
        self.t2 = nn.Linear(20, 16)
        self.c1 = nn.Linear(10, 14)
        self.c2 = nn.Linear(14, 10)
        self.fc = nn.Linear(10, 5)

    def forward(self, x):
        x = self.i(x)
        x = x + self.t2(F.gelu(self.t1(x.transpose(1, 2)))).transpose(1, 2)
        x = x + self.c2(F.gelu(self.c1(x)))
        return self.fc(x.mean(1))


@odd(randn(2, 3, 8, 8))
class Choice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 8, 3)
        self.g = nn.Parameter(randn(2))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        y = F.relu(self.a(x))
        if self.g[0].item() > self.g[1].item():
            y = F.relu(self.b(y))
        else:
            y = y[:, :, 1:-1, 1:-1] + self.b(y)
        return self.fc(y.mean((2, 3)))


@odd(randn(2, 3, 8, 8))
class Drop(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.d = nn.Dropout2d(0.2)
        self.b = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(
            F.dropout(F.alpha_dropout(self.b(self.d(self.a(x))), 0.1, self.training), 0.3, self.training)
            .view(-1, 6, 36)
            .mean(-1)
        )


@odd(randn(1, 3, 8, 8))
class Kron(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(3, 5)
        self.fc = nn.Linear(20, 5)

    def forward(self, x):
        v = x.mean((2, 3))
        o = self.a(v)[:, :, None] * self.b(v)[:, None, :]
        return self.fc(o.flatten(1))
