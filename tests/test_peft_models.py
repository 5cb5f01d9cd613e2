"""Whole transformers models with PEFT adapters: everything a user does with them goes on as before."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_lora

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from test_peft import fill  # noqa: E402

import fused_lora.peft as fused_peft  # noqa: E402

VOCABULARY = 32


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


TARGETS = {llama: ["q_proj", "v_proj", "down_proj", "embed_tokens"], gpt2: ["c_attn", "c_proj", "wte"]}
MODELS = pytest.mark.parametrize("make", TARGETS)


def with_adapter(make: Callable[[], nn.Module], **options: Any) -> Any:
    """A model whose adapters are trained enough to matter."""
    options = {"target_modules": TARGETS[make], "r": 2, "lora_alpha": 4, "fan_in_fan_out": make is gpt2} | options
    model = peft.get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    fill(model)
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.detach()


def lora_gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close_in_float32(actual: Any, expected: Any) -> None:
    """Two layers of sums over 32 terms, in another order: some tens of float32's rounding units."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@MODELS
def test_numbers_of_a_model(make: Callable[[], nn.Module], ids: Tensor, backend: str, device: str) -> None:
    model, ids = with_adapter(make).to(device), ids.to(device)
    expected, gradients = logits(model, ids), lora_gradients(model, ids)
    assert fused_peft.accelerate(model) is model
    layers = fused_peft.report(model)
    assert {choice.path for choice in layers.values()} == {backend}
    with fused_lora.count_paths() as paths:
        assert_close_in_float32(logits(model, ids), expected)
    assert paths.total() == len(layers)
    actual = lora_gradients(model, ids)
    assert actual.keys() == gradients.keys() and all("lora_" in name for name in actual)
    assert_close_in_float32(actual, gradients)


@MODELS
def test_there_and_back(make: Callable[[], nn.Module], ids: Tensor) -> None:
    model = with_adapter(make)
    before, classes = model.state_dict(keep_vars=True), [type(m) for m in model.modules()]
    expected = logits(model, ids)
    for _ in range(2):
        fused_peft.accelerate(model)
    after = model.state_dict(keep_vars=True)
    assert list(before) == list(after) and all(before[key] is after[key] for key in before)
    assert classes != [type(m) for m in model.modules()]
    for _ in range(2):
        assert fused_peft.restore(model) is model
    assert classes == [type(m) for m in model.modules()]
    assert torch.equal(logits(model, ids), expected)


@MODELS
def test_saving_and_loading_adapters(make: Callable[[], nn.Module], ids: Tensor, tmp_path: Path) -> None:
    model = with_adapter(make)
    model.save_pretrained(tmp_path / "before")
    model.save_pretrained(tmp_path / "accelerated", safe_serialization=True)
    fused_peft.accelerate(model).save_pretrained(tmp_path / "accelerated")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "accelerated" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    loaded = fused_peft.accelerate(peft.PeftModel.from_pretrained(make(), tmp_path / "accelerated"))
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    fill(loaded)
    loaded.load_adapter(tmp_path / "accelerated", "again")
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@MODELS
def test_merging_is_pefts(make: Callable[[], nn.Module], ids: Tensor) -> None:
    model = with_adapter(make)
    expected = copy.deepcopy(model).merge_and_unload()
    merged = fused_peft.accelerate(copy.deepcopy(model)).merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in expected.modules()]
    state = expected.state_dict()
    assert state.keys() == merged.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in merged.state_dict().items())
    fused_peft.accelerate(model).merge_adapter()
    assert torch.equal(logits(model, ids), logits(expected, ids))
    plain = fused_peft.accelerate(with_adapter(make)).unload()
    assert torch.equal(logits(plain, ids), logits(make(), ids))


