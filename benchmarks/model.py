"""python -m benchmarks.model: forward + backward of a Llama-shaped model, ours against PEFT and the frozen model.

The shape is Llama-3-8B's, by transformers, with random weights and few layers; LoRA is on all seven projections. Every
candidate is a model of its own around the same base weights. All of them, the frozen one too, are given embeddings
that require a gradient, so that each computes dx down to the first layer, as with gradient checkpointing. A step is
the loss, its backward and dropping the gradients; no optimizer. The vocabulary is small, which keeps the head cheap.

First, without dropout and on one sequence, the loss and every gradient of ours, of a call after several, are held
against the model in float64 (but for what transformers computes in float32, such as its norms), by twice the error of
PEFT with bfloat16 adapters. A wrong result prints no speed; what torch.compile makes of ours is not checked, as masks
and compiled code's own rounding make it incomparable. Then all candidates take turns in a shuffled order. Writes
model.md, model.json and model.csv.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import fused_lora
from benchmarks.accuracy import CALLS
from benchmarks.peers import path_of
from benchmarks.report import Progress, Results, header_of, parser, selected
from benchmarks.timing import measure, release_memory, synchronize

DTYPE = torch.bfloat16
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_ALPHA = 32
# What lora_B is scaled by: enough for the check to see the low-rank terms, and too little to make attention so sharp
# that rounding errors grow from layer to layer.
ADAPTER_SHARE = 0.3
GIB = 2**30


@dataclass(frozen=True)
class Candidate:
    """How a model is made of the base: whose adapters, in which dtype, and whether torch.compile takes it."""

    kind: str
    adapter_dtype: torch.dtype = DTYPE
    compiled: bool = False

    def __str__(self) -> str:
        adapters = "" if self.kind == "frozen" else f", {str(self.adapter_dtype).removeprefix('torch.')} adapters"
        return f"{self.kind}{adapters}{', compiled' if self.compiled else ''}"


FROZEN, AS_IT_COMES = Candidate("frozen"), Candidate("PEFT", torch.float32)
PEFT_VARIANTS = (
    AS_IT_COMES,
    Candidate("PEFT"),
    Candidate("PEFT", torch.float32, compiled=True),
    Candidate("PEFT", compiled=True),
)
OURS = (Candidate("fused_lora", torch.float32), Candidate("fused_lora"))
FROZEN_COMPILED, OURS_COMPILED = replace(FROZEN, compiled=True), Candidate("fused_lora", compiled=True)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def base_model(options: argparse.Namespace) -> nn.Module:
    """Frozen, in bfloat16 with float32 rotary frequencies, on the device; random weights."""
    config = transformers.LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        num_hidden_layers=options.layers,
        vocab_size=options.vocab,
        max_position_embeddings=options.sequence,
        use_cache=False,
    )
    torch.manual_seed(0)
    with default_dtype(DTYPE), torch.device(options.device):
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.requires_grad_(False).train()


def sharing_copy(base: nn.Module) -> nn.Module:
    """A model of its own around the base's parameters."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def projections(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Each projection's parent, its name there and itself, in the model's order."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in PROJECTIONS:
                yield parent, name, child


def adapter_values(r: int, in_features: int, out_features: int, index: int, device: Any) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of the index-th projection, the same for every candidate; bfloat16 can hold them."""
    generator = torch.Generator(device).manual_seed(index)
    lora_A = torch.randn(r, in_features, generator=generator, device=device) * in_features**-0.5
    lora_B = torch.randn(out_features, r, generator=generator, device=device) * r**-0.5 * ADAPTER_SHARE
    return lora_A.to(DTYPE), lora_B.to(DTYPE)


def fused_projection(linear: nn.Linear, r: int, p: float, adapter_dtype: torch.dtype) -> fused_lora.Linear:
    layer = fused_lora.Linear(
        linear.in_features,
        linear.out_features,
        r=r,
        lora_alpha=LORA_ALPHA,
        lora_dropout=p,
        bias=False,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
        adapter_dtype=adapter_dtype,
    )
    layer.weight = linear.weight
    return layer


def build(base: nn.Module, candidate: Candidate, r: int, p: float) -> tuple[nn.Module, list[nn.Parameter]]:
    """The candidate's model, and its adapters' parameters in the projections' order: lora_A, lora_B, lora_A, ..."""
    model = sharing_copy(base)
    adapters: list[nn.Parameter] = []
    if candidate.kind == "frozen":
        return model, adapters
    if candidate.kind == "PEFT":
        config = peft.LoraConfig(r=r, lora_alpha=LORA_ALPHA, lora_dropout=p, target_modules=list(PROJECTIONS))
        as_it_comes = candidate.adapter_dtype == torch.float32
        wrapped: Any = peft.get_peft_model(model, config, autocast_adapter_dtype=as_it_comes)
        model = wrapped.get_base_model()
    for index, (parent, name, child) in enumerate(projections(model)):
        lora_A, lora_B = adapter_values(r, child.in_features, child.out_features, index, child.weight.device)
        if candidate.kind == "PEFT":
            pair = [child.lora_A["default"].weight, child.lora_B["default"].weight]
        else:
            layer = fused_projection(child, r, p, candidate.adapter_dtype)
            setattr(parent, name, layer)
            pair = [layer.lora_A, layer.lora_B]
        for parameter, values in zip(pair, (lora_A, lora_B), strict=True):
            assert parameter.dtype == candidate.adapter_dtype, f"{candidate}'s {name} has {parameter.dtype} adapters"
            parameter.data.copy_(values)
        adapters += pair
    return model.train(), adapters


