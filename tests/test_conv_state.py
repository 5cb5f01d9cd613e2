"""Conv1d, Conv2d and Conv3d: merging, memory format, state dicts, loralib's checkpoints, and copies of a layer."""

from __future__ import annotations

import copy
import io
import pickle

import loralib
import pytest
import torch
from convolutions import (
    BY_NAME,
    CONVS,
    DTYPES,
    PLAIN,
    SIZES,
    Case,
    assert_follows_the_definition,
    bits,
    draw,
    ieee_convolutions,  # noqa: F401 (an autouse fixture)
    one_thread,  # noqa: F401 (an autouse fixture)
    parametrize_case,
    step,
    torchs_mask,
    trained,
)
from numerics import assert_as_accurate_as
from torch import Tensor, nn

import fused_lora
from fused_lora import Conv2d

# ---- merging ----


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [*((dtype, dtype) for dtype in DTYPES), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize(("dims", "kernel"), [(1, 3), (2, (3, 2)), (3, (2, 1, 3))])
def test_merging_rounds_once_and_unmerging_restores_every_bit(
    dims: int, kernel: int | tuple[int, ...], dtype: torch.dtype, adapter_dtype: torch.dtype, device: str
) -> None:
    options = {"r": 2, "lora_alpha": 3, "groups": 2, "dtype": dtype, "adapter_dtype": adapter_dtype}
    layer = trained(CONVS[dims](4, 6, kernel, device=device, **options))
    base = layer.conv.weight.detach().clone()
    for _ in range(3):
        layer.eval()
        exact = base.double() + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double()).view(base.shape)
        # One rounding of each element to dtype, and the error of summing in float32.
        once = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
        summed = 8 * torch.finfo(torch.float32).eps if dtype != torch.float64 else 1e-15
        assert ((layer.conv.weight.double() - exact).abs() <= once + summed * exact.abs().max()).all()
        assert not torch.equal(layer.conv.weight, base) and layer.conv.weight.dtype == dtype
        assert torch.equal(layer.base_weight, base)
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
        layer.train()
        assert torch.equal(bits(layer.conv.weight), bits(base))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerging_restores_numbers_that_no_arithmetic_would(dtype: torch.dtype, device: str) -> None:
    layer = trained(Conv2d(2, 4, 3, r=2, dtype=dtype, device=device))
    info = torch.finfo(dtype)
    odd = [0.0, -0.0, info.max, -info.max, info.tiny, info.tiny / 2, info.eps, float("inf"), float("nan")]
    with torch.no_grad():
        layer.conv.weight.view(-1)[: len(odd)] = torch.tensor(odd, dtype=dtype)
    base, parameter = bits(layer.conv.weight).clone(), layer.conv.weight
    layer.eval().train()
    assert torch.equal(bits(layer.conv.weight), base) and layer.conv.weight is parameter


@parametrize_case([BY_NAME["1d"], BY_NAME["2d-non-square-same-groups"], BY_NAME["3d-non-cubic"]])
def test_an_adapter_changed_in_place_while_merged_takes_effect_with_eval(case: Case, device: str) -> None:
    layer = case.build(device=device)
    base = layer.conv.weight.detach().clone()
    layer.eval()
    with torch.no_grad():
        layer.lora_A.mul_(2)
        layer.lora_B.add_(1)
    layer.eval()
    assert_follows_the_definition(case, layer, draw(case.x_shape, 5, torch.float32, device), frozen=True)
    assert torch.equal(bits(layer.train().conv.weight), bits(base))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_casting_while_merged_casts_the_base_and_merges_anew(dims: int, dtype: torch.dtype, device: str) -> None:
    layer = trained(CONVS[dims](4, 6, 2, r=2, device=device))
    expected = copy.deepcopy(layer).to(dtype)
    layer.eval().to(dtype)
    assert layer.merged and torch.equal(bits(layer.conv.weight), bits(copy.deepcopy(expected).eval().conv.weight))
    assert torch.equal(bits(layer.train().conv.weight), bits(expected.conv.weight))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_loading_while_merged_takes_effect_and_unmerges_cleanly(nested: bool, assign: bool, device: str) -> None:
    source, target = (trained(Conv2d(4, 6, 3, r=2, device=device)) for _ in range(2))
    nn.init.normal_(source.lora_B)
    owner = nn.Sequential(target) if nested else target
    owner.eval()
    state = source.state_dict(prefix="0." if nested else "")
    owner.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=assign)
    merged = copy.deepcopy(source).eval()
    assert target.merged and torch.equal(target.conv.weight, merged.conv.weight)
    owner.train()
    for name, tensor in source.state_dict().items():
        assert torch.equal(bits(target.state_dict()[name]), bits(tensor)), name
    assert not target.conv.weight.requires_grad


