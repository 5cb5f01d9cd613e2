"""Merging into state dicts: against PEFT, loralib, this package's layers and float64, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from adapters import (
    DTYPES,
    HALVES,
    TFT,
    adapters,
    conv,
    embedding,
    examples,
    kohya_names,
    linear,
    merged,
    paths,
    whole_numbers,
)
from checkpoints import assert_same_entries, bits, filled
from hypothesis import given
from hypothesis import strategies as st
from test_adapter_io import TARGETS, Model, ours, peft_layers, peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import fused_lora
from fused_lora.adapter import Adapter
from fused_lora.adapter_io import read_adapter
from fused_lora.formats import FORMATS, adapter_from_state_dict, adapter_to_state_dict
from fused_lora.state_merge import base_names, merge_lora_into_state_dict, merge_report, with_slices_of


def lora(
    path: str = "x", out: int = 5, inner: int = 3, r: int = 2, A: str = "lora_A.weight", B: str = "lora_B.weight"
) -> Any:
    return {f"{path}.{A}": whole_numbers(r, inner, seed=1), f"{path}.{B}": whole_numbers(out, r, seed=2)}


def base_of(*shape: int, key: str = "x.weight", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {key: whole_numbers(*shape, dtype=dtype, seed=3), "untouched": torch.randn(4)}


def expected(base: Tensor, state: Mapping[str, Tensor], factor: float = 1.0) -> Tensor:
    A, B = (tensor.double().flatten(1) for tensor in state.values())
    return base.double() + factor * (B @ A).view(base.shape)


@pytest.mark.parametrize("dtype", [*DTYPES, None])
@pytest.mark.parametrize("lora_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES)
def test_the_sum_is_rounded_once(
    base_dtype: torch.dtype, lora_dtype: torch.dtype, dtype: torch.dtype | None, device: str
) -> None:
    # Sums that float32 holds and no half does: one rounding of the exact sum, of any dtypes, is the only right answer.
    base = {"x.weight": (whole_numbers(5, 3, seed=3) * 256 + 1).to(base_dtype)}
    state = {key: tensor.to(lora_dtype) for key, tensor in lora().items()}
    merged_state = merge_lora_into_state_dict(base, state, 2.0**-6, device, dtype)
    exact = expected(base["x.weight"], state, 2.0**-6)
    actual = merged_state["x.weight"]
    assert actual.dtype == (dtype or base_dtype) and actual.device.type == device
    assert torch.equal(bits(actual.cpu()), bits(exact.to(actual.dtype)))


def test_rolls_defaults_are_kept() -> None:
    base, state = base_of(5, 3), lora()
    merged_state = merge_lora_into_state_dict(base, state)
    assert merged_state["x.weight"].dtype == torch.bfloat16 and merged_state["x.weight"].device.type == "cpu"
    assert merged_state["untouched"] is base["untouched"] and list(merged_state) == list(base)


@pytest.mark.parametrize("replaced", [False, True])
def test_the_base_is_never_written(replaced: bool) -> None:
    base = base_of(5, 3) | {"x.bias": torch.randn(5)}
    before = {key: tensor.clone() for key, tensor in base.items()}
    state = lora() | ({"x.bias": torch.randn(5)} if replaced else {})
    given_state = {key: tensor.clone() for key, tensor in state.items()}
    merged_state = merge_lora_into_state_dict(base, state, dtype=None)
    for key in ("x.weight", "x.bias") if replaced else ("x.weight",):
        merged_state[key].zero_()
    assert_same_entries(base, before)
    assert_same_entries(state, given_state)


# Every spelling of a layer's two keys that is met in files.
SPELLINGS = [
    ("lora_A", "lora_B"),
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A.my-name.weight", "lora_B.my-name.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ("weight_A", "weight_B"),
    ("weight_A.default.weight", "weight_B.default.weight"),
    ("linear_in.weight", "linear_out.weight"),
    ("adapter.linear_in.weight", "adapter.linear_out.weight"),
]
PREFIXES = ["", "base_model.model.", "diffusion_model.", "transformer.", "base_model.model.transformer.", "unet."]


@pytest.mark.parametrize("base_prefix", ["", "transformer.", "model.diffusion_model."])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("A", "B"), SPELLINGS, ids=[A for A, _ in SPELLINGS])
def test_every_spelling_and_every_prefix_reaches_its_weight(A: str, B: str, prefix: str, base_prefix: str) -> None:
    state, base = lora(f"{prefix}blocks.0.q", A=A, B=B), base_of(5, 3, key=f"{base_prefix}blocks.0.q.weight")
    merged_state = merge_lora_into_state_dict(base, state, 0.5, dtype=None)
    key = f"{base_prefix}blocks.0.q.weight"
    assert torch.equal(merged_state[key].double(), expected(base[key], state, 0.5))


def test_a_name_that_is_there_as_it_is_comes_first() -> None:
    base = {"transformer.x.weight": whole_numbers(5, 3), "x.weight": whole_numbers(5, 3)}
    assert merge_report(base, lora("transformer.x")).merged == {"transformer.x.weight": "transformer.x"}
    assert merge_report(base, lora("x")).merged == {"x.weight": "x"}
    with pytest.raises(ValueError, match=r"'unet.x.weight' may be 'transformer.x.weight' or 'x.weight'"):
        merge_report(base, lora("unet.x"))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("component", ["unet", "te", "te1", "te2", "transformer"])
def test_kohyas_flat_names_reach_their_weights(component: str, prefix: str) -> None:
    base = base_of(5, 3, key=f"{prefix}down_blocks.0.to_out.0.weight") | {
        f"{prefix}down_blocks.0.to_q.weight": torch.ones(2, 2)
    }
    state = lora(f"lora_{component}_down_blocks_0_to_out_0", A="lora_down.weight", B="lora_up.weight")
    alpha = {f"lora_{component}_down_blocks_0_to_out_0.alpha": torch.tensor(8.0)}
    for stored, factor in (({}, 1), (alpha, 4)):
        merged_state = merge_lora_into_state_dict(base, state | stored, 0.5, dtype=None)
        key = f"{prefix}down_blocks.0.to_out.0.weight"
        assert torch.equal(merged_state[key].double(), expected(base[key], state, 0.5 * factor))
    ambiguous = base | {f"{prefix}down.blocks.0.to.out.0.weight": torch.ones(5, 3)}
    with pytest.raises(ValueError, match="may be"):
        merge_report(ambiguous, state)


def test_a_layer_that_is_called_like_kohyas_is_found_as_it_is() -> None:
    base = base_of(5, 3, key="lora_unet_x.weight") | {"x.weight": torch.zeros(5, 3)}
    assert merge_report(base, lora("lora_unet_x")).merged == {"lora_unet_x.weight": "lora_unet_x"}


@examples(60)
@given(data=st.data())
def test_any_adapter_of_any_format_gives_what_float64_gives(data: st.DataObject) -> None:
    format = data.draw(
        st.sampled_from([f for f in FORMATS if f not in ("fused_lora", "peft", "diffusers", "diffusers-old")])
    )
    adapter = data.draw(adapters(FORMATS[format].kinds, one_dtype=format == "mistral"))
    layers, base, exact, fan_in_fan_out = {}, {}, {}, data.draw(st.booleans())
    for path, layer in adapter.layers.items():
        A, B = (tensor.sign() for tensor in (layer.lora_A, layer.lora_B))
        # Alphas whose scaling is a power of two keep every sum exact.
        layers[path] = layer = replace(layer, lora_A=A, lora_B=B, lora_alpha=layer.r * 0.5)
        dense = layer.dense()
        delta = 0.5 * dense.lora_B.double().flatten(1) @ dense.lora_A.double().flatten(1)
        if layer.kind == "conv":
            delta = delta.view(len(delta), *A.shape[1:])
        elif layer.kind == "embedding" or fan_in_fan_out:
            delta = delta.T
        weight = whole_numbers(*delta.shape).to(data.draw(st.sampled_from(DTYPES)))
        base[f"{path}.weight"], exact[path] = weight, weight.double() + delta
    state, _ = adapter_to_state_dict(Adapter(layers), format)
    mergers = [layer for layer in layers.values() if layer.kind == "merged"]
    if len({layer.enable_lora for layer in mergers}) > 1 and format == "loralib":
        return  # Its files do not store them; one argument cannot say two.
    square_embedding = any(v.kind == "embedding" and v.lora_A.shape[1] == len(v.lora_B) for v in layers.values())
    if format == "loralib" and square_embedding and not fan_in_fan_out:
        return  # Nothing there tells it from a linear layer.
    merged_state = merge_lora_into_state_dict(
        base,
        state,
        1.0 if FORMATS[format].stores_alpha else 0.5,
        dtype=torch.float64,
        fan_in_fan_out=fan_in_fan_out,
        enable_lora=mergers[0].enable_lora if mergers and format == "loralib" else None,
    )
    for path in layers:
        assert torch.equal(merged_state[f"{path}.weight"], exact[path]), (format, path)


@pytest.mark.filterwarnings("ignore")  # PEFT's
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"fc": 4}, "alpha_pattern": {"conv.*": 7}},
        {"bias": "lora_only", "modules_to_save": ["head"]},
    ],
    ids=["plain", "rslora-patterns", "biases-head"],
)
def test_peft_merges_to_the_same(changes: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    base, model = peft_model(dtype, **changes)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    ours_merged = merge_lora_into_state_dict(base, adapter, dtype=None)
    theirs = model.merge_and_unload().state_dict()
    assert set(ours_merged) == set(theirs)
    exact = {key: tensor.double() for key, tensor in base.items()}
    for path, layer in adapter.layers.items():
        A, B = (tensor.double().flatten(1) for tensor in (layer.lora_A, layer.lora_B))
        delta = layer.scaling * (B @ A)
        weight = exact[f"{path}.weight"]
        exact[f"{path}.weight"] = weight + (delta.T if layer.kind == "embedding" else delta).view(weight.shape)
    for key, tensor in ours_merged.items():
        assert tensor.dtype == theirs[key].dtype
        if key not in {f"{path}.weight" for path in adapter.layers}:
            assert torch.equal(tensor, theirs[key]), key
            continue
        # PEFT rounds B A before the sum. The floor is the rounding of the exact sum, and the oracle's own in float64,
        # which depends on the order that a CPU's BLAS adds up in.
        error, theirs_error = ((t.double() - exact[key]).abs().max() for t in (tensor, theirs[key]))
        floor = (exact[key].to(dtype).double() - exact[key]).abs().max()
        floor += torch.finfo(torch.float64).eps * exact[key].abs().max()
        assert error <= max(2 * theirs_error, 2 * floor), key
        assert not torch.equal(tensor, base[key])


@pytest.mark.filterwarnings("ignore")  # PEFT's
def test_every_kind_of_layer_computes_what_pefts_forward_computes(tmp_path: Path) -> None:
    """Also a convolution of one tap in three dimensions, which PEFT runs but cannot merge."""
    peft = pytest.importorskip("peft", reason="needs PEFT")
    base = filled(nn.ModuleDict({"c": nn.Conv3d(3, 4, 1), "d": nn.Conv3d(3, 4, (1, 2, 1))}), "cpu").double()
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["c", "d"]))
    for parameter in model.parameters():
        nn.init.normal_(parameter) if parameter.requires_grad else None
    model.save_pretrained(tmp_path)
    merged_state = merge_lora_into_state_dict(before, read_adapter(tmp_path), dtype=None)
    x = torch.randn(2, 3, 3, 4, 5, dtype=torch.float64)
    for name, layer in peft_layers(model).items():
        actual = F.conv3d(x, merged_state[f"{name}.weight"], merged_state[f"{name}.bias"])
        assert torch.allclose(actual, layer(x), rtol=0, atol=1e-12)


def test_pefts_own_state_dict_in_memory_merges_too() -> None:
    """Keys with the adapter's name, the base's own entries beside them, and no config: alpha is the whole factor."""
    base, model = peft_model()
    model.base_model.model.head.requires_grad_(False)
    adapter_only = {key: tensor for key, tensor in model.state_dict().items() if "lora_" in key}
    merged_state = merge_lora_into_state_dict(base, adapter_only, 1.5, dtype=None, fan_in_fan_out=False)
    theirs = model.merge_and_unload().state_dict()
    for key, tensor in theirs.items():
        assert torch.allclose(merged_state[key], tensor, rtol=0, atol=1e-5), key


@pytest.mark.parametrize("wrap", [False, True])
def test_gpt2s_conv1d_is_stored_the_other_way(wrap: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT")
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers")
    torch.manual_seed(5)
    base = nn.ModuleDict({"c_attn": pytorch_utils.Conv1D(18, 6), "c_proj": pytorch_utils.Conv1D(6, 6)})
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, config)
    for parameter in model.parameters():
        nn.init.normal_(parameter) if parameter.requires_grad else None
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.fan_in_fan_out is True
    theirs = model.merge_and_unload().state_dict()
    report = merge_report(before, adapter)
    assert report.transposed == {"c_attn.weight", "c_proj.weight"} and report.square == ("c_proj.weight",)
    if not wrap:
        # Without the config the square one cannot be told, and the other says that torch's layout is not the model's.
        adapter = replace(adapter, fan_in_fan_out=None)
        with pytest.raises(ValueError, match=r"'c_proj.weight' is square and would be taken as \(out, in\).*'c_attn"):
            merge_report(before, adapter)
    merged_state = merge_lora_into_state_dict(before, adapter, dtype=None, fan_in_fan_out=None if wrap else True)
    for key, tensor in theirs.items():
        assert torch.allclose(merged_state[key], tensor, rtol=0, atol=1e-5), key


def test_square_weights_are_never_guessed_in_silence() -> None:
    base = {"a.weight": whole_numbers(3, 3, seed=1), "b.weight": whole_numbers(5, 3, seed=2)}
    square, plain = lora("a", 3, 3), lora("b", 5, 3)
    turned = {"a.weight": base["a.weight"], "b.weight": base["b.weight"].T}
    assert merge_report(base, square).square == merge_report(base, square | plain).square == ("a.weight",)
    assert not merge_report(base, square, fan_in_fan_out=False).square
    delta = expected(base["a.weight"], square) - base["a.weight"]
    for option, sum_ in ((None, delta), (False, delta), (True, delta.T)):
        merged_state = merge_lora_into_state_dict(base, square | plain, dtype=None, fan_in_fan_out=option)
        assert torch.equal(merged_state["a.weight"].double(), base["a.weight"] + sum_)
        # A shape that tells wins over the argument.
        assert torch.equal(merged_state["b.weight"].double(), expected(base["b.weight"], plain))
    with pytest.raises(ValueError, match="expected fan_in_fan_out as an argument"):
        merge_report(turned, square | plain)
    merged_state = merge_lora_into_state_dict(turned, square | plain, dtype=None, fan_in_fan_out=True)
    assert torch.equal(merged_state["b.weight"].double(), expected(base["b.weight"], plain).T)
    for stored in (True, False):
        adapter = Adapter({"a": linear(3, 3), "b": linear(5, 3)}, fan_in_fan_out=stored)
        report = merge_report(turned if stored else base, adapter)
        assert report.square == ("a.weight",) and ("a.weight" in report.transposed) is stored
        with pytest.raises(ValueError, match="is stored the other way"):
            merge_report(base if stored else turned, adapter)


def test_embeddings_are_no_word_on_linear_layers() -> None:
    base = {"e.weight": torch.zeros(11, 4), "a.weight": torch.zeros(3, 3)}
    report = merge_report(base, Adapter({"e": embedding(11, 4), "a": linear(3, 3)}))
    assert report.transposed == {"e.weight"} and report.square == ("a.weight",)


@pytest.mark.parametrize("enable_lora", [TFT, (True, True), (False, True, True, False)])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_loralibs_layers_merge_to_the_same(fan_in_fan_out: bool, enable_lora: Any) -> None:
    wide = 3 * len(enable_lora)
    model = nn.ModuleDict(
        {
            "fc": loralib.Linear(4, 6, r=2, lora_alpha=6, fan_in_fan_out=fan_in_fan_out),
            "qkv": loralib.MergedLinear(
                4, wide, r=2, lora_alpha=6, enable_lora=list(enable_lora), fan_in_fan_out=fan_in_fan_out
            ),
            "embed": loralib.Embedding(11, 4, r=2, lora_alpha=6),
            "conv": loralib.Conv2d(4, 6, 3, r=2, lora_alpha=6),
            "grouped": loralib.Conv2d(4, 6, 3, r=2, lora_alpha=6, groups=2),
            "point": loralib.Conv2d(4, 6, 1, r=2, lora_alpha=6),
        }
    )
    filled(model, "cpu").double()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    base = {key: tensor for key, tensor in before.items() if "lora_" not in key}
    state = {key: tensor for key, tensor in before.items() if "lora_" in key}
    merged_state = merge_lora_into_state_dict(base, state, 3.0, dtype=None, enable_lora=enable_lora)
    model.eval()
    theirs = {key: tensor for key, tensor in model.state_dict().items() if "lora_" not in key}
    assert set(merged_state) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.allclose(merged_state[key], tensor, rtol=0, atol=1e-12), key
    if all(enable_lora):
        assert torch.equal(
            merge_lora_into_state_dict(base, state, 3.0, dtype=None)["qkv.weight"], merged_state["qkv.weight"]
        )
    else:
        with pytest.raises(ValueError, match=r"'qkv.weight': enable_lora is not stored"):
            merge_report(base, state)


def test_this_packages_layers_merge_to_the_same_bits(tmp_path: Path) -> None:
    model = ours(1)
    fused_lora.save_adapter(model, tmp_path / "a.safetensors")
    base = {key: tensor for key, tensor in model.state_dict().items() if "lora_" not in key}
    merged_state = merge_lora_into_state_dict(base, read_adapter(tmp_path / "a.safetensors"), dtype=None)
    ours_merged = fused_lora.merged_state_dict(model)
    assert torch.equal(merged_state["conv.conv.weight"], ours_merged["conv.weight"])
    for key in ("embed.weight", "fc.weight", "fc.bias"):
        assert torch.equal(merged_state[key], ours_merged[key]), key
    # A block-diagonal product sums zeros in another order.
    assert torch.allclose(merged_state["qkv.weight"], ours_merged["qkv.weight"], rtol=0, atol=1e-5)


ONE_SLICE = (False, True, False)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_one_enabled_slice_is_told_by_the_bases_shape(fan_in_fan_out: bool) -> None:
    options = {"r": 2, "lora_alpha": 6, "fan_in_fan_out": fan_in_fan_out}
    model = nn.ModuleDict(
        {
            "qkv": loralib.MergedLinear(4, 18, enable_lora=list(ONE_SLICE), **options),
            "fc": loralib.Linear(4, 6, **options),
        }
    )
    filled(model, "cpu").double()
    base = {key: tensor.clone() for key, tensor in model.state_dict().items() if "lora_" not in key}
    state = {key: tensor.clone() for key, tensor in model.state_dict().items() if "lora_" in key}
    model.eval()
    merged_state = merge_lora_into_state_dict(base, state, 3.0, dtype=None, enable_lora=ONE_SLICE)
    for key in base:
        assert torch.allclose(merged_state[key], model.state_dict()[key], rtol=0, atol=1e-12), key
    decided = with_slices_of(base, adapter_from_state_dict(state).with_enable_lora(ONE_SLICE)).layers
    assert [(decided[path].kind, decided[path].enable_lora) for path in ("qkv", "fc")] == [
        ("merged", ONE_SLICE),
        ("linear", None),
    ]
    with pytest.raises(ValueError, match=r"enable_lora is \[False, True, False\]; expected a layer with a slice"):
        merge_report(
            {"fc.weight": base["fc.weight"]}, {k: t for k, t in state.items() if "fc" in k}, enable_lora=ONE_SLICE
        )


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_own_files_say_how_square_weights_are_stored(fan_in_fan_out: bool, tmp_path: Path) -> None:
    options = {"r": 2, "lora_alpha": 6, "fan_in_fan_out": fan_in_fan_out}
    layers = {
        "e": fused_lora.Embedding(11, 4, r=2, lora_alpha=6),
        "square": fused_lora.Linear(4, 4, **options),
        "qkv": fused_lora.MergedLinear(6, 6, enable_lora=list(TFT), **options),
        "other": fused_lora.Linear(4, 4, r=2, fan_in_fan_out=not fan_in_fan_out),
        "square_e": fused_lora.Embedding(4, 4, r=2),
    }
    model = filled(nn.ModuleDict(layers), "cpu")
    fused_lora.save_adapter(model, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    base = {key: tensor for key, tensor in model.state_dict().items() if "lora_" not in key}
    report = merge_report(base, adapter)
    assert not report.square and ("square.weight" in report.transposed) is fan_in_fan_out
    merged_state = merge_lora_into_state_dict(base, adapter, dtype=None)
    for key, tensor in fused_lora.merged_state_dict(model).items():
        assert torch.allclose(merged_state[key], tensor, rtol=0, atol=1e-5), key
    # An argument is a word on the base that is merged into, and comes first.
    turned = merge_report(base, adapter, fan_in_fan_out=not fan_in_fan_out).transposed
    assert ("square.weight" in turned) is not fan_in_fan_out


def test_own_files_and_shapes_that_contradict_each_other_are_refused() -> None:
    layers = {name: linear(*sizes, fan_in_fan_out=True) for name, sizes in (("a", (3, 3)), ("b", (5, 3)))}
    base = {"a.weight": torch.zeros(3, 3), "b.weight": torch.zeros(3, 5)}
    assert merge_report(base, Adapter(layers)).transposed == {"a.weight", "b.weight"}
    with pytest.raises(ValueError, match=r"'a.weight' is square and would be taken as \(in, out\), but 'b.weight'"):
        merge_report(base | {"b.weight": torch.zeros(5, 3)}, Adapter(layers))


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 1), (5, 3, 1, 1)])
@pytest.mark.parametrize("taps", [(), (1,), (1, 1)])
def test_a_convolution_of_one_tap_and_a_linear_layer_are_one(shape: tuple[int, ...], taps: tuple[int, ...]) -> None:
    state = {"x.lora_A.weight": whole_numbers(2, 3, *taps), "x.lora_B.weight": whole_numbers(5, 2, *taps)}
    base = base_of(*shape)
    merged_state = merge_lora_into_state_dict(base, state, dtype=None)
    assert torch.equal(merged_state["x.weight"].double(), expected(base["x.weight"], state))


@pytest.mark.parametrize(
    ("shape", "layer"),
    [
        ((5, 4), linear(5, 3)),
        ((5,), linear(5, 3)),
        ((), linear(5, 3)),
        ((15,), linear(5, 3)),
        ((4, 11), embedding(11, 4)),
        ((11, 5), embedding(11, 4)),
        ((5, 3, 3, 2), linear(5, 3)),
        ((5, 3, 2, 3), conv(5, 3, (3, 2))),
        ((5, 3, 6), conv(5, 3, (3, 2))),
        ((5, 3), conv(5, 3, (3, 2))),
        ((3, 5, 3, 2), conv(5, 3, (3, 2))),
        ((5, 2, 3, 2), conv(5, 3, (3, 2))),
        ((5, 3, 1, 3), conv(5, 3, (3, 1))),
        ((9, 5), merged(3, 4)),
        ((10, 4), merged(3, 4)),
        ((0, 3), linear(5, 3)),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_a_weight_that_does_not_fit_is_refused(shape: tuple[int, ...], layer: Any) -> None:
    with pytest.raises(ValueError, match=r"'x.weight'.* has shape " + re.escape(str(shape))):
        merge_report({"x.weight": torch.zeros(shape)}, Adapter({"x": layer}))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.complex64])
def test_a_quantised_weight_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"'x.weight' is {dtype}; expected a floating-point weight"):
        merge_lora_into_state_dict({"x.weight": torch.zeros(5, 3, dtype=dtype)}, lora())


def test_what_matches_nothing_is_an_error_and_what_is_left_is_reported() -> None:
    with pytest.raises(ValueError, match=r"No layer of the adapter is in the base.*'y'"):
        merge_lora_into_state_dict(base_of(5, 3), lora("y"))
    others = {"untouched": torch.ones(4), "stranger": torch.ones(2), "x.bias": torch.ones(5)}
    report = merge_report(base_of(5, 3), lora("x") | lora("y") | others)
    assert report.merged == {"x.weight": "x"} and report.missing == ("y",)
    assert report.replaced == {"untouched": "untouched"} and set(report.unexpected) == {"stranger", "x.bias"}
    assert report.unscaled and not report.square and not report.transposed
    merged_state = merge_lora_into_state_dict(base_of(5, 3), lora("x") | lora("y") | others, dtype=None)
    assert set(merged_state) == {"x.weight", "untouched"} and torch.equal(merged_state["untouched"], torch.ones(4))
    with pytest.raises(ValueError, match=r"'untouched' has shape \(3,\); expected \(4,\)"):
        merge_report(base_of(5, 3), lora("x") | {"untouched": torch.ones(3)})


def test_a_weight_that_is_stored_beside_its_adapter_is_the_adapters_base() -> None:
    """As PEFT stores an embedding that was changed before it was adapted."""
    own = torch.full((5, 3), 100.0)
    merged_state = merge_lora_into_state_dict(base_of(5, 3), lora() | {"x.weight": own}, dtype=None)
    assert torch.equal(merged_state["x.weight"].double(), expected(own, lora()))


def test_whole_numbers_beside_an_adapter_keep_their_dtype() -> None:
    base = base_of(5, 3) | {"step": torch.tensor(3)}
    merged_state = merge_lora_into_state_dict(base, lora() | {"step": torch.tensor(7)})
    assert merged_state["step"].dtype == torch.int64 and merged_state["step"] == 7


def test_two_layers_of_one_weight_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Layers 'x' and 'diffusion_model.x' are both for 'x.weight'"):
        merge_lora_into_state_dict(base_of(5, 3), lora("x") | lora("diffusion_model.x"))


@pytest.mark.parametrize(("drop", "other"), [("lora_A", "lora_B"), ("lora_B", "lora_A")])
def test_half_a_layer_is_refused(drop: str, other: str) -> None:
    state = {key: tensor for key, tensor in lora().items() if drop not in key}
    with pytest.raises(ValueError, match=f"'x.{other}.weight' has no {drop} beside it"):
        merge_lora_into_state_dict(base_of(5, 3), state)


def test_a_report_needs_no_memory() -> None:
    base = {"x.weight": torch.empty(2**20, 2**20, device="meta")}
    state = {"x.lora_A": torch.empty(2, 2**20, device="meta"), "x.lora_B": torch.empty(2**20, 2, device="meta")}
    assert merge_report(base, state).merged == {"x.weight": "x"}


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -1e39])
def test_an_alpha_that_is_no_number_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"'x.weight': scaling is {re.escape(str(alpha))}; expected a finite number"):
        merge_lora_into_state_dict(base_of(5, 3), lora(), alpha)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e6])
def test_a_result_that_is_not_finite_is_refused(factor: float) -> None:
    base = base_of(5, 3, dtype=torch.float16) | {"x.bias": torch.zeros(5, dtype=torch.float16)}
    broken = lora()
    broken["x.lora_A.weight"] = torch.ones(2, 3)
    broken["x.lora_A.weight"][0, 1] = factor
    broken["x.lora_B.weight"] = torch.eye(5, 2)
    with pytest.raises(ValueError, match=r"'x.weight' has \d+ elements that are not finite as torch.float16"):
        merge_lora_into_state_dict(base, broken, dtype=None)
    with pytest.raises(ValueError, match=r"'x.bias' has 5 elements that are not finite as torch.float16"):
        merge_lora_into_state_dict(base, lora() | {"x.bias": torch.full((5,), factor)}, dtype=None)
    # What the base has itself is its own.
    base["x.weight"][0] = float("nan")
    base["x.bias"][0] = float("inf")
    own = lora() | {"x.bias": torch.tensor([float("-inf"), 1.0, 1.0, 1.0, 1.0])}
    merged_state = merge_lora_into_state_dict(base, own, dtype=None)
    assert merged_state["x.weight"][0].isnan().all() and merged_state["x.bias"][0] == float("-inf")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "bfloat16"])
def test_results_are_floating_point_of_16_bits_or_more(dtype: Any) -> None:
    with pytest.raises(ValueError, match=f"dtype is {dtype!r}; expected a floating-point dtype of 16 bits or more"):
        merge_lora_into_state_dict(base_of(5, 3), lora(), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.complex64])
def test_whole_numbers_and_codes_are_replaced_by_their_like_alone(dtype: torch.dtype) -> None:
    base = base_of(5, 3) | {"h": torch.zeros(2, dtype=dtype)}
    with pytest.raises(ValueError, match=f"'h' is torch.float32 and the base's {dtype}; expected the same"):
        merge_lora_into_state_dict(base, lora() | {"h": torch.full((2,), 0.7)})
    codes = torch.tensor([0, 3]).to(dtype)
    merged_state = merge_lora_into_state_dict(base, lora() | {"h": codes}, dtype=torch.bfloat16)
    assert merged_state["h"].dtype == dtype and torch.equal(
        *(t.to(torch.complex64) for t in (merged_state["h"], codes))
    )


def test_a_merge_of_shapes_alone_stays_one() -> None:
    state = {key: tensor.to("meta") for key, tensor in lora().items()}
    merged_state = merge_lora_into_state_dict({"x.weight": torch.empty(5, 3, device="meta")}, state, device="meta")
    assert merged_state["x.weight"].is_meta and merged_state["x.weight"].dtype == torch.bfloat16


def test_a_trained_base_gets_no_gradient_and_gives_none() -> None:
    base = {"x.weight": torch.zeros(5, 3, requires_grad=True)}
    state = {key: tensor.requires_grad_() for key, tensor in lora().items()}
    assert not merge_lora_into_state_dict(base, state)["x.weight"].requires_grad


@examples(40)
@given(names=st.lists(paths, min_size=1, max_size=5, unique_by=lambda path: path.replace(".", "_")))
def test_kohyas_names_get_their_dots_back_from_the_base(names: list[str]) -> None:
    adapter = Adapter({path: linear() for path in names})
    state, _ = adapter_to_state_dict(adapter, "kohya")
    base = {f"{path}.weight": torch.zeros(5, 3) for path in names}
    from_kohya = adapter.with_names(kohya_names(adapter))
    assert set(from_kohya.layers) == {key.partition(".")[0] for key in state}
    found = base_names(base, from_kohya)
    assert found == {flat: path for path, flat in kohya_names(adapter).items()}
    assert base_names({}, from_kohya) == {}


def test_the_model_of_these_tests_has_every_kind() -> None:
    assert set(TARGETS) == {name.rpartition(".")[2] for name, _ in Model().named_modules()} - {"", "block", "head"}
