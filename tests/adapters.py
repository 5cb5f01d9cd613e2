"""What the tests of adapter files share: adapters of every kind, their comparison, and hypothesis's versions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from checkpoints import bits
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_lora.adapter import Adapter, AdapterLayer
from fused_lora.formats import FORMATS, bare, is_flat

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32, torch.float64]
TFT = (True, False, True)


def whole_numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Small whole numbers, of which float32 sums and products are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def linear(
    out: int = 5, inner: int = 3, r: int = 2, alpha: float | None = 4.0, dtype: torch.dtype = torch.float32, **more: Any
) -> AdapterLayer:
    return AdapterLayer(torch.randn(r, inner, dtype=dtype), torch.randn(out, r, dtype=dtype), r, alpha, **more)


def conv(out: int = 5, inner: int = 3, kernel: tuple[int, ...] = (3, 2), r: int = 2, alpha: float = 4.0) -> Any:
    ones = (1,) * len(kernel)
    return AdapterLayer(torch.randn(r, inner, *kernel), torch.randn(out, r, *ones), r, alpha, kind="conv")


def merged(rows: int = 3, inner: int = 4, r: int = 2, alpha: float | None = 4.0, slices: Any = TFT) -> AdapterLayer:
    n = sum(TFT if slices is None else slices)
    A, B = torch.randn(r * n, inner), torch.randn(rows * n, r)
    return AdapterLayer(A, B, r, alpha, kind="merged", enable_lora=slices)


def embedding(rows: int = 11, inner: int = 4, r: int = 2, alpha: float = 4.0) -> AdapterLayer:
    return AdapterLayer(torch.randn(r, rows), torch.randn(inner, r), r, alpha, kind="embedding")


def as_stored(adapter: Adapter, format: str) -> Adapter:
    """What a format must give back of an adapter."""
    layers = dict(adapter.layers)
    for path, layer in layers.items():
        if not FORMATS[format].stores_alpha:
            layer = replace(layer, lora_alpha=None, use_rslora=False)
        if format not in ("peft", "diffusers", "diffusers-old"):
            layer = replace(layer, lora_alpha=layer.plain_alpha, use_rslora=False)
        if format == "loralib":
            layer = replace(layer, enable_lora=None, kind="linear" if layer.kind == "embedding" else layer.kind)
        if format not in ("peft", "diffusers", "diffusers-old", "fused_lora"):
            layer = replace(layer, lora_dropout=0.0)
        layers[path] = layer
    return replace(adapter, layers=layers, others=adapter.others if FORMATS[format].stores_others else {})


def kohya_names(adapter: Adapter) -> dict[str, str]:
    """By path, what kohya's files call a layer."""
    return {path: path if is_flat(path) else f"lora_unet_{bare(path).replace('.', '_')}" for path in adapter.layers}


def assert_same_adapter(actual: Adapter, expected: Adapter) -> None:
    assert list(actual.layers) == list(expected.layers) or set(actual.layers) == set(expected.layers)
    for path, layer in actual.layers.items():
        other = expected.layers[path]
        for a, b in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
            assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b)), path
        numbers = [(s.r, s.lora_alpha, s.use_rslora, s.kind, s.enable_lora, s.lora_dropout) for s in (layer, other)]
        assert numbers[0] == numbers[1], path
    assert set(actual.others) == set(expected.others)
    assert all(torch.equal(bits(actual.others[key]), bits(expected.others[key])) for key in actual.others)


def examples(count: int) -> settings:
    """Settings for property tests; a busy machine is no reason to fail."""
    slow = [HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=slow)


# Words that formats use themselves, among others.
_PARTS = ["model", "layers", "0", "12", "q_proj", "linear_in", "weight_A", "lora", "alpha", "bias", "default", "down"]
_PARTS += ["up", "weight", "to_out", "processor", "conv", "base_layer_", "Über", "a b", "x_lora", "lora_", "adapter_"]
paths = st.lists(st.sampled_from(_PARTS) | st.from_regex(r"\A[a-z_0-9-]{1,9}\Z"), min_size=1, max_size=4).map(".".join)
_alphas = st.sampled_from([0.0, 1.0, 16.0, 0.5, -3.0, 2.0**-9])


@st.composite
def adapters(draw: st.DrawFn, kinds: tuple[str, ...] = ("linear",), one_dtype: bool = False) -> Adapter:
    """Adapters of several layers, each of a kind, ranks, sizes and dtype of its own."""
    layers: dict[str, AdapterLayer] = {}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    common = draw(st.sampled_from(DTYPES))
    for path in draw(st.lists(paths, min_size=1, max_size=4, unique_by=lambda path: path.replace(".", "_"))):
        kind: Any = draw(st.sampled_from(kinds))
        r, out, inner = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(0, 6))
        dtypes = [common if one_dtype else draw(st.sampled_from(DTYPES)) for _ in "AB"]
        A, B, slices = (r, inner), (out, r), None
        if kind == "conv":
            kernel = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
            A, B = (*A, *kernel), (*B, *(1 for _ in kernel))
        if kind == "merged":
            slices = draw(st.lists(st.booleans(), min_size=2, max_size=4).filter(lambda on: sum(on) > 1).map(tuple))
            A, B = (r * sum(slices), inner), (out * sum(slices), r)
        tensors = [torch.randn(s, generator=generator).to(d) for s, d in zip((A, B), dtypes, strict=True)]
        layers[path] = AdapterLayer(*tensors, r, draw(_alphas), kind=kind, enable_lora=slices)
    return Adapter(layers)
