"""Installing: whatever is killed, full, damaged or in the way, a reader of `current` gets a whole model."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from edgeprune.profilers import deploy, history
from edgeprune.profilers.history import DeployError

from edgeprune.records import Receipt

KILLS = 25
BIG = 2_000_000  # bytes: long enough to be killed in the middle of
DEADLINE_S = 60.0

# ---- the oracle: what a reader does, written without edgeprune ---------------------------------------------


def complete(version: Path) -> str:
    """The `step` of the model in this folder; fails unless it is whole."""
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["format"] == "edgeprune.manifest/1"
    assert manifest["files"]
    for name, recorded in manifest["files"].items():
        content = (version / name).read_bytes()
        assert len(content) == recorded["size_bytes"], f"{name} is not whole"
        assert hashlib.sha256(content).hexdigest() == recorded["sha256"], f"{name} is another model's"
    return str(manifest["step"])


def read_current(folder: Path) -> str:
    """The `step` of the current model, "" for none; resolves again only when installs have overtaken it."""
    while os.path.lexists(folder / "current"):
        version = (folder / "current").resolve()
        try:
            return complete(version)
        except FileNotFoundError:
            assert version != (folder / "current").resolve(), f"{version} is current and lacks a file"
    return ""


def assert_tidy(folder: Path) -> None:
    assert set(os.listdir(folder)) == {".lock", "current", "history.json", "versions"}
    assert sorted(os.listdir(folder / "versions")) == sorted(v.name for v in deploy.versions(folder))


# ---- helpers -----------------------------------------------------------------------------------------------


def answers(version: Path) -> None:
    complete(version)


def refuses(version: Path) -> None:
    raise ValueError("the model answers 7 where 3 was recorded")


def model(folder: Path, step: str, size_bytes: int = 1000, others: int = 0) -> dict[str, Path]:
    """A made-up model whose every byte depends on `step`."""
    folder = folder / f"model-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_bytes(random.Random(step).randbytes(size_bytes))
    for n in range(others):
        (folder / f"part-{n}.bin").write_bytes(random.Random(f"{step}{n}").randbytes(5000))
    (folder / "model.xml").write_text(f"<net step='{step}'/>")
    return {path.name: path for path in sorted(folder.iterdir())}


def put(folder: Path, step: str, smoke: Callable[[Path], None] = answers, **options: Any) -> Receipt:
    return Receipt(**deploy.install(model(folder.parent, step), {"step": step}, folder, smoke, **options))


def back(folder: Path) -> str:
    receipt = Receipt(**deploy.rollback(folder, answers))
    assert (folder / "current").resolve() == folder / "versions" / receipt.version
    return read_current(folder)


def steps(folder: Path) -> str:
    return "".join(str(version.manifest.get("step", "?")) for version in deploy.versions(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "installed"


def started(function: Callable[..., None], *arguments: object) -> Any:
    """In a fresh process: it may be killed, fork and set limits; its assertions are shown on stderr."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def finished(process: Any) -> None:
    process.join(DEADLINE_S)
    assert process.exitcode == 0


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- what an install does ----------------------------------------------------------------------------------


def test_an_installed_model_is_what_was_exported(folder: Path) -> None:
    source = model(folder.parent, "A")
    facts = {"step": "A", "input": (1, 3, 32, 32), "latency_ms": 1.25, "labels": ["cat", "dög"]}
    receipt = Receipt(**deploy.install(source, facts, folder, answers))
    version = folder / "versions" / receipt.version
    assert os.readlink(folder / "current") == f"versions/{receipt.version}"
    assert {path.name for path in version.iterdir()} == {*source, "manifest.json"}
    assert all((version / name).read_bytes() == path.read_bytes() for name, path in source.items())
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["labels"] == ["cat", "dög"]
    assert manifest["input"] == [1, 3, 32, 32]
    assert (receipt.folder, receipt.previous) == (str(folder), "")
    assert receipt.version == f"0001-{receipt.sha256[:12]}"
    assert_tidy(folder)


