"""`Embedding`, loralib's LoRA embedding on the fused op."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .functional import effective_weight, lora_embedding
from .merge import MergingLayer


class Embedding(MergingLayer, nn.Embedding):
    """nn.Embedding with a LoRA adapter: y = W[x] + lora_alpha / r · A[:, x]ᵀ Bᵀ.

    Parameters: weight (num_embeddings, embedding_dim), frozen if r > 0; lora_A (r, num_embeddings), zeros; lora_B
    (embedding_dim, r), standard normal. The same torch seed gives the tensors that loralib.Embedding would hold.

    r: rank; 0 is a plain nn.Embedding. lora_alpha: scaling is lora_alpha / r. There is no dropout.
    merge_weights: eval() merges the adapter into the weight and train() gives the base weight back, bit for bit; see
        `MergingLayer`.
    padding_idx: its row of the weight and its column of lora_A get no gradient.
    max_norm, norm_type: rows of the base weight that are looked up are renormalised in place, as in nn.Embedding; the
        adapter's never are. Merging takes the renormalised rows, and a merged weight is left as it is.
    scale_grad_by_freq: the gradients of weight and lora_A are divided by how often an index occurs.
    sparse: the weight's gradient is sparse, if it is trained; lora_A's is dense, as (r, num_embeddings) must be.
    adapter_dtype: dtype of lora_A and lora_B; None is the base's. float32 beside a half-precision base is supported.

    The interface is loralib's. Raises ValueError for an r that is not an integer of 0 or more or a lora_alpha that is
    not a finite number, and what nn.Embedding raises.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        *,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Embedding.__init__(
            self,
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            device=device,  # type: ignore[arg-type]
            dtype=dtype,
        )
        self._init_lora(r, lora_alpha, 0.0, merge_weights)
        if self.r > 0:
            self._init_adapter((self.r, num_embeddings), (embedding_dim, self.r), adapter_dtype)
        self.reset_parameters()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError: nn.Embedding's has no r, and the constructor would draw over the given weight."""
        raise NotImplementedError(
            f"from_pretrained was called of a LoRA {cls.__name__}; expected its constructor, which has r, and "
            'load_state_dict({"weight": embeddings}).'
        )

    def reset_parameters(self) -> None:
        """Draws weight and lora_B anew from torch's default generator, in loralib's order; lora_A is zero."""
        self._refuse_to_draw_merged()
        nn.Embedding.reset_parameters(self)
        if self._has_adapter:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """x: integers of any shape to (*x.shape, embedding_dim); see `functional.lora_embedding` for the errors."""
        if self._kept is not None:
            self._check_merged()
            # Without max_norm.
            options = (self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
            return nn.functional.embedding(x, self.weight, *options)
        if not self._has_adapter:
            return nn.Embedding.forward(self, x)
        if self.max_norm is not None:
            torch.embedding_renorm_(self.weight.detach(), x.contiguous(), self.max_norm, self.norm_type)
        return lora_embedding(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )

    def _with_adapter(self, base: Tensor) -> Tensor:
        if self.max_norm is not None:
            # What lookups would make of the rows.
            base = base.clone()
            every_row = torch.arange(self.num_embeddings, device=base.device)
            torch.embedding_renorm_(base, every_row, self.max_norm, self.norm_type)
        return effective_weight(base, self.lora_B.T, self.lora_A.T, scaling=self.scaling)

    def extra_repr(self) -> str:
        extra = f", r={self.r}, lora_alpha={self.lora_alpha}" if self._has_adapter else ""
        return super().extra_repr() + extra
