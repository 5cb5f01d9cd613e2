"""Where nobody watches, the ops' implementations are called without the ops; the numbers are the same."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

import fused_lora
from fused_lora import embedding_op, functional, linear_op, weight_op
from fused_lora.functional import effective_weight, lora_linear
from fused_lora.ops import direct, direct_gradients


class Subclass(torch.Tensor):
    pass


def tensors() -> list[torch.Tensor]:
    shapes = [(6, 10), (4, 10), (4,), (3, 10), (4, 3)]
    return [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_plain_tensors_are_direct_and_watched_ones_are_not() -> None:
    x = torch.randn(2, 2)
    assert direct(x, None, torch.nn.Parameter(x))
    assert not direct(x.as_subclass(Subclass))
    assert not direct(None, negative(x))
    assert not direct(x, torch._efficientzerotensor(2, 2))
    with FakeTensorMode() as mode:
        assert not direct(x) and not direct(mode.from_tensor(x))
    seen = []
    torch.func.vmap(lambda row: (seen.append(direct(row)), row)[1])(x)
    torch.func.grad(lambda t: (seen.append(direct(t)), t.sum())[1])(x)
    torch.jit.trace(lambda t: (seen.append(direct(t)), t + 1)[1], x, check_trace=False)
    make_fx(lambda t: (seen.append(direct(t)), t + 1)[1])(x)
    assert seen and not any(seen)


def test_a_second_backward_raises_on_every_direct_call(backend: str, device: str) -> None:
    x, weight, bias, lora_A, lora_B = (t.detach().float().to(device).requires_grad_() for t in tensors())
    table, columns = lora_A.detach().T.contiguous().requires_grad_(), torch.tensor([0, 3], device=device)
    for y in (
        functional.lora_linear(x, weight, lora_A, lora_B, bias=bias),
        functional.effective_weight(weight, lora_A, lora_B),
        functional.lora_embedding(columns, table, lora_A, lora_A.new_ones(3, 3)),
    ):
        (gradient,) = torch.autograd.grad(y.square().sum(), lora_A, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives"):
            gradient.sum().backward()


@pytest.mark.filterwarnings("ignore:Please use `torch.vmap`")
def test_a_batch_of_gradients_is_not_direct() -> None:
    x, seen = torch.randn(2, 2), []
    torch._vmap_internals._vmap(lambda row: (seen.append(direct_gradients(row, None)), row)[1])(x)
    assert seen == [False] and direct_gradients(x, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["matrix", "more dimensions", "lookups"])
def test_a_batch_of_gradients_is_one_after_another(backend: str, device: str, kind: str, dtype: torch.dtype) -> None:
    """As functional.jacobian(vectorize=True) asks for; they have a shape, and no memory."""
    x = torch.randn(6, 16) if kind == "matrix" else torch.randn(2, 3, 16)
    given = x, torch.randn(32, 16), torch.randn(4, 16), torch.randn(32, 4)
    x, weight, lora_A, lora_B = (t.to(device, dtype).requires_grad_() for t in given)
    if kind == "lookups":
        indices = torch.tensor([[2, 0], [1, 1]], device=device)
        y, wanted = functional.lora_embedding(indices, x[0].detach(), lora_A[:, :3], lora_B[:16]), [lora_A, lora_B]
    else:
        y, wanted = lora_linear(x, weight, lora_A, lora_B), [x, lora_A, lora_B]
    dys = torch.randn(3, *y.shape, device=device).to(dtype)
    found = torch.autograd.grad(y, wanted, dys, is_grads_batched=True, retain_graph=True)
    for number, dy in enumerate(dys):
        for batch, one in zip(found, torch.autograd.grad(y, wanted, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(batch[number], one)


def layers() -> dict[str, tuple[torch.nn.Module, torch.Tensor]]:
    """Whose adapter is not zero, and an input of each."""
    made = {
        "Linear": (fused_lora.Linear(5, 4, r=2), torch.randn(3, 5)),
        "MergedLinear": (fused_lora.MergedLinear(5, 4, r=2, enable_lora=[True, False]), torch.randn(3, 5)),
        "Embedding": (fused_lora.Embedding(7, 4, r=2), torch.tensor([1, 6, 1])),
        "Conv1d": (fused_lora.Conv1d(2, 3, 2, r=2), torch.randn(1, 2, 5)),
    }
    for layer, _ in made.values():
        for factor in (layer.lora_A, layer.lora_B):
            torch.nn.init.normal_(factor)
    return made


@pytest.mark.parametrize("name", ["Linear", "MergedLinear", "Embedding", "Conv1d"])
@pytest.mark.parametrize("wanted", ["lora_A", "lora_B"])
def test_gradients_of_a_sum_are_no_constants(name: str, wanted: str) -> None:
    """dy is one then, and what a gradient depends on is only among what was saved."""
    layer, x = layers()[name]
    first, second = (getattr(layer, factor) for factor in ("lora_A", "lora_B"))
    (gradient,) = torch.autograd.grad(layer(x).sum(), getattr(layer, wanted), create_graph=True)
    other = second if wanted == "lora_A" else first
    assert gradient.requires_grad
    with pytest.raises(RuntimeError, match="first derivatives"):
        gradient.square().sum().backward(retain_graph=True)
    # Or it says that there is no way to the other factor.
    with pytest.raises(RuntimeError, match=r"first derivatives|not have been used"):
        torch.autograd.grad(gradient.sum(), other)


def test_a_gradient_penalty_raises() -> None:
    layer, x = layers()["Linear"]
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives"):
        (gradient.norm() - 1).square().backward()
    with pytest.raises(RuntimeError, match="first derivatives"):
        torch.autograd.functional.hessian(lambda t: layer(t).square().sum(), x.detach())


def test_a_first_gradient_that_could_be_differentiated_is_the_same() -> None:
    layer, x = layers()["Linear"]
    inputs = (x.requires_grad_(), layer.lora_A, layer.lora_B)
    one, other = (torch.autograd.grad(layer(x).sum(), inputs, create_graph=wanted) for wanted in (False, True))
    assert all(map(torch.equal, one, other)) and not any(t.requires_grad for t in one)


@pytest.mark.parametrize("name", ["Linear", "MergedLinear", "Embedding", "Conv1d"])
@pytest.mark.parametrize("frozen", [True, False])
def test_forward_mode_raises(name: str, frozen: bool) -> None:
    layer, x = layers()[name]
    layer.requires_grad_(not frozen)

    def of_an_adapter(lora_A: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"lora_A": lora_A}, (x,))

    factor = layer.lora_A.detach()
    with pytest.raises(RuntimeError, match=r"autograd\.Function"):
        torch.func.jvp(of_an_adapter, (factor,), (torch.ones_like(factor),))
    if x.is_floating_point() and name != "Conv1d":
        with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
            layer(forward_ad.make_dual(x, torch.ones_like(x)))
    with forward_ad.dual_level():
        layer(x)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_numbers_are_the_ops(p: float) -> None:
    seed = torch.tensor([5]) if p > 0 else None
    results = []
    for call in (linear_op.lora_linear, torch.ops.fused_lora.lora_linear):
        torch.manual_seed(0)
        inputs = tensors()
        y = call(*inputs, [True], seed, 0.5, p, 0, 0, "auto")
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_a_watcher_still_sees_the_ops() -> None:
    x, weight, _, lora_A, lora_B = tensors()
    graph = make_fx(lambda *t: functional.lora_linear(*t))(*(t.detach() for t in (x, weight, lora_A, lora_B)))
    names = {str(node.target) for node in graph.graph.nodes}
    assert "fused_lora.lora_linear.default" in names
    indices = torch.tensor([0, 3])
    looked_up = make_fx(lambda i, *t: functional.lora_embedding(i, *t))(
        indices, weight.detach(), torch.randn(3, 4, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)
    )
    assert "fused_lora.lora_embedding.default" in {str(node.target) for node in looked_up.graph.nodes}
    added = make_fx(lambda *t: functional.effective_weight(*t))(weight.detach(), lora_A.detach(), lora_B.detach())
    assert "fused_lora.lora_effective_weight.default" in {str(node.target) for node in added.graph.nodes}


@pytest.mark.parametrize("grad", [False, True])
def test_no_op_is_entered_without_a_watcher(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidden:
        def __getattr__(self, name: str) -> None:
            raise AssertionError(f"the op {name} was entered")

    for module in (linear_op, embedding_op, weight_op):
        monkeypatch.setattr(module.torch.ops, "fused_lora", Forbidden())
    linear, embedding = fused_lora.Linear(4, 4, r=2, lora_dropout=0.1), fused_lora.Embedding(5, 4, r=2)
    conv = fused_lora.Conv1d(2, 4, 3, r=2)
    x = torch.randn(3, 4, requires_grad=True)
    with torch.set_grad_enabled(grad):
        outputs = linear(x), embedding(torch.tensor([1])), conv(torch.randn(1, 2, 5))
    if grad:
        sum(y.sum() for y in outputs).backward()


class Recording(torch.Tensor):
    """A wrapper such as a DTensor is; remembers which ops it is given to, and hands them what it wraps."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Recording:
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=True)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.__name__)
        unwrapped = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return func(*unwrapped[0], **unwrapped[1])


