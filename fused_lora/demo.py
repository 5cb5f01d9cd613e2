"""The demo: pretrain a digit classifier, adapt it by LoRA to digits it cannot read, and check what the layers promise.

The digits are scikit-learn's (UCI, "Optical Recognition of Handwritten Digits"), which ship inside that package.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import fused_lora

from . import demo_model as dm
from .demo_report import Check, draw_losses, exit_code, print_tables

_EPSILON = torch.finfo(torch.float32).eps
_STEPS_COMPARED = 20


@contextmanager
def _one_thread() -> Iterator[None]:
    # The matrices are too small for a second thread to gain anything, while on a busy machine waiting for it can take
    # minutes. And so the results do not depend on the number of cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run(device: torch.device, output_dir: Path, seed: int) -> int:
    """Runs the demo, prints its tables and writes loss.png and adapter.pt into output_dir, made if missing.

    Seeds torch's default generators. Returns the exit code: 0 if every check passed, else 1.
    """
    start = time.perf_counter()
    output_dir.mkdir(parents=True, exist_ok=True)
    console = Console(markup=False, highlight=False)
    torch.manual_seed(seed)
    upright, upright_test = dm.load_digits(device)
    digits, test = upright.transformed(), upright_test.transformed()

    with Progress(console=console) as progress, fused_lora.count_paths() as paths:
        base = dm.DigitTransformer().to(device)
        pretraining = dm.train(
            base, upright, epochs=30, learning_rate=3e-3, seed=seed, progress=progress, title="pretrain"
        )
        scores = {
            "upright, base": dm.Score.of(dm.logits_of(base, upright_test), upright_test.labels),
            "transformed, before LoRA": dm.Score.of(dm.logits_of(base, test), test.labels),
        }
        model = dm.with_lora(base).train()
        choice = fused_lora.explain(dm.lora_layers(model)[0], digits.images)
        fine_tuning = dm.train(
            model, digits, epochs=20, learning_rate=1e-2, seed=seed, progress=progress, title="fine-tune"
        )
    scores["transformed, after LoRA"] = dm.Score.of(dm.logits_of(model, test), test.labels)

    adapter_path, picture_path = output_dir / "adapter.pt", output_dir / "loss.png"
    torch.save(fused_lora.lora_state_dict(model), adapter_path)
    draw_losses(pretraining, fine_tuning, picture_path)
    checks = [
        *check_adapter_file(base, model, adapter_path, test),
        check_frozen(base, model),
        check_unfused_losses(base, digits, seed),
        check_improved(scores["transformed, before LoRA"], scores["transformed, after LoRA"]),
    ]
    fused, unfused = dm.samples_per_second(
        [dm.with_lora(base), dm.with_lora(base, layer_class=dm.UnfusedLinear)], digits
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    facts = {
        "trainable share": f"{trainable / total:.1%} ({trainable:,} of {total:,} parameters)",
        "adapter file": f"{adapter_path.stat().st_size / 1000:.1f} kB",
        "path": str(choice),
        "ops run": ", ".join(f"{count:,} {op}" for op, count in sorted(paths.items())),
        "training speed": f"{fused:,.0f} samples/s; the unfused expression: {unfused:,.0f} ({fused / unfused:.2f} x)",
        "time": f"{time.perf_counter() - start:.1f} s on {device}, one host thread",
    }
    print_tables(console, scores, facts, checks)
    # Plain print, because rich would break a long path in two.
    print(f"loss curve: {picture_path}\nadapter: {adapter_path}")
    return exit_code(checks)


def check_adapter_file(base: nn.Module, model: nn.Module, path: Path, test: dm.Digits) -> list[Check]:
    """That the saved adapter, in a fresh copy of base, gives model's logits, merged and unmerged.

    path: what torch.save wrote of lora_state_dict(model).
    """
    adapter = torch.load(path, map_location=test.images.device, weights_only=True)
    # Unlike `merged`, this one stays unmerged in eval mode, which is the only way to see its logits without dropout.
    merged, unmerged = dm.with_lora(base), dm.with_lora(base, merge_weights=False)
    keys = merged.load_state_dict(adapter, strict=False)
    unmerged.load_state_dict(adapter, strict=False)
    missing = [key for key in keys.missing_keys if "lora_" in key]
    expected, reloaded, plain = (dm.logits_of(m, test) for m in (model, merged, unmerged))

    gap, bound = (reloaded - plain).abs().max().item(), rounding_bound(merged, plain)
    as_named = all(layer.merged for layer in dm.lora_layers(merged))
    as_named &= not any(layer.merged for layer in dm.lora_layers(unmerged))
    return [
        Check(
            "the adapter file fits a fresh base",
            not missing and not keys.unexpected_keys,
            f"{len(adapter)} tensors; {len(missing)} missing, {len(keys.unexpected_keys)} unexpected",
        ),
        _bits_check("reloaded logits are the trained ones, bit for bit", [(expected, reloaded)]),
        Check(
            "merged logits are the unmerged ones within rounding",
            as_named and gap <= bound,
            f"largest gap {gap:.1e}; bound {bound:.1e}",
        ),
    ]


def check_frozen(base: nn.Module, model: nn.Module) -> Check:
    """That training model, merging it and taking the adapter out again left base's parameters as they were."""
    for _ in range(3):
        model.eval()
        model.train()
    now = dict(model.named_parameters())
    pairs = [(parameter, now[name]) for name, parameter in base.named_parameters()]
    return _bits_check("frozen parameters are the pretrained ones, bit for bit", pairs)


