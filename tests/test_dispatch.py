"""Which path runs can be asked, forced and counted."""

from __future__ import annotations

import threading

import pytest
import torch

import fused_lora
from fused_lora import Linear


def test_explain_says_path_and_reason() -> None:
    x = torch.randn(3, 8)
    assert fused_lora.explain(Linear(8, 4), x).path == "linear"
    assert "r is 0" in str(fused_lora.explain(Linear(8, 4), x))
    assert "merged" in str(fused_lora.explain(Linear(8, 4, r=2).eval(), x))
    choice = fused_lora.explain(Linear(8, 4, r=2), x.double())
    assert choice.path == "reference" and choice.reason
    with pytest.raises(TypeError, match=r"layer is a Linear; expected a fused_lora layer"):
        fused_lora.explain(torch.nn.Linear(8, 4), x)


def test_explain_agrees_with_what_runs(backend: str, device: str) -> None:
    layer, x = Linear(8, 4, r=2, device=device), torch.randn(3, 8, device=device)
    choice = fused_lora.explain(layer, x)
    with fused_lora.count_paths() as paths:
        layer(x).sum().backward()
    assert choice.path == backend
    assert set(paths) == {f"{op}/{backend}" for op in ("forward", "grad_panels", "grad_lora_A")}


def test_a_forced_path_that_cannot_run_raises() -> None:
    layer = Linear(8, 4, r=2, dtype=torch.float64)
    with fused_lora.use_backend("triton"), pytest.raises(RuntimeError, match="forced to triton, but"):
        layer(torch.randn(3, 8, dtype=torch.float64))


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(8, 4, r=2), torch.randn(3, 8)
    monkeypatch.setenv("FUSED_LORA_BACKEND", "reference")
    assert "asked for" in fused_lora.explain(layer, x).reason
    monkeypatch.setenv("FUSED_LORA_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FUSED_LORA_BACKEND is 'cuda'; expected one of auto, reference, triton"):
        layer(x)
    with fused_lora.use_backend("reference"):
        layer(x)
    with pytest.raises(ValueError, match="backend is 'fast'"), fused_lora.use_backend("fast"):  # type: ignore[arg-type]
        pass


def test_use_backend_nests_restores_and_reaches_other_threads() -> None:
    from fused_lora.dispatch import requested_backend

    seen = []
    with fused_lora.use_backend("reference"):
        with pytest.raises(KeyError), fused_lora.use_backend("triton"):
            raise KeyError
        assert requested_backend() == "reference"
        # Autograd recomputes checkpointed layers on threads of its own.
        thread = threading.Thread(target=lambda: seen.append(requested_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"] and requested_backend() == "auto"


def test_backward_takes_the_path_that_forward_took() -> None:
    layer, x = Linear(8, 4, r=2), torch.randn(3, 8, requires_grad=True)
    with fused_lora.use_backend("reference"):
        y = layer(x)
    with fused_lora.count_paths() as paths, fused_lora.use_backend("triton"):
        y.sum().backward()
    assert set(paths) == {"grad_panels/reference", "grad_input/reference", "grad_lora_A/reference"}


def test_counting_ends_with_its_block() -> None:
    layer, x = Linear(8, 4, r=2), torch.randn(3, 8)
    with fused_lora.count_paths() as outer:
        layer(x)
        with fused_lora.count_paths() as inner:
            layer(x)
    layer(x)
    assert sum(outer.values()) == 2 and sum(inner.values()) == 1
