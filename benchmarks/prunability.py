"""Which part of each network can be cut, is every cut right, and how long does it take: edgeprune and Torch-Pruning.

    python benchmarks/prunability.py                       every network that is not in benchmarks/results yet
    python benchmarks/prunability.py --only resnet,swin    a part of them
    python benchmarks/prunability.py --all-groups          check every group one by one in float64, not a sample
    python benchmarks/prunability.py --seconds             time both tools where they finish, check nothing
    python benchmarks/prunability.py --seconds --smallest  on the smallest image that a network takes
    python benchmarks/prunability.py --table               the tables alone

Each network is built in a child process, and each tool works on it in a child of that, under a memory and a time limit.

edgeprune: `trace`, and `cut` of half of every group (timed); then the oracle, batch-norm statistics random: a random
half of some exact groups one by one (the table says how many), of all exact groups together, and some residual blocks
dropped, each against the masked dense network, in float32, and in float64 where they differ by more than 2e-6.

Torch-Pruning 1.6.1: the dependency graph and one step at ratio 0.5 with random importance (timed), told which layers
make the outputs. "wrong": the pruned network does not run, or its outputs have another shape. "limit": it was stopped.

`--seconds` times both in one process, turn and turn about on one network, and keeps the least of up to three runs of
each (one where a round takes longer than 2 s): once as above, and once where the half that goes is that of the least
L2 norm (Torch-Pruning's GroupMagnitudeImportance, edgeprune's `importance.score`). Images are of the side that the
network's published weights are judged at, or the smallest that it takes. It goes on where it was stopped; `--again`
begins anew. Torch-Pruning is stopped at 20 processor seconds here, too, which then count. What it finds lies in
results/prunability-seconds.json (-smallest.json) and goes before the seconds of the first run, which are of the
smallest images, in every table.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import re
import resource
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import record

MEMORY_BYTES = {"edgeprune": 16 << 30, "torch-pruning": 10 << 30}  # edgeprune's holds dense, cut and masked networks
LIMIT_S = {"edgeprune": 200, "torch-pruning": 20}  # processor seconds; edgeprune's hold the checks too
WALL_S = 1200.0
TOLERANCE = 1e-5
RESULT = "prunability"
SECONDS, SMALLEST = "prunability-seconds", "prunability-seconds-smallest"
SHORTER = (
    ("the network's output", "output"),
    ("reads the network's input", "input"),
    ("positions that cannot be removed", "what stays"),
    ("varies inside heads or groups that are only cut whole", "inside heads or groups"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts of names, comma-separated")
    parser.add_argument("--all-groups", action="store_true")
    parser.add_argument("--seconds", action="store_true", help="time what has a result")
    parser.add_argument("--smallest", action="store_true", help="seconds of the smallest images")
    parser.add_argument("--again", action="store_true", help="even if there is a result")
    parser.add_argument("--tool", choices=[*LIMIT_S], help="one tool alone")
    parser.add_argument("--result", default=RESULT, help="name of the file in benchmarks/results")
    parser.add_argument("--table", action="store_true")
    chosen = parser.parse_args()
    content = record.load(chosen.result) or {"limit_s": LIMIT_S, "memory_bytes": MEMORY_BYTES, "networks": {}}
    networks = content["networks"]
    if chosen.seconds:
        _time(networks, chosen)
    elif not chosen.table:
        _run(content, chosen)
    for name, found in _seconds_in(_seconds_file(chosen)).items():
        networks[name] = networks.get(name, {}) | {"timed": found}
    print(summary(networks), end="\n\n")
    print(misses(networks), end="\n\n")
    print(everything(networks))


def _run(content: dict[str, Any], chosen: argparse.Namespace) -> None:
    for case in _prepared():
        row = content["networks"].get(case.name, {"kind": case.kind})
        tools = [t for t in ([chosen.tool] if chosen.tool else LIMIT_S) if t not in row or chosen.again]
        if not tools or not _named(case.name, chosen):
            continue
        with tempfile.TemporaryDirectory() as folder:
            checks = "all" if chosen.all_groups else "some"
            _in_child(_network, case, tools, checks, Path(folder))
            row |= {t: json.loads((Path(folder) / t).read_text()) for t in tools if (Path(folder) / t).exists()}
        content["networks"][case.name] = row
        content |= {"limit_s": LIMIT_S, "memory_bytes": MEMORY_BYTES}
        record.save(chosen.result, {k: v for k, v in content.items() if k not in ("machine", "at")})
        print(case.name, json.dumps(row)[:500], flush=True)


def _time(networks: dict[str, Any], chosen: argparse.Namespace) -> None:
    """Time both tools where they finish."""
    from prunability_models import own_size

    timed = {} if chosen.again else _seconds_in(_seconds_file(chosen))
    for case in _prepared():
        row = networks.get(case.name, {})
        tools = [t for t in LIMIT_S if {"trace_s", "seconds"} & row.get(t, {}).keys()]
        if "edgeprune" not in tools or case.name in timed or not _named(case.name, chosen):
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "seconds"
            _in_child(_network_seconds, case, None if chosen.smallest else own_size(case), tools, path)
            timed[case.name] = json.loads(path.read_text()) if path.exists() else {}
        record.save(_seconds_file(chosen), {"networks": timed})
        print(case.name, json.dumps(timed[case.name]), flush=True)


def _seconds_file(chosen: argparse.Namespace) -> str:
    return SMALLEST if chosen.smallest else SECONDS


def _seconds_in(name: str) -> dict[str, Any]:
    return dict((record.load(name) or {"networks": {}})["networks"])


def _named(name: str, chosen: argparse.Namespace) -> bool:
    return any(part in name for part in chosen.only.split(","))


def _prepared() -> Iterator[Any]:
    """The networks, after everything that is loaded on first use: children are forked, and find it there."""
    record.declare_torchvision_operators()
    import prunability_models
    import timm  # noqa: F401
    import torch
    import torch_pruning  # noqa: F401

    torch.set_num_threads(1)
    _warm()
    gc.collect()
    gc.freeze()  # no tool pays for what the other one, or the imports, left behind
    return prunability_models.cases()


def _warm() -> None:
    """Whatever is loaded on first use is loaded before anything is timed."""
    import prunability_child
    import torch

    tiny = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 2, 1))
    for tool in LIMIT_S:
        prunability_child.run(tool, tiny, torch.randn(1, 3, 8, 8), "some")


def _in_child(work: Callable[..., None], *given: Any) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=work, args=given)
    process.start()
    process.join()
    return process


def _network(case: Any, tools: Sequence[str], checks: str, folder: Path) -> None:
    """Build one network, then let each tool work on it."""
    import prunability_models

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    model, example = prunability_models.build(case)
    for tool in tools:
        found = _watched(tool, model, example, checks, folder / f"{tool}.part")
        (folder / f"{tool}.done").write_text(json.dumps(found))
        (folder / f"{tool}.done").replace(folder / tool)


def _network_seconds(case: Any, side: int | None, tools: Sequence[str], path: Path) -> None:
    """On an image of this side, or the smallest."""
    import prunability_child
    import prunability_models

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    model, example = prunability_models.build(case, side)
    path.write_text(json.dumps(prunability_child.timed(tools, model, example, LIMIT_S["torch-pruning"])))


def _watched(tool: str, model: Any, example: Any, checks: str, path: Path) -> dict[str, Any]:
    """One tool in a process of its own, ended when it takes too much memory or time."""
    process = multiprocessing.get_context("fork").Process(target=_tool, args=(tool, model, example, checks, path))
    began, before_s, why, peak = time.monotonic(), _children_s(), "", 0
    process.start()
    while process.is_alive():
        process.join(0.1)
        peak = max(peak, _resident_bytes(process.pid))
        if peak > MEMORY_BYTES[tool]:
            why = f"took more than {MEMORY_BYTES[tool] >> 30} GiB of memory"
        elif time.monotonic() - began > WALL_S:
            why = f"took more than {WALL_S:.0f} s"
        if why:
            process.kill()
            process.join()
    if process.exitcode == -signal.SIGXCPU:
        why = f"took more than {LIMIT_S[tool]} processor seconds"
    spent = {"process_s": round(_children_s() - before_s, 1), "peak_mib": peak >> 20}
    if path.exists() and not why:
        return dict(json.loads(path.read_text())) | spent
    return {"outcome": "limit" if why else "crash", "error": why or f"exit code {process.exitcode}"} | spent


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _tool(tool: str, model: Any, example: Any, checks: str, path: Path) -> None:
    import prunability_child

    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S[tool], LIMIT_S[tool] + 5))
    path.write_text(json.dumps(prunability_child.run(tool, model, example, checks)))


def _resident_bytes(pid: int | None) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


# ---- tables ----------------------------------------------------------------------------------------------------


def passes(row: dict[str, Any]) -> bool:
    found = row.get("edgeprune", {})
    return "outcome" not in found and found.get("deviation", 1.0) <= TOLERANCE


def seconds(row: dict[str, Any]) -> float | None:
    found = row.get("timed", {}).get("edgeprune") or row.get("edgeprune", {})
    return found["trace_s"] + found["cut_s"] if "trace_s" in found else None


def ranked(row: dict[str, Any]) -> float | None:
    """How many times Torch-Pruning's seconds are ours where both rank channels by their norm."""
    ours, theirs = (row.get("timed", {}).get(f"{tool}, ranked") for tool in ("edgeprune", "torch-pruning"))
    if not ours or not theirs:
        return None
    return float(theirs.get("seconds", LIMIT_S["torch-pruning"]) / (ours["trace_s"] + ours["cut_s"]))


