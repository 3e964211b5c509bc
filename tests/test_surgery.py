"""Cut networks beyond the oracle: inexact groups, training, saving and loading, export, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nets import NETS, Auxiliary, Decides, FusedAttention, Stochastic, image
from torch import Tensor, nn, optim
from torch.nn import functional as F

from edgeprune import export, proof, runs, surgery
from edgeprune.errors import RunError, SurgeryError, TraceError
from edgeprune.graph import ModelGraph, as_call, trace
from edgeprune.records import Keep
from edgeprune.runs import Run

INEXACT = ["unet", "fused attention", "torch attention", "grouped query", "statistics"]


def halves(graph: ModelGraph) -> dict[str, tuple[int, ...]]:
    return {g.id: tuple(range(g.width - (g.width + 1) // 2, g.width)) for g in graph.groups}


def traced(name: str) -> tuple[nn.Module, object, ModelGraph]:
    make, example = NETS[name]
    torch.manual_seed(0)
    model = make()
    return model, example, trace(model, example)


# ---- inexact groups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INEXACT)
def test_an_inexact_group_says_which_operator_averages_over_its_channels(name: str) -> None:
    _, _, graph = traced(name)
    reasons = [g.inexact for g in graph.groups if g.inexact]
    assert reasons
    assert all("over the channels that are cut" in reason for reason in reasons)


@pytest.mark.parametrize("name", INEXACT)
def test_an_inexact_group_alone_is_cut_to_the_shapes_of_its_members(name: str) -> None:
    model, example, graph = traced(name)
    for group in (g for g in graph.groups if g.inexact):
        keep: Keep = {group.id: halves(graph)[group.id]}
        cut = surgery.cut(model, graph, keep)
        tensors = dict([*cut.named_parameters(), *cut.named_buffers()])
        dense = dict([*model.named_parameters(), *model.named_buffers()])
        for member in group.members:
            removed = (group.width - len(keep[group.id])) * member.positions.shape[1]
            assert tensors[member.tensor].shape[member.axis] == dense[member.tensor].shape[member.axis] - removed
        shapes = [t.shape for t in proof.outputs(cut.eval(), example)]
        assert shapes == [t.shape for t in proof.outputs(model.eval(), example)]


@pytest.mark.parametrize("name", INEXACT)
def test_gradients_reach_every_slice_that_a_cut_inexact_group_keeps(name: str) -> None:
    """An axis wired to the wrong place leaves slices without gradient; the dense network shows which have one."""
    model, example, graph = traced(name)
    cut = surgery.cut(model, graph, {g.id: halves(graph)[g.id] for g in graph.groups if g.inexact})
    dense_grads, cut_grads = gradients(model.eval(), example), gradients(cut.eval(), example)
    for group in (g for g in graph.groups if g.inexact):
        for member in group.members:
            if member.tensor in cut_grads and dense_grads[member.tensor].flatten(1).any(1).all():
                flat = cut_grads[member.tensor].movedim(member.axis, 0).flatten(1)
                assert bool(flat.any(1).all()), member.tensor


def gradients(model: nn.Module, example: object) -> dict[str, Tensor]:
    args, kwargs = as_call(example)
    outputs = [t for t in torch.utils._pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]
    draw = torch.Generator().manual_seed(0)
    sum((t * torch.randn(t.shape, generator=draw)).sum() for t in outputs).backward()
    return {
        n: p.grad.reshape(len(p), -1) if p.dim() == 1 else p.grad
        for n, p in model.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("name", INEXACT)
def test_a_network_with_its_inexact_groups_cut_learns_what_the_dense_one_says(name: str) -> None:
    model, example, graph = traced(name)
    wanted = [t.detach() for t in proof.outputs(model.eval(), example)]
    cut = surgery.cut(model, graph, {g.id: halves(graph)[g.id] for g in graph.groups if g.inexact}).train()
    optimiser = optim.Adam(cut.parameters(), lr=1e-2)
    args, kwargs = as_call(example)
    losses = []
    for _ in range(30):
        given = [t for t in torch.utils._pytree.tree_leaves(cut(*args, **kwargs)) if isinstance(t, Tensor)]
        loss = sum(F.mse_loss(g, w.clone()) for g, w in zip(given, wanted, strict=True))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


# ---- training-only parts -------------------------------------------------------------------------------------


def test_an_auxiliary_head_trains_after_the_cut_and_evaluation_does_without_it() -> None:
    model = Auxiliary()
    graph = trace(model, image())
    cut = surgery.cut(model, graph, halves(graph)).train()
    out, aux = cut(image())
    (out.sum() + aux.square().sum()).backward()
    assert all(p.grad is not None for n, p in cut.named_parameters() if n.startswith("aux"))
    assert cut.eval()(image()).shape == (2, 5)


def test_drop_path_drops_in_training_alone_and_for_each_image_alone() -> None:
    model = Stochastic()
    graph = trace(model, image())
    cut = surgery.cut(model, graph, {"a": (0, 1, 2)}).train()
    torch.manual_seed(0)
    same = image()[:1].expand(16, -1, -1, -1)
    assert len({round(float(v), 5) for v in cut(same).detach()[:, 0]}) == 2
    assert float(cut.eval()(same).detach().std(0).max()) < 1e-6


# ---- saved and loaded, exported ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_a_cut_network_is_rebuilt_from_the_recipe_and_safetensors(name: str, tmp_path: Path) -> None:
    model, example, graph = traced(name)
    keep = halves(graph)
    cut = surgery.cut(model, graph, keep).eval()
    run = Run(tmp_path)
    runs.save_example(graph.example, run.path("example.safetensors"))
    runs.save_model(run, cut, graph, keep)
    torch.manual_seed(1)
    other = NETS[name][0]()
    again = runs.load_model(run, other)
    first, second = proof.outputs(cut, example), proof.outputs(again, example)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_recipe_of_another_network_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    model, _, graph = traced("shuffle")
    run = Run(tmp_path)
    runs.save_example(graph.example, run.path("example.safetensors"))
    runs.save_model(run, model, graph, {})
    with pytest.raises(RunError, match=rf"made from another network \(fingerprint {graph.fingerprint}, this one has"):
        runs.load_model(run, NETS["option-a"][0]())


@pytest.mark.parametrize("name", ["option-a", "shuffle", "fused attention", "unet", "groups"])
def test_a_cut_network_gives_the_same_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    import onnxruntime

    model, example, graph = traced(name)
    cut = surgery.cut(proof.randomised(model), graph, halves(graph)).eval()
    export.to_onnx(cut, example, tmp_path / "cut.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(tmp_path / "cut.onnx"), options, providers=["CPUExecutionProvider"])
    assert isinstance(example, Tensor)
    there = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    for ours, theirs in zip(proof.outputs(cut, example), there, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-5)


def test_a_network_that_decides_on_its_data_is_not_exported_and_its_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        TraceError,
        match=r"^Decides cannot be exported to ONNX: it decides on the data at \S*nets\.py:\d+ "
        r"\(`x = self\.c\(x\) if x\.sum\(\) > 0 else self\.d\(x\)`\)\. Move that part out of .*, into a wrapper around",
    ):
        export.to_onnx(Decides(), image(), tmp_path / "decides.onnx")
    assert not list(tmp_path.iterdir())


def test_a_network_with_an_operator_that_onnx_lacks_is_not_exported_and_it_is_named(tmp_path: Path) -> None:
    class Bessel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.fc(x))

    with pytest.raises(
        TraceError,
        match=r"Bessel cannot be exported to ONNX: it has nothing for the operator prims\.bessel_j0\. Move",
    ):
        export.to_onnx(Bessel(), image(2, 6), tmp_path / "bessel.onnx")


# ---- what is refused -----------------------------------------------------------------------------------------


class DecidesOnSizes(nn.Module):
    """A size written into the forward before a decision on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).view(-1, 8, 16, 16)).mean((2, 3))
        return self.fc(x if x.sum() > 0 else -x)


