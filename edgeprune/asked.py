"""What is asked of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .config import MagnitudeSection, SearchSection, SoftSection
from .records import Budget


@dataclass(frozen=True)
class Asked:
    """What to reach and how; see [compress] in the project file."""

    budget: Budget
    strategy: str
    importance: str
    steps: int
    protected: tuple[str, ...]
    min_width: float
    drop_blocks: bool
    accuracy_floor: float | None
    floors: Mapping[str, float]
    back_off: int
    seed: int
    search: SearchSection | None = None  # of strategies that try candidates
    magnitude: MagnitudeSection | None = None  # of the strategy of that name
    soft: SoftSection | None = None