def inputs(options: argparse.Namespace, batch: int, sequence: int) -> tuple[Tensor, Tensor]:
    """Embeddings that require a gradient, and labels."""
    generator = torch.Generator(options.device).manual_seed(1)
    shape = batch, sequence
    embeddings = torch.randn(*shape, options.hidden, generator=generator, device=options.device).to(DTYPE)
    labels = torch.randint(options.vocab, shape, generator=generator, device=options.device)
    return embeddings.requires_grad_(), labels


def loss_and_gradients(model: Any, adapters: list[nn.Parameter], x: Tensor, labels: Tensor) -> list[Tensor]:
    loss = model(inputs_embeds=x, labels=labels).loss
    return [loss.detach(), *torch.autograd.grad(loss, [x, *adapters])]


def check(base: nn.Module, options: argparse.Namespace) -> None:
    """Ours against float64 by twice PEFT's error; raises AssertionError, naming the candidate and the result."""
    x, labels = inputs(options, 1, options.sequence)
    yardstick = Candidate("PEFT")
    model, adapters = build(base, yardstick, options.r, 0.0)
    theirs = loss_and_gradients(model, adapters, x, labels)
    wide = copy.deepcopy(model).double()
    wide_adapters = [p for p in wide.parameters() if p.requires_grad]
    truths = loss_and_gradients(wide, wide_adapters, x.detach().double().requires_grad_(), labels)
    names = ["loss", "gradient of the embeddings"]
    names += [f"gradient of {n}" for n, p in model.named_parameters() if p.requires_grad]
    del model, wide, adapters, wide_adapters
    for candidate in OURS:
        model, adapters = build(base, candidate, options.r, 0.0)
        for _ in range(CALLS):
            actuals = loss_and_gradients(model, adapters, x, labels)
        for name, actual, their, truth in zip(names, actuals, theirs, truths, strict=True):
            error, unit = (actual - truth).abs().max(), torch.finfo(DTYPE).eps * truth.abs().max()
            bound = 2 * (their - truth).abs().max() + unit
            assert error <= bound, f"{candidate}: {name} is off by {error:.3e}, more than {bound:.3e}"


def training_step(model: Any, adapters: list[nn.Parameter], x: Tensor, labels: Tensor) -> Callable[[], object]:
    def step() -> None:
        model(inputs_embeds=x, labels=labels).loss.backward()
        for tensor in (x, *adapters):
            tensor.grad = None

    return step


