"""A device program that dies, hangs or talks nonsense is an error that says so, never a result."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edgeprune.profilers import serve

from edgeprune import target
from edgeprune.agent import Agent
from edgeprune.errors import AgentError, LinkError
from edgeprune.link import Process
from edgeprune.records import Artifact


def program(tmp_path: Path, body: str) -> Agent:
    """An agent whose program says that it is ready, then does `body` with each request."""
    path = tmp_path / "program.py"
    head = """\
    import os, signal, sys, time
    print('{"ready": 1}', flush=True)
    for number, line in enumerate(sys.stdin, 1):
    """
    path.write_text(textwrap.dedent(head) + textwrap.indent(textwrap.dedent(body), "    "))
    return Agent(lambda: Process([sys.executable, "-u", str(path)]))


def test_a_program_that_aborts_is_quoted(tmp_path: Path) -> None:
    body = "print('terminate called: bad_alloc', file=sys.stderr, flush=True); os.abort()"
    with (
        program(tmp_path, body) as agent,
        pytest.raises(AgentError, match=r"exit status -6.*terminate called: bad_alloc"),
    ):
        agent.call("time", 30)


def test_a_program_that_hangs_is_stopped(tmp_path: Path) -> None:
    with program(tmp_path, "time.sleep(600)") as agent:
        began = time.monotonic()
        with pytest.raises(AgentError, match="did not answer in time and was stopped"):
            agent.call("time", 0.5)
        assert time.monotonic() - began < 20
        with pytest.raises(AgentError):  # and stays so
            agent.call("time", 5)


@pytest.mark.parametrize(
    ("said", "message"),
    [("NaN garbage \\xff", "which is no JSON"), ("[1, 2]", "which is no object"), ("", "which is no JSON")],
)
def test_a_program_that_prints_garbage_is_not_believed(tmp_path: Path, said: str, message: str) -> None:
    body = f"sys.stdout.buffer.write(b'{said}\\n'); sys.stdout.flush()"
    with program(tmp_path, body) as agent, pytest.raises(AgentError, match=message):
        agent.call("time", 30)


def test_a_late_answer_to_another_call_is_passed_over(tmp_path: Path) -> None:
    body = """print('{"id": 77, "result": "stale"}\\n{"id": %d, "result": "fresh"}' % number, flush=True)"""
    with program(tmp_path, body) as agent:
        assert agent.call("time", 30) == "fresh"


def test_a_program_that_takes_no_input_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.link.WRITE_S", 0.5)
    deaf = ["sh", "-c", "echo '{\"ready\": 1}'; exec sleep 600"]
    with Agent(lambda: Process(deaf)) as agent, pytest.raises(AgentError, match=r"took no input for 0\.5 s"):
        agent.call("time", 30, layers="x" * 2_000_000)


def served(go: str) -> list[str]:
    """The real device program, with a runtime whose one call `go` is this expression."""
    lines = (
        "import os, sys, time, types",
        "from edgeprune.profilers import serve",
        "made = types.ModuleType('made')",
        f"made.Program = lambda: types.SimpleNamespace(calls=lambda: {{'go': lambda event: {go}}})",
        "sys.modules['edgeprune.profilers.made'] = made",
        "serve.main(['', 'made'])",
    )
    return [sys.executable, "-c", "\n".join(lines)]


def test_what_a_c_library_writes_to_standard_output_is_no_reply() -> None:
    with Agent(lambda: Process(served("os.write(1, b'{}')"))) as agent:
        assert agent.call("go", 30) == 2
        assert agent.call("go", 30) == 2


def test_a_program_ends_with_its_host_in_the_middle_of_a_call() -> None:
    process = subprocess.Popen(served("time.sleep(600)"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    process.stdin.write(b'{"id": 1, "call": "go", "arguments": {}}\n')
    process.stdin.close()
    assert process.wait(30) == -signal.SIGKILL
    process.stdout.close()


def test_a_child_that_a_runtime_forks_neither_hangs_nor_holds_up_the_end() -> None:
    """Some runtimes report home from a forked process, which closes standard input first."""
    fork = "__import__('multiprocessing').get_context('fork').Process(target=time.sleep, args=(0,))"
    go = f"[child := {fork}, child.start(), child.join(20), child.exitcode][-1]"
    with Agent(lambda: Process(served(go))) as agent:
        assert agent.call("go", 30) == 0


def test_a_stray_child_of_a_program_does_not_hold_up_its_end() -> None:
    stray = ["sh", "-c", "echo '{\"ready\": 1}'; (sleep 20) & read line"]
    began = time.monotonic()
    Agent(lambda: Process(stray)).close()
    assert time.monotonic() - began < 15


def test_a_link_that_does_not_come_back_is_an_error_after_a_while() -> None:
    starts = []

    def begin() -> Process:
        if starts:
            raise LinkError("pi cannot be reached: no route")
        starts.append(1)
        return Process(["sh", "-c", "echo '{\"ready\": 1}'; read line; exit 255"], link_status=255)

    agent = Agent(begin, patience_s=3.0)
    with agent, pytest.raises(LinkError, match="pi cannot be reached: no route"):
        agent.call("time", 30)


def test_device_programs_are_python_3_8() -> None:
    for path in Path(serve.__file__).parent.glob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 8))


def test_peak_memory_is_the_programs_own_and_not_what_started_it() -> None:
    held = np.ones(80_000_000)  # 640 MB
    with Agent.local("tflite") as agent:
        assert 10e6 < agent.call("state", 30)["peak_memory_bytes"] < held.nbytes / 2


def test_a_device_program_that_counts_no_memory_is_not_asked_for_it(tmp_path: Path) -> None:
    body = 'print(\'{"id": %d, "result": {}}\' % number, flush=True)'  # as those for GPUs: no state of a processor
    device: Any = SimpleNamespace(
        host=SimpleNamespace(start=lambda *_: program(tmp_path, body)), runtime="cuda", opening={}
    )
    assert target.peak_memory_bytes(device, Artifact("none", (), "", 0, "onnx", "f32")) is None
