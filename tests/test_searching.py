"""Searches on a real network: the journal, killed and resumed; workers, and workers that die; the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import small
import torch
from test_allocate import Residual, made_up
from torch import Tensor, nn

from edgeprune import cli, search
from edgeprune.config import SearchSection
from edgeprune.errors import RunError, UsageError, WorkerError
from edgeprune.records import Evaluation
from edgeprune.runs import Run
from edgeprune.search import Candidate, Space, Subject
from edgeprune.search.journal import Journal, read
from edgeprune.task import Callables
from edgeprune.watch import Silent


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 3, 8, 8, generator=generator), torch.zeros(16, dtype=torch.long))]


def brightness(model: nn.Module) -> float:
    """An answer that depends on every weight."""
    with torch.no_grad():
        return float(torch.sigmoid(model.eval()(batches()[0][0]).mean()))


class Fragile(Callables):
    """Kills the process that judges, as long as a folder holds a file for it."""

    def __init__(self, folder: Path, parent: int) -> None:
        super().__init__(evaluate=brightness, batches=batches)
        self.folder, self.parent = folder, parent

    def judge(self, model: nn.Module, images: int) -> Evaluation:
        for bullet in sorted(self.folder.glob("bullet-*"))[:1]:
            assert os.getpid() != self.parent
            bullet.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().judge(model, images)


def subject_in(folder: Path, task: Callables | None = None) -> tuple[Subject, Space]:
    torch.manual_seed(1)
    net = Residual()
    graph, costs, scores = made_up(net, choices=6)
    task = task or Callables(evaluate=brightness, batches=batches)
    budget = 0.5 * costs.predict_ms(costs.dense)
    return Subject(net, graph, net, {}, scores, task, Run(folder)), Space(costs, scores, (budget,))


def found_in(folder: Path, strategy: str = "rl", task: Callables | None = None, **settings: object) -> Candidate:
    subject, space = subject_in(folder, task)
    section = SearchSection.model_validate({"evaluations": 24, **settings})
    return search.find(subject, space, strategy, section, 1, 0, Silent())


def judged(folder: Path) -> list[tuple[Sequence[int], float]]:
    return [(key, found.loss) for key, found in read(folder / search.JOURNAL)]


def test_a_candidate_is_judged_as_the_network_cut_to_its_widths(tmp_path: Path) -> None:
    subject, _ = subject_in(tmp_path)
    found = found_in(tmp_path)
    module = subject.cut(found.units)
    assert found.evaluation.accuracy == pytest.approx(brightness(module), abs=1e-6)
    assert module.get_submodule("stem").weight.shape[0] == found.units["stem"] < 16  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("strategy", search.NAMES)
def test_a_search_that_was_cut_short_ends_with_the_same_result(tmp_path: Path, strategy: str) -> None:
    whole = found_in(tmp_path / "whole", strategy)
    content = (tmp_path / "whole" / search.JOURNAL).read_bytes()
    for name, cut in (("between", content[: content.index(b"\n", 400) + 1]), ("within", content[:450])):
        (tmp_path / name).mkdir()
        (tmp_path / name / search.JOURNAL).write_bytes(cut)
        again = found_in(tmp_path / name, strategy)
        assert (again.units, again.evaluation) == (whole.units, whole.evaluation)
        assert (tmp_path / name / search.JOURNAL).read_bytes() == content


def test_a_journal_that_is_complete_is_not_judged_again(tmp_path: Path) -> None:
    first = found_in(tmp_path)

    def refuse(model: nn.Module) -> float:
        raise AssertionError

    assert found_in(tmp_path, task=Callables(evaluate=refuse, batches=batches)).units == first.units


def test_a_damaged_or_foreign_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / search.JOURNAL
    with closing(Journal(path, ("a", "b"))) as journal:
        journal.add((4, 8), Evaluation(0.5, 0.75))
    with closing(Journal(path, ("a", "b"))) as journal:
        assert journal.known == {(4, 8): Evaluation(0.5, 0.75)}
    with pytest.raises(RunError, match=r"search\.jsonl belongs to another search; start a new run"):
        Journal(path, ("a", "c"))
    path.write_text(path.read_text() + '{"widths": [4, 6]}\n')
    with pytest.raises(RunError, match=r"search\.jsonl, line 3 is damaged \('loss'\); delete the line"):
        Journal(path, ("a", "b"))


def test_a_search_without_a_way_to_judge_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a search judges networks by their accuracy: give evaluate"):
        found_in(tmp_path, task=Callables(batches=batches))


def test_neither_ray_nor_pymoo_is_imported_before_it_is_needed() -> None:
    code = "import sys, edgeprune.search; print([m for m in ('ray', 'pymoo') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- workers -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_find_what_one_process_finds_though_one_dies(tmp_path: Path) -> None:
    alone = found_in(tmp_path / "alone")
    (tmp_path / "bullet-1").touch()
    together = found_in(tmp_path / "together", task=Fragile(tmp_path, os.getpid()), workers=2)
    assert not (tmp_path / "bullet-1").exists()
    assert (together.units, together.evaluation) == (alone.units, alone.evaluation)
    assert sorted(judged(tmp_path / "together")) == sorted(judged(tmp_path / "alone"))


@pytest.mark.slow
def test_a_candidate_that_kills_every_worker_and_an_error_of_the_users_are_told(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"bullet-{number}").touch()
    with pytest.raises(WorkerError, match=r"the widths \{'stem': .*\} ended 3 workers, the last one with: "):
        found_in(tmp_path / "dying", task=Fragile(tmp_path, os.getpid()), ray="local")

    def broken(model: nn.Module) -> float:
        raise ZeroDivisionError("no images of class 3")

    with pytest.raises(ZeroDivisionError, match="no images of class 3"):
        found_in(tmp_path / "broken", task=Callables(evaluate=broken, batches=batches), ray="local")


# ---- the command line ----------------------------------------------------------------------------------------

SHORT = ("--set", "search.images=100", "--epochs", "0", "--set", "compress.steps=1")


@pytest.mark.slow
def test_compress_with_rl_is_killed_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    small.make(tmp_path, small.QUICK)
    arguments = ("compress", "--strategy", "rl", "--set", "search.evaluations=14", *SHORT)
    process = small.command(*arguments, cwd=tmp_path)
    journal = tmp_path / "runs/001/step-1" / search.JOURNAL
    deadline = time.monotonic() + 600
    while not journal.exists() or len(journal.read_bytes().splitlines()) < 5:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = journal.read_text()
    process = small.command(*arguments, "--resume", "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=600)
    assert process.returncode in (0, 1), err  # measured on a machine that may be busy
    assert json.loads(out)["report"]["speedup"] > 1.3
    assert journal.read_text().startswith(before[: before.rindex("\n") + 1])
    plan = json.loads((tmp_path / "runs/001/step-1/plan.json").read_text())
    searched = [key for key, _ in judged(journal.parent)]
    assert len(set(searched)) == len(searched) <= 14
    assert set(plan["chosen"]["plan"]["widths"]) == set(json.loads(before.splitlines()[0])["groups"])


@pytest.mark.slow
def test_compress_with_genetic_writes_a_front_to_choose_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small.make(tmp_path, small.QUICK)
    monkeypatch.chdir(tmp_path)
    arguments = ["compress", "--strategy", "genetic", "--quiet", "--set", "search.evaluations=14", *SHORT]
    assert cli.run(arguments) in (0, 1)  # measured on a machine that may be busy
    out = capsys.readouterr().out
    folder = tmp_path / "runs/001/step-1"
    plans = json.loads((folder / "front.json").read_text())["plans"]
    for slower, faster in zip(plans[1:], plans, strict=False):
        assert slower["predicted_ms"] > faster["predicted_ms"]
        assert slower["accuracy"] > faster["accuracy"]
    for plan in plans:
        assert f"{plan['predicted_ms']:.4g}" in out
    assert (folder / "front.html").stat().st_size > 1_000_000
    known = dict(judged(folder))
    for plan in plans:
        assert known[tuple(plan["widths"].values())] == plan["loss"]