def test_an_adapter_alone_loads_into_a_merged_layer(device: str) -> None:
    source, target = trained(Conv2d(4, 6, 3, r=2, device=device)), Conv2d(4, 6, 3, r=2, device=device).eval()
    base = target.conv.weight.detach().clone()
    target.load_state_dict(fused_lora.lora_state_dict(source), strict=False)
    update = source.scaling * (source.lora_B @ source.lora_A).view(base.shape)
    # float32's rounding of numbers around 1, some ten of them summed.
    torch.testing.assert_close(target.conv.weight, base + update, rtol=0, atol=1e-5)
    assert torch.equal(bits(target.train().conv.weight), bits(base))


def test_a_load_that_fails_leaves_a_merged_layer_merged(device: str) -> None:
    layer = trained(Conv2d(4, 6, 3, r=2, device=device))
    base = layer.conv.weight.detach().clone()
    merged = layer.eval().conv.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"conv\.weight"):
        layer.load_state_dict({"conv.weight": torch.zeros(1), "conv.bias": torch.zeros(6)})
    assert layer.merged and torch.equal(layer.conv.weight, merged)
    assert torch.equal(bits(layer.train().conv.weight), bits(base))


@pytest.mark.parametrize("keep_vars", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_state_dict_holds_the_base_in_either_mode(nested: bool, keep_vars: bool, device: str) -> None:
    layer = trained(Conv2d(4, 6, 3, r=2, device=device))
    owner = nn.Sequential(nn.ReLU(), layer) if nested else layer
    before = {name: t.detach().clone() for name, t in owner.state_dict().items()}
    after = owner.eval().state_dict(keep_vars=keep_vars)
    assert layer.merged and list(after) == list(before)
    for name, tensor in after.items():
        assert torch.equal(bits(tensor), bits(before[name])), name
        assert isinstance(tensor, nn.Parameter) == keep_vars, name
    restored = trained(Conv2d(4, 6, 3, r=2, device=device)).eval()
    restored.load_state_dict({name.removeprefix("1."): tensor for name, tensor in after.items()})
    assert torch.equal(restored.conv.weight, layer.conv.weight), "saving merged and loading merged merges once"


def test_a_convolution_that_shares_the_weight_never_sees_the_adapter(device: str) -> None:
    layer, other = trained(Conv2d(4, 6, 3, r=2, device=device)), nn.Conv2d(4, 6, 3, device=device)
    other.weight = layer.conv.weight
    base = other.weight.detach().clone()
    layer.eval()
    assert torch.equal(other.weight, base)
    assert layer.train().conv.weight is other.weight


CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("last_x", [False, True], ids=["first-x", "last-x"])
@pytest.mark.parametrize("last_weight", [False, True], ids=["first-weight", "last-weight"])
@parametrize_case([BY_NAME["2d"], BY_NAME["2d-non-square-same-groups"], BY_NAME["3d-non-cubic"]])
def test_channels_last_weights_and_inputs(
    case: Case, last_weight: bool, last_x: bool, dropout: float, device: str
) -> None:
    layer = case.build(lora_dropout=dropout, device=device)
    x = draw(case.x_shape, 5, torch.float32, device)
    if last_weight:
        layer.to(memory_format=CHANNELS_LAST[case.dims])
    if last_x:
        x = x.to(memory_format=CHANNELS_LAST[case.dims])
    base, strides = layer.conv.weight.detach().clone(), layer.conv.weight.stride()
    layer.weight.requires_grad = True
    keep = torchs_mask(x, 8) if dropout > 0 else None
    torch.manual_seed(8)
    assert_follows_the_definition(case, layer, x, keep)
    layer.weight.requires_grad = False
    assert_follows_the_definition(case, layer.eval(), x, frozen=True)
    layer.train()
    assert torch.equal(bits(layer.conv.weight), bits(base)) and layer.conv.weight.stride() == strides


@pytest.mark.parametrize("last_x", [False, True], ids=["first-x", "last-x"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_channels_last_layer_stays_channels_last_as_loralibs(mode: bool, last_x: bool, device: str) -> None:
    x = draw((2, 4, 6, 5), 5, torch.float32, device)
    if last_x:
        x = x.to(memory_format=torch.channels_last)
    strides = []
    for module in (fused_lora, loralib):
        layer = trained(module.Conv2d(4, 6, 3, r=2, device=device)).to(memory_format=torch.channels_last)
        layer.train(mode)
        with torch.no_grad():
            strides.append({"y": layer(x).stride(), "weight": layer.conv.weight.stride()})
    assert strides[0] == strides[1]


def test_changing_the_memory_format_while_merged_changes_the_bases(device: str) -> None:
    layer = trained(Conv2d(4, 6, 3, r=2, device=device))
    base = layer.conv.weight.detach().clone()
    layer.eval().to(memory_format=torch.channels_last).train()
    assert layer.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer.conv.weight, base)


# ---- checkpoints ----


def checkpoint(layout: str, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the published loralib layouts hold, and the entries they stand for. "main" holds one tensor twice."""
    source = trained(loralib.Conv2d(4, 6, 3, r=2, device=device))
    wheel = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    assert list(wheel) == ["lora_A", "lora_B", "conv.weight", "conv.bias"]
    plain = {"weight": wheel["conv.weight"], "bias": wheel["conv.bias"]}
    if layout == "plain":
        return plain, {f"conv.{name}": tensor for name, tensor in plain.items()}
    return (wheel if layout == "0.1.2" else {**plain, **wheel}), wheel


@pytest.mark.parametrize("merged", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("nested", [False, True], ids=["root", "nested"])
@pytest.mark.parametrize("layout", ["0.1.2", "main", "plain"])
def test_published_checkpoints_load_strictly_and_are_left_as_they_are(
    layout: str, nested: bool, merged: bool, device: str
) -> None:
    given, expected = checkpoint(layout, device)
    layer = trained(Conv2d(4, 6, 3, r=2, device=device))
    adapter = {name: layer.state_dict()[name].clone() for name in ("lora_A", "lora_B")}
    prefix = "blocks.1." if nested else ""
    model = nn.ModuleDict({"blocks": nn.Sequential(nn.ReLU(), layer)}) if nested else layer
    model.train(not merged)
    given = {prefix + name: tensor for name, tensor in given.items()}
    before = {name: (tensor, tensor.clone()) for name, tensor in given.items()}
    report = model.load_state_dict(given, strict=True)
    assert not report.missing_keys and not report.unexpected_keys
    for name, tensor in {**adapter, **expected}.items():
        assert torch.equal(layer.state_dict()[name], tensor), name
    model.train()
    assert torch.equal(layer.conv.weight, expected["conv.weight"])
    assert list(given) == list(before)
    assert all(given[name] is tensor and torch.equal(tensor, kept) for name, (tensor, kept) in before.items())


@pytest.mark.parametrize("dims", [1, 3])
def test_plain_checkpoints_of_other_dimensions_load_strictly(dims: int) -> None:
    plain, layer = PLAIN[dims](4, 6, 3, bias=False), CONVS[dims](4, 6, 3, r=2, bias=False)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.conv.weight, plain.weight)


def test_a_plain_checkpoint_loads_into_a_layer_of_rank_0() -> None:
    plain, layer = nn.Conv2d(4, 6, 3), Conv2d(4, 6, 3)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.conv.weight, plain.weight) and torch.equal(layer.conv.bias, plain.bias)


def test_a_checkpoint_of_loralibs_main_loads_from_a_file() -> None:
    given, expected = checkpoint("main", "cpu")
    file = io.BytesIO()
    torch.save(given, file)
    file.seek(0)
    layer = Conv2d(4, 6, 3, r=2)
    layer.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in expected.items())


def aliased(tensor: Tensor) -> dict[str, Tensor]:
    """One tensor under both names, as a state_dict() of loralib's main gives it: two views of one storage."""
    adapter = {"lora_A": torch.zeros(6, 12), "lora_B": torch.zeros(18, 6)}
    bias = torch.zeros(6, device=tensor.device)
    return {
        "weight": tensor.detach(),
        "bias": bias.detach(),
        **adapter,
        "conv.weight": tensor.detach(),
        "conv.bias": bias.detach(),
    }


def test_one_tensor_under_both_names_loads_though_it_holds_nan() -> None:
    """A diverged model's checkpoint: NaN is not equal to itself, yet the tensors do not differ."""
    layer = Conv2d(4, 6, 3, r=2)
    layer.load_state_dict(aliased(torch.full((6, 4, 3, 3), float("nan"))))
    assert layer.conv.weight.isnan().all()


def test_one_meta_tensor_under_both_names_can_be_assigned() -> None:
    layer = Conv2d(4, 6, 3, r=2)
    layer.load_state_dict(aliased(torch.empty(6, 4, 3, 3, device="meta")), assign=True)
    assert layer.conv.weight.is_meta


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("nested", [False, True], ids=["root", "nested"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_that_differs_from_the_convolutions_is_an_error(name: str, nested: bool, strict: bool) -> None:
    given, _ = checkpoint("main", "cpu")
    given[name] = given[name] + 1
    layer = Conv2d(4, 6, 3, r=2)
    model, prefix = (nn.Sequential(layer), "0.") if nested else (layer, "")
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict({prefix + key: tensor for key, tensor in given.items()}, strict=strict)
    assert f"{prefix}{name} and {prefix}conv.{name} differ" in str(raised.value)


def test_only_the_adapter_may_be_missing_and_only_from_a_checkpoint_without_one() -> None:
    plain = nn.Conv2d(4, 6, 3).state_dict()
    for given, words in [
        ({"wieght": plain["weight"], "bias": plain["bias"]}, ["wieght", "conv.weight", "lora_A"]),
        ({"weight": plain["weight"]}, ["conv.bias"]),
        ({**plain, "lora_A": torch.zeros(6, 12)}, ["lora_B"]),
        ({**plain, "scale": torch.zeros(1)}, ["scale"]),
    ]:
        with pytest.raises(RuntimeError) as raised:
            Conv2d(4, 6, 3, r=2).load_state_dict(given)
        assert all(f'"{word}"' in str(raised.value) for word in words), given.keys()


def test_a_neighbours_missing_key_is_still_reported() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Conv2d(4, 6, 3, r=2), nn.Linear(2, 2))
    given = {f"1.{name}": tensor for name, tensor in nn.Conv2d(4, 6, 3).state_dict().items()}
    report = model.load_state_dict(given, strict=False)
    assert report.missing_keys == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_ours_loads_into_loralibs(mode: bool, device: str) -> None:
    ours = trained(Conv2d(4, 6, 3, r=2, lora_alpha=3, device=device)).train(mode)
    theirs = loralib.Conv2d(4, 6, 3, r=2, lora_alpha=3, device=device)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.train()
    oracle = copy.deepcopy(theirs).double()
    x = draw((2, 4, 6, 5), 5, torch.float32, device)
    mine, other, exact = step(ours, x), step(theirs, x), step(oracle, x.double())
    for name, value in mine.items():
        assert_as_accurate_as(value, other[name], exact[name], name)


# ---- torch ----


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pickles_deepcopies_and_saves(dims: int, mode: bool) -> None:
    layer = trained(CONVS[dims](4, 6, 2, r=2)).train(mode)
    x = draw((2, 4, *SIZES[dims]), 5, torch.float32, "cpu")
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), torch.load(buffer, weights_only=False))
    with torch.no_grad():
        expected = layer(x)
        base = bits(layer.train().conv.weight)
        for copied in copies:
            assert copied.merged != mode and torch.equal(copied(x), expected)
            for name, tensor in copied.state_dict().items():
                assert torch.equal(tensor, layer.state_dict()[name]), name
            assert torch.equal(bits(copied.train().conv.weight), base)
            copied.conv.weight.zero_()
        assert torch.equal(bits(layer.conv.weight), base)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_meta_device_then_to_empty_then_reset_parameters(dims: int) -> None:
    layers = []
    for device in ("meta", "cpu"):
        layer = CONVS[dims](4, 6, 2, r=2, device=device).to_empty(device="cpu")
        torch.manual_seed(1)
        layer.reset_parameters()
        layers.append(layer)
    for mine, other in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert torch.equal(mine, other)
