"""The spelling of adapters in state dicts: what is read from keys, what is written, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapters import (
    TFT,
    adapters,
    as_stored,
    assert_same_adapter,
    conv,
    embedding,
    examples,
    kohya_names,
    linear,
    merged,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fused_lora.adapter import Adapter, AdapterLayer
from fused_lora.formats import FORMATS, adapter_from_state_dict, adapter_to_state_dict, bare, is_flat

# Formats whose state dict alone, without a file's header or config, is the whole of it.
PLAIN = ["loralib", "mistral", "kohya", "megatron", "megatron-weights"]


def pair(A: str, B: str, r: int = 2) -> dict[str, Tensor]:
    return {A: torch.randn(r, 3), B: torch.randn(5, r)}


@pytest.mark.parametrize("format", PLAIN)
@examples(40)
@given(data=st.data())
def test_what_is_written_is_read_bit_for_bit(format: str, data: st.DataObject) -> None:
    adapter = data.draw(adapters(FORMATS[format].kinds, one_dtype=format == "mistral"))
    state, _ = adapter_to_state_dict(adapter, format)
    if format == "kohya":
        adapter = adapter.with_names(kohya_names(adapter))
    again = adapter_from_state_dict(state)
    assert again.format == format
    assert_same_adapter(again, as_stored(adapter, format))
    assert all(tensor.is_contiguous() for tensor in state.values())


@pytest.mark.parametrize(
    ("A", "B", "path", "format"),
    [
        ("blocks.0.q.lora_A.default.weight", "blocks.0.q.lora_B.default.weight", "blocks.0.q", "mistral"),
        ("diffusion_model.q.lora_A.weight", "diffusion_model.q.lora_B.weight", "diffusion_model.q", "mistral"),
        ("base_model.model.h.0.q.lora_A.weight", "base_model.model.h.0.q.lora_B.weight", "h.0.q", "peft"),
        ("base_model.model.e.lora_embedding_A", "base_model.model.e.lora_embedding_B", "e", "peft"),
        ("e.lora_embedding_A.other", "e.lora_embedding_B.other", "e", "mistral"),
        ("unet.mid.to_q.lora_A.weight", "unet.mid.to_q.lora_B.weight", "unet.mid.to_q", "diffusers"),
        ("unet.a1.to_q.lora.down.weight", "unet.a1.to_q.lora.up.weight", "unet.a1.to_q", "diffusers-old"),
        (
            "unet.attn1.processor.to_out_lora.down.weight",
            "unet.attn1.processor.to_out_lora.up.weight",
            "unet.attn1.to_out.0",
            "diffusers-old",
        ),
        (
            "text_encoder.q_proj.lora_linear_layer.down.weight",
            "text_encoder.q_proj.lora_linear_layer.up.weight",
            "text_encoder.q_proj",
            "diffusers-old",
        ),
        ("lora_te1_x_y.lora_down.weight", "lora_te1_x_y.lora_up.weight", "lora_te1_x_y", "kohya"),
        ("q.adapter.linear_in.weight", "q.adapter.linear_out.weight", "q", "megatron"),
        ("q.linear_in.weight", "q.linear_out.weight", "q", "megatron"),
        ("q.weight_A", "q.weight_B", "q", "megatron-weights"),
        ("q.weight_A.weight", "q.weight_B.weight", "q", "megatron-weights"),
        ("ff.linear_in.lora_A.weight", "ff.linear_in.lora_B.weight", "ff.linear_in", "mistral"),
        ("lora_A", "lora_B", "", "loralib"),
        ("my_lora_A.lora_A", "my_lora_A.lora_B", "my_lora_A", "loralib"),
    ],
)
def test_a_layer_is_found_under_every_spelling(A: str, B: str, path: str, format: str) -> None:
    adapter = adapter_from_state_dict(pair(A, B))
    assert list(adapter.layers) == [path] and adapter.format == format and not adapter.others
    assert adapter.layers[path].kind == ("embedding" if "embedding" in A else "linear")


def test_alpha_is_stored_or_the_rank_where_kohya_and_diffusers_say_so() -> None:
    down, up = "x.lora_down.weight", "x.lora_up.weight"
    assert adapter_from_state_dict(pair(down, up)).layers["x"].lora_alpha == 2
    stored = adapter_from_state_dict(pair(down, up) | {"x.alpha": torch.tensor(8, dtype=torch.int64)})
    assert stored.layers["x"].scaling == 4 and not stored.others
    assert adapter_from_state_dict(pair("x.lora.down.weight", "x.lora.up.weight")).layers["x"].scaling == 1
    assert adapter_from_state_dict(pair("x.lora_A.weight", "x.lora_B.weight")).layers["x"].scaling is None


def test_mixed_ranks_stay_each_layers_own() -> None:
    state = pair("x.lora_down.weight", "x.lora_up.weight", 2) | pair("y.lora_down.weight", "y.lora_up.weight", 7)
    assert {path: layer.r for path, layer in adapter_from_state_dict(state).layers.items()} == {"x": 2, "y": 7}


def test_what_is_beside_the_layers_is_named_as_the_plain_model_names_it() -> None:
    others = {
        "base_model.model.q.base_layer.bias": "q.bias",
        "base_model.model.score.modules_to_save.default.weight": "score.weight",
        "base_model.model.head.modules_to_save.weight": "head.weight",
        "base_model.model.head.bias": "head.bias",
        "step": "step",
    }
    state = pair("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight")
    adapter = adapter_from_state_dict(state | {key: torch.zeros(1) for key in others})
    assert set(adapter.others) == set(others.values())


A, B = "x.lora_A.weight", "x.lora_B.weight"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "has no adapter"),
        ({"x.weight": torch.zeros(2, 2)}, "has no adapter"),
        ({A: torch.zeros(2, 3)}, re.escape("'x.lora_A.weight' has no lora_B")),
        ({B: torch.zeros(5, 2)}, re.escape("'x.lora_B.weight' has no lora_A")),
        ({A: torch.zeros(2, 3), B: torch.zeros(5, 3)}, r"Layer 'x': lora_A has shape \(2, 3\)"),
        ({A: torch.zeros(4, 3), B: torch.zeros(5, 2)}, r"Layer 'x': lora_A has shape \(4, 3\)"),
        ({"x.lora_A": torch.zeros(5, 3), "x.lora_B": torch.zeros(5, 2)}, r"Layer 'x': lora_A has shape \(5, 3\)"),
        ({A: torch.zeros(0, 3), B: torch.zeros(5, 0)}, r"Layer 'x': lora_A has shape \(0, 3\)"),
        ({A: torch.zeros(3), B: torch.zeros(5)}, r"Layer 'x': lora_A has shape \(3,\)"),
        ({A: torch.tensor(3.0), B: torch.tensor(5.0)}, r"Layer 'x': lora_A has shape \(\)"),
        ({A: torch.zeros(4, 2, 3), B: torch.zeros(4, 5, 2)}, r"Layer 'x': lora_A has shape \(4, 2, 3\)"),
        ({A: torch.zeros(2, 3, 1), B: torch.zeros(5, 2, 3)}, r"Layer 'x': lora_A has shape \(2, 3, 1\)"),
        ({A: torch.zeros(2, 3, dtype=torch.int8), B: torch.zeros(5, 2)}, "lora_A is torch.int8"),
        ({A: torch.zeros(2, 3), B: torch.zeros(5, 2).to(torch.float8_e5m2)}, "lora_B is torch.float8_e5m2"),
        ({A: torch.zeros(2, 3), B: torch.zeros(5, 2), "x.lora_B.bias": torch.zeros(5)}, "a bias of lora_B"),
        ({A: torch.zeros(2, 3), B: torch.zeros(5, 2), "x.lora_magnitude_vector": torch.zeros(5)}, "is DoRA"),
        ({A: torch.zeros(2, 3), B: torch.zeros(5, 2), "x.dora_scale": torch.zeros(5)}, "is DoRA"),
        ({"x.hada_w1_a": torch.zeros(2, 3)}, "is LoHa"),
        *(
            (pair(A, B) | {key: torch.zeros(2)}, f"Entry '{re.escape(key)}' is of no known kind")
            for key in (
                *("x.lora_E", "x.lora_A.bias", "x.lora_down.bias", "lora_unet_y.reshape_weight"),
                *("y.alpha", "x.lora_linear_layer.alpha", "x.lora.alpha", "x.diff", "y.diff_b"),
            )
        ),
        ({"x.lokr_w1": torch.zeros(2, 3)}, "is LoKr"),
        ({"x.lora_mid.weight": torch.zeros(2, 2, 3, 3)}, "is a Tucker decomposition"),
        ({A: 3}, "'x.lora_A.weight' is int; expected tensors"),
        ({3: torch.zeros(1)}, "Entry 3 is Tensor; expected tensors by name"),
        (
            pair(A, B) | pair("x.lora_A.default.weight", "x.lora_B.default.weight"),
            "are both layer 'x'",
        ),
        (
            pair("x.lora_A.one.weight", "x.lora_B.one.weight") | pair("y.lora_A.two.weight", "y.lora_B.two.weight"),
            re.escape("has the adapters ['one', 'two']; expected one"),
        ),
        (
            pair("x.lora_down.weight", "x.lora_up.weight") | {"x.alpha": torch.zeros(2)},
            r"'x.alpha' has shape \(2,\)",
        ),
        (
            pair("x.lora_down.weight", "x.lora_up.weight") | {"x.alpha": torch.tensor(float("nan"))},
            "lora_alpha is nan",
        ),
    ],
)
def test_what_is_no_plain_adapter_is_refused(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter_from_state_dict(state)


@pytest.mark.parametrize("key", ["x.lora_velora_embed", "x.lora_monteclora_sampler.std_prior", "x.bias", "diff.weight"])
def test_what_changes_no_adapter_is_let_through(key: str) -> None:
    assert list(adapter_from_state_dict(pair(A, B) | {key: torch.zeros(2)}).others) == [key]


def test_a_merged_linear_is_one_block_diagonal_adapter_elsewhere() -> None:
    layer = merged(rows=3, inner=4, r=2, alpha=6.0)
    state, notes = adapter_to_state_dict(Adapter({"qkv": layer}), "kohya")
    A, B = state["lora_unet_qkv.lora_down.weight"], state["lora_unet_qkv.lora_up.weight"]
    assert torch.equal(A, layer.lora_A) and state["lora_unet_qkv.alpha"] == 12 and len(A) == 4
    expected = torch.zeros(9, 4)
    expected[:3, :2], expected[6:, 2:] = layer.lora_B[:3], layer.lora_B[3:]
    assert torch.equal(B, expected)
    assert any("1 MergedLinear" in note and "block-diagonal" in note for note in notes)


def test_rslora_keeps_its_scaling_where_there_is_only_alpha_over_r() -> None:
    layer = linear(r=4, alpha=3.0, use_rslora=True)
    assert layer.scaling == 1.5
    state, _ = adapter_to_state_dict(Adapter({"x": layer}), "kohya")
    assert adapter_from_state_dict(state).layers["lora_unet_x"].scaling == 1.5


def test_what_is_written_is_contiguous_and_shares_nothing() -> None:
    A, B = torch.randn(3, 2).T, torch.randn(5, 2)
    tied = Adapter({path: AdapterLayer(A, B, 2, 1.0) for path in ("x", "y")}, {"x.bias": B[:, 0]})
    state, _ = adapter_to_state_dict(tied, "peft")
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state) == 5


def test_notes_say_what_is_lost() -> None:
    adapter = Adapter({"x": linear(r=2, alpha=3.0)}, {"head.weight": torch.zeros(2), "x.bias": torch.zeros(5)})
    notes = {format: " ".join(adapter_to_state_dict(adapter, format)[1]) for format in FORMATS}
    for format in ("loralib", "mistral", "megatron", "megatron-weights"):
        assert f"{format} stores no scaling; this adapter's is 1.5." in notes[format]
    for format in ("mistral", "megatron", "kohya", "diffusers", "diffusers-old", "megatron-weights"):
        assert "2 are left out: head.weight, x.bias" in notes[format]
    transposed = replace(adapter.layers["x"], lora_dropout=0.25), True
    told = Adapter({"x": transposed[0], "y": linear()}, fan_in_fan_out=transposed[1])
    for format in FORMATS:
        said = " ".join(adapter_to_state_dict(told, format)[1])
        for field, value, holders in (
            ("lora_dropout", "is 0.0, 0.25", ("peft", "fused_lora", "diffusers", "diffusers-old")),
            ("fan_in_fan_out", "2 layers have it", ("peft", "fused_lora")),
        ):
            assert (f"{format} stores no {field}; this adapter's {value}." in said) is (format not in holders)
            assert field not in notes[format]
    assert "the dots are lost" in notes["kohya"] and "enable_lora" in notes["loralib"]
    assert not notes["peft"] and not notes["fused_lora"]
    assert {"head.weight", "x.bias"} <= set(adapter_to_state_dict(adapter, "loralib")[0])
    peft = adapter_to_state_dict(adapter, "peft")[0]
    assert {"base_model.model.head.weight", "base_model.model.x.base_layer.bias"} <= set(peft)


@pytest.mark.parametrize(
    ("layers", "format", "message"),
    [
        ({"x": linear()}, "gguf", "format is 'gguf'; expected one of loralib"),
        ({"x": linear(alpha=None)}, "peft", "Layer 'x' has no lora_alpha, which peft stores"),
        ({"x": linear(alpha=None)}, "kohya", "Layer 'x' has no lora_alpha, which kohya stores"),
        ({"x": embedding()}, "kohya", "Layer 'x' is of kind 'embedding'"),
        ({"x": conv()}, "loralib", "Layer 'x' is of kind 'conv'"),
        ({"x": conv()}, "mistral", "Layer 'x' is of kind 'conv'"),
        ({"x": merged(slices=None)}, "peft", "Layer 'x': enable_lora is not stored"),
        ({"x": linear(enable_lora=(True, False))}, "peft", "Layer 'x' may be linear or a MergedLinear"),
        ({"a.b": linear(), "a_b": linear()}, "kohya", "Two entries would be called 'lora_unet_a_b.lora_down.weight'"),
        ({"x": linear(), "y": linear(dtype=torch.float16)}, "mistral", "expected one, as Mistral's files have"),
    ],
)
def test_what_a_format_cannot_hold_at_all_is_refused(layers: Any, format: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter_to_state_dict(Adapter(layers), format)


def test_loralibs_convolution_goes_only_where_it_has_a_meaning() -> None:
    layer = AdapterLayer(torch.randn(6, 6), torch.randn(15, 6), 2, 4.0, kind="conv")
    assert layer.loralib_conv and layer.scaling == 2
    for format in ("loralib", "fused_lora"):
        assert set(adapter_to_state_dict(Adapter({"c": layer}), format)[0]) == {"c.lora_A", "c.lora_B"}
    for format in ("peft", "kohya", "diffusers"):
        with pytest.raises(ValueError, match="Layer 'c' is loralib's convolution"):
            adapter_to_state_dict(Adapter({"c": layer}), format)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 3}, "r is 3; expected 2"),
        ({"r": 0}, "r is 0; expected 2"),
        ({"r": True, "lora_A": torch.zeros(1, 3), "lora_B": torch.zeros(5, 1)}, "r is True; expected 1"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf; expected a finite number"),
        ({"kind": "merged", "enable_lora": (True, True)}, "enable_lora has 2 enabled of 2 slices; expected the 1"),
        (
            {"r": 1, "kind": "conv", "lora_A": torch.zeros(2, 3, 1), "lora_B": torch.zeros(5, 2, 1)},
            "r is 1; expected 2",
        ),
        ({"kind": "embedding", "lora_A": torch.zeros(2, 3, 1), "lora_B": torch.zeros(5, 2, 1)}, "lora_A has shape"),
    ],
)
def test_a_layer_that_contradicts_itself_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(linear(), **changes)


def test_what_a_file_does_not_store_can_be_said() -> None:
    adapter = Adapter({"a.e": linear(alpha=None), "q": linear(alpha=8.0), "m": merged(alpha=None, slices=None)})
    known = adapter.with_alpha(3).with_enable_lora([1, 0, 1]).with_embeddings(["e"]).with_names({"q": "p"})
    layers = known.layers
    assert [layers[path].lora_alpha for path in ("a.e", "p", "m")] == [3, 8, 3]
    assert layers["m"].enable_lora == TFT and layers["a.e"].kind == "embedding" and layers["p"].kind == "linear"
    single = Adapter({"e": linear()}).with_enable_lora([1, 0]).with_embeddings(["e"]).layers["e"]
    assert (single.kind, single.enable_lora) == ("embedding", None)
    with pytest.raises(ValueError, match="'r' is none of the adapter's linear layers"):
        adapter.with_embeddings(["r"])
    with pytest.raises(ValueError, match="Two layers would be called 'q'"):
        adapter.with_names({"m": "q"})
    with pytest.raises(ValueError, match="enable_lora has 1 enabled of 2"):
        adapter.with_enable_lora([True, False])
    for none_without in (known, Adapter({"q": linear()}), Adapter({"e": embedding()}).with_alpha(3)):
        with pytest.raises(ValueError, match=r"enable_lora is \[True, False, True\]; expected it where a MergedLinear"):
            none_without.with_enable_lora(TFT)


def test_others_are_renamed_with_their_layers() -> None:
    others = {key: torch.zeros(1) for key in ("q.bias", "c.conv.bias", "head.weight", "qq.bias", "bias")}
    renamed = Adapter({path: linear() for path in ("q", "c", "")}, others).with_names({"q": "a.p", "c": "a.c", "": "r"})
    assert list(renamed.others) == ["a.p.bias", "a.c.conv.bias", "head.weight", "qq.bias", "r.bias"]
    with pytest.raises(ValueError, match=r"Two other entries would be called 'qq\.bias'"):
        Adapter({"q": linear()}, others).with_names({"q": "qq"})


def test_prefixes_and_flat_names() -> None:
    assert bare("base_model.model.transformer.h.0") == "h.0" and bare("model.layers.0") == "model.layers.0"
    assert bare("model.diffusion_model.x") == bare("unet.x") == bare("diffusion_model.x") == "x"
    assert is_flat("lora_unet_x") and not is_flat("lora_unet.x") and not is_flat("x")
