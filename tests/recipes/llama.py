"""A LightningModule around a transformers Llama of any size, for plans."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


class Llama(pl.LightningModule):
    """Causal language model built from its configuration, 7B by default."""

    def __init__(
        self, layers: int = 32, hidden: int = 4096, intermediate: int = 11008, vocab: int = 32000, tied: bool = False
    ) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 128,
            vocab_size=vocab,
            tie_word_embeddings=tied,
        )
        self.model = LlamaForCausalLM(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits."""
        return self.model(input_ids=input_ids).logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Next-token loss."""
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain."""
        return torch.optim.SGD(self.parameters(), lr=0.1)
