"""Measurements on disk: kept apart by what they depend on, whole after any kill, handed on only where they hold."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import small

from edgeprune import cli, sharing
from edgeprune.errors import TableError
from edgeprune.records import DeviceState, Fingerprint, LayerShape, Timing
from edgeprune.sharing import Shared
from edgeprune.store import Store

HERE = Fingerprint("cpu", "a processor", "a runtime 1.0", "f32", 1, (("governor", "performance"), ("method", "1")))
STATE = DeviceState(0.5, 2600.0, 51.0, 900.0, False, ())


def linear(out_ch: int) -> LayerShape:
    return LayerShape("linear", 64, out_ch, 1, (), (), (), (), (), 1, ("relu",))


def timing(ms: float, interval: float = 0.005) -> Timing:
    return Timing(ms, 0.98 * ms, 1.03 * ms, 40, (), interval)


def fill(store: Store, fingerprint: Fingerprint, timings: dict[LayerShape, Timing]) -> None:
    session = store.begin(fingerprint, STATE)
    store.add(fingerprint, timings, session)
    store.finish(session, STATE, ["busy: load 3.1 on 2 cores"])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "latency.sqlite")


# ---- the store


def test_devices_that_differ_in_anything_do_not_share_entries(store: Store) -> None:
    fill(store, HERE, {linear(8): timing(1.0)})
    for other in (
        replace(HERE, runtime="a runtime 1.1"), replace(HERE, precision="bf16"), replace(HERE, threads=2),
        replace(HERE, details=(("governor", "powersave"), ("method", "1"))),
    ):  # fmt: skip
        assert store.entries(other) == {}
    assert Store(store.path).entries(HERE) == {linear(8): timing(1.0)}


def test_a_session_keeps_the_state_of_the_machine_and_says_when_it_did_not_end(store: Store) -> None:
    fill(store, HERE, {linear(8): timing(1.0)})
    store.begin(HERE, STATE)
    first, second = store.sessions(HERE)
    assert (first.began, first.ended, first.notes) == (STATE, STATE, ("busy: load 3.1 on 2 cores",))
    assert second.ended is None


def test_readers_see_whole_batches_while_another_process_writes(store: Store) -> None:
    session = store.begin(HERE, STATE)
    reader = Store(store.path)
    for size in (5, 10):
        store.add(HERE, {linear(o): timing(1.0) for o in range(1, size + 1)}, session)
        assert len(reader.entries(HERE)) == size


def test_a_file_that_is_no_store_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "latency.sqlite"
    path.write_bytes(b"not a database, but long enough to look at" * 30)
    with pytest.raises(TableError, match=r"cannot be used \(file is not a database\); move it away and profile again"):
        Store(path)


def test_a_store_of_another_format_is_refused(store: Store) -> None:
    store.close()
    with sqlite3.connect(store.path) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(TableError, match=r"another version of edgeprune \(format 99\); move it away"):
        Store(store.path)


def test_a_damaged_entry_is_named(store: Store) -> None:
    fill(store, HERE, {linear(8): timing(1.0)})
    with sqlite3.connect(store.path) as db:
        db.execute("UPDATE entry SET timing = '{}'")
    with pytest.raises(TableError, match=r"holds an entry that cannot be read .*; move it away"):
        store.entries(HERE)


# ---- files


@pytest.fixture
def exported(store: Store, tmp_path: Path) -> Path:
    fill(store, HERE, {linear(o): timing(0.1 * o) for o in (8, 16, 24)})
    path = tmp_path / "table.json"
    sharing.write(sharing.taken(store, HERE), path)
    return path


def test_an_exported_table_comes_back_as_it_was(exported: Path, store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other.sqlite")
    assert sharing.add(other, sharing.read(exported), "table.json") == 3
    assert other.entries(HERE) == store.entries(HERE)
    sharing.write(sharing.taken(other, HERE), tmp_path / "again.json")
    first, again = (json.loads(p.read_text()) for p in (exported, tmp_path / "again.json"))
    again["sessions"][0]["notes"].remove("from table.json")
    assert again == first
    assert sharing.add(other, sharing.read(exported), "table.json") == 0, "what is known is not added twice"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(HERE, runtime="a runtime 2.0"), "runtime is 'a runtime 1.0' there and 'a runtime 2.0' here"),
        (replace(HERE, precision="bf16"), "precision is 'f32' there and 'bf16' here"),
        (replace(HERE, threads=4), "threads is 1 there and 4 here"),
        (replace(HERE, device="another"), "device is 'a processor' there and 'another' here"),
        (replace(HERE, details=(("governor", "powersave"), ("method", "1"))),
         "governor is 'performance' there and 'powersave' here"),
        (replace(HERE, details=(("method", "1"),)), "governor is 'performance' there and 'unknown' here"),
    ],
)  # fmt: skip
def test_a_table_of_other_conditions_is_refused_by_the_field_that_differs(
    exported: Path, other: Fingerprint, message: str
) -> None:
    with pytest.raises(TableError, match=f"measured under other conditions: {message}. Its milliseconds do not hold"):
        sharing.check_fits(sharing.read(exported), other, exported)
    sharing.check_fits(sharing.read(exported), HERE, exported)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"median_ms": 0.8', '"median_ms": -1', "linear 64 -> 8 \\+ relu has a timing that cannot be"),
        ('"median_ms": 0.8', '"median_ms": NaN', "has a timing that cannot be"),
        ('"median_ms": 0.8', '"mean_ms": 0.8', "is no latency table"),
        ('"session": 1', '"session": 7', "has an unknown session"),
        ("edgeprune.table/1", "edgeprune.table/9", "has format 'edgeprune.table/9'"),
        ('"entries": [', '"entries": [,', "is damaged"),
    ],
)
def test_a_file_that_is_no_table_is_refused(exported: Path, old: str, new: str, message: str) -> None:
    text = exported.read_text()
    assert old in text
    exported.write_text(text.replace(old, new))
    with pytest.raises(TableError, match=message):
        sharing.read(exported)


def test_where_two_tables_have_an_entry_the_surer_one_stays(store: Store) -> None:
    fill(store, HERE, {linear(8): timing(1.0, 0.01), linear(16): timing(2.0, 0.01)})
    session = sharing.taken(store, HERE).sessions[0]
    entries = [
        sharing.Entry(linear(8), timing(1.1, 0.02), "2026-01-01T00:00:00Z", session.id),
        sharing.Entry(linear(16), timing(2.2, 0.001), "2026-01-01T00:00:00Z", session.id),
    ]
    assert sharing.add(store, Shared(HERE, (session,), tuple(entries)), "mail") == 1
    assert {k.out_ch: t.median_ms for k, t in store.entries(HERE).items()} == {8: 1.0, 16: 2.2}
    assert {e.layer.out_ch: e.measured_at for e in store.records(HERE)}[16] == "2026-01-01T00:00:00Z"


def test_two_tables_are_compared_by_what_both_have(store: Store) -> None:
    fill(store, HERE, {linear(o): timing(1.0) for o in (8, 16, 24)})
    faster = replace(HERE, threads=2)
    fill(
        store, faster, {linear(8): timing(0.5), linear(16): timing(0.5), linear(24): timing(0.1), linear(32): timing(1)}
    )
    found = sharing.compare(sharing.taken(store, HERE), sharing.taken(store, faster), 1)
    assert (found.common, found.only_first, found.only_second, found.median) == (3, 0, 1, 0.5)
    assert found.fields == ("threads is 1 there and 2 here",)
    assert found.furthest == ((linear(24), pytest.approx(0.1)),)


# ---- the command line, on the real device


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small project whose table is filled."""
    folder = tmp_path_factory.mktemp("tables")
    project = small.make(folder)
    process = small.command("profile", "--quiet", cwd=project.parent, environment={"EDGEPRUNE_HOME": str(folder)})
    _, err = process.communicate()
    assert process.returncode == 0, err
    return folder


