"""Where the fused ops compute something else than PEFT would, PEFT's own forward runs, and `report` says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from test_peft import BASES, DOUBLE, HALF, IN, OUT, SINGLE, fill, layer_of, outputs_and_gradients, peft_model
from test_peft import tokens as indices
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fused_lora

peft = pytest.importorskip("peft", reason="peft is not installed")

from accelerate.hooks import ModelHook, add_hook_to_module  # noqa: E402

import fused_lora.peft as fused_peft  # noqa: E402

LAYER = "base_model.model.layer"


@dataclass
class Case:
    """A model in a state that the ops do not cover.

    reason: what the report says; None for what only the call shows. around: what the calls happen under.
    """

    model: Any
    reason: str | None
    x: Tensor
    kwargs: dict[str, Any]
    around: Callable[[Any], AbstractContextManager[Any]] = lambda model: nullcontext()


CASES: dict[str, Callable[[], Case]] = {}


def state(
    reason: str | None, base: str | Callable[[], nn.Module] = "Linear", dtype: torch.dtype = SINGLE, **options: Any
) -> Callable[..., Any]:
    """Registers a function that puts an accelerated model of one layer into the state its name says."""

    def register(prepare: Callable[[Case], None]) -> Callable[[Case], None]:
        def make() -> Case:
            unknown = options.keys() - {field.name for field in fields(peft.LoraConfig)}
            if unknown:
                pytest.skip(f"peft {peft.__version__} has no {', '.join(unknown)}")
            torch.manual_seed(0)
            layer = (BASES[base] if isinstance(base, str) else base)()
            x = indices(6) if isinstance(layer, nn.Embedding) else torch.randn(6, IN).to(dtype)
            case = Case(fused_peft.accelerate(peft_model(layer, dtype, **options)), reason, x, {})
            prepare(case)
            return case

        CASES[prepare.__name__] = make
        return prepare

    return register


class Quantised(nn.Linear):
    """A subclass that computes something of its own, as a quantised layer does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Wrapped(Tensor):
    """A tensor of another class, as DTensor and quantised tensors are."""


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Hook(ModelHook):
    """One of accelerate's, which put their own forward on the instance."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 2 * output


def add_second_adapter(model: Any, **options: Any) -> None:
    model.add_adapter("second", peft.LoraConfig(**{"target_modules": ["layer"], "r": 2} | options))
    fill(model)


@state("its adapters are disabled")
def disabled(case: Case) -> None:
    case.model.base_model.disable_adapter_layers()
    layer_of(case.model).base_layer.weight.requires_grad = True


@state("merged into its weight: default")
def merged(case: Case) -> None:
    case.model.merge_adapter()


@state("several adapters are active: default, second")
def several_adapters(case: Case) -> None:
    add_second_adapter(case.model)
    case.model.base_model.set_adapter(["default", "second"])


@state("several adapters are active: default, default")
def the_same_adapter_twice(case: Case) -> None:
    case.model.base_model.set_adapter(["default", "default"])


@state("it has no adapter of the active ones (second)")
def no_adapter_here(case: Case) -> None:
    add_second_adapter(case.model, target_modules=["other"])
    case.model.set_adapter("second")


@state(None)
def mixed_batch(case: Case) -> None:
    add_second_adapter(case.model)
    case.model.eval()
    case.kwargs["adapter_names"] = ["default", "second", "__base__", "second", "default", "default"]


@state("its adapter is of a variant, Do", use_dora=True)
def dora(case: Case) -> None:
    pass


@state("its adapter is of a variant, Do", use_dora=True, base="Conv1D")
def dora_on_conv1d(case: Case) -> None:
    pass


@state("its adapter is of a variant, DoRA")
def dora_as_older_versions_of_peft_mark_it(case: Case) -> None:
    if not hasattr(layer_of(case.model), "lora_variant"):
        pytest.skip(f"peft {peft.__version__} is such a version, and needs a magnitude, too")
    layer_of(case.model).use_dora["default"] = True


@state("its adapter is of a variant, ALoraLinearVariant", alora_invocation_tokens=[1])
def alora(case: Case) -> None:
    case.x = torch.randn(2, 3, IN)
    case.kwargs["alora_offsets"] = [1, 2]


@state("its adapter has a bias (lora_bias)", lora_bias=True)
def lora_bias(case: Case) -> None:
    nn.init.normal_(layer_of(case.model).lora_B["default"].bias)


@state("its base layer is a Quantised", base=lambda: Quantised(IN, OUT))
def another_base_class(case: Case) -> None:
    pass


@state("its lora_A is a Quantised")
def another_adapter_class(case: Case) -> None:
    layer_of(case.model).lora_A["default"].__class__ = Quantised


@state("its lora_dropout is a AlphaDropout", lora_dropout=0.5)
def another_dropout(case: Case) -> None:
    layer_of(case.model).lora_dropout["default"] = nn.AlphaDropout(0.5)


@state("its lora_dropout works in place", lora_dropout=0.5)
def dropout_in_place(case: Case) -> None:
    layer_of(case.model).lora_dropout["default"].inplace = True
    # x would be a leaf that is changed in place.
    case.model.eval()


@state("its base layer has hooks")
def forward_hook_on_the_base(case: Case) -> None:
    layer_of(case.model).base_layer.register_forward_hook(lambda module, args, output: output + 1)


@state("its base layer has hooks")
def forward_pre_hook_on_the_base(case: Case) -> None:
    layer_of(case.model).base_layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


@state("its base layer has hooks")
def backward_hook_on_the_base(case: Case) -> None:
    layer_of(case.model).base_layer.register_full_backward_hook(lambda module, dx, dy: (dx[0] + 1,))


@state("its lora_A has hooks")
def hook_on_lora_A(case: Case) -> None:
    layer_of(case.model).lora_A["default"].register_forward_hook(lambda module, args, output: output + 1)


@state("its lora_B has hooks")
def backward_pre_hook_on_lora_B(case: Case) -> None:
    layer_of(case.model).lora_B["default"].register_full_backward_pre_hook(lambda module, dy: (dy[0] + 1,))


@state("its lora_dropout has hooks")
def hook_on_the_dropout(case: Case) -> None:
    layer_of(case.model).lora_dropout["default"].register_forward_hook(lambda module, args, output: output + 1)


@state("there are hooks on every module")
def global_hook(case: Case) -> None:
    @contextmanager
    def around(model: Any) -> Iterator[None]:
        lora_A = layer_of(model).lora_A["default"]
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: output + 1 if module is lora_A else None
        )
        yield
        handle.remove()

    case.around = around


@state("the forward of its base layer was replaced on the instance")
def accelerates_hook_on_the_base(case: Case) -> None:
    add_hook_to_module(layer_of(case.model).base_layer, Hook())


@state("its base layer is a ParametrizedLinear")
def parametrized_base(case: Case) -> None:
    parametrize.register_parametrization(layer_of(case.model).base_layer, "weight", Doubled())


@state("its lora_B is a ParametrizedLinear")
def parametrized_adapter(case: Case) -> None:
    parametrize.register_parametrization(layer_of(case.model).lora_B["default"], "weight", Doubled())


@state("its base layer has hooks")
def pruned_base(case: Case) -> None:
    prune.random_unstructured(layer_of(case.model).base_layer, "weight", amount=0.5)


@state("one of its tensors is a Wrapped")
def weight_of_another_class(case: Case) -> None:
    base = layer_of(case.model).base_layer
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Wrapped), requires_grad=False)


@state(None)
def input_of_another_class(case: Case) -> None:
    case.x = case.x.as_subclass(Wrapped)


@state(None)
def sparse_input(case: Case) -> None:
    case.x = case.x.to_sparse()


@state("its base is computed in torch.float32, its lora_A is torch.bfloat16 and its lora_B torch.bfloat16")
def half_adapter_beside_float32(case: Case) -> None:
    layer_of(case.model).lora_A.to(HALF)
    layer_of(case.model).lora_B.to(HALF)


@state("its base is computed in torch.float64, its lora_A is torch.float32 and its lora_B torch.float32", dtype=DOUBLE)
def float32_adapter_beside_float64(case: Case) -> None:
    layer_of(case.model).lora_A.to(SINGLE)
    layer_of(case.model).lora_B.to(SINGLE)


@state("its base is computed in torch.bfloat16, its lora_A is torch.float32 and its lora_B torch.bfloat16")
def factors_of_two_dtypes(case: Case) -> None:
    """Which nobody computes but autocast."""
    layer_of(case.model).lora_B.to(HALF)
    case.around = lambda model: torch.autocast("cpu", dtype=HALF)


@state("its scaling is a Tensor")
def scaling_as_a_tensor(case: Case) -> None:
    layer_of(case.model).scaling["default"] = torch.tensor(1.5)


@state("its scaling is inf")
def infinite_scaling(case: Case) -> None:
    layer_of(case.model).scaling["default"] = float("inf")


@state("its adapters are disabled", base="Embedding")
def disabled_embedding(case: Case) -> None:
    case.model.base_model.disable_adapter_layers()
    layer_of(case.model).base_layer.weight.requires_grad = True


@state("merged into its weight: default", base="Embedding")
def merged_embedding(case: Case) -> None:
    case.model.merge_adapter()
    layer_of(case.model).base_layer.weight.requires_grad = True


@state("its adapter is of a variant, Do", base="Embedding", use_dora=True)
def dora_embedding(case: Case) -> None:
    pass


@state("several adapters are active: default, second", base="Embedding")
def several_embeddings(case: Case) -> None:
    add_second_adapter(case.model)
    case.model.base_model.set_adapter(["default", "second"])


@state(None, base="Embedding")
def mixed_batch_of_embeddings(case: Case) -> None:
    case.model.eval()
    case.x = indices(2, 3)
    case.kwargs["adapter_names"] = ["__base__", "default"]


@state("PEFT applies the max_norm to lora_A, too", base=lambda: nn.Embedding(IN, OUT, max_norm=0.5))
def max_norm(case: Case) -> None:
    pass


@state("its gradients are sparse", base=lambda: nn.Embedding(IN, OUT, sparse=True))
def sparse_embedding(case: Case) -> None:
    # torch has no gradient for a transposed sparse one.
    layer_of(case.model).lora_embedding_A["default"].requires_grad = False


@state("its base layer has an embed_scale", base="Embedding")
def embed_scale(case: Case) -> None:
    layer_of(case.model).base_layer.embed_scale = 3.0


@state("its base layer has hooks", base="Embedding")
def hook_on_the_embedding(case: Case) -> None:
    layer_of(case.model).base_layer.register_forward_hook(lambda module, args, output: output + 1)


@state("its lookup is tensor parallel", base="Embedding")
def parallel_embedding(case: Case) -> None:
    layer = layer_of(case.model)
    if not hasattr(layer, "input_fns"):
        pytest.skip(f"peft {peft.__version__} has no tensor parallel embeddings")
    layer.input_fns["default"] = lambda inputs: inputs[0]
    layer.output_fns["default"] = lambda output: 2 * output


@state("its base is computed in torch.float32, its lora_A is torch.bfloat16", base="Embedding")
def half_embedding_beside_float32(case: Case) -> None:
    layer_of(case.model).lora_embedding_A.to(HALF)
    layer_of(case.model).lora_embedding_B.to(HALF)


def results_of(case: Case, model: Any) -> dict[str, Tensor]:
    torch.manual_seed(2)
    with case.around(model), fused_lora.count_paths() as paths:
        results = outputs_and_gradients(model, case.x, **case.kwargs)
    assert not paths, "a fused op ran"
    return results


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported for CAUSAL_LM")
@pytest.mark.parametrize("name", CASES)
def test_pefts_own_forward_runs_bit_for_bit(name: str) -> None:
    case, same = CASES[name](), CASES[name]()
    assert isinstance(layer_of(case.model), (fused_peft.FusedLinear, fused_peft.FusedEmbedding))
    if case.reason is not None:
        with case.around(case.model):
            choice = fused_peft.report(case.model)[LAYER]
        assert choice.path == "plain" and choice.reason.startswith(case.reason)
    actual, expected = results_of(case, case.model), results_of(same, fused_peft.restore(same.model))
    assert len(actual) > 1 and actual.keys() == expected.keys()
    for key, value in actual.items():
        assert torch.equal(value.nan_to_num(), expected[key].nan_to_num()), key
