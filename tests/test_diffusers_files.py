"""diffusers' own code as the oracle for its files and for kohya's: what it writes is read, what is written it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import conv, linear
from safetensors.torch import save_file

from fused_lora.adapter import Adapter
from fused_lora.adapter_io import read_adapter, write_adapter
from fused_lora.state_merge import base_names, merge_lora_into_state_dict

pytest.importorskip("diffusers", reason="needs diffusers, which the extra [test] brings")


@pytest.fixture
def unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=2,
    )


def adapted(unet: Any) -> Any:
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.0.proj"]
    unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets, rank_pattern={"to_q": 2}))
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return unet


def state_of(unet: Any) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in unet.state_dict().items()}


def fused(unet: Any) -> dict[str, torch.Tensor]:
    unet.fuse_lora()
    unet.unload_lora()
    return state_of(unet)


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        assert torch.allclose(actual[key], tensor, rtol=0, atol=1e-5), key


def test_a_file_that_diffusers_saves_merges_as_diffusers_fuses_it(unet: Any, tmp_path: Path) -> None:
    before = state_of(unet)
    adapted(unet).save_lora_adapter(tmp_path)
    adapter = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert {layer.scaling for layer in adapter.layers.values()} == {2, 3}
    assert_close(merge_lora_into_state_dict(before, adapter, dtype=None), fused(unet))


def test_a_pipelines_file_has_its_config_in_the_header(unet: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    before = state_of(unet)
    adapted(unet)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict() | {"target_modules": ["to_q"]},
    )
    adapter = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert {layer.r for layer in adapter.layers.values()} == {2, 3}
    assert_close(merge_lora_into_state_dict(before, adapter, dtype=None), fused(unet))


@pytest.mark.parametrize("format", ["diffusers", "diffusers-old", "kohya"])
def test_diffusers_loads_what_is_written(format: str, unet: Any, tmp_path: Path) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    before = state_of(unet)
    layers: dict[str, Any] = {}
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_v")):
            layers[f"unet.{name}"] = linear(module.out_features, module.in_features, r=3, alpha=6.0)
        elif name.endswith("conv1"):
            layers[f"unet.{name}"] = conv(module.out_channels, module.in_channels, (3, 3), r=2, alpha=5.0)
    adapter = Adapter(layers)
    write_adapter(adapter, tmp_path / "a.safetensors", format)
    state, alphas, *rest = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(tmp_path / "a.safetensors"), unet_config=unet.config, return_lora_metadata=True
    )
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, unet, metadata=rest[0] if rest else None)
    expected = merge_lora_into_state_dict(before, adapter, dtype=None)
    assert_close(fused(unet), expected)
    again = read_adapter(tmp_path / "a.safetensors")
    assert_close(merge_lora_into_state_dict(before, again, dtype=None), expected)


def test_kohyas_file_of_diffusers_own_making_gets_its_names_back(unet: Any, tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_kohya
    from peft.utils import get_peft_model_state_dict

    before = state_of(unet)
    state = {f"unet.{key}": tensor for key, tensor in get_peft_model_state_dict(adapted(unet)).items()}
    save_file({k: t.contiguous() for k, t in convert_state_dict_to_kohya(state).items()}, tmp_path / "k.safetensors")
    adapter = read_adapter(tmp_path / "k.safetensors")
    assert adapter.format == "kohya" and all(layer.scaling == 1 for layer in adapter.layers.values())
    names = base_names(before, adapter)
    assert {f"unet.{path}.lora_A.weight" for path in names.values()} == {key for key in state if "lora_A" in key}
