from __future__ import annotations

import os
from importlib.util import find_spec

import torch

# Kernels run in Triton's interpreter where there is no GPU; it reads this when triton is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

import fused_lora

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON and not torch.cuda.is_available():
    import interpreter

    interpreter.mend()


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# Where else "decode" is "triton".
LINEAR_LAYERS = ("test_op", "test_merged_linear", "test_direct", "test_dispatch", "test_gpt2")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        decode = ["decode"] if metafunc.module.__name__ in LINEAR_LAYERS else []
        metafunc.parametrize("backend", ["reference", "triton", "unfused", *decode], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    """Runs the test once on each path, and checks that this path was taken, or for what "decode" is not, "triton"."""
    if request.param != "reference" and not HAS_TRITON:
        pytest.skip("triton is not installed")
    with fused_lora.use_backend(request.param), fused_lora.count_paths() as paths:
        yield request.param
    allowed = (request.param, "triton") if request.param == "decode" else (request.param,)
    others = [key for key in paths if key.partition("/")[2] not in allowed]
    assert not others, f"asked for {request.param}, but {others} ran"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_allocations():
    """torch.empty and its kin return NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