def test_a_decision_in_a_network_that_only_replay_can_cut_is_refused_with_its_line() -> None:
    model = DecidesOnSizes()
    graph = trace(model, image())
    assert [g.id for g in graph.groups] == ["a"]
    with pytest.raises(TraceError, match=r"decides on the data at .*x\.sum\(\) > 0.*--frozen MODULE, or .*wrapper"):
        surgery.cut(model, graph, {"a": (0, 1)})
    assert not trace(model, image(), frozen=["a"]).groups


class Ordered(nn.Module):
    """Layers of equal shapes, in the order in which they are named; perhaps with a size written into the forward."""

    def __init__(self, order: str, slope: float = 0.1, written: bool = False) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(6, 8), nn.Linear(8, 5)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.order, self.slope, self.written = order, slope, written

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name in self.order:
            x = F.leaky_relu(self.get_submodule(name)(x), self.slope)
        return self.fc(x.view(-1, 8) if self.written else x)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("share", [1, 2])
def test_a_plan_for_a_network_with_the_same_layers_in_another_order_is_refused(share: int, written: bool) -> None:
    graph = trace(Ordered("ab", written=written), image(2, 6))
    keep: Keep = {g.id: tuple(range(g.width // share)) for g in graph.groups}
    surgery.cut(Ordered("ab", written=written), graph, keep)  # other weights alone make no other network
    with pytest.raises(
        SurgeryError,
        match=r"this plan belongs to another network: step 2 of its input is linear with a\.bias, a\.weight, in this "
        r"network it is linear with b\.bias, b\.weight\. Trace this model and plan again\.",
    ):
        surgery.cut(Ordered("ba", written=written), graph, keep)


def test_a_plan_for_a_network_with_another_number_in_its_forward_is_refused() -> None:
    graph = trace(Ordered("ab", written=True), image(2, 6))
    keep: Keep = {g.id: (0, 3) for g in graph.groups}
    with pytest.raises(SurgeryError, match=r"step 3 of its input is leaky_relu \(0\.1\).* it is leaky_relu \(0\.2\)"):
        surgery.cut(Ordered("ab", 0.2, written=True), graph, keep)
    with pytest.raises(SurgeryError, match=r"step \d+ of its input is .*, in this network it is "):
        surgery.cut(Ordered("a", written=True), graph, keep)


class KeepsState(nn.Module):
    """A size in the forward and a tensor kept between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)
        self.before = [torch.zeros(2, 8)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).view(-1, 8, 256).mean(2)
        return self.fc(x + 0 * self.before[0].sum())


def test_a_constant_that_a_module_keeps_in_a_list_is_carried_into_the_recorded_graph() -> None:
    model = KeepsState().eval()
    graph = trace(model, image())
    cut = surgery.cut(model, graph, {"a": (1, 2)}).eval()
    assert proof.deviation(model, graph, {"a": (1, 2)}, image()) < 1e-6
    assert cut(image()).shape == (2, 5)


def test_a_mask_over_the_data_freezes_what_it_selects_from() -> None:
    class Selects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(torch.relu(self.a(x)))
            return self.fc(x[x[..., 0] > 0])

    graph = trace(Selects(), image(2, 7, 6))
    assert any("selected by a mask" in f.reason for f in graph.frozen)
    assert [g.id for g in graph.groups] == ["a"]


class SelectsAfter(nn.Module):
    """As many rows as its data decides, perhaps after a size that is written into the forward."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = self.b(x.view(-1, 8) if self.written else x.flatten(0, -2))
        return self.fc(x[x[:, 0] > 0])


def test_a_network_that_selects_by_its_data_keeps_its_class_and_selects_anew() -> None:
    torch.manual_seed(0)
    model, x = SelectsAfter(written=False).eval(), image(2, 7, 6)
    graph = trace(model, x)
    keep: Keep = {"a": (0, 1)}
    cut = surgery.cut(model, graph, keep).eval()
    assert type(cut) is SelectsAfter
    masked = proof.outputs(surgery.mask(model, graph, keep), x)
    assert len(masked[0]) != len(model(x))  # the cut decides on other numbers
    assert proof.difference(masked, proof.outputs(cut, x)) < 1e-6


def test_a_recording_of_a_network_that_selects_by_its_data_does_not_stand_in_for_it() -> None:
    model = SelectsAfter(written=True).eval()
    graph = trace(model, image(2, 7, 6))
    with pytest.raises(
        TraceError, match=r"how many values SelectsAfter goes on with is decided by its data, at the op"
    ):
        surgery.cut(model, graph, {"a": (0, 1)})


def test_forwards_that_need_more_than_tensors_are_told_to_be_wrapped() -> None:
    class Needs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 5)

        def forward(self, x: Tensor, targets: object) -> Tensor:
            return self.a(x)

    with pytest.raises(TraceError, match=r"missing 1 required positional argument: 'targets'.*wrap it in a module"):
        trace(Needs(), image(2, 7, 6))


def test_a_network_that_casts_to_float32_is_checked_in_float64_all_the_same() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.a(x.float() @ torch.eye(6))).to(torch.float32) + torch.ones(8))

    torch.manual_seed(0)
    proved = proof.check(Single().eval(), image(2, 6))
    assert proved.precision == "float64"
    assert proved.max_deviation < 1e-12


