"""The whole job, top to bottom: trace, score, measure, plan, cut, train, export, verify. Read this first."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np
from torch import nn

from . import files, importance, measure, planning, runs, surgery, verify, widths
from .allocate import Costs
from .finetune import load_state, read_tensors, save_tensors
from .graph import Example, ModelGraph, trace
from .importance import Importance
from .planning import Bench, Chosen
from .records import Artifact, Budget, Keep, LayerRow, Plan, VerifyReport
from .runs import Run
from .store import Store
from .target import Target
from .task import Task
from .watch import Silent, Watch

STEP = "edgeprune.step/1"
VERIFY = "edgeprune.verify/1"
TABLE = "edgeprune.table/1"
LAYERS = "edgeprune.layers/1"


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
    seed: int


@dataclass(frozen=True, eq=False)
class Outcome:
    """A finished run."""

    model: nn.Module
    keep: Keep
    report: VerifyReport
    run: Run


def compress(
    model: nn.Module,
    example: Example,
    target: Target,
    task: Task,
    asked: Asked,
    run: Run,
    store: Store,
    watch: Watch | None = None,
    resume: bool = False,
) -> Outcome:
    """Prune `model` to a latency that is measured on `target`.

    Args:
        model: a trained network; it is not changed.
        example: one input, batch first.
        target: an open target.
        task: how networks are trained and judged.
        asked: the budget and how it is reached.
        run: the folder that everything goes to.
        store: latency measurements of earlier runs.
        watch: who is told how it goes.
        resume: go on in a folder that holds this run already.
    Raises:
        UnreachableBudget: before any training, with the fastest this device can be.
    """
    watch = watch or Silent()
    graph = trace(model, example, asked.protected)
    wanted = {**files.plain(asked), "target": files.plain(target.fingerprint())}
    runs.claim(run, graph, wanted, facts(model, task), resume)
    if not run.has("verify.json"):
        costs = latency_costs(graph, target, asked, store, run, watch)
        with watch.stage("score channels"):
            scores = importance.score(model, graph.groups, asked.importance, task.batches(), asked.seed)
        with watch.stage("export the dense network"):
            bench = Bench(model, graph, target, run.folder)
        start, costs = planning.preflight(bench, costs, scores, run, watch, asked.seed)
        wanted_ms = planning.check_budget(asked.budget, start)
        watch.say(f"dense {start.dense_ms:.4g} ms, floor {start.floor.measured_ms:.4g} ms, budget {wanted_ms:.4g} ms")
        if not run.has("step-1/plan.json"):  # the contract is checked before any training
            first = planning.meet(bench, costs, scores, asked.strategy, wanted_ms, asked.seed, watch)
            watch.say(f"a plan of {first.measured_ms:.4g} ms holds on the device")
        student: nn.Module = model
        keep: Keep = {}
        for step, budget_ms in enumerate(planning.schedule(start.dense_ms, wanted_ms, asked.steps), 1):
            student, keep = prune_step(
                step, student, keep, model, graph, costs, bench, task, asked, budget_ms, run, watch
            )
        write_layers(run, costs, asked.steps)
        runs.save_model(run, student, graph, keep)
        with watch.stage("export the pruned network"):
            artifact = target.export(student, example, run.path("artifact"))
        report = verify_run(
            model, bench.dense, student, artifact, graph, target, task, asked, run, start.dense_ms, watch
        )
        run.write("verify.json", VERIFY, report)
    pruned = runs.load_model(run, model)
    recipe = run.read("recipe.json", runs.RECIPE)
    report = runs.as_record(VerifyReport, run.read("verify.json", VERIFY))
    return Outcome(pruned, runs.keep_of(recipe["keep"]), report, run)


def verify_again(model: nn.Module, target: Target, task: Task, run: Run, watch: Watch) -> Outcome:
    """Measure a finished run once more, from its own files."""
    asked = _asked(run)
    pruned = runs.load_model(run, model)
    graph = trace(model, runs.read_example(run.path(runs.EXAMPLE)), asked.protected)
    with watch.stage("export both networks"):
        dense = target.export(model, graph.example, run.path("dense"))
        artifact = target.export(pruned, graph.example, run.path("artifact"))
        (reference,) = measure.time_networks([dense], target, 5.0)
    report = verify_run(model, dense, pruned, artifact, graph, target, task, asked, run, reference.median_ms, watch)
    run.write("verify.json", VERIFY, report)
    recipe = run.read("recipe.json", runs.RECIPE)
    return Outcome(pruned, runs.keep_of(recipe["keep"]), report, run)


def _asked(run: Run) -> Asked:
    content = dict(run.read("run.json", runs.RUN)["asked"])
    del content["target"]
    return runs.as_record(Asked, content)


def facts(model: nn.Module, task: Task) -> dict[str, object]:
    """What is kept of a run besides what was asked for."""
    packages = ("edgeprune", "torch", "numpy", "scipy", "openvino", "onnx")
    found = {name: version(name) for name in packages if importlib.util.find_spec(name) is not None}
    return {
        "network": type(model).__name__,
        "versions": {"python": platform.python_version(), **found},
        "training": task.describe(),
    }


def write_layers(run: Run, costs: Costs, steps: int) -> None:
    """Each layer and group before and after, by the latency table, for the report."""
    chosen = _read_plan(run, steps)
    assert chosen is not None
    units = chosen.plan.widths
    present = {s.layer.name for s in costs.present(units)}
    rows = []
    for s in costs.surfaces:
        a, b = widths.shape_at(s.layer, costs.dense), widths.shape_at(s.layer, units)
        planned_ms = s.at(b.in_ch, b.out_ch) if s.layer.name in present else 0.0
        dense_ms = s.at(a.in_ch, a.out_ch)
        rows.append(LayerRow(s.layer.name, a.op, a.in_ch, a.out_ch, b.in_ch, b.out_ch, dense_ms, planned_ms))
    groups = [{"id": g, "dense": n, "kept": units[g]} for g, n in costs.dense.items()]
    run.write("layers.json", LAYERS, {"rows": rows, "groups": groups, "correction": costs.correction})


def latency_costs(graph: ModelGraph, target: Target, asked: Asked, store: Store, run: Run, watch: Watch) -> Costs:
    """Measure what the store does not know about this network's layers on this device."""
    blocks = graph.blocks if asked.drop_blocks else ()
    candidates = widths.candidates(graph.groups, asked.min_width, asked.protected, blocks)
    layers = measure.timed(graph.layers, target)
    with watch.stage("measure layers") as progress:
        table, filled = measure.fill(layers, candidates, target, store, progress)
    run.write("table.json", TABLE, {"fingerprint": table.fingerprint, "filled": filled})
    return measure.costs(layers, candidates, table, blocks)


