"""The whole job on the emulated ARM board, the time of each part, and the board's answers beside this machine's.

    python benchmarks/board.py            all of it, in a folder that is thrown away
    python benchmarks/board.py --table    the table alone

The project is tools/digits_board. The board's milliseconds are counted instructions, those of no real board; the time
that things take is this machine's. Whole networks of random widths judge the table; nothing is fitted on them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import record

from edgeprune import project, runs
from edgeprune.records import Artifact
from edgeprune.runs import Run
from edgeprune.target import open_target
from edgeprune.verify import FORMAT, VerifyReport

RESULT, NETWORKS, TO = "board", 10, "models/digits"
TOOLS = Path(__file__).resolve().parent.parent / "tools"


def edgeprune(*arguments: str) -> Any:
    """What a command answers."""
    command = [sys.executable, "-m", "edgeprune", *arguments, "--json", "--quiet"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def board(state: Path, action: str) -> str:
    command = [sys.executable, str(TOOLS / "arm_board"), action, "--state", str(state)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def run(folder: Path) -> dict[str, Any]:
    """Every part in turn, timed."""
    seconds: dict[str, float] = {}

    def timed(part: str, *arguments: str) -> Any:
        began = time.monotonic()
        answer = edgeprune(*arguments)
        seconds[part] = time.monotonic() - began
        return answer

    for source in (*(TOOLS / "digits_board").iterdir(), TOOLS / "digits" / "train.py"):
        shutil.copy(source, folder)
    os.chdir(folder)
    os.environ["EDGEPRUNE_HOME"] = str(folder / "home")
    subprocess.run([sys.executable, "train.py"], check=True)
    began = time.monotonic()
    config = board(folder / "board", "start")
    seconds["start"] = time.monotonic() - began
    try:
        add = ["targets", "add", "pi", "--host", "board", "--ssh-config", config]
        subprocess.run([sys.executable, "-m", "edgeprune", *add], check=True)
        profiled = timed("profile", "profile")
        checked = timed("check", "profile", "--check", str(NETWORKS))["check"]
        timed("compress", "compress")
        timed("flash", "flash", "--to", TO)
        answers = alike(folder)
    finally:
        board(folder / "board", "stop")
    report = runs.as_record(VerifyReport, Run(folder / "runs/001").read("verify.json", FORMAT))
    return {
        "command": "python benchmarks/board.py",
        "seconds": seconds,
        "entries": profiled["filled"]["entries"],
        "check": checked,
        "dense_ms": report.dense.latency.median_ms,
        "pruned_ms": report.pruned.latency.median_ms,
        "predicted_ms": report.predicted_ms,
        "accuracy": [n.accuracy.value for n in (report.dense, report.pruned) if n.accuracy is not None],
        "peak_memory_bytes": [report.dense.peak_memory_bytes, report.pruned.peak_memory_bytes],
        "largest_difference_from_torch": [n.agreement.max_difference for n in (report.dense, report.pruned)],
        "board_beside_this_machine": answers,
    }


def alike(folder: Path) -> dict[str, Any]:
    """The pruned network on the board and here, on every final image; differences are over the largest output."""
    opened = project.read(folder / "edgeprune.toml")
    path = folder / "runs/001/artifact/model.tflite"
    artifact = Artifact(str(path), (str(path),), "", path.stat().st_size, "tflite", "f32")
    images = np.concatenate([x.numpy() for x, _ in opened.data.final.batches(256)])
    outputs = []
    for target in (opened.open_target("pi"), open_target("lite", {"lite": {"kind": "tflite"}})):
        with closing(target):
            outputs.append(target.run(artifact, [images]))
    there, here = outputs
    same = float((there.argmax(axis=1) == here.argmax(axis=1)).mean())
    return {
        "images": len(images),
        "max_difference": float(np.abs(there - here).max() / np.abs(here).max()),
        "same_class": same,
    }


def table(found: dict[str, Any]) -> str:
    check, seconds = found["check"], found["seconds"]
    errors = np.abs(np.array(check["predicted_ms"]) / np.array(check["measured_ms"]) - 1)
    answers = found["board_beside_this_machine"]
    rows = [
        ["table", f"{found['entries']} entries", f"{seconds['profile']:.0f} s"],
        [
            f"{len(errors)} whole networks",
            f"median error {np.median(errors):.2%}, 95th percentile {np.percentile(errors, 95):.2%}, "
            f"rank correlation {check['rank_correlation']:.3f}",
            f"{seconds['check']:.0f} s",
        ],
        [
            "compress",
            f"{found['dense_ms']:.4f} to {found['pruned_ms']:.4f} ms emulated ({found['predicted_ms']:.4f} predicted), "
            f"accuracy {found['accuracy'][0]:.1%} to {found['accuracy'][1]:.1%}",
            f"{seconds['compress']:.0f} s",
        ],
        ["flash", f"to {TO}", f"{seconds['flash']:.0f} s"],
        [
            "the board's answers beside x86's",
            f"largest difference {answers['max_difference']:.1e} of the largest output, "
            f"same class on {answers['same_class']:.1%} of {answers['images']} images",
            "",
        ],
    ]
    return record.table(["part", "found", "takes"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        with tempfile.TemporaryDirectory(prefix="edgeprune-board-") as folder:
            record.save(RESULT, run(Path(folder)))
    found = record.load(RESULT)
    print(table(found) if found else "nothing was run yet")


if __name__ == "__main__":
    main()