def test_attention_heads_are_cut_whole_where_channels_attend_to_channels() -> None:
    """Cross-covariance attention: scores are over channels, summed over positions."""

    class CrossCovariance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj, self.fc = nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 5)
            self.temperature = nn.Parameter(torch.rand(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            n, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, t, 3, 3, 4).permute(2, 0, 3, 4, 1).unbind(0)
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
            x = (scores.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(n, t, -1)
            return self.fc(self.proj(x).mean(1))

    torch.manual_seed(0)
    model, x = CrossCovariance().eval(), image(2, 7, 12)
    graph = trace(model, x)
    assert {g.id: (g.width, g.channels_per_unit) for g in graph.groups}["qkv"] == (3, 12)
    assert proof.check(model, x).max_deviation < 1e-12


def test_a_block_that_subtracts_its_input_is_not_offered_for_dropping() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.fc = (nn.Linear(n, m) for n, m in ((6, 8), (8, 12), (12, 8), (8, 5)))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + 0.1 * (self.b(torch.relu(self.a(x))) - x)
            return self.fc(x + self.b(torch.relu(self.a(x))))

    assert trace(Leaky(), image(2, 6)).blocks == ()
    assert [b.id for b in trace(FusedAttention(), image()).blocks] == ["", "+1"]


def test_a_weight_that_is_cut_some_rows_at_a_time_keeps_the_chosen_ones() -> None:
    """4.2 million numbers, more than LARGE_BYTES, and as many rows as no whole number of blocks holds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2051), nn.ReLU(), nn.Linear(2051, 2053), nn.ReLU(), nn.Linear(2053, 2))
    graph = trace(model, torch.randn(1, 4))
    keep = {g.id: tuple(sorted(torch.randperm(g.width)[: g.width // 2].tolist())) for g in graph.groups}
    cut = surgery.cut(model, graph, keep)
    rows, columns = keep["2"], keep["0"]
    assert torch.equal(cut.get_parameter("2.weight"), model.get_parameter("2.weight")[rows, :][:, columns])
