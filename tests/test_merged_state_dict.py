"""merged_state_dict: plain layers and a whole model that load it compute the merged layers' bits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from mergeable import (
    ALPHA,
    TFT,
    R,
    assert_same_bits,
    assert_same_entries,
    build,
    entries,
    every_layer,
    make_x,
    owner,
    plain,
    redraw_adapter,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fused_lora import Conv1d, Conv2d, Embedding, Linear, MergedLinear, merged_state_dict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval", "never merged"])
@every_layer
def test_merged_state_dict_makes_the_plain_layer_compute_the_same_bits(
    name: str, mode: str, dtype: torch.dtype, device: str
) -> None:
    layer = build(name, device, dtype=dtype, merge_weights=mode != "never merged").train(mode == "train")
    before, weight, was_merged = entries(layer), owner(layer).weight, layer.merged
    own = {tensor.data_ptr() for tensor in layer.state_dict().values()}
    state = merged_state_dict(layer)
    for key, tensor in state.items():
        assert not tensor.requires_grad
        assert (tensor.data_ptr() in own) == key.endswith("bias") and tensor.data_ptr() != weight.data_ptr()
    nested = merged_state_dict(nn.Sequential(nn.Identity(), nn.Sequential(layer)))
    assert_same_entries(nested, {f"1.0.{key}": tensor for key, tensor in state.items()})
    target = plain(name).to(device, dtype)
    target.load_state_dict(state, strict=True)
    assert owner(layer).weight is weight and layer.merged == was_merged and layer.training == (mode == "train")
    assert_same_entries(entries(layer), before)
    merged, x = copy.deepcopy(layer), make_x(name, device, dtype)
    merged.merge_weights = True
    # torch takes another matrix product, which rounds differently, for weights that require a gradient.
    merged.eval().requires_grad_(False), target.requires_grad_(False)
    assert_same_bits(target(x), merged(x), "output")


class Language(nn.Module):
    """A model of every kind of layer, LoRA's or plain, with a head tied to the embedding and a block used twice."""

    def __init__(self, embedding: nn.Module, qkv: nn.Module, conv: nn.Module, out: nn.Module, tie: bool) -> None:
        super().__init__()
        self.embedding, self.norm = embedding, nn.BatchNorm1d(5)
        self.block = nn.ModuleDict({"qkv": qkv, "conv": nn.Sequential(conv)})
        self.again = self.block["qkv"]
        self.conv = out
        self.head = nn.Linear(5, 11, bias=False)
        if tie:
            self.head.weight = embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        q, k, v = self.block["qkv"](x).chunk(3, -1)
        x = q * k + self.again(v).chunk(3, -1)[0]
        images = self.block["conv"](x.unflatten(-1, (1, 5)).transpose(1, 2))
        return self.head(self.conv(images.flatten(1, 2)))


def language_model(device: str) -> Language:
    adapter = {"r": R, "lora_alpha": ALPHA}
    return Language(
        Embedding(11, 5, **adapter),
        MergedLinear(5, 15, enable_lora=TFT, **adapter),
        Conv2d(1, 2, 3, padding=1, **adapter),
        Conv1d(8, 4, 1, **adapter),
        tie=True,
    ).to(device)


@pytest.mark.parametrize("training", [False, True])
def test_merged_state_dict_of_a_whole_model(training: bool, device: str) -> None:
    model = language_model(device)
    redraw_adapter(model)
    tokens = torch.randint(11, (3, 4), device=device)
    with torch.no_grad():
        model(tokens)  # Moves BatchNorm's statistics off their start.
    before = entries(model)
    model.train(training)
    # Untied: the merged embedding is no longer the head's weight.
    target = Language(
        nn.Embedding(11, 5), nn.Linear(5, 15), nn.Conv2d(1, 2, 3, padding=1), nn.Conv1d(8, 4, 1), tie=False
    ).to(device)
    state = merged_state_dict(model)
    target.load_state_dict(state, strict=True)
    assert not any("lora_" in key for key in state)
    assert_same_bits(state["again.weight"], state["block.qkv.weight"])
    assert_same_bits(state["head.weight"], before["head.weight"])
    assert model.head.weight is model.embedding.base_weight
    assert_same_entries(entries(model), before)
    # Frozen for the reason given above.
    model.eval().requires_grad_(False), target.eval().requires_grad_(False)
    assert_same_bits(target(tokens), model(tokens), "logits")


@pytest.mark.parametrize("tensor", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("how", [parametrizations.weight_norm, prune.identity])
@pytest.mark.parametrize("name", ["Linear", "Conv2d-groups=2"])
def test_a_layer_whose_tensors_are_not_its_own_is_refused(
    name: str, how: Callable[[nn.Module, str], object], tensor: str, device: str
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), build(name, device, merge_weights=False))
    how(owner(model[1]) if tensor == "weight" else model[1], tensor)
    with pytest.raises(RuntimeError, match=f"{tensor} is parametrized or sharded; expected a parameter of the layer"):
        merged_state_dict(model)


def test_layers_without_an_adapter_may_be_parametrized(device: str) -> None:
    model = nn.Sequential(parametrizations.weight_norm(Linear(2, 2, device=device)))
    assert list(merged_state_dict(model)) == list(model.state_dict())


def test_merged_state_dict_of_a_model_without_lora_is_its_state_dict(device: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1)).to(device)
    state = merged_state_dict(model)
    assert list(state) == list(model.state_dict())
    assert all(tensor.data_ptr() == state[key].data_ptr() for key, tensor in model.state_dict().items())
