"""Who judges cut networks: this process, or workers of a Ray cluster. The answers do not depend on it.

with workers.answering(ask, settings) as answers:        # `ask` travels to every worker once
    for position, answer in answers(questions): ...      # as they finish
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .. import userfile
from ..config import SearchSection, Workers
from ..errors import UsageError, WorkerError
from ..records import Evaluation
from .space import Units
from .subject import Subject, one_thread
from .trying import Judges

RETRIES = 3  # a question that kills this many workers is at fault itself
NEVER_RAN = "The actor never ran"  # as Ray says it
KNOCK_S = 10.0  # until a cluster's address counts as silent
Question = TypeVar("Question")
Answer = TypeVar("Answer")
Asked = TypeVar("Asked", contravariant=True)
Given = TypeVar("Given", covariant=True)
Answers = Callable[[Sequence[Question]], Iterator[tuple[int, Answer]]]  # (position, answer), as they finish


class Ask(Protocol[Asked, Given]):
    """What a worker holds."""

    def __call__(self, question: Asked, /) -> Given:
        """The answer, the same in every process."""

    def named(self, question: Asked, /) -> str:
        """The question in words."""


@contextmanager
def judges(subject: Subject, settings: SearchSection) -> Iterator[Judges]:
    """Those of a search's candidates."""
    with answering(_Judge(subject, settings.images), settings) as answers:
        yield answers


@contextmanager
def answering(ask: Ask[Question, Answer], settings: Workers) -> Iterator[Answers[Question, Answer]]:
    """Whatever `workers` and `ray` ask for.

    Raises:
        UsageError: Ray is needed and not installed; WorkerError: a question's workers die again and again.
    """
    if settings.workers == 1 and not settings.ray:
        with one_thread():
            yield lambda questions: ((at, ask(question)) for at, question in enumerate(questions))
        return
    if importlib.util.find_spec("ray") is None:
        raise UsageError("more than one worker needs Ray: pip install 'edgeprune[search]', or set workers = 1")
    with _cluster(settings) as ray:
        yield _Pool(ray, ask, settings.workers).answers


@dataclass(frozen=True, eq=False)
class _Judge:
    """Cuts the network to the widths of a candidate."""

    subject: Subject
    images: int

    def __call__(self, units: Units) -> Evaluation:
        """A network whose loss is not finite is as bad as can be."""
        found = self.subject.judge(units, self.images)
        return found if math.isfinite(found.loss) else Evaluation(math.inf, found.accuracy)

    def named(self, units: Units) -> str:
        return f"the widths {dict(units)}"


@contextmanager
def _cluster(settings: Workers) -> Iterator[Any]:
    """A Ray that was running is joined and left as it is; one of our own ends with the search."""
    _knock(settings.ray)
    # without it, Ray warns that a later release will treat processes without a GPU differently
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    joined = ray.is_initialized()
    if not joined:
        address = settings.ray or "local"
        local: dict[str, Any] = {}
        if address == "local":  # its workers import what this process can
            paths = os.pathsep.join(path for path in sys.path if path)
            local = {"num_cpus": settings.workers, "include_dashboard": False}
            local["runtime_env"] = {"env_vars": {"PYTHONPATH": paths}}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
        except ConnectionError as error:
            raise WorkerError(
                f"the Ray cluster at {address} cannot be joined ({error}): is it running, with the same Ray and Python "
                "as here? One that asks for a token, as Ray does by default, needs RAY_AUTH_MODE=token here, too"
            ) from error
    try:
        yield ray
    finally:
        if not joined:
            ray.shutdown()


def _knock(address: str) -> None:
    """Ray itself tries for minutes where nobody listens."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return  # no address, auto, or a protocol of Ray's
    try:
        socket.create_connection((host, int(port)), KNOCK_S).close()
    except OSError as error:
        raise WorkerError(
            f"no Ray cluster answers at {address} ({error}): is it running? `ray start --head` begins one"
        ) from error


class _Pool:
    """Workers that each hold what is asked; one that dies is replaced and its question answered by another."""

    def __init__(self, ray: Any, ask: Ask[Any, Any], workers: int) -> None:
        self.ray, self.named = ray, ask.named
        for name, module in list(sys.modules.items()):
            if name.startswith(userfile.PREFIX):  # the user's own files travel with the network
                ray.cloudpickle.register_pickle_by_value(module)
        self.ask = ray.put(ask)
        self.idle = [self._worker() for _ in range(workers)]

    def _worker(self) -> Any:
        return self.ray.remote(num_cpus=1, max_restarts=0)(_Worker).remote(self.ask)

    def answers(self, questions: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        waiting = list(enumerate(questions))[::-1]
        running: dict[Any, tuple[int, Any]] = {}
        deaths = dict.fromkeys(range(len(questions)), 0)
        while waiting or running:
            while waiting and self.idle:
                at, question = waiting.pop()
                worker = self.idle.pop()
                running[worker.answer.remote(question)] = (at, worker)
            (done, *_), _ = self.ray.wait(list(running))
            at, worker = running.pop(done)
            try:
                found = self.ray.get(done)
            except self.ray.exceptions.RayActorError as error:
                deaths[at] += 1
                if deaths[at] == RETRIES:
                    raise WorkerError(_told(self.named(questions[at]), str(error))) from error
                self.idle.append(self._worker())
                waiting.append((at, questions[at]))
                continue
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause from error  # the user's own code
            self.idle.append(worker)
            yield at, found


def _told(question: str, error: str) -> str:
    last = error.strip().splitlines()[-1].strip()
    if NEVER_RAN in error:
        return (
            f"Ray started no worker for {question}: {last} A cluster without tokens starts none for a process that has "
            "them, as any has that began a Ray of its own. Go on with --resume in a new process, without RAY_AUTH_MODE"
        )
    return (
        f"{question} ended {RETRIES} workers, the last one with: {last}. Memory may be short: ask for fewer workers, "
        "then go on with --resume"
    )


class _Worker:
    """Lives in a process of its own."""

    def __init__(self, ask: Ask[Any, Any]) -> None:
        self.ask = ask

    def answer(self, question: Any) -> Any:
        with one_thread():
            return self.ask(question)