@MODELS
def test_disabled_adapters_leave_the_base(make: Callable[[], nn.Module], ids: Tensor) -> None:
    model = fused_peft.accelerate(with_adapter(make))
    expected = logits(model, ids)
    with model.disable_adapter(), fused_lora.count_paths() as paths:
        assert torch.equal(logits(model, ids), logits(make(), ids))
    assert not paths
    assert torch.equal(logits(model, ids), expected)


@MODELS
def test_adapters_come_and_go(make: Callable[[], nn.Module], ids: Tensor) -> None:
    """A second one that reaches further; its new layers are PEFT's until the next call of accelerate."""
    model = fused_peft.accelerate(with_adapter(make))
    first, few = logits(model, ids), len(fused_peft.report(model))
    config = peft.LoraConfig(target_modules="all-linear", r=3, lora_alpha=2, task_type="CAUSAL_LM")
    model.add_adapter("wide", config)
    fill(model.base_model.model.lm_head)
    model.set_adapter("wide")
    unchanged = [name for name, choice in fused_peft.report(model).items() if "not called" in choice.reason]
    assert unchanged and len(fused_peft.report(model)) == few + len(unchanged)
    expected = logits(fused_peft.restore(model), ids)
    fused_peft.accelerate(model)
    embedding = next(name for name in fused_peft.report(model) if name.endswith(("embed_tokens", "wte")))
    assert {name for name, choice in fused_peft.report(model).items() if choice.path == "plain"} == {embedding}
    assert_close_in_float32(logits(model, ids), expected)
    model.set_adapter("default")
    model.delete_adapter("wide")
    assert torch.equal(logits(model, ids), first)


def test_modules_to_save_and_the_rest_are_trained_as_before(ids: Tensor) -> None:
    def make() -> Any:
        return with_adapter(llama, target_modules=["q_proj"], modules_to_save=["lm_head"], bias="lora_only")

    model = make()
    expected = lora_gradients(model, ids)
    assert any("modules_to_save" in name for name in expected)
    assert_close_in_float32(lora_gradients(fused_peft.accelerate(make()), ids), expected)


def test_a_model_with_injected_adapters(ids: Tensor) -> None:
    """What a transformers model's add_adapter does: no PeftModel around it."""
    model = llama()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=2), model)
    fill(model)
    expected = logits(model, ids)
    fused_peft.accelerate(model)
    assert {choice.path for choice in fused_peft.report(model).values()} == {"reference"}
    assert_close_in_float32(logits(model, ids), expected)
    assert type(model) is transformers.LlamaForCausalLM


@MODELS
def test_copies_and_pickles(make: Callable[[], nn.Module], ids: Tensor) -> None:
    model = fused_peft.accelerate(with_adapter(make))
    expected = logits(model, ids)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert fused_peft.report(twin) == fused_peft.report(model)
        with fused_lora.count_paths() as paths:
            assert torch.equal(logits(twin, ids), expected)
        assert paths
        fill(twin)
    assert torch.equal(logits(model, ids), expected), "a copy shares its adapter"
    text = pickle.dumps(fused_peft.restore(model))
    assert b"fused_lora" not in text


@pytest.mark.parametrize("lora_dropout", [0.0, 0.2])
@MODELS
def test_gradient_checkpointing(make: Callable[[], nn.Module], lora_dropout: float, ids: Tensor) -> None:
    """Bit for bit the gradients without it, with the same masks in the second forward."""
    model = fused_peft.accelerate(with_adapter(make, lora_dropout=lora_dropout))
    model.train()
    torch.manual_seed(4)
    expected = lora_gradients(model, ids)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    torch.manual_seed(4)
    with fused_lora.count_paths() as paths:
        actual = lora_gradients(model, ids)
    # enable_input_require_grads hooks the embedding layer itself, not its base.
    assert paths["forward/reference"] > sum("wte" not in n and "embed" not in n for n in fused_peft.report(model))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@MODELS
