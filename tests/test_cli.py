"""Bad input gets its own clear error and the right exit status; good input one result."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import small
import tomllib
import torch
from safetensors.torch import save_file

from edgeprune import api, cli
from edgeprune.errors import RunError


def fails(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    """Run a command that must fail with this status; returns its message."""
    assert cli.run(list(arguments)) == status
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return out.err


@pytest.fixture
def project(folder: Path) -> Path:
    return small.make(folder)


def edit(project: Path, old: str, new: str) -> None:
    text = project.read_text()
    assert old in text
    project.write_text(text.replace(old, new))


def test_init_writes_a_project_file_that_is_read_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["init", "torchvision:resnet18"]) == 0
    assert tomllib.loads(Path("edgeprune.toml").read_text())["model"]["source"] == "torchvision:resnet18"
    assert "edgeprune.toml exists; --force replaces it" in fails(capsys, 2, "init")
    assert cli.run(["targets"]) == 0
    assert cli.run(["init", "--force"]) == 0


def test_without_a_project_file_init_is_suggested(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "edgeprune.toml does not exist; `edgeprune init` writes one" in fails(capsys, 2, "compress")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("source = \"model.py", "sauce = \"model.py", "unknown key model.sauce; did you mean source?"),
        ("speedup = 1.6", "strategy = \"magic\"", "'magnitude' or 'soft' (it is 'magic')"),
        ("speedup = 1.6", "speed_up = 2", "unknown key compress.speed_up; did you mean speedup?"),
        ("[0.6, 0.2, 0.2]", "[0.6, 0.6, 0.2]", "split: three positive shares that add up to 1 are needed"),
        ("[compress]", "[target.pi]\nkind = \"toaster\"\n[compress]", "'toaster' is no kind of target; there are: cpu"),
        ("[compress]", "[target.pi]\nkind = \"cpu\"\nthread = 2\n[compress]", "[target.pi]: unknown key thread"),
        ("[compress]", "[profile]\ninterval = 0\n[compress]", "profile.interval: input should be greater than 0"),
        ("[compress]", "[compress", "is not valid TOML"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_named(
    project: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    edit(project, old, new)
    assert message in fails(capsys, 2, "compress")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.py:build", "nowhere.py does not exist"),
        ("model.py:missing", "model.py has no function 'missing'"),
        ("no.such.package:build", "no.such.package does not import: No module named 'no'"),
        ("model.py:not_a_module", "returned str, not a torch.nn.Module"),
        ("model.py:raises", "model.source model.py:raises failed: RuntimeError: no licence"),
        ("model.py:flat", "model.py:flat fails on an input of shape [1, 1, 16, 16]"),
        ("torchvision:resnet19", "torchvision:resnet19 failed: ValueError: Unknown model resnet19"),
        ("nonsense", "'nonsense' is none of file.py:function, package.module:function, torchvision:NAME, timm:NAME"),
    ],
)  # fmt: skip
def test_a_model_source_that_does_not_work_is_explained(
    project: Path, capsys: pytest.CaptureFixture[str], source: str, message: str
) -> None:
    edit(project, "model.py:build", source)
    assert message in fails(capsys, 2, "inspect")


def test_a_model_that_is_no_classifier_is_sent_to_the_python_call(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(project, "model.py:build", "model.py:features")
    message = fails(capsys, 2, "compress")
    assert "returns no (batch, classes) scores: only classifiers are trained here. Use edgeprune.compress" in message


def test_weights_that_do_not_fit_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(project, "input = ", 'weights = "w.safetensors"\ninput = ')
    assert "w.safetensors does not exist" in fails(capsys, 2, "inspect")
    save_file({"fc.weight": torch.zeros(10, 7), "other": torch.zeros(1)}, "w.safetensors")
    message = fails(capsys, 2, "inspect")
    assert "does not fit the model (missing: a.0.weight" in message
    assert "unknown: other" in message
    assert "of another shape: fc.weight is [10, 7], the model has [10, 96]" in message
    Path("w.safetensors").write_bytes(b"not one")
    assert "w.safetensors cannot be read" in fails(capsys, 2, "inspect")


def test_a_pickle_that_holds_more_than_tensors_is_refused_without_running_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(project, "input = ", 'weights = "w.pt"\ninput = ')

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path("touched").touch, ())

    torch.save(Evil(), "w.pt")
    message = fails(capsys, 2, "inspect")
    assert "is a pickle that holds more than tensors; loading it would run code" in message
    assert not Path("touched").exists()
    torch.save({"no": "state"}, "w.pt")
    assert "w.pt holds no state dict" in fails(capsys, 2, "inspect")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--latency-ms", "0"], 2, "a budget of 0 ms makes no sense"),
        (["--latency-ms", "-3"], 2, "a budget of -3 ms makes no sense"),
        (["--speedup", "1"], 2, "a speed-up of 1 asks for nothing"),
        (["--latency-ms", "1", "--speedup", "2"], 2, "give one budget"),
        (["--set", "compress.speedup=none"], 2, "a budget of 'none' cannot be read: write one number (8), several"),
        (["--set", "compress.speedup=[true]"], 2, "compress.speedup: write one number (8), several ([8, 6, 4])"),
        (["--latency-ms", "8,six"], 2, "a budget of '8,six' cannot be read: write one number (8), several (8,6,4)"),
        (["--latency-ms", "8,8"], 2, "the same budget is given twice; nested plans need different ones"),
        (["--latency-ms", "8,-1"], 2, "a budget of -1 ms makes no sense"),
        (["--latency-ms", "cpu=8,pi=9"], 2, "there are budgets for cpu, pi and the targets are cpu: give each"),
        (["--target", "cpu,pi", "--latency-ms", "8,6"], 2, "give each target one: cpu=8,pi=6"),
        (["--set", "nonsense"], 2, "'nonsense' is no override; write section.key=value"),
        (["--target", "moon"], 2, "there is no target 'moon'; edgeprune.toml has cpu"),
        (["--no-such-option"], 2, "No such option"),
    ],
)  # fmt: skip
def test_a_budget_or_option_that_makes_no_sense_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    assert message in fails(capsys, status, "compress", *arguments)


def test_labels_beyond_the_classifier_are_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "label 9 but the model has 4 outputs" in fails(
        capsys, 2, "compress", "--set", "model.arguments={classes = 4}"
    )


def test_a_run_that_does_not_exist_or_is_not_finished_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no run in runs; `edgeprune compress` makes one" in fails(capsys, 2, "report")
    Path("runs/001").mkdir(parents=True)
    assert "runs/001 holds no finished run" in fails(capsys, 2, "verify")
    assert "runs/001 holds no finished run" in fails(capsys, 2, "flash")


def test_inspect_prints_groups_for_people_and_one_object_for_programs(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["inspect"]) == 0
    text = capsys.readouterr().out
    assert "stem.0: 32 units" in text
    assert "the network's output" in text
    assert cli.run(["inspect", "model.py:build", "--input", "2x1x12x12", "--check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"groups", "frozen", "prunable_params", "total_params", "max_deviation", "seconds"} <= found.keys()
    assert found["max_deviation"] < 1e-12
    assert [g["id"] for g in found["groups"]] == ["stem.0", "a.0", "b.0"]
    assert "--input 3xtwo: write the shape as 1x3x224x224" in fails(
        capsys, 2, "inspect", "model.py:build", "--input", "3xtwo"
    )


def test_errors_are_one_object_when_asked_for(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compress", "--latency-ms", "0", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "BudgetError"


def test_importing_edgeprune_loads_neither_torch_nor_a_runtime() -> None:
    heavy = "{'torch', 'openvino', 'onnx', 'lightning_fabric', 'plotly', 'scipy'}"
    code = f"import sys, edgeprune, edgeprune.cli, edgeprune.errors; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    loaded = subprocess.run(
        [sys.executable, "-c", code.replace("import sys,", "import sys, torch,")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "torch" in loaded.stdout  # the check can fail


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("init", "targets", "inspect", "profile", "compress", "explain", "export", "verify", "flash", "report"):
        assert name in text


# ---- what a machine may lack ---------------------------------------------------------------------------------


def test_without_the_runtime_the_extra_is_named(project: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    absent.mkdir()
    (absent / "openvino.py").write_text("raise ModuleNotFoundError(\"No module named 'openvino'\", name='openvino')")
    process = small.command("profile", cwd=project.parent, environment={"PYTHONPATH": str(absent)})
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "target cpu needs OpenVINO" in err
    assert "install it with: pip install 'edgeprune[openvino]'" in err


def test_a_damaged_latency_table_is_refused_with_what_to_do(project: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "latency.sqlite").write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 8)
    process = small.command("profile", cwd=project.parent, environment={"EDGEPRUNE_HOME": str(home)})
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"the latency table {home}/latency.sqlite cannot be used" in err
    assert "move it away and profile again" in err


def test_processes_that_begin_at_once_get_folders_of_their_own_and_unused_ones_are_gone(tmp_path: Path) -> None:
    together, found = threading.Barrier(8), []

    def begin(at: int) -> None:
        together.wait()
        with api.new_run(tmp_path / "runs") as folder:
            found.append(folder)
            if at % 2:
                (folder / "run.json").touch()
            together.wait()

    each = [threading.Thread(target=begin, args=(at,)) for at in range(8)]
    for thread in each:
        thread.start()
    for thread in each:
        thread.join()
    assert sorted(folder.name for folder in found) == [f"{n:03d}" for n in range(1, 9)]
    assert len(list((tmp_path / "runs").iterdir())) == 4
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match=r"file/001 cannot be made: Not a directory; check"),
        api.new_run(tmp_path / "file"),
    ):
        pass
    with api.new_run(tmp_path / "none") as folder:
        assert folder.name == "001"
    assert not (tmp_path / "none").exists()