@pytest.fixture
def filled(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPRUNE_HOME", str(home))
    monkeypatch.chdir(home)
    return home


def test_tables_are_listed_shown_and_drawn(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["table", "list", "--json"]) == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    assert device["entries"] > 20
    assert cli.run(["table", "show"]) == 0
    text = capsys.readouterr().out
    assert "openvino" in text
    assert "conv" in text
    assert cli.run(["table", "plot", "--out", "stairs.html"]) == 0
    page = Path("stairs.html").read_text()
    assert "conv 3x3" in page
    assert "https://" not in page.split("<script>")[0], "opens offline"


def test_a_table_travels_as_a_file(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["table", "export", "t.json"]) == 0
    assert cli.run(["table", "import", "t.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["added"] == 0
    assert cli.run(["table", "diff", "t.json", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["median"], found["fields"]) == (1.0, [])
    text = Path("t.json").read_text()
    Path("t.json").write_text(text.replace('"threads": 1', '"threads": 2'))
    assert cli.run(["table", "import", "t.json"]) == 2
    assert "threads is 2 there and 1 here" in capsys.readouterr().err


def test_stores_are_merged(filled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EDGEPRUNE_HOME", str(filled / "second"))
    assert cli.run(["table", "show"]) == 2
    assert "holds no table yet; run `edgeprune profile`" in capsys.readouterr().err
    assert cli.run(["table", "merge", "../latency.sqlite"]) == 2
    assert "../latency.sqlite does not exist" in capsys.readouterr().err
    assert cli.run(["table", "merge", "latency.sqlite", "--json"]) == 0
    (added,) = json.loads(capsys.readouterr().out)["added"].values()
    assert added > 20
    assert cli.run(["table", "show", "3"]) == 2
    assert "there is no table 3" in capsys.readouterr().err


def test_a_table_is_checked_against_the_device(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.run(["table", "check", "--count", "4", "--json"])
    assert status in (0, 1), "1: this machine was busy, now or then"
    assert json.loads(capsys.readouterr().out.splitlines()[0])["count"] == 4
    slow = Store(filled / "slow" / "latency.sqlite")
    shared = sharing.taken(Store(filled / "latency.sqlite"), Store(filled / "latency.sqlite").devices()[0].fingerprint)
    longer = [replace(e, timing=scaled(e.timing, 9.0)) for e in shared.entries]
    sharing.add(slow, replace(shared, entries=tuple(longer)), "a slow machine")
    os.environ["EDGEPRUNE_HOME"] = str(filled / "slow")  # monkeypatch, in `filled`, puts it back
    assert cli.run(["table", "check", "--count", "4"]) == 1
    assert "of the table's latencies, in the median of 4 entries: take the table again" in capsys.readouterr().err


def scaled(timing_: Timing, by: float) -> Timing:
    ms = {name: by * getattr(timing_, name) for name in ("median_ms", "p10_ms", "p90_ms")}
    return replace(timing_, **ms)


# ---- kills


DEEP = """
from torch import nn


def build():
    layers, width = [], 1
    for at in range(28):
        layers += [nn.Conv2d(width, 40 + 3 * at, 3, padding=1), nn.ReLU()]
        width = 40 + 3 * at
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_table_whose_filling_is_killed_again_and_again_ends_complete(tmp_path: Path, kills: int) -> None:
    small.make(tmp_path, '[model]\nsource = "model.py:build"\ninput = [1, 1, 8, 8]\n')
    (tmp_path / "model.py").write_text(DEEP if kills > 3 else DEEP.replace("range(28)", "range(5)"))
    path, draw = tmp_path / "latency.sqlite", random.Random(kills)
    kept: dict[LayerShape, Timing] = {}
    interrupted = 0
    for _ in range(kills):
        process = _profile(tmp_path)
        _wait_for_entries(path, len(kept), process)
        time.sleep(draw.uniform(0, 0.4))
        interrupted += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = _entries(path)
        assert kept.items() <= found.items(), "what was on disk stays as it was"
        kept = found
    assert interrupted >= kills - 1
    assert _measured(tmp_path) > 0, "the kills left something to do"
    complete = _entries(path)
    assert kept.items() <= complete.items()
    assert not any(sharing.implausible(t) for t in complete.values())
    Store(path).check()
    assert _measured(tmp_path) == 0, "nothing is missing"


def _profile(folder: Path) -> subprocess.Popen[str]:
    return small.command("profile", "--quiet", "--json", cwd=folder, environment={"EDGEPRUNE_HOME": str(folder)})


def _measured(folder: Path) -> int:
    process = _profile(folder)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return int(json.loads(out)["filled"]["measured"])


def _wait_for_entries(path: Path, more_than: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if path.exists() and len(_entries(path)) > more_than:
            return
        time.sleep(0.02)


def _entries(path: Path) -> dict[LayerShape, Timing]:
    store = Store(path)
    try:
        devices = store.devices()
        return store.entries(devices[0].fingerprint) if devices else {}
    finally:
        store.close()