def theirs_s(row: dict[str, Any]) -> float:
    """Torch-Pruning's seconds: its limit where it was stopped, 0 where it crashed."""
    found = row.get("torch-pruning", {}) | row.get("timed", {}).get("torch-pruning", {})
    return float(LIMIT_S["torch-pruning"] if found.get("outcome") == "limit" else found.get("seconds", 0.0))


def summary(networks: dict[str, Any]) -> str:
    """One row a kind, and all together."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in networks.values():
        kinds[row["kind"]].append(row)
    kinds["all"] = list(networks.values())
    header = (
        "networks", "number", "pass", "largest deviation", "at least 80 % prunable", "trace + cut, median s",
        "Torch-Pruning: runs / wrong / crash / limit", "its median s", "times faster, median", "both by L2 norm",
    )  # fmt: skip
    return record.table(header, [_summed(kind, rows) for kind, rows in kinds.items()])


def _summed(kind: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    ours = [row["edgeprune"] for row in rows if "edgeprune" in row]
    theirs = [row["torch-pruning"] for row in rows if "torch-pruning" in row]
    deviations = [o["deviation"] for o in ours if "deviation" in o]
    wide = sum(1 for o in ours if o.get("prunable", 0.0) >= 0.8)
    outcomes = [sum(1 for t in theirs if t.get("outcome") in names) for names in (
        ("runs", "cuts nothing"), ("wrong",), ("crash",), ("limit",))]  # fmt: skip
    took = [s for row in rows if (s := seconds(row)) is not None]
    tp_took = [theirs_s(row) for row in rows if "seconds" in row.get("torch-pruning", {})]
    ratios = [theirs_s(row) / s for row in rows if (s := seconds(row)) is not None and theirs_s(row)]
    return [
        kind, str(len(ours)), str(sum(map(passes, rows))), f"{max(deviations, default=0.0):.1e}",
        f"{wide} ({wide / max(len(ours), 1):.0%})", _median(took), " / ".join(map(str, outcomes)), _median(tp_took),
        _median(ratios), _median([r for row in rows if (r := ranked(row)) is not None]),
    ]  # fmt: skip


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2g}" if values else "-"


def misses(networks: dict[str, Any]) -> str:
    """Networks that do not pass, or that can be pruned by less than 80 %."""
    rows = []
    for name, row in networks.items():
        found = row.get("edgeprune", {})
        if passes(row) and found["prunable"] >= 0.8:
            continue
        why = found.get("error") or "; ".join(f"{n} slices: {why}" for n, why in found["frozen"] if "output" not in why)
        share = f"{found['prunable']:.0%}" if "prunable" in found else "-"
        rows.append([name, "yes" if passes(row) else "no", share, why])
    return record.table(("misses", "passes", "prunable", "why"), rows)


def everything(networks: dict[str, Any]) -> str:
    header = (
        "network", "M params", "pass", "deviation", "prunable", "slices that stay", "groups (inexact)", "one by one",
        "trace + cut, s", "Torch-Pruning", "its s",
    )  # fmt: skip
    return record.table(header, [_full(name, row) for name, row in networks.items()])


def _full(name: str, row: dict[str, Any]) -> list[str]:
    found, theirs = row.get("edgeprune", {}), row.get("torch-pruning", {})
    took, tp_took = seconds(row), theirs_s(row) if "seconds" in theirs else None
    if "deviation" not in found:
        cells = ["-", found.get("outcome", "-"), "-", "-", "-", "-", "-"]
    else:
        cells = [
            f"{found['params'] / 1e6:.1f}", "yes" if passes(row) else "NO", f"{found['deviation']:.0e}",
            f"{found['prunable']:.1%}", _stays(found["frozen"]), f"{found['groups']} ({found['inexact_groups']})",
            f"{found['checked']} of {found['exact']}",
        ]  # fmt: skip
    ending = [theirs.get("outcome", "-"), "-" if tp_took is None else f"{tp_took:.3f}"]
    return [name, *cells, "-" if took is None else f"{took:.3f}", *ending]


def _stays(frozen: Sequence[tuple[int, str]]) -> str:
    """How many slices of parameters have to stay, for each reason in few words."""
    return ", ".join(f"{count:,} {_short(reason)}" for count, reason in frozen) or "none"


def _short(reason: str) -> str:
    for words, fewer in SHORTER:
        reason = reason.replace(words, fewer)
    return re.split(r": | \(| at |, and", reason)[0]


if __name__ == "__main__":
    main()
