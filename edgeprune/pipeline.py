"""The whole job, top to bottom: trace, score, measure, plan, cut, train, export, verify. Read this first."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from . import (
    allocate,
    budgets,
    files,
    floors,
    importance,
    measure,
    planning,
    runs,
    shaping,
    strategies,
    surgery,
    verify,
    widths,
)
from .allocate import Costs
from .asked import Asked
from .finetune import load_state, read_tensors, save_tensors
from .graph import Example, ModelGraph, trace
from .importance import Importance
from .planning import Aim, Bench, Chosen
from .records import Budget, Keep, VerifyReport
from .runs import Run
from .search import Subject
from .store import Store
from .target import Target, calibrated
from .task import Task
from .watch import Silent, Watch

STEP = "edgeprune.step/1"
FILLED = "edgeprune.filled/1"
LAYERS = "edgeprune.layers/1"


@dataclass(frozen=True, eq=False)
class Also:
    """A further target that the same network has to satisfy, within its own budget."""

    target: Target
    budget: Budget

    def run_in(self, run: Run) -> Run:
        """Where its part of a run lies."""
        return Run(run.path(f"also-{self.target.name}"))


@dataclass(frozen=True, eq=False)
class Outcome:
    """A finished run."""

    model: nn.Module
    keep: Keep
    report: VerifyReport
    run: Run
    others: tuple[tuple[str, VerifyReport], ...] = ()  # (target, report) of further targets


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
    also: Sequence[Also] = (),
    within: Run | None = None,
    measured: Run | None = None,
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
        also: further targets with their budgets.
        within: a finished run of the same network: start from its network, and keep a subset of its channels.
        measured: a folder whose preflight.json is of this network on this target.
    Raises:
        UnreachableBudget: before any training, with the fastest this device can be.
    """
    watch = watch or Silent()
    graph = trace(model, example, asked.protected)
    wanted = {**files.plain(asked), "target": files.plain(target.fingerprint())}
    wanted |= {"also": files.plain([[a.target.fingerprint(), a.budget] for a in also])} if also else {}
    runs.claim(run, graph, wanted, facts(model, task), resume)
    if not run.has("verify.json"):
        if measured is not None and not run.has("preflight.json"):
            run.write("preflight.json", planning.PREFLIGHT, measured.read("preflight.json", planning.PREFLIGHT))
        student, keep = _begun(model, within)
        with watch.stage("score channels"):
            scores = current_scores(student, graph, keep, task, asked)
        images = calibration(task, [target, *(a.target for a in also)])
        aims = [aim_at(target, asked.budget, graph, model, scores, asked, run, store, watch, images)]
        aims += [
            aim_at(a.target, a.budget, graph, model, scores, asked, a.run_in(run), store, watch, images) for a in also
        ]
        first: Chosen | None = None
        if not run.has("step-1/plan.json"):  # the contract is checked before any training
            first = planning.meet(
                _at_most(aims, keep), scores, strategies.forecast(asked), watch, budgets.size_bytes(asked.budget)
            )
            watch.say(f"a plan of {first.measured_ms:.4g} ms holds on the device")
        begun = student, keep
        schedule = _budgets(aims, keep, asked.steps)
        for step in range(1, asked.steps + 1):
            ready = first if asked.steps == 1 and asked.strategy not in strategies.LOOKING else None
            student, keep = prune_step(
                step, student, keep, model, graph, aims, schedule[step - 1 :], ready, task, asked, run, watch
            )
        if asked.floors:
            student, keep = hold_floors(student, keep, *begun, model, graph, aims, task, asked, run, watch)
        write_layers(run, aims[0].costs, floors.last_step(run, asked.steps))
        runs.save_model(run, student, graph, keep)
        for one, aim in zip(also, aims[1:], strict=True):
            verify_run(model, student, graph, aim, one.budget, task, asked, one.run_in(run), run, watch)
        verify_run(model, student, graph, aims[0], asked.budget, task, asked, run, run, watch)
    pruned = runs.load_model(run, model)
    recipe = run.read("recipe.json", runs.RECIPE)
    others = tuple((a.target.name, _report(a.run_in(run))) for a in also)
    return Outcome(pruned, runs.keep_of(recipe["keep"]), _report(run), run, others)


def _report(run: Run) -> VerifyReport:
    return runs.as_record(VerifyReport, run.read("verify.json", verify.FORMAT))