def test_versions_are_listed_newest_first_with_the_current_one_marked(folder: Path) -> None:
    assert deploy.versions(folder) == ()
    first, second = put(folder, "A"), put(folder, "B")
    assert second.previous == first.version
    newest, oldest = deploy.versions(folder)
    assert (newest.name, newest.sha256, newest.current) == (second.version, second.sha256, True)
    assert (oldest.name, oldest.current, oldest.manifest["step"]) == (first.version, False, "A")
    assert oldest.size_bytes == sum(path.stat().st_size for path in model(folder.parent, "A").values())
    assert newest.installed_at >= oldest.installed_at
    assert newest.installed_at.endswith("+00:00")


def test_the_smoke_test_sees_the_complete_version_before_readers_do(folder: Path) -> None:
    put(folder, "A")
    seen = []
    put(folder, "B", smoke=lambda version: seen.append((complete(version), read_current(folder))))
    assert seen == [("B", "A")]


def test_a_model_that_fails_its_smoke_test_is_removed_and_the_old_one_stays(folder: Path) -> None:
    old = put(folder, "A")
    message = rf"failed its smoke test .*ValueError: the model answers 7.*`current` leads to {old.version}"
    with pytest.raises(DeployError, match=message):
        put(folder, "B", smoke=refuses)
    assert (read_current(folder), steps(folder)) == ("A", "A")
    assert_tidy(folder)


def test_a_first_model_that_fails_its_smoke_test_leaves_nothing_installed(folder: Path) -> None:
    with pytest.raises(DeployError, match="there is no current version yet"):
        put(folder, "A", smoke=refuses)
    assert not os.path.lexists(folder / "current")
    assert os.listdir(folder / "versions") == []


def test_an_interrupted_smoke_test_removes_the_new_version(folder: Path) -> None:
    def interrupted(version: Path) -> None:
        raise KeyboardInterrupt

    put(folder, "A")
    with pytest.raises(KeyboardInterrupt):
        put(folder, "B", smoke=interrupted)
    assert read_current(folder) == "A"
    assert_tidy(folder)


def test_a_failed_reinstall_of_the_current_model_lets_nothing_go(folder: Path) -> None:
    for step in "ABC":
        put(folder, step)
    with pytest.raises(DeployError, match="smoke"):
        put(folder, "C", smoke=refuses, keep=1)
    assert (read_current(folder), steps(folder)) == ("C", "CBA")


def test_a_file_that_changes_while_it_is_installed_is_refused(folder: Path) -> None:
    put(folder, "A")
    source, failures = model(folder.parent, "B"), []

    def install() -> None:
        try:
            deploy.install(source, {"step": "B"}, folder, answers)
        except DeployError as error:
            failures.append(str(error))

    with (folder / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the install has read its files when it comes to wait for this
        thread = threading.Thread(target=install)
        thread.start()
        wait_for(lambda: times_open(folder / ".lock") == 2)
        source["model.bin"].write_bytes(b"another export")
    thread.join()
    assert "is not what was read first: the file changed meanwhile" in failures[0]
    assert read_current(folder) == "A"
    assert_tidy(folder)


def times_open(path: Path) -> int:
    return sum(os.path.realpath(f"/proc/self/fd/{n}") == str(path) for n in os.listdir("/proc/self/fd"))


def test_installed_files_can_be_read_by_other_users(folder: Path) -> None:
    mask = os.umask(0o022)
    try:
        receipt = put(folder, "A")
    finally:
        os.umask(mask)
    version = folder / "versions" / receipt.version
    assert version.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in version.iterdir()} == {0o644}
    assert (folder / "history.json").stat().st_mode & 0o777 == 0o644


def test_a_folder_can_be_moved_as_a_whole(folder: Path) -> None:
    put(folder, "A")
    put(folder, "B")
    moved = folder.rename(folder.with_name("moved"))
    assert read_current(moved) == "B"
    assert back(moved) == "A"


