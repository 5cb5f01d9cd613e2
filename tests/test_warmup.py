"""warmup runs what a run will need, and leaves no trace on the model."""

from __future__ import annotations

import copy
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import fused_lora


def model() -> nn.Sequential:
    net = nn.Sequential(
        fused_lora.Linear(8, 16, r=2, lora_dropout=0.5),
        nn.BatchNorm1d(16),
        fused_lora.MergedLinear(16, 12, r=2, enable_lora=[True, False, True]),
        fused_lora.Linear(12, 12, r=2, fan_in_fan_out=True),
        fused_lora.Linear(12, 12, r=2, fan_in_fan_out=True),
    )
    net.append(fused_lora.Embedding(5, 4, r=2, padding_idx=0)).append(fused_lora.Conv2d(2, 4, 3, r=2, lora_dropout=0.1))
    fused_lora.mark_only_lora_as_trainable(net)
    return net


def test_runs_each_kind_forward_and_backward_on_the_forced_path(backend: str, device: str) -> None:
    with fused_lora.count_paths() as ran:
        kinds = fused_lora.warmup(model().to(device), tokens=(3, 5))
    # Of the two equal layers one is run.
    assert kinds == 5
    # Two numbers of tokens, dx or not, and for the first layer with dropout or not.
    assert ran[f"backward/{backend}"] == 2 * 2 * (2 + 1 + 1)
    # And without a backward for each of three layers.
    assert ran[f"forward/{backend}"] == ran[f"backward/{backend}"] + 2 * 3
    assert ran[f"embedding/{backend}"] == 2 and ran[f"effective_weight/{backend}"] == 2


def test_runs_what_inference_will_need(device: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")
    layer = fused_lora.Linear(8, 16, r=2, lora_dropout=0.5, merge_weights=False, device=device).eval()
    with fused_lora.use_backend("decode"), fused_lora.count_paths() as ran:
        fused_lora.warmup(layer, tokens=(1, 3))
    # For two numbers of tokens: dx or not, with dropout or not, and a forward alone.
    assert ran["forward/decode"] == 2 * (2 * 2 + 1)


def test_changes_nothing() -> None:
    net = model()
    net[0].register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    net[0].lora_A.grad = torch.ones_like(net[0].lora_A)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        fused_lora.warmup(net, 4)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training and torch.equal(net[0].lora_A.grad, torch.ones_like(net[0].lora_A))
    assert all(p.grad is None for name, p in net.named_parameters() if name != "0.lora_A")


@pytest.mark.parametrize("parametrized", [False, True])
def test_neither_renormalises_an_embedding_nor_runs_a_parameters_hook(parametrized: bool) -> None:
    net = model().append(fused_lora.Embedding(6, 4, r=2, max_norm=0.1))
    if parametrized:
        for layer in (net[0], net[6]):
            nn.utils.parametrizations.weight_norm(layer, "lora_A")
    net.requires_grad_(True)
    ran: list[torch.Tensor] = []
    for parameter in net.parameters():
        parameter.register_hook(ran.append)
    before = [(parameter, parameter.clone(), parameter._version) for parameter in net.parameters()]
    assert fused_lora.warmup(net, 4) == 6 and not ran
    for parameter, value, version in before:
        assert torch.equal(parameter, value) and parameter._version == version


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_embedding_without_rows_is_not_looked_up() -> None:
    assert fused_lora.warmup(fused_lora.Embedding(0, 4, r=2), 3) == 1


def test_tokens_may_be_any_integers() -> None:
    for tokens in (numpy.int64(3), [numpy.int32(3)], range(3, 4), torch.tensor(3)[None]):
        assert fused_lora.warmup(fused_lora.Linear(2, 2, r=1), tokens) == 1


def test_follows_autocast_and_a_given_dtype_and_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    original = fused_lora.functional.lora_linear

    def seeing(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        seen.add((x.dtype, options["dropout_p"]))
        return original(x, *arguments, **options)

    monkeypatch.setattr("fused_lora.linear.lora_linear", seeing)
    layer = fused_lora.Linear(8, 8, r=2, lora_dropout=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused_lora.warmup(layer, 2, dtype=torch.bfloat16)
    assert seen == {(torch.bfloat16, 0.0), (torch.bfloat16, 0.5)}


def test_errors_name_the_argument_and_merged_layers_need_nothing() -> None:
    with pytest.raises(ValueError, match=r"tokens is 0; expected an integer of 1 or more"):
        fused_lora.warmup(model(), 0)
    for tokens in (2.5, [2.5], "3", None, True):
        with pytest.raises(ValueError, match=r"tokens is .*; expected an integer of 1 or more"):
            fused_lora.warmup(model(), tokens)
    with pytest.raises(ValueError, match=r"tokens is \(\); expected one or more integers"):
        fused_lora.warmup(model(), ())
    for net in (nn.Linear(2, 2), fused_lora.Linear(2, 2)):
        with pytest.raises(ValueError, match="model has no LoRA layer with an adapter"):
            fused_lora.warmup(net, 1)
    assert fused_lora.warmup(fused_lora.Linear(2, 2, r=1).eval(), 1) == 0