@pytest.mark.parametrize("which", range(5))
def test_one_watched_tensor_among_plain_ones_keeps_the_linear_ops(which: int) -> None:
    inputs = [t.detach() for t in tensors()]
    inputs[which] = Recording(inputs[which])
    # A trained lora_A, so that backward reads every saved tensor that it can.
    if which != 3:
        inputs[3].requires_grad_()
    Recording.seen.clear()
    x, weight, bias, lora_A, lora_B = inputs
    functional.lora_linear(x, weight, lora_A, lora_B, bias=bias, dropout_p=0.5, training=True, seed=3).sum().backward()
    assert "lora_linear_forward.default" in Recording.seen
    # weight and lora_A are not saved where dx is not wanted, a bias never.
    assert ("lora_linear_backward.default" in Recording.seen) == (which in (0, 4))


@pytest.mark.parametrize("which", range(3))
def test_one_watched_tensor_among_plain_ones_keeps_the_embedding_ops(which: int) -> None:
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((5, 4), (3, 5), (4, 3))]
    inputs[which] = Recording(inputs[which])
    if which != 1:
        inputs[1].requires_grad_()
    Recording.seen.clear()
    functional.lora_embedding(torch.tensor([0, 3]), *inputs).sum().backward()
    assert "lora_embedding_forward.default" in Recording.seen
    assert ("lora_embedding_backward.default" in Recording.seen) == (which == 2)