def peak_bytes(step: Callable[[], object], device: str) -> int | None:
    """The most that a step allocates beside what is there without it: weights and adapters."""
    if device == "cpu":
        return None
    gc.collect()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def add_findings(results: Results, tokens: int) -> None:
    rows = {row["candidate"]: row for row in results.records}
    cells = []
    for name, row in rows.items():
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f}"
        ratio = f"{row['ms'] / rows[str(FROZEN)]['ms']:.3f}" if str(FROZEN) in rows else "-"
        cells.append([name, f"{row['ms']:.2f}", f"{tokens / row['ms'] * 1e3:,.0f}", ratio, peak, row["path"]])
    columns = ["candidate", "ms a step", "tokens/s", "ratio to frozen", "peak beyond weights, GiB", "our path"]
    results.table(columns, cells)
    best = min((rows[str(c)] for c in PEFT_VARIANTS if str(c) in rows), key=lambda row: row["ms"], default=None)
    verdicts = []
    for candidate in (c for c in (*OURS, OURS_COMPILED) if str(c) in rows):
        ours, aims = rows[str(candidate)], []
        frozen = str(FROZEN_COMPILED if candidate.compiled else FROZEN)
        if frozen in rows:
            aims.append((f"time over that of: {frozen}", ours["ms"] / rows[frozen]["ms"], "≤", 1.10))
        if str(AS_IT_COMES) in rows:
            aims.append(("speed over PEFT as it comes", rows[str(AS_IT_COMES)]["ms"] / ours["ms"], "≥", 1.40))
        if best is not None:
            aims.append((f"speed over the best of PEFT ({best['candidate']})", best["ms"] / ours["ms"], "≥", 1.05))
        for what, value, sign, aim in aims:
            met = value <= aim if sign == "≤" else value >= aim
            verdicts.append([ours["candidate"], what, f"{value:.3f}", f"{sign} {aim:.2f}", "met" if met else "MISSED"])
    if verdicts:
        results.table(["ours", "what", "measured", "target", "outcome"], verdicts)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "model")
    made.add_argument("--only", nargs="+", default=[""], help="candidates whose name holds such a text")
    made.add_argument("--no-compile", action="store_true", help="leave the compiled candidates out")
    made.add_argument("--compile-backend", default="inductor")
    made.add_argument("--rounds", type=int, default=6)
    made.add_argument("--window", type=float, default=150.0, help="milliseconds")
    made.add_argument("--r", type=int, default=16)
    made.add_argument("--p", type=float, default=0.1)
    sizes = {"batch": 4, "sequence": 2048, "layers": 4, "hidden": 4096, "intermediate": 14336}
    for name, size in (sizes | {"heads": 32, "kv-heads": 8, "vocab": 1024}).items():
        made.add_argument(f"--{name}", type=int, default=size)
    options: argparse.Namespace = made.parse_args(arguments)
    wanted = (FROZEN, *PEFT_VARIANTS, *OURS, FROZEN_COMPILED, OURS_COMPILED)
    named = {str(candidate): candidate for candidate in wanted if not (options.no_compile and candidate.compiled)}
    options.candidates = selected(made, options.only, named)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    say = Progress()
    tokens = options.batch * options.sequence
    base = base_model(options)
    say("base model made")
    check(base, options)
    say("ours is as right as PEFT; building the candidates")
    release_memory(options.device)
    x, labels = inputs(options, options.batch, options.sequence)
    steps: dict[str, Callable[[], object]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for candidate in options.candidates:
        model, adapters = build(base, candidate, options.r, options.p)
        if candidate.compiled:
            model = torch.compile(model, backend=options.compile_backend)  # type: ignore[assignment]
        step = training_step(model, adapters, x, labels)
        path = path_of(step)
        steps[str(candidate)] = step
        rows[str(candidate)] = {
            "candidate": str(candidate),
            "path": path if candidate.kind == "fused_lora" else "",
            "adapter_parameters": sum(p.numel() for p in adapters),
        }
        step()
        rows[str(candidate)]["peak_bytes"] = peak_bytes(step, options.device)
        say(f"{candidate}: ran")
    timings = measure(
        steps, options.rounds, graphs=False, window_ms=options.window, burst_rounds=0, device=options.device
    )
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    shape = f"{options.layers} layers of {options.hidden} and {options.intermediate}, {options.heads} heads, "
    shape += f"{options.kv_heads} for keys and values, vocabulary {options.vocab}"
    title = (
        f"Forward + backward of a Llama-shaped model ({shape}), bfloat16, {options.batch}x{options.sequence} tokens, "
        f"r={options.r} on all seven projections, p={options.p:g}; medians of {options.rounds} rounds of "
        f"{options.window:g} ms, no optimizer"
    )
    results = Results(title, header_of(options) | versions)
    for name, row in rows.items():
        row |= {"ms": timings[name].sustained_ms, "tokens_per_second": tokens / timings[name].sustained_ms * 1e3}
        results.records.append(row | {"rounds_ms": timings[name].sustained})
    add_findings(results, tokens)
    results.write(options.output, options.name)


if __name__ == "__main__":
    main()
