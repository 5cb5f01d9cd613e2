"""Merging an adapter into a state dict: which entry gains which layer's update, and the sum itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapter import Adapter, AdapterLayer
from .formats import adapter_from_state_dict, bare, is_flat
from .functional import effective_weight

# kohya's names say which model of a pipeline a layer is in: lora_unet_, lora_te1_, ...
_FLAT_PREFIX = re.compile(r"^lora_[a-z]+\d*_")


@dataclass(frozen=True)
class MergeReport:
    """What a merge does, by the keys of the base.

    merged: the key of each weight that gains an adapter, to the adapter's layer. replaced: the keys that the adapter
    has a whole entry for, as PEFT stores trained biases and modules_to_save, to the entry's name.
    missing: layers of the adapter whose weight the base lacks. unexpected: other entries that the base lacks.
    transposed: those of `merged` that are stored as (in, out). square: those whose shape does not tell, nor did the
    argument fan_in_fan_out or this package's file; they were taken as PEFT's config says, if there is one, otherwise as
    (out, in).
    unscaled: whether the adapter stores no lora_alpha, so that its layers are merged with scaling 1.
    tied: what a base whose config.json ties its output head to its embeddings cannot hold apart: keys of changed
        embeddings, which change the head too, and entries for the head, which has no weight. Only `merge_file` of a
        folder or an index sees the config.
    """

    merged: Mapping[str, str]
    replaced: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    transposed: frozenset[str]
    square: tuple[str, ...]
    unscaled: bool
    tied: tuple[str, ...] = ()


def merge_lora_into_state_dict(
    base_state_dict: Mapping[str, Tensor],
    lora_state_dict: Mapping[str, Tensor] | Adapter,
    alpha: float = 1.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.bfloat16,
    *,
    fan_in_fan_out: bool | None = None,
    enable_lora: Sequence[bool] | None = None,
) -> dict[str, Tensor]:
    """The base with every layer's alpha · scaling · B A added to its weight; ROLL's function of this name.

    base_state_dict: never changed; what no layer is for is in the result as it is, the very same tensors.
    lora_state_dict: keys of any of `formats.FORMATS`, with or without an adapter's name and the prefixes
        base_model.model., diffusion_model., transformer. and unet.; or an adapter of `adapter_io.read_adapter`.
        Entries that are whole weights or biases of the base, as PEFT stores them, replace the base's.
    alpha: a factor beside the stored scaling, lora_alpha / r; where none is stored, as in ROLL's files, the only one.
    device: where merged and replaced tensors are computed and stay. dtype: theirs, floating-point of 16 bits or more;
        None is the base's. The sum is taken in float32, or float64 if a tensor is, and rounded once.
    fan_in_fan_out: whether square weights are stored as (in, out), as GPT-2's Conv1D has them; other weights' shapes
        say it themselves. None takes what this package's files say of each layer. Of others it takes what the adapter's
        PEFT config says, which is one word for the whole model, and otherwise (out, in), as torch.nn.Linear has it;
        `merge_report` names such weights. It is refused if other weights of the same adapter are stored the other way.
    enable_lora: for layers of loralib's MergedLinear, whose files do not store it. With a single enabled slice, the
        base's shapes say which layers these are.

    Raises ValueError if no layer matches, half a layer is missing, a shape or dtype does not fit, fan_in_fan_out or
    enable_lora must be given, or a result is not finite where the base is; and what `adapter_from_state_dict` raises.
    """
    check_dtype(dtype)
    adapter = _prepared(lora_state_dict, enable_lora)
    report = plan_merge(base_state_dict, adapter, fan_in_fan_out)
    merged = dict(base_state_dict)
    for key in (*report.merged, *report.replaced):
        merged[key] = merged_tensor(key, base_state_dict[key], adapter, report, alpha, device, dtype)
    return merged


def merge_report(
    base_state_dict: Mapping[str, Tensor],
    lora_state_dict: Mapping[str, Tensor] | Adapter,
    *,
    fan_in_fan_out: bool | None = None,
    enable_lora: Sequence[bool] | None = None,
) -> MergeReport:
    """What `merge_lora_into_state_dict` would do with these arguments. The tensors may be on the meta device.

    Raises the same errors.
    """
    return plan_merge(base_state_dict, _prepared(lora_state_dict, enable_lora), fan_in_fan_out)


def base_names(base_state_dict: Mapping[str, Tensor], adapter: Adapter) -> dict[str, str]:
    """The base's path, with its dots, for each layer of the adapter and owner of others that has an entry there."""
    find = _Finder(base_state_dict)
    found = [(_owner(name), find.entry(name)) for name in adapter.others]
    found += [(path, find.weight_of(path)) for path in adapter.layers]
    return {path: _owner(key) for path, key in found if key is not None}


