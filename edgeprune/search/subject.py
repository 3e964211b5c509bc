"""The network that candidates are cut from, and how one is judged: cut for real, batch norm re-estimated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import importance, surgery
from ..finetune import load_state
from ..graph import ModelGraph, trace
from ..importance import Importance
from ..records import Evaluation, Keep
from ..runs import Run
from ..task import Task
from .space import Units

THREADS = 1  # of torch: sums in another order would make a loss depend on the number of workers


@dataclass(frozen=True, eq=False)
class Subject:
    """A network on its way: `student` is `dense` cut by `keep`, and trained since."""

    dense: nn.Module
    graph: ModelGraph
    student: nn.Module
    keep: Keep
    scores: Importance
    task: Task
    run: Run
    protected: tuple[str, ...] = ()  # of the graph

    def __getstate__(self) -> dict[str, Any]:
        """A recording does not travel: workers trace the network again."""
        return {**vars(self), "graph": self.graph.example}

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = trace(state["dense"], state["graph"], state["protected"])
        vars(self).update({**state, "graph": graph})

    def cut(self, units: Units) -> nn.Module:
        """The student with fewer channels."""
        keep = importance.best(self.scores, units)
        module = surgery.cut(self.dense, self.graph, keep)
        narrowed = surgery.narrow(self.student.state_dict(), self.graph, self.keep, keep, module)
        load_state(module, narrowed, self.run.folder)
        return module

    def judge(self, units: Units, images: int) -> Evaluation:
        """Loss and accuracy on so many images of the search split."""
        module = self.cut(units)
        self.task.adapt(module)
        return self.task.judge(module, images)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's own threads are put aside for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
