"""Strategies that try candidates: against brute force, against random search, and against themselves without a part."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import searching
from numpy.typing import NDArray
from test_allocate import Residual, plans

from edgeprune import allocators
from edgeprune.config import GeneticSection, RLSection
from edgeprune.records import Evaluation
from edgeprune.search import Space, Trying, front, genetic, genotype, randomly, rl
from edgeprune.search.genotype import Genome
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


def test_the_chance_of_a_random_move_falls_along_a_cosine_over_the_first_tenth_of_the_search() -> None:
    space, draw = searching.space(), np.random.default_rng(0)
    trying = searching.trying(space, useful(space, 0), 200)
    found = []
    while trying.left:
        assert len(trying.candidates) == len(found)
        found.append(rl.epsilon(0.4, trying))
        trying.all([genotype.decode(space, genotype.anywhere(space, draw))])
    assert found[:21:10] == pytest.approx([0.4, 0.2, 0.0])
    assert found[:21] == pytest.approx([0.4 * math.cos(math.pi * done / 40) ** 2 for done in range(21)])
    assert not any(found[21:])


@pytest.mark.slow
def test_rls_distribution_ends_nearer_to_the_known_best_one_than_it_began() -> None:
    space = searching.space()
    units = np.array([space.costs.dense[g] for g in space.groups], dtype=float)
    pairs = []
    for seed in range(20):
        drawn = np.random.default_rng(seed).dirichlet(units / units.mean())
        goal = kept(space, space.removing(dict(zip(space.groups, drawn.tolist(), strict=True))).widths)
        best = (1 - goal) * units / ((1 - goal) * units).sum()  # where the channels of the best network went
        *_, (_, last) = rl.moves(searching.trying(space, towards(space, goal), 200), RLSection(), seed)
        assert last.sum() == pytest.approx(1)
        pairs.append([float(np.abs(at - best).sum()) for at in (rl.beginning(space), last)])
    first, last = np.array(pairs).T
    print(f"L1 to the best: {np.median(first):.3f} to {np.median(last):.3f}; nearer in {(last < first).sum()} of 20")
    assert (last < first).sum() >= 18  # a best distribution with spikes is not always found
    assert np.median(last) < 0.6 * np.median(first)


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


def anywhere(space: Space, size: int, seed: int) -> list[Genome]:
    draw = np.random.default_rng(seed)
    return [genotype.anywhere(space, draw) for _ in range(size)]


def evolving(
    space: Space, answer: Callable[[Units], Evaluation], first: list[Genome], seed: int
) -> tuple[Trying, Any, list[Any]]:
    """A search by NSGA-II, and a list that gets what every generation asks for."""
    trying, algorithm = searching.trying(space, answer, 600), genetic.nsga2(space, first, 600, seed)
    ask, asked = algorithm.ask, list[Any]()

    def noted() -> Any:
        asked.append(ask())
        return asked[-1]

    algorithm.ask = noted
    return trying, algorithm, asked


def test_every_genome_that_nsga2_breeds_is_among_the_widths_also_from_the_corners() -> None:
    """With three widths a group, and parents at their ends, rounding has every chance to step over one."""
    space = searching.space(choices=3)
    last, draw = genotype.sizes(space) - 1, np.random.default_rng(0)
    ends = [0 * last, last, *(np.where(draw.random(len(last)) < 0.5, 0, last) for _ in range(18))]
    trying, algorithm, asked = evolving(space, useful(space, 0), ends, 0)
    for _ in range(30):
        assert genetic.generation(trying, algorithm)
    genomes = np.concatenate([each.get("X") for each in asked]).astype(float)
    assert (genomes == np.rint(genomes)).all()
    assert genomes.min() == 0
    assert (genomes.max(axis=0) == last).all()
    assert len(np.unique(genomes, axis=0)) > 300


@pytest.mark.parametrize("gene", [-1, 8])
def test_a_gene_that_is_no_width_is_not_read_as_another(gene: int) -> None:
    space = searching.space(choices=8)
    genome = np.zeros(len(space.groups), dtype=np.int64)
    genome[3] = gene
    with pytest.raises(AssertionError):
        genotype.decode(space, genome)


def beats(a: Floats, b: Floats) -> bool:
    return bool((a <= b).all() and (a < b).any())


def by_peeling(points: Floats) -> list[int]:
    """The front that each point is in, from 0: what nothing beats, then what nothing else beats, ..."""
    front_of, number = [-1] * len(points), 0
    while -1 in front_of:
        left = [i for i, found in enumerate(front_of) if found < 0]
        for i in [i for i in left if not any(beats(points[j], points[i]) for j in left)]:
            front_of[i] = number
        number += 1
    return front_of


def crowding(points: Floats) -> list[float]:
    """Of each point of one front without equal points: half the sides of the box between its neighbours (Deb)."""
    if len(points) < 3:
        return [math.inf] * len(points)
    found = []
    for point in points:
        total = 0.0
        for axis in range(2):
            below = [p[axis] for p in points if p[axis] < point[axis]]
            above = [p[axis] for p in points if p[axis] > point[axis]]
            side = (min(above) - max(below)) if below and above else math.inf
            total += side / (points[:, axis].max() - points[:, axis].min()) / 2
        found.append(total)
    return found


def test_fronts_with_equal_points_are_those_of_peeling() -> None:
    space, draw = searching.space(), np.random.default_rng(0)
    sorting = genetic.nsga2(space, anywhere(space, 8, 0), 1, 0).survival.nds
    for _ in range(50):
        points = draw.integers(0, 8, (40, 2)) / 7
        fronts, rank = sorting.do(points, return_rank=True)
        assert rank.tolist() == by_peeling(points)
        assert sorted(np.concatenate(fronts).tolist()) == list(range(40))


def test_survivors_are_the_first_fronts_and_of_the_last_one_those_with_most_room() -> None:
    """Every generation against sorting and crowding by brute force."""
    space, size = searching.space(), 16
    trying, algorithm, asked = evolving(space, useful(space, 1), anywhere(space, size, 1), 1)
    genetic.generation(trying, algorithm)
    shared = 0
    while trying.left > size:
        parents = algorithm.pop.get("F")
        assert genetic.generation(trying, algorithm)
        points = np.concatenate([parents, asked[-1].get("F")])
        assert len(np.unique(points, axis=0)) == len(points) == 2 * size
        front_of = np.array(by_peeling(points))
        room = np.zeros(len(points))
        for number in set(front_of.tolist()):
            room[front_of == number] = crowding(points[front_of == number])
        found = [int(np.flatnonzero((points == one.F).all(axis=1))[0]) for one in algorithm.pop]
        assert len(set(found)) == size
        assert [one.get("rank") for one in algorithm.pop] == front_of[found].tolist()
        assert [one.get("crowding") for one in algorithm.pop] == pytest.approx(room[found].tolist())
        gone = np.setdiff1d(np.arange(len(points)), found)
        last = front_of[found].max()
        assert front_of[gone].min() >= last
        if (front_of[gone] == last).any():  # the last front is shared between survivors and others
            shared += 1
            assert room[found][front_of[found] == last].min() >= room[gone][front_of[gone] == last].max() - 1e-12
    assert shared > 10


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


def test_nsga2_never_loses_its_ends_nor_area_unless_its_front_outgrows_it_and_the_users_front_loses_nothing() -> None:
    """A front that is larger than the population is thinned by crowding, which may cost area, but not the ends."""
    space, size, fitted, thinned = searching.space(), 16, 0, 0
    for seed in range(3):
        answer = useful(space, seed)
        trying, algorithm, asked = evolving(space, answer, anywhere(space, size, seed), seed)
        corner = (1.0, space.cost_ms(space.costs.dense))
        genetic.generation(trying, algorithm)
        before = algorithm.pop.get("F")
        largest = front.hypervolume(before, corner)
        while trying.left > size and genetic.generation(trying, algorithm):
            after = algorithm.pop.get("F")
            points = np.concatenate([before, asked[-1].get("F")])
            assert (after.min(axis=0) == points.min(axis=0)).all()
            areas = [front.hypervolume(each, corner) for each in (before, points, after)]
            if by_peeling(points).count(0) <= size:
                fitted += 1
                assert areas[2] == pytest.approx(areas[1], rel=1e-12)
                assert areas[2] >= areas[0] * (1 - 1e-12)
            else:
                thinned += areas[2] < areas[1] * (1 - 1e-9)
            before, largest = after, max(largest, areas[1])
        plans = front.of(trying.candidates)
        given = np.array([[1 - plan.accuracy, plan.predicted_ms] for plan in plans])
        judged = np.array([[1 - c.evaluation.accuracy, c.predicted_ms] for c in trying.candidates])
        assert front.hypervolume(given, corner) == pytest.approx(front.hypervolume(judged, corner), rel=1e-12)
        assert front.hypervolume(given, corner) >= largest * (1 - 1e-12)
        assert all(answer(plan.widths).accuracy == plan.accuracy for plan in plans)
    assert fitted > 5
    assert thinned > 5


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
