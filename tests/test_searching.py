"""Searches on a real network: the journal, killed and resumed; workers, and workers that die; the command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file
from test_allocate import Residual, made_up
from torch import Tensor, nn

from edgeprune import cli, project, runs, search, surgery
from edgeprune.config import SearchSection
from edgeprune.errors import RunError, UsageError, WorkerError
from edgeprune.graph import trace
from edgeprune.project import Project
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
@pytest.mark.parametrize("strategy", search.NAMES)
def test_two_workers_judge_the_same_networks_to_the_same_end_as_one_process(tmp_path: Path, strategy: str) -> None:
    alone = found_in(tmp_path / "alone", strategy)
    together = found_in(tmp_path / "together", strategy, workers=2)
    assert (together.units, together.evaluation) == (alone.units, alone.evaluation)
    assert sorted(judged(tmp_path / "together")) == sorted(judged(tmp_path / "alone"))
    fronts = [tmp_path / name / "front.json" for name in ("alone", "together")]
    assert [path.exists() for path in fronts] == [strategy == "genetic"] * 2
    assert len({path.read_text() for path in fronts if path.exists()}) < 2


class Elsewhere(Callables):
    """Notes in a folder which processes judge."""

    def __init__(self, folder: Path) -> None:
        super().__init__(evaluate=brightness, batches=batches)
        self.folder = folder

    def judge(self, model: nn.Module, images: int) -> Evaluation:
        (self.folder / f"judged-{os.getpid()}").touch()
        return super().judge(model, images)


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two processors on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a short path: Ray puts sockets below it
        words = ("start", "--head", "--block", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats")
        where = (f"--port={address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}")
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "ray"), *words, *where],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAY_AUTH_MODE": "disabled"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if "Ray runtime started" in line:
                    break
            assert process.poll() is None
            yield address
        finally:
            process.terminate()  # it ends what it started
            process.communicate(timeout=60)


def joined_in(folder: Path, cluster: str) -> tuple[Candidate, int]:
    return found_in(folder, task=Elsewhere(folder), workers=2, ray=cluster), os.getpid()


@pytest.mark.slow
def test_a_cluster_that_runs_already_judges_the_same_and_is_left_as_it_was(
    tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)  # where another test began a Ray, this process has tokens
    alone = found_in(tmp_path / "alone")
    with ProcessPoolExecutor(1, get_context("spawn")) as user:
        for turn in ("first", "again"):  # the cluster is still there after the first search
            (tmp_path / turn).mkdir()
            joined, pid = user.submit(joined_in, tmp_path / turn, cluster).result(timeout=600)
            assert (joined.units, joined.evaluation) == (alone.units, alone.evaluation)
            assert sorted(judged(tmp_path / turn)) == sorted(judged(tmp_path / "alone"))
            pids = {int(path.name.partition("-")[2]) for path in (tmp_path / turn).glob("judged-*")}
            assert len(pids) == 2
            assert not {pid, os.getpid()} & pids
    small.make(tmp_path, small.QUICK)
    arguments = ("compress", "--strategy", "rl", "--ray", cluster, "--set", "search.evaluations=14", *SHORT)
    process = small.command(*arguments, "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=600)
    assert process.returncode in (0, 1), err  # measured on a machine that may be busy
    assert json.loads(out)["report"]["speedup"] > 1.3
    assert 2 <= len(judged(tmp_path / "runs/001/step-1")) <= 14


@pytest.mark.slow
def test_a_cluster_without_tokens_is_told_from_one_that_is_short_of_memory(tmp_path: Path, cluster: str) -> None:
    """Ray's own error would have a user look for memory."""
    (tmp_path / "joined").mkdir()
    found_in(tmp_path / "local", ray="local")  # from here on this process has tokens
    with pytest.raises(WorkerError, match=r"Ray started no worker .* in a new process, without RAY_AUTH_MODE"):
        joined_in(tmp_path / "joined", cluster)


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(WorkerError, match=rf"no Ray cluster answers at {address} \(.*refused\): is it running"):
        found_in(tmp_path, ray=address)


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
def test_rl_in_two_steps_shares_its_evaluations_and_distils_between_them(tmp_path: Path) -> None:
    """Only the dense network's answers are learnt from, no labels: after the first step the cut one is nearer to it."""
    small.trained(small.make(tmp_path, small.QUICK))
    settings = ("compress.steps=2", "search.evaluations=28", "search.images=200", "search.rl.lookahead=2")
    settings = (*settings, "search.rl.samples=4", "finetune.distillation=1.0", "finetune.temperature=1.0")
    settings = (*settings, "search.rl.noise=0.2")  # of three groups, little noise leaves few networks to find
    words = [word for setting in settings for word in ("--set", setting)]
    process = small.command("compress", "--strategy", "rl", "--json", *words, cwd=tmp_path)
    out, err = process.communicate(timeout=900)
    assert process.returncode in (0, 1), err  # measured on a machine that may be busy
    assert json.loads(out)["report"]["speedup"] > 1.3
    steps = [tmp_path / f"runs/001/step-{number}" for number in (1, 2)]
    first, second = (json.loads((step / "plan.json").read_text()) for step in steps)
    assert first["budget_ms"] > second["budget_ms"]
    widths = first["chosen"]["plan"]["widths"]
    groups = json.loads((steps[1] / search.JOURNAL).read_text().splitlines()[0])["groups"]
    for step in steps:
        keys = [key for key, _ in judged(step)]
        assert len(set(map(tuple, keys))) == len(keys)
        assert 10 <= len(keys) <= 14
    for key, _ in judged(steps[1]):  # the second step chooses from what the first one left
        assert all(n <= widths[g] for g, n in zip(groups, key, strict=True))
    assert [len(json.loads((step / "epochs.json").read_text())["epochs"]) for step in steps] == [1, 2]
    opened = project.read(tmp_path / "edgeprune.toml")
    graph, keep = trace(opened.model, opened.example), runs.keep_of(first["chosen"]["keep"])
    cut = surgery.cut(opened.model, graph, keep)
    opened.task().adapt(cut)
    before = apart(cut, opened)
    cut.load_state_dict(load_file(steps[0] / "weights.safetensors"))
    assert apart(cut, opened) < 0.7 * before


@torch.no_grad()
def apart(model: nn.Module, opened: Project) -> float:
    """KL divergence from the dense network, on images that nobody looked at."""
    x = torch.cat([x for x, _ in opened.data.final.batches(64)])
    found, wanted = (net.eval()(x).log_softmax(1) for net in (model, opened.model))
    return float(nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True))


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
