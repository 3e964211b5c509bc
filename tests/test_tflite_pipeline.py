"""The whole job through LiteRT in int8, then the finished network as C source."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from edgeprune.profilers import tflite

import edgeprune
from edgeprune import carray, cli, flatbuffer, project

TARGET = """
[target.lite]
kind = "tflite"
precision = "int8"
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with one finished run, made by the command line."""
    folder = tmp_path_factory.mktemp("finished")
    toml = small.TOML.replace("steps = 2", 'steps = 1\ntarget = "lite"')
    small.make(folder, toml.replace("[data]", "arguments = { width = 64 }\n\n[data]") + TARGET)
    process = small.command("compress", "--json", cwd=folder)
    out, err = process.communicate(timeout=600)
    assert process.returncode in (0, 1), err
    assert process.returncode == bool(missed(json.loads(out)))
    (folder / "result.json").write_text(out)
    return folder


def missed(result: dict[str, Any]) -> list[str]:
    return [check["name"] for check in result["checks"] if not check["passed"]]


@pytest.mark.slow
def test_the_accepted_plan_meets_the_budget_in_int8_and_outputs_follow_torch(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())  # one object, nothing else on standard output
    step, start = (json.loads((finished / "runs/001" / f).read_text()) for f in ("step-1/plan.json", "preflight.json"))
    assert step["chosen"]["measured_ms"] <= start["dense_ms"] / 1.6
    # A plan is accepted when it was measured at 0.8 us or more below its budget. The last check measures both networks
    # once more, of 0.1 ms each, when others may use the machine in another way, and says what it finds: it is not
    # repeated until it fits. So it alone may miss, and only by the figures that it reports. Where the clock has no
    # noise, on the emulated board, test_board.py wants 0.
    report = result["report"]
    medians = [report[network]["latency"]["median_ms"] for network in ("dense", "pruned")]
    assert missed(result) == ["latency"] * (medians[1] > medians[0] / 1.6)
    for network in (report["dense"], report["pruned"]):
        assert network["agreement"]["max_difference"] < 0.1
        assert network["agreement"]["same_class"] > 0.9


@pytest.mark.slow
def test_the_installed_bytes_are_the_pruned_network_in_int8(finished: Path) -> None:
    """By an interpreter of our own, image by image, against the pruned module in torch."""
    opened = project.read(finished / "edgeprune.toml")
    module = edgeprune.load(finished / "runs/001", opened.model)
    model = tflite.RUNTIME.Interpreter(model_path=str(finished / "runs/001/artifact/model.tflite"))
    model.allocate_tensors()
    port, answer = model.get_input_details()[0], model.get_output_details()[0]
    assert port["dtype"] == answer["dtype"] == np.int8
    x, _ = next(iter(opened.data.final.batches(64)))
    found = []
    for image in x.numpy():
        scale, zero = port["quantization"]
        stored = np.clip(np.round(image.transpose(1, 2, 0) / scale) + zero, -128, 127).astype(np.int8)
        model.set_tensor(port["index"], stored[None])
        model.invoke()
        scale, zero = answer["quantization"]
        found.append((model.get_tensor(answer["index"])[0].astype(np.float32) - zero) * scale)
    with torch.inference_mode():
        wanted = module(x).numpy()
    assert np.abs(np.array(found) - wanted).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.slow
def test_the_program_beside_an_installed_model_answers_as_torch_did(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(finished)
    assert cli.run(["flash", "--to", str(tmp_path / "net")]) == 0
    current = tmp_path / "net" / "current"
    program = [sys.executable, str(current / "run.py"), str(current / "smoke_inputs.npy"), str(tmp_path / "found.npy")]
    subprocess.run(program, check=True)
    found, recorded = np.load(tmp_path / "found.npy"), np.load(current / "smoke_outputs.npy")
    assert found.shape == recorded.shape
    assert np.abs(found - recorded).max() < 0.1 * np.abs(recorded).max()


@pytest.mark.slow
def test_profile_and_explain_read_the_table_that_the_run_filled(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    assert cli.run(["profile", "--json", "--quiet"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {"conv", "linear", "global_pool"} == {layer["shape"]["op"] for layer in layers}
    assert all(layer["dense_ms"] > 0 for layer in layers)
    assert ["add", "relu"] in [layer["shape"]["fused"] for layer in layers]
    assert cli.run(["explain", "--quiet"]) == 0
    assert "sum of layers" in capsys.readouterr().out


@pytest.mark.slow
def test_the_c_array_is_the_model_byte_for_byte(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    assert cli.run(["export", "--format", "c-array", "--out", "firmware", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [Path(f).name for f in files] == ["model.tflite", "model.h", "model.c"]
    content = Path("firmware/model.tflite").read_bytes()
    assert _bytes_of(Path("firmware")) == content
    header = Path("firmware/model.h").read_text()
    for line in (
        f"#define EDGEPRUNE_MODEL_BYTES {len(content)}",
        "#define EDGEPRUNE_MODEL_INPUT_BYTES 256",
        "/* input: INT8 1x16x16x1 */",
        "/* output: INT8 1x10 */",
        "#define EDGEPRUNE_MODEL_OUTPUT_BYTES 10",
    ):
        assert line in header
    assert all(f"{name} (Add" in header for name in set(flatbuffer.operators(content)))


def _bytes_of(folder: Path) -> bytes:
    """The array as a compiled program prints it; where there is no compiler, as its source says."""
    main = '#include <stdio.h>\n#include "model.h"\n'
    main += (
        "int main(void) { return fwrite(edgeprune_model, 1, sizeof edgeprune_model, stdout) != EDGEPRUNE_MODEL_BYTES; }"
    )
    if shutil.which("cc") is None:
        source = (folder / "model.c").read_text().partition("= {")[2]
        return bytes(int(word, 16) for word in source.replace("};", "").replace(",", " ").split())
    (folder / "main.c").write_text(main)
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "main.c", "model.c", "-o", "main"]
    subprocess.run(command, cwd=folder, check=True)
    return subprocess.run([folder / "main"], capture_output=True, check=True).stdout


@pytest.mark.slow
def test_a_c_array_needs_a_tflite_target_and_a_format_that_exists(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    assert cli.run(["export", "--format", "hex"]) == 2
    assert "--format hex: there are target and c-array" in capsys.readouterr().err
    assert cli.run(["export", "--format", "c-array", "--target", "cpu", "--out", "other"]) == 2
    assert "target cpu loads openvino-ir; name a target of kind tflite with --target" in capsys.readouterr().err


def test_what_a_model_needs_is_counted_from_its_tensors() -> None:
    """A sum of two inputs of 2x3x4 numbers, then an activation: two inputs and the sum are alive together."""
    graph = flatbuffer.Graph()
    a, b = graph.input((1, 2, 3, 4)), graph.input((1, 2, 3, 4))
    summed = graph.operator("ADD", [a, b], (1, 2, 3, 4))
    content = graph.pack(graph.operator("LOGISTIC", [summed], (1, 2, 3, 4)))
    found: Any = carray.needs(content)
    assert found.operators == ("ADD", "LOGISTIC")
    assert found.activations_bytes == 3 * 4 * 24
    assert found.inputs[0] == carray.Port("FLOAT32", (1, 2, 3, 4), 0.0, 0, 96)
    assert found.size_bytes == len(content)
