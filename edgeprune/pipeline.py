"""The whole job, top to bottom: trace, score, measure, plan, cut, train, export, verify. Read this first."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from torch import nn

from . import (
    allocate,
    budgets,
    files,
    floors,
    importance,
    measure,
    planning,
    rivals,
    runs,
    shaping,
    strategies,
    surgery,
    verify,
    widths,
)
from .allocate import Costs
from .asked import Asked
from .bench import Bench
from .config import INTERVAL
from .finetune import load_state, read_tensors, save_tensors
from .graph import Example, ModelGraph, trace
from .importance import Importance
from .planning import Aim, Chosen
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
class Job:
    """What all stages of a run share."""

    dense: nn.Module  # the trained network, never changed
    graph: ModelGraph
    task: Task
    asked: Asked
    run: Run
    watch: Watch
    interval: float = INTERVAL  # of the latency table's entries, see `measure.fill`


@dataclass(frozen=True, eq=False)
class Student:
    """The network on its way: the dense one cut to `keep`, and trained since."""

    model: nn.Module
    keep: Keep  # empty: nothing is cut yet


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
    interval: float = INTERVAL,
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
        interval: of the latency table's entries, see `measure.fill`.
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
        job = Job(model, graph, task, asked, run, watch, interval)
        begun = _begun(model, within)
        with watch.stage("score channels"):
            scores = current_scores(job, begun)
        aims = [aim_at(job, target, asked.budget, run, scores, store)]
        aims += [aim_at(job, a.target, a.budget, a.run_in(run), scores, store) for a in also]
        first: Chosen | None = None
        if not run.has("step-1/plan.json"):  # the contract is checked before any training
            left, size = _at_most(aims, begun.keep), budgets.size_bytes(asked.budget)
            first = planning.meet(left, scores, strategies.forecast(asked), watch, size)
            watch.say(f"a plan of {first.measured_ms:.4g} ms holds on the device")
        student, schedule = begun, _budgets(aims, begun.keep, asked.steps)
        for step in range(1, asked.steps + 1):
            ready = first if asked.steps == 1 and asked.strategy not in strategies.LOOKING else None
            student = prune_step(job, step, student, aims, schedule[step - 1 :], ready)
        if asked.floors:
            student = hold_floors(job, student, begun, aims)
        write_layers(run, aims[0].costs, floors.last_step(run, asked.steps))
        runs.save_model(run, student.model, graph, student.keep)
        for one, aim in zip(also, aims[1:], strict=True):
            verify_run(job, student.model, aim, one.budget, one.run_in(run))
        verify_run(job, student.model, aims[0], asked.budget, run)
    pruned = runs.load_model(run, model)
    recipe = run.read("recipe.json", runs.RECIPE)
    others = tuple((a.target.name, _report(a.run_in(run))) for a in also)
    return Outcome(pruned, runs.keep_of(recipe["keep"]), _report(run), run, others)


def _report(run: Run) -> VerifyReport:
    return runs.as_record(VerifyReport, run.read("verify.json", verify.FORMAT))


def _begun(model: nn.Module, within: Run | None) -> Student:
    """The network to start from."""
    if within is None:
        return Student(model, {})
    return Student(runs.load_model(within, model), runs.keep_of(within.read("recipe.json", runs.RECIPE)["keep"]))


def aim_at(job: Job, target: Target, budget: Budget, run: Run, scores: Importance, store: Store) -> Aim:
    """Measure what the network's layers cost on a target, and that its budget can be reached there.

    Args:
        job: the whole run's.
        run: where the target's part of it lies.
        scores: of the channels that are left.
        store: latency measurements of earlier runs.
    """
    costs = latency_costs(replace(job, run=run), target, store)
    with job.watch.stage("export the dense network"):
        bench = bench_on(job, target, run)
    start, costs = planning.preflight(bench, costs, scores, run, job.watch, job.asked.seed)
    wanted_ms = planning.check_budget(budget, start)
    job.watch.say(f"dense {start.dense_ms:.4g} ms, floor {start.floor.measured_ms:.4g} ms, budget {wanted_ms:.4g} ms")
    return Aim(bench, costs, wanted_ms)


def bench_on(job: Job, target: Target, run: Run) -> Bench:
    """Where cut networks are exported and timed, with some training images if the target's precision needs them."""
    images = job.task.calibration() if calibrated(target) else []
    return Bench(job.dense, job.graph, target, run.folder, images)


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
    job = Job(model, graph, task, asked, run, watch)
    bench = bench_on(job, target, run)
    bench.time([])
    chosen = _read_plan(run, floors.last_step(run, asked.steps))
    assert chosen is not None
    report = verify_on(job, pruned, bench, chosen.plan.predicted_ms, asked.budget, run)
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


