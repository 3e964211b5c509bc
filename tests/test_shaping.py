"""The strategies magnitude and soft: on made-up latencies, and magnitude as a run of the command line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from test_allocate import Residual, made_up
from test_magnitude import digits, mlp
from torch import Tensor, nn
from weighed import Weighed

from edgeprune import allocators, api, importance, magnitude, metrics, pipeline, project, shaping
from edgeprune.allocate import Costs
from edgeprune.config import MagnitudeSection, SoftSection
from edgeprune.errors import UsageError
from edgeprune.finetune import Settings
from edgeprune.graph import ModelGraph, trace
from edgeprune.magnitude import masks
from edgeprune.records import Budget, Evaluation
from edgeprune.runs import Run
from edgeprune.search import Subject
from edgeprune.store import Store
from edgeprune.target import open_target
from edgeprune.task import Callables, Classification
from edgeprune.watch import Silent

SETTINGS = Settings(
    batch_size=50, learning_rate=0.02, momentum=0.9, weight_decay=5e-4, distillation=0.0, temperature=4.0,
    precision="32-true", bn_images=400, devices=1, seed=0,
)  # fmt: skip
LITTLE = MagnitudeSection(ratio=12.0, images=200)


class Digits:
    """Digits in three channels, half of the classes."""

    def __init__(self, part: int) -> None:
        x, y = digits()[2 * part : 2 * part + 2]
        chosen = y < 5
        self.x, self.y = x[chosen].view(-1, 1, 8, 8).expand(-1, 3, 8, 8), y[chosen]

    def __len__(self) -> int:
        return len(self.y)

    def batches(
        self, size: int, shuffle_seed: int | None = None, augment: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.y))
        if shuffle_seed is not None:
            order = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(shuffle_seed))
        yield from ((self.x[pick], self.y[pick]) for pick in order.split(size))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ModelGraph, Costs]:
    """A residual network that knows five digits, with latencies from a formula."""
    torch.manual_seed(0)
    net = Residual()
    classification().train(net, net, True, tmp_path_factory.mktemp("trained"), None)
    graph, costs, _ = made_up(net, 6)
    return net.eval(), graph, costs


def classification(floors: tuple[str, ...] = (), epochs: int = 6) -> Classification:
    found = {name: metrics.resolve(name, Path()) for name in floors}
    return Classification(Digits(0), Digits(1), Digits(2), SETTINGS, epochs, 1, found)


def subject(trained: tuple[nn.Module, ModelGraph, Costs], folder: Path, floors: tuple[str, ...] = ()) -> Subject:
    net, graph, _ = trained
    scores = importance.score(net, graph.groups, "l2")
    return Subject(net, graph, net, {}, scores, classification(floors), Run(folder))


# ---- magnitude -----------------------------------------------------------------------------------------------


def test_connections_are_counted_over_what_a_unit_reads_and_what_reads_it() -> None:
    model = mlp(4, 3, 2)
    found = masks.full(model)
    found["0.weight"][0] = False  # unit 0 reads nothing
    found["0.weight"][1, :2] = False  # unit 1 reads 2 of 4, and is read by 1 of 2
    found["2.weight"][0, 1] = False
    masks.apply(model, found)
    graph = trace(model, torch.randn(1, 4))
    left = shaping.connections(model, graph.groups, found)["0"]
    assert left.tolist() == [0.0, 3 / 6, 1.0]


def test_magnitude_gives_shares_of_connections_left_and_dead_units_go_first(
    trained: tuple[nn.Module, ModelGraph, Costs], tmp_path: Path
) -> None:
    found = subject(trained, tmp_path)
    shape = shaping.by_magnitude(found, LITTLE, Silent())
    content = json.loads((tmp_path / "magnitude.json").read_text())
    total = sum(found.dense.get_parameter(n).numel() for n in content["rounds"][0]["kept"])
    assert content["rounds"][0]["left"] <= total / 12
    for group in found.graph.groups:
        scores = shape.scores[group.id]
        assert shape.shares[group.id] == pytest.approx(max(1e-3, float(scores.mean())), abs=1e-5)
        assert int((scores < 1e-5).sum()) == content["dead"][group.id]
    assert len({round(s, 3) for s in shape.shares.values()}) > 1
    plan = allocators.to_shares(shape.shares)(trained[2], shape.scores, 0.5 * trained[2].predict_ms(trained[2].dense))
    assert plan.predicted_ms <= 0.5 * plan.dense_ms


def test_what_magnitude_found_is_read_back_and_not_found_again(
    trained: tuple[nn.Module, ModelGraph, Costs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = shaping.by_magnitude(subject(trained, tmp_path), LITTLE, Silent())
    monkeypatch.delattr(magnitude, "prune")
    again = shaping.by_magnitude(subject(trained, tmp_path), LITTLE, Silent())
    assert again.shares == first.shares
    assert all(np.array_equal(again.scores[g], s) for g, s in first.scores.items())


@pytest.mark.slow
def test_the_scan_by_two_workers_is_that_of_one_process(
    trained: tuple[nn.Module, ModelGraph, Costs], tmp_path: Path
) -> None:
    """Each round's scan goes to workers, from networks that were trained here in between."""
    found = []
    for workers in (1, 2):
        settings = LITTLE.model_copy(update={"workers": workers, "rounds": 2})
        shaping.by_magnitude(subject(trained, tmp_path / str(workers)), settings, Silent())
        found.append(json.loads((tmp_path / str(workers) / "magnitude.json").read_text()))
    assert len(found[0]["rounds"]) == 2
    assert found[0] == found[1]


