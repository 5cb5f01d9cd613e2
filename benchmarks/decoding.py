"""python -m benchmarks.decoding: greedy decoding of a Llama-shaped model, its adapters merged, by PEFT, and fused.

The shape is Llama-3-8B's, by transformers, with random weights, few layers and a small vocabulary; LoRA is on all seven
projections. "fused" is the model of PEFT, as such adapters come, after `fused_lora.peft.accelerate`. A short prompt
fills a static cache; then one step, from a token to the next, is captured as a CUDA graph and replayed for every new
token. The time is of those steps, without the prompt.

First the logits of the prompt and of some steps with given tokens, on the graphs that are timed, are held against the
unfused model in float64 (but for what transformers computes in float32), by twice the error of PEFT in bfloat16. A
wrong result prints no speed. On a CPU the code runs, without graphs, and no time is written. Writes decoding.md,
decoding.json and decoding.csv.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import random
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import fused_lora.peft
from benchmarks.accuracy import largest_error
from benchmarks.model import DTYPE, LORA_ALPHA, Candidate, adapter_values, base_model, build, projections, sharing_copy
from benchmarks.peers import path_of
from benchmarks.report import Progress, Results, header_of, parser
from benchmarks.timing import Timing, capture, release_memory, run_ms

MERGED, UNFUSED, FUSED = "merged", "unfused (PEFT)", "fused (accelerate)"
GOAL = 1.05
CHECKED_STEPS = 3


def models(base: nn.Module, r: int) -> dict[str, nn.Module]:
    """The candidates in eval mode, around the base's weights and with the same adapters."""
    merged = sharing_copy(base)
    for index, (_, _, child) in enumerate(projections(merged)):
        lora_A, lora_B = adapter_values(r, child.in_features, child.out_features, index, child.weight.device)
        weight = child.weight.float() + LORA_ALPHA / r * (lora_B.float() @ lora_A.float())
        child.weight = nn.Parameter(weight.to(child.weight.dtype), requires_grad=False)
    unfused, _ = build(base, Candidate("PEFT"), r, 0.0)
    fused, _ = build(base, Candidate("PEFT"), r, 0.0)
    fused_lora.peft.accelerate(fused)
    return {MERGED: merged.eval(), UNFUSED: unfused.eval(), FUSED: fused.eval()}


class Decoder:
    """Greedy decoding by one model: `start`, then `step` for each new token, which is a graph's replay on a GPU.

    ids: int64 (batch, 1), the token that the next step reads. logits: (batch, vocabulary), what the last step gave.
    """

    def __init__(self, model: Any, prompt: Tensor, new_tokens: int, *, graph: bool) -> None:
        self.model, self.prompt = model, prompt
        # transformers 5.24 gave the cache another name; before 5 the position in it was the caller's business.
        self.known = inspect.signature(model.forward).parameters
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens)
        self.ids = prompt.new_zeros(len(prompt), 1)
        self.position = prompt.new_zeros(1)
        self.start()
        self.step = capture(self.eager_step).replay if graph else self.eager_step

    def start(self) -> Tensor:
        """Reads the prompt into an empty cache; returns its logits, (batch, tokens, vocabulary)."""
        length = self.prompt.shape[1]
        self.cache.reset()
        logits = self._forward(self.prompt, torch.arange(length, device=self.prompt.device))
        self.position.fill_(length)
        self.ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
        return logits

    def eager_step(self) -> None:
        self.logits = self._forward(self.ids, self.position)[:, -1]
        self.ids.copy_(self.logits.argmax(-1, keepdim=True))
        self.position += 1

    def _forward(self, ids: Tensor, position: Tensor) -> Tensor:
        options: dict[str, Any] = {"cache" if "cache" in self.known else "past_key_values": self.cache}
        if "cache_position" in self.known:
            options["cache_position"] = position
        logits: Tensor = self.model(input_ids=ids, position_ids=position[None], use_cache=True, **options).logits
        return logits


def given_logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits of the prompt and of a step for each column of tokens, (batch, prompt + steps, vocabulary)."""
    found = [decoder.start()]
    for column in tokens.T:
        decoder.ids.copy_(column[:, None])
        decoder.step()
        found.append(decoder.logits[:, None].clone())
    return torch.cat(found, 1)


def check(decoders: dict[str, Decoder]) -> None:
    """Raises AssertionError, naming the candidate, if one is further from float64 than PEFT's error allows."""
    yardstick = decoders[UNFUSED]
    tokens = yardstick.prompt[:, :CHECKED_STEPS]
    wide = copy.deepcopy(yardstick.model).double()
    truth = given_logits(Decoder(wide, yardstick.prompt, CHECKED_STEPS, graph=False), tokens)
    unit = torch.finfo(DTYPE).eps * float(truth.abs().max())
    bound = 2 * largest_error(given_logits(yardstick, tokens), truth) + unit
    for name, decoder in decoders.items():
        error = largest_error(given_logits(decoder, tokens), truth)
        assert error <= bound, f"{name}: logits are off by {error:.3e}, more than {bound:.3e}"


