"""What TensorRT, trtexec and a Jetson's tools print: the documented formats, their quirks, and any text at all.

The fixtures are made from documentation (tests/fixtures/nvidia/README.md), not recorded on a GPU.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from edgeprune.profilers import jetson, trt_names, trt_reports
from edgeprune.profilers.trt_names import MIXED, REFORMATS, UNKNOWN, Names
from edgeprune.profilers.trt_reports import ReportError
from hypothesis import given, settings
from hypothesis import strategies as st

FIXTURES = Path(__file__).parent / "fixtures" / "nvidia"


def fixture(name: str) -> str:
    return (FIXTURES / name).read_bytes().decode()


# ---- trtexec and the inspector -------------------------------------------------------------------------------


def test_a_profile_gives_each_layers_median_in_order() -> None:
    found = trt_reports.profile(fixture("profile-8.6.json"))
    assert [ms for _, ms in found] == [0.0044, 0.0198, 0.0301, 0.0099, 0.0]
    assert found[1][0] == "stem.0/Conv + stem.2/Relu"


def test_a_profile_without_medians_gives_means_also_where_only_the_total_is_there() -> None:
    assert trt_reports.profile(fixture("profile-8.2.json")) == [("Conv_0 + Relu_1", 0.03), ("Conv_2", 0.01)]


def test_a_profile_with_names_that_are_not_escaped_and_nan_is_read_all_the_same() -> None:
    text = fixture("profile-unescaped.json")
    with pytest.raises(json.JSONDecodeError):
        json.loads(text, strict=False)
    assert trt_reports.profile(text) == [('a "quoted" \\ name, [x]', 0.11), ("plain", 0.2)]


def test_separators_in_names_are_read_where_the_json_is_sound() -> None:
    text = '[{"count": 1}, {"name": "conv/Conv\x1f[x]\x1ey", "timeMs": 1, "averageMs": 1, "medianMs": 1}]'
    assert trt_reports.profile(text) == [("conv/Conv", 1.0)]


def test_times_are_those_of_the_gpu() -> None:
    assert trt_reports.times(fixture("times.json")) == [1.0, 1.2]


def test_an_output_is_read_in_its_order() -> None:
    assert trt_reports.output(fixture("output.json")) == [0.5, -1.25, 3.0]


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '[{"count": 3}]', '[{"computeMs": "nan"}]', "[" * 100_000])
def test_a_report_without_figures_is_an_error(text: str) -> None:
    with pytest.raises(ReportError, match="has no layer with a time"):
        trt_reports.profile(text)
    with pytest.raises(ReportError, match="has no computeMs above 0"):
        trt_reports.times(text)
    with pytest.raises(ReportError, match="wrote no output values"):
        trt_reports.output(text)


def test_the_inspectors_old_and_new_descriptions_tell_kind_and_precision() -> None:
    old, new = (trt_reports.layers(fixture(f"inspector-{v}.json")) for v in ("8.6", "11"))
    assert [(la["kind"], la["precision"]) for la in old] == [
        ("CaskConvolution", "Channel major FP16 format where channel % 8 == 0"),
        ("Reformat", "Row major linear FP32"),
    ]
    assert [(la["kind"], la["precision"]) for la in new] == [("ConvActPool", "Half")]
    assert old[0]["tactic"].startswith("sm80_xmma")


def test_an_engine_without_details_gives_names() -> None:
    assert [la["name"] for la in trt_reports.layers(fixture("inspector-names.json"))] == [
        "stem.0/Conv + stem.2/Relu",
        "fc/Gemm",
    ]


@pytest.mark.parametrize("version", ["8.6", "11"])
def test_an_engines_tensors_are_named_in_both_descriptions(version: str) -> None:
    assert trt_reports.tensors(fixture(f"inspector-{version}.json")) == ["x", "y"]


@pytest.mark.parametrize(("text", "reason"), [("{", "is no JSON"), ("[]", "no list of Layers"), ("[" * 99_999, "JSON")])
def test_a_description_that_is_none_is_an_error(text: str, reason: str) -> None:
    with pytest.raises(ReportError, match=reason):
        trt_reports.layers(text)


def test_flags_are_those_that_the_help_text_lists() -> None:
    old, new = (trt_reports.flags(fixture(f"help-{v}.txt")) for v in ("8.5", "11"))
    assert {"buildOnly", "fp16", "int8", "useDLACore", "memPoolSize"} <= old
    assert "skipInference" in new
    assert not {"fp16", "int8", "buildOnly", "workspace", "useDLACore"} & new


def test_the_median_is_that_of_the_gpu_not_of_the_latency() -> None:
    assert trt_reports.median_ms(fixture("stdout.txt")) == 0.805
    with pytest.raises(ReportError, match="GPU Compute Time"):
        trt_reports.median_ms("&&&& FAILED TensorRT.trtexec")


# ---- names ---------------------------------------------------------------------------------------------------

NODES = [
    "stem.0/Conv", "stem.2/Relu", "blocks.0.conv1/Conv", "blocks.0.conv1/Conv_2", "blocks.0.conv2/Conv", "blocks.0/Add",
    "blocks.0/Relu", "blocks.10.conv1/Conv", "view/Reshape", "fc/MatMul", "fc/Add", "x/QuantizeLinear",
]  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "owner"),
    [
        ("stem.0/Conv + stem.2/Relu", "stem.0"),
        ("blocks.0.conv2/Conv + blocks.0/Add + blocks.0/Relu", "blocks.0.conv2"),
        ("[CONVOLUTION]-[blocks.0.conv1/Conv]", "blocks.0.conv1"),
        ("blocks.0.conv1/Conv_2", "blocks.0.conv1"),
        ("blocks.10.conv1/Conv", "blocks.10.conv1"),
        ("PWN(PWN(blocks.0/Add), blocks.0/Relu)", "blocks.0"),
        ("{ForeignNode[fc/MatMul...fc/Add]}", "fc"),
        ("{ForeignNode[blocks.0.conv2/Conv...fc/Add]}", MIXED),
        ("stem.0/Conv || blocks.0.conv1/Conv", MIXED),
        ("Reformatting CopyNode for Input Tensor 0 to stem.0/Conv + stem.2/Relu", REFORMATS),
        ("x/QuantizeLinear", REFORMATS),
        ("x/QuantizeLinear + stem.0/Conv", "stem.0"),
        ("(Unnamed Layer* 12) [Shuffle]", UNKNOWN),
        ("ablocks.0.conv1/Conv", UNKNOWN),
        ("", UNKNOWN),
    ],
)
def test_a_layer_belongs_to_the_module_whose_node_its_name_mentions(layer: str, owner: str) -> None:
    assert Names(NODES).owner(layer) == owner


def test_a_layer_that_the_inspector_calls_a_reformat_is_one_whatever_its_name() -> None:
    assert Names(NODES).owner("stem.0/Conv", "Reformat") == REFORMATS


def test_what_is_gathered_adds_up_to_the_profile() -> None:
    rows = trt_reports.profile(fixture("profile-8.6.json"))
    found = trt_names.gathered(rows, Names(NODES))
    assert list(found) == [REFORMATS, "stem.0", "blocks.0.conv2", "fc", "view"]
    assert sum(found.values()) == pytest.approx(sum(ms for _, ms in rows))


# ---- a Jetson ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("board", "mode"), [("agx", ("MAXN", 0)), ("nx", ("MODE_15W_6CORE", 2)), ("orin", ("MAXN_SUPER", 2))]
)
def test_nvpmodel_tells_the_power_mode_also_behind_warnings(board: str, mode: tuple[str, int]) -> None:
    assert jetson.power_mode(fixture(f"nvpmodel-{board}.txt")) == mode


def test_the_power_modes_are_listed_in_nvpmodels_configuration() -> None:
    assert jetson.power_modes(fixture("nvpmodel.conf")) == {"MAXN": 0, "MODE_15W": 1}


def test_the_release_is_read_from_its_file() -> None:
    assert jetson.release(fixture("nv_tegra_release-35.txt")) == "35.4.1"
    assert jetson.release(fixture("nv_tegra_release-36.txt")) == "36.4.3"


def test_clocks_are_in_mhz_whatever_the_tool_counts_in() -> None:
    found = jetson.clocks(fixture("jetson_clocks-xavier.txt"))
    assert found["cpu1"] == (1190.4, 2265.6, 1267.2)
    assert found["gpu"] == (114.75, 1377.0, 114.75)
    assert found["emc"] == (204.0, 2133.0, 2133.0)
    assert jetson.clocks(fixture("jetson_clocks-locked.txt"))["gpu"] == (918.0, 918.0, 918.0)


def test_tegrastats_of_several_boards_tell_heat_memory_clock_and_power() -> None:
    nano, xavier, orin = (jetson.tegrastats(fixture(f"tegrastats-{b}.txt")) for b in ("nano", "xavier", "orin"))
    assert nano["gpu_mhz"] == 76.0
    assert nano["temperatures_c"]["CPU"] == 33.5
    assert nano["power_mw"]["POM_5V_IN"] == 2532
    assert nano["memory_free_mb"] == 2061.0
    assert xavier["gpu_load"] == 14
    assert max(xavier["temperatures_c"].values()) == 38.25  # a sensor that always reads 100 left out
    assert xavier["gpu_mhz"] == 1377.0
    assert orin["gpu_mhz"] == 407.0
    assert orin["temperatures_c"]["GPU"] == 69.1
    assert "CV0" not in orin["temperatures_c"]  # a sensor that is off
    assert orin["power_mw"] == {"VDD_GPU_SOC": 3150, "VDD_CPU_CV": 393, "VIN_SYS_5V0": 4026}


def test_what_the_kernel_slows_down_is_told_and_a_fan_is_not(tmp_path: Path) -> None:
    for at, (kind, level) in enumerate([("pwm-fan", "3"), ("devfreq-17000000.gpu", "2"), ("cpufreq-cpu0", "0")]):
        folder = tmp_path / f"cooling_device{at}"
        folder.mkdir()
        (folder / "type").write_text(kind + "\n")
        (folder / "cur_state").write_text(level + "\n")
    assert jetson.throttled(str(tmp_path)) == ["devfreq-17000000.gpu is slowed down by 2"]


# ---- any text at all -----------------------------------------------------------------------------------------

READERS: list[Any] = [trt_reports.profile, trt_reports.times, trt_reports.layers, trt_reports.tensors,
                      trt_reports.output, trt_reports.median_ms]  # fmt: skip
TEXTS = [fixture(path.name) for path in sorted(FIXTURES.iterdir()) if path.suffix in (".json", ".txt", ".conf")]


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A fixture with a piece cut out, doubled, or replaced by anything."""
    text = draw(st.sampled_from(TEXTS))
    start = draw(st.integers(0, len(text)))
    end = min(len(text), start + draw(st.integers(0, 40)))
    piece = draw(st.sampled_from(["", text[start:end] * 3, "nan", "9" * 5000, '"', "{", "\\", "\x1e"]) | st.text())
    return text[:start] + piece + text[end:]