class Noting(Classification):
    """Says in a folder which processes judge."""

    folder = Path()

    def judge(self, model: nn.Module, images: int) -> Evaluation:
        (self.folder / f"judged-{os.getpid()}").touch()
        return super().judge(model, images)


@pytest.mark.slow
def test_every_threshold_of_the_scan_is_judged_by_the_workers_and_an_error_there_is_the_users(
    trained: tuple[nn.Module, ModelGraph, Costs], tmp_path: Path
) -> None:
    found = subject(trained, tmp_path)
    task = Noting(Digits(0), Digits(1), Digits(2), SETTINGS, 1, 1)
    task.folder = tmp_path
    settings = LITTLE.model_copy(update={"workers": 2})
    shaping.by_magnitude(replace(found, task=task), settings, Silent())
    pids = {int(path.name.partition("-")[2]) for path in tmp_path.glob("judged-*")}
    assert len(pids - {os.getpid()}) == 2

    def broken(model: nn.Module) -> float:
        raise ZeroDivisionError("no images of class 3")

    with pytest.raises(ZeroDivisionError, match="no images of class 3"):
        shaping.by_magnitude(
            replace(found, task=Callables(evaluate=broken), run=Run(tmp_path / "broken")), settings, Silent()
        )


# ---- soft ----------------------------------------------------------------------------------------------------


def test_soft_meets_the_predicted_budget_and_is_judged_no_worse_than_uniform(
    trained: tuple[nn.Module, ModelGraph, Costs], tmp_path: Path
) -> None:
    _, _, costs = trained
    budget_ms = 0.5 * costs.predict_ms(costs.dense)
    found = subject(trained, tmp_path)
    shape = shaping.by_gradient(found, costs, budget_ms, (), {}, SoftSection(steps=100, images=200), Silent())
    plan = allocators.to_shares(shape.shares)(costs, shape.scores, budget_ms, ())
    assert 0.9 * budget_ms <= plan.predicted_ms <= budget_ms
    judged = json.loads((tmp_path / "soft.json").read_text())["judged"]
    uniform = allocators.named("uniform")(costs, found.scores, budget_ms, ())
    assert found.judge(plan.widths, 200).loss == pytest.approx(min(j["loss"] for j in judged), rel=1e-4)
    assert found.judge(plan.widths, 200).loss <= found.judge(uniform.widths, 200).loss + 1e-6


def test_of_shares_that_were_cut_those_that_keep_the_floors_are_taken(
    trained: tuple[nn.Module, ModelGraph, Costs], tmp_path: Path
) -> None:
    _, _, costs = trained
    floors = {"recall_of_class_3": 0.9}
    found = subject(trained, tmp_path, tuple(floors))
    budget_ms = 0.45 * costs.predict_ms(costs.dense)
    shaping.by_gradient(found, costs, budget_ms, (), floors, SoftSection(steps=100, images=200), Silent())
    content = json.loads((tmp_path / "soft.json").read_text())
    shorts = [j["short"] for j in content["judged"]]
    taken = min(content["judged"], key=lambda j: (j["short"], j["loss"]))
    reached = found.task.measure(found.cut(taken["units"]))["recall_of_class_3"]
    assert taken["short"] == min(shorts)
    assert taken["short"] == pytest.approx(max(0.0, (0.9 - reached) / 0.9), abs=1e-6)
    assert bool(taken["broken"]) is (reached < 0.9)