def test_installing_needs_no_torch() -> None:
    program = "import sys; from edgeprune import deploy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# ---- history and rollback ----------------------------------------------------------------------------------


def test_rollbacks_go_further_back_and_an_install_starts_from_there(folder: Path) -> None:
    for step in "ABC":
        put(folder, step)
    assert [back(folder), back(folder)] == ["B", "A"]
    put(folder, "D")
    assert back(folder) == "A"
    with pytest.raises(DeployError, match=r"nothing is left to roll back to.*there is: 0004-.* of 20.*\(current\)"):
        back(folder)
    assert (read_current(folder), steps(folder)) == ("A", "DCBA")


def test_the_receipt_of_a_rollback_names_both_versions(folder: Path) -> None:
    first, second = put(folder, "A"), put(folder, "B")
    receipt = Receipt(**deploy.rollback(folder, answers))
    assert receipt == Receipt(str(folder), first.version, first.sha256, second.version)


def test_installing_what_is_current_again_does_not_lengthen_the_way_back(folder: Path) -> None:
    first, second = put(folder, "A"), put(folder, "B")
    assert put(folder, "B", keep=1).version == second.version
    assert back(folder) == "A"
    assert put(folder, "B").version == second.version  # reused: still on disk
    assert put(folder, "A").version == first.version
    assert [back(folder), back(folder)] == ["B", "A"]


def test_any_order_of_installs_and_rollbacks_agrees_with_a_stack(folder: Path) -> None:
    choice, stack = random.Random(0), list[str]()
    for _ in range(100):
        step = choice.choice("ABCD---")
        if step != "-":
            put(folder, step)
            stack += [step] if stack[-1:] != [step] else []
        elif len(stack) > 1:
            stack.pop()
            assert back(folder) == stack[-1]
        assert read_current(folder) == (stack[-1] if stack else "")


def test_a_version_that_is_installed_again_is_the_newest(folder: Path) -> None:
    put(folder, "A")
    put(folder, "B")
    back(folder)
    put(folder, "A")
    assert steps(folder) == "AB"


def test_the_line_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "LINE_LIMIT", 3)
    for step in "ABABABAB":
        put(folder, step)
    assert [back(folder), back(folder)] == ["A", "B"]
    with pytest.raises(DeployError, match="nothing is left"):
        back(folder)


def test_a_rollback_that_fails_its_smoke_test_changes_nothing(folder: Path) -> None:
    put(folder, "A")
    put(folder, "B")
    with pytest.raises(DeployError, match=r"failed its smoke test.*was not made current"):
        deploy.rollback(folder, refuses)
    assert (read_current(folder), steps(folder)) == ("B", "BA")
    assert back(folder) == "A"


def test_a_rollback_where_nothing_was_installed_says_so_and_writes_nothing(folder: Path) -> None:
    folder.mkdir()
    with pytest.raises(DeployError, match=r"nothing is installed in .*; install a model first"):
        back(folder)
    assert os.listdir(folder) == []


def test_a_version_that_was_let_go_leaves_no_step_that_changes_nothing(folder: Path) -> None:
    for step in "ABAC":
        put(folder, step, keep=1 if step == "C" else 5)  # lets B go from A B A C
    assert back(folder) == "A"
    with pytest.raises(DeployError, match="nothing is left"):
        back(folder)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_versions_and_the_one_before_stay(folder: Path, keep: int) -> None:
    for step in "ABCDE":
        put(folder, step, keep=keep)
    assert steps(folder) == "EDCBA"[: max(keep, 2)]
    assert back(folder) == "D"
    assert_tidy(folder)


def test_the_version_that_a_rollback_would_go_to_is_kept_however_old(folder: Path) -> None:
    for step in "ABC":
        put(folder, step)
    assert [back(folder), back(folder)] == ["B", "A"]
    put(folder, "D", keep=2)
    assert steps(folder) == "DCA"
    assert back(folder) == "A"


