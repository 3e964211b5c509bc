"""The page of a run: what it says is what the folder holds, it opens offline, and nothing in it can run as code."""

from __future__ import annotations

import base64
import json
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgeprune import files, finetune, pipeline, planning, report, runs, verify
from edgeprune.errors import RunError
from edgeprune.planning import Chosen, Measured, Preflight
from edgeprune.records import (
    Accuracy,
    Agreement,
    Budget,
    DeviceState,
    Fingerprint,
    NetworkCheck,
    Plan,
    Timing,
    VerifyReport,
)
from edgeprune.report import charts, units
from edgeprune.runs import Run

HOSTILE = "<script>alert(1)</script>"
DEVICE = Fingerprint("cpu", "AMD EPYC", "openvino 2026.4.1", "f32", 1, (("cores", "2"), ("system", "Linux")))
QUIET = DeviceState(0.1, 2596.14, 0.0, 900.0, False, ())

# ---- run folders, by hand ------------------------------------------------------------------------------------


def timing(median_ms: float, visits: int = 60) -> Timing:
    samples = tuple(median_ms * (1 + 0.1 * ((7 * i) % 11 - 5) / 5) for i in range(visits))
    return Timing(median_ms, 0.92 * median_ms, 1.1 * median_ms, 4 * visits, samples, 0.004)


def network(median_ms: float, correct: int, params: int, macs: int, size_bytes: int, memory: int) -> NetworkCheck:
    accuracy = Accuracy(correct, 359, correct / 359, correct / 359 - 0.02, correct / 359 + 0.005)
    agreement = Agreement(64, 3.5e-7, 1.0, 1e-3)
    return NetworkCheck(timing(median_ms), accuracy, agreement, params, macs, size_bytes, memory)


DENSE = network(2.1269830, 356, 696_042, 105_153_792, 2_824_089, 61_300_000)
PRUNED = network(1.0269395, 354, 338_814, 46_936_704, 1_396_539, 58_720_256)
PASSED = VerifyReport(
    Budget(None, 2.0),
    None,
    1.0616820,
    DENSE,
    PRUNED,
    2.0711863,
    2.0313268,
    2.1063553,
    DEVICE,
    QUIET,
    "2026-11-22T18:00:00+00:00",
    (),
)
ASKED = {
    "budget": {"latency_ms": None, "speedup": 2.0},
    "strategy": "knapsack",
    "steps": 2,
    "protected": [],
    "drop_blocks": False,
    "accuracy_floor": None,
    "target": files.plain(DEVICE),
}


def bare(folder: Path, checked: VerifyReport = PASSED) -> Run:
    """A folder that holds the last check alone."""
    run = Run(folder / "007")
    run.write("verify.json", verify.FORMAT, checked)
    return run