def test_groups_between_components_are_left_alone_when_asked(
    trained: tuple[nn.Module, ModelGraph, Costs],
) -> None:
    _, graph, _ = trained
    parts = {"body": ("stem", "one", "two"), "head": ("last", "fc")}
    assert shaping.isolated(graph, SoftSection(components=parts)) == []
    assert shaping.isolated(graph, SoftSection(components=parts, isolate=True)) == ["stem"]


def test_soft_without_images_says_what_is_missing(trained: tuple[nn.Module, ModelGraph, Costs], tmp_path: Path) -> None:
    net, graph, costs = trained
    scores = importance.score(net, graph.groups, "l2")
    bare = Subject(net, graph, net, {}, scores, Callables(evaluate=lambda model: 0.5), Run(tmp_path))
    with pytest.raises(UsageError, match=r"strategy 'soft' needs labelled images: give \[data\], or batches in Python"):
        shaping.by_gradient(bare, costs, 0.5 * costs.predict_ms(costs.dense), (), {}, SoftSection(), Silent())


# ---- a run ---------------------------------------------------------------------------------------------------

MAGNITUDE = small.TOML.replace("steps = 2", 'steps = 1\nstrategy = "magnitude"').replace("epochs = 2\n", "epochs = 1\n")


@pytest.mark.slow
def test_a_run_with_magnitude_meets_the_measured_budget(tmp_path: Path) -> None:
    small.make(tmp_path, MAGNITUDE + "\n[magnitude]\nratio = 8.0\nimages = 200\n")
    process = small.command("compress", "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=900)
    checks = {check["name"]: check["passed"] for check in json.loads(out)["checks"]}
    assert checks["latency"], err
    run = Run(tmp_path / "runs/001")
    shares = run.read("step-1/magnitude.json", shaping.MAGNITUDE)["shares"]
    widths = run.read("step-1/plan.json", "edgeprune.step/1")["chosen"]["plan"]["widths"]
    assert shares.keys() == widths.keys()
    assert "dead of" in err


CODER = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
                                     nn.Conv2d(64, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(24, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
                                  nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        return self.head(self.encoder(x))


def build():
    return Net()
"""


@pytest.mark.slow
@pytest.mark.parametrize("isolate", [True, False])
def test_what_passes_between_components_of_the_cut_network_has_the_dense_shape_only_when_they_are_isolated(
    tmp_path: Path, isolate: bool
) -> None:
    path = small.make(tmp_path, small.QUICK)
    (tmp_path / "model.py").write_text(CODER)
    settings = ("compress.strategy=soft", "compress.steps=1", "soft.steps=50", "soft.images=100", "finetune.epochs=0")
    opened = project.read(path, [*settings, f"soft.isolate={str(isolate).lower()}"])
    sections = opened.config.search, opened.config.magnitude, opened.config.soft
    asked = api.asked(opened.config.compress, Budget(None, 1.6), *sections)
    entries = Store(tmp_path / "latency.sqlite")
    with contextlib.closing(open_target("cpu", {})) as target:
        found = pipeline.compress(
            opened.model, opened.example, Weighed(target), opened.task(), asked, Run(tmp_path / "run"), entries
        )
    dense, pruned = (shapes(module, opened.example) for module in (opened.model, found.model))
    assert dense == {"encoder": (1, 24, 8, 8), "head": (1, 10)}
    assert (pruned == dense) is isolate
    assert pruned["head"] == dense["head"]
    for name in ("encoder.0", "head.0"):
        assert found.model.get_submodule(name).weight.shape[0] < 64  # type: ignore[union-attr, operator]
    assert found.report.speedup >= 1.6


def shapes(module: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
    """What each component gives."""
    found: dict[str, tuple[int, ...]] = {}
    for name, part in module.eval().named_children():
        part.register_forward_hook(lambda _, __, out, n=name: found.update({n: tuple(out.shape)}))
    with torch.no_grad():
        module(x)
    return found