# ---- damage ------------------------------------------------------------------------------------------------


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rename_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": "', '"step": "X'))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "model.bin changed after the install": lambda version: flip_byte(version / "model.bin"),
    "model.xml": lambda version: (version / "model.xml").unlink(),
    "manifest.json was changed": lambda version: rename_step(version / "manifest.json"),
    "manifest.json does not exist": lambda version: (version / "manifest.json").unlink(),
    "manifest.json is damaged": lambda version: os.truncate(version / "manifest.json", 20),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_rollback_to_a_damaged_version_is_refused(folder: Path, damage: str) -> None:
    old = put(folder, "A")
    put(folder, "B")
    DAMAGES[damage](folder / "versions" / old.version)
    with pytest.raises(DeployError, match=rf"cannot roll back to {old.version}.*it is damaged: .*{damage}"):
        back(folder)
    assert read_current(folder) == "B"
    assert len(deploy.versions(folder)) == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_installing_a_damaged_version_again_replaces_it(folder: Path, damage: str) -> None:
    old = put(folder, "A")
    put(folder, "B")
    DAMAGES[damage](folder / "versions" / old.version)
    new = put(folder, "A")
    assert new.version != old.version
    assert new.sha256 == old.sha256
    assert steps(folder) == "AB"
    assert [back(folder), back(folder)] == ["B", "A"]
    assert_tidy(folder)


def test_a_damaged_current_version_is_replaced_by_installing_it_again(folder: Path) -> None:
    put(folder, "A")
    old = put(folder, "B")
    flip_byte(folder / "versions" / old.version / "model.bin")
    with pytest.raises(DeployError, match="smoke"):
        put(folder, "B", smoke=refuses)
    assert steps(folder) == "BA"
    put(folder, "B")
    assert (read_current(folder), steps(folder)) == ("B", "BA")
    assert back(folder) == "A"


def test_a_version_deleted_by_hand_is_forgotten(folder: Path) -> None:
    put(folder, "A")
    shutil.rmtree(folder / "versions" / put(folder, "B").version)
    put(folder, "C")
    assert steps(folder) == "CA"
    assert back(folder) == "A"


def test_a_deleted_history_is_made_again_from_the_versions(folder: Path) -> None:
    for step in "ABC":
        put(folder, step)
    back(folder)
    (folder / "history.json").unlink()
    assert steps(folder) == "CBA"
    put(folder, "D")
    assert [back(folder), back(folder)] == ["B", "A"]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "edgeprune.history/1", "before": 3}'])
def test_a_damaged_history_stops_an_install_and_its_advice_helps(folder: Path, content: str) -> None:
    put(folder, "A")
    (folder / "history.json").write_text(content)
    with pytest.raises(DeployError, match=r"history.json (is damaged|has format)"):
        put(folder, "B")
    assert read_current(folder) == "A"
    (folder / "history.json").unlink()
    put(folder, "B")
    assert back(folder) == "A"


def test_pointing_current_elsewhere_by_hand_counts_as_an_install(folder: Path) -> None:
    old = put(folder, "A")
    put(folder, "B")
    put(folder, "C")
    (folder / "current").unlink()
    (folder / "current").symlink_to(f"versions/{old.version}")
    assert [version.current for version in deploy.versions(folder)] == [False, False, True]
    put(folder, "D")
    assert [back(folder), back(folder)] == ["A", "C"]


def test_a_deleted_current_link_is_made_again_by_the_next_install(folder: Path) -> None:
    put(folder, "A")
    put(folder, "B")
    (folder / "current").unlink()
    with pytest.raises(DeployError, match=r"nothing is installed .* there is: 0002-.*, 0001-"):
        back(folder)
    with pytest.raises(DeployError, match="smoke"):
        put(folder, "C", smoke=refuses, keep=1)
    assert steps(folder) == "BA"
    put(folder, "C")
    assert [back(folder), back(folder)] == ["B", "A"]


