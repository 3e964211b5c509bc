"""Scores against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import OptionA, image
from test_allocate import Residual
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from edgeprune import importance, proof
from edgeprune.errors import UsageError
from edgeprune.graph import trace

energies = st.lists(st.floats(0.01, 100), min_size=1, max_size=20).map(np.array)


@given(energies)
def test_lamp_is_one_for_the_largest_and_keeps_the_order(energy: np.ndarray) -> None:
    scores = importance.lamp(energy)
    assert scores.max() == pytest.approx(1.0)
    assert np.all(np.diff(scores[np.argsort(energy, kind="stable")]) >= -1e-12)


@given(energies, st.floats(0.1, 10))
def test_lamp_does_not_change_when_a_layer_is_rescaled(energy: np.ndarray, factor: float) -> None:
    assert np.allclose(importance.lamp(energy), importance.lamp(energy * factor))


@given(energies)
def test_the_product_of_one_minus_lamp_over_removed_units_is_the_energy_left(energy: np.ndarray) -> None:
    order = np.argsort(energy, kind="stable")
    removed = order[: len(order) // 2]
    left = np.prod(1 - importance.lamp(energy)[removed])
    assert left == pytest.approx((energy.sum() - energy[removed].sum()) / energy.sum())


@given(energies)
def test_the_additive_form_sums_to_the_log_of_the_energy_left(energy: np.ndarray) -> None:
    order = np.argsort(energy, kind="stable")
    removed = order[: len(order) // 2]
    left = (energy.sum() - energy[removed].sum()) / energy.sum()
    assert np.exp(-importance.lamp_log(energy)[removed].sum()) == pytest.approx(left, rel=1e-4)


def test_norms_of_coupled_groups_add_up_over_their_producers() -> None:
    torch.manual_seed(0)
    model = OptionA()
    graph = trace(model, image())
    found = importance.score(model, graph.groups, "l1")["stem.0"]
    makers = [model.stem[0].weight, model.blocks[0].conv2.weight]
    expected = sum(w.detach().abs().sum((1, 2, 3)).double() for w in makers)
    assert np.allclose(found, np.asarray(expected))
    second = importance.score(model, graph.groups, "l2")["blocks.0.conv1"]
    assert np.allclose(second, model.blocks[0].conv1.weight.detach().double().flatten(1).norm(dim=1).numpy())


def test_relative_scores_do_not_change_when_one_producer_is_rescaled() -> None:
    torch.manual_seed(0)
    model = OptionA()
    graph = trace(model, image())
    before = importance.score(model, graph.groups, "sp-lamp")["stem.0"]
    with torch.no_grad():
        model.stem[0].weight.mul_(7)
    assert np.allclose(importance.score(model, graph.groups, "sp-lamp")["stem.0"], before)


def test_taylor_is_the_first_order_change_of_the_loss() -> None:
    """Against finite differences: scale a channel's batch norm down a little and look at the loss."""
    torch.manual_seed(0)
    model = OptionA().double().eval()
    x, y = image().double(), torch.tensor([1, 3])
    graph = trace(model, x)
    found = importance.score(model, graph.groups, "taylor", [(x, y)])["blocks.1.conv1"]
    norm: nn.BatchNorm2d = model.blocks[1].bn1
    for channel in range(4):
        step = 1e-6
        weight, bias = norm.weight.detach().clone(), norm.bias.detach().clone()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                norm.weight[channel] = weight[channel] * (1 + sign * step)
                norm.bias[channel] = bias[channel] * (1 + sign * step)
                losses.append(float(F.cross_entropy(model(x), y)))
        with torch.no_grad():
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)
        assert found[channel] == pytest.approx(abs(losses[0] - losses[1]) / (2 * step), rel=1e-4, abs=1e-9)


