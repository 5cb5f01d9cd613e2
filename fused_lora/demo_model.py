"""What the demo trains: scanned digits, a small transformer that reads them row by row, and the training loop."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sklearn.datasets
import sklearn.model_selection
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

import fused_lora

SIDE, CLASSES, WIDTH, HEADS, DEPTH = 8, 10, 64, 4, 2
RANK, LORA_ALPHA = 8, 16
BATCH = 64


@dataclass(frozen=True)
class Digits:
    """images: float32 (n, 8, 8) in [0, 1]; labels: int64 (n,), the digit that each image shows."""

    images: Tensor
    labels: Tensor

    def transformed(self) -> Digits:
        """The same digits turned by 90 degrees, mirrored and inverted."""
        return Digits(1 - self.images.rot90(dims=(1, 2)).flip(2), self.labels)

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Digits]:
        """Batches of BATCH digits, the last one smaller, in random order if a (CPU) generator is given."""
        count = len(self.labels)
        order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        for chosen in order.to(self.labels.device).split(BATCH):
            yield Digits(self.images[chosen], self.labels[chosen])


def load_digits(device: torch.device) -> tuple[Digits, Digits]:
    """scikit-learn's 1,797 digits on `device`: four fifths to train on and one to test on, always the same ones."""
    scans = sklearn.datasets.load_digits()
    images = torch.tensor(scans.images, dtype=torch.float32, device=device) / 16
    labels = torch.tensor(scans.target, dtype=torch.int64, device=device)
    train, test = sklearn.model_selection.train_test_split(
        range(len(scans.target)), test_size=0.2, stratify=scans.target, random_state=0
    )
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


class Block(nn.Module):
    """Pre-norm self-attention and MLP: float32 (n, tokens, WIDTH) to the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.expand = nn.Linear(WIDTH, 4 * WIDTH)
        self.contract = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.project(attended)
        update: Tensor = self.contract(F.gelu(self.expand(self.mlp_norm(x))))
        return x + update


class DigitTransformer(nn.Module):
    """Classifies images, float32 (n, 8, 8), whose rows are its tokens: logits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(SIDE, WIDTH)
        self.position = nn.Parameter(torch.randn(SIDE, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.embed(images) + self.position)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class UnfusedLinear(fused_lora.Linear):
    """The same layer as the expression that one writes without this package."""

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.lora_dropout(x) @ self.lora_A.T @ self.lora_B.T
        return F.linear(x, self.weight, self.bias) + update * self.scaling


def with_lora(
    base: nn.Module,
    *,
    lora_dropout: float = 0.1,
    merge_weights: bool = True,
    layer_class: type[fused_lora.Linear] = fused_lora.Linear,
) -> nn.Module:
    """A copy of a base model whose attention and MLP layers carry a fresh adapter; only adapters are trainable.

    base: a DigitTransformer of nn.Linear layers; embedding and head stay plain. layer_class: makes the new layers.
    """
    model = copy.deepcopy(base)
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        for name, plain in list(block.named_children()):
            if isinstance(plain, nn.Linear):
                layer = layer_class(
                    plain.in_features,
                    plain.out_features,
                    r=RANK,
                    lora_alpha=LORA_ALPHA,
                    lora_dropout=lora_dropout,
                    merge_weights=merge_weights,
                    device=plain.weight.device,
                )
                layer.load_state_dict(plain.state_dict(), strict=False)
                setattr(block, name, layer)
    fused_lora.mark_only_lora_as_trainable(model)
    return model


def lora_layers(model: nn.Module) -> list[fused_lora.Linear]:
    return [module for module in model.modules() if isinstance(module, fused_lora.Linear)]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Digits) -> Tensor:
    """One step down the cross-entropy of a batch, which is returned: float32, a scalar, detached."""
    loss = F.cross_entropy(model(batch.images), batch.labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(
    model: nn.Module, digits: Digits, *, epochs: int, learning_rate: float, seed: int, progress: Progress, title: str
) -> list[float]:
    """Trains what is trainable by AdamW with a one-cycle schedule; returns each epoch's mean loss."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate)
    steps = epochs * -(-len(digits.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    bar = progress.add_task(title, total=steps)
    model.train()
    history = []
    for _ in range(epochs):
        losses = []
        for batch in digits.batches(generator):
            losses.append(train_step(model, optimizer, batch))
            schedule.step()
            progress.advance(bar)
        history.append(torch.stack(losses).mean().item())
    return history


@torch.no_grad()
def logits_of(model: nn.Module, digits: Digits) -> Tensor:
    """Puts the model into eval mode, which merges adapters, and returns its logits: float32 (n, 10)."""
    logits: Tensor = model.eval()(digits.images)
    return logits


@dataclass(frozen=True)
class Score:
    """loss: mean cross-entropy in nats; accuracy: share of digits told right, in [0, 1]."""

    loss: float
    accuracy: float

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Score:
        """logits: float32 (n, 10). labels: int64 (n,)."""
        right = (logits.argmax(1) == labels).float().mean()
        return cls(F.cross_entropy(logits, labels).item(), right.item())


def first_losses(model: nn.Module, digits: Digits, *, steps: int, seed: int) -> list[float]:
    """The losses of the first `steps` batches of plain SGD, each before its step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model.train()
    batches = zip(range(steps), digits.batches(generator), strict=False)
    return [train_step(model, optimizer, batch).item() for _, batch in batches]


def samples_per_second(models: Sequence[nn.Module], digits: Digits, *, rounds: int = 9, steps: int = 8) -> list[float]:
    """Each model's training speed: the median over rounds of `steps` full steps (forward, backward, AdamW).

    The models take turns in every round, so that a slow spell of the machine hits all of them; round 0 is warm-up.
    """
    batches = [batch for _, batch in zip(range(steps), digits.batches(), strict=False)]
    samples = sum(len(batch.labels) for batch in batches)
    optimizers = [torch.optim.AdamW((p for p in m.parameters() if p.requires_grad), lr=1e-3) for m in models]
    speeds: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, optimizer, measured in zip(models, optimizers, speeds, strict=True):
            model.train()
            _wait_for(digits.images.device)
            start = time.perf_counter()
            for batch in batches:
                train_step(model, optimizer, batch)
            _wait_for(digits.images.device)
            measured.append(samples / (time.perf_counter() - start))
    return [statistics.median(measured[1:]) for measured in speeds]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