def with_slices_of(base_state_dict: Mapping[str, Tensor], adapter: Adapter) -> Adapter:
    """The adapter, where layers that may be a MergedLinear of one enabled slice are what the base's shapes say.

    Raises ValueError if none of them is one.
    """
    undecided = {path: layer for path, layer in adapter.layers.items() if layer.kind == "linear" and layer.enable_lora}
    find = _Finder(base_state_dict)
    keys = {path: find.weight_of(path) for path in undecided}
    decided = {path: _with_slices_of(base_state_dict[key], undecided[path]) for path, key in keys.items() if key}
    if undecided and not any(layer.kind == "merged" for layer in decided.values()):
        slices = next(iter(undecided.values())).enable_lora or ()
        raise ValueError(f"enable_lora is {list(slices)}; expected a layer with a slice of its weight's rows.")
    return replace(adapter, layers={**adapter.layers, **decided})


def _with_slices_of(weight: Tensor, layer: AdapterLayer) -> AdapterLayer:
    if layer.kind != "linear" or layer.enable_lora is None:
        return layer
    rows, columns = layer.lora_B.shape[0] * len(layer.enable_lora), layer.lora_A.shape[1]
    if tuple(weight.shape) in ((rows, columns), (columns, rows)):
        return replace(layer, kind="merged")
    return replace(layer, enable_lora=None)


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


def _prepared(lora: Mapping[str, Tensor] | Adapter, enable_lora: Sequence[bool] | None) -> Adapter:
    adapter = lora if isinstance(lora, Adapter) else adapter_from_state_dict(lora)
    return adapter if enable_lora is None else adapter.with_enable_lora(enable_lora)


def plan_merge(base: Mapping[str, Tensor], adapter: Adapter, fan_in_fan_out: bool | None) -> MergeReport:
    """`merge_report` of an adapter that has its enable_lora."""
    adapter = with_slices_of(base, adapter)
    find = _Finder(base)
    merged: dict[str, str] = {}
    missing, unexpected, transposed, square = [], [], set(), []
    for path, layer in adapter.layers.items():
        key = find.weight_of(path)
        if key is None:
            missing.append(path)
            continue
        if key in merged:
            raise ValueError(f"Layers {merged[key]!r} and {path!r} are both for {key!r}; expected one.")
        merged[key] = path
        weight = base[key]
        if not _is_wide(weight.dtype):
            raise ValueError(f"{key!r} is {weight.dtype}; expected a floating-point weight of 16 bits or more.")
        orientation = _orientation(key, weight, layer)
        if orientation == "transposed":
            transposed.add(key)
        elif orientation == "square":
            square.append(key)
    if not merged:
        example = next(iter(adapter.layers))
        raise ValueError(f"No layer of the adapter is in the base; expected, for example, a weight for {example!r}.")
    replaced: dict[str, str] = {}
    for name, tensor in adapter.others.items():
        key = find.entry(name)
        if key is None or key in replaced:
            unexpected.append(name)
            continue
        if base[key].shape != tensor.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(tensor.shape)}; expected {tuple(base[key].shape)}, the base's."
            )
        if tensor.dtype != base[key].dtype and not (_is_wide(tensor.dtype) and _is_wide(base[key].dtype)):
            raise ValueError(
                f"{name!r} is {tensor.dtype} and the base's {base[key].dtype}; expected the same, or floating-point "
                "dtypes of 16 bits or more."
            )
        replaced[key] = name
    if fan_in_fan_out is None:
        taken = {key: bool(adapter.stored_transposed(path)) for key, path in merged.items()}
        _check_not_contradicted(taken, square, adapter, merged, transposed, base)
    else:
        taken = dict.fromkeys(merged, fan_in_fan_out)
    transposed |= {key for key in square if taken[key]}
    told = fan_in_fan_out is not None
    square = [key for key in square if not told and adapter.layers[merged[key]].fan_in_fan_out is None]
    unscaled = all(adapter.layers[path].lora_alpha is None for path in merged.values())
    return MergeReport(
        merged, replaced, tuple(missing), tuple(unexpected), frozenset(transposed), tuple(square), unscaled
    )