# ---- killed at any moment ----------------------------------------------------------------------------------

WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.chmod")


def die_before_call(number: int) -> None:
    """SIGKILL this process just before its `number`-th call that changes the file system."""
    calls = itertools.count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_before_every_call(template: Path, act: Callable[[Path], object]) -> Iterator[Path]:
    """Copies of `template` where `act` was killed before its first, second ... call; in the last it ended."""
    for number in itertools.count():
        folder = template.with_name(f"killed-{number}")
        shutil.copytree(template, folder, symlinks=True)
        pid = os.fork()
        if pid == 0:
            die_before_call(number)
            act(folder)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        yield folder
        shutil.rmtree(folder)
        if os.WIFEXITED(status):
            assert (os.WEXITSTATUS(status), number > 5) == (0, True)
            return


Outcome = Mapping[str, str]  # the current step after a kill -> the step a rollback then goes to, or its refusal


def check_every_kill(template: Path, act: Callable[[Path], object], outcomes: Outcome) -> None:
    seen = set()
    for folder in killed_before_every_call(template, act):
        step = read_current(folder)
        seen.add(step)
        if outcomes[step].isupper():
            assert back(folder) == outcomes[step]
        else:
            with pytest.raises(DeployError, match=outcomes[step]):
                back(folder)
        assert put(folder, "Z").sha256
        assert read_current(folder) == "Z"
        assert_tidy(folder)
    assert seen == set(outcomes)


def kill_first_install(template: Path) -> None:
    template.mkdir()
    refusals = {"": "nothing is installed", "A": "nothing is left"}
    check_every_kill(template, lambda folder: put(folder, "A"), refusals)


def kill_install_that_lets_one_go(template: Path) -> None:
    put(template, "A")
    put(template, "B")
    check_every_kill(template, lambda folder: put(folder, "C", keep=1), {"B": "A", "C": "B"})


def kill_reinstall_of_a_damaged_version(template: Path) -> None:
    old = put(template, "A")
    put(template, "B")
    flip_byte(template / "versions" / old.version / "model.bin")
    check_every_kill(template, lambda folder: put(folder, "A"), {"B": "damaged", "A": "B"})


def kill_rollback(template: Path) -> None:
    for step in "ABCC":  # the last so that history.json does not happen to hold where the rollback goes
        put(template, step)
    check_every_kill(template, lambda folder: deploy.rollback(folder, answers), {"C": "B", "B": "A"})


@pytest.mark.parametrize(
    "scenario",
    [
        kill_first_install,
        kill_install_that_lets_one_go,
        kill_reinstall_of_a_damaged_version,
        kill_rollback,
    ],
)
def test_a_kill_before_any_file_system_call_leaves_the_old_or_the_new_version(
    scenario: Callable[[Path], None], folder: Path
) -> None:
    finished(started(scenario, folder))


def install_for_ever(folder: Path, sources: Mapping[str, Mapping[str, Path]], seed: int) -> None:
    choice = random.Random(seed)
    for number in itertools.count():
        step = choice.choice(sorted(sources))
        manifest = {"step": step, "export": choice.randrange(4), "seed": seed if number % 3 else 0}
        deploy.install(sources[step], manifest, folder, answers, keep=4)


def kill_at_random_moments(folder: Path, sources: Mapping[str, Mapping[str, Path]]) -> None:
    interrupted = 0
    for seed in range(KILLS):
        pid = os.fork()
        if pid == 0:
            install_for_ever(folder, sources, seed)
        time.sleep(random.Random(seed).uniform(0.0, 0.25))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        read_current(folder)
        listed = {version.name for version in deploy.versions(folder)}
        interrupted += {path.name for path in (folder / "versions").iterdir()} > listed
        deploy.install(sources["A"], {"step": "A", "after": seed}, folder, answers, keep=4)
        assert read_current(folder) == "A"
        assert_tidy(folder)
    assert interrupted > KILLS // 5, "the kills came when nothing was being installed"