def check_unfused_losses(base: nn.Module, digits: dm.Digits, seed: int) -> Check:
    """That a training run without dropout has the losses of the unfused expression."""
    runs = []
    for layer_class in (fused_lora.Linear, dm.UnfusedLinear):
        torch.manual_seed(seed)
        model = dm.with_lora(base, lora_dropout=0.0, layer_class=layer_class)
        runs.append(dm.first_losses(model, digits, steps=_STEPS_COMPARED, seed=seed))
    gap = max(abs(ours - theirs) for ours, theirs in zip(*runs, strict=True))
    # No factor for the steps: rounding reaches the parameters only through gradients times a small learning rate.
    bound = rounding_bound(model, torch.tensor(runs))
    return Check(
        f"losses of {_STEPS_COMPARED} steps at p = 0 are the unfused ones within rounding",
        gap <= bound,
        f"largest gap {gap:.1e} while the loss goes {runs[0][0]:.2f} to {runs[0][-1]:.2f}; bound {bound:.1e}",
    )


def check_improved(before: dm.Score, after: dm.Score) -> Check:
    return Check(
        "the adapter reads the transformed digits (over 90%)",
        before.accuracy < 0.5 and after.accuracy > 0.9,
        f"{before.accuracy:.1%} to {after.accuracy:.1%}",
    )


def rounding_bound(model: nn.Module, results: Tensor) -> float:
    """How far rounding may move float32 results of model's size: eps · largest |result| · √(additions in series).

    The fused, unfused and merged forms differ only in how the adapted layers group their sums. Every addition rounds
    by up to eps/2 of its size; n roundings of random sign add up like √n. A wrong scaling, or TF32 (eps is 2¹³ times
    larger) in place of float32, goes beyond it.
    """
    additions = sum(layer.in_features + layer.r for layer in dm.lora_layers(model))
    return _EPSILON * results.abs().max().item() * math.sqrt(additions)


def _bits_check(claim: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Check:
    # As integers, since == takes 0.0 for -0.0.
    differing = sum(int((a.view(torch.int32) != b.view(torch.int32)).sum()) for a, b in pairs)
    return Check(claim, differing == 0, f"{differing} of {sum(a.numel() for a, _ in pairs):,} differ")
