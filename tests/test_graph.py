"""Channel groups against the oracle: the masked dense network must equal the cut one."""

from __future__ import annotations

import warnings

import pytest
import torch
from nets import NETS, Auxiliary, Decides, Fixed, FusedAttention, OptionA, Recurrent, Shuffle, Stochastic, image
from oddnets import ODD
from torch import Tensor, nn, optim

from edgeprune import inspection, proof, surgery
from edgeprune.errors import SurgeryError, TraceError
from edgeprune.graph import trace

PRUNABLE = {"written in place": 0.5, "recurrent": 0.1, "decides": 0.5}  # share of weights; all others: 0.9


@pytest.mark.parametrize("name", NETS)
def test_every_group_can_be_cut_and_equals_the_masked_network(name: str) -> None:
    make, example = NETS[name]
    torch.manual_seed(0)
    found = inspection.inspect(make().eval(), example, check=True)
    assert found.proof is not None
    assert found.proof.max_deviation < 1e-12, found.proof.worst
    graph = found.graph
    assert graph.prunable_weights >= PRUNABLE.get(name, 0.9) * graph.total_weights
    assert graph.groups


@pytest.mark.parametrize("name", ["option-a", "shuffle", "fused attention", "groups", "fixed sizes", "unet"])
def test_the_oracle_notices_a_channel_that_is_cut_in_the_wrong_place(name: str) -> None:
    """Swap two kept slices of one member: same shapes, wrong network."""
    make, example = NETS[name]
    torch.manual_seed(0)
    model = proof.randomised(make().double().eval())
    example = example.double()
    graph = trace(model, example)
    group = max((g for g in graph.groups if not g.inexact), key=lambda g: g.width)
    keep = {group.id: tuple(range(0, group.width, 2))}
    cut = surgery.cut(model, graph, keep)
    reader = next(m for m in group.members if m.role == "in")
    with torch.no_grad():
        weight = dict(cut.named_parameters())[reader.tensor]
        weight.copy_(weight.roll(1, reader.axis))
        masked = surgery.mask(model, graph, keep)(example)
        wrong = cut(example)
    first = masked if isinstance(masked, Tensor) else masked["out"]
    second = wrong if isinstance(wrong, Tensor) else wrong["out"]
    assert float((first - second).abs().max()) > 1e-6


