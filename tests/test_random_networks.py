"""Networks that nobody wrote: traced, cut, and compared with the masked network."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from randomnets import SIDE, RandomNet, Step, steps

from edgeprune import proof, surgery
from edgeprune.graph import trace

COMMON = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


def built(recipe: tuple[Step, ...], flat: bool) -> tuple[RandomNet, torch.Tensor]:
    torch.manual_seed(0)
    return RandomNet(recipe, flat).eval(), torch.randn(2, 3, SIDE, SIDE)


def agrees(recipe: tuple[Step, ...], flat: bool) -> None:
    model, x = built(recipe, flat)
    proved = proof.check(model, x)
    assert proved.max_deviation < 1e-9, (proved.worst, recipe)


@settings(max_examples=20, **COMMON)
@given(steps(), st.booleans())
def test_a_random_network_cut_equals_the_masked_one(recipe: tuple[Step, ...], flat: bool) -> None:
    agrees(recipe, flat)


@pytest.mark.slow
@settings(max_examples=1000, **COMMON)
@given(steps(), st.booleans())
def test_a_thousand_random_networks_cut_equal_the_masked_ones(recipe: tuple[Step, ...], flat: bool) -> None:
    agrees(recipe, flat)


@settings(max_examples=15, **COMMON)
@given(steps(), st.booleans())
def test_a_random_network_cut_to_one_unit_a_group_is_smaller_and_trains(recipe: tuple[Step, ...], flat: bool) -> None:
    model, x = built(recipe, flat)
    graph = trace(model, x)
    cut = surgery.cut(model, graph, {g.id: (g.width - 1,) for g in graph.groups}).train()
    cut(torch.cat([x, x])).square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in cut.parameters())
    if graph.groups:
        assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
