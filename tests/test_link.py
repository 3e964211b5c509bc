"""Programs that are started and talked to in lines."""

from __future__ import annotations

import subprocess
import sys
import time

from edgeprune.link import Process

LEAVES_ONE_BEHIND = """
import os, time
if os.fork() == 0:
    time.sleep(60)
print("ready", flush=True)
"""


def test_a_program_that_left_a_process_behind_is_closed_with_it() -> None:
    program = Process([sys.executable, "-c", LEAVES_ONE_BEHIND])
    assert program.read(time.monotonic() + 30).strip() == "ready"
    began = time.monotonic()
    program.close()
    assert time.monotonic() - began < 30  # it waits for the other's sixty seconds, or for ever, unless it is ended too


def _loaded_by(imports: str) -> str:
    code = f"import sys; {imports}; print(sys.modules.get('openvino_telemetry'))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_openvino_reports_nothing_to_its_maker() -> None:
    assert "None" in _loaded_by("import edgeprune.profilers.openvino")
    assert "module" in _loaded_by("import openvino_telemetry")  # the check can fail
