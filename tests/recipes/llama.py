"""Llamas: the configuration of a tiny one, and a LightningModule around one of any size, for plans."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

#: 2 layers of 1,920 weights and a tied embedding, which reads bytes.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


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
