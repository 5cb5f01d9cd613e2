"""The yardstick of every accuracy test: the unfused expression in float64 and in the dtype under test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.functional import lora_linear
from fused_lora.reference import Dropout, dropout_threshold


def assert_as_accurate_as(actual: Tensor, same_dtype: Tensor, exact: Tensor, what: str = "result") -> None:
    """|actual - exact| <= 2 |same_dtype - exact|, by maxima, with a floor of one rounding unit at exact's scale.

    The floor is there for tiny shapes, on which torch happens to be exact.
    """
    assert actual.dtype == same_dtype.dtype, f"{what} is {actual.dtype}, torch gives {same_dtype.dtype}"
    assert actual.shape == same_dtype.shape, f"{what} is {tuple(actual.shape)}, torch gives {tuple(same_dtype.shape)}"
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs()
    assert not error.isnan().any(), f"{what} holds NaN"
    unit = torch.finfo(actual.dtype).eps * exact.abs().max()
    bound = 2 * (same_dtype.double() - exact).abs().max() + unit
    worst = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    assert error.max() <= bound, f"{what}{list(index)} is off by {error.max():.3e}; torch's bound is {bound:.3e}"


def unfused(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None = None,
    keep_probability: float = 1.0,
) -> Tensor:
    """loralib's expression, with a given mask in place of nn.Dropout's."""
    dropped = x if keep is None else x * keep / keep_probability
    return F.linear(x, weight, bias) + (dropped @ lora_A.T @ lora_B.T) * scaling


@dataclass
class Problem:
    """Inputs of one layer and the gradient of its output, on one device."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    dy: Tensor

    NAMES = ("x", "weight", "lora_A", "lora_B", "bias")

    def arguments(self) -> list[Tensor | None]:
        return [getattr(self, name) for name in self.NAMES]

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(
            *(None if t is None else t.detach().to(dtype).requires_grad_() for t in self.arguments()),
            dy=self.dy.to(dtype),
        )

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: None if t is None else t.grad for name, t in zip(self.NAMES, self.arguments(), strict=True)}


def make_problem(
    rows: int,
    in_features: int,
    out_features: int,
    r: int,
    *,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    device: str,
    number: int = 0,
) -> Problem:
    """Normal inputs with weights at the scale of a trained layer, so that the LoRA term weighs as much as the base.

    number: another one gives another problem of these sizes.
    """
    generator = torch.Generator().manual_seed(rows * 7919 + in_features * 31 + out_features * 17 + r + 104729 * number)

    def draw(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, of).requires_grad_()

    adapter = adapter_dtype or dtype
    fan_in = max(1, in_features)
    return Problem(
        x=draw(rows, in_features),
        weight=draw(out_features, in_features, scale=fan_in**-0.5),
        lora_A=draw(r, in_features, scale=fan_in**-0.5, of=adapter),
        lora_B=draw(out_features, r, scale=max(1, r) ** -0.5, of=adapter),
        bias=draw(out_features) if bias else None,
        dy=draw(rows, out_features).detach(),
    )


def assert_step_is_as_accurate(problem: Problem, p: float) -> None:
    """y and all gradients of a training step without a bias on a GPU, beside torch's under autocast, with one mask."""
    wide = problem.to(torch.float64)
    seed = torch.tensor([3], device="cuda")
    dropout = Dropout(seed, dropout_threshold(p)) if p > 0 else None
    keep, q = (None, 1.0) if dropout is None else (dropout.mask(*problem.x.shape), dropout.keep_probability)
    results = []
    for inputs, kind in ((problem, "ours"), (problem, "autocast"), (wide, "exact")):
        inputs.x.grad = inputs.weight.grad = inputs.lora_A.grad = inputs.lora_B.grad = None
        if kind == "ours":
            y = lora_linear(*inputs.arguments()[:4], scaling=0.75, dropout_p=p, training=True, seed=seed)
        else:
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=kind == "autocast"):
                y = unfused(*inputs.arguments(), 0.75, keep, q)
        y.backward(inputs.dy)
        results.append({"y": y.detach()} | {n: g for n, g in inputs.gradients().items() if g is not None})
    for name, value in results[0].items():
        assert_as_accurate_as(value, results[1][name], results[2][name], name)