def merged_tensor(
    key: str,
    base: Tensor,
    adapter: Adapter,
    report: MergeReport,
    alpha: float,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> Tensor:
    """What a key of report.merged or report.replaced is in the merged state dict: a new tensor.

    Raises ValueError if it is not finite where the base is.
    """
    dtype = merged_dtype(base, dtype)
    whole = adapter.others[report.replaced[key]].detach() if key in report.replaced else base
    if key in report.merged:
        layer = _whole_layer(base, adapter.layers[report.merged[key]])
        result = _with_update(key, whole, layer, key in report.transposed, alpha, device).to(dtype)
    else:
        result = whole.to(device, dtype, copy=True)
    if _is_wide(dtype) and not result.is_meta and not bool(result.isfinite().all()):
        lost = base.isfinite().to(result.device) & ~result.isfinite()
        if bool(lost.any()):
            raise ValueError(f"{key!r} has {int(lost.sum())} elements that are not finite as {dtype}; expected none.")
    return result


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError for a dtype that no merged tensor can have."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and _is_wide(dtype)):
        raise ValueError(f"dtype is {dtype!r}; expected a floating-point dtype of 16 bits or more.")


def merged_dtype(base: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Of what is merged or replaced: dtype, or the base's if that is None or the base holds whole numbers or codes."""
    return base.dtype if dtype is None or not _is_wide(base.dtype) else dtype


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2


def _with_update(
    key: str, base: Tensor, layer: AdapterLayer, transposed: bool, alpha: float, device: torch.device | str
) -> Tensor:
    factor = alpha * (1.0 if layer.scaling is None else layer.scaling)
    if not abs(factor) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{key!r}: scaling is {factor}; expected a finite number of float32.")
    wide = torch.promote_types(torch.promote_types(base.dtype, torch.float32), layer.lora_A.dtype)
    wide = torch.promote_types(wide, layer.lora_B.dtype)
    weight, lora_A, lora_B = (t.detach().to(device, wide) for t in (base, layer.lora_A, layer.lora_B))
    if layer.loralib_conv or (lora_A.dim() == 2 and weight.dim() > 2):
        return effective_weight(weight, lora_A, lora_B, scaling=factor)
    lora_A, lora_B = lora_A.flatten(1), lora_B.flatten(1)
    if transposed:
        lora_A, lora_B = lora_B.T, lora_A.T
    matrix = weight.reshape(lora_B.shape[0], lora_A.shape[1])
    return effective_weight(matrix, lora_A, lora_B, scaling=factor).view(weight.shape)


def _whole_layer(weight: Tensor, layer: AdapterLayer) -> AdapterLayer:
    """layer.dense(), where every slice has an adapter if the shapes leave no other choice."""
    layer = _with_slices_of(weight, layer)
    if layer.kind == "merged" and layer.enable_lora is None and layer.lora_B.shape[0] in weight.shape:
        layer = replace(layer, enable_lora=(True,) * (layer.lora_A.shape[0] // layer.r))
    return layer.dense()


def _orientation(key: str, weight: Tensor, layer: AdapterLayer) -> str:
    """How the weight is stored: "plain", (out, in, ...); "transposed", (in, out); "square", its shape does not tell."""
    try:
        layer = _whole_layer(weight, layer)
    except ValueError as error:
        raise ValueError(f"{key!r}: {error}") from error
    shape, rows, columns = tuple(weight.shape), layer.lora_B.shape[0], layer.lora_A.shape[1]
    kernel = tuple(layer.lora_A.shape[2:])
    plain, transposed = (rows, columns), (columns, rows)
    if layer.kind == "embedding" and shape == transposed:
        return "transposed"
    if layer.kind == "linear" and shape == plain:
        return "square" if rows == columns else "plain"
    if layer.kind == "linear" and shape == transposed:
        return "transposed"
    # A convolution of kernel size 1 and a linear layer are the same; old diffusers files have one for the other.
    same_kernel = shape[2:] == kernel or {*shape[2:], *kernel} <= {1}
    if layer.kind != "embedding" and shape[:2] == plain and same_kernel:
        return "plain"
    if layer.kind != "embedding" and not kernel and len(shape) > 2 and _loralib_conv_fits(shape, rows, columns):
        return "plain"
    raise ValueError(
        f"{key!r} has shape {shape}; lora_A {tuple(layer.lora_A.shape)} and lora_B {tuple(layer.lora_B.shape)} of its "
        "adapter fit no such weight."
    )


def _loralib_conv_fits(shape: tuple[int, ...], rows: int, columns: int) -> bool:
    """Whether B A (rows, columns) has a convolution's elements: rows are out / groups · k0, columns in · k1 · ..."""
    out, in_per_group, first, *others = shape
    taps = torch.Size(others).numel()
    groups = columns // (in_per_group * taps) if in_per_group * taps else 0
    return groups > 0 and out % groups == 0 and (rows, columns) == (out // groups * first, in_per_group * groups * taps)


def _check_not_contradicted(
    taken: Mapping[str, bool],
    square: Sequence[str],
    adapter: Adapter,
    merged: Mapping[str, str],
    transposed: set[str],
    base: Mapping[str, Tensor],
) -> None:
    linear = {key for key, path in merged.items() if adapter.layers[path].kind in ("linear", "merged")}
    told = {key for key in linear if base[key].dim() == 2} - set(square)
    contrary = {key for key in told if taken[key] != (key in transposed)}
    if square and contrary:
        raise ValueError(
            f"{square[0]!r} is square and would be taken as {'(in, out)' if taken[square[0]] else '(out, in)'}, but "
            f"{min(contrary)!r} is stored the other way; expected fan_in_fan_out as an argument."
        )


class _Finder:
    """Finds a layer's weight in a base whose names may have other prefixes than the adapter's."""

    def __init__(self, base: Mapping[str, Tensor]) -> None:
        self._base = base
        self._bare: dict[str, list[str]] = {}
        self._flat: dict[str, list[str]] = {}
        for key in base:
            self._bare.setdefault(bare(key), []).append(key)
            if key.endswith(".weight"):
                flat = bare(key).removesuffix(".weight").replace(".", "_")
                self._flat.setdefault(flat, []).append(key)

    def weight_of(self, path: str) -> str | None:
        """The key of a layer's weight; loralib's convolutions have it one level deeper."""
        prefix = f"{path}." if path else ""
        key = self.entry(f"{prefix}weight") or self.entry(f"{prefix}conv.weight")
        if key is None and is_flat(path):
            return self._one(path, self._flat.get(_FLAT_PREFIX.sub("", path), []))
        return key

    def entry(self, name: str) -> str | None:
        """The key of this name, or the only one that differs from it in its prefixes alone."""
        return name if name in self._base else self._one(name, self._bare.get(bare(name), []))

    @staticmethod
    def _one(name: str, keys: Sequence[str]) -> str | None:
        if len(keys) > 1:
            raise ValueError(f"{name!r} may be {keys[0]!r} or {keys[1]!r} of the base; expected one of them.")
        return keys[0] if keys else None
