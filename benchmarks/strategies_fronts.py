"""Fronts of benchmarks/strategies.py: evolved ones, and those of random networks of equal number.

Their searches are apart from those for one latency: as many networks each, after the same first generation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import record
from numpy.typing import NDArray
from strategies_tables import FOLDER, name

from edgeprune import allocate, finetune, search
from edgeprune.config import GeneticSection, SearchSection
from edgeprune.finetune import Images
from edgeprune.records import Evaluation
from edgeprune.search import Candidate, Space, Subject, Trying, front, genetic, genotype, workers
from edgeprune.search.journal import Journal, read
from edgeprune.search.space import Units
from edgeprune.watch import Silent

if TYPE_CHECKING:
    from strategies import Comparison

EVOLVED, ANYWHERE = "front", "anywhere"
AT_ONCE = 8  # random networks
CHANCE = 0.9  # the error of guessing


def both(comparison: Comparison, share: float, seed: int) -> None:
    """Search both fronts of a seed, and judge them once more on the final images; kept.

    Args:
        share: of the dense latency: where the genetic search carries the last of its networks to.
    """
    asked = comparison.options.front_evaluations
    for arm, searched in (("genetic", _evolved), (ANYWHERE, _anywhere)):
        at = f"{FOLDER}/fronts/{name(arm, share, seed)}"
        known = record.load(at)
        if known is None:
            known = {"arm": arm, "seed": seed, "asked": asked, **_front(comparison, searched, share, seed)}
            record.save(at, known)
            print(f"{at}: {len(known['plans'])} plans of {known['evaluations']} networks", flush=True)
        if known["asked"] != asked:
            raise SystemExit(f"{at} was asked for {known['asked']} evaluations: delete it, or ask for as many")


Searched = Callable[["Comparison", Space, float, int], Sequence[Candidate]]


def _front(comparison: Comparison, searched: Searched, share: float, seed: int) -> dict[str, Any]:
    options = comparison.options
    space = Space(comparison.costs, comparison.case.scores, (share * comparison.dense_ms,))
    began = time.monotonic()
    candidates = searched(comparison, space, share, seed)
    minutes = (time.monotonic() - began) / 60
    subject = comparison.subject(ANYWHERE, share, seed)
    choices = front.of(candidates)
    with workers.answering(_Final(subject, comparison.case.images.final), _settings(comparison)) as answers:
        found = dict(answers([choice.widths for choice in choices]))
    plans = [
        {**asdict(choice), "final_accuracy": found[at].accuracy, "final_loss": found[at].loss}
        for at, choice in enumerate(choices)
    ]
    volumes = {key: _volume(comparison, plans, key) for key in ("accuracy", "final_accuracy")}
    return {
        "evaluations": len(candidates), "images": options.images, "minutes": minutes, "workers": options.workers,
        "plans": plans, **volumes,
    }  # fmt: skip


def _evolved(comparison: Comparison, space: Space, share: float, seed: int) -> list[Candidate]:
    subject = comparison.subject(EVOLVED, share, seed)
    search.find(subject, space, "genetic", _settings(comparison), 1, seed, Silent())
    judged = read(subject.run.path(search.JOURNAL))
    return [Candidate(units := space.units(key), space.cost_ms(units), found) for key, found in judged]


def _anywhere(comparison: Comparison, space: Space, share: float, seed: int) -> tuple[Candidate, ...]:
    """The genetic search's first generation, then random parts of the channels go, at random latencies.

    What the genetic search has judged already is not judged again, but counts.
    """
    costs, settings = comparison.costs, _settings(comparison)
    subject = comparison.subject(ANYWHERE, share, seed)
    evolved = dict(read(comparison.subject(EVOLVED, share, seed).run.path(search.JOURNAL)))
    journal = Journal(subject.run.path(search.JOURNAL), tuple(costs.candidates))
    journal.known.update(evolved)
    draw = np.random.Generator(np.random.PCG64(seed))
    with closing(journal), workers.judges(subject, settings) as judges:
        trying = Trying(space, judges, journal, settings.evaluations, lambda done, of: None)
        first = genetic.beginning(trying, GeneticSection(), genetic.population(settings.evaluations), draw)
        trying.all([genotype.decode(space, genome) for genome in first])
        while (left := len(evolved) - len(trying.candidates)) > 0:
            trying.all([_drawn(space, draw) for _ in range(min(left, AT_ONCE))])
        return trying.candidates


def _drawn(space: Space, draw: np.random.Generator) -> Mapping[str, int]:
    costs = space.costs
    least_ms, dense_ms = allocate.floor(costs).predicted_ms, costs.predict_ms(costs.dense)
    sizes: NDArray[np.float64] = np.array([costs.dense[g] for g in space.groups], dtype=float)
    level = replace(space, budgets_ms=(draw.uniform(least_ms, dense_ms),))
    parts = np.maximum(draw.dirichlet(np.ones(len(sizes))) * sizes, 1e-9)
    return level.removing(dict(zip(space.groups, parts.tolist(), strict=True))).widths


def _settings(comparison: Comparison) -> SearchSection:
    options = comparison.options
    return SearchSection(  # type: ignore[call-arg]
        evaluations=options.front_evaluations, images=options.images, workers=options.workers
    )


@dataclass(frozen=True, eq=False)
class _Final:
    """Judges networks once more, on all images that nothing was chosen by."""

    subject: Subject
    images: Images

    def __call__(self, units: Units) -> Evaluation:
        module = self.subject.cut(units)
        self.subject.task.adapt(module)
        return finetune.judge(module, self.images, len(self.images), 0)

    def named(self, units: Units) -> str:
        return f"the widths {dict(units)}"


def _volume(comparison: Comparison, plans: list[Mapping[str, Any]], key: str) -> float:
    """Of the area between guessing at the dense latency and no error in no time."""
    corner = (CHANCE, comparison.costs.predict_ms(comparison.costs.dense))
    points = np.array([[1 - p[key], p["predicted_ms"]] for p in plans])
    return front.hypervolume(points, corner) / (corner[0] * corner[1])
