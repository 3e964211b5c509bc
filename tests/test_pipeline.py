"""The whole job on a real runtime and real data, killed and resumed, and used from Python."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import small
import torch
from torch import nn

import edgeprune
from edgeprune import cli, project, runs, verify
from edgeprune.errors import BudgetError, RunError, UnreachableBudget
from edgeprune.records import VerifyReport
from edgeprune.runs import Run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with one finished run, made by the command line."""
    folder = tmp_path_factory.mktemp("finished")
    small.make(folder)
    process = small.command("compress", "--json", cwd=folder)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    (folder / "result.json").write_text(out)
    return folder


def report_of(folder: Path) -> VerifyReport:
    run = Run(folder / "runs/001")
    return runs.as_record(VerifyReport, run.read("verify.json", "edgeprune.verify/1"))


def test_the_budget_is_met_as_measured_and_not_wasted(finished: Path) -> None:
    report = report_of(finished)
    assert verify.passed(report)
    limit = report.dense.latency.median_ms / 1.6
    assert report.pruned.latency.median_ms <= limit
    assert report.speedup_low <= report.speedup <= report.speedup_high
    result = json.loads((finished / "result.json").read_text())  # one object, nothing else on standard output
    assert result["passed"] is True
    assert result["report"]["speedup"] == report.speedup
    assert Path(finished / result["page"]).stat().st_size > 100_000


def test_the_exported_network_is_the_pruned_module_by_another_runtime(finished: Path) -> None:
    opened = project.read(finished / "edgeprune.toml")
    module = edgeprune.load(finished / "runs/001", opened.model)
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in opened.model.parameters())
    session = onnxruntime.InferenceSession(str(finished / "runs/001/artifact/model.onnx"))
    for x, _ in opened.data.final.batches(1):
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.inference_mode():
            assert np.allclose(found, module(x).numpy(), atol=1e-4)
        break


def test_accuracy_on_the_target_is_that_of_torch_on_the_same_images(finished: Path) -> None:
    opened = project.read(finished / "edgeprune.toml")
    module = edgeprune.load(finished / "runs/001", opened.model)
    correct = total = 0
    with torch.inference_mode():
        for x, y in opened.data.final.batches(64):
            correct += int((module(x).argmax(1) == y).sum())
            total += len(y)
    accuracy = report_of(finished).pruned.accuracy
    assert accuracy is not None
    assert accuracy.total == total
    assert abs(accuracy.correct - correct) <= 1  # a tie may fall to either side