@pytest.mark.parametrize("name", NETS)
def test_a_cut_network_trains_at_another_batch_size(name: str) -> None:
    make, example = NETS[name]
    torch.manual_seed(0)
    model = make()
    graph = trace(model, example)
    cut = surgery.cut(model, graph, {g.id: tuple(range((g.width + 1) // 2)) for g in graph.groups}).train()
    before = {n: p.detach().clone() for n, p in cut.named_parameters()}
    inputs = example if isinstance(example, tuple) else (example,)
    larger = [torch.cat([x, x, x[:1]]) for x in inputs]
    optimiser = optim.SGD(cut.parameters(), lr=0.1)
    outputs = torch.utils._pytree.tree_leaves(cut(*larger))
    sum(o.float().square().mean() for o in outputs if isinstance(o, Tensor)).backward()
    optimiser.step()
    moved = [n for n, p in cut.named_parameters() if p.grad is not None and not torch.equal(p, before[n])]
    assert len(moved) >= 0.6 * len(before)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())


def test_the_model_that_is_traced_and_cut_is_left_alone() -> None:
    model = OptionA().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = trace(model, image())
    surgery.cut(model, graph, {g.id: (0,) for g in graph.groups})
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_sizes_that_forward_reads_from_attributes_keep_the_users_class() -> None:
    model = FusedAttention()
    graph = trace(model, image())
    cut = surgery.cut(model, graph, {"qkv": (0, 2)})
    assert type(cut) is FusedAttention
    assert (cut.num_heads, cut.attn_dim, cut.head_dim) == (2, 12, 6)


def test_sizes_written_into_forward_fall_back_to_the_recorded_graph() -> None:
    model = Fixed().eval()
    graph = trace(model, image())
    assert type(surgery.cut(model, graph, {"b": (0, 1, 5)})) is not Fixed
    assert type(surgery.cut(model, graph, {})) is Fixed


def test_dropout_and_drop_path_work_in_a_recorded_graph() -> None:
    torch.manual_seed(0)
    x = image()
    for make, group in ((Fixed, "b"), (Stochastic, "a")):
        graph = trace(make(), x)
        cut = surgery.cut(make(), graph, {group: (0, 1, 2)})
        random = {float(cut.train()(x).detach().sum()) for _ in range(12)}
        assert len(random) > 1
        assert torch.equal(cut.eval()(x), cut(x))


def test_a_head_that_only_training_uses_is_cut_with_its_input() -> None:
    model = Auxiliary()
    graph = trace(model, image())
    cut = surgery.cut(model, graph, {"a": (0, 3, 4), "aux.0": (1, 2)}).train()
    out, aux = cut(image())
    assert out.shape == aux.shape == (2, 5)
    assert cut.aux[0].weight.shape == (2, 3, 3, 3)


def test_what_follows_a_decision_on_the_data_stays_with_the_line_as_reason() -> None:
    graph = trace(Decides(), image())
    reasons = [f.reason for f in graph.frozen if "decision" in f.reason]
    assert len(reasons) == 1
    assert "nets.py" in reasons[0]
    assert "x.sum() > 0" in reasons[0]
    assert [g.id for g in graph.groups] == ["a"]


def test_an_operator_without_a_rule_freezes_what_it_reads_by_name() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.fft.fft(self.b(torch.relu(self.a(x)))).real)

    graph = trace(Spectrum(), image(2, 7, 6))
    assert any(f.reason == "no rule for the operator _fft_r2c" for f in graph.frozen)
    assert [g.id for g in graph.groups] == ["a"]


def test_a_recurrent_layer_keeps_its_states_and_reads_fewer_inputs() -> None:
    graph = trace(Recurrent(), image(2, 7, 6))
    assert [g.id for g in graph.groups] == ["a", "b"]
    cut = surgery.cut(Recurrent(), graph, {"a": (0, 5)})
    assert (cut.rnn.input_size, cut.rnn.hidden_size) == (2, 10)
    assert cut(image(2, 7, 6)).shape == (2, 5)


def test_modules_can_be_frozen_by_name() -> None:
    graph = trace(OptionA(), image(), frozen=["blocks.1"])
    assert {g.id for g in graph.groups} == {"stem.0", "blocks.0.conv1", "blocks.2.conv1", "blocks.2.conv2"} - {"stem.0"}
    with pytest.raises(
        TraceError, match=r"--frozen nowhere: no module of that name has parameters; there are .*stem\.0"
    ):
        trace(OptionA(), image(), frozen=["nowhere"])


def test_outputs_keep_all_their_channels() -> None:
    for name, (make, example) in NETS.items():
        torch.manual_seed(0)
        model = make().eval()
        graph = trace(model, example)
        cut = surgery.cut(model, graph, {g.id: (0,) for g in graph.groups})
        args = example if isinstance(example, tuple) else (example,)
        with torch.inference_mode():
            dense, small = (torch.utils._pytree.tree_leaves(m(*args)) for m in (model, cut))
        assert [t.shape for t in dense] == [t.shape for t in small], name


# ---- blocks --------------------------------------------------------------------------------------------------


def test_residual_blocks_are_found_and_dropped_whole() -> None:
    model = proof.randomised(OptionA().double().eval())
    graph = trace(model, image().double())
    assert [b.id for b in graph.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    cut = surgery.cut(model, graph, {"blocks.1.conv1": ()})
    assert not any(n.startswith("blocks.1.") for n, _ in cut.named_parameters())
    x = image().double()
    with torch.inference_mode():
        y = model.stem(x)
        y = model.blocks[0](y)
        y = torch.relu(model.blocks[1].shortcut(y))  # what dropping the branch leaves
        y = model.blocks[2](y)
        expected = model.fc(y.mean((2, 3)))
    assert torch.allclose(cut(x), expected, rtol=1e-12, atol=1e-12)


def test_dropping_a_block_does_not_overwrite_its_input_in_place() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
            self.c = nn.Conv2d(4, 6, 1)
            self.d = nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.d(self.c(x)) + x
            y = y.relu_()
            return self.fc((x * y).mean((2, 3)))

    model = Twice().eval()
    graph = trace(model, image())
    cut = surgery.cut(model, graph, {"c": ()})
    x = image()
    expected = model.fc((model.a(x) * model.a(x).relu()).mean((2, 3)))
    assert torch.allclose(cut(x), expected, atol=1e-6)


# ---- bad input -----------------------------------------------------------------------------------------------


def test_a_group_cut_to_nothing_is_refused() -> None:
    model = Shuffle()
    graph = trace(model, image())
    with pytest.raises(SurgeryError, match=r"group stem\[8\] would be cut to nothing; keep at least one unit"):
        surgery.cut(model, graph, {"stem[8]": ()})


def test_units_that_do_not_exist_and_unknown_groups_are_refused() -> None:
    model = OptionA()
    graph = trace(model, image())
    with pytest.raises(SurgeryError, match=r"group stem\.0 has units 0 to 7; \(3, 99\) is not an ascending choice"):
        surgery.cut(model, graph, {"stem.0": (3, 99)})
    with pytest.raises(SurgeryError, match=r"no channel group is called .nope.; this network has stem\.0"):
        surgery.cut(model, graph, {"nope": (0,)})


def test_a_graph_of_another_network_is_refused() -> None:
    graph = trace(OptionA(), image())
    other = OptionA()
    other.fc = nn.Linear(16, 5)
    with pytest.raises(SurgeryError, match=r"this plan belongs to another network: fc\.weight should have 32 slices"):
        surgery.cut(other, graph, {"stem.0": (0,)})
    assert trace(OptionA(), image()).fingerprint == graph.fingerprint
    assert trace(Fixed(), image()).fingerprint != graph.fingerprint


def test_an_input_that_does_not_fit_names_the_line_and_the_shape() -> None:
    with pytest.raises(TraceError, match=r"OptionA failed on an input of shape \(2, 4, 16, 16\) .*nets\.py:\d+"):
        trace(OptionA(), torch.zeros(2, 4, 16, 16))


def test_a_network_without_parameters_is_refused() -> None:
    with pytest.raises(TraceError, match="Identity has no parameters that its forward pass uses: nothing to prune"):
        trace(nn.Identity(), image())


def test_a_network_that_cannot_be_copied_is_refused_with_the_reason() -> None:
    model = OptionA()
    model.log = open(__file__)  # noqa: SIM115
    with model.log, pytest.raises(TraceError, match=r"OptionA cannot be copied .*open files, locks, cached tensors"):
        trace(model, image())


def test_tracing_warns_about_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(FusedAttention(), image())


# ---- networks that nobody had in mind ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD)
def test_an_odd_network_is_cut_right_or_frozen_with_a_reason(name: str) -> None:
    make, example = ODD[name]
    torch.manual_seed(0)
    model = make().eval()
    proved = proof.check(model, example)
    assert proved.max_deviation < 1e-12, proved.worst
    graph = trace(model, example)
    frozen = {tensor for f in graph.frozen for tensor in f.tensors if f.reason}
    cut = {member.tensor for group in graph.groups for member in group.members}
    assert {n for n, p in model.named_parameters() if p.dim() > 1} <= frozen | cut


def test_channels_that_steer_an_operator_stay() -> None:
    make, example = ODD["Grid"]
    graph = trace(make(), example)
    assert any(f.reason == "steers the operator grid_sampler" and "off.weight" in f.tensors for f in graph.frozen)


def test_every_other_channel_by_number_is_frozen() -> None:
    make, example = ODD["Inplace"]
    assert any("positions picked by their number" in f.reason for f in trace(make(), example).frozen)


def test_zeros_like_a_tensor_follow_its_channels() -> None:
    make, example = ODD["Scan"]
    assert {g.id: g.width for g in trace(make(), example).groups} == {"i": 8}


def test_heads_of_separate_queries_keys_and_values_are_cut_whole() -> None:
    make, example = ODD["Einsum"]
    [group] = trace(make(), example).groups
    assert group.width == 4
    assert {(m.tensor, m.axis) for m in group.members} >= {(f"{n}.weight", 0) for n in "qkv"} | {("o.weight", 1)}
