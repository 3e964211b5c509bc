"""Strategies that try candidates: against brute force, against random search, and against themselves without a part."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import searching
from numpy.typing import NDArray
from test_allocate import Residual, plans

from edgeprune import allocators
from edgeprune.config import GeneticSection, RLSection
from edgeprune.records import Evaluation
from edgeprune.search import Space, front, genetic, genotype, randomly, rl
from edgeprune.search.space import Units
from edgeprune.search.trying import Candidate

Floats = NDArray[np.float64]


def kept(space: Space, units: Units) -> Floats:
    return np.array([units[g] / space.costs.dense[g] for g in space.groups])


def towards(space: Space, goal: Floats) -> Callable[[Units], Evaluation]:
    """Loss: the squared distance of what each group keeps from `goal`; accuracy falls with it."""

    def answer(units: Units) -> Evaluation:
        loss = float(((kept(space, units) - goal) ** 2).sum())
        return Evaluation(loss, 1 / (1 + loss))

    return answer


def useful(space: Space, seed: int) -> Callable[[Units], Evaluation]:
    """Accuracy: saturating in what each group keeps, and some groups matter ten times as much as others."""
    weights = np.exp(np.random.default_rng(seed).uniform(0, np.log(10), len(space.groups)))
    weights /= weights.sum()

    def answer(units: Units) -> Evaluation:
        accuracy = float(weights @ (1 - np.exp(-4 * kept(space, units))))
        return Evaluation(1 - accuracy, accuracy)

    return answer


# ---- what a search may ask -----------------------------------------------------------------------------------


def test_a_candidate_that_was_judged_is_neither_judged_nor_counted_again() -> None:
    space, calls = searching.space(Residual), []

    def answer(units: Units) -> Evaluation:
        calls.append(units)
        return Evaluation(1.0, 0.5)

    trying = searching.trying(space, answer, 3)
    a, b, c, d = ({**space.costs.dense, "stem": w} for w in space.widths["stem"][:4])
    assert [found.units for found in trying.all([a, b, a])] == [a, b, a]
    assert trying.left == 1
    assert [found.units for found in trying.all([b, c, d, a])] == [b, c]  # as far as evaluations go
    assert trying.left == 0
    assert calls == [a, b, c]


def test_a_search_that_has_run_out_of_new_candidates_ends() -> None:
    space = searching.space(Residual)
    trying = searching.trying(space, useful(space, 0), 10)
    rl.search(trying, RLSection(noise=0.0), 0)
    assert len(trying.candidates) == 1


def test_every_candidate_of_rl_is_scaled_to_the_budget() -> None:
    space = searching.space()
    trying = searching.trying(space, useful(space, 0), 60)
    rl.search(trying, RLSection(noise=0.2), 0)
    found = np.array([c.predicted_ms for c in trying.candidates]) / space.budgets_ms[0]
    assert found.max() <= 1 + 1e-12
    assert found.min() > 0.98


# ---- RL-Pruner -----------------------------------------------------------------------------------------------


def test_with_rate_0_rl_is_random_search_around_uniform_widths() -> None:
    """Written down again: the same samples around a distribution that stays where it began."""
    space, noise, count = searching.space(), 0.1, 40
    trying = searching.trying(space, useful(space, 0), count)
    rl.search(trying, RLSection(rate=0.0, noise=noise, epsilon=0.0), seed=5)
    units = np.array([space.costs.dense[g] for g in space.groups], dtype=float)
    draw = np.random.Generator(np.random.PCG64(5))
    expected: list[Units] = []
    while len(expected) < count:
        for _ in range(10):
            size = noise * draw.random()
            action = np.maximum(units / units.sum() + size * draw.standard_normal(len(units)), 1e-5)
            plan = space.removing(dict(zip(space.groups, (action / action.sum()).tolist(), strict=True)))
            if plan.widths not in expected:
                expected.append(plan.widths)
        draw.integers(10)
        draw.random()  # which sample to move towards: drawn, and without effect
    assert [c.units for c in trying.candidates] == expected[:count]


def test_without_noise_rl_is_uniform_widths() -> None:
    space = searching.space()
    trying = searching.trying(space, useful(space, 0), 10)
    found = rl.search(trying, RLSection(noise=0.0), seed=0)
    assert found.units == allocators.named("uniform")(space.costs, space.scores, space.budgets_ms[0]).widths


def test_a_move_is_clipped_and_stays_a_distribution() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        before, action = (draw.dirichlet(np.full(8, 0.5)) + 1e-4 for _ in range(2))
        before, action = before / before.sum(), action / action.sum()
        after = rl.moved(before, action, rate=draw.random(), clip=0.2)
        assert after.sum() == pytest.approx(1)
        ratio = after / before
        assert ratio.max() / ratio.min() <= 1.2 / 0.8 + 1e-9  # each within 1 ± 0.2 before it is normalised
    assert np.allclose(rl.moved(before, action, rate=0.0, clip=0.2), before)
    near = before * draw.uniform(0.9, 1.1, 8)
    near /= near.sum()
    assert np.allclose(rl.moved(before, near, rate=1.0, clip=0.5), near)
    assert np.allclose(rl.moved(before, near, rate=0.5, clip=0.5), (before + near) / 2)


def test_rl_comes_nearer_to_a_known_best_distribution_than_the_same_samples_without_learning() -> None:
    space = searching.space()
    pairs = []
    for seed in range(9):
        best = np.random.default_rng(seed).dirichlet(np.ones(len(space.groups)))
        goal = kept(space, space.removing(dict(zip(space.groups, best.tolist(), strict=True))).widths)
        losses = []
        for rate in (0.5, 0.0):
            trying = searching.trying(space, towards(space, goal), 100)
            losses.append(rl.search(trying, RLSection(rate=rate), seed).evaluation.loss)
        pairs.append(losses)
    learnt, random = np.array(pairs).T
    assert (learnt < random).sum() >= 8
    assert np.median(learnt / random) < 0.7


@pytest.mark.slow
def test_rl_comes_nearer_to_a_known_best_distribution_than_a_flat_random_search_of_equal_number() -> None:
    space = searching.space()
    units = np.array([space.costs.dense[g] for g in space.groups], dtype=float)
    pairs = []
    for seed in range(20):
        best = np.random.default_rng(seed).dirichlet(units / units.mean())
        goal = kept(space, space.removing(dict(zip(space.groups, best.tolist(), strict=True))).widths)
        found = []
        for search in (lambda t, s=seed: rl.search(t, RLSection(), s), lambda t, s=seed: randomly.search(t, s)):
            found.append(search(searching.trying(space, towards(space, goal), 200)))
        pairs.append([np.abs(kept(space, candidate.units) - goal).sum() for candidate in found])
    learnt, flat = np.array(pairs).T
    assert np.median(learnt) < np.median(flat)
    assert (learnt < flat).sum() >= 14


def test_lookahead_judges_the_next_budget_of_the_schedule_too() -> None:
    space = searching.space(share=0.7, steps=2)
    trying = searching.trying(space, useful(space, 0), 30)
    found = rl.search(trying, RLSection(samples=4, lookahead=2), 0)
    first, second = (np.array([c.predicted_ms for c in trying.candidates]) / budget for budget in space.budgets_ms)
    now, later = (first > 0.95), (second <= 1 + 1e-12)
    assert (now | later).all()
    assert later.sum() > now.sum() > 0  # two successors of each sample
    assert found.predicted_ms > space.budgets_ms[1]


@pytest.mark.parametrize("search", ["rl", "genetic", "random"])
def test_what_is_better_is_decided_by_loss_or_by_accuracy(search: str) -> None:
    space = searching.space()
    answer = useful(space, 0)

    def contrary(units: Units) -> Evaluation:
        return Evaluation(answer(units).loss, answer(units).loss / 100)

    for by, which in (("loss", min), ("accuracy", max)):
        trying = searching.trying(space, contrary, 60, by=by)
        searches = {
            "rl": lambda t: rl.search(t, RLSection(), 0),
            "genetic": lambda t: genetic.search(t, GeneticSection(), 0),
            "random": lambda t: randomly.search(t, 0),
        }
        found = searches[search](trying)
        within = [c.evaluation.loss for c in trying.candidates if c.predicted_ms <= space.budgets_ms[0] * (1 + 1e-9)]
        assert found.evaluation.loss == which(within)


def test_random_search_draws_different_plans_at_the_budget() -> None:
    space = searching.space()
    trying = searching.trying(space, useful(space, 0), 30)
    found = randomly.search(trying, 0)
    assert len({space.key(c.units) for c in trying.candidates}) == 30
    assert found.evaluation.loss == min(c.evaluation.loss for c in trying.candidates)
    assert max(c.predicted_ms for c in trying.candidates) <= space.budgets_ms[0]


# ---- GeneCAI -------------------------------------------------------------------------------------------------


def test_genomes_and_networks_are_one_to_one() -> None:
    space = searching.space(Residual, choices=5)
    genomes = [np.array(g) for g in itertools.product(*map(range, genotype.sizes(space)))]
    decoded = [genotype.decode(space, genome) for genome in genomes]
    assert {space.key(units) for units in decoded} == {space.key(units) for units in plans(space.costs)}
    assert len({space.key(units) for units in decoded}) == len(genomes)
    assert all((genotype.encode(space, u) == g).all() for u, g in zip(decoded, genomes, strict=True))


def test_crossover_and_mutation_stay_among_the_widths_and_leave_parents_alone() -> None:
    space, draw = searching.space(), np.random.default_rng(0)
    parents = [genotype.anywhere(space, draw) for _ in range(400)]
    before = [parent.copy() for parent in parents]
    children = genetic._bred(parents, genotype.sizes(space), draw)
    assert all((a == b).all() for a, b in zip(parents, before, strict=True))
    assert all(((child >= 0) & (child < genotype.sizes(space))).all() for child in children)
    changed = np.mean([(a != b).any() for a, b in zip(children, parents, strict=True)])
    assert 0.2 < changed < 0.8


def test_what_a_group_alone_can_bear_is_that_of_trying_every_width() -> None:
    space = searching.space(Residual, choices=8)
    answer, tolerance = useful(space, 3), 0.02
    trying = searching.trying(space, answer, 200)
    dense = answer(space.costs.dense).accuracy
    for g, share in genotype.boundary(trying, tolerance).items():
        fine = [w for w in space.widths[g] if answer({**space.costs.dense, g: w}).accuracy >= dense - tolerance]
        assert share == 1 - min(fine) / space.costs.dense[g]
    assert len(trying.candidates) < 20


def candidate(error: float, ms: float) -> Candidate:
    return Candidate({}, ms, Evaluation(error, 1 - error))


def test_the_front_is_what_no_other_candidate_beats() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        points = draw.integers(0, 12, (30, 2)) / 10
        beaten = [
            any((q <= p).all() and (q < p).any() for q in points)
            for p in points
        ]  # fmt: skip
        expected = {tuple(p) for p, lost in zip(points, beaten, strict=True) if not lost}
        found = front.of([candidate(e, ms) for e, ms in points])
        assert {(round(1 - c.accuracy, 6), c.predicted_ms) for c in found} == {(round(e, 6), ms) for e, ms in expected}
        assert len(found) == len(expected)


def test_the_hypervolume_is_the_area_by_counting() -> None:
    draw = np.random.default_rng(1)
    grid = np.stack(np.meshgrid(*[(np.arange(500) + 0.5) / 500] * 2), -1).reshape(-1, 2)
    for _ in range(10):
        points = draw.random((8, 2)) * 1.2
        covered = np.any([(grid >= p).all(axis=1) for p in points], axis=0).mean()
        assert front.hypervolume(points, (1.0, 1.0)) == pytest.approx(covered, abs=0.01)


def area(space: Space, candidates: tuple[Candidate, ...]) -> float:
    points = np.array([[c.evaluation.loss, c.predicted_ms] for c in candidates])
    return front.hypervolume(points, (1.0, space.cost_ms(space.costs.dense)))


def test_the_genetic_front_is_nearly_that_of_trying_every_network() -> None:
    space = searching.space(Residual, choices=8)
    answer = useful(space, 1)
    every = tuple(Candidate(u, space.cost_ms(u), answer(u)) for u in plans(space.costs))
    trying = searching.trying(space, answer, 150)
    genetic.search(trying, GeneticSection(), 0)
    assert len(every) == 512
    assert area(space, trying.candidates) > 0.99 * area(space, every)


def test_what_a_search_covers_never_shrinks_as_it_goes_on() -> None:
    space = searching.space(Residual, choices=8)
    trying = searching.trying(space, useful(space, 0), 100)
    genetic.search(trying, GeneticSection(), 0)
    volumes = [area(space, trying.candidates[:count]) for count in range(1, 101)]
    assert volumes == sorted(volumes)
    assert volumes[-1] > 1.1 * volumes[10]


def test_evolution_covers_more_than_random_networks_of_equal_number() -> None:
    """Begun anywhere; the directed beginning costs a tenth of these evaluations and does not pay off here."""
    space = searching.space()
    gains = []
    for seed in range(5):
        answer = useful(space, seed)
        evolved, random = (searching.trying(space, answer, 400) for _ in range(2))
        genetic.search(evolved, GeneticSection(directed=False), seed)
        draw = np.random.default_rng(seed)
        while random.left:
            random.all([genotype.decode(space, genotype.anywhere(space, draw))])
        assert len(evolved.candidates) == len(random.candidates) == 400
        gains.append(area(space, evolved.candidates) / area(space, random.candidates))
    assert np.sum(np.array(gains) > 1) >= 4
    assert np.median(gains) > 1.02


@pytest.mark.parametrize("mode", ["nsga2", "score"])
def test_a_genetic_plan_meets_the_budget_and_beats_uniform_widths(mode: str) -> None:
    space = searching.space()
    answer = useful(space, 2)
    trying = searching.trying(space, answer, 200)
    found = genetic.search(trying, GeneticSection.model_validate({"mode": mode}), 0)
    assert 0.97 * space.budgets_ms[0] < found.predicted_ms <= space.budgets_ms[0]
    uniform = allocators.named("uniform")(space.costs, space.scores, space.budgets_ms[0])
    assert found.evaluation.loss < answer(uniform.widths).loss


def test_the_score_is_genecais() -> None:
    assert genetic.score(0.5, 0.9, 0.92, 0.6, 2.0) == pytest.approx(np.exp(1.0) / (2 + 1))
    assert genetic.score(0.5, 0.58, 0.92, 0.6, 2.0) == pytest.approx(np.exp(1.0) / (34 + 1 + np.exp(2.0)))
    assert genetic.score(-0.1, 0.95, 0.92, 0.6, 2.0) == 0.0


@pytest.mark.parametrize("strategy", ["rl", "genetic", "score", "random"])
def test_a_seed_gives_the_same_search(strategy: str) -> None:
    space = searching.space()

    def once(seed: int) -> list[Units]:
        trying = searching.trying(space, useful(space, 0), 60)
        if strategy == "rl":
            rl.search(trying, RLSection(), seed)
        elif strategy == "random":
            randomly.search(trying, seed)
        else:
            mode = "nsga2" if strategy == "genetic" else "score"
            genetic.search(trying, GeneticSection.model_validate({"mode": mode}), seed)
        return [c.units for c in trying.candidates]

    assert once(1) == once(1)
    assert once(1) != once(2)


# ---- carrying what was found to a budget ---------------------------------------------------------------------


def test_widths_come_back_at_their_own_latency() -> None:
    space, draw = searching.space(), np.random.default_rng(0)
    for _ in range(20):
        units = genotype.decode(space, genotype.anywhere(space, draw))
        plan = allocators.scaled(
            allocators.shares_of(space.costs, units), space.costs, space.scores, space.cost_ms(units)
        )
        assert plan.predicted_ms <= space.cost_ms(units)
        assert plan.widths == units


def test_a_slightly_tighter_budget_takes_little_more_than_it_asks_for() -> None:
    space = searching.space()
    for name in ("uniform", "random"):
        for share in np.linspace(0.45, 0.95, 12):
            budget = share * space.cost_ms(space.costs.dense)
            plan = allocators.named(name)(space.costs, space.scores, budget)
            assert 0.97 * budget < plan.predicted_ms <= budget