def full(folder: Path, checked: VerifyReport = PASSED, groups: int = 3, prefix: str = "blocks.") -> Run:
    """A folder that holds everything: two steps, `groups` channel groups and twice as many layers."""
    run = bare(folder, checked)
    run.write("run.json", runs.RUN, {"fingerprint": "c5f7", "asked": ASKED})
    dense = {f"{prefix}{i}": 32 * (i + 1) for i in range(groups)}
    half = {group: width // 2 for group, width in dense.items()}
    networks = (Measured(half, 0.105, 0.1753), Measured(dense, 1.766, 1.905))
    run.write("preflight.json", planning.PREFLIGHT, Preflight(2.181, 0.0014, networks[0], networks))
    filled = {"entries": 223, "measured": 20, "drifted": 1, "noise": 0.033, "notes": ["warm"]}
    run.write("table.json", pipeline.FILLED, {"fingerprint": DEVICE, "filled": filled})
    attempts = (Measured(half, 1.0737, 1.0854), Measured(half, 1.0617, 1.057))
    for number, tried in ((1, ()), (2, attempts)):
        chosen = Chosen(Plan(half, 1.0617, 2.2, 36.3, 5e-5), {}, float("nan"), tried, "")
        accuracy = {"before": 0.99 - number / 100, "cut": 0.8 + number / 100}
        run.write(
            f"step-{number}/plan.json", pipeline.STEP, {"chosen": chosen, "budget_ms": 1.09, "accuracy": accuracy}
        )
        epochs = [finetune.Epoch(e, 1 / e, 0.9 + number / 50 + e / 1000, 6.5) for e in (1, 2)]
        run.write(f"step-{number}/epochs.json", finetune.FORMAT, {"epochs": epochs, "last": "epoch-2.safetensors"})
    rows = [layer(f"{name}.{op}", op, width) for name, width in dense.items() for op in ("conv", "relu")]
    kept = [{"id": name, "dense": width, "kept": half[name]} for name, width in dense.items()]
    run.write("layers.json", pipeline.LAYERS, {"rows": rows, "groups": kept})
    return run


def layer(name: str, op: str, width: int) -> dict[str, Any]:
    widths = {"in_ch": 3, "out_ch": width, "planned_in": 2, "planned_out": width // 2}
    return {"name": name, "op": op, **widths, "dense_ms": width / 100, "planned_ms": width / 300}


def step_of(run: Run, **changes: Any) -> None:
    """Change the content of step 1's plan."""
    content = run.read("step-1/plan.json", pipeline.STEP)
    run.write("step-1/plan.json", pipeline.STEP, content | changes)


# ---- reading the page, without edgeprune ---------------------------------------------------------------------


class Page(HTMLParser):
    """Attributes, text, table rows by id, scripts and figures of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: dict[str, list[str]] = {}
        self.body: list[list[str]] = []
        self.styles: list[str] = []
        self.scripts: list[str] = []
        self.figures: dict[str, Any] = {}
        self.words: list[str] = []
        self._inside: list[tuple[str, dict[str, str | None]]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        for row in self.body:
            row[:] = [" ".join(cell.replace("\u00a0", " ").split()) for cell in row]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "br"):
            self._inside.append((tag, dict(attrs)))
        if tag == "tr":
            self.body.append([])
        if tag in ("td", "th"):
            self.body[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag, attrs = self._inside[-1] if self._inside else ("", {})
        if tag == "script" and attrs.get("type") == "application/json":
            self.figures[str(attrs["id"]).removeprefix("figure-")] = json.loads(data)
        elif tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append(data)
        else:
            self.words.append(data.replace("\u00a0", " "))
            names = [name for name, _ in self._inside]
            if "td" in names or "th" in names:
                self.body[-1][-1] += data
                row = next(a for name, a in reversed(self._inside) if name == "tr")
                self.rows[row.get("id") or ""] = self.body[-1]

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def row(self, first: str) -> list[str]:
        return next(row for row in self.body if row and row[0] == first)


def number(text: str) -> float:
    found = re.search(r"[−\d][\d,.]*", text)
    assert found is not None, text
    return float(found.group().replace(",", "").replace("−", "-"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a folder that holds everything."""
    return Page(report.write(full(tmp_path_factory.mktemp("whole"))))


# ---- figures -------------------------------------------------------------------------------------------------


def test_the_first_table_shows_the_figures_of_verify_json(tmp_path: Path) -> None:
    run = bare(tmp_path)
    content = json.loads(run.path("verify.json").read_text())
    page = Page(report.write(run))
    for column, name in ((1, "dense"), (2, "pruned")):
        stored = content[name]
        assert number(page.rows["latency"][column]) == pytest.approx(stored["latency"]["median_ms"], rel=5e-4)
        low, high = page.rows["spread"][column].split(" to ")
        assert number(low) == pytest.approx(stored["latency"]["p10_ms"], rel=1e-3)
        assert number(high) == pytest.approx(stored["latency"]["p90_ms"], rel=1e-3)
        assert number(page.rows["accuracy"][column]) == pytest.approx(100 * stored["accuracy"]["value"], abs=0.05)
        assert f"{stored['accuracy']['correct']} of {stored['accuracy']['total']}" in page.rows["accuracy"][column]
        assert number(page.rows["params"][column]) == stored["params"]
        assert number(page.rows["macs"][column]) == pytest.approx(stored["macs"] / 1e6, abs=0.05)
        assert number(page.rows["size"][column]) == pytest.approx(stored["size_bytes"] / 1e6, abs=5e-3)
        assert number(page.rows["memory"][column]) == pytest.approx(stored["peak_memory_bytes"] / 1e6, abs=5e-3)
    assert page.rows["latency"][3] == "2.07x faster 95 % interval 2.03 to 2.11"
    assert page.rows["accuracy"][3] == "−0.6 points"
    assert page.rows["macs"][3] == "2.24x fewer"
    assert page.rows["efficiency"][1] == "0.92"  # 2.0711863 / (105153792 / 46936704)


def test_memory_that_was_not_counted_is_not_made_up(tmp_path: Path) -> None:
    page = Page(report.write(bare(tmp_path, replace(PASSED, dense=replace(DENSE, peak_memory_bytes=None)))))
    assert page.rows["memory"][1] == "not measured"
    assert page.rows["memory"][3] == ""


def test_a_pass_is_said_in_one_sentence_and_in_words(tmp_path: Path) -> None:
    page = Page(report.write(bare(tmp_path)))
    assert (
        "Passed: 2.07x faster, 1.027 ms measured on AMD EPYC (budget 1.063 ms), accuracy 98.6 % (was 99.2 %)"
    ) in page.text
    assert "PASSED" in page.text
    assert "MISS" not in page.text


def test_a_missed_latency_is_said_with_its_figures(tmp_path: Path) -> None:
    slow = replace(PASSED, pruned=replace(PRUNED, latency=timing(1.31)), speedup=1.6236, budget=Budget(1.0, None))
    page = Page(report.write(bare(tmp_path, slow)))
    assert "Missed latency: 1.62x faster, 1.310 ms measured on AMD EPYC (budget 1.000 ms)" in page.text
    assert "MISSED" in page.text
    assert page.row("✗ MISS")[1:] == ["latency", "1.31 ms measured, budget 1 ms (31.0% over)"]


def test_a_missed_accuracy_is_a_miss_although_the_latency_holds(tmp_path: Path) -> None:
    page = Page(report.write(bare(tmp_path, replace(PASSED, accuracy_floor=0.99))))
    assert "Missed accuracy: 2.07x faster" in page.text
    assert page.row("✗ MISS")[1:] == ["accuracy", "98.61% measured, floor 99.00%"]
    assert page.row("✓ pass")[1] == "latency"


def test_a_network_that_became_slower_is_called_slower(tmp_path: Path) -> None:
    slower = replace(PASSED, pruned=replace(PRUNED, latency=timing(2.5)), speedup=0.8)
    assert "1.25x slower, 2.500 ms measured" in Page(report.write(bare(tmp_path, slower))).text


def test_the_error_of_each_prediction_is_shown(whole: Page) -> None:
    assert whole.row("floor") == ["floor", "0.1050 ms", "0.1753 ms", "−40.1 %"]
    assert whole.row("attempt 1") == ["attempt 1", "1.074 ms", "1.085 ms", "−1.1 %"]
    assert whole.row("the result") == ["the result", "1.062 ms", "1.027 ms", "+3.4 %"]
    points = [p for trace in whole.figures["prediction"]["data"] for p in zip(trace["x"], trace["y"], strict=True)]
    assert points == [(0.105, 0.1753), (1.766, 1.905), (1.0737, 1.0854), (1.0617, 1.057), (1.061682, 1.0269395)]


def test_accuracy_falls_at_each_cut_and_rises_with_training(whole: Page) -> None:
    (line,) = whole.figures["training"]["data"]
    assert line["x"] == [0, 0, 1, 2, 2, 2, 3, 4]
    assert line["y"] == pytest.approx([98, 81, 92.1, 92.2, 97, 82, 94.1, 94.2])
    assert "98.0 % before the first cut, 82.0 % right after the last one, 94.2 % in its best epoch (2)" in whole.text


def test_every_sample_is_drawn_in_time_order(tmp_path: Path) -> None:
    page = Page(report.write(bare(tmp_path)))
    dots = [trace for trace in page.figures["samples"]["data"] if trace["mode"] == "markers"]
    assert [trace["y"] for trace in dots] == [list(DENSE.latency.samples_ms), list(PRUNED.latency.samples_ms)]
    assert dots[0]["x"] == list(range(1, 61))


def test_samples_outside_the_picture_are_counted(tmp_path: Path) -> None:
    samples = (*PRUNED.latency.samples_ms[:-2], 40.0, 50.0)
    slow = replace(PASSED, pruned=replace(PRUNED, latency=replace(PRUNED.latency, samples_ms=samples)))
    assert "2 visits above 3.159 ms are outside." in Page(report.write(bare(tmp_path, slow))).text


def test_the_running_median_is_that_of_the_neighbours() -> None:
    values = [float((37 * i) % 101) for i in range(90)]
    found = charts.running_median(values)
    half = charts.SMOOTH // 2
    assert len(found) == len(values)
    for i in range(half, len(values) - half):
        assert found[i] == statistics.median(values[i - half : i + half + 1])


def test_layers_and_groups_are_shown_when_layers_json_is_there(whole: Page) -> None:
    assert whole.row("blocks.1.conv") == [
        *("blocks.1.conv", "conv", "3 → 64", "2 → 32"),
        *("0.6400 ms", "0.2133 ms", "0.4267 ms"),
    ]
    assert whole.row("sum")[1:] == ["3.840 ms", "1.280 ms", "2.560 ms"]
    assert whole.row("blocks.1") == ["blocks.1", "64", "32", "32", "50.0 %"]
    before, after = whole.figures["layers"]["data"]
    assert (before["x"], after["x"]) == (
        [0.32, 0.32, 0.64, 0.64, 0.96, 0.96],
        pytest.approx([0.32 / 3, 0.32 / 3, 0.64 / 3, 0.64 / 3, 0.32, 0.32]),
    )
    assert [trace["x"] for trace in whole.figures["widths"]["data"]] == [[32, 64, 96], [16, 32, 48]]


def test_the_correction_of_the_table_is_shown_with_its_error(tmp_path: Path) -> None:
    run = full(tmp_path)
    errors = {"networks": 6, "median_error": 0.021, "worst_error": 0.06}
    correction = {"overhead_ms": 0.07, "scale": 0.98, "per_mib_ms": 0.011, **errors}
    layers = run.read("layers.json", pipeline.LAYERS) | {"correction": correction}
    run.write("layers.json", pipeline.LAYERS, layers)
    text = Page(report.write(run)).text
    assert "0.07000 ms + 0.980 × the sum of its layers + 0.01100 ms for each MiB of weights" in text
    assert "one is off by 2.1 % (median), 6.0 % at worst" in text


def test_settings_and_device_are_shown(whole: Page) -> None:
    assert whole.row("budget.speedup") == ["budget.speedup", "2.0"]
    assert whole.row("drop_blocks") == ["drop_blocks", "no"]
    assert whole.row("protected") == ["protected", "none"]
    assert whole.row("runtime") == ["runtime", "openvino 2026.4.1"]
    assert whole.row("temperature") == ["temperature", "not measured"]
    assert whole.row("clock") == ["clock", "2596 MHz"]
    assert whole.row("step-1/plan.json")[2] == "widths, units kept, every attempt"


def test_what_was_noted_stands_on_the_first_screen(tmp_path: Path) -> None:
    busy = replace(QUIET, notes=("busy: load 2.8 on 2 cores",))
    page = Page(report.write(bare(tmp_path, replace(PASSED, state=busy, notes=("measured 3 times",)))))
    assert "Noted while measuring: measured 3 times; busy: load 2.8 on 2 cores." in page.text
    assert "Noted while measuring" not in Page(report.write(bare(tmp_path))).text


def test_a_floor_that_nothing_was_checked_against_is_missed(tmp_path: Path) -> None:
    unknown = replace(PASSED, accuracy_floor=0.99, pruned=replace(PRUNED, accuracy=None))
    page = Page(report.write(bare(tmp_path, unknown)))
    assert "not measured: there were no final images, floor 99.00%" in page.text


def test_another_device_than_planned_for_is_noted(tmp_path: Path, whole: Page) -> None:
    moved = replace(PASSED, fingerprint=replace(DEVICE, threads=2))
    text = "verified on another device, or with other settings of it, than planned for"
    assert text in Page(report.write(full(tmp_path / "moved", moved))).text
    assert text not in whole.text


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (units.ms(1.02694), "1.027 ms"),
        (units.ms(0.17534), "0.1753 ms"),
        (units.ms(12345.6), "12346 ms"),
        (units.ms(0.0), "0 ms"),
        (units.ms(float("nan")), "not measured"),
        (units.span(0.89699, 1.24765), "0.897 to 1.248 ms"),
        (units.span(998.2, 1021.4), "998 to 1021 ms"),
        (units.percent(0.98607), "98.6 %"),
        (units.percent(-0.0112, "+"), "−1.1 %"),
        (units.count(696_042), "696,042"),
        (units.count(105_153_792), "105.2 M"),
        (units.size(318), "318 bytes"),
        (units.size(44_355), "44.4 kB"),
        (units.size(2_824_089), "2.82 MB"),
        (units.ratio(2.07, "faster", "slower"), "2.07x faster"),
        (units.ratio(0.5, "fewer", "more"), "2.00x more"),
    ],
)
def test_numbers_have_units_and_sensible_digits(made: str, text: str) -> None:
    assert made.replace("\u00a0", " ") == text


