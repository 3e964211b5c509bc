"""Layers as products: against the layer itself, against torch's singular values, and as genes of a search."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import searching
import torch
from test_allocate import Residual
from torch import nn

from edgeprune import importance, lowrank, proof, surgery
from edgeprune.config import GeneticSection
from edgeprune.errors import ModelError
from edgeprune.graph import trace
from edgeprune.records import Evaluation
from edgeprune.search import genetic, genotype
from edgeprune.search.space import Units


class Factored(Residual):
    """Its second and its last convolution and its linear layer as products."""

    def __new__(cls) -> nn.Module:  # type: ignore[misc]
        torch.manual_seed(0)
        return lowrank.factored(Residual(), ["two", "last", "fc"])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 9, 3, padding=1),
        nn.Conv2d(9, 6, (3, 5), stride=2, padding=2, dilation=2, bias=False, padding_mode="reflect"),
        nn.Conv2d(3, 64, 3),  # outputs that 27 inputs cannot fill
        nn.Conv2d(6, 9, 1, stride=2, padding=1),
    ],
)
def test_at_full_rank_a_product_is_the_convolution(layer: nn.Conv2d) -> None:
    x = torch.randn(2, layer.in_channels, 11, 12)
    made = lowrank.factored(nn.Sequential(layer), ["0"])
    assert len(made[0]) == (2 if layer.kernel_size == (1, 1) else 3)  # type: ignore[index, arg-type]
    with torch.no_grad():
        assert proof.difference([layer(x)], [made(x)]) < 1e-5


def test_a_weight_without_full_rank_is_kept_too() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        layer.weight[4:] = layer.weight[:4]
        layer.weight[:, 6:] = 0
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert proof.difference([layer(x)], [lowrank.factored(nn.Sequential(layer), ["0"])(x)]) < 1e-5


def test_ranks_are_channel_groups_and_scored_by_singular_values() -> None:
    torch.manual_seed(0)
    net = Residual()
    model = lowrank.factored(net, ["two", "fc"])
    graph = trace(model.eval(), torch.randn(1, 3, 8, 8))
    scores = importance.score(model, graph.groups, "l2")
    for group, matrix in {
        "two.0": net.two.weight.transpose(0, 1).flatten(1),
        "two.1": net.two.weight.flatten(1),
        "fc.0": net.fc.weight,
    }.items():
        values = torch.linalg.svdvals(matrix.detach().double()).numpy()
        assert np.allclose(scores[group], values, rtol=1e-4)


def test_a_linear_layer_of_fewer_ranks_is_the_nearest_one_there_is() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 12))
    model = lowrank.factored(net, ["0"]).eval()
    graph = trace(model, torch.randn(1, 20))
    keep = importance.best(importance.score(model, graph.groups, "l2"), {"0.0": 5})
    cut = surgery.cut(model, graph, keep)
    weight = (cut.get_parameter("0.1.weight") @ cut.get_parameter("0.0.weight")).detach()
    lost = float((weight - net[0].weight.detach()).square().sum())
    values = torch.linalg.svdvals(net[0].weight.detach())
    assert lost == pytest.approx(float(values[5:].square().sum()), rel=1e-4)  # Eckart and Young


def test_a_convolution_loses_no_more_than_the_singular_values_of_both_its_ranks() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 24, 3))
    model = lowrank.factored(net, ["0"]).eval()
    graph = trace(model, torch.randn(1, 16, 5, 5))
    keep = importance.best(importance.score(model, graph.groups, "l2"), {"0.0": 10, "0.1": 12})
    cut = surgery.cut(model, graph, keep)
    first, core, last = (cut.get_parameter(f"0.{at}.weight").detach() for at in range(3))
    weight = torch.einsum("oa,abhw,bi->oihw", last[..., 0, 0], core, first[..., 0, 0])
    dense = net[0].weight.detach()
    lost = float((weight - dense).square().sum())
    tails = sum(
        float(torch.linalg.svdvals(m)[k:].square().sum())
        for m, k in ((dense.transpose(0, 1).flatten(1), 10), (dense.flatten(1), 12))
    )
    least = float(torch.linalg.svdvals(dense.flatten(1))[12:].square().sum())
    assert least < lost <= tails * (1 + 1e-5)  # De Lathauwer et al.


def test_ranks_are_genes_of_a_genetic_search() -> None:
    space = searching.space(Factored, choices=5)
    ranks = {"two.0", "two.1", "last.0", "last.1", "fc.0"}
    assert ranks < set(space.groups)

    def answer(units: Units) -> Evaluation:  # only ranks are worth anything, and those of `last` most
        worth = sum(units[g] / space.costs.dense[g] * (4 if "last" in g else 1) for g in ranks) / 11
        return Evaluation(1 - worth, worth)

    trying = searching.trying(space, answer, 200)
    found = genetic.search(trying, GeneticSection(), 0)
    kept = {g: found.units[g] / space.costs.dense[g] for g in space.groups}
    assert found.predicted_ms <= space.budgets_ms[0]
    assert np.mean([kept["last.0"], kept["last.1"]]) > np.mean([kept[g] for g in set(space.groups) - ranks])
    genome = genotype.encode(space, found.units)
    assert genotype.decode(space, genome) == found.units


def test_layers_that_have_no_rank_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Linear(3, 3))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ModelError, match=r"model\.low_rank: '0' holds no linear layer .* without groups; there are 2$"):
        lowrank.factored(net, ["2", "0"])
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