def test_readers_always_get_a_whole_model_while_installs_are_killed(folder: Path) -> None:
    sources = {step: model(folder.parent, step, BIG, others=10) for step in "AB"}
    deploy.install(sources["A"], {"step": "A"}, folder, answers)
    killer, seen = started(kill_at_random_moments, folder, sources), list[str]()
    while killer.is_alive():
        seen.append(read_current(folder))
        assert sum(version.current for version in deploy.versions(folder)) == 1
        time.sleep(0.02)
    finished(killer)
    assert len(seen) > KILLS
    assert set(seen) == {"A", "B"}


# ---- the oracle can fail -----------------------------------------------------------------------------------


def install_in_place(folder: Path, sources: Mapping[str, Path], step: str) -> None:
    """What people do with `cp`: the files one after the other over those that are being read."""
    current = folder / "current"
    current.mkdir(parents=True, exist_ok=True)
    recorded = {
        name: {"size_bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for name, path in sources.items()
    }
    manifest = {"format": "edgeprune.manifest/1", "step": step, "files": recorded}
    (current / "manifest.json").write_text(json.dumps(manifest))
    for name, path in sources.items():
        shutil.copyfile(path, current / name)


def install_in_place_for_ever(folder: Path, sources: Mapping[str, Mapping[str, Path]]) -> None:
    while True:
        for step in sources:
            install_in_place(folder, sources[step], step)


def kill_installs_in_place(template: Path) -> None:
    sources = {step: model(template.parent, step, others=5) for step in "AB"}
    install_in_place(template, sources["A"], "A")
    broken = 0
    for folder in killed_before_every_call(template, lambda folder: install_in_place(folder, sources["B"], "B")):
        try:
            read_current(folder)
        except (AssertionError, OSError, ValueError):
            broken += 1
    assert broken >= 5


def test_the_kills_would_catch_an_install_in_place(folder: Path) -> None:
    finished(started(kill_installs_in_place, folder))


def test_the_reader_would_catch_an_install_in_place(folder: Path) -> None:
    sources = {step: model(folder.parent, step, BIG, others=10) for step in "AB"}
    install_in_place(folder, sources["A"], "A")
    assert read_current(folder) == "A"
    installer = started(install_in_place_for_ever, folder, sources)
    try:
        with pytest.raises((AssertionError, OSError, ValueError)):
            wait_for(lambda: not read_current(folder))
    finally:
        installer.kill()
        installer.join()


# ---- a full disk -------------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_anything_is_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = put(folder, "A")
    monkeypatch.setattr(deploy, "MARGIN_BYTES", 1 << 60)
    needed = f"{(1 << 60) + sum(path.stat().st_size for path in model(folder.parent, 'B').values()):,}"
    message = rf"not enough space .*: {needed} bytes are needed .* and [\d,]+ are free; .*{old.version}; delete"
    with pytest.raises(DeployError, match=message):
        put(folder, "B")
    assert put(folder, "A").version == old.version  # already there: needs no space
    assert_tidy(folder)


def install_beyond_the_file_size_limit(folder: Path) -> None:
    put(folder, "A")
    large = model(folder.parent, "B", size_bytes=1_000_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    with pytest.raises(DeployError, match=r"installing into .* failed: .*File too large.*`current` leads to 0001"):
        deploy.install(large, {"step": "B"}, folder, answers)
    assert read_current(folder) == "A"
    assert_tidy(folder)
    put(folder, "C")
    assert back(folder) == "A"


def test_a_write_that_fails_in_the_middle_keeps_the_old_version(folder: Path) -> None:
    finished(started(install_beyond_the_file_size_limit, folder))


def test_a_disk_that_fills_up_at_any_page_keeps_the_old_version(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy, "MARGIN_BYTES", -(1 << 40))  # as if another program took the space meanwhile
    folder, filler, current = small_disk / "installed", small_disk / "filler", "full"
    tried, failed = set[str](), dict[str, str]()
    deploy.install(model(tmp_path, current, 20_000), {"step": current}, folder, answers)
    for step in (f"{pages}" for pages in range(16)):
        filler.unlink(missing_ok=True)
        with filler.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(small_disk).free - int(step) * 4096)
        try:
            source = model(tmp_path, step, size_bytes=20_000)
            deploy.install(source, {"step": step}, folder, lambda path: tried.add(complete(path)), keep=1)
            current = step
        except DeployError as error:
            failed[step] = str(error)
        assert read_current(folder) == current
        assert_tidy(folder)
    assert all(re.search("`current` leads to 00.*; make room, then try again", text) for text in failed.values())
    assert {step in tried for step in failed} == {True, False}, "full only while copying, or only after it"
    assert current == "15"


# ---- two at once -------------------------------------------------------------------------------------------


def install_and_wait(folder: Path, step: str) -> None:
    def waits(version: Path) -> None:
        (folder.parent / "testing").touch()
        wait_for((folder.parent / "go").exists)

    put(folder, step, smoke=waits)


def test_a_second_install_gives_up_with_the_process_that_it_waited_for(folder: Path) -> None:
    put(folder, "A")
    other = started(install_and_wait, folder, "B")
    wait_for((folder.parent / "testing").exists)
    message = rf"process {other.pid} is installing .* did not finish within 0.2 s; wait for it or stop it"
    with pytest.raises(DeployError, match=message):
        put(folder, "C", lock_timeout_s=0.2)
    assert steps(folder) == "A"  # listing does not wait
    (folder.parent / "go").touch()
    finished(other)
    assert (read_current(folder), steps(folder)) == ("B", "BA")


def test_a_rollback_waits_for_the_install_that_is_running(folder: Path) -> None:
    put(folder, "A")
    other = started(install_and_wait, folder, "B")
    wait_for((folder.parent / "testing").exists)
    with pytest.raises(DeployError, match=f"process {other.pid} is installing or rolling back"):
        deploy.rollback(folder, answers, lock_timeout_s=0.1)
    threading.Timer(0.2, (folder.parent / "go").touch).start()
    assert back(folder) == "A"
    finished(other)
    assert steps(folder) == "BA"


@pytest.mark.parametrize("attempt", range(5))
def test_first_installs_that_start_together_queue(folder: Path, attempt: int) -> None:
    together = threading.Barrier(3)

    def install(step: str) -> None:
        source = model(folder.parent, step)
        together.wait()
        deploy.install(source, {"step": step}, folder, answers)

    others = [threading.Thread(target=install, args=(step,)) for step in "ABC"]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert sorted(steps(folder)) == ["A", "B", "C"]
    assert sorted([read_current(folder), back(folder), back(folder)]) == ["A", "B", "C"]
    assert_tidy(folder)


def test_a_lock_whose_holder_was_killed_is_free(folder: Path) -> None:
    put(folder, "A")
    other = started(install_and_wait, folder, "B")
    wait_for((folder.parent / "testing").exists)
    other.kill()
    other.join()
    assert len(os.listdir(folder / "versions")) == 2  # the killed one's version is there, complete and unused
    seen = list[int]()
    put(folder, "C", lambda _: seen.append(len(os.listdir(folder / "versions"))), lock_timeout_s=0.5)
    assert seen == [2]  # A and C: what was left over makes room before the copying begins
    assert steps(folder) == "CA"
    assert_tidy(folder)


# ---- what is refused, and in which words -------------------------------------------------------------------


def test_keeping_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(DeployError, match="keep is 0: at least 1 version has to stay"):
        put(folder, "A", keep=0)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\0b", "manifest.json"])
def test_a_name_that_would_leave_the_version_folder_is_refused(folder: Path, name: str) -> None:
    source = model(folder.parent, "A")["model.bin"]
    with pytest.raises(DeployError, match=r"cannot be named .*; use a plain name"):
        deploy.install({name: source}, {}, folder, answers)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"files": {}}, r"the manifest has \['files'\], which install adds itself; leave it out"),
        ({"latency_ms": float("nan")}, "the manifest holds what JSON cannot .*; use plain numbers and text"),
        ({"labels": {"a", "b"}}, "the manifest holds what JSON cannot .*set.*; use plain numbers and text"),
    ],
)
def test_a_manifest_that_cannot_be_written_is_refused(folder: Path, manifest: dict[str, Any], message: str) -> None:
    with pytest.raises(DeployError, match=message):
        deploy.install(model(folder.parent, "A"), manifest, folder, answers)
    assert not folder.exists()