def test_a_missed_accuracy_floor_ends_with_1_and_one_object(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    for name, change in (
        ("run.json", lambda content: content["asked"].update(accuracy_floor=0.9)),
        ("verify.json", lambda content: content.update(accuracy_floor=0.9)),
        ("verify.json", lambda content: content["pruned"]["accuracy"].update(value=0.5)),
    ):
        content = json.loads(Path("runs/001", name).read_text())
        change(content)
        Path("runs/001", name).write_text(json.dumps(content))
    assert cli.run(["compress", "--resume", "--json", "--quiet", "--set", "compress.accuracy_floor=0.9"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["passed"] is False
    assert "accuracy: 50.00% measured, floor 90.00%" in err


def test_a_run_folder_holds_no_pickle(finished: Path) -> None:
    kinds = {p.suffix for p in (finished / "runs/001").rglob("*") if p.is_file()}
    assert kinds <= {".json", ".safetensors", ".onnx", ".xml", ".bin", ".html", ".npy"}


def test_a_finished_run_is_verified_exported_installed_and_rolled_back(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    assert cli.run(["verify", "--json", "--quiet"]) in (0, 1)  # measured again on a machine that may be busy
    capsys.readouterr()
    assert cli.run(["export", "--out", "files"]) == 0
    assert "files/model.xml" in capsys.readouterr().out
    assert cli.run(["flash", "--to", "device", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    manifest = json.loads(Path("device/current/manifest.json").read_text())
    assert manifest["input"]["shape"] == [1, 1, 16, 16]
    assert manifest["output"]["labels"] == [str(i) for i in range(10)]
    assert len(manifest["preprocessing"]["mean"]) == 1
    recipe = Path("runs/001/recipe.json")
    assert cli.run(["flash", "--rollback", "--to", "device"]) == 3
    assert "nothing" in capsys.readouterr().err
    shutil.copytree("runs/001", "runs/002")
    graph = (Path("runs/002") / "artifact" / "model.xml").read_text()
    (Path("runs/002") / "artifact" / "model.xml").write_text(graph + "\n<!-- another file -->\n")
    assert cli.run(["flash", "--to", "device", "--run", "runs/002"]) == 0
    assert cli.run(["flash", "--rollback", "--to", "device"]) == 0
    assert os.readlink("device/current").endswith(first["version"])
    capsys.readouterr()
    assert cli.run(["flash", "--list", "--to", "device", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["versions"]) == 2
    assert recipe.exists()
    shutil.rmtree("runs/002")


def test_a_model_that_does_not_answer_as_recorded_is_not_installed(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    shutil.copytree("runs/001", "runs/003")
    weights = Path("runs/003/artifact/model.bin")
    content = bytearray(weights.read_bytes())
    content[200:4000] = np.random.default_rng(0).normal(size=950).astype(np.float32).tobytes()
    weights.write_bytes(content)
    assert cli.run(["flash", "--to", "elsewhere", "--run", "runs/003"]) == 3
    assert "answers its recorded inputs with a difference of" in capsys.readouterr().err
    assert not Path("elsewhere/current").exists()
    shutil.rmtree("runs/003")


def test_runs_of_other_networks_and_settings_are_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    shutil.copytree(finished, folder)
    opened = project.read(folder / "edgeprune.toml")
    with pytest.raises(RunError, match="was made from another network"):
        edgeprune.load(
            folder / "runs/001", project.read(folder / "edgeprune.toml", ["model.arguments={width = 8}"]).model
        )
    for arguments, message in (
        (["--resume", "--speedup", "1.5"], "was started with other settings (budget was"),
        (["--resume", "--set", "model.arguments={width = 8}"], "belongs to another network"),
        (["--run", str(folder / "runs/001")], "holds a run already; go on with --resume"),
        (["--run", str(folder)], "is not empty and holds no run"),
    ):
        process = small.command("compress", *arguments, cwd=folder)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2, err
        assert message in err
    weights = folder / "runs/001/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"model\.safetensors is damaged or missing"):
        edgeprune.load(folder / "runs/001", opened.model)
    (folder / "runs/001/recipe.json").write_text('{"format": "edgeprune.recipe/1", "keep"')
    with pytest.raises(RunError, match=r"recipe\.json is damaged"):
        edgeprune.load(folder / "runs/001", opened.model)


# ---- kills ---------------------------------------------------------------------------------------------------

MOMENTS = {  # a file whose appearance says how far a run has come
    "while layers are measured": "runs/001/run.json",
    "after the preflight": "runs/001/preflight.json",
    "after the first cut": "runs/001/step-1/plan.json",
    "between two epochs": "runs/001/step-2/epochs.json",
    "before the verification": "runs/001/recipe.json",
}


def killed_at(folder: Path, moment: str, delay_s: float) -> None:
    """Start a run and kill -9 it, children too, when a file has appeared."""
    process = small.command("compress", *(["--resume"] if (folder / "runs/001").exists() else []), cwd=folder)
    deadline = time.monotonic() + 300
    while not (folder / MOMENTS[moment]).exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_run_killed_at_five_moments_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    small.make(tmp_path)
    before = None
    for number, moment in enumerate(MOMENTS):
        killed_at(tmp_path, moment, 0.1 * number)
        plan = tmp_path / "runs/001/step-1/plan.json"
        if plan.exists():
            assert before is None or plan.read_bytes() == before, "a finished step was done again"
            before = plan.read_bytes()
    process = small.command("compress", "--resume", "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert json.loads(out)["passed"]
    run = Run(tmp_path / "runs/001")
    epochs = run.read("step-2/epochs.json", "edgeprune.epoch/1")["epochs"]
    assert [e["epoch"] for e in epochs] == [1, 2]
    assert not list((tmp_path / "runs/001").rglob(".*"))
    assert not [p for p in (tmp_path / "runs/001").iterdir() if p.name.startswith("plan-")]


def test_a_run_killed_while_it_trains_goes_on_from_the_last_epoch(tmp_path: Path) -> None:
    """The epochs that are done are not done again, and the weights are those of an undisturbed training."""
    small.make(tmp_path)
    opened = project.read(tmp_path / "edgeprune.toml")
    task = opened.task()

    def fresh() -> nn.Module:
        return project.read(tmp_path / "edgeprune.toml").model

    straight = fresh()
    task.epochs = 3
    task.train(straight, opened.model, True, tmp_path / "straight", None)

    class Killed(Exception):
        pass

    def kill(done: int, of: int) -> None:
        if done > 2 * of // 3 + 2:
            raise Killed

    halting = fresh()
    with pytest.raises(Killed):
        task.train(halting, opened.model, True, tmp_path / "halting", kill)
    resumed = fresh()
    batches: list[int] = []
    history = task.train(resumed, opened.model, True, tmp_path / "halting", lambda done, of: batches.append(done))
    assert [e.epoch for e in history] == [1, 2, 3]
    assert batches[0] == 2 * len(batches) + 1
    for name, tensor in straight.state_dict().items():
        assert torch.allclose(tensor.float(), resumed.state_dict()[name].float(), atol=1e-6), name


def _running_in(folder: Path) -> list[int]:
    """The processes that work in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(entry)) == folder:
                found.append(int(entry.parent.name))
    return found


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    small.make(tmp_path)
    # a shell that runs the tests in its background has them ignore Ctrl-C, and so would their children
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = small.command("compress", cwd=tmp_path)
    signal.signal(signal.SIGINT, inherited)
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs/001/run.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    assert len(_running_in(tmp_path)) > 1  # it and its device program
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with `edgeprune compress --resume`" in err
    assert "Traceback" not in err
    assert not _running_in(tmp_path)


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(small_disk: Path) -> None:
    torch.manual_seed(0)
    model, x, run = Plain(), torch.randn(1, 3, 32, 32), small_disk / "run"
    filler = small_disk / "filler"
    for free_bytes in (8_000, 60_000, 90_000, 160_000):  # for the example, the ONNX file, the IR, the plans
        filler.unlink(missing_ok=True)
        with filler.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(small_disk).free - free_bytes)
        with pytest.raises(RunError, match=r"the disk is full: .* could not be written and is unchanged; make room"):
            edgeprune.compress(model, x, speedup=1.5, run=run, steps=1, resume=True)
    filler.unlink()
    outcome = edgeprune.compress(model, x, speedup=1.5, run=run, steps=1, resume=True)
    assert outcome.report.speedup > 1
    assert not list(run.rglob(".*"))


# ---- budgets -------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


def test_an_impossible_budget_ends_before_any_training_with_the_floor(tmp_path: Path) -> None:
    trained: list[nn.Module] = []
    with pytest.raises(UnreachableBudget, match=r"the fastest this network gets on this device is .* ms .*min_width"):
        edgeprune.compress(
            Plain(), torch.randn(1, 3, 32, 32), latency_ms=1e-4, train=trained.append, run=tmp_path / "run", steps=1
        )
    assert not trained
    assert (tmp_path / "run/preflight.json").exists()


def test_a_budget_above_the_dense_latency_asks_for_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        BudgetError, match=r"above the dense network's latency, .* ms measured: there is nothing to prune"
    ):
        edgeprune.compress(Plain(), torch.randn(1, 3, 32, 32), latency_ms=1e4, run=tmp_path / "run")


def test_people_with_their_own_loop_use_one_call(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, calls = Plain(), []

    def train(network: nn.Module) -> None:
        calls.append(sum(p.numel() for p in network.parameters()))

    outcome = edgeprune.compress(
        model,
        torch.randn(1, 3, 32, 32),
        speedup=1.5,
        train=train,
        evaluate=lambda network: 0.5,
        run=tmp_path / "run",
        steps=2,
    )
    dense = sum(p.numel() for p in model.parameters())
    assert len(calls) == 2
    assert dense > calls[0] > calls[1]
    assert sum(p.numel() for p in outcome.model.parameters()) == calls[1]
    again = edgeprune.load(tmp_path / "run", Plain())
    x = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(again(x), outcome.model(x))
    assert outcome.report.pruned.accuracy is None
