"""The whole job on the emulated ARM board, the time of each part, and the board's answers beside this machine's.

    python benchmarks/board.py                  every part that has no result yet, then the table
    python benchmarks/board.py --parts profile  one of them
    python benchmarks/board.py --table          the table of what there is

The project is tools/digits_board. The board's milliseconds are counted instructions, those of no real board; the time
that things take is this machine's. Whole networks of random widths judge the table; their correction was fitted on
others. A part that is stopped goes on with what it has on disk, and its time adds up. `--files FOLDER` keeps it all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import record
from numpy.typing import NDArray

from edgeprune import project
from edgeprune.records import Artifact
from edgeprune.target import open_target

RESULT, NETWORKS, TO = "board", 10, "models/digits"
TOOLS = Path(__file__).resolve().parent.parent / "tools"
PLANS = {"1.25x": ("pi", 1.25), "1.5x": ("pi", 1.5), "2x": ("pi", 2.0), "int8 1.5x": ("pi8", 1.5)}
PLACE_MS = 38e-6  # by which a layer differs in another process: see tests/test_board.py
Found = dict[str, Any]


def edgeprune(*arguments: str, home: str = "home") -> Any:
    """What a command answers. One that missed its budget answers too, with exit status 1."""
    command = [sys.executable, "-m", "edgeprune", *arguments, "--json"]
    where = {**os.environ, "EDGEPRUNE_HOME": str(Path(home).absolute())}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=where)
    if done.returncode not in (0, 1):
        raise subprocess.CalledProcessError(done.returncode, command)
    return {**json.loads(done.stdout), "status": done.returncode}


# ---- parts: each runs in the project's folder, with the board up ------------------------------------------------


def check() -> Found:
    """Everything that the board needs."""
    return {name: text for name, text in edgeprune("targets", "check", "pi").items() if name != "status"}


def profile(home: str = "home") -> Found:
    """Every entry of the table, by its layer."""
    answer = edgeprune("profile", "--quiet", home=home)
    kept = {**os.environ, "EDGEPRUNE_HOME": str(Path(home).absolute())}
    command = [sys.executable, "-m", "edgeprune", "table", "export", f"{home}.json"]
    subprocess.run(command, check=True, env=kept, stdout=subprocess.DEVNULL)
    entries = json.loads(Path(f"{home}.json").read_text())["entries"]
    used = answer["filled"]["entries"]
    return {"used": used, "entries_ms": {json.dumps(e["layer"]): e["timing"]["median_ms"] for e in entries}}


def judge() -> Found:
    """The table against whole networks."""
    return dict(edgeprune("profile", "--quiet", "--check", str(NETWORKS))["check"])


def compress(target: str, speedup: float) -> Found:
    """One plan; its run goes to a folder of its own."""
    run = f"runs/{target}-{speedup:g}"
    answer = edgeprune("compress", "--quiet", "--target", target, "--speedup", str(speedup), "--run", run, "--resume")
    report = answer["report"]
    both = [report[which] for which in ("dense", "pruned")]
    return {
        "run": run,
        "status": answer["status"],
        "median_ms": [each["latency"]["median_ms"] for each in both],
        "budget_ms": both[0]["latency"]["median_ms"] / speedup,
        "predicted_ms": report["predicted_ms"],
        "accuracy": [each["accuracy"]["value"] for each in both],
        "images": both[0]["accuracy"]["total"],
        "peak_memory_bytes": [each["peak_memory_bytes"] for each in both],
        "from_torch": [each["agreement"]["max_difference"] for each in both],
        "checks": answer["checks"],
    }


def flash() -> Found:
    """Install a network, and run it there with the board's own runtime, by the program that lies beside it."""
    receipt = edgeprune("flash", "--target", "pi", "--run", "runs/pi-1.5", "--to", TO)
    current = f"{TO}/current"
    ssh = ["ssh", "-F", "board/ssh_config", "board"]
    compared = (
        "import numpy; a, b = (numpy.load(n) for n in ('o.npy', '" + current + "/smoke_outputs.npy')); "
        "print(abs(a - b).max() / abs(b).max())"
    )
    arguments = [f"{current}/run.py", f"{current}/smoke_inputs.npy", "o.npy"]
    subprocess.run([*ssh, "python3", *arguments], check=True, stdout=subprocess.DEVNULL)
    off = subprocess.run([*ssh, f'python3 -c "{compared}"'], check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"version": receipt["version"], "from_recorded": float(off)}


def alike() -> Found:
    """The pruned networks on the board and here, on every final image; differences are over the largest output."""
    opened = project.read(Path("edgeprune.toml"))
    images = np.concatenate([x.numpy() for x, _ in opened.data.final.batches(256)])
    return {name: _alike(opened, name, images) for name in ("1.5x", "int8 1.5x")}


def _alike(opened: project.Project, plan: str, images: NDArray[Any]) -> Found:
    target, speedup = PLANS[plan]
    precision = opened.sections()[target]["precision"]
    path = Path(f"runs/{target}-{speedup:g}/artifact/model.tflite")
    artifact = Artifact(str(path), (str(path),), "", path.stat().st_size, "tflite", precision)
    outputs = []
    for where in (opened.open_target(target), open_target("x86", {"x86": {"kind": "tflite", "precision": precision}})):
        with closing(where):
            outputs.append(where.run(artifact, [images]))
    there, here = outputs
    return {
        "images": len(images),
        "max_difference": float(np.abs(there - here).max() / np.abs(here).max()),
        "same_class": float((there.argmax(axis=1) == here.argmax(axis=1)).mean()),
    }


