"""One network of each kind from torchvision and timm: every cut equals the masked network, most of it can be cut.

The whole zoo is benchmarks/prunability.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from edgeprune import cli, proof
from edgeprune.graph import trace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from prunability_models import Case, build

CLASSIFIERS = "torchvision classification"
ZOO = [
    Case("torchvision:shufflenet_v2_x0_5", CLASSIFIERS),  # split, concat, shuffle
    Case("torchvision:squeezenet1_1", CLASSIFIERS),  # a convolution as the head
    Case("torchvision:mobilenet_v3_small", CLASSIFIERS),  # depthwise, squeeze-and-excite
    Case("torchvision:densenet121", CLASSIFIERS),  # concats of everything before
    Case("torchvision:googlenet", CLASSIFIERS),  # branches, heads for training alone
    Case("torchvision:swin_t", CLASSIFIERS),  # shifted windows
    Case("torchvision:lraspp_mobilenet_v3_large", "torchvision segmentation"),
    Case("torchvision:ssdlite320_mobilenet_v3_large", "torchvision detection"),
    Case("timm:convnext_zepto_rms", "timm"),  # layer scale, norms over channels last
    Case("timm:xcit_nano_12_p8_224", "timm"),  # channels attend to channels
    Case("timm:mobilevit_xxs", "timm"),  # patches unfolded by hand
    Case("timm:efficientvim_m1", "timm"),  # blocks that subtract their input
]


@pytest.mark.filterwarnings("ignore")  # torchvision and timm warn about themselves
@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_a_network_of_each_kind_can_be_cut_and_equals_the_masked_one(case: Case) -> None:
    model, example = build(case)
    proved = proof.check(model, example, sample=1, dtype=torch.float32)
    assert proved.max_deviation < proof.TOLERANCE, proved.worst
    graph = trace(model, example)
    assert graph.prunable_weights >= 0.95 * graph.total_weights


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_each_group_of_a_network_of_each_kind_can_be_cut_alone(case: Case) -> None:
    model, example = build(case)
    proved = proof.check(model, example)
    assert proved.checked == proved.exact
    assert proved.max_deviation < 1e-9, proved.worst


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["torchvision:squeezenet1_1", "timm:mobilenetv3_small_050"])
def test_inspect_takes_networks_of_the_zoos_by_name(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", source, "--input", "1x3x64x64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prunable_params"] > 0.9 * found["total_params"]
    assert all(group["exact"] and group["params"] > 0 for group in found["groups"])
    assert found["max_deviation"] is None
