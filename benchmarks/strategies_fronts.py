"""Fronts of benchmarks/strategies.py: evolved ones, and those of random networks of equal number."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import record
from strategies_tables import FOLDER, name

from edgeprune import allocate, finetune, search
from edgeprune.config import GeneticSection, SearchSection
from edgeprune.search import Candidate, Space, Subject, Trying, front, genetic, genotype, workers
from edgeprune.search.front import Choice
from edgeprune.search.journal import Journal, read

if TYPE_CHECKING:
    from strategies import Comparison

ANYWHERE = "anywhere"
CHANCE = 0.9  # the error of guessing


def both(comparison: Comparison, share: float, seed: int) -> None:
    """Judge both fronts of a seed once more, on the final images; kept."""
    evolved = comparison.subject("genetic", share, seed)
    if not evolved.run.has(f"{front.NAME}.json"):
        print(f"genetic has not searched with seed {seed} yet: --search --arms genetic", flush=True)
        return
    for arm in ("genetic", ANYWHERE):
        at = f"{FOLDER}/fronts/{name(arm, share, seed)}"
        if record.load(at) is None:
            candidates = _evolved(comparison, evolved) if arm == "genetic" else _anywhere(comparison, share, seed)
            plans = [_again(comparison, evolved, choice) for choice in front.of(candidates)]
            volumes = {key: _volume(comparison, plans, key) for key in ("accuracy", "final_accuracy")}
            record.save(at, {"arm": arm, "seed": seed, "evaluations": len(candidates), "plans": plans, **volumes})
            print(f"{at}: {len(plans)} plans, hypervolume {volumes}", flush=True)


def _evolved(comparison: Comparison, subject: Subject) -> list[Candidate]:
    space = Space(comparison.costs, comparison.case.scores, ())
    judged = read(subject.run.path(search.JOURNAL))
    return [Candidate(units := space.units(key), space.cost_ms(units), found) for key, found in judged]


def _anywhere(comparison: Comparison, share: float, seed: int) -> tuple[Candidate, ...]:
    """The genetic search's first generation, then random parts of the channels go, at random latencies.

    What the genetic search has judged already is not judged again, but counts.
    """
    costs, scores, options = comparison.costs, comparison.case.scores, comparison.options
    space = Space(costs, scores, (share * comparison.dense_ms,))
    subject = comparison.subject(ANYWHERE, share, seed)
    journal = Journal(subject.run.path(search.JOURNAL), tuple(costs.candidates))
    journal.known.update(read(comparison.subject("genetic", share, seed).run.path(search.JOURNAL)))
    settings = SearchSection(images=options.images, workers=options.workers)  # type: ignore[call-arg]
    draw = np.random.Generator(np.random.PCG64(seed))
    least_ms, dense_ms = allocate.floor(costs).predicted_ms, costs.predict_ms(costs.dense)
    sizes = np.array([costs.dense[g] for g in space.groups], dtype=float)
    with closing(journal), workers.judges(subject, settings) as judges:
        trying = Trying(space, judges, journal, options.evaluations, lambda done, of: None)
        first = genetic.beginning(trying, GeneticSection(), genetic.population(trying.evaluations), draw)
        trying.all([genotype.decode(space, genome) for genome in first])
        while trying.left:
            level = replace(space, budgets_ms=(draw.uniform(least_ms, dense_ms),))
            parts = np.maximum(draw.dirichlet(np.ones(len(sizes))) * sizes, 1e-9)
            trying.all([level.removing(dict(zip(space.groups, parts.tolist(), strict=True))).widths])
        return trying.candidates


def _again(comparison: Comparison, subject: Subject, choice: Choice) -> dict[str, Any]:
    module = subject.cut(choice.widths)
    subject.task.adapt(module)
    final = comparison.case.images.final
    found = finetune.judge(module, final, len(final), 0)
    return {**asdict(choice), "final_accuracy": found.accuracy, "final_loss": found.loss}


def _volume(comparison: Comparison, plans: list[Mapping[str, Any]], key: str) -> float:
    """Of the area between guessing at the dense latency and no error in no time."""
    corner = (CHANCE, comparison.costs.predict_ms(comparison.costs.dense))
    points = np.array([[1 - p[key], p["predicted_ms"]] for p in plans])
    return front.hypervolume(points, corner) / (corner[0] * corner[1])