def _begun(model: nn.Module, within: Run | None) -> tuple[nn.Module, Keep]:
    """The network to start from, and the units that it has left."""
    if within is None:
        return model, {}
    return runs.load_model(within, model), runs.keep_of(within.read("recipe.json", runs.RECIPE)["keep"])


def aim_at(
    target: Target,
    budget: Budget,
    graph: ModelGraph,
    model: nn.Module,
    scores: Importance,
    asked: Asked,
    run: Run,
    store: Store,
    watch: Watch,
    calibration: Sequence[NDArray[Any]] = (),
) -> Aim:
    """Measure what this network's layers cost on a target, and that its budget can be reached there."""
    costs = latency_costs(graph, target, asked, store, run, watch)
    with watch.stage("export the dense network"):
        bench = Bench(model, graph, target, run.folder, calibration)
    start, costs = planning.preflight(bench, costs, scores, run, watch, asked.seed)
    wanted_ms = planning.check_budget(budget, start)
    watch.say(f"dense {start.dense_ms:.4g} ms, floor {start.floor.measured_ms:.4g} ms, budget {wanted_ms:.4g} ms")
    return Aim(bench, costs, wanted_ms)


def calibration(task: Task, targets: Sequence[Target]) -> list[NDArray[Any]]:
    """Some training images, where one of the targets needs them."""
    return task.calibration() if any(map(calibrated, targets)) else []


def _budgets(aims: Sequence[Aim], keep: Keep, steps: int) -> list[tuple[float, ...]]:
    """Of every step, for each target."""
    starts = [aim.costs.predict_ms(_units(aim, keep)) if keep else aim.bench.reference_ms for aim in aims]
    each = [planning.schedule(ms, aim.wanted_ms, steps) for ms, aim in zip(starts, aims, strict=True)]
    return list(zip(*each, strict=True))


def verify_again(model: nn.Module, target: Target, task: Task, run: Run, watch: Watch) -> Outcome:
    """Measure a finished run once more, from its own files."""
    asked = _asked(run)
    pruned = runs.load_model(run, model)
    graph = trace(model, runs.read_example(run.path("example.safetensors")), asked.protected)
    bench = Bench(model, graph, target, run.folder, calibration(task, [target]))
    bench.time([])
    chosen = _read_plan(run, floors.last_step(run, asked.steps))
    assert chosen is not None
    report = verify_on(
        model, pruned, graph, bench, chosen.plan.predicted_ms, asked.budget, task, asked, run, run, watch
    )
    recipe = run.read("recipe.json", runs.RECIPE)
    return Outcome(pruned, runs.keep_of(recipe["keep"]), report, run)


def _asked(run: Run) -> Asked:
    content = dict(run.read("run.json", runs.RUN)["asked"])
    del content["target"]
    content.pop("also", None)
    return runs.as_record(Asked, content)


def facts(model: nn.Module, task: Task) -> dict[str, object]:
    """What is kept of a run besides what was asked for."""
    packages = ("edgeprune", "torch", "numpy", "scipy", "openvino", "onnx", "ai_edge_litert", "litert_torch")
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
    groups = [{"id": g, "dense": n, "kept": units[g]} for g, n in costs.dense.items()]
    run.write("layers.json", LAYERS, {"rows": costs.rows(units), "groups": groups, "correction": costs.correction})


def latency_costs(graph: ModelGraph, target: Target, asked: Asked, store: Store, run: Run, watch: Watch) -> Costs:
    """Measure what the store does not know about this network's layers on this device."""
    blocks = graph.blocks if asked.drop_blocks else ()
    candidates = widths.candidates(graph.groups, asked.min_width, asked.protected, blocks)
    if asked.soft is not None:
        candidates |= {g: candidates[g][-1:] for g in shaping.isolated(graph, asked.soft)}
    layers = measure.timed(graph.layers, target)
    with watch.stage("measure layers") as progress:
        table, filled = measure.fill(layers, candidates, target, store, progress)
    run.write("table.json", FILLED, {"fingerprint": table.fingerprint, "filled": filled})
    return measure.costs(layers, candidates, table, blocks)


