"""Other people's code runs unchanged: a GPT-2 written for loralib trains, decodes and saves the same on fused_lora."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import loralib
import pytest
import torch
from conftest import HAS_TRITON
from gpt2 import GPT2, NOT_A_TARGET, Config
from numerics import assert_as_accurate_as
from torch import Tensor, nn

import fused_lora

PACKAGES = [loralib, fused_lora]
BATCHES = 4
STEPS = 2 * BATCHES

# Of the largest number compared. Both sides round in float64, whose unit is 2e-16, in sums of some 100 terms a few
# dozen times in a row; AdamW, which divides by the gradient's size, magnifies what that does to the small gradients. A
# single rounding to float32 anywhere (6e-8) is far above, as is any difference in the formulas.
FLOAT64_ROUNDING = 1e-11


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors this small, threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain_checkpoint(config: Config) -> dict[str, Tensor]:
    """A GPT-2 that never heard of LoRA, by its own names, at a trained model's scale: its attention is not uniform."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    def affine(prefix: str, n_in: int, n_out: int) -> dict[str, Tensor]:
        return {f"{prefix}.weight": draw(n_in, n_out, std=n_in**-0.5), f"{prefix}.bias": draw(n_out, std=0.1)}

    def norm(prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}.weight": 1 + draw(nx, std=0.1), f"{prefix}.bias": draw(nx, std=0.1)}

    nx = config.n_embd
    state = {"wte.weight": draw(config.vocab_size, nx, std=0.3), "wpe.weight": draw(config.n_ctx, nx, std=0.1)}
    for block in (f"h.{layer}" for layer in range(config.n_layer)):
        state |= norm(f"{block}.ln_1") | norm(f"{block}.ln_2")
        state[f"{block}.attn.bias"] = torch.ones(config.n_ctx, config.n_ctx, dtype=torch.bool).tril()
        state |= affine(f"{block}.attn.c_attn", nx, 3 * nx) | affine(f"{block}.attn.c_proj", nx, nx)
        state |= affine(f"{block}.mlp.c_fc", nx, 4 * nx) | affine(f"{block}.mlp.c_proj", 4 * nx, nx)
    return state | norm("ln_f")


def adapter_of_loralib(config: Config) -> dict[str, Tensor]:
    """What loralib saves of a model whose lora_B is not zero any more."""
    torch.manual_seed(2)
    model = GPT2(loralib, config)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.05)
    return loralib.lora_state_dict(model)


def fine_tuned(
    lora: ModuleType, device: str, dtype: torch.dtype = torch.float32, bias: str = "none", **options: Any
) -> GPT2:
    """The model that every test starts from: the same numbers whatever the package."""
    config = Config(**options)
    model = GPT2(lora, config)
    model.load_plain(plain_checkpoint(config))
    adapter = adapter_of_loralib(config)
    assert not model.load_state_dict(adapter, strict=False).unexpected_keys
    lora.mark_only_lora_as_trainable(model, bias)
    return model.to(device, dtype)


@dataclass(frozen=True)
class Batch:
    tokens: Tensor
    labels: Tensor
    mask: Tensor


def batch(step: int, device: str) -> Batch:
    """Sequences of unequal lengths, of which the first tokens are a prompt: neither prompt nor padding is a target."""
    generator = torch.Generator().manual_seed(100 + step % BATCHES)
    text = torch.randint(61, (3, 13), generator=generator)
    tokens, labels, mask = text[:, :-1], text[:, 1:].clone(), torch.ones(3, 12)
    for row, length in enumerate((12, 7, 10)):
        mask[row, :3] = 0
        mask[row, length:] = 0
        labels[row, length:] = NOT_A_TARGET
    return Batch(tokens.to(device), labels.to(device), mask.to(device))


