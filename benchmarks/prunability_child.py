"""What the child processes of the prunability benchmark do: one network, by edgeprune or by Torch-Pruning.

Seconds are processor seconds of one thread: other work on the machine does not count.
"""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgeprune import proof, surgery
from edgeprune.graph import ModelGraph, as_call, trace

CHECKS = ("some", "all", "none")  # exact groups cut one by one; "none": nothing is compared, only timed
CHECK_S = 0.6  # as many groups are cut one by one as fit: each costs about as much as tracing and cutting
LARGEST_SAMPLE = 6


def edgeprune_on(model: nn.Module, example: Any, checks: str) -> dict[str, Any]:
    """Trace, cut half of every group, and compare cut networks with masked ones."""
    began = time.process_time()
    graph = trace(model, example)
    traced = time.process_time()
    cut = surgery.cut(model, graph, {g.id: tuple(range((g.width + 1) // 2)) for g in graph.groups})
    done = time.process_time()
    found = {
        "params": graph.total_params,
        "input": [list(leaf.shape) for leaf in tree_leaves(example) if isinstance(leaf, Tensor)],
        "groups": len(graph.groups),
        "inexact_groups": sum(1 for g in graph.groups if g.inexact),
        "prunable": graph.prunable_weights / graph.total_weights,
        "frozen": _reasons(graph),
        "trace_s": traced - began,
        "cut_s": done - traced,
        "users_class": type(cut) is type(model),
        "params_cut": sum(p.numel() for p in cut.parameters()),
    }
    if checks == "none":
        return {"trace_s": found["trace_s"], "cut_s": found["cut_s"]}
    del cut
    all_groups = checks == "all"
    sample = None if all_groups else max(1, min(LARGEST_SAMPLE, int(CHECK_S / (done - began))))
    proved = proof.check(model, example, sample=sample, dtype=torch.float64 if all_groups else torch.float32)
    return found | {
        "deviation": proved.max_deviation,
        "worst": proved.worst,
        "checked": proved.checked,
        "exact": proved.exact,
        "blocks_checked": proved.blocks,
        "blind": len(proved.blind),
    }


def _reasons(graph: ModelGraph) -> list[list[Any]]:
    """[channels, reason without the module's name and folders], most channels first."""
    counts: Counter[str] = Counter()
    for frozen in graph.frozen:
        reason = re.sub(r" \(in [^()]*\)$", "", frozen.reason)
        counts[re.sub(r"/\S*/", "", reason)] += frozen.channels
    return [[channels, reason] for reason, channels in counts.most_common(4)]


def torch_pruning_on(model: nn.Module, example: Any) -> dict[str, Any]:
    """Torch-Pruning with random importance at ratio 0.5, told which layers make the outputs and the heads there are."""
    import torch_pruning as tp

    makers = _output_layers(model, example)
    args, kwargs = as_call(example)
    inputs = args[0] if len(args) == 1 and not kwargs else (args or kwargs)
    dense, before = _shapes(model, example), sum(p.numel() for p in model.parameters())
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    heads = {m: n for m, n in heads.items() if isinstance(m, nn.Linear)}
    vit = type(model).__name__ == "VisionTransformer" and hasattr(model, "conv_proj")
    began = time.process_time()
    pruner = tp.pruner.BasePruner(
        model, inputs, tp.importance.RandomImportance(), pruning_ratio=0.5, ignored_layers=makers, num_heads=heads,
        round_to=model.encoder.layers[0].num_heads if vit else None,
    )  # fmt: skip
    pruner.step()
    seconds = time.process_time() - began
    if vit:  # as its own benchmark does
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


def _output_layers(model: nn.Module, example: Any) -> list[nn.Module]:
    """The layers whose outputs leave the network: a user of Torch-Pruning lists them by hand."""
    graph = trace(model, example)
    tensors = {t for f in graph.frozen if f.reason == "the network's output" for t in f.tensors}
    return [m for name, m in model.named_modules() if f"{name}.weight" in tensors]


def _shapes(model: nn.Module, example: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in proof.outputs(model, example)]


def run(tool: str, model: nn.Module, example: Any, checks: str) -> dict[str, Any]:
    """Everything about one network by one tool; what it raises becomes the result "crash"."""
    warnings.simplefilter("ignore")
    try:
        return edgeprune_on(model, example, checks) if tool == "edgeprune" else torch_pruning_on(model, example)
    except Exception as error:  # the benchmark records whatever a tool does
        return {"outcome": "crash", "error": f"{type(error).__name__}: {error}"[:300]}