def prune_step(
    step: int,
    student: nn.Module,
    keep: Keep,
    dense: nn.Module,
    graph: ModelGraph,
    aims: Sequence[Aim],
    schedule: Sequence[tuple[float, ...]],
    ready: Chosen | None,
    task: Task,
    asked: Asked,
    run: Run,
    watch: Watch,
) -> tuple[nn.Module, Keep]:
    """One step of the schedule: score, plan, cut, re-estimate batch norm, train. Finished pieces are read back.

    Args:
        schedule: budgets of this step and the later ones, for each target.
    """
    folder, last = run.path(f"step-{step}"), step >= asked.steps
    chosen = _read_plan(run, step) or ready
    if chosen is None:
        scores = current_scores(student, graph, keep, task, asked)
        left = _at_most(aims, keep)
        subject = Subject(dense, graph, student, keep, scores, task, Run(folder), asked.protected)
        allocator, scores = strategies.allocator(subject, left, schedule, asked, watch)
        chosen = strategies.choose(left, scores, allocator, asked, schedule[0], last, watch)
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
        run.write(f"step-{step}/plan.json", STEP, {"chosen": chosen, "budget_ms": schedule[0][0], "accuracy": accuracy})
    with watch.stage(f"fine-tune, step {step} of {asked.steps}") as progress:
        task.train(cut, dense, last, folder, progress)
    save_tensors(cut.state_dict(), folder / "weights.safetensors")
    return cut, chosen.keep


def hold_floors(
    student: nn.Module,
    keep: Keep,
    begun: nn.Module,
    begun_keep: Keep,
    dense: nn.Module,
    graph: ModelGraph,
    aims: Sequence[Aim],
    task: Task,
    asked: Asked,
    run: Run,
    watch: Watch,
) -> tuple[nn.Module, Keep]:
    """The trained network, or one with more latency, cut anew from `begun`, where a floor is broken. See `floors`."""
    tries: list[floors.Try] = []
    while True:
        step = asked.steps + len(tries)
        with watch.stage("measure the floors' metrics on the search split"):
            tries.append(floors.judge(step, aims[0].wanted_ms, asked.floors, task.measure(student)))
        for line in tries[-1].broken:
            watch.say(f"on the search split: {line}")
        if not tries[-1].broken or len(tries) > asked.back_off:
            floors.write(run, tries)
            return student, keep
        aims = [replace(aim, wanted_ms=floors.relaxed(aim.wanted_ms, aim.bench.reference_ms)) for aim in aims]
        wanted = tuple(aim.wanted_ms for aim in aims)
        watch.say(f"back to a budget of {wanted[0]:.4g} ms")
        student, keep = prune_step(
            step + 1, begun, begun_keep, dense, graph, aims, [wanted], None, task, asked, run, watch
        )


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


def _at_most(aims: Sequence[Aim], keep: Keep) -> list[Aim]:
    return [replace(aim, costs=allocate.at_most(aim.costs, _units(aim, keep))) for aim in aims]


def _units(aim: Aim, keep: Keep) -> dict[str, int]:
    return {g: len(keep[g]) if g in keep else n for g, n in aim.costs.dense.items()}


def verify_run(
    dense: nn.Module,
    pruned: nn.Module,
    graph: ModelGraph,
    aim: Aim,
    budget: Budget,
    task: Task,
    asked: Asked,
    run: Run,
    whole: Run,
    watch: Watch,
) -> VerifyReport:
    """A finished network on one of its targets, against what its plan promised there."""
    chosen = _read_plan(whole, floors.last_step(whole, asked.steps))
    assert chosen is not None
    predicted_ms = aim.costs.predict_ms(chosen.plan.widths)
    return verify_on(dense, pruned, graph, aim.bench, predicted_ms, budget, task, asked, run, whole, watch)


def verify_on(
    dense: nn.Module,
    pruned: nn.Module,
    graph: ModelGraph,
    bench: Bench,
    predicted_ms: float,
    budget: Budget,
    task: Task,
    asked: Asked,
    run: Run,
    whole: Run,
    watch: Watch,
) -> VerifyReport:
    """Both networks on a target, interleaved; the result is written to `run`, which may be a part of `whole`."""
    with watch.stage("export the pruned network"):
        artifact = bench.export(pruned, run.path("artifact"))
    smaller = trace(pruned, graph.example)
    networks = [
        verify.Network(dense, bench.dense, graph.total_params, graph.total_macs),
        verify.Network(pruned, artifact, smaller.total_params, smaller.total_macs),
    ]
    with watch.stage("verify on the device") as progress:
        report = verify.check(
            networks[0], networks[1], bench.target, budget, predicted_ms, bench.reference_ms, graph.example,
            task.final, asked.accuracy_floor, progress,
            {name: (floor, task.metrics[name]) for name, floor in asked.floors.items()}, floors.notes(whole),
        )  # fmt: skip
    run.write("verify.json", verify.FORMAT, report)
    return report
