"""Candidates are judged once each, counted, and remembered in the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..records import Evaluation, Progress
from .journal import Key
from .space import Space, Units

STALLED = 20  # rounds without a new candidate: a small space is exhausted
Judges = Callable[[Sequence[Units]], Iterator[tuple[int, Evaluation]]]  # (position, found), as they finish


@dataclass(frozen=True, eq=False)
class Candidate:
    """A network that was cut and judged."""

    units: Units
    predicted_ms: float
    evaluation: Evaluation


class Memory(Protocol):
    """What was judged before (see `Journal`)."""

    known: dict[Key, Evaluation]

    def add(self, key: Key, found: Evaluation) -> None:
        """Keep one more."""


class Trying:
    """Answers a strategy's questions; asked for the same widths twice, it judges once and counts once."""

    def __init__(
        self, space: Space, judges: Judges, memory: Memory, evaluations: int, progress: Progress, by: str = "loss"
    ) -> None:
        self.space, self.evaluations, self.by = space, evaluations, by
        self._judges, self._memory, self._progress = judges, memory, progress
        self._seen: dict[Key, Candidate] = {}
        self._idle = 0

    @property
    def left(self) -> int:
        """Different candidates that may still be judged; none when nothing new has been asked for long."""
        return 0 if self._idle >= STALLED else self.evaluations - len(self._seen)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All so far, in the order in which they were asked for."""
        return tuple(self._seen.values())

    def worth(self, candidate: Candidate) -> float:
        """Larger is better."""
        found = candidate.evaluation
        return found.accuracy if self.by == "accuracy" else -found.loss

    def best(self, candidates: Sequence[Candidate]) -> Candidate:
        """The one worth most; of equal ones that of least loss, and then the first."""
        return max(candidates, key=lambda c: (self.worth(c), -c.evaluation.loss))

    def all(self, asked: Sequence[Units]) -> list[Candidate]:
        """Judge several at once.

        Returns:
            as many as there are evaluations left for, from the first on.
        """
        keys = [self.space.key(units) for units in asked]
        new: list[Key] = []
        for at, key in enumerate(keys):
            if key in self._seen or key in new:
                continue
            if len(self._seen) + len(new) == self.evaluations:
                keys = keys[:at]
                break
            new.append(key)
        self._idle = 0 if new else self._idle + 1
        self._judge([key for key in new if key not in self._memory.known])
        for key in new:
            units = self.space.units(key)
            self._seen[key] = Candidate(units, self.space.cost_ms(units), self._memory.known[key])
        self._progress(len(self._seen), self.evaluations)
        return [self._seen[key] for key in keys]

    def _judge(self, keys: Sequence[Key]) -> None:
        judged = self._judges([self.space.units(key) for key in keys])
        for done, (at, found) in enumerate(judged, len(self._seen) + 1):
            self._memory.add(keys[at], found)
            self._progress(min(done, self.evaluations), self.evaluations)
