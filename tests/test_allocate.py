"""From networks to plans, on made-up latencies: against trying every plan, and against the cut networks themselves."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune import allocate, allocators, importance, measure, series, surgery, widths
from edgeprune.allocate import Costs
from edgeprune.errors import UnreachableBudget
from edgeprune.explain import free_speed, stairs
from edgeprune.graph import ModelGraph, trace
from edgeprune.importance import Importance
from edgeprune.limits import size_limit
from edgeprune.records import Fingerprint, LayerShape, Timing
from edgeprune.table import IDENTITY, Correction, LatencyTable, surface, wanted

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import arms

DEVICE = Fingerprint("made-up", "none", "none", "f32", 1, ())
Units = Mapping[str, int]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one, self.two = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.last, self.fc = nn.Conv2d(16, 32, 3, stride=2), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


class Concat(nn.Module):
    """Four branches meet before a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 8 + 8 * i, 1 + 2 * (i % 2), padding=i % 2) for i in range(4))
        self.norm = nn.BatchNorm2d(80)
        self.join, self.fc = nn.Conv2d(80, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([branch(x) for branch in self.branches], dim=1)
        return self.fc(torch.relu(self.join(torch.relu(self.norm(joined)))).mean((2, 3)))


def milliseconds(shape: LayerShape, step: int) -> float:
    """A staircase in output channels, concave in input channels."""
    kernel = math.prod(shape.kernel) if shape.kernel else 1
    out = -(-shape.out_ch // step) * step
    return 0.01 + 1e-4 * kernel * out * (shape.in_ch / max(shape.conv_groups, 1)) ** 0.8


def no_overhead(shape: LayerShape, step: int) -> float:
    """In proportion to the layer's multiplications: what is next to nothing costs next to nothing."""
    pixels = math.prod(shape.spatial) / math.prod(shape.stride) if shape.spatial else 1.0
    return 1e-6 * math.prod(shape.kernel) * pixels * shape.out_ch * shape.in_ch / max(shape.conv_groups, 1)


def made_up(
    net: nn.Module,
    choices: int | None,
    step: int = 8,
    blocks: bool = False,
    correction: Correction = IDENTITY,
    latency: Callable[[LayerShape, int], float] = milliseconds,
) -> tuple[ModelGraph, Costs, Importance]:
    """A network with latencies from a formula: its groups take `choices` widths each, or all that plans may choose."""
    torch.manual_seed(0)
    graph = trace(net.eval(), torch.randn(1, 3, 8, 8))
    dropped = graph.blocks if blocks else ()
    candidates = widths.candidates(graph.groups, 0.0, (), dropped)
    if choices is not None:
        candidates = {g: thinned(all_, choices) for g, all_ in candidates.items()}
    entries: dict[LayerShape, Timing] = {}
    table = LatencyTable(DEVICE, entries, correction)
    while missing := [s for layer in graph.layers for s in wanted(surface(table, layer, candidates))]:
        entries |= {shape: timing(latency(shape, step)) for shape in missing}
        table = LatencyTable(DEVICE, entries, correction)
    return graph, measure.costs(graph.layers, candidates, table, dropped), importance.score(net, graph.groups)


def thinned(widths_: tuple[int, ...], choices: int) -> tuple[int, ...]:
    """The widest and others below it, evenly spread; 0 stays."""
    real = tuple(w for w in widths_ if w)
    return tuple(w for w in widths_ if not w) + real[-1 :: -(len(widths_) // choices)][:choices][::-1]


def timing(ms: float) -> Timing:
    return Timing(ms, ms, ms, 9, (), 0.0)


def plans(costs: Costs) -> list[Units]:
    """All that respect the blocks: a block's groups vanish together."""
    found = []
    for choice in itertools.product(*costs.candidates.values()):
        units = dict(zip(costs.candidates, choice, strict=True))
        if all(len({units[g] == 0 for g in block.groups}) == 1 for block in costs.blocks):
            found.append(units)
    return found


def value(scores: Importance, units: Units) -> float:
    return sum(float(np.sort(scores[g])[::-1][:w].sum()) for g, w in units.items())


@pytest.mark.parametrize("blocks", [False, True])
def test_a_plan_is_the_best_of_all_plans_by_the_networks_own_prediction(blocks: bool) -> None:
    correction = Correction(0.02, 1.1, 0.5, 5, 0.01, 0.02)
    _, costs, scores = made_up(Residual(), choices=4, blocks=blocks, correction=correction)
    every = plans(costs)
    latencies = [costs.predict_ms(units) for units in every]
    assert any(0 in units.values() for units in every) == blocks
    for share in (0.2, 0.4, 0.6, 0.8):
        budget = min(latencies) + share * (max(latencies) - min(latencies))
        best = max(value(scores, units) for units, ms in zip(every, latencies, strict=True) if ms <= budget)
        plan = allocate.solve(costs, scores, budget, gap=1e-9)
        assert plan.value == pytest.approx(best, abs=1e-6)
        assert plan.predicted_ms <= budget * (1 + 1e-12)


def test_behind_a_concat_of_many_groups_a_plan_fits_uses_its_budget_and_knows_how_far_it_may_be_from_the_best() -> None:
    """Its cost is taken as linear in the sum of its inputs, on lines above and below the curve."""
    _, costs, scores = made_up(Concat(), choices=6)
    assert math.prod(map(len, costs.candidates.values())) > allocate.PRODUCTS
    every = plans(costs)
    latencies = np.array([costs.predict_ms(units) for units in every])
    values = np.array([value(scores, units) for units in every])
    for share in np.linspace(0.05, 0.98, 20):
        budget = latencies.min() + share * (latencies.max() - latencies.min())
        best = values[latencies <= budget].max()
        plan = allocate.solve(costs, scores, budget)
        assert plan.predicted_ms <= budget * (1 + 1e-12)
        assert plan.value == pytest.approx(value(scores, plan.widths))
        assert plan.value >= best * (1 - plan.gap) - 1e-9  # the certificate holds for the true costs
        assert plan.value >= 0.98 * best


@pytest.mark.parametrize("strategy", ["knapsack", "uniform", "random"])
def test_two_devices_with_different_staircases_are_satisfied_at_once(strategy: str) -> None:
    _, coarse, scores = made_up(Residual(), choices=4, step=16)
    _, fine, _ = made_up(Residual(), choices=4, step=4)
    budgets = [0.5 * coarse.predict_ms(coarse.dense), 0.45 * fine.predict_ms(fine.dense)]
    plan = allocators.named(strategy)(coarse, scores, budgets[0], [fine.limit("latency on fine in ms", budgets[1])])
    found = [costs.predict_ms(plan.widths) for costs in (coarse, fine)]
    assert all(ms <= budget * (1 + 1e-12) for ms, budget in zip(found, budgets, strict=True))
    if strategy == "knapsack":
        best = max(
            value(scores, units)
            for units in plans(coarse)
            if coarse.predict_ms(units) <= budgets[0] and fine.predict_ms(units) <= budgets[1]
        )
        assert plan.value == pytest.approx(best, rel=1e-3)


def test_the_best_units_of_every_group_stay_in_the_smallest_network() -> None:
    """SP-LAMP pins a layer's largest filter; where widths come in buckets, that is its best bucket."""
    _, costs, scores = made_up(Residual(), choices=8)
    smallest = allocate.floor(costs)
    keep = importance.best(scores, smallest.widths)
    for g, widths_ in costs.candidates.items():
        assert smallest.widths[g] == widths_[0] > 0
        bucket = set(np.argsort(-scores[g])[: widths_[0]].tolist())
        assert int(scores[g].argmax()) in bucket == set(keep[g])
    with pytest.raises(UnreachableBudget):
        allocate.solve(costs, scores, 0.01 * costs.predict_ms(costs.dense))


@pytest.mark.parametrize("worthless", [False, True])
def test_no_group_is_emptied_at_one_percent_of_the_dense_latency_even_one_that_is_worth_nothing(
    worthless: bool,
) -> None:
    """Where nothing but multiplications takes time, so that such a budget can be met."""
    net = Residual()
    graph, costs, scores = made_up(net, choices=None, latency=no_overhead)
    if worthless:
        scores = {g: np.zeros_like(s) if g == graph.groups[1].id else s for g, s in scores.items()}
    budget = 0.01 * costs.predict_ms(costs.dense)
    plan = allocate.solve(costs, scores, budget)
    assert 0 < plan.predicted_ms <= budget
    assert plan.widths.keys() == {g.id for g in graph.groups}
    assert min(plan.widths.values()) >= 1
    keep = importance.best(scores, plan.widths)
    assert all(int(scores[g].argmax()) in units for g, units in keep.items())
    cut = surgery.cut(net, graph, keep)
    assert all(p.numel() for p in cut.parameters())
    assert cut(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    for share in (0.02, 0.05, 0.3):
        assert min(allocate.solve(costs, scores, share * costs.predict_ms(costs.dense)).widths.values()) >= 1


@pytest.mark.parametrize("steps", [1, 5, pytest.param(30, marks=pytest.mark.slow)])
def test_a_plan_is_worth_at_least_what_a_linearised_knapsack_finds_within_the_same_true_latency(steps: int) -> None:
    """HALP's linearisation, each of its steps solved exactly and its nominal budget raised until the true one is used
    up, at five budgets."""
    _, costs, scores = made_up(Residual(), choices=8, step=4)
    lowest, dense = allocate.floor(costs).predicted_ms, costs.predict_ms(costs.dense)
    compared = []
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        budget = lowest + share * (dense - lowest)
        plan = allocate.solve(costs, scores, budget, gap=1e-9)
        assert costs.predict_ms(plan.widths) <= budget * (1 + 1e-12)
        _, other = arms.linearised_within(costs, scores, budget, steps)
        if costs.predict_ms(other) <= budget:
            compared.append(value(scores, plan.widths) - value(scores, other))
    assert len(compared) >= 4, "the linearised plan meets its true budget too, nearly always"
    assert min(compared) >= -1e-9
    assert max(compared) > 0.01, "and it is not simply the same one"


def test_a_predicted_size_is_that_of_the_cut_networks_weights() -> None:
    net = Residual()
    graph, costs, scores = made_up(net, choices=4)
    dense_bytes = 4 * graph.total_params
    limit = size_limit(graph.layers, costs.candidates, costs.dense, dense_bytes, 0.4 * dense_bytes)
    plan = allocate.solve(costs, scores, 10.0, [limit])
    cut = surgery.cut(net, graph, importance.best(scores, plan.widths))
    weights = 4 * sum(p.numel() for p in cut.parameters() if p.dim() > 1)
    biases = 4 * sum(p.numel() for p in net.parameters() if p.dim() == 1)  # taken as they were: an upper bound
    assert limit.predict(plan.widths, ()) == pytest.approx(weights + biases)
    assert 0.3 * dense_bytes < weights + biases <= 0.4 * dense_bytes


def test_a_later_step_predicts_the_same_size_for_the_same_widths() -> None:
    """Fewer widths are on offer, and a dropped block has none; what lies in the file besides weights stays the same."""
    graph, costs, scores = made_up(Residual(), choices=4, blocks=True)
    plan = allocate.solve(costs, scores, 0.3 * costs.predict_ms(costs.dense))
    units = {**plan.widths, "one": 0}
    left, dense_bytes = allocate.at_most(costs, units), 4 * graph.total_params + 1000
    early, late = (size_limit(graph.layers, c.candidates, c.dense, dense_bytes, 1e5) for c in (costs, left))
    assert late.predict(units, costs.blocks) == pytest.approx(early.predict(units, costs.blocks))
    assert early.predict(costs.dense, costs.blocks) == pytest.approx(dense_bytes)


def test_what_a_dropped_block_is_worth_is_lost_whole() -> None:
    """Where no width but 0 saves anything, the plan without the block keeps the score of all other groups."""
    _, costs, scores = made_up(Residual(), choices=1, blocks=True)
    assert costs.candidates["one"] == (0, 24)
    plan = allocate.solve(costs, scores, 0.9 * costs.predict_ms(costs.dense))
    assert plan.widths == {**costs.dense, "one": 0}
    assert plan.value == pytest.approx(sum(s.sum() for g, s in scores.items() if g != "one"))


def test_a_size_that_no_plan_reaches_is_refused_with_the_least() -> None:
    graph, costs, scores = made_up(Residual(), choices=4)
    limit = size_limit(graph.layers, costs.candidates, costs.dense, 4 * graph.total_params, 100.0)
    with pytest.raises(UnreachableBudget, match=r"size in bytes: the cheapest choice of widths costs \d+.*is 100"):
        allocate.solve(costs, scores, 10.0, [limit])
    with pytest.raises(UnreachableBudget, match=r"size in bytes \d+.*, the budget is 100"):
        allocators.named("uniform")(costs, scores, 10.0, [limit])


def test_plans_of_falling_budgets_are_nested_and_worth_what_they_can_be() -> None:
    _, costs, scores = made_up(Residual(), choices=6)
    dense = costs.predict_ms(costs.dense)
    budgets = [share * dense for share in (0.8, 0.6, 0.4)]
    curve = series.curve(costs, scores, allocate.solve, budgets)
    assert [p.budget_ms for p in curve] == budgets
    assert all(p.predicted_ms <= p.budget_ms * (1 + 1e-12) for p in curve)
    assert all(p.gap <= 1e-3 for p in curve)
    assert all(a.kept >= b.kept for a, b in itertools.pairwise(curve))
    assert curve[0].kept == pytest.approx(curve[0].alone)
    assert all(p.kept <= p.alone * (1 + 1e-3) for p in curve)
    left, every = costs, []
    for budget in budgets:
        every.append(allocate.solve(left, scores, budget).widths)
        left = allocate.at_most(costs, every[-1])
    assert all(small[g] <= large[g] for large, small in itertools.pairwise(every) for g in small)
    keeps = [importance.best(scores, units) for units in every]
    assert all(
        set(small[g]) <= set(large.get(g, small[g])) for large, small in itertools.pairwise(keeps) for g in small
    )


def test_a_width_stands_on_its_staircase() -> None:
    curve = {16: 1.0, 24: 1.0, 32: 1.0, 40: 2.0, 48: 2.0, 56: 3.0}
    middle = stairs(curve, 40)
    assert (middle.at, middle.wider, middle.narrower) == (40, 48, 32)
    assert (middle.at_ms, middle.narrower_ms) == (2.0, 1.0)
    assert free_speed(middle)  # half the latency for a fifth of the channels
    lowest = stairs(curve, 16)
    assert (lowest.wider, lowest.narrower) == (32, 16)
    assert not free_speed(lowest)


def test_on_a_straight_line_no_step_is_free() -> None:
    line = stairs({w: 0.1 * w for w in range(8, 72, 8)}, 40)
    assert (line.wider, line.narrower) == (40, 32)
    assert not free_speed(line)