# ---- one file that cannot do harm ----------------------------------------------------------------------------


def test_the_page_refers_to_nothing_outside_itself(whole: Page) -> None:
    refers = ("src", "srcset", "href", "data", "action", "poster", "background", "xlink:href")
    for tag, name, value in whole.attributes:
        assert name not in refers or value.startswith(("#", "data:,")), (tag, name, value)
        assert not name.startswith("on"), (tag, name)
    for css in [*whole.styles, *(value for _, name, value in whole.attributes if name == "style")]:
        assert "url(" not in css
        assert "@import" not in css
    policy = next(value for _, name, value in whole.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_plotly_is_in_the_page_once(whole: Page) -> None:
    assert sum("plotly.js v" in script for script in whole.scripts) == 1


def test_names_of_the_network_are_text_and_never_markup(tmp_path: Path, whole: Page) -> None:
    noted = replace(
        PASSED, notes=(HOSTILE,), fingerprint=replace(DEVICE, device=HOSTILE, details=((HOSTILE, HOSTILE),))
    )
    after = Page(report.write(full(tmp_path, noted, prefix=HOSTILE)))
    assert len(after.scripts) == len(whole.scripts)
    assert not any("alert(1)" in script for script in after.scripts)
    assert f"measured on {HOSTILE}" in after.text
    assert after.row(f"{HOSTILE}0.conv")[1] == "conv"
    for name in ("layers", "widths"):  # plotly renders some HTML: its labels are escaped as well
        figure = after.figures[name]
        labels = [*figure["data"][0]["customdata"], *figure["layout"]["yaxis"]["ticktext"]]
        assert not any("<" in label for label in labels)
        assert figure["data"][0]["customdata"][0].startswith("&lt;script&gt;alert(1)&lt;/script&gt;0")


def test_the_page_is_replaced_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    run = bare(tmp_path)
    run.path("report.html").write_text("an older page")
    assert report.write(run) == run.path("report.html")
    assert run.path("report.html").read_text(encoding="utf-8").endswith("</html>\n")
    assert sorted(p.name for p in run.folder.iterdir()) == ["report.html", "verify.json"]


# ---- parts that are missing ----------------------------------------------------------------------------------


def test_a_folder_with_the_last_check_alone_makes_a_page(tmp_path: Path) -> None:
    unknown = replace(PASSED, dense=replace(DENSE, accuracy=None), pruned=replace(PRUNED, accuracy=None))
    page = Page(report.write(bare(tmp_path, unknown)))
    assert "(budget 1.063 ms), accuracy not measured" in page.text
    assert page.rows["accuracy"] == ["Accuracy", "not measured", "not measured", ""]
    assert "The floor of this device: not measured." in page.text
    assert "Accuracy during fine-tuning: not measured." in page.text
    assert "Latency of single layers: not recorded in this folder." in page.text
    assert page.row("repeatability")[1] == "not measured"
    assert page.row("latency table")[1] == "not recorded"
    assert set(page.figures) == {"prediction", "samples"}


def test_without_layers_json_the_widths_that_are_kept_are_shown(tmp_path: Path) -> None:
    run = full(tmp_path)
    run.path("layers.json").unlink()
    page = Page(report.write(run))
    assert [trace["x"] for trace in page.figures["widths"]["data"]] == [[16, 32, 48]]
    assert page.row("blocks.1") == ["blocks.1", "not recorded", "32", "32", ""]


def test_one_step_is_enough(tmp_path: Path) -> None:
    run = full(tmp_path)
    shutil.rmtree(run.path("step-2"))
    page = Page(report.write(run))
    assert page.figures["training"]["data"][0]["x"] == [0, 0, 1, 2]


def test_your_own_training_without_epochs_shows_the_cuts(tmp_path: Path) -> None:
    run = full(tmp_path)
    for step in ("step-1", "step-2"):
        run.path(f"{step}/epochs.json").unlink()
    page = Page(report.write(run))
    assert page.figures["training"]["data"][0]["x"] == [0, 0, 1, 1]
    assert "82.0 % right after the last one." in page.text


@pytest.mark.parametrize("unknown", [None, float("nan")])
def test_an_accuracy_that_is_not_known_breaks_nothing(tmp_path: Path, unknown: float | None) -> None:
    run = full(tmp_path)
    shutil.rmtree(run.path("step-2"))
    run.path("step-1/epochs.json").unlink()
    step_of(run, accuracy={"before": unknown, "cut": unknown})
    page = Page(report.write(run))
    assert "training" not in page.figures
    assert "Accuracy during fine-tuning: not measured." in page.text


def test_a_run_that_is_not_finished_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        report.write(Run(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path} holds no verify.json: the run is not finished; go on with `edgeprune compress --resume`"
    )
    assert not list(tmp_path.iterdir())


# ---- in a browser --------------------------------------------------------------------------------------------

PROBE = """<script>
const problems = [];
addEventListener("error", event => problems.push(String(event.message)));
addEventListener("securitypolicyviolation", event => problems.push("asked for " + event.blockedURI));
addEventListener("load", () => setTimeout(() => parent.postMessage({
  width: innerWidth,
  scroll: document.documentElement.scrollWidth,
  traces: Object.fromEntries([...document.querySelectorAll(".chart")].map(
    c => [c.id.replace("chart-", ""), c.querySelectorAll("svg .trace").length])),
  labels: [...document.querySelectorAll("#chart-layers .ytick text")].map(t => t.textContent),
  requests: performance.getEntriesByType("resource").map(entry => entry.name),
  problems: problems,
}, "*"), 500));
</script>"""
FRAMES = """<!doctype html><body><script>
addEventListener("message", event => {
  const found = document.createElement("pre");
  found.className = "found";
  found.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(event.data))));
  document.body.append(found);
});
</script>%s</body>"""
WIDTHS = (1280, 390)


@pytest.fixture
def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "Chromium is not installed, so nobody looked at the page: apt-get install -y chromium"
    return found


def opened(browser: str, page: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """The page in frames of a desktop's and a phone's width: what each reports about itself."""
    probed = folder / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("<style>", PROBE + "<style>", 1), encoding="utf-8")
    frame = '<iframe src="probed.html" style="width:%dpx;height:900px;border:0"></iframe>'
    (folder / "frames.html").write_text(FRAMES % "".join(frame % width for width in WIDTHS))
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    command = [browser, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", (folder / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    for encoded in re.findall(r'<pre class="found">([^<]*)</pre>', done.stdout):
        yield json.loads(base64.b64decode(encoded))


@pytest.mark.slow
def test_a_browser_draws_every_chart_and_a_phone_does_not_scroll_sideways(tmp_path: Path, browser: str) -> None:
    prefix = f"features.stage{HOSTILE}.a_rather_long_module_path."
    page = report.write(full(tmp_path, groups=20, prefix=prefix))
    seen = {found["width"]: found for found in opened(browser, page, tmp_path)}
    assert set(seen) == set(WIDTHS)
    for width, found in seen.items():
        assert found["problems"] == []
        assert found["requests"] == []
        assert found["traces"] == {"widths": 2, "layers": 2, "prediction": 3, "training": 1, "samples": 5}
        assert found["scroll"] <= width
        assert len(found["labels"]) == 40
        assert all("…" in label for label in found["labels"])