def step_times(decoders: dict[str, Decoder], new_tokens: int, rounds: int, device: str) -> dict[str, Timing]:
    """Milliseconds a step, in shuffled order; each time a whole text is decoded before the one that counts."""
    timings = {name: Timing() for name in decoders}
    order = list(decoders)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            for _ in range(2):
                decoders[name].start()
                ms = run_ms(decoders[name].step, new_tokens, device)
            timings[name].sustained.append(ms)
    return timings


def measure_batch(candidates: dict[str, nn.Module], batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each candidate; without times on a CPU."""
    generator = torch.Generator(options.device).manual_seed(batch)
    sizes, on_gpu = (batch, options.prompt), options.device != "cpu"
    prompt = torch.randint(options.vocab, sizes, generator=generator, device=options.device)
    decoders = {name: Decoder(model, prompt, options.new_tokens, graph=on_gpu) for name, model in candidates.items()}
    check(decoders)
    rows: list[dict[str, Any]] = [{"batch": batch, "candidate": name, "path": ""} for name in decoders]
    decoders[FUSED].start()
    rows[-1]["path"] = path_of(decoders[FUSED].eager_step)
    timings = step_times(decoders, options.new_tokens, options.rounds, options.device)
    if on_gpu:
        merged_ms = timings[MERGED].sustained_ms
        for row, timing in zip(rows, timings.values(), strict=True):
            ms = timing.sustained_ms
            row |= {"ms": ms, "tokens_per_second": batch / ms * 1e3, "ratio": ms / merged_ms}
            row["rounds_ms"] = timing.sustained
    return rows


def add_table(results: Results) -> None:
    cells = []
    for row in results.records:
        line = [str(row["batch"]), row["candidate"]]
        if "ms" in row:
            line += [f"{row['ms']:.3f}", f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.3f}"]
            met = "met" if row["ratio"] <= GOAL else "MISSED"
            line.append(f"≤ {GOAL:.2f} {met}" if row["candidate"] == FUSED else "-")
        else:
            line += ["-"] * 4
        cells.append([*line, row["path"]])
    results.table(["batch", "candidate", "ms a step", "tokens/s", "ratio to merged", "goal", "our path"], cells)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "decoding")
    made.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    made.add_argument("--prompt", type=int, default=16, help="tokens")
    made.add_argument("--new-tokens", type=int, default=128)
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--r", type=int, default=16)
    sizes = {"layers": 4, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv-heads": 8, "vocab": 32000}
    for name, size in sizes.items():
        made.add_argument(f"--{name}", type=int, default=size)
    made.add_argument("--shrink", type=int, default=1, help="divide the widths and the vocabulary by this")
    options = made.parse_args(arguments)
    # The steps that the check takes, and those before a capture.
    if min(options.prompt, options.new_tokens) < CHECKED_STEPS:
        sizes_given = f"--prompt is {options.prompt} and --new-tokens {options.new_tokens}"
        made.error(f"{sizes_given}; expected at least {CHECKED_STEPS} each.")
    for name in ("hidden", "intermediate", "vocab"):
        setattr(options, name, getattr(options, name) // options.shrink)
    options.sequence = options.prompt + options.new_tokens
    return options


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    say = Progress()
    candidates = models(base_model(options), options.r)
    say("models made")
    shape = f"{options.layers} layers of {options.hidden} and {options.intermediate}, {options.heads} heads, "
    shape += f"{options.kv_heads} for keys and values, vocabulary {options.vocab}"
    title = (
        f"Greedy decoding of a Llama-shaped model ({shape}), bfloat16, r={options.r} on all seven projections, "
        f"{options.new_tokens} tokens after a prompt of {options.prompt}, static cache, one CUDA graph a step; medians "
        f"of {options.rounds} rounds"
    )
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    results = Results(title, header_of(options) | versions)
    for batch in options.batch:
        with torch.inference_mode():
            results.records += measure_batch(candidates, batch, options)
        say(f"batch {batch}: right and measured")
        release_memory(options.device)
    add_table(results)
    results.write(options.output, options.name)


if __name__ == "__main__":
    main()
