"""Linear against loralib 0.1.2 itself, and what loralib gets wrong."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from itertools import product
from typing import Any

import loralib
import numpy
import pytest
import torch
from numerics import assert_as_accurate_as
from torch import nn

import fused_lora
from fused_lora import Linear

OPTIONS = [
    {"r": r, "lora_alpha": alpha, "fan_in_fan_out": transposed, "merge_weights": merge, "bias": bias}
    for r, alpha, transposed, merge, bias in product([0, 1, 4], [1, 16], [False, True], [False, True], [False, True])
]


def option_id(options: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items())


def build(cls: type[nn.Linear], options: dict[str, Any], dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(3)
    layer = cls(11, 7, dtype=dtype, **options)
    if options["r"] > 0:
        torch.manual_seed(4)
        nn.init.normal_(layer.lora_B)
    return layer


def step(layer: nn.Linear, mode: bool) -> dict[str, torch.Tensor]:
    """Output and gradients of one call in the given mode, on inputs that are the same for every layer."""
    layer.train(mode)
    layer.zero_grad()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 5, 11, generator=generator).to(torch.bfloat16).to(layer.weight.dtype).requires_grad_()
    dy = torch.randn(2, 5, 7, generator=generator).to(torch.bfloat16).to(layer.weight.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = layer(x)
    y.backward(dy)
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
def test_same_seed_same_init_outputs_and_gradients_as_loralib(options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = build(Linear, options, dtype), build(loralib.Linear, options, dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other) and mine.stride() == other.stride(), name
        assert mine.requires_grad == other.requires_grad, name
    for attribute in ("r", "lora_alpha", "merged", "merge_weights", "fan_in_fan_out"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert hasattr(ours, "scaling") == hasattr(theirs, "scaling") == (options["r"] > 0)
    oracle = copy.deepcopy(theirs).double()
    for mode in (True, False, False, True):
        mine, other, exact = step(ours, mode), step(theirs, mode), step(oracle, mode)
        assert ours.merged == theirs.merged, f"merged after train({mode})"
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert_as_accurate_as(value, other[name], exact[name], name)


def test_attributes_and_class_tree() -> None:
    layer = Linear(4, 3, r=2, lora_alpha=8, lora_dropout=0.25)
    assert isinstance(layer, nn.Linear) and isinstance(layer, fused_lora.LoRALayer)
    assert layer.scaling == 4.0 and isinstance(layer.lora_dropout, nn.Dropout) and layer.lora_dropout.p == 0.25
    assert not layer.weight.requires_grad and layer.bias.requires_grad
    assert "r=2" in repr(layer) and "lora_alpha=8" in repr(layer)


@pytest.mark.parametrize("name", ["Linear", "MergedLinear", "Embedding", "Conv2d"])
def test_r_may_be_numpys_and_is_an_int_of_the_layer(name: str) -> None:
    more = {"MergedLinear": {"enable_lora": [True]}, "Conv2d": {"kernel_size": 3}}.get(name, {})
    layer = getattr(fused_lora, name)(4, 3, r=numpy.int64(2), **more)
    assert type(layer.r) is int and layer.r == 2 and type(layer.scaling) is float


def test_a_subclass_of_loralayer_as_others_write_them() -> None:
    class Mine(nn.Module, fused_lora.LoRALayer):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            fused_lora.LoRALayer.__init__(self, r=2, lora_alpha=4, lora_dropout=0.1, merge_weights=True)
            self.lora_A = nn.Parameter(torch.zeros(2, 3))

    assert list(fused_lora.lora_state_dict(Mine())) == ["lora_A"]


def test_train_and_eval_return_the_layer() -> None:
    layer = Linear(4, 3, r=2)
    assert layer.eval() is layer and layer.train() is layer
    assert layer.merged is False and layer.eval().merged is True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_merging_rounds_once_and_unmerging_restores_every_bit(dtype: torch.dtype, fan_in_fan_out: bool) -> None:
    layer = Linear(13, 9, r=4, lora_alpha=3, dtype=dtype, fan_in_fan_out=fan_in_fan_out)
    nn.init.normal_(layer.lora_B)
    base = layer.weight.detach().clone()
    for _ in range(3):
        layer.eval()
        update = layer.lora_B.double() @ layer.lora_A.double() * layer.scaling
        exact = base.double() + (update.T if fan_in_fan_out else update)
        # One rounding to dtype, and the float32 sum's own error for the wide dtypes.
        unit = max(torch.finfo(dtype).eps / 2, 8 * torch.finfo(torch.float32).eps if dtype != torch.float64 else 1e-15)
        assert ((layer.weight.double() - exact).abs() <= unit * exact.abs().max()).all()
        assert not torch.equal(layer.weight, base)
        nn.init.normal_(layer.lora_A)
        layer.train()
        assert torch.equal(layer.weight, base)


def test_state_dict_holds_the_unmerged_base_in_either_mode() -> None:
    layer = Linear(6, 5, r=2)
    nn.init.normal_(layer.lora_B)
    trained = {name: t.clone() for name, t in layer.state_dict().items()}
    for name, tensor in layer.eval().state_dict().items():
        assert torch.equal(tensor, trained[name]), name


def test_loading_into_a_merged_layer_takes_effect_and_unmerges_cleanly() -> None:
    source = Linear(6, 5, r=2)
    nn.init.normal_(source.lora_B)
    target = Linear(6, 5, r=2).eval()
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 6)
    torch.testing.assert_close(target(x), source(x))
    assert torch.equal(target.train().weight, source.weight)


def test_casting_while_merged_keeps_the_base() -> None:
    layer = Linear(6, 5, r=2)
    nn.init.normal_(layer.lora_B)
    expected = layer.weight.detach().to(torch.bfloat16)
    layer.eval().to(torch.bfloat16)
    assert layer.merged and layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.train().weight, expected)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_float32_adapters_on_a_half_base(base: torch.dtype) -> None:
    layer = Linear(16, 8, r=2, dtype=base, adapter_dtype=torch.float32)
    nn.init.normal_(layer.lora_B)
    assert layer.lora_A.dtype == torch.float32 and layer.weight.dtype == base
    y = layer(torch.randn(5, 16, dtype=base))
    assert y.dtype == base
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


def test_dropout_follows_the_mode_and_the_dropout_module() -> None:
    layer = Linear(32, 8, r=4, lora_dropout=0.5, merge_weights=False)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(6, 32)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train().lora_dropout.eval()
    assert torch.equal(layer(x), layer(x))
    layer.lora_dropout = nn.Dropout1d(0.5)
    with pytest.raises(TypeError, match="Dropout1d"):
        layer(x)


def test_pickles_deepcopies_and_saves() -> None:
    layer = Linear(6, 5, r=2, lora_dropout=0.0).eval()
    x = torch.randn(3, 6)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for copied in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(x), layer(x))
        assert torch.equal(copied.train().weight, copy.deepcopy(layer).train().weight)


def test_meta_device_then_to_empty_then_reset_parameters() -> None:
    layers = []
    for device in ("meta", "cpu"):
        layer = Linear(10, 6, r=2, fan_in_fan_out=True, device=device).to_empty(device="cpu")
        torch.manual_seed(1)
        layer.reset_parameters()
        layers.append(layer)
    for mine, other in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert torch.equal(mine, other)
    # The bound of Kaiming's uniform init follows in_features = 10, also for the transposed weight.
    assert layers[0].weight.abs().max() <= 10**-0.5


def test_a_merged_layer_in_training_warns() -> None:
    layer = Linear(6, 5, r=2).eval()
    x = torch.randn(3, 6)
    with pytest.warns(UserWarning, match="gives lora_A and lora_B no gradient, and the base weight's to"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            layer(x)
        Linear(6, 5).eval()(x)
        Linear(6, 5, r=2, merge_weights=False).eval()(x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": -1}, ["r is -1"]),
        ({"lora_dropout": 1.1}, ["lora_dropout is 1.1", "[0, 1]"]),
        ({"lora_dropout": -0.1}, ["lora_dropout is -0.1", "[0, 1]"]),
        ({"r": 2, "lora_alpha": float("nan")}, ["lora_alpha is nan"]),
        ({"r": 2.0}, ["r is 2.0", "an integer"]),
        ({"r": "2"}, ["r is '2'", "an integer"]),
        ({"r": True}, ["r is True", "an integer"]),
        ({"r": 2, "lora_alpha": "16"}, ["lora_alpha is '16'", "a finite number"]),
        ({"r": 2, "lora_alpha": None}, ["lora_alpha is None", "a finite number"]),
        ({"lora_dropout": None}, ["lora_dropout is None", "a probability in [0, 1]"]),
        ({"lora_dropout": "0.1"}, ["lora_dropout is '0.1'", "a probability in [0, 1]"]),
    ],
)
def test_bad_options(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        Linear(4, 3, **options)
    assert all(word in str(raised.value) for word in words)


def test_compiles_without_a_graph_break_in_both_modes() -> None:
    torch._dynamo.reset()
    layer = Linear(8, 6, r=2, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8)
    for mode in (True, False):
        layer.train(mode)
        torch.manual_seed(2)
        expected = layer(x)
        torch.manual_seed(2)
        assert torch.equal(compiled(x), expected)


def test_compiled_layers_follow_their_scaling() -> None:
    """From its second value on dynamo takes a number for a variable."""
    torch._dynamo.reset()
    layer, x = Linear(8, 6, r=2), torch.randn(4, 8)
    nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for layer.scaling in (1.0, 2.0, 3.0):
        assert torch.equal(compiled(x), layer(x))


def test_training_steps_equal_loralibs() -> None:
    """Sixty steps of AdamW at p = 0 from the same seed: the same losses, up to rounding that training amplifies."""
    losses = []
    for cls in (Linear, loralib.Linear):
        torch.manual_seed(6)
        model = nn.Sequential(cls(12, 24, r=4, lora_alpha=8), nn.Tanh(), cls(24, 3, r=4, lora_alpha=8))
        x, y = torch.randn(64, 12), torch.randn(64, 3)
        module = fused_lora if cls is Linear else loralib
        module.mark_only_lora_as_trainable(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        history = []
        for _ in range(60):
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
        losses.append(torch.stack(history))
    assert losses[0][-1] < 0.8 * losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


class Doubled(torch.nn.Module):
    def forward(self, factor: torch.Tensor) -> torch.Tensor:
        return 2 * factor


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "bias"])
def test_a_parametrized_tensor_is_used_as_it_is_made(name: str) -> None:
    """A parametrization takes the parameter out of the layer's own; the layer still has an adapter."""
    layer, expected = Linear(6, 4, r=2, dtype=torch.float64), Linear(6, 4, r=2, dtype=torch.float64)
    torch.nn.init.normal_(layer.lora_B)
    expected.load_state_dict(layer.state_dict())
    with torch.no_grad():
        getattr(expected, name).mul_(2)
    torch.nn.utils.parametrize.register_parametrization(layer, name, Doubled())
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(layer(x), expected(x))
    layer.parametrizations[name].original.grad = None
    layer(x).sum().backward()
    assert (layer.parametrizations[name].original.grad is None) == (name == "weight")
    if name == "bias":
        assert torch.equal(layer.eval()(x).detach(), expected.eval()(x).detach())
    else:
        # Its changes after a merge could not be seen.
        with pytest.raises(RuntimeError, match=f"{name} is parametrized or sharded; expected a parameter of the layer"):
            layer.eval()