def read_all(text: str) -> None:
    for reader in READERS:
        with contextlib.suppress(ReportError):  # any other kind is a crash
            reader(text)
    for tolerant in (trt_reports.flags, jetson.power_mode, jetson.power_modes, jetson.release, jetson.clocks,
                     jetson.tegrastats, Names(NODES).owner, trt_reports.clean):  # fmt: skip
        tolerant(text)


@settings(max_examples=40, deadline=None)
@given(damaged())
def test_a_damaged_report_never_crashes_a_reader(text: str) -> None:
    read_all(text)


@settings(max_examples=40, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), lambda inner: st.lists(
    inner, max_size=4) | st.dictionaries(st.sampled_from(["Layers", "Bindings", "I/O Tensors", "Name", "name", "timeMs",
    "medianMs", "count", "computeMs", "Outputs", "values"]), inner, max_size=5), max_leaves=20))  # fmt: skip
def test_any_json_never_crashes_a_reader(content: Any) -> None:
    read_all(json.dumps(content))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab./_0[](){}+", max_size=12), max_size=6), st.text(max_size=60))
def test_any_names_of_nodes_and_layers_have_an_owner(nodes: list[str], layer: str) -> None:
    names = Names(nodes)
    for text in (layer, *nodes, "".join(nodes), f"{{ForeignNode[{'...'.join(nodes[:2])}]}}"):
        assert isinstance(names.owner(text), str)