def test_missing_files_are_refused(folder: Path) -> None:
    with pytest.raises(DeployError, match="there are no files to install; pass at least one"):
        deploy.install({}, {}, folder, answers)
    with pytest.raises(DeployError, match=r"gone.bin, to be installed as model.bin, is not a file; export"):
        deploy.install({"model.bin": folder / "gone.bin"}, {}, folder, answers)
    assert not folder.exists()


@pytest.mark.parametrize("part", ["", "versions"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("file", "is not a folder; remove it, or choose another folder"),
        ("dangling", "is a link to nothing; remove it, or choose another folder"),
        ("loop", "Too many levels of symbolic links.*check the path"),
    ],
)
def test_something_else_where_a_folder_belongs_is_refused(folder: Path, part: str, kind: str, message: str) -> None:
    path = folder / part
    path.parent.mkdir(exist_ok=True)
    if kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(path if kind == "loop" else folder.parent / "nowhere")
    for action in (lambda: put(folder, "A"), lambda: deploy.versions(folder)):
        with pytest.raises(DeployError, match=message):
            action()
    assert path.is_symlink() or path.read_text() == "mine"


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DeployError, match=r"installing into .* failed: .*Not a directory.*; check the path"):
        deploy.install(model(tmp_path, "A"), {}, tmp_path / "file" / "installed", answers)


