"""The exact solver: seconds and certificate, against a linearised knapsack and a greedy; and budgets met as measured.

    python benchmarks/solver.py figures      solve, with 16 widths a group, on measured latencies
    python benchmarks/solver.py figures --made-up --networks DenseNet-121     on latencies from a formula
    python benchmarks/solver.py compress     cut to 0.8, 0.6, 0.4 of the dense latency and to the floor, and measure
    python benchmarks/solver.py steps        what the plans of each solver take as they come, without a second try
    python benchmarks/solver.py sessions     the same networks session after session: what is left of the differences
    python benchmarks/solver.py table        print what there is

Every network is a result file of its own, and every budget of `compress` a row of it: what exists is not done again.
OpenVINO f32 on one thread; weights are random, so no accuracy is stated; scores are SP-LAMP.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import arms
import numpy as np
import record
import torch
from networks import NETWORKS, Network
from numpy.typing import NDArray

from edgeprune import allocate, importance, knapsack, measure, planning, store, widths
from edgeprune.allocate import Costs
from edgeprune.bench import SESSION_S, Bench
from edgeprune.graph import ModelGraph, trace
from edgeprune.importance import Importance
from edgeprune.planning import Aim, Preflight
from edgeprune.polish import polished
from edgeprune.records import Fingerprint, LayerShape, Timing
from edgeprune.runs import Run
from edgeprune.table import IDENTITY, LatencyTable, surface, wanted
from edgeprune.target import Target, open_target
from edgeprune.watch import Silent

SOLVED = ("ResNet-50", "MobileNetV2", "EfficientNet-B0", "DenseNet-121")
SHARES, FLOOR = (0.8, 0.6, 0.4), "floor"
STEPS = (1, 5, 30)
PATIENCE_S = 600.0  # in all, for a busy machine to become calm
SESSIONS = 3  # measurements in the end; the median counts
FLOOR_ROOM = 1.02  # the budget at the floor, in floors
BETWEEN, REPEATS = (0.75, 0.5, 0.25, 0.1), 12  # of the way from the floor to the dense network, logarithmic; sessions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("figures", "compress", "steps", "sessions", "table"))
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS))
    parser.add_argument("--made-up", action="store_true", help="a staircase of 16 channels instead of measuring")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what == "figures" and asked.made_up:
        _each(asked.networks or SOLVED, "solver/made-up", lambda network, _: figures(network, None))
    elif asked.what == "figures":
        _each(asked.networks or SOLVED, "solver/figures", figures)
    elif asked.what == "compress":
        _with_target(compress, asked.networks or SOLVED)
    elif asked.what == "steps":
        _each(asked.networks or SOLVED, "solver/steps", steps)
    elif asked.what == "sessions":
        _each(asked.networks or SOLVED, "solver/sessions", sessions)
    print_tables()


def _each(names: Sequence[str], folder: str, do: Callable[[Network, Target], dict[str, Any]]) -> None:
    def one(name: str, target: Target) -> None:
        if record.load(f"{folder}-{name}") is None:
            print(f"{folder}: {name}", flush=True)
            record.save(f"{folder}-{name}", do(NETWORKS[name], target))

    _with_target(one, names)


def _with_target(do: Callable[[str, Target], None], names: Sequence[str]) -> None:
    target = open_target("cpu", {})
    try:
        for name in names:
            do(name, target)
    finally:
        target.close()


def costs_of(graph: ModelGraph, target: Target) -> tuple[Costs, measure.Filled]:
    """16 widths a group, or as many as its channels allow."""
    candidates = widths.candidates(graph.groups, least_share=0.0)
    layers = measure.timed(graph.layers, target)
    table, filled = measure.fill(layers, candidates, target, store.Store(store.default_path()))
    return measure.costs(layers, candidates, table, ()), filled


# ---- the solver ----------------------------------------------------------------------------------------------


def made_up(graph: ModelGraph) -> Costs:
    """Latencies from a formula: a staircase of 16 output channels, linear in input channels, 1 % noise."""
    candidates = widths.candidates(graph.groups, least_share=0.0)
    draw = np.random.Generator(np.random.PCG64(0))
    entries: dict[LayerShape, Timing] = {}
    nowhere = Fingerprint("made-up", "none", "none", "f32", 1, ())
    while True:
        known = LatencyTable(nowhere, entries, IDENTITY)
        missing = dict.fromkeys(s for layer in graph.layers for s in wanted(surface(known, layer, candidates)))
        if not missing:
            return measure.costs(graph.layers, candidates, known, ())
        for shape in missing:
            ms = _formula_ms(shape) * draw.normal(1, 0.01)
            entries[shape] = Timing(ms, ms, ms, 1, (), 0.0)


def _formula_ms(shape: LayerShape) -> float:
    pixels = math.prod(shape.spatial) / math.prod(shape.stride) if shape.spatial else 1.0
    if shape.op not in ("conv", "linear"):
        return 2e-4 + shape.in_ch * pixels / 2e6
    stepped = -(-shape.out_ch // 16) * 16
    return 1e-3 + (shape.in_ch / max(shape.conv_groups, 1) + 8) * stepped * math.prod(shape.kernel) * pixels / 3e7


def figures(network: Network, target: Target | None) -> dict[str, Any]:
    """On measured latencies; without a target, on made-up ones."""
    module = network.build()
    graph = trace(module, network.example())
    if target is None:
        costs, entries, noise = made_up(graph), 0, 0.0
    else:
        costs, filled = costs_of(graph, target)
        entries, noise = filled.entries, filled.noise
    scores = importance.score(module, graph.groups)
    problem = allocate.problem_of(costs, scores)
    dense_ms = costs.predict_ms(costs.dense)
    whole = arms.value_of(scores, costs.dense)
    budgets = [share * dense_ms for share in SHARES]
    start = time.perf_counter()
    others = arms.greedy(problem, budgets)
    greedy_s = (time.perf_counter() - start) / len(budgets)
    rows = []
    for share, budget, other in zip(SHARES, budgets, others, strict=True):
        row = {"share": share, "exact": _exact(problem, costs, scores, budget, whole)}
        greedy = _greedy(problem, costs, scores, other, budget)
        row["greedy"] = {**_plan(costs, scores, greedy, budget, whole), "seconds": greedy_s}
        for steps in STEPS:
            nominal, best = arms.linearised_within(costs, scores, budget, steps)
            row[f"K={steps}"] = _plan(costs, scores, nominal, budget, whole)
            row[f"K={steps}, raised"] = _plan(costs, scores, best, budget, whole)
        rows.append(row)
        print(share, {k: round(v["value"], 5) for k, v in row.items() if k != "share"}, flush=True)
    return {
        "groups": len(costs.candidates),
        "choices": sum(map(len, costs.candidates.values())),
        "layers": len(costs.surfaces),
        "entries": entries,
        "noise": noise,
        "dense_ms": dense_ms,
        "floor_share": knapsack.cheapest(problem).costs[0] / dense_ms,
        "rows": rows,
    }


def _exact(
    problem: knapsack.Problem, costs: Costs, scores: Importance, budget: float, whole: float
) -> dict[str, float]:
    """Processor seconds, of three runs the median, so that a busy machine does not count."""
    seconds = []
    for _ in range(3):
        wall, start = time.perf_counter(), time.process_time()
        if problem.costs[0].sums:  # priced by lines behind concats: then polished, and one more program for the gap
            plan = allocate.solve(costs, scores, budget)
            units, gap = plan.widths, plan.gap
        else:
            solution = knapsack.solve(problem, [budget])
            units, gap = _units(costs, solution.choice), solution.gap
        seconds.append((time.process_time() - start, time.perf_counter() - wall))
    seconds.sort()
    found = _plan(costs, scores, units, budget, whole)
    return {**found, "gap": gap, "seconds": seconds[1][0], "wall_s": seconds[1][1]}


def _greedy(
    problem: knapsack.Problem, costs: Costs, scores: Importance, choice: tuple[int, ...], budget: float
) -> arms.Units:
    """Where its costs are of lines, polished by the true ones as the exact plan is."""
    units = _units(costs, choice)
    if not problem.costs[0].sums:
        return units
    limit = costs.limit(allocate.LATENCY, budget)
    return polished(allocate.values_of(costs, scores), [limit], costs.blocks, units) or units


def _units(costs: Costs, choice: tuple[int, ...]) -> dict[str, int]:
    return {g: w[c] for (g, w), c in zip(costs.candidates.items(), choice, strict=True)}


def _plan(costs: Costs, scores: Importance, units: arms.Units, budget: float, whole: float) -> dict[str, float]:
    return {"value": arms.value_of(scores, units) / whole, "latency": costs.predict_ms(units) / budget}


# ---- budgets met ---------------------------------------------------------------------------------------------


@contextmanager
def _calibrated(network: Network, target: Target) -> Iterator[tuple[Bench, Costs, Importance, Preflight]]:
    """A bench for whole networks, and costs that some of them corrected."""
    module = network.build()
    graph = trace(module, network.example())
    costs, _ = costs_of(graph, target)
    scores = importance.score(module, graph.groups)
    with tempfile.TemporaryDirectory(prefix="edgeprune-solver-") as folder:
        bench = Bench(module, graph, target, Path(folder))
        bench.patience_s = PATIENCE_S
        start, costs = planning.preflight(bench, costs, scores, Run(Path(folder)), Silent(), seed=0)
        yield bench, costs, scores, start


def compress(name: str, target: Target) -> None:
    """Cut without training to every budget that has no row yet; the last word is a measurement of its own."""
    rows = (record.load(f"solver/compress-{name}") or {"rows": []})["rows"]
    missing = [budget for budget in (*map(str, SHARES), FLOOR) if budget not in {row["budget"] for row in rows}]
    if not missing:
        return
    with _calibrated(NETWORKS[name], target) as (bench, costs, scores, start):
        for budget in missing:
            ms = FLOOR_ROOM * start.floor.measured_ms if budget == FLOOR else float(budget) * start.dense_ms
            print(name, budget, flush=True)
            rows.append({"budget": budget, **_met(bench, costs, scores, ms)})
            record.save(f"solver/compress-{name}", {"rows": rows})


def _met(bench: Bench, costs: Costs, scores: Importance, budget: float) -> dict[str, Any]:
    found = planning.meet([Aim(bench, costs, budget)], scores, allocate.solve, Silent())
    measured = sorted(bench.time([found.keep], settled=True)[0] for _ in range(SESSIONS))
    tried = ", ".join(f"{a.measured_ms / budget - 1:+.1%}" for a in found.attempts)
    print(f"tried {tried}; in the end {measured[SESSIONS // 2] / budget - 1:+.2%}", flush=True)
    return {
        "budget_ms": budget,
        "measured_ms": measured[SESSIONS // 2],
        "sessions_ms": measured,
        "predicted_ms": found.plan.predicted_ms,
        "attempts": len(found.attempts),
        "attempts_ms": [attempt.measured_ms for attempt in found.attempts],
        "note": found.note,
        "dense_ms": bench.reference_ms,
        "floor_ms": bench.floor_ms,
        "dense_sessions_ms": bench.dense_ms[:],
        "noise": bench.noise_of(budget),
        "error": bench.error_of(budget),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def steps(network: Network, target: Target) -> dict[str, Any]:
    """Plans for the same budgets, each as its solver gives it, all timed in turn."""
    with _calibrated(network, target) as (bench, costs, scores, start):
        plans: list[tuple[float, str, arms.Units]] = []
        for share in SHARES:
            budget = share * start.dense_ms
            plans.append((share, "exact", allocate.solve(costs, scores, budget).widths))
            plans += [(share, f"K={k}", arms.linearised(costs, scores, budget, k)) for k in STEPS]
        measured = bench.time([importance.best(scores, units) for _, _, units in plans], settled=True)
    whole = arms.value_of(scores, costs.dense)
    rows = [
        {"share": share, "solver": name, "measured": ms / (share * start.dense_ms),
         **_plan(costs, scores, units, share * start.dense_ms, whole)}
        for (share, name, units), ms in zip(plans, measured, strict=True)
    ]  # fmt: skip
    return {"dense_ms": start.dense_ms, "noise": bench.noise, "rows": rows}


def sessions(network: Network, target: Target) -> dict[str, Any]:
    """The floor, loaded once more, and networks above it, in session after session."""
    with _calibrated(network, target) as (bench, costs, scores, start):
        dense_ms, floor_ms = start.dense_ms, start.floor.measured_ms
        budgets = [dense_ms**share * floor_ms ** (1 - share) for share in sorted(BETWEEN)]
        plans = [start.floor.units, *(allocate.solve(costs, scores, budget).widths for budget in budgets)]
        assert bench.floor is not None
        with bench.built([importance.best(scores, units) for units in plans]) as artifacts:
            networks = [bench.dense, bench.floor, *artifacts]
            held = [measure.time_networks(networks, target, SESSION_S) for _ in range(REPEATS)]
        as_measured = np.array([[timing.median_ms for timing in timings] for timings in held])
        by_both = np.array(bench.at_first(held))
    return {
        "dense_ms": as_measured[:, 0].tolist(),
        "floor_ms": as_measured[:, 1].tolist(),
        "rows": [
            {"as_measured_ms": ms.tolist(), "by_dense": _apart(ms / as_measured[:, 0]), "by_both": _apart(both)}
            for ms, both in zip(as_measured.T[1:], by_both.T[1:], strict=True)
        ],
    }


def _apart(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / values.mean())


# ---- tables --------------------------------------------------------------------------------------------------


def print_tables() -> None:
    rows = []
    for kind, name in [("figures", n) for n in SOLVED] + [("made-up", n) for n in SOLVED]:
        found = record.load(f"solver/{kind}-{name}")
        for row in found["rows"] if found else ():
            exact = row["exact"]
            losses = [f"{1 - row[arm]['value']:.2%}" for arm in ("exact", *(f"K={k}, raised" for k in STEPS), "greedy")]
            nominal = [f"{row[f'K={k}']['latency']:.2f}" for k in STEPS]
            label = name if kind == "figures" else f"{name}, made-up latencies"
            rows.append([label, str(row["share"]), f"{exact['seconds']:.2f}", f"{exact['gap']:.4%}", *losses, *nominal])
    if rows:
        losses = ["value lost: exact", *(f"linearised, K={k}" for k in STEPS), "greedy"]
        nominal = [f"latency / budget that K={k} takes for it" for k in STEPS]
        print(record.table(["network", "of dense latency", "CPU s", "gap", *losses, *nominal], rows), end="\n\n")
    rows = []
    for name in SOLVED:
        found = record.load(f"solver/steps-{name}")
        for share in SHARES if found else ():
            at = {row["solver"]: row for row in found["rows"] if row["share"] == share}
            rows.append(
                [name, str(share), *(f"{row['measured'] - 1:+.1%}, {1 - row['value']:.2%}" for row in at.values())]
            )
    if rows:
        solvers = ["exact", *(f"K={k}" for k in STEPS)]
        head = ["network", "budget / dense", *(f"{name}: off, value lost" for name in solvers)]
        print(record.table(head, rows), end="\n\n")
    rows = []
    for name in SOLVED:
        found = record.load(f"solver/sessions-{name}")
        for row in found["rows"][1:] if found else ():
            ms = np.array(row["as_measured_ms"])
            spreads = [f"{one:.1%}" for one in (_apart(ms), row["by_dense"], row["by_both"])]
            rows.append([name, f"{np.median(ms):.2f}", f"{ms.min():.2f} to {ms.max():.2f}", *spreads])
    if rows:
        head = ["network", "ms, median session", "sessions", "spread: as measured", "by the dense network", "by both"]
        print(record.table(head, rows), end="\n\n")
    rows = []
    for name in NETWORKS:
        found = record.load(f"solver/compress-{name}")
        for row in found["rows"] if found else ():
            off = row["measured_ms"] / row["budget_ms"] - 1
            cells = [f"{row['budget_ms']:.3f}", f"{row['measured_ms']:.3f}", f"{off:+.1%}", str(row["attempts"])]
            rows.append([name, row["budget"], *cells])
    if rows:
        print(record.table(["network", "budget", "ms", "measured ms", "off", "networks built"], rows))


if __name__ == "__main__":
    main()