def negative(tensor: torch.Tensor) -> torch.Tensor:
    """A view that stands for the same numbers, while its memory holds their opposites."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg() and torch.equal(view, tensor)
    return view


def test_a_tensor_with_its_negative_bit_set_is_what_it_stands_for(backend: str, device: str) -> None:
    sizes = {"x": (5, 32), "weight": (48, 32), "lora_A": (4, 32), "lora_B": (48, 4), "dy": (5, 48)}
    plain = {name: torch.randn(size, device=device) for name, size in sizes.items()}
    results = []
    for tensors in (plain, {name: negative(tensor) for name, tensor in plain.items()}):
        leaves = {name: tensor.detach().requires_grad_(name != "weight") for name, tensor in tensors.items()}
        dy = leaves.pop("dy").detach()
        y = lora_linear(**leaves, dropout_p=0.3, training=True, seed=1)
        gradients = torch.autograd.grad(y, [leaves[name] for name in ("x", "lora_A", "lora_B")], dy)
        with torch.no_grad():
            again = [lora_linear(**leaves), effective_weight(leaves["weight"], leaves["lora_A"], leaves["lora_B"])]
        results.append([y, *gradients, *again])
    for once, again in zip(*results, strict=True):
        assert torch.equal(once, again)


def test_a_tensor_of_zeros_without_memory_is_read_as_zeros(backend: str, device: str) -> None:
    x, weight, bias, lora_A, lora_B = (t.detach().bfloat16().to(device) for t in tensors())
    zeros = torch._efficientzerotensor(*x.shape, dtype=x.dtype, device=device)
    assert torch.equal(lora_linear(zeros, weight, lora_A, lora_B, bias=bias), bias.expand(6, 4))
    y = lora_linear(x.requires_grad_(), weight, lora_A, lora_B, bias=bias)
    (dx,) = torch.autograd.grad(y, x, torch._efficientzerotensor(*y.shape, dtype=y.dtype, device=device))
    assert torch.equal(dx, torch.zeros_like(x))
