"""mark_only_lora_as_trainable and lora_state_dict, against loralib and where it catches too much."""

from __future__ import annotations

import loralib
import pytest
import torch
from torch import nn

import fused_lora


def model(module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        module.Linear(4, 5, r=2), nn.LayerNorm(5), module.Linear(5, 3, r=2, bias=False), nn.Linear(3, 2)
    )


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_same_selection_as_loralib(bias: str) -> None:
    ours, theirs = model(fused_lora), model(loralib)
    fused_lora.mark_only_lora_as_trainable(ours, bias)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }
    mine, other = fused_lora.lora_state_dict(ours, bias), loralib.lora_state_dict(theirs, bias)
    assert set(mine) == set(other)
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_names_that_only_look_alike_are_left_alone() -> None:
    net = nn.ModuleDict({"explora_tion": nn.Linear(2, 2), "layer": fused_lora.Linear(2, 2, r=1)})
    net.relative_attention_bias = nn.Embedding(4, 2)
    fused_lora.mark_only_lora_as_trainable(net, "all")
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {"explora_tion.bias", "layer.bias", "layer.lora_A", "layer.lora_B"}
    assert set(fused_lora.lora_state_dict(net)) == {"layer.lora_A", "layer.lora_B"}


def test_adapters_travel_both_ways_with_loralib() -> None:
    x = torch.randn(3, 4)
    for source_module, target_module in ((fused_lora, loralib), (loralib, fused_lora)):
        source = model(source_module)
        nn.init.normal_(source[0].lora_B)
        target = model(target_module)
        report = target.load_state_dict(source_module.lora_state_dict(source), strict=False)
        assert not report.unexpected_keys
        assert not [key for key in report.missing_keys if "lora_" in key]
        torch.testing.assert_close(target(x), source(x))


def test_an_unknown_bias_raises_as_in_loralib() -> None:
    for function in (fused_lora.mark_only_lora_as_trainable, fused_lora.lora_state_dict):
        net = model(fused_lora)
        with pytest.raises(NotImplementedError, match="bias is 'some'"):
            function(net, "some")
        assert all(p.requires_grad for p in net[3].parameters()), "a refused call changes nothing"


def test_a_model_without_lora_warns() -> None:
    with pytest.warns(UserWarning, match="no LoRA parameter"):
        fused_lora.mark_only_lora_as_trainable(nn.Linear(2, 2))
