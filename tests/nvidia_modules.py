"""NVIDIA's own modules, as tools/nvidia installs them, and programs that use them in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgeprune.agent import Agent, local_program
from edgeprune.link import Process

ROOT = Path(__file__).resolve().parent.parent / ".nvidia"
MODULES = {"v8": "tensorrt", "lean": "tensorrt_lean_bindings", "rtx": "tensorrt_rtx_bindings"}
START = "import json, sys; sys.path.insert(0, sys.argv[1]); from device import trt_api\n"
API = "api = trt_api.Api(trt_api.imported((sys.argv[2],)))\n"


def environment(kind: str, driver: bool = False) -> dict[str, str]:
    """Of a process that finds one of the modules, and where it is asked for a real driver without a GPU."""
    assert (ROOT / kind / ".installed").exists(), "NVIDIA's modules are not installed; run tools/nvidia"
    libraries = [str(ROOT / "stubs"), *([str(ROOT / "driver")] if driver else [])]
    return {**os.environ, "PYTHONPATH": str(ROOT / kind), "LD_LIBRARY_PATH": ":".join(libraries)}


def python(kind: str) -> str:
    return str(ROOT / "python3.10") if kind == "v8" else sys.executable


def told(kind: str, body: str, *arguments: str) -> Any:
    """What a program prints last, as JSON; it has an `api` of this module; its arguments begin at sys.argv[3]."""
    command = [python(kind), "-c", START + API + body, str(local_program()), MODULES[kind], *arguments]
    done = subprocess.run(command, env=environment(kind), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # libraries print too


def device_program(kind: str, driver: bool = False) -> Agent:
    """The real device program beside one of the modules."""
    command = [python(kind), "-u", str(local_program()), "tensorrt"]
    return Agent(lambda: Process(command, environment(kind, driver)))