def test_a_current_that_is_the_users_own_is_left_alone(folder: Path) -> None:
    (folder / "current").mkdir(parents=True)
    (folder / "current" / "mine").touch()
    for action in (lambda: put(folder, "A"), lambda: back(folder)):
        with pytest.raises(DeployError, match="current is not a link that edgeprune made; rename or remove it"):
            action()
    assert os.listdir(folder) == ["current"]
    assert os.listdir(folder / "current") == ["mine"]


def test_a_current_that_leads_elsewhere_is_left_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "current").symlink_to("/opt/mine")
    with pytest.raises(DeployError, match=r"current leads to /opt/mine, not into versions/; rename or remove it"):
        put(folder, "A")
    assert os.listdir(folder) == ["current"]


def install_as_nobody(folder: Path, source: Mapping[str, Path]) -> None:
    if os.getuid() == 0:
        os.setuid(65534)
    with pytest.raises(DeployError, match=r"failed: .*Permission denied.*; check the path, its permissions"):
        deploy.install(source, {}, folder, answers)
    with pytest.raises(DeployError, match=os.strerror(errno.EACCES)):
        deploy.versions(folder / "secret")


def test_a_folder_that_may_not_be_written_is_refused() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders may not even be entered by others
        parent = Path(name)
        parent.chmod(0o755)
        source, folder = model(parent, "A"), parent / "installed"
        (folder / "secret").mkdir(parents=True)
        (folder / "secret").chmod(0)
        folder.chmod(0o555)
        finished(started(install_as_nobody, folder, source))
        folder.chmod(0o755)


def test_what_is_not_ours_in_the_versions_folder_stays(folder: Path) -> None:
    put(folder, "A")
    (folder / "versions" / "notes").mkdir()
    put(folder, "B")
    assert (folder / "versions" / "notes").is_dir()
