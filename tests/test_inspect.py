"""What `edgeprune inspect` tells people and programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small
import torch
from nets import Decides, FusedAttention, OptionA, image
from torch import Tensor, nn

from edgeprune import cli, inspection
from edgeprune.cli import tree


def shown(model: nn.Module, example: Tensor, capsys: pytest.CaptureFixture[str], check: bool = False) -> str:
    torch.manual_seed(0)
    tree.show(inspection.inspect(model.eval(), example, check=check))
    return " ".join(capsys.readouterr().out.replace("│", " ").replace("├──", " ").replace("└──", " ").split())


def test_a_group_shows_its_width_step_parameters_layers_and_that_it_is_exact(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = shown(OptionA(), image(), capsys)
    # one unit of blocks.0.conv1: a row of conv1 (8 x 9), a scale, shift, mean and variance, a column of conv2 (8 x 9)
    assert f"blocks.0.conv1: 8 units, step 1, {8 * (72 + 2 + 72):,} parameters, exact" in text
    assert "made by blocks.0.conv1 read by blocks.0.conv2" in text
    assert "3 residual blocks can be dropped whole: blocks.0, blocks.1, blocks.2" in text
    assert "10 slices of fc.bias, fc.weight: the network's output" in text


def test_an_inexact_group_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(FusedAttention(), image(), capsys)
    assert "inexact: layer norm averages over the channels that are cut (in " in text
    assert "4 units x 18 channels" in text


def test_what_a_decision_freezes_comes_with_its_line_and_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(Decides(), image(), capsys)
    assert "follows a decision on the data at" in text
    assert "move it out of the network, into a wrapper around it, to prune more" in text
    assert "wrapper" not in shown(OptionA(), image(), capsys)


def test_a_check_says_what_was_cut_and_the_largest_deviation(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(OptionA(), image(), capsys, check=True)
    assert "float64; 6 of 6 exact groups one by one and all together, 3 blocks dropped" in text
    assert "no proof" not in text


def test_a_group_whose_channels_do_nothing_is_not_called_proved(capsys: pytest.CaptureFixture[str]) -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.b(x.abs() @ self.a.weight.T.abs()).clamp(max=0)))

    text = shown(Dead(), image(2, 6), capsys, check=True)
    assert "no proof for" in text
    assert "masking them does not change the output either" in text


def test_the_json_holds_every_group_and_counts_parameters_once() -> None:
    model = OptionA()
    found = inspection.as_json(inspection.inspect(model, image()))
    assert found["total_params"] == sum(p.numel() for p in model.parameters())
    assert found["prunable_params"] == found["total_params"] - 5  # the classifier's bias alone stays
    assert [g["id"] for g in found["groups"]][:2] == ["stem.0", "blocks.0.conv1"]
    assert found["max_deviation"] is None
    assert found["seconds"] > 0


# ---- the command ---------------------------------------------------------------------------------------------


def test_what_is_frozen_by_name_stays_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.make(folder)
    assert cli.run(["inspect", "--json"]) == 0
    free = json.loads(capsys.readouterr().out)
    assert cli.run(["inspect", "--frozen", "a.0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [g["id"] for g in free["groups"]] == ["stem.0", "a.0", "b.0"]
    assert [g["id"] for g in found["groups"]] == ["b.0"]  # a.0 reads what stem.0 and a.3 make
    assert [b["id"] for b in free["blocks"]] == [""]
    assert not found["blocks"]
    [asked] = [f for f in found["frozen"] if "by request" in f["reason"]]
    assert asked["reason"] == "frozen by request (a.0)"
    assert "a.0.weight" in asked["tensors"]
    assert cli.run(["inspect", "--frozen", "c"]) == 2
    assert "--frozen c: no module of that name has parameters; there are a.0, a.1" in capsys.readouterr().err


NOISY = """
from torch import nn
from torch.nn import functional as F


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(F.dropout(self.a(x), 0.5, training=NOISE))  # left on in evaluation, as for uncertainty


def build():
    return Noisy()
"""


@pytest.mark.parametrize(("noise", "status"), [("True", 1), ("self.training", 0)])
def test_a_network_that_does_not_answer_as_the_masked_one_ends_a_check_with_1(
    noise: str, status: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("model.py").write_text(NOISY.replace("NOISE", noise))
    assert cli.run(["inspect", "model.py:build", "--input", "2x6", "--check", "--json"]) == status
    out, err = capsys.readouterr()
    deviation = json.loads(out)["max_deviation"]
    if status:
        assert deviation > 1e-5
        assert f"changes the output by {deviation:.2g} of its largest value; freeze it with --frozen" in err
    else:
        assert deviation < 1e-12
