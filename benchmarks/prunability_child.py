"""What the child processes of the prunability benchmark do: one network, by edgeprune or by Torch-Pruning.

Seconds are processor seconds of one thread: other work on the machine does not count.
"""

from __future__ import annotations

import copy
import gc
import itertools
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgeprune import importance, proof, surgery
from edgeprune.graph import ModelGraph, as_call, trace

CHECKS = ("some", "all")  # exact groups cut one by one
CHECK_S = 0.6  # as many groups are cut one by one as fit: each costs about as much as tracing and cutting
LARGEST_SAMPLE = 6
ROUNDS = 3
LONG_S = 2.0  # a round that takes longer is the last


def edgeprune_on(model: nn.Module, example: Any, checks: str) -> dict[str, Any]:
    """Trace, cut half of every group, and compare cut networks with masked ones."""
    graph, cut, took = _traced_and_cut(model, example)
    found = {
        "params": graph.total_params,
        "input": [list(leaf.shape) for leaf in tree_leaves(example) if isinstance(leaf, Tensor)],
        "groups": len(graph.groups),
        "inexact_groups": sum(1 for g in graph.groups if g.inexact),
        "prunable": graph.prunable_weights / graph.total_weights,
        "frozen": _reasons(graph),
        **took,
        "users_class": type(cut) is type(model),
        "params_cut": sum(p.numel() for p in cut.parameters()),
    }
    del cut
    all_groups = checks == "all"
    sample = None if all_groups else max(1, min(LARGEST_SAMPLE, int(CHECK_S / sum(took.values()))))
    proved = proof.check(model, example, sample=sample, dtype=torch.float64 if all_groups else torch.float32)
    return found | {
        "deviation": proved.max_deviation,
        "worst": proved.worst,
        "checked": proved.checked,
        "exact": proved.exact,
        "blocks_checked": proved.blocks,
        "blind": len(proved.blind),
    }