PARTS: Mapping[str, Callable[[], Found]] = {
    "check": check,
    "profile": profile,
    "profile again": partial(profile, "again"),
    "networks": judge,
    **{f"compress {name}": partial(compress, *plan) for name, plan in PLANS.items()},
    "flash": flash,
    "alike": alike,
}


# ---- running ---------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """The project, with a trained network; what is there stays."""
    for source in (*(TOOLS / "digits_board").iterdir(), TOOLS / "digits" / "train.py"):
        if source.is_file() and not (folder / source.name).exists():
            shutil.copy(source, folder)
    if not (folder / "weights.safetensors").exists():
        subprocess.run([sys.executable, "train.py"], check=True, cwd=folder)


@contextmanager
def board(folder: Path) -> Iterator[None]:
    """The board, up, in edgeprune.toml as pi and, for int8, pi8."""

    def act(action: str) -> str:
        command = [sys.executable, str(TOOLS / "arm_board"), action, "--state", str(folder / "board")]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()

    config = act("start")
    try:
        for name, precision in (("pi", "f32"), ("pi8", "int8")):
            if f"[target.{name}]" not in (folder / "edgeprune.toml").read_text():
                add = ["targets", "add", name, "--host", "board", "--precision", precision, "--ssh-config", config]
                subprocess.run([sys.executable, "-m", "edgeprune", *add], check=True, cwd=folder)
        yield
    finally:
        act("stop")


def kept(folder: Path, part: str) -> Found:
    path = folder / f"{part}.json"
    return json.loads(path.read_text()) if path.exists() else {"seconds": 0.0, "found": None}


def run(part: str, folder: Path) -> None:
    """One part; how long it took is kept whether or not it comes to its end."""
    known = kept(folder, part)
    print(part, file=sys.stderr, flush=True)
    began = time.monotonic()
    try:
        known["found"] = PARTS[part]()
    finally:
        known["seconds"] += time.monotonic() - began
        (folder / f"{part}.json").write_text(json.dumps(known))


def collect(folder: Path) -> Found | None:
    """All parts in one; None while one is missing."""
    parts = {part: kept(folder, part) for part in PARTS}
    if any(known["found"] is None for known in parts.values()):
        return None
    first, second = (parts[part]["found"].pop("entries_ms") for part in ("profile", "profile again"))
    moved = np.array([abs(second[layer] - ms) for layer, ms in first.items()])
    parts["profile again"]["found"] |= {
        "compared": len(moved),
        "same_layers": first.keys() == second.keys(),
        "within": float((moved <= np.maximum(1e-3 * np.array(list(first.values())), PLACE_MS)).mean()),
        "most_ns": float(moved.max() * 1e6),
    }
    return {"command": "python benchmarks/board.py", "parts": parts}


# ---- the table -------------------------------------------------------------------------------------------------


def table(found: Found) -> str:
    parts = {name: part["found"] for name, part in found["parts"].items()}
    seconds = {name: part["seconds"] for name, part in found["parts"].items()}
    rows = [[name, _TEXTS.get(name, _plan)(parts[name]), f"{seconds[name]:.0f} s"] for name in PARTS]
    job = ("check", "profile", "compress 1.5x", "flash")
    whole = f"the whole job: {', '.join(job)}"
    rows.append([whole, "", f"{sum(seconds[name] for name in job) / 60:.1f} min"])
    return record.table(["part", "found", "takes"], rows)


def _again(found: Found) -> str:
    return (
        f"{found['compared']} entries: {found['within']:.0%} within 0.1 % or 38 ns of the first, at most "
        f"{found['most_ns']:.0f} ns apart"
    )


def _judged(found: Found) -> str:
    return (
        f"{found['networks']} of random widths: median error {found['median_error']:.2%}, 95th percentile "
        f"{found['p95_error']:.2%}, rank correlation {found['rank_correlation']:.3f}"
    )


def _plan(found: Found) -> str:
    dense, pruned = found["median_ms"]
    before, after = found["accuracy"]
    return (
        f"{dense:.4f} to {pruned:.4f} ms, budget {found['budget_ms']:.4f} ({1 - pruned / found['budget_ms']:+.2%} "
        f"left), {found['predicted_ms']:.4f} predicted ({found['predicted_ms'] / pruned - 1:+.2%}); accuracy "
        f"{before:.1%} to {after:.1%} of {found['images']}"
    )


def _compared(found: Found) -> str:
    each = (
        f"{name}: largest difference {a['max_difference']:.1e} of the largest output, same class on "
        f"{a['same_class']:.1%} of {a['images']}"
        for name, a in found.items()
    )
    return "; ".join(each)


_TEXTS: Mapping[str, Callable[[Found], str]] = {
    "check": lambda found: found["runtime"],
    "profile": lambda found: f"{found['used']} entries",
    "profile again": _again,
    "networks": _judged,
    "flash": lambda found: f"to {TO}; run.py there within {found['from_recorded']:.1e} of what torch gave",
    "alike": _compared,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--files", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-board")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a part that is stopped takes its board down with it
    if not options.table:
        folder = options.files.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        missing = [part for part in options.parts if kept(folder, part)["found"] is None]
        if missing:
            prepare(folder)
            os.chdir(folder)
            with board(folder):
                for part in missing:
                    run(part, folder)
        whole = collect(folder)
        if whole is not None:
            record.save(RESULT, whole)
    found = record.load(RESULT)
    print(table(found) if found else "not all parts were run yet")


if __name__ == "__main__":
    main()
