"""Who judges candidates: this process, or workers of a Ray cluster. The answers do not depend on it."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .. import userfile
from ..config import SearchSection
from ..errors import UsageError, WorkerError
from ..records import Evaluation
from .space import Units
from .subject import Subject, one_thread
from .trying import Judges

RETRIES = 3  # a candidate that kills this many workers is at fault itself


@contextmanager
def judges(subject: Subject, settings: SearchSection) -> Iterator[Judges]:
    """Whatever `[search] workers` and `ray` ask for.

    Raises:
        UsageError: Ray is needed and not installed; WorkerError: a candidate's workers die again and again.
    """
    if settings.workers == 1 and not settings.ray:
        with one_thread():
            yield lambda asked: ((at, _judge(subject, units, settings.images)) for at, units in enumerate(asked))
        return
    if importlib.util.find_spec("ray") is None:
        raise UsageError("more than one worker needs Ray: pip install 'edgeprune[search]', or set search.workers = 1")
    with _cluster(settings) as ray:
        yield _Pool(ray, subject, settings).judge


def _judge(subject: Subject, units: Units, images: int) -> Evaluation:
    """A network whose loss is not finite is as bad as can be."""
    found = subject.judge(units, images)
    return found if math.isfinite(found.loss) else Evaluation(math.inf, found.accuracy)


@contextmanager
def _cluster(settings: SearchSection) -> Iterator[Any]:
    """A Ray that was running is joined and left as it is; one of our own ends with the search."""
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
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        yield ray
    finally:
        if not joined:
            ray.shutdown()


class _Pool:
    """Workers that each hold the network; one that dies is replaced and its candidate judged by another."""

    def __init__(self, ray: Any, subject: Subject, settings: SearchSection) -> None:
        self.ray, self.settings = ray, settings
        for name, module in list(sys.modules.items()):
            if name.startswith(userfile.PREFIX):  # the user's own files travel with the network
                ray.cloudpickle.register_pickle_by_value(module)
        self.subject = ray.put(subject)
        self.idle = [self._worker() for _ in range(settings.workers)]

    def _worker(self) -> Any:
        return self.ray.remote(num_cpus=1, max_restarts=0)(_Worker).remote(self.subject, self.settings.images)

    def judge(self, asked: Sequence[Units]) -> Iterator[tuple[int, Evaluation]]:
        waiting = list(enumerate(asked))[::-1]
        running: dict[Any, tuple[int, Any]] = {}
        deaths = dict.fromkeys(range(len(asked)), 0)
        while waiting or running:
            while waiting and self.idle:
                at, units = waiting.pop()
                worker = self.idle.pop()
                running[worker.judge.remote(dict(units))] = (at, worker)
            (done, *_), _ = self.ray.wait(list(running))
            at, worker = running.pop(done)
            try:
                found: Evaluation = self.ray.get(done)
            except self.ray.exceptions.RayActorError as error:
                deaths[at] += 1
                if deaths[at] == RETRIES:
                    raise WorkerError(_told(asked[at], str(error))) from error
                self.idle.append(self._worker())
                waiting.append((at, asked[at]))
                continue
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause from error  # the user's own code
            self.idle.append(worker)
            yield at, found


def _told(units: Units, error: str) -> str:
    last = error.strip().splitlines()[-1].strip()
    return (
        f"the widths {dict(units)} ended {RETRIES} workers, the last one with: {last}. Memory may be short: lower "
        "search.workers, then go on with --resume"
    )


class _Worker:
    """Lives in a process of its own."""

    def __init__(self, subject: Subject, images: int) -> None:
        self.subject, self.images = subject, images

    def judge(self, units: Units) -> Evaluation:
        with one_thread():
            return _judge(self.subject, units, self.images)