def _traced_and_cut(
    model: nn.Module, example: Any, ranked: bool = False
) -> tuple[ModelGraph, nn.Module, dict[str, float]]:
    """Half of every group goes: the second half, or what has the smaller L2 norm."""
    began = time.process_time()
    graph = trace(model, example)
    traced = time.process_time()
    halves = {g.id: (g.width + 1) // 2 for g in graph.groups}
    if ranked:
        keep = importance.best(importance.score(model, graph.groups, "l2"), halves)
    else:
        keep = {group: tuple(range(half)) for group, half in halves.items()}
    cut = surgery.cut(model, graph, keep)
    return graph, cut, {"trace_s": traced - began, "cut_s": time.process_time() - traced}


def _reasons(graph: ModelGraph) -> list[list[Any]]:
    """[channels, reason without the module's name and folders], most channels first."""
    counts: Counter[str] = Counter()
    for frozen in graph.frozen:
        reason = re.sub(r" \(in [^()]*\)$", "", frozen.reason)
        counts[re.sub(r"/\S*/", "", reason)] += frozen.channels
    return [[channels, reason] for reason, channels in counts.most_common(4)]


def torch_pruning_on(model: nn.Module, example: Any) -> dict[str, Any]:
    """What Torch-Pruning makes of a network, which it changes in place."""
    dense, before = _shapes(model, example), sum(p.numel() for p in model.parameters())
    seconds = _torch_pruned_s(model, example, _output_layers(model, example), ranked=False)
    if _is_torchvision_vit(model):  # as its own benchmark does
        model.hidden_dim = model.conv_proj.out_channels
    after = sum(p.numel() for p in model.parameters())
    found: dict[str, Any] = {"seconds": seconds, "params_cut": after}
    try:
        shapes = _shapes(model, example)
    except Exception as error:  # whatever the broken network raises
        return found | {"outcome": "wrong", "error": f"{type(error).__name__}: {error}"[:200]}
    if shapes != dense:
        return found | {"outcome": "wrong", "error": f"outputs of shape {shapes[:3]}, not {dense[:3]}"}
    return found | {"outcome": "runs" if after < before else "cuts nothing"}


def _torch_pruned_s(model: nn.Module, example: Any, makers: Sequence[str], ranked: bool) -> float:
    """Prune at ratio 0.5 by L2 norm, or at random; told which layers make the outputs and how many heads there are."""
    import torch_pruning as tp

    args, kwargs = as_call(example)
    inputs = args[0] if len(args) == 1 and not kwargs else (args or kwargs)
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    heads = {m: n for m, n in heads.items() if isinstance(m, nn.Linear)}
    rounded = model.encoder.layers[0].num_heads if _is_torchvision_vit(model) else None
    ignored = [m for name, m in model.named_modules() if name in makers]
    scores = tp.importance.GroupMagnitudeImportance(p=2) if ranked else tp.importance.RandomImportance()
    began = time.process_time()
    pruner = tp.pruner.BasePruner(
        model, inputs, scores, pruning_ratio=0.5, ignored_layers=ignored, num_heads=heads, round_to=rounded,
    )  # fmt: skip
    pruner.step()
    return time.process_time() - began


def _is_torchvision_vit(model: nn.Module) -> bool:
    return type(model).__name__ == "VisionTransformer" and hasattr(model, "conv_proj")


def _output_layers(model: nn.Module, example: Any) -> list[str]:
    """The layers whose outputs leave the network: a user of Torch-Pruning lists them by hand."""
    graph = trace(model, example)
    tensors = {t for f in graph.frozen if f.reason == "the network's output" for t in f.tensors}
    return [name for name, _ in model.named_modules() if f"{name}.weight" in tensors]


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after so many processor seconds.

    A look every second: a timer of processor time would make the clock that is read here go in steps of 4 ms.
    """
    began = time.process_time()

    def look(*_: Any) -> None:
        if time.process_time() - began > seconds:
            raise TimeoutError

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def timed(tools: Sequence[str], model: nn.Module, example: Any, limit_s: float) -> dict[str, dict[str, Any]]:
    """The least seconds of each tool over a few rounds in which they take turns; also where channels are ranked.

    A run of Torch-Pruning that takes `limit_s` processor seconds is stopped.
    """
    warnings.simplefilter("ignore")
    makers = _output_layers(model, example)
    best: dict[str, dict[str, Any]] = {}
    for _ in range(ROUNDS):
        spent = 0.0
        for tool, ranked in itertools.product(tools, (False, True)):
            subject = copy.deepcopy(model) if tool == "torch-pruning" else model  # it prunes in place
            gc.collect()
            name = f"{tool}, ranked" if ranked else tool
            if tool == "edgeprune":
                took = _traced_and_cut(subject, example, ranked)[2]
            else:
                try:
                    with _limited(limit_s):
                        took = {"seconds": _torch_pruned_s(subject, example, makers, ranked)}
                except TimeoutError:
                    best[name], spent = {"outcome": "limit"}, LONG_S + limit_s
                    continue
                except Exception:  # it fails on some networks where it ranks: those have no second time, see the table
                    if not ranked:
                        raise
                    continue
            best[name] = min(best.get(name, took), took, key=lambda found: sum(found.values()))
            spent += sum(took.values())
        if spent > LONG_S:
            break
    return best


def _shapes(model: nn.Module, example: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in proof.outputs(model, example)]


def run(tool: str, model: nn.Module, example: Any, checks: str) -> dict[str, Any]:
    """Everything about one network by one tool; what it raises becomes the result "crash"."""
    warnings.simplefilter("ignore")
    try:
        return edgeprune_on(model, example, checks) if tool == "edgeprune" else torch_pruning_on(model, example)
    except Exception as error:  # the benchmark records whatever a tool does
        return {"outcome": "crash", "error": f"{type(error).__name__}: {error}"[:300]}
