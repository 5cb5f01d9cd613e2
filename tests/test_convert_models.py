"""convert on whole models: GPT-2, Llama, nn.Transformer, a convolutional net, against themselves and against PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fused_lora as lora
from fused_lora.convert import convert, unconvert

VOCABULARY = 29


def gpt2() -> nn.Module:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=12, n_layer=2, n_head=2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


MODELS = {
    "gpt2": (gpt2, ["wte", "wpe", "c_attn", "c_proj", "c_fc"], "transformer.wte"),
    "llama": (llama, ["embed_tokens", "q_proj", "v_proj", "o_proj", "down_proj", "lm_head"], "model.embed_tokens"),
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def batch() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(2))


def logits(model: nn.Module) -> Tensor:
    return model(batch()).logits.detach()


def randomise(model: nn.Module, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)


@EVERY_MODEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_language_models(name: str, dtype: torch.dtype, training: bool) -> None:
    make, targets, embedding = MODELS[name]
    model = make().to(dtype).train(training)
    expected, parameters = logits(model), dict(model.named_parameters())
    keys = list(model.state_dict())
    enable_lora = {"c_attn": [True, False, True]} if name == "gpt2" else None
    replaced = convert(model, targets, r=4, lora_alpha=8, lora_dropout=0.1, enable_lora=enable_lora)
    assert {layer.name.rpartition(".")[2] for layer in replaced} == set(targets)
    assert torch.equal(logits(model), expected)
    after = dict(model.named_parameters())
    assert all(after[key] is parameter for key, parameter in parameters.items())
    assert {key for key in after.keys() - parameters.keys()} == {
        f"{layer.name}.{adapter}" for layer in replaced for adapter in ("lora_A", "lora_B")
    }
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings() is model.get_submodule(embedding)

    randomise(model)
    assert not torch.equal(logits(model), expected)
    unconvert(model, merge=False)
    assert torch.equal(logits(model), expected) and list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters.values(), strict=True))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@EVERY_MODEL
def test_merging_a_language_model(name: str) -> None:
    make, targets, _ = MODELS[name]
    model = make().double().eval()
    untouched = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    convert(model, targets, r=4, lora_alpha=8)
    randomise(model)
    expected, deployed = logits(model), lora.merged_state_dict(model)
    unconvert(model)
    # float64 rounds at 1e-16; the adapter moves the logits by parts of themselves.
    torch.testing.assert_close(logits(model), expected, rtol=1e-11, atol=1e-11)
    assert deployed.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, deployed[key]) and tensor.is_contiguous()
    for key, parameter in parameters.items():
        assert torch.equal(parameter, untouched[key]), "the base was written"


@EVERY_MODEL
def test_a_meta_language_model_gets_its_weights_later(name: str) -> None:
    make, targets, _ = MODELS[name]
    source = make().eval()
    with torch.device("meta"):
        model = make().eval()
    convert(model, targets, r=4)
    model.to_empty(device="cpu")
    model.tie_weights()
    for layer in model.modules():
        if isinstance(layer, lora.LoRALayer):
            layer.reset_parameters()
    state = source.state_dict()
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    for buffer, other in zip(model.buffers(), source.buffers(), strict=True):
        buffer.copy_(other)
    assert torch.equal(logits(model), logits(source))


@EVERY_MODEL
def test_training_equals_pefts(name: str) -> None:
    """Three steps of AdamW in float64 from the same A and B: the same losses and adapters but for rounding."""
    make, targets, _ = MODELS[name]
    targets = [target for target in targets if target != "lm_head"]
    patterns: dict[str, Any] = {
        "gpt2": {"rank_pattern": {"c_proj": 3}, "alpha_pattern": {r"h\.0.*c_fc": 5}},
        "llama": {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 3}, "alpha_pattern": {"o_proj": 5}},
    }[name]
    theirs = get_peft_model(
        make().double(),
        LoraConfig(
            r=4, lora_alpha=6, target_modules=targets, fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM", **patterns
        ),
        autocast_adapter_dtype=False,
    )
    ours = make().double()
    convert(ours, targets, 4, 6, **patterns)
    lora.mark_only_lora_as_trainable(ours)
    pairs = {}
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            key = key.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
            pairs[key.replace("lora_embedding_", "lora_")] = parameter
    mine = {key: parameter for key, parameter in ours.named_parameters() if parameter.requires_grad}
    assert mine.keys() == pairs.keys()
    generator = torch.Generator().manual_seed(4)
    for key, parameter in mine.items():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
        pairs[key].data = parameter.data.clone()

    start = {key: parameter.detach().clone() for key, parameter in mine.items()}
    losses = []
    for model, parameters in ((ours, mine.values()), (theirs, pairs.values())):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(input_ids=batch(), labels=batch()).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][2] < losses[0][0]
    # Both are right to about 1e-15, which AdamW's division by a root of squares can make larger.
    assert losses[0] == pytest.approx(losses[1], rel=1e-11)
    for key, parameter in mine.items():
        moved = (parameter - start[key]).abs().max()
        assert moved > 1e-3 and (parameter - pairs[key]).abs().max() < 1e-8 * moved, key


class Net(nn.Module):
    """Convolutions with groups, a norm with buffers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, stride=2, padding=1)
        self.pointwise = nn.Conv2d(8, 12, 1, groups=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.pointwise(self.depthwise(x))).mean((-2, -1)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolutional_net(channels_last: bool) -> None:
    model, x = Net(), torch.randn(2, 3, 8, 8)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    model.eval()
    expected, source = model(x), copy.deepcopy(model)
    convert(model, r"stem|depthwise|pointwise|head", r=2, lora_dropout=0.3)
    assert torch.equal(model(x), expected)
    model.train()
    assert torch.equal(model(x), source.train()(x))
    lora.mark_only_lora_as_trainable(model)
    model(x).square().sum().backward()
    assert all((p.grad is None) != ("lora_" in name) for name, p in model.named_parameters())
    randomise(model)
    model.double().eval()
    adapted = model(x.double())
    model.load_state_dict({**source.double().state_dict(), **lora.lora_state_dict(model)}, strict=False)
    unconvert(model)
    source.load_state_dict(model.state_dict())
    torch.testing.assert_close(source.eval()(x.double()), model(x.double()), rtol=0, atol=0)
    assert adapted.shape == expected.shape


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_transformer_encoder_does_not_pass_its_adapters_by(grad: bool, padded: bool) -> None:
    """In inference torch reads linear1 and linear2's weights without calling them, unless something stops it."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.arange(5)[None] >= torch.tensor([5, 3, 4])[:, None] if padded else None
    convert(model, ["linear1", "linear2"], r=2)
    randomise(model, scale=2.0)
    lora.mark_only_lora_as_trainable(model)
    expected = model.train()(x, src_key_padding_mask=mask).detach()
    model.eval()
    with torch.set_grad_enabled(grad):
        actual = model(x, src_key_padding_mask=mask)
    # In eval mode the attention is another program; float64 rounds at 1e-16.
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=1e-13)
    if grad:
        actual.square().sum().backward()
        assert model.layers[1].linear1.lora_A.grad is not None
    unconvert(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nested_tensors_of_a_transformer_encoder_need_merged_layers() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, mask = torch.randn(2, 3, 8), torch.tensor([[False, False, False], [False, True, True]])
    convert(model, ["linear1", "linear2"], r=2, merge_weights=True)
    randomise(model)
    with torch.no_grad():
        with pytest.raises(TypeError, match=r"x is a nested tensor.*; expected a plain one"):
            model(x, src_key_padding_mask=mask)
        model.use_nested_tensor = False
        expected = model(x, src_key_padding_mask=mask)
        model.use_nested_tensor = True
        model.eval()
        actual = model(x, src_key_padding_mask=mask)
    # Another program for each product, in float32; what is padding differs, being zero in one of them.
    torch.testing.assert_close(actual[~mask], expected[~mask], rtol=1e-4, atol=1e-5)


def test_nn_transformer() -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True, dropout=0.0)
    source, target = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    expected = model(source, target)
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.self_attn\.out_proj is a NonDynamicallyQuantizableLin"):
        convert(model, ["linear1", "out_proj"], r=2)
    with pytest.raises(ValueError, match=r"nn\.MultiheadAttention never calls"):
        convert(model, lambda name, module: isinstance(module, nn.Linear), r=2)
    assert len(convert(model, ["linear1", "linear2"], r=2)) == 4
    assert torch.equal(model(source, target), expected)


def test_compiled_models_follow() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 6)
    expected = compiled(x).detach()
    convert(model, ["0", "2"], r=2)
    assert torch.equal(compiled(x), expected)
    randomise(model)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    assert not torch.equal(compiled(x), expected)
    unconvert(model, merge=False)
    assert torch.equal(compiled(x), expected)


def test_a_converted_model_compiles_whole() -> None:
    torch._dynamo.reset()
    model = Net()
    convert(model, ["stem", "depthwise", "pointwise", "head"], r=2, lora_dropout=0.1)
    randomise(model)
    other, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8)
    results = []
    for run in (model, torch.compile(other, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(5)
        y = run(x)
        y.square().sum().backward()
        results.append(y)
    assert torch.equal(*results)
    for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (parameter.grad is None) == (twin.grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, twin.grad), name
