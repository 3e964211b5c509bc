"""One network of each kind from torchvision and timm: every cut equals the masked network, most of it can be cut.

The whole zoo is benchmarks/prunability.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune import cli, proof, surgery
from edgeprune.errors import TraceError
from edgeprune.graph import trace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from prunability_models import TIMM, Case, build

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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_googlenet_trains_with_its_auxiliary_heads_after_half_of_every_group_is_cut() -> None:
    model, example = build(Case("torchvision:googlenet", CLASSIFIERS))
    graph = trace(model, example)
    heads = [n for n, _ in model.named_parameters() if n.startswith("aux")]
    cut = surgery.cut(model, graph, {g.id: tuple(range(g.width // 2)) for g in graph.groups}).train()
    assert {m.tensor for g in graph.groups for m in g.members} > set(heads) - {"aux1.fc2.bias", "aux2.fc2.bias"}
    assert type(cut) is type(model)
    labels = torch.tensor([1, 3])
    optimiser = torch.optim.SGD(cut.parameters(), lr=0.01)
    before = {n: p.detach().clone() for n, p in cut.named_parameters()}
    outputs = cut(torch.cat([example, example.flip(3)]))
    assert {name: out.shape for name, out in outputs._asdict().items()} == dict.fromkeys(
        ("logits", "aux_logits2", "aux_logits1"), (2, 1000)
    )
    sum(F.cross_entropy(out, labels) for out in outputs).backward()
    optimiser.step()
    for name, parameter in cut.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name
        assert not torch.equal(parameter, before[name]), name
    assert cut.eval()(example).shape == (1, 1000)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression by its definition: torchvision's wheel has no kernel for a CPU build of torch."""
    corner, size = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    kept: list[int] = []
    for at in scores.argsort(descending=True).tolist():
        overlap = (torch.minimum(boxes[kept, 2:], boxes[at, 2:]) - torch.maximum(corner[kept], corner[at])).clamp(0)
        shared = overlap.prod(1)
        if not bool((shared / (size[kept].prod(1) + size[at].prod() - shared) > iou_threshold).any()):
            kept.append(at)
    return torch.tensor(kept, dtype=torch.long)


@pytest.fixture
def suppressing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from torchvision import extension

    library = torch.library.Library("torchvision", "IMPL")
    library.impl("nms", nms, "CPU")
    monkeypatch.setattr(extension, "_has_ops", lambda: True)
    yield
    library._destroy()


class Images(nn.Module):
    """What edgeprune asks for: a network that takes a tensor."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: Tensor) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = self.detector(list(batch))
        return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("suppressing")
def test_a_whole_detector_is_traced_and_cutting_it_is_refused_with_the_operator_that_counts_boxes() -> None:
    """Without the post-processing, as `RawDetector` wraps it, the same detector is cut (see ZOO)."""
    from torchvision import models

    torch.manual_seed(0)
    make = models.get_model_builder("ssdlite320_mobilenet_v3_large")
    model = Images(make(weights=None, weights_backbone=None, num_classes=5, detections_per_img=10)).eval()
    image = torch.rand(1, 3, 320, 320)
    graph = trace(model, image)
    assert len(graph.groups) > 30
    assert "steers the operator index (in detector)" in {f.reason for f in graph.frozen}
    with pytest.raises(
        TraceError,
        match=r"how many values Images goes on with is decided by its data, at the operator index in detector: .*"
        r"Move that part out, into a wrapper around the network",
    ):
        surgery.cut(model, graph, {g.id: tuple(range(g.width // 2)) for g in graph.groups})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["torchvision:squeezenet1_1", "timm:mobilenetv3_small_050"])
def test_inspect_takes_networks_of_the_zoos_by_name(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", source, "--input", "1x3x64x64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prunable_params"] > 0.9 * found["total_params"]
    assert all(group["exact"] and group["params"] > 0 for group in found["groups"])
    assert found["max_deviation"] is None


# ---- the list of the benchmark -------------------------------------------------------------------------------

LARGE = 60e6  # parameters


def parameters(name: str) -> int:
    import timm

    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_smallest_network_of_every_timm_module_is_in_the_benchmark_where_it_is_not_large() -> None:
    import timm

    families = {
        module: [name for name in timm.list_models(module=module) if not name.startswith("test_")]
        for module in timm.list_modules()
    }
    missing = {}
    for module, names in families.items():
        sizes = {name: parameters(name) for name in names}
        smallest = min(sizes.values(), default=LARGE)
        if smallest < LARGE and not {n for n, size in sizes.items() if size == smallest} & set(TIMM):
            missing[module] = min(sizes, key=sizes.__getitem__)
    assert not missing
    assert sum(map(len, families.values())) > 1000
    assert set(TIMM) <= {name for names in families.values() for name in names}
