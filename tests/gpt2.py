"""GPT-2 as a user of loralib writes it, in the shape of microsoft/LoRA's examples/NLG; the LoRA package is an argument.

Where that example relies on loralib, so does this: MergedLinear over a weight stored (in, out), constructor arguments
by loralib's names, blocks that are deep copies of one, isinstance(layer, nn.Linear) in the initialisation, checkpoints
of a GPT-2 without adapters, a buffer called bias, a head that shares the token embedding's Parameter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

NOT_A_TARGET = -1


@dataclass(frozen=True)
class Config:
    vocab_size: int = 61
    n_ctx: int = 12
    n_embd: int = 24
    n_layer: int = 2
    n_head: int = 3
    r: int = 4
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    merge_weights: bool = False


class Conv1D(nn.Module):
    """An affine map whose weight is (in, out)."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Attention(nn.Module):
    def __init__(self, lora: ModuleType, config: Config) -> None:
        super().__init__()
        nx = n_state = config.n_embd
        self.n_head = config.n_head
        self.register_buffer("bias", torch.ones(config.n_ctx, config.n_ctx, dtype=torch.bool).tril())
        self.c_attn = lora.MergedLinear(
            nx,
            3 * n_state,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            enable_lora=[True, False, True],
            fan_in_fan_out=True,
            merge_weights=config.merge_weights,
        )
        self.c_proj = Conv1D(nx, n_state)

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        heads = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = (torch.cat(pair, dim=-2) for pair in zip(past, (key, value), strict=True))
        end = key.shape[-2]
        visible = self.bias[end - x.shape[1] : end, :end]
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
        attended = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(-2)
        return self.c_proj(attended), torch.stack((key, value))


class Block(nn.Module):
    def __init__(self, lora: ModuleType, config: Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(lora, config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.ModuleDict(
            {"c_fc": Conv1D(4 * config.n_embd, config.n_embd), "c_proj": Conv1D(config.n_embd, 4 * config.n_embd)}
        )

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        attended, present = self.attn(self.ln_1(x), past)
        x = x + attended
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](hidden), present


class Transformer(nn.Module):
    """checkpointing: None, or the use_reentrant with which every block runs under torch.utils.checkpoint."""

    checkpointing: bool | None = None

    def __init__(self, lora: ModuleType, config: Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)
        block = Block(lora, config)
        self.h = nn.ModuleList([copy.deepcopy(block) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, tokens: Tensor, past: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        start = 0 if past is None else past[0].shape[-2]
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        if self.checkpointing and not x.requires_grad:
            # The reentrant variant gives no gradient to a block none of whose inputs wants one.
            x.requires_grad_()
        presents = []
        for layer, block in enumerate(self.h):
            layer_past = None if past is None else past[layer]
            if self.checkpointing is None:
                x, present = block(x, layer_past)
            else:
                x, present = checkpoint(block, x, layer_past, use_reentrant=self.checkpointing)
            presents.append(present)
        return self.ln_f(x), presents


class GPT2(nn.Module):
    """The language model; lora is loralib or a package with its interface."""

    def __init__(self, lora: ModuleType, config: Config) -> None:
        super().__init__()
        self.transformer = Transformer(lora, config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        self.apply(self._init_weights)

    def tie(self) -> None:
        self.lm_head.weight = self.transformer.wte.weight

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            module.weight.data.normal_(mean=0.0, std=0.02)
        if isinstance(module, (nn.Linear, Conv1D)) and module.bias is not None:
            module.bias.data.zero_()

    def load_plain(self, plain: Mapping[str, Tensor]) -> None:
        """Loads a GPT-2 without adapters; the lora_* entries that it lacks stay as they are in this model."""
        state = dict(plain)
        for name, parameter in self.transformer.named_parameters():
            if "lora_" in name and name not in state:
                state[name] = parameter
        self.transformer.load_state_dict(state)
        self.tie()

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        past: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | list[Tensor]]:
        """(logits, loss) with labels, each of which counts as much as mask says; (logits, presents) without."""
        hidden, presents = self.transformer(tokens, past)
        logits = self.lm_head(hidden)
        if labels is None:
            return logits, presents
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=NOT_A_TARGET, reduction="none")
        weights = torch.ones_like(losses) if mask is None else mask.flatten().to(losses.dtype)
        return logits, (losses * weights).sum() / weights.sum().clamp(min=1)