def test_compiled(make: Callable[[], nn.Module], ids: Tensor) -> None:
    """One graph, which holds the fused ops; it follows accelerate and restore after it was compiled."""
    model = with_adapter(make, target_modules=TARGETS[make][:-1])
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain = logits(compiled, ids)
    fused_peft.accelerate(model)
    expected = lora_gradients(model, ids)
    with fused_lora.count_paths() as paths:
        actual = lora_gradients(compiled, ids)
    assert paths["forward/reference"] == len(fused_peft.report(model))
    assert actual.keys() == {f"_orig_mod.{name}" for name in expected}
    for name, gradient in expected.items():
        assert_close_in_float32(actual[f"_orig_mod.{name}"], gradient)
    fused_peft.restore(model)
    with fused_lora.count_paths() as paths:
        assert torch.equal(logits(compiled, ids), plain)
    assert not paths


@MODELS
def test_training_with_the_trainer(make: Callable[[], nn.Module], ids: Tensor, tmp_path: Path) -> None:
    """Some steps of AdamW in float64, where the two forwards agree but for roundings, give the same adapters."""
    adapters = []
    for accelerated in (False, True):
        model = with_adapter(make).double()
        if accelerated:
            fused_peft.accelerate(model)
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path / str(accelerated),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=3,
        )
        data = [{"input_ids": row, "labels": row} for row in ids]
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        with fused_lora.count_paths() as paths:
            trainer.train()
        assert bool(paths) == accelerated
        trainer.save_model(str(tmp_path / f"model {accelerated}"))
        assert (tmp_path / f"model {accelerated}" / "adapter_model.safetensors").exists()
        adapters.append({name: p.detach() for name, p in model.named_parameters() if "lora_" in name})
    untrained = {name: p.detach().double() for name, p in with_adapter(make).named_parameters() if "lora_" in name}
    expected, actual = adapters
    assert all((expected[name] - untrained[name]).abs().max() > 0.01 for name in expected)
    # AdamW divides by its gradients' size: where one is near 0 its roundings, 1e-16, weigh 1e-8 at most.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)


def test_a_model_without_a_layer_for_the_ops_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no LoRA layer to accelerate \(it has none at all\)"):
        fused_peft.accelerate(llama())
    ia3 = peft.get_peft_model(llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="it has none at all"):
        fused_peft.accelerate(ia3)
    conv = peft.get_peft_model(nn.Sequential(nn.Conv1d(2, 2, 1)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"no fused op for a peft.tuners.lora.layer.Conv1d"):
        fused_peft.accelerate(conv)
    assert fused_peft.restore(conv) is conv and str(fused_peft.report(llama())).startswith("0 of 0")


def test_restore_refuses_what_was_put_over_a_layer_and_changes_nothing() -> None:
    model = fused_peft.accelerate(with_adapter(llama))
    first, *_, last = (m for m in model.modules() if isinstance(m, fused_peft.FusedLinear))
    last.__class__ = type("Sharded", (fused_peft.FusedLinear,), {})
    with pytest.raises(RuntimeError, match=r"mlp.down_proj is a Sharded whose class or forward was replaced"):
        fused_peft.restore(model)
    last.__class__ = fused_peft.FusedLinear
    last.forward = last.forward
    with pytest.raises(RuntimeError, match=r"is a FusedLinear whose class or forward was replaced"):
        fused_peft.restore(model)
    assert type(first) is fused_peft.FusedLinear
    del last.forward
    fused_peft.restore(model)
    assert type(last) is type(first) is peft.tuners.lora.Linear


@pytest.mark.parametrize("missing", ["peft", "transformers"])
def test_without_peft_one_sentence_says_so(missing: str) -> None:
    code = f"""
import sys
class Absent:
    def find_spec(name, path, target=None):
        if name == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent)
import fused_lora
assert not {{"peft", "transformers", "fused_lora.peft"}} & set(sys.modules)
import fused_lora.peft
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: fused_lora.peft needs {missing}, which is not installed "
        "(pip install 'fused-lora[peft]')."
    )