def latency_costs(job: Job, target: Target, store: Store) -> Costs:
    """Measure what the store does not know about this network's layers on this device."""
    asked = job.asked
    whole = set(shaping.isolated(job.graph, asked.soft)) if asked.soft is not None else set()
    blocks = tuple(b for b in job.graph.blocks if not whole & set(b.groups)) if asked.drop_blocks else ()
    candidates = widths.candidates(job.graph.groups, asked.min_width, asked.protected, blocks)
    candidates |= {g: candidates[g][-1:] for g in whole}
    layers = measure.timed(job.graph.layers, target)
    with job.watch.stage("measure layers") as progress:
        table, filled = measure.fill(layers, candidates, target, store, progress, job.interval)
    job.run.write("table.json", FILLED, {"fingerprint": table.fingerprint, "filled": filled})
    return measure.costs(layers, candidates, table, blocks)


def prune_step(
    job: Job,
    step: int,
    student: Student,
    aims: Sequence[Aim],
    schedule: Sequence[tuple[float, ...]],
    ready: Chosen | None = None,
) -> Student:
    """One step of the schedule: score, plan, cut, re-estimate batch norm, train. Finished pieces are read back.

    Args:
        job: the whole run's.
        step: its number, from 1.
        student: the network that the step before left.
        aims: the targets, the first of which decides.
        schedule: budgets of this step and the later ones, for each target.
        ready: a plan that holds already.
    """
    run, task, watch = job.run, job.task, job.watch
    folder, last = run.path(f"step-{step}"), step >= job.asked.steps
    chosen = _read_plan(run, step) or ready or _chosen(job, student, aims, schedule, folder, last)
    cut = surgery.cut(job.dense, job.graph, chosen.keep)
    if (folder / "weights.safetensors").exists():
        load_state(cut, read_tensors(folder / "weights.safetensors"), folder)
        return Student(cut, chosen.keep)
    narrowed = surgery.narrow(student.model.state_dict(), job.graph, student.keep, chosen.keep, cut)
    load_state(cut, narrowed, folder)
    with watch.stage("re-estimate batch norm"):
        task.adapt(cut)
    if not run.has(f"step-{step}/plan.json"):
        with watch.stage("accuracy before and after the cut"):
            accuracy = {"before": task.evaluate(student.model), "cut": task.evaluate(cut)}
        run.write(f"step-{step}/plan.json", STEP, {"chosen": chosen, "budget_ms": schedule[0][0], "accuracy": accuracy})
    with watch.stage(f"fine-tune, step {step} of {job.asked.steps}") as progress:
        task.train(cut, job.dense, last, folder, progress)
    save_tensors(cut.state_dict(), folder / "weights.safetensors")
    return Student(cut, chosen.keep)


def _chosen(
    job: Job,
    student: Student,
    aims: Sequence[Aim],
    schedule: Sequence[tuple[float, ...]],
    folder: Path,
    last: bool,
) -> Chosen:
    """The strategy's plan for the first budgets of a schedule, as measured."""
    scores = current_scores(job, student)
    left = _at_most(aims, student.keep)
    subject = Subject(
        job.dense, job.graph, student.model, student.keep, scores, job.task, Run(folder), job.asked.protected
    )
    allocator, scores = strategies.allocator(subject, left, schedule, job.asked, job.watch)
    chosen = strategies.choose(left, scores, allocator, job.asked, schedule[0], last, job.watch)
    if last and job.asked.strategy in strategies.LOOKING:
        rivals.compare(subject, scores, left[0], chosen, job.asked, job.watch)
    return chosen


