"""Who is told how a long run goes: the command line, a notebook, or nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from .records import Progress


class Watch(Protocol):
    def stage(self, title: str) -> AbstractContextManager[Progress]:
        """A piece of work that takes a while; yields a function that is told (done, of)."""

    def say(self, text: str) -> None:
        """One line worth knowing."""


def unwatched(done: int, of: int) -> None:
    """The progress of what nobody waits for."""


class Silent:
    """Tells nobody."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Progress]:
        yield unwatched

    def say(self, text: str) -> None:
        pass