def gradients(model: GPT2) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def first_gradients(model: GPT2, device: str, batches: int = BATCHES, autocast: bool = False) -> dict[str, Tensor]:
    """The loss and the gradients of a first step, for each of some batches."""
    results = []
    for step in range(batches):
        now = batch(step, device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            _, loss = model(now.tokens, now.labels, now.mask)
        model.zero_grad()
        loss.backward()
        results.append({"loss": loss.detach()} | gradients(model))
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


@dataclass(frozen=True)
class History:
    losses: Tensor
    gradients: list[dict[str, Tensor]]


def train(model: GPT2, device: str, steps: int = STEPS, validate: bool = False) -> History:
    """AdamW on what is trainable; validate: an evaluation after each step, as training scripts have it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, history = [], []
    for step in range(steps):
        now = batch(step, device)
        _, loss = model(now.tokens, now.labels, now.mask)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        history.append(gradients(model))
        optimizer.step()
        if validate:
            model.eval()
            logits(model, device)
            model.train()
    return History(torch.stack(losses), history)


@torch.no_grad()
def logits(model: GPT2, device: str) -> Tensor:
    return model(batch(0, device).tokens)[0]


@torch.no_grad()
def decoded(model: GPT2, tokens: Tensor, prompt: int) -> Tensor:
    """The logits of a prompt at once and of what follows token by token."""
    piece, past = model(tokens[:, :prompt])
    pieces = [piece]
    for position in range(prompt, tokens.shape[1]):
        piece, past = model(tokens[:, position : position + 1], past=past)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def assert_same_up_to_float64_rounding(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype == torch.float64
    error, scale = (actual - expected).abs().max(), expected.abs().max()
    assert error <= FLOAT64_ROUNDING * scale, f"{what} differs by {error:.3e}, at a scale of {scale:.3e}"


def assert_model_as_accurate_as(actual: Tensor, same_dtype: Tensor, exact: Tensor, what: str) -> None:
    """numerics.assert_as_accurate_as for what has gone through a whole model.

    There, one rounding that a sharp softmax magnifies makes the largest error: over 64 draws of four batches its ratio
    to loralib's is spread from 0.4 to 2.5, about 1. That of the errors' root mean square stays below 1.4.
    """
    assert actual.dtype == same_dtype.dtype, f"{what} is {actual.dtype}, loralib gives {same_dtype.dtype}"
    assert actual.shape == same_dtype.shape == exact.shape, what
    ours, theirs = ((tensor.double() - exact) for tensor in (actual, same_dtype))
    root_mean_squares = tuple(float(error.square().mean().sqrt()) for error in (ours, theirs))
    assert root_mean_squares[0] <= 2 * root_mean_squares[1], f"{what} errs by {root_mean_squares} on average"
    largest = tuple(float(error.abs().max()) for error in (ours, theirs))
    assert largest[0] <= 4 * largest[1], f"{what} errs by up to {largest}"


def assert_same_bits(actual: History, expected: History) -> None:
    assert torch.equal(actual.losses, expected.losses)
    for step, (mine, other) in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
        assert mine.keys() == other.keys()
        for name, gradient in mine.items():
            assert torch.equal(gradient, other[name]), f"{name} at step {step}"


@pytest.mark.parametrize("r", [0, 1, 4])
def test_the_same_seed_initialises_the_same_model(r: int) -> None:
    models = []
    for lora in PACKAGES:
        torch.manual_seed(7)
        models.append(GPT2(lora, Config(r=r)))
    theirs, ours = models
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other) and mine.stride() == other.stride(), name
        assert mine.requires_grad == other.requires_grad, name
    # The model's own initialisation found the layer to be an nn.Linear: torch's draws from +-24**-0.5, of std 0.118.
    assert 0.015 < ours.transformer.h[0].attn.c_attn.weight.std() < 0.025


@pytest.mark.parametrize("r", [0, 1, 4])
def test_a_plain_gpt2_loads_and_computes_the_same(r: int, device: str) -> None:
    models = [GPT2(lora, Config(r=r)).double().to(device) for lora in PACKAGES]
    plain = plain_checkpoint(Config())
    for model in models:
        model.load_plain(plain)
        for name, tensor in plain.items():
            assert torch.equal(model.transformer.state_dict()[name].cpu(), tensor.to(model.lm_head.weight.dtype)), name
    theirs, ours = models
    assert_same_up_to_float64_rounding(logits(ours, device), logits(theirs, device), "logits")


@pytest.mark.parametrize("lora", PACKAGES, ids=lambda lora: lora.__name__)
def test_loading_a_plain_gpt2_keeps_the_adapters(lora: ModuleType, device: str) -> None:
    model = fine_tuned(lora, device)
    adapter = adapter_of_loralib(Config())
    model.load_plain(plain_checkpoint(Config()))
    held = lora.lora_state_dict(model)
    assert held.keys() == adapter.keys() and len(held) == 4
    for name, tensor in adapter.items():
        assert torch.equal(held[name].cpu(), tensor), name


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_packages_name_the_same_entries(bias: str, device: str) -> None:
    theirs, ours = (fine_tuned(lora, device, bias=bias) for lora in PACKAGES)
    assert [(name, p.shape, p.requires_grad) for name, p in ours.named_parameters()] == [
        (name, p.shape, p.requires_grad) for name, p in theirs.named_parameters()
    ]
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }
    mine, other = fused_lora.lora_state_dict(ours, bias), loralib.lora_state_dict(theirs, bias)
    assert {name: tensor.shape for name, tensor in mine.items()} == {
        name: tensor.shape for name, tensor in other.items()
    }


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_training_in_float64_has_loralibs_losses_and_gradients(bias: str, device: str) -> None:
    model = fine_tuned(fused_lora, device, torch.float64, bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ours = train(model, device)
    theirs = train(fine_tuned(loralib, device, torch.float64, bias), device)
    assert theirs.losses[-BATCHES:].mean() < 0.9 * theirs.losses[:BATCHES].mean()
    assert_same_up_to_float64_rounding(ours.losses, theirs.losses, "losses")
    for step, (mine, other) in enumerate(zip(ours.gradients, theirs.gradients, strict=True)):
        assert mine.keys() == other.keys() and len(mine) >= 4
        for name, gradient in mine.items():
            assert_same_up_to_float64_rounding(gradient, other[name], f"{name}'s gradient at step {step}")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_training_in_float32_follows_the_losses_of_float64(device: str) -> None:
    ours = train(fine_tuned(fused_lora, device), device).losses
    exact = train(fine_tuned(loralib, device, torch.float64), device).losses
    # A loss is a mean of log-sum-exps of logits, each a few units off. Training adds little: a step moves the loss by
    # gradient * update, and AdamW's update is uncertain only where the gradient is as small as its own error.
    assert ours.dtype == torch.float32
    assert ((ours.double() - exact).abs() <= 16 * torch.finfo(torch.float32).eps * exact).all()


@pytest.mark.parametrize("numbers", ["float32", "bfloat16", "float16", "autocast to bfloat16"])
def test_first_gradients_are_as_accurate_as_loralibs(numbers: str, backend: str, device: str) -> None:
    autocast = numbers.startswith("autocast")
    dtype = torch.float32 if autocast else getattr(torch, numbers)
    batches = 2 if backend == "triton" else BATCHES
    theirs, ours = (first_gradients(fine_tuned(lora, device, dtype), device, batches, autocast) for lora in PACKAGES)
    exact = first_gradients(fine_tuned(loralib, device, dtype).double(), device, batches)
    assert ours.keys() == theirs.keys() and len(ours) == 5
    assert_as_accurate_as(ours.pop("loss"), theirs["loss"], exact["loss"], "loss")
    for name, gradient in ours.items():
        assert_model_as_accurate_as(gradient, theirs[name], exact[name], name)


@pytest.mark.parametrize(("source", "target"), [PACKAGES, PACKAGES[::-1]], ids=["from loralib", "to loralib"])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_a_trained_adapter_moves_to_the_other_package(
    source: ModuleType, target: ModuleType, bias: str, device: str
) -> None:
    trained, other = (fine_tuned(lora, device, torch.float64, bias) for lora in (source, target))
    start = logits(trained, device)
    train(trained, device)
    expected = logits(trained, device)
    file = io.BytesIO()
    torch.save(source.lora_state_dict(trained, bias), file)
    file.seek(0)
    keys = other.load_state_dict(torch.load(file), strict=False)
    assert not keys.unexpected_keys and not any("lora_" in key for key in keys.missing_keys)
    assert (start - expected).abs().max() > 0.1 * expected.abs().max()
    if bias == "lora_only" or bias == "none":
        assert len(trained.state_dict()) - len(keys.missing_keys) == {"none": 4, "lora_only": 6}[bias]
    assert_same_up_to_float64_rounding(logits(other, device), expected, "logits")


@pytest.mark.parametrize(("source", "target"), [PACKAGES, PACKAGES[::-1]], ids=["from loralib", "to loralib"])
def test_a_whole_model_moves_to_the_other_package(source: ModuleType, target: ModuleType, device: str) -> None:
    trained = fine_tuned(source, device, torch.float64)
    train(trained, device, steps=1)
    other = GPT2(target, Config()).to(device, torch.float64)
    other.load_state_dict(trained.state_dict())
    assert_same_up_to_float64_rounding(logits(other, device), logits(trained, device), "logits")


def test_dropout_follows_torchs_seed(device: str) -> None:
    def run(seed: int, lora_dropout: float) -> History:
        model = fine_tuned(fused_lora, device, lora_dropout=lora_dropout)
        torch.manual_seed(seed)
        return train(model, device, steps=4)

    first = run(3, 0.1)
    assert_same_bits(run(3, 0.1), first)
    assert (run(4, 0.1).losses != first.losses).all()
    assert (run(3, 0.0).losses != first.losses).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit_of_a_run_with_dropout(reentrant: bool, device: str) -> None:
    runs = []
    for checkpointing in (None, reentrant):
        model = fine_tuned(fused_lora, device, lora_dropout=0.1)
        model.transformer.checkpointing = checkpointing
        torch.manual_seed(3)
        with fused_lora.count_paths() as paths:
            runs.append(train(model, device, steps=3))
        # Each block's forward ran once more, in backward.
        forwards = sum(times for path, times in paths.items() if path.startswith("forward/"))
        assert forwards == 3 * 2 * (1 if checkpointing is None else 2)
    assert_same_bits(runs[1], runs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_with_past_gives_the_logits_of_the_whole(dtype: torch.dtype, backend: str, device: str) -> None:
    prompt = 9
    tokens = batch(0, device).tokens
    theirs, ours = (fine_tuned(lora, device, dtype).eval() for lora in PACKAGES)
    with torch.no_grad():
        exact = fine_tuned(loralib, device, dtype).double()(tokens)[0]
    assert_model_as_accurate_as(decoded(ours, tokens, prompt), decoded(theirs, tokens, prompt), exact, "logits")


@pytest.mark.parametrize("prompt", [1, 7, 11])
@pytest.mark.parametrize("merge_weights", [False, True])
def test_decoding_in_float64_equals_the_whole(merge_weights: bool, prompt: int, device: str) -> None:
    model = fine_tuned(fused_lora, device, torch.float64, merge_weights=merge_weights).eval()
    tokens = batch(1, device).tokens
    with torch.no_grad():
        whole = model(tokens)[0]
    for rows in (slice(None), slice(1, 2)):
        assert_same_up_to_float64_rounding(decoded(model, tokens[rows], prompt), whole[rows], f"logits of {rows}")


def test_no_sequences_give_no_logits(backend: str, device: str) -> None:
    tokens = batch(0, device).tokens[:0]
    theirs, ours = (fine_tuned(lora, device)(tokens)[0] for lora in PACKAGES)
    assert ours.shape == theirs.shape == (0, 12, 61)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_logits_are_as_accurate_as_loralibs(dtype: torch.dtype, device: str) -> None:
    theirs, ours = (fine_tuned(lora, device, dtype, merge_weights=True) for lora in PACKAGES)
    exact = logits(fine_tuned(loralib, device, dtype).double(), device)
    assert_model_as_accurate_as(logits(ours.eval(), device), logits(theirs.eval(), device), exact, "logits")
    assert ours.transformer.h[0].attn.c_attn.merged


def test_merging_changes_no_logits_in_float64(device: str) -> None:
    model = fine_tuned(fused_lora, device, torch.float64, merge_weights=True)
    expected = logits(model, device)
    with fused_lora.count_paths() as paths:
        model.eval()
        paths.clear()
        merged = logits(model, device)
    assert not paths, "a merged model ran an adapter"
    assert_same_up_to_float64_rounding(merged, expected, "logits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eval_and_train_give_every_weight_its_bits_and_leave_the_tied_head_alone(
    dtype: torch.dtype, device: str
) -> None:
    model = fine_tuned(fused_lora, device, dtype, merge_weights=True)
    parameters = dict(model.named_parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    embedding = model.transformer.wte.weight
    for _ in range(2):
        model.eval()
        for block in model.transformer.h:
            assert (block.attn.c_attn.weight != block.attn.c_attn.base_weight).any()
        assert model.lm_head.weight is model.transformer.wte.weight is embedding
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), f"{name} in eval mode"
        model.train()
        assert model.lm_head.weight is model.transformer.wte.weight is embedding
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), f"{name} after train()"
        for name, parameter in model.named_parameters():
            assert parameter is parameters[name] and parameter.requires_grad == ("lora_" in name), name


def test_an_unmerged_model_trains_in_eval_mode_as_in_train_mode(device: str) -> None:
    model = fine_tuned(fused_lora, device)
    expected = first_gradients(model, device)
    actual = first_gradients(model.eval(), device)
    assert actual.keys() == expected.keys() and len(actual) == 5
    for name, gradient in actual.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("merge_weights", [False, True])
def test_validating_between_steps_changes_no_bit_of_training(merge_weights: bool, device: str) -> None:
    runs = []
    for validate in (False, True):
        model = fine_tuned(fused_lora, device, lora_dropout=0.1, merge_weights=merge_weights)
        torch.manual_seed(3)
        runs.append(train(model, device, steps=3, validate=validate))
    assert_same_bits(runs[1], runs[0])


def test_checkpoints_load_into_a_merged_model(device: str) -> None:
    expected = fine_tuned(fused_lora, device, merge_weights=True)
    config = Config(merge_weights=True)
    model = GPT2(fused_lora, config).to(device).eval()
    model.load_plain(plain_checkpoint(config))
    model.load_state_dict(adapter_of_loralib(config), strict=False)
    assert torch.equal(logits(model, device), logits(expected.eval(), device))
    model.train()
    expected.train()
    for (name, tensor), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_a_sequence_that_overflows_leaves_the_others_alone(backend: str, device: str) -> None:
    model = fine_tuned(fused_lora, device)
    tokens = batch(0, device).tokens.clamp(max=59)
    with torch.no_grad():
        expected = model(tokens)[0]
        model.transformer.wte.weight[60] = torch.inf
        # The first token of a sequence, which the last of another precedes in the flattened rows.
        tokens[1, 0] = 60
        actual = model(tokens)[0]
    assert actual[1].isnan().all()
    # Without the overflowing token's own logit, which the tied head makes infinite everywhere.
    assert torch.equal(actual[0::2, :, :60], expected[0::2, :, :60])


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(
    ("dtype", "lora_dropout"), [(torch.float32, 0.0), (torch.float32, 0.1), (torch.bfloat16, 0.1)], ids=str
)
def test_a_step_on_the_kernels_equals_one_on_the_reference(
    dtype: torch.dtype, lora_dropout: float, device: str
) -> None:
    def step(backend: fused_lora.dispatch.Backend, wide: bool = False) -> dict[str, Tensor]:
        model = fine_tuned(fused_lora, device, dtype, lora_dropout=lora_dropout)
        model = model.double() if wide else model
        # The masks are a function of the seed alone: all three draw the same.
        torch.manual_seed(5)
        with fused_lora.use_backend(backend), fused_lora.count_paths() as paths:
            results = first_gradients(model, device, batches=2)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter -= 0.1 * parameter.grad
            results["logits after the step"] = logits(model, device)
        assert paths and all(path.endswith(backend) for path in paths)
        return results

    from interpreter import checked_addresses

    with checked_addresses() if device == "cpu" else nullcontext():
        kernels = step("triton")
    reference, exact = step("reference"), step("reference", wide=True)
    assert_as_accurate_as(kernels.pop("loss"), reference["loss"], exact["loss"], "loss")
    for name, value in kernels.items():
        assert_model_as_accurate_as(value, reference[name], exact[name], name)