def hold_floors(job: Job, student: Student, begun: Student, aims: Sequence[Aim]) -> Student:
    """The trained network, or one with more latency, cut anew from `begun`, where a floor is broken. See `floors`."""
    asked, tries = job.asked, list[floors.Try]()
    while True:
        step = asked.steps + len(tries)
        with job.watch.stage("measure the floors' metrics on the search split"):
            tries.append(floors.judge(step, aims[0].wanted_ms, asked.floors, job.task.measure(student.model)))
        for line in tries[-1].broken:
            job.watch.say(f"on the search split: {line}")
        if not tries[-1].broken or len(tries) > asked.back_off:
            floors.write(job.run, tries)
            return student
        aims = [replace(aim, wanted_ms=floors.relaxed(aim.wanted_ms, aim.bench.reference_ms)) for aim in aims]
        wanted = tuple(aim.wanted_ms for aim in aims)
        job.watch.say(f"back to a budget of {wanted[0]:.4g} ms")
        student = prune_step(job, step + 1, begun, aims, [wanted])


def _read_plan(run: Run, step: int) -> Chosen | None:
    if not run.has(f"step-{step}/plan.json"):
        return None
    content = run.read(f"step-{step}/plan.json", STEP)
    chosen = runs.as_record(Chosen, content["chosen"])
    return replace(chosen, keep=runs.keep_of(content["chosen"]["keep"]))


def current_scores(job: Job, student: Student) -> Importance:
    """Scores of the student's channels, on the dense network's units; what is gone already scores below all."""
    groups = surgery.narrow_groups(job.graph, student.keep)
    found = importance.score(student.model, groups, job.asked.importance, job.task.batches(), job.asked.seed)
    scores = {}
    for group in job.graph.groups:
        scores[group.id] = np.full(group.width, -1.0)
        if group.id in found:
            scores[group.id][list(student.keep.get(group.id, range(group.width)))] = found[group.id]
    return scores


def _at_most(aims: Sequence[Aim], keep: Keep) -> list[Aim]:
    return [replace(aim, costs=allocate.at_most(aim.costs, _units(aim, keep))) for aim in aims]


def _units(aim: Aim, keep: Keep) -> dict[str, int]:
    return {g: len(keep[g]) if g in keep else n for g, n in aim.costs.dense.items()}


def verify_run(job: Job, pruned: nn.Module, aim: Aim, budget: Budget, run: Run) -> VerifyReport:
    """A finished network on one of its targets, against what its plan promised there."""
    chosen = _read_plan(job.run, floors.last_step(job.run, job.asked.steps))
    assert chosen is not None
    return verify_on(job, pruned, aim.bench, aim.costs.predict_ms(chosen.plan.widths), budget, run)


def verify_on(job: Job, pruned: nn.Module, bench: Bench, predicted_ms: float, budget: Budget, run: Run) -> VerifyReport:
    """Both networks on a target, interleaved; the result is written to `run`, which may be a part of the job's."""
    graph, task, asked = job.graph, job.task, job.asked
    with job.watch.stage("export the pruned network"):
        artifact = bench.export(pruned, run.path("artifact"))
    smaller = trace(pruned, graph.example)
    networks = [
        verify.Network(job.dense, bench.dense, graph.total_params, graph.total_macs),
        verify.Network(pruned, artifact, smaller.total_params, smaller.total_macs),
    ]
    with job.watch.stage("verify on the device") as progress:
        report = verify.check(
            networks[0], networks[1], bench.target, budget, predicted_ms, bench.reference_ms, graph.example,
            task.final, asked.accuracy_floor, progress,
            {name: (floor, task.metrics[name]) for name, floor in asked.floors.items()}, floors.notes(job.run),
        )  # fmt: skip
    run.write("verify.json", verify.FORMAT, report)
    return report
