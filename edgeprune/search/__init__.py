"""Strategies that try candidates: cut for real, batch norm re-estimated, judged on the search split, never the final.

    found = find(subject, space, "rl", settings, seed, watch)       # a Candidate; its widths are carried to a budget

What was judged is in the step's search.jsonl: a search that was killed asks the same questions again, has the answers
already, and ends with the same result. Nor does the result depend on how many workers judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from ..config import SearchSection
from ..runs import Run
from ..watch import Watch
from . import front, genetic, randomly, rl, workers
from .journal import Journal
from .space import Space
from .subject import Subject
from .trying import Candidate, Trying

__all__ = ["NAMES", "Candidate", "Space", "Subject", "Trying", "find"]

NAMES = ("rl", "genetic", "random-search")
JOURNAL = "search.jsonl"


def find(
    subject: Subject, space: Space, strategy: str, settings: SearchSection, steps: int, seed: int, watch: Watch
) -> Candidate:
    """Search widths for a budget.

    Args:
        subject: the network, its scores, and the folder for the journal.
        space: widths on offer, costs, and the budget.
        strategy: one of `NAMES`.
        settings: see [search].
        steps: that share the evaluations.
        seed: of everything drawn.
        watch: who is told.
    Raises:
        UnreachableBudget: not even the smallest network meets the budget.
    """
    journal = Journal(subject.run.path(JOURNAL), tuple(space.costs.candidates))
    evaluations = max(1, settings.evaluations // steps)
    stage = watch.stage(f"judge candidates, {strategy}")
    with closing(journal), stage as progress, workers.judges(subject, settings) as judges:
        trying = Trying(space, judges, journal, evaluations, progress, settings.by)
        found = _search(trying, strategy, settings, seed)
    if strategy == "genetic":
        write_front(subject.run, space, trying.candidates)
    told = f"loss {found.evaluation.loss:.4f}, accuracy {found.evaluation.accuracy:.2%}"
    watch.say(f"best of {len(trying.candidates)}: {told} at {found.predicted_ms:.4g} ms")
    return found


def _search(trying: Trying, strategy: str, settings: SearchSection, seed: int) -> Candidate:
    if strategy == "rl":
        return rl.search(trying, settings.rl, seed)
    if strategy == "genetic":
        return genetic.search(trying, settings.genetic, seed)
    return randomly.search(trying, seed)


def write_front(run: Run, space: Space, candidates: Sequence[Candidate]) -> None:
    """The Pareto front as plans, and as a picture."""
    choices = front.of(candidates)
    run.write(f"{front.NAME}.json", front.FORMAT, {"budget_ms": space.budgets_ms[0], "plans": choices})
    front.draw(choices, candidates, space.budgets_ms[0], run.path(f"{front.NAME}.html"))
