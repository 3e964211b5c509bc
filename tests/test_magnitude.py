"""Magnitude pruning against its definitions, torch's own arithmetic, and the network with zeros in it."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from edgeprune import magnitude, proof
from edgeprune.errors import RunError, UsageError
from edgeprune.graph import trace
from edgeprune.magnitude import dead, masks, sparse

# ---- masks ---------------------------------------------------------------------------------------------------


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        parts += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def half(model: nn.Module) -> dict[str, Tensor]:
    return masks.tighten(model, masks.full(model), dict.fromkeys(masks.full(model), 0.7))


@pytest.mark.parametrize("kind", ["sgd with momentum from before", "adamw"])
def test_masked_weights_are_exactly_zero_after_every_step(kind: str) -> None:
    model = mlp(8, 16, 4)
    optimiser: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    if kind.startswith("sgd"):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)

    def step() -> None:
        optimiser.zero_grad()
        functional.cross_entropy(model(torch.randn(32, 8)), torch.arange(32) % 4).backward()
        optimiser.step()

    step()  # there is momentum for weights that will be masked
    found = half(model)
    free = {n: model.get_parameter(n).detach().clone() for n in found}
    with masks.held(model, found):
        for _ in range(3):
            step()
            for name, mask in found.items():
                assert bool((model.get_parameter(name)[~mask] == 0).all())
    for name, mask in found.items():
        weight = model.get_parameter(name).detach()
        assert 0.2 < float((~mask).float().mean()) < 0.8
        assert not torch.equal(weight[mask], free[name][mask]), "what is left should learn"
    step()
    assert any(bool((model.get_parameter(n)[~m] != 0).any()) for n, m in found.items()), "the masks hold only inside"


def test_l1_adds_the_absolute_weights_to_the_loss() -> None:
    model = mlp(8, 16, 4)
    found = half(model)
    masks.apply(model, found)
    other, x, y = copy.deepcopy(model), torch.randn(32, 8), torch.arange(32) % 4
    with masks.held(model, found, l1=0.01):
        functional.cross_entropy(model(x), y).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    absolute = sum(other.get_parameter(n).abs().sum() for n in found)
    (functional.cross_entropy(other(x), y) + 0.01 * absolute).backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    for name, mask in found.items():
        expected = other.get_parameter(name).detach() * mask
        assert torch.allclose(model.get_parameter(name).detach(), expected, atol=1e-7)


@pytest.mark.parametrize("quality", [0.25, 0.5, 1.0, 1.73, 2.0])
def test_of_normal_weights_the_share_left_is_the_tail_of_the_normal(quality: float) -> None:
    model = nn.Linear(1000, 1000)
    nn.init.normal_(model.weight, std=0.03)
    left = masks.tighten(model, masks.full(model), {"weight": quality})["weight"]
    assert float(left.float().mean()) == pytest.approx(math.erfc(quality / math.sqrt(2)), abs=2e-3)


def test_a_threshold_is_in_deviations_of_what_is_left_for_with_the_zeros_a_second_round_would_take_nothing() -> None:
    """The paper leaves open whether zeros count. Of a normal with its middle gone both are known in closed form."""
    torch.manual_seed(0)
    model = nn.Linear(1000, 1000)
    nn.init.normal_(model.weight, std=0.03)
    first = masks.tighten(model, masks.full(model), {"weight": 1.0})
    masks.apply(model, first)
    weight = model.weight.detach().double().numpy() / 0.03
    tail = math.erfc(1 / math.sqrt(2))  # the share that the first round leaves
    square = 1 + 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / tail  # the mean square of what is left
    assert weight[weight != 0].std() == pytest.approx(math.sqrt(square), rel=5e-3)
    assert weight.std() == pytest.approx(math.sqrt(tail * square), rel=5e-3)
    second = masks.tighten(model, first, {"weight": 1.0})["weight"]
    assert float(second.float().mean()) == pytest.approx(math.erfc(math.sqrt(square / 2)), abs=2e-3)
    assert weight.std() < 1  # with the zeros: all that is left is above that


@given(st.floats(0, 3), st.floats(0, 3), st.integers(0, 5))
def test_a_larger_quality_never_keeps_more_and_nothing_comes_back(a: float, b: float, seed: int) -> None:
    model = mlp(7, 9, 3, seed=seed)
    low, high = sorted((a, b))
    names = masks.full(model)
    loose = masks.tighten(model, names, dict.fromkeys(names, low))
    tight = masks.tighten(model, names, dict.fromkeys(names, high))
    again = masks.tighten(model, tight, dict.fromkeys(names, low))
    for name in names:
        assert bool((tight[name] <= loose[name]).all())
        assert bool((again[name] <= tight[name]).all())
        assert bool(again[name].any()), "a layer keeps a weight"


def test_dropout_follows_the_root_of_the_connections_left() -> None:
    assert masks.dropout_rate(0.5, 9, 100) == pytest.approx(0.5 * 0.3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    readers = masks.dropouts(model, torch.randn(1, 8))
    assert readers == {"3": "4.weight"}
    left = masks.full(model)
    left["4.weight"][:, 4:] = False
    masks.rescale_dropout(model, {"3": 0.5}, readers, left)
    assert model[3].p == pytest.approx(0.25)  # a quarter of the connections of the layer that reads it


# ---- how hard each layer is pruned ---------------------------------------------------------------------------


def distance(model: nn.Module, x: Tensor, wanted: Tensor) -> float:
    with torch.no_grad():
        return -float((model(x) - wanted).square().mean())


def test_the_scan_prunes_one_layer_at_a_time_and_leaves_the_network_as_it_was() -> None:
    model, x = mlp(8, 16, 4), torch.randn(64, 8)
    judge = functools.partial(distance, x=x, wanted=model(x).detach())
    before = copy.deepcopy(model.state_dict())
    found = magnitude.scan(model, masks.full(model), judge, (0.0, 1.0))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    alone = copy.deepcopy(model)
    masks.apply(alone, {"2.weight": masks.tighten(model, masks.full(model), {"2.weight": 1.0})["2.weight"]})
    assert found["2.weight"].scores == (0.0, pytest.approx(judge(alone)))
    assert found["2.weight"].kept[0] == 1.0
    assert found["2.weight"].kept[1] < 0.5


def test_the_most_sensitive_layer_gets_the_smallest_threshold_and_the_total_is_met() -> None:
    torch.manual_seed(0)
    model = mlp(64, 64, 64, 64)
    qualities = (0.0, 1.0, 2.0)
    scores = {"0.weight": (0.9, 0.5, -0.5), "2.weight": (0.9, 0.85, 0.7), "4.weight": (0.9, 0.8, 0.4)}
    found = {n: magnitude.Sensitivity(qualities, (1.0, 0.4, 0.1), s) for n, s in scores.items()}
    full = masks.full(model)
    total = masks.kept(full)[1]
    chosen = magnitude.choose(model, full, found, total / 2)
    assert chosen["0.weight"] < chosen["4.weight"] <= chosen["2.weight"]
    for ratio in (2, 50):  # 50 is beyond what the scan tried
        left = masks.kept(masks.tighten(model, full, magnitude.choose(model, full, found, total / ratio)))[0]
        assert 0.95 * total / ratio <= left <= total / ratio


def test_a_layer_that_has_few_weights_to_give_is_left_alone() -> None:
    torch.manual_seed(0)
    model = mlp(64, 200, 4)
    scores = (0.9, 0.8, 0.5)  # of both layers
    found = {n: magnitude.Sensitivity((0.0, 1.0, 2.0), (1.0, 0.4, 0.1), scores) for n in masks.full(model)}
    chosen = magnitude.choose(model, masks.full(model), found, masks.kept(masks.full(model))[1] / 3)
    assert chosen["2.weight"] == 0.0
    assert chosen["0.weight"] > 1.0


@pytest.mark.parametrize(("ratio", "rounds"), [(1.0, 1), (4.0, 0), (1000.0, 1)])
def test_pruning_that_makes_no_sense_is_refused(ratio: float, rounds: int) -> None:
    with pytest.raises(UsageError, match=r"asks for nothing; give a ratio above 1|a layer would be empty"):
        magnitude.prune(mlp(8, 8, 4), torch.randn(1, 8), ratio, lambda m: 0.0, lambda m, r: None, rounds)


# ---- digits: the whole method --------------------------------------------------------------------------------


@functools.cache
def digits() -> tuple[Tensor, ...]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    x, y = torch.tensor(found.data / 16, dtype=torch.float32)[order], torch.tensor(found.target)[order]
    return x[:1000], y[:1000], x[1000:1400], y[1000:1400], x[1400:], y[1400:]


def fit(model: nn.Module, epochs: int, rate: float, seed: int = 0) -> None:
    x, y, *_ = digits()
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(100 * seed + epoch))
        for batch in order.split(50):
            optimiser.zero_grad()
            functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()


@torch.no_grad()
def score(model: nn.Module) -> float:
    _, _, x, y, *_ = digits()
    return -float(functional.cross_entropy(model(x), y))


@torch.no_grad()
def right(model: nn.Module) -> float:
    *_, x, y = digits()
    return float((model(x).argmax(1) == y).float().mean())


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model = mlp(64, 100, 50, 10)
    fit(model, 20, 0.1)
    return model


def test_a_tenth_of_the_weights_is_as_good_and_neither_a_cut_nor_a_draw_alone_is(trained: nn.Module) -> None:
    x = torch.randn(1, 64)
    bare = magnitude.prune(trained, x, 10, score, lambda m, r: None)
    pruned = magnitude.prune(trained, x, 10, score, lambda m, r: fit(m, 15, 0.02))
    left, total = masks.kept(pruned.masks)
    assert 9.9 <= total / left <= 10.5
    assert pruned.rounds[0].qualities == bare.rounds[0].qualities
    drawn = copy.deepcopy(trained)
    draw = torch.Generator().manual_seed(0)
    random = {n: m.flatten()[torch.randperm(m.numel(), generator=draw)].view_as(m) for n, m in pruned.masks.items()}
    with masks.held(drawn, random):
        fit(drawn, 15, 0.02)
    assert right(pruned.model) >= right(trained) - 0.02
    assert right(bare.model) <= right(pruned.model) - 0.1
    assert right(drawn) <= right(pruned.model) - 0.05


def test_whether_zeros_count_in_the_deviation_hardly_matters_where_the_scan_chooses_how_many_deviations(
    trained: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pruned() -> magnitude.Pruned:
        return magnitude.prune(trained, torch.randn(1, 64), 12, score, lambda m, r: fit(m, 8, 0.02), rounds=2)

    def with_zeros(weight: Tensor, quality: float, mask: Tensor) -> float:
        return quality * float((weight * mask).std(unbiased=False))

    ours = pruned()
    monkeypatch.setattr(masks, "threshold", with_zeros)
    other = pruned()
    most = min(ours.rounds[0].kept, key=lambda name: ours.rounds[0].kept[name])
    assert ours.rounds[0].kept[most] < 0.3
    assert other.rounds[1].qualities[most] > 1.5 * ours.rounds[1].qualities[most]  # smaller deviations, more of them
    for mine, theirs in zip(ours.rounds, other.rounds, strict=True):
        assert mine.left == pytest.approx(theirs.left, rel=0.02)
        assert list(mine.kept.values()) == pytest.approx(list(theirs.kept.values()), abs=0.05)
    print(f"accuracy without zeros {right(ours.model):.4f}, with zeros {right(other.model):.4f}")
    assert right(ours.model) == pytest.approx(right(other.model), abs=0.02)


def test_rounds_prune_by_equal_factors_and_end_at_the_same_size(trained: nn.Module) -> None:
    pruned = magnitude.prune(trained, torch.randn(1, 64), 16, score, lambda m, r: fit(m, 1, 0.02), rounds=2)
    total = masks.kept(pruned.masks)[1]
    assert [total / r.left for r in pruned.rounds] == pytest.approx([4, 16], rel=0.04)
    for name, mask in pruned.masks.items():
        assert bool((pruned.model.get_parameter(name)[~mask] == 0).all())


def test_frozen_layers_are_neither_pruned_nor_trained_and_the_others_are_afterwards(trained: nn.Module) -> None:
    """Han et al.: linear layers while convolutions are frozen, and then the other way round."""
    before = copy.deepcopy(trained.state_dict())
    first = magnitude.prune(trained, torch.randn(1, 64), 8, score, lambda m, r: fit(m, 2, 0.02), frozen=["0"])
    assert first.masks.keys() == {"2.weight", "4.weight"}
    for name in ("0.weight", "0.bias"):
        assert torch.equal(first.model.get_parameter(name), before[name])
    assert not torch.equal(first.model.get_parameter("2.bias"), before["2.bias"])
    assert first.rounds[0].left == pytest.approx((100 * 50 + 50 * 10) / 8, rel=0.04)
    assert all(p.requires_grad for p in first.model.parameters())
    second = magnitude.prune(first.model, torch.randn(1, 64), 8, score, lambda m, r: fit(m, 2, 0.02), frozen=["2", "4"])
    for name, mask in first.masks.items():
        assert torch.equal(second.model.get_parameter(name), first.model.get_parameter(name))
        assert bool((second.model.get_parameter(name)[~mask] == 0).all())
    assert not torch.equal(second.model.get_parameter("0.bias"), before["0.bias"])
    with pytest.raises(UsageError, match="nothing is left to prune beside 0, 2, 4"):
        magnitude.prune(trained, torch.randn(1, 64), 8, score, lambda m, r: None, frozen=["0", "2", "4"])


# ---- dead neurons --------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """Two convolutions and two layers behind them; `padding` of the second convolution."""

    def __init__(self, padding: int, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.n = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 5, 3, padding=padding, bias=bias)
        self.c, self.d = nn.Linear(5 * (4 + 2 * padding) ** 2, 12, bias=bias), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.n(self.a(x)))))
        return self.d(torch.relu(self.c(x.flatten(1))))


def same(model: nn.Module, smaller: nn.Module, x: Tensor) -> None:
    assert proof.difference(proof.outputs(model.eval(), x), proof.outputs(smaller.eval(), x)) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_neurons_without_inputs_leave_their_constant_in_the_next_biases(bias: bool) -> None:
    model, x = proof.randomised(Convolutions(0, bias)), torch.randn(3, 1, 6, 6)
    with torch.no_grad():
        model.n.bias.fill_(0.7)  # what a dead channel of `a` gives is not 0
        model.a.weight[[1, 4]] = 0
        model.b.weight[2] = 0
        model.c.weight[[0, 5, 7]] = 0
        if bias:
            model.c.bias.fill_(0.3)
    found = magnitude.remove_dead(model.eval(), x)
    assert found.removed == {"a": 2, "b": 1, "c": 3}
    assert not found.stuck
    same(model, found.model, x)
    assert found.params == sum(p.numel() for p in found.model.parameters()) < sum(p.numel() for p in model.parameters())


def test_neurons_without_outputs_go_and_take_with_them_what_fed_only_them() -> None:
    model, x = mlp(6, 8, 8, 3), torch.randn(5, 6)
    with torch.no_grad():
        model[4].weight[:, [0, 3]] = 0  # nobody reads units 0 and 3 of the second layer ...
        model[2].weight[[1, 2, 4, 5, 6, 7], 5] = 0  # ... the only ones that read unit 5 of the first
    found = magnitude.remove_dead(model, x)
    assert found.removed == {"2": 2, "0": 1}
    assert found.passes == 2
    same(model, found.model, x)


def test_a_constant_does_not_go_into_a_convolution_that_pads_with_zeros_unless_it_is_zero() -> None:
    model, x = Convolutions(1).eval(), torch.randn(3, 1, 6, 6)
    with torch.no_grad():
        model.a.weight[[1, 4]] = 0
        model.a.bias.zero_()
        model.n.bias[1], model.n.bias[4] = 0.7, -0.7  # after the ReLU 0.7, and 0
    found = magnitude.remove_dead(model, x)
    assert found.removed == {"a": 1}
    assert found.stuck == {"a": 1}
    same(model, found.model, x)


def test_a_channel_of_a_residual_stream_is_dead_only_when_all_its_makers_are() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c(torch.relu(x + self.b(x)))

    torch.manual_seed(0)
    model, x = Residual(), torch.randn(5, 6)
    with torch.no_grad():
        model.a.weight[[2, 3]] = 0
        model.b.weight[3] = 0
    assert [i for i, fed in enumerate(dead.dead(model, trace(model, x).groups)["a"][0]) if fed] == [3]
    found = magnitude.remove_dead(model, x)
    assert found.removed == {"a": 1}
    same(model, found.model, x)


def test_a_layer_that_is_all_dead_keeps_one_neuron() -> None:
    model, x = mlp(6, 8, 3), torch.randn(5, 6)
    with torch.no_grad():
        model[0].weight.zero_()
    found = magnitude.remove_dead(model, x)
    same(model, found.model, x)
    assert found.removed == {"0": 7}


# ---- files ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 600), max_size=20), st.integers(0, 700), st.sampled_from([1, 4, 5, 8]))
def test_relative_indices_give_the_weights_back(gaps: list[int], after: int, bits: int) -> None:
    where = np.cumsum(np.array(gaps, dtype=int) + 1) - 1
    flat = np.zeros((int(where[-1]) + 1 if gaps else 0) + after, dtype=np.float32)
    flat[where] = np.arange(1, len(where) + 1)
    values, stored = sparse.encode(flat, bits)
    assert len(values) == len(gaps) + sum(gap // 2**bits for gap in gaps)
    assert stored.max(initial=0) < 2**bits
    packed = sparse.pack(stored, bits)
    assert len(packed) == math.ceil(len(stored) * bits / 8)
    assert np.array_equal(sparse.unpack(packed, bits, len(stored)), stored)
    assert np.array_equal(sparse.decode(values, stored, len(flat)), flat)


def test_a_sparse_file_holds_the_network_in_fewer_bytes(tmp_path: Path) -> None:
    model = Convolutions(0)
    found = masks.tighten(model, masks.full(model), dict.fromkeys(masks.full(model), 1.3))
    masks.apply(model, found)
    sizes = sparse.save(model.state_dict(), tmp_path / "network.safetensors")
    again = sparse.read(tmp_path / "network.safetensors")
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(t, again[n]) for n, t in model.state_dict().items())
    left, total = masks.kept(found)
    assert sizes.dense_bytes >= 4 * total
    assert 4 * left < sizes.stored_bytes < sizes.dense_bytes / 2
    assert (tmp_path / "network.safetensors").stat().st_size < sizes.stored_bytes + 2500  # names and shapes


def test_a_file_that_is_no_sparse_network_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(RunError, match=r"has format None, expected 'edgeprune.sparse/1': it is no sparse network"):
        sparse.read(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-4])
    with pytest.raises(RunError, match=r"cut\.safetensors is damaged or missing .* write it again"):
        sparse.read(tmp_path / "cut.safetensors")
