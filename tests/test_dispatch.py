"""Which path runs can be asked, forced and counted."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch

import fused_lora
from fused_lora import Linear, dispatch, linear_choice


def test_explain_says_path_and_reason() -> None:
    x = torch.randn(3, 8)
    assert fused_lora.explain(Linear(8, 4), x).path == "plain"
    assert "no adapter" in str(fused_lora.explain(Linear(8, 4), x))
    assert "merged" in str(fused_lora.explain(Linear(8, 4, r=2).eval(), x))
    choice = fused_lora.explain(Linear(8, 4, r=2), x.double())
    assert choice.path == "reference" and choice.reason
    with pytest.raises(TypeError, match=r"layer is a Linear; expected a fused_lora layer"):
        fused_lora.explain(torch.nn.Linear(8, 4), x)


def test_explain_agrees_with_what_runs(backend: str, device: str) -> None:
    layer, x = Linear(8, 4, r=2, device=device), torch.randn(3, 8, device=device, requires_grad=True)
    choice = fused_lora.explain(layer, x)
    with fused_lora.count_paths() as paths:
        layer(x).sum().backward()
    assert choice.path == backend
    assert set(paths) == {f"{op}/{backend}" for op in ("forward", "backward")}


def test_a_forced_path_that_cannot_run_raises() -> None:
    layer = Linear(8, 4, r=2, dtype=torch.float64)
    with fused_lora.use_backend("triton"), pytest.raises(RuntimeError, match="forced to triton, but"):
        layer(torch.randn(3, 8, dtype=torch.float64))


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(8, 4, r=2), torch.randn(3, 8)
    monkeypatch.setenv("FUSED_LORA_BACKEND", "reference")
    assert "asked for" in fused_lora.explain(layer, x).reason
    monkeypatch.setenv("FUSED_LORA_BACKEND", "cuda")
    with pytest.raises(
        ValueError, match="FUSED_LORA_BACKEND is 'cuda'; expected one of auto, reference, triton, unfused"
    ):
        layer(x)
    with fused_lora.use_backend("reference"):
        layer(x)
    with pytest.raises(ValueError, match="backend is 'fast'"), fused_lora.use_backend("fast"):  # type: ignore[arg-type]
        pass


def test_use_backend_nests_restores_and_reaches_other_threads() -> None:
    seen = []
    with fused_lora.use_backend("reference"):
        with pytest.raises(KeyError), fused_lora.use_backend("triton"):
            raise KeyError
        assert dispatch.requested_backend() == "reference"
        # Autograd recomputes checkpointed layers on threads of its own.
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"] and dispatch.requested_backend() == "auto"


def test_backward_takes_the_path_that_forward_took() -> None:
    layer, x = Linear(8, 4, r=2), torch.randn(3, 8, requires_grad=True)
    with fused_lora.use_backend("reference"):
        y = layer(x)
    with fused_lora.count_paths() as paths, fused_lora.use_backend("triton"):
        y.sum().backward()
    assert set(paths) == {"backward/reference"}


def test_counting_ends_with_its_block() -> None:
    layer, x = Linear(8, 4, r=2), torch.randn(3, 8)
    with fused_lora.count_paths() as outer:
        layer(x)
        with fused_lora.count_paths() as inner:
            layer(x)
    layer(x)
    assert sum(outer.values()) == 2 and sum(inner.values()) == 1


def forget() -> None:
    """What was chosen before, for another machine as it were."""
    dispatch.choose.cache_clear()
    for choose in (linear_choice.choose_linear, linear_choice.choose_forward, linear_choice.choose_backward):
        choose.cache_clear()


def test_a_gpu_that_falls_back_warns_once_per_reason() -> None:
    """The choice is arithmetic on devices and dtypes, so it can be asked about a GPU that is not there."""
    dispatch._warn_once.cache_clear()
    forget()
    gpu = torch.device("cuda", 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            choice = dispatch.choose("auto", gpu, torch.float64, torch.float64)
            forget()
        assert choice.path == "reference" and "float64" in choice.reason
        assert [choice.reason in str(warning.message) for warning in caught] == [True]
        dispatch.choose("auto", gpu, torch.float16, torch.bfloat16)
        assert len(caught) == 2
        # Neither a CPU, where the reference is what one expects, nor a request for it is worth a warning.
        dispatch.choose("auto", torch.device("cpu"), torch.float64, torch.float64)
        dispatch.choose("reference", gpu, torch.float64, torch.float64)
        assert len(caught) == 2


def test_a_gpu_takes_the_kernels_where_they_take_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "obstacle_to_kernels", lambda *_: None)
    forget()
    gpu, half, single = torch.device("cuda", 0), torch.bfloat16, torch.float32
    cases = {
        (half, 8192, 4096, 4096): "triton",
        (half, 2048, 1024, 4096): "triton",
        (half, 2047, 4096, 4096): "unfused",
        (half, 2048, 4096, 1008): "unfused",
        (half, 8192, 4096, 4100): "unfused",
        (single, 8192, 4096, 4096): "unfused",
    }
    for (dtype, rows, *features), path in cases.items():
        choice = linear_choice.choose_linear("auto", gpu, dtype, dtype, rows, *features)
        assert choice.path == path and choice.reason, (dtype, rows, features)
        # A request stands, whatever the sizes.
        for backend in ("reference", "triton", "unfused"):
            assert linear_choice.choose_linear(backend, gpu, dtype, dtype, rows, *features).path == backend
    forget()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A Hopper that only the choice of a path asks about."""
    monkeypatch.setattr(dispatch, "obstacle_to_kernels", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")
    from fused_lora.kernels import config, decode_tiles, first_wave, own_panel

    for tables in (config, decode_tiles, own_panel, first_wave):
        monkeypatch.setattr(tables, "capability", lambda device: 90)
        monkeypatch.setattr(tables, "processors", lambda device: 132)
    forget()
    yield torch.device("cuda", 0)
    forget()


RANKS = 16
ALONE = {"ranks": RANKS, "drops": False, "trains": False}
KINDS = [{"ranks": RANKS, "drops": drops, "trains": trains} for drops in (False, True) for trains in (False, True)]
BACK = {"plain": True, "ranks": RANKS}
HALF, SINGLE = torch.bfloat16, torch.float32


def test_a_forward_alone_takes_one_launch_where_that_takes_less_time(gpu: torch.device) -> None:
    cases = {
        (HALF, 1, 4096, 4096): "decode",
        (HALF, 512, 4096, 1024): "decode",
        (HALF, 1024, 4096, 4096): "decode",
        (HALF, 1024, 4096, 14336): "unfused",
        (HALF, 4096, 4096, 1024): "triton",
        # The panel comes with the first wave of several; of a few, one launch takes as little time.
        (HALF, 2048, 4096, 4096): "decode",
        (HALF, 2048, 14336, 4096): "decode",
        (HALF, 2048, 4096, 14336): "triton",
        (HALF, 2048 + 64, 4096, 14336): "decode",
        (HALF, 4096, 4096, 4096): "triton",
        (HALF, 4096 + 64, 4096, 4096): "decode",
        # Where the last wave has no room for the panel, of so many outputs it has a launch of its own.
        (HALF, 8200, 4096, 4096): "triton",
        (HALF, 4096, 4096, 14336): "triton",
        (HALF, 8192, 4096, 4096): "triton",
        # Where its last wave would leave most multiprocessors idle.
        (HALF, 256, 4096, 12288): "decode",
        (HALF, 384, 4096, 12288): "unfused",
        (HALF, 512, 4096, 12288): "unfused",
        (HALF, 512, 4096, 14336): "decode",
        (HALF, 2048, 4096, 2048): "triton",
        # Eighteen rows of tiles leave a fourth of the last wave idle.
        (HALF, 2304, 4096, 4096): "unfused",
        (HALF, 2304, 4096, 14336): "triton",
        # Few outputs, each of whose tiles computes its panel.
        (HALF, 1024, 4096, 1024): "triton",
        (HALF, 2048, 4096, 1024): "triton",
        (HALF, 1536, 4096, 1024): "unfused",
        (HALF, 1, 4100, 4096): "unfused",
        (HALF, 1, 4096, 4100): "unfused",
        (SINGLE, 1, 4096, 4096): "unfused",
    }
    for (dtype, *sizes), path in cases.items():
        choice = linear_choice.choose_forward("auto", gpu, dtype, dtype, *sizes, **ALONE)
        assert choice.path == path and choice.reason, (dtype, sizes)
        # A request stands.
        for backend in ("reference", "triton", "unfused", "decode"):
            for kind in KINDS:
                assert linear_choice.choose_forward(backend, gpu, dtype, dtype, *sizes, **kind).path == backend


def test_a_forward_that_keeps_something_takes_one_launch_for_more_rows_where_it_is_busy(gpu: torch.device) -> None:
    # With 16 ranks, and with 128.
    cases = {
        (256, 4096, 4096): ("decode", "decode"),
        (512, 4096, 4096): ("decode", "decode"),
        (512, 4112, 4096): ("decode", "decode"),
        (512, 4096, 4112): ("decode", "unfused"),
        (256, 8192, 8192): ("decode", "decode"),
        (257, 8192, 8192): ("decode", "unfused"),
        (512, 4096, 14336): ("decode", "decode"),
        (512, 4096, 1024): ("decode", "decode"),
        (640, 4096, 2048): ("decode", "decode"),
        (1024, 4096, 1024): ("triton", "decode"),
        (1025, 4096, 1024): ("unfused", "unfused"),
        (1024, 4096, 4096): ("decode", "triton"),
        (1024, 14336, 4096): ("triton", "triton"),
        (1024, 8192, 8192): ("decode", "triton"),
        (1024, 4096, 8192): ("decode", "triton"),
        (1024, 4096, 14336): ("unfused", "unfused"),
        (1536, 4096, 4096): ("unfused", "unfused"),
        (2047, 4096, 4096): ("decode", "triton"),
        (2048, 4096, 4096): ("triton", "triton"),
        (2304, 4096, 4096): ("unfused", "unfused"),
        (2304, 4096, 14336): ("triton", "triton"),
        (8192, 4096, 4096): ("triton", "triton"),
    }
    for sizes, (path, of_many) in cases.items():
        kind = {"ranks": RANKS, "drops": False, "trains": True}
        choice = linear_choice.choose_forward("auto", gpu, HALF, HALF, *sizes, **kind)
        assert choice.path == path and choice.reason, sizes
        many = linear_choice.choose_forward("auto", gpu, HALF, HALF, *sizes, **kind | {"ranks": 128})
        assert many.path == of_many, sizes


def test_a_forward_with_a_mask_takes_one_launch_where_that_takes_less_time(gpu: torch.device) -> None:
    cases = {
        (64, 4096, 4096, 64): "decode",
        (64, 14336, 4096, 64): "decode",
        (65, 4096, 4096, 32): "decode",
        (65, 4096, 4096, 33): "unfused",
        (65, 8192, 8192, 8): "unfused",
        (512, 4096, 4096, 32): "decode",
        (512, 4112, 4096, 32): "unfused",
        (256, 14336, 4096, 64): "unfused",
        (513, 4096, 4096, 16): "unfused",
        # Where outputs are few, of more rows; with more ranks, of so many that the panel is divided enough.
        (1024, 4096, 1024, 32): "decode",
        (1024, 4096, 1040, 32): "unfused",
        (1025, 4096, 1008, 32): "unfused",
        (256, 4096, 1024, 64): "decode",
        (255, 4096, 1024, 64): "unfused",
        (1024, 4096, 1024, 64): "decode",
        (512, 4096, 1024, 65): "unfused",
        # Outputs beside which a mask is drawn, until it is too large.
        (256, 4096, 14336, 8): "decode",
        (257, 4096, 14336, 8): "unfused",
        (256, 4096, 14336, 128): "decode",
        (257, 4096, 14336, 128): "unfused",
        (256, 4096, 8176, 64): "unfused",
        (128, 8192, 28672, 128): "decode",
        (129, 8192, 28672, 128): "unfused",
        (128, 8192, 28672, 8): "decode",
        (129, 8192, 28672, 8): "unfused",
        (256, 8192, 16384, 8): "unfused",
        (257, 8192, 11264, 8): "triton",
        # More ranks.
        (64, 14336, 4096, 65): "decode",
        (64, 4096, 4096, 128): "decode",
        (65, 4096, 4096, 128): "unfused",
        (128, 4096, 1024, 128): "decode",
        (129, 4096, 1008, 128): "unfused",
        (128, 8192, 8192, 128): "decode",
        (128, 8192, 8176, 128): "unfused",
        (16, 8192, 4096, 256): "decode",
        (16, 4096, 4080, 256): "unfused",
        (16, 8208, 8192, 256): "unfused",
        (16, 4096, 4096, 257): "unfused",
        (128, 4096, 14336, 256): "decode",
        (129, 4096, 14336, 256): "unfused",
        (128, 4096, 14336, 257): "unfused",
        (16, 8192, 8192, 256): "decode",
        (17, 8192, 8192, 256): "unfused",
        # Otherwise by waves: half of one, a whole one, one and seven tenths, two and a fourth.
        (512, 4096, 4096, 64): "unfused",
        (512, 8192, 8192, 8): "triton",
        (512, 4096, 14336, 64): "triton",
        (1024, 14336, 4096, 16): "triton",
        (1000, 4096, 4096, 16): "triton",
        (768, 8192, 8192, 16): "unfused",
        (1536, 4096, 4096, 16): "unfused",
        (2048, 4096, 1024, 16): "unfused",
        (4096, 4096, 1024, 16): "triton",
        (2304, 4096, 4096, 16): "unfused",
        (2048, 14336, 4096, 128): "triton",
        (2304, 4096, 14336, 16): "triton",
        (8192, 4096, 4096, 16): "triton",
        # Too small to tell.
        (2048, 4096, 496, 16): "unfused",
    }
    for (*sizes, ranks), path in cases.items():
        for trains in (False, True):
            choice = linear_choice.choose_forward(
                "auto", gpu, HALF, HALF, *sizes, ranks=ranks, drops=True, trains=trains
            )
            assert choice.path == path and choice.reason, (sizes, ranks)


def test_odd_sizes_and_float32_take_cublas_whatever_is_kept_or_dropped(gpu: torch.device) -> None:
    for kind in KINDS:
        assert linear_choice.choose_forward("auto", gpu, HALF, HALF, 1, 4096, 4100, **kind).path == "unfused"
        assert linear_choice.choose_forward("auto", gpu, SINGLE, SINGLE, 1, 4096, 4096, **kind).path == "unfused"


def test_one_launch_leaves_large_panels_of_more_than_few_rows_to_cublas(gpu: torch.device) -> None:
    for ranks, rows, inputs, path in (
        (128, 128, 14336, "decode"),
        # Tiles of which two run on a multiprocessor, and panels in two parts.
        (128, 256, 14336, "decode"),
        (128, 512, 14336, "decode"),
        (128, 513, 14336, "unfused"),
        (256, 64, 8192, "decode"),
        (256, 64, 8208, "unfused"),
        (256, 65, 4096, "unfused"),
        (257, 1, 4096, "unfused"),
        (64, 256, 14336, "decode"),
        (129, 256, 4096, "unfused"),
    ):
        for trains in (False, True):
            kind = {"ranks": ranks, "drops": False, "trains": trains}
            assert linear_choice.choose_forward("auto", gpu, HALF, HALF, rows, inputs, 4096, **kind).path == path
            # Where the kernels' tiles keep the multiprocessors busy they take less time than both.
            assert linear_choice.choose_forward("auto", gpu, HALF, HALF, 512, 8192, 8192, **kind).path == "triton"


def test_tiles_with_their_panel_are_taken_with_few_ranks_and_no_mask_only(gpu: torch.device) -> None:
    for rows in (1024, 2048):
        sizes = rows, 4096, 1024
        for trains in (False, True):
            few, more, masked = (
                linear_choice.choose_forward("auto", gpu, HALF, HALF, *sizes, ranks=ranks, drops=drops, trains=trains)
                for ranks, drops in ((64, False), (65, False), (16, True))
            )
            assert few == linear_choice._FEW_OUTPUTS and few not in (more, masked)


def test_a_backward_of_few_rows_takes_one_launch_for_dx(gpu: torch.device) -> None:
    sizes = 4096, 14336
    for rows, path in ((0, "decode"), (64, "decode"), (65, "unfused"), (8192, "triton")):
        assert linear_choice.choose_backward("auto", gpu, HALF, HALF, rows, *sizes, **BACK).path == path
        plainly = linear_choice.choose_backward("auto", gpu, HALF, HALF, rows, *sizes, **BACK | {"plain": False})
        assert plainly == linear_choice.choose_linear("auto", gpu, HALF, HALF, rows, *sizes)
    for backend in ("reference", "triton", "unfused", "decode"):
        assert linear_choice.choose_backward(backend, gpu, SINGLE, SINGLE, 8192, *sizes, **BACK).path == backend
    assert (
        linear_choice.choose_backward("decode", gpu, HALF, HALF, 1, *sizes, **BACK | {"plain": False}).path == "triton"
    )
    for dtype, features in ((SINGLE, sizes), (HALF, (4096, 4100)), (HALF, (4100, 4096))):
        assert linear_choice.choose_backward("auto", gpu, dtype, dtype, 1, *features, **BACK).path == "unfused"


def test_a_backward_of_more_rows_takes_one_launch_for_dx_where_that_takes_less_time(gpu: torch.device) -> None:
    """Sizes are rows, outputs, inputs and ranks."""
    for (*sizes, ranks), path in {
        (128, 4096, 4096, 64): "decode",
        (65, 4096, 4096, 33): "decode",
        (128, 4096, 4096, 32): "unfused",
        (128, 1024, 4096, 8): "decode",
        (128, 1040, 4096, 8): "unfused",
        (128, 4096, 4112, 64): "unfused",
        (128, 4112, 4096, 64): "unfused",
        (129, 1024, 1024, 64): "unfused",
        (128, 4096, 4096, 128): "decode",
        (128, 4096, 4096, 129): "unfused",
        (64, 4096, 14336, 128): "decode",
        (17, 4096, 4096, 129): "unfused",
        (16, 4096, 14336, 256): "decode",
        (1, 4096, 4096, 257): "unfused",
    }.items():
        for plain in (True, False):
            kind = {"plain": plain, "ranks": ranks}
            found = linear_choice.choose_backward("auto", gpu, HALF, HALF, *sizes, **kind).path
            assert found == (path if plain else "unfused"), (sizes, ranks)


def test_a_backward_takes_the_kernels_where_their_tiles_fill_the_last_wave(gpu: torch.device) -> None:
    """Sizes are rows, outputs and inputs: dx is rows x inputs."""
    cases = {
        (128, 4096, 14336): "unfused",
        (256, 4096, 14336): "triton",
        (256, 8192, 8192): "unfused",
        (512, 8192, 8192): "triton",
        (512, 4096, 4096): "unfused",
        (1024, 4096, 4096): "triton",
        (1000, 1056, 4096): "triton",
        (1000, 1040, 4096): "unfused",
        # Three quarters; four fifths, which are enough where the contraction is short.
        (2304, 4096, 4096): "unfused",
        (2560, 4096, 4096): "triton",
        (2560, 14336, 4096): "unfused",
        (2304, 4096, 14336): "triton",
        (5000, 14336, 4096): "triton",
    }
    for sizes, path in cases.items():
        choice = linear_choice.choose_backward("auto", gpu, HALF, HALF, *sizes, **BACK)
        assert choice.path == path and choice.reason, sizes


def test_a_gpu_that_was_not_measured_takes_one_launch_for_few_rows_only(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    forget()
    half, sizes = torch.float16, (4096, 4096)
    for rows, path in ((64, "decode"), (65, "unfused"), (8192, "triton")):
        for kind in KINDS:
            assert linear_choice.choose_forward("auto", gpu, half, half, rows, *sizes, **kind).path == path
    assert linear_choice.choose_backward("auto", gpu, half, half, 1, *sizes, **BACK).path == "unfused"
