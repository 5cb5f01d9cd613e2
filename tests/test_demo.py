"""The demo as a user runs it, and that each of its checks can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import fused_lora
from fused_lora import cli

dm = pytest.importorskip("fused_lora.demo_model", reason="needs the extra [demo]")
demo = pytest.importorskip("fused_lora.demo", reason="needs the extra [demo]")
report = pytest.importorskip("fused_lora.demo_report", reason="needs the extra [demo]")

CHECKS = 6


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")],
        ),
    ],
)
def test_demo_passes_its_checks_and_leaves_its_files(device: str, tmp_path: Path) -> None:
    output = tmp_path / "made" / "here"
    command = [sys.executable, "-m", "fused_lora", "demo", "--device", device, "--output-dir", str(output)]
    # Wide enough that rich breaks no row.
    environment = os.environ | {"COLUMNS": "200", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr

    picture = (output / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 10_000
    adapter = torch.load(output / "adapter.pt", weights_only=True)
    assert adapter and all(key.rpartition(".")[2] in ("lora_A", "lora_B") for key in adapter)

    assert done.stdout.count("│ ok ") == CHECKS and "FAILED" not in done.stdout
    rows = ("upright, base", "transformed, before LoRA", "transformed, after LoRA", "trainable share", "adapter file")
    for row in (*rows, "path", "ops run", "training speed", "time"):
        assert f"│ {row} " in done.stdout
    assert str(output / "loss.png") in done.stdout and str(output / "adapter.pt") in done.stdout


def test_demo_that_learns_nothing_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dm, "train", lambda *args, **kwargs: [1.0])
    assert cli.main(["demo", "--device", "cpu", "--output-dir", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert shown.count("│ FAILED ") == 1 and shown.count("│ ok ") == CHECKS - 1


@pytest.fixture
def trained():  # type: ignore[no-untyped-def]
    """A base, a copy of it whose adapter is not zero, and a few digits."""
    torch.manual_seed(0)
    base = dm.DigitTransformer()
    model = dm.with_lora(base)
    for layer in dm.lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    _, digits = dm.load_digits(torch.device("cpu"))
    return base, model, digits


def test_adapter_checks_pass_and_see_a_lost_tensor(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, model, digits = trained
    path, adapter = tmp_path / "adapter.pt", fused_lora.lora_state_dict(model)
    torch.save(adapter, path)
    checks = demo.check_adapter_file(base, model, path, digits)
    assert [check.passed for check in checks] == [True, True, True] and report.exit_code(checks) == 0

    # A fresh lora_A stays in the lost one's place, so the logits differ too.
    del adapter["blocks.0.expand.lora_A"]
    torch.save(adapter, path)
    checks = demo.check_adapter_file(base, model, path, digits)
    assert [check.passed for check in checks[:2]] == [False, False] and report.exit_code(checks) == 1


def test_merge_check_sees_a_wrong_merge(trained, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    base, model, digits = trained
    torch.save(fused_lora.lora_state_dict(model), tmp_path / "adapter.pt")
    right = fused_lora.linear.effective_weight
    monkeypatch.setattr(
        "fused_lora.linear.effective_weight", lambda w, a, b, scaling: right(w, a, b, scaling=scaling * 1.001)
    )
    checks = demo.check_adapter_file(base, model, tmp_path / "adapter.pt", digits)
    assert [check.passed for check in checks] == [True, True, False]


def test_frozen_check_sees_one_changed_bit(trained) -> None:  # type: ignore[no-untyped-def]
    base, model, _ = trained
    assert demo.check_frozen(base, model).passed
    changed = dm.with_lora(base)
    with torch.no_grad():
        changed.blocks[1].contract.weight[0, 0].mul_(1 + 2**-23)
    check = demo.check_frozen(base, changed)
    assert not check.passed and check.measured.startswith("1 of ")


def test_loss_check_sees_another_scaling(trained, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    base, _, digits = trained
    assert demo.check_unfused_losses(base, digits, seed=0).passed

    class Skewed(dm.UnfusedLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            plain = F.linear(x, self.weight, self.bias)
            return plain + 1.01 * (super().forward(x) - plain)

    monkeypatch.setattr(dm, "UnfusedLinear", Skewed)
    assert not demo.check_unfused_losses(base, digits, seed=0).passed


@pytest.mark.parametrize("passed, code", [([], 1), ([True], 0), ([True, False, True], 1)])
def test_exit_code(passed: list[bool], code: int) -> None:
    assert report.exit_code([report.Check("claim", each, "") for each in passed]) == code


@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "rich"])
def test_missing_package_is_named_in_one_sentence(package: str) -> None:
    # In a process of its own: here, the packages' submodules are imported already.
    script = f"import sys; sys.modules[{package!r}] = None; from fused_lora.cli import main; sys.exit(main(['demo']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"The demo needs {package}; run pip install 'fused-lora[demo]'.\n"


@pytest.mark.parametrize(
    "option, value", [("--device", "abacus"), ("--seed", "-1"), ("--seed", str(2**63)), ("--output-dir", __file__)]
)
def test_wrong_option_is_named_with_its_value(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["demo", option, value])
    assert leaving.value.code == 2
    message = capsys.readouterr().err
    assert f"argument {option}" in message and value in message