def prune_step(
    step: int,
    student: nn.Module,
    keep: Keep,
    dense: nn.Module,
    graph: ModelGraph,
    costs: Costs,
    bench: Bench,
    task: Task,
    asked: Asked,
    budget_ms: float,
    run: Run,
    watch: Watch,
) -> tuple[nn.Module, Keep]:
    """One step of the schedule: score, plan, cut, re-estimate batch norm, train. Finished pieces are read back."""
    folder, last = run.path(f"step-{step}"), step == asked.steps
    chosen = _read_plan(run, step)
    if chosen is None:
        scores = current_scores(student, graph, keep, task, asked)
        smaller = _at_most(costs, keep)
        chosen = _choose(bench, smaller, scores, asked, budget_ms, last, watch)
    cut = surgery.cut(dense, graph, chosen.keep)
    if (folder / "weights.safetensors").exists():
        load_state(cut, read_tensors(folder / "weights.safetensors"), folder)
        return cut, chosen.keep
    load_state(cut, surgery.narrow(student.state_dict(), graph, keep, chosen.keep), folder)
    with watch.stage("re-estimate batch norm"):
        task.adapt(cut)
    if not run.has(f"step-{step}/plan.json"):
        with watch.stage("accuracy before and after the cut"):
            accuracy = {"before": task.evaluate(student), "cut": task.evaluate(cut)}
        run.write(f"step-{step}/plan.json", STEP, {"chosen": chosen, "budget_ms": budget_ms, "accuracy": accuracy})
    with watch.stage(f"fine-tune, step {step} of {asked.steps}") as progress:
        task.train(cut, dense, last, folder, progress)
    save_tensors(cut.state_dict(), folder / "weights.safetensors")
    return cut, chosen.keep


def _read_plan(run: Run, step: int) -> Chosen | None:
    if not run.has(f"step-{step}/plan.json"):
        return None
    content = run.read(f"step-{step}/plan.json", STEP)
    chosen = runs.as_record(Chosen, content["chosen"])
    return replace(chosen, keep=runs.keep_of(content["chosen"]["keep"]))


def current_scores(student: nn.Module, graph: ModelGraph, keep: Keep, task: Task, asked: Asked) -> Importance:
    """Scores of the student's channels, on the dense network's units; what is gone already scores below all."""
    groups = surgery.narrow_groups(graph, keep)
    found = importance.score(student, groups, asked.importance, task.batches(), asked.seed)
    scores = {}
    for group in graph.groups:
        scores[group.id] = np.full(group.width, -1.0)
        if group.id in found:
            scores[group.id][list(keep.get(group.id, range(group.width)))] = found[group.id]
    return scores


def _at_most(costs: Costs, keep: Keep) -> Costs:
    """Widths that are still there."""
    left = {
        g: tuple(w for w in choices if w <= len(keep.get(g, range(choices[-1]))))
        for g, choices in costs.candidates.items()
    }
    return replace(costs, candidates=left)


def _choose(
    bench: Bench, costs: Costs, scores: Importance, asked: Asked, budget_ms: float, last: bool, watch: Watch
) -> Chosen:
    """Earlier steps trust the prediction; the last one is measured until it holds."""
    if last:
        return planning.meet(bench, costs, scores, asked.strategy, budget_ms, asked.seed, watch)
    plan: Plan = planning.within_reach(costs, scores, asked.strategy, budget_ms, asked.seed)
    return Chosen(plan, importance.best(scores, plan.widths), float("nan"), (), "")


def verify_run(
    dense: nn.Module,
    dense_artifact: Artifact,
    pruned: nn.Module,
    artifact: Artifact,
    graph: ModelGraph,
    target: Target,
    task: Task,
    asked: Asked,
    run: Run,
    dense_ms: float,
    watch: Watch,
) -> VerifyReport:
    """Both networks on the target, interleaved."""
    smaller = trace(pruned, graph.example)
    chosen = _read_plan(run, asked.steps)
    assert chosen is not None
    networks = [
        verify.Network(dense, dense_artifact, graph.total_params, graph.total_macs),
        verify.Network(pruned, artifact, smaller.total_params, smaller.total_macs),
    ]
    with watch.stage("verify on the device") as progress:
        return verify.check(
            networks[0], networks[1], target, asked.budget, chosen.plan.predicted_ms, dense_ms, graph.example,
            task.final, asked.accuracy_floor, progress,
        )  # fmt: skip
