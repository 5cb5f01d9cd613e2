"""Accelerated PEFT layers whose tensors are DTensors or sharded by FSDP, in a process group of one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_peft import BASES, IN, layer_of, peft_model
from torch import Tensor, nn

import fused_lora

pytest.importorskip("peft", reason="peft is not installed")
if not dist.is_available():
    pytest.skip("this torch was built without torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import fused_lora.peft as fused_peft

LAYER = "base_model.model.layer"


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def outputs_and_gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    y = model(x)
    y.square().sum().backward()
    found = {"y": y.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}


def assert_as(model: Any, expected: dict[str, Tensor], x: Tensor) -> None:
    # Single precision, 20 products of numbers near 1 and sums of 48 of them.
    torch.testing.assert_close(outputs_and_gradients(model, x), expected, rtol=1e-5, atol=1e-4)


def test_dtensors_take_pefts_path(mesh: DeviceMesh) -> None:
    model = peft_model(BASES["Linear"]())
    x = torch.randn(4, IN)
    expected = outputs_and_gradients(copy.deepcopy(model), x)
    fused_peft.accelerate(model)
    for module in layer_of(model).modules():
        for name, parameter in module.named_parameters(recurse=False):
            shared = distribute_tensor(parameter.detach(), mesh, [Replicate()])
            setattr(module, name, nn.Parameter(shared, requires_grad=parameter.requires_grad))
    assert fused_peft.report(model)[LAYER].reason == "one of its tensors is a DTensor"
    with fused_lora.count_paths() as paths:
        assert_as(model, expected, distribute_tensor(x, mesh, [Replicate()]))
    assert not paths


def test_a_dtensor_for_an_input_takes_pefts_path(mesh: DeviceMesh) -> None:
    """PEFT's own error for a mix of both kinds of tensors, instead of the op's."""
    model = fused_peft.accelerate(peft_model(BASES["Linear"]()))
    with fused_lora.count_paths() as paths, pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        model(distribute_tensor(torch.randn(4, IN), mesh, [Replicate()]))
    assert not paths


def test_adapters_that_are_fsdp_modules_of_their_own_take_pefts_path(mesh: DeviceMesh) -> None:
    """As some trainers shard them: their weights are whole only while their own forward runs."""
    model = peft_model(BASES["Linear"]())
    x = torch.randn(4, IN)
    expected = outputs_and_gradients(copy.deepcopy(model), x)
    fused_peft.accelerate(model)
    for adapter in (layer_of(model).lora_A["default"], layer_of(model).lora_B["default"]):
        fully_shard(adapter, mesh=mesh)
    assert fused_peft.report(model)[LAYER].reason == "its lora_A is a FSDPLinear"
    with fused_lora.count_paths() as paths:
        assert_as(model, expected, x)
    assert not paths


@pytest.mark.parametrize("at", ["layer", "model"])
def test_fsdp_around_accelerated_layers_runs_fused(mesh: DeviceMesh, at: str) -> None:
    model = peft_model(BASES["Linear"]())
    for parameter in layer_of(model).base_layer.parameters():
        parameter.requires_grad = False
    x = torch.randn(4, IN)
    expected = outputs_and_gradients(copy.deepcopy(model), x)
    fused_peft.accelerate(model)
    if at == "layer":
        fully_shard(layer_of(model), mesh=mesh)
    fully_shard(model, mesh=mesh)
    with fused_lora.count_paths() as paths:
        assert_as(model, expected, x)
    assert paths["forward/reference"] == 1
    if at == "layer":
        with pytest.raises(RuntimeError, match="is a FSDPFusedLinear whose class or forward was replaced"):
            fused_peft.restore(model)