def by_halves(model: nn.Module, x: Tensor, y: Tensor, slices: dict[str, list[int]]) -> float:
    """|d loss / d scale| at scale 1 of some slices of some parameters together, by central differences."""
    losses, step = [], 1e-6
    for sign in (1, -1):
        scaled = {n: p.detach().clone() for n, p in model.named_parameters()}
        for name, units in slices.items():
            scaled[name][units] *= 1 + sign * step
        losses.append(float(F.cross_entropy(functional_call(model, scaled, (x,)), y)))
    return abs(losses[0] - losses[1]) / (2 * step)


def test_taylor_of_a_coupled_channel_is_the_change_when_all_that_scales_it_shrinks_at_once() -> None:
    """The sum over the layers comes before the absolute value: shares of opposite sign cancel."""
    torch.manual_seed(0)
    model = proof.randomised(OptionA().double()).eval()
    x, y = image(8, 3, 16, 16).double(), torch.arange(8) % 5
    graph = trace(model, x)
    found = importance.score(model, graph.groups, "taylor", [(x, y)])["stem.0"]
    names = ["stem.1.weight", "stem.1.bias", "blocks.0.bn2.weight", "blocks.0.bn2.bias"]
    apart = []
    for channel in range(8):
        assert found[channel] == pytest.approx(by_halves(model, x, y, {n: [channel] for n in names}), rel=1e-4)
        apart.append(sum(by_halves(model, x, y, {n: [channel] for n in names[at : at + 2]}) for at in (0, 2)))
    assert (np.array(apart) > 1.2 * found).any()


def test_taylor_without_norms_is_the_change_when_all_that_makes_a_channel_shrinks_at_once() -> None:
    torch.manual_seed(0)
    model = Residual().double().eval()
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 3, 0, 4])
    graph = trace(model, x)
    found = importance.score(model, graph.groups, "taylor", [(x, y)])
    makers = {"stem": ("stem", "two"), "one": ("one",), "last": ("last",)}
    assert found.keys() == makers.keys()
    for group, modules in makers.items():
        names = [f"{m}.{kind}" for m in modules for kind in ("weight", "bias")]
        for channel in range(0, len(found[group]), 3):
            expected = by_halves(model, x, y, {n: [channel] for n in names})
            assert found[group][channel] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_batches_whose_gradients_are_not_finite_do_not_count_and_without_others_taylor_refuses() -> None:
    torch.manual_seed(0)
    model = OptionA().eval()
    graph = trace(model, image())
    good, bad = (image(), torch.tensor([1, 3])), (image() * float("nan"), torch.tensor([1, 3]))
    found, clean = (importance.score(model, graph.groups, "taylor", each) for each in ([bad, good, bad], [good]))
    assert all(np.array_equal(found[g], clean[g]) for g in clean)
    with pytest.raises(UsageError, match=r"taylor': the gradients are not finite in any of 2 batches; look at the net"):
        importance.score(model, graph.groups, "taylor", [bad, bad])


def test_the_best_units_are_kept_and_whole_groups_left_out() -> None:
    scores = {"a": np.array([0.3, 0.9, 0.1, 0.5]), "b": np.array([1.0, 2.0])}
    assert importance.best(scores, {"a": 2, "b": 2}) == {"a": (1, 3)}
    assert importance.best(scores, {"a": 0, "b": 1}) == {"a": (), "b": (1,)}
    assert importance.kept_value(scores["a"], [0, 1, 2, 4]).tolist() == pytest.approx([0.0, 0.9, 1.4, 1.8])


def test_random_scores_are_the_same_for_the_same_seed() -> None:
    graph = trace(OptionA(), image())
    first, again, other = (importance.score(OptionA(), graph.groups, "random", seed=s) for s in (1, 1, 2))
    assert all(np.array_equal(first[g], again[g]) for g in first)
    assert not np.array_equal(first["stem.0"], other["stem.0"])


def test_bad_requests_are_refused() -> None:
    graph = trace(OptionA(), image())
    with pytest.raises(UsageError, match="importance 'l3' does not exist; choose one of sp-lamp, sp-lamp-log, l1"):
        importance.score(OptionA(), graph.groups, "l3")
    with pytest.raises(UsageError, match=r"importance 'taylor' needs labelled images: give \[data\]"):
        importance.score(OptionA(), graph.groups, "taylor")
