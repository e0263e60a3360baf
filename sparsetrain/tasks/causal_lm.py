"""Language modelling: a decoder of transformers, or any network from ids to logits, trained to predict the next token."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from sparsetrain.errors import RecipeError
from sparsetrain.tasks.perplexity import Perplexity, logits_of, next_token_loss, require_causal
from sparsetrain.tasks.pretrained import load_network
from sparsetrain.tasks.training import Task

_Batch = tuple[Tensor, Tensor]


class CausalLM(Task):
    """Train a language model on ``(input_ids, labels)`` batches, int64 (B, T), as `TextData` gives them.

    Labels are the ids themselves, or -100 where nothing is to be predicted; the shift by one is done in the loss. The state
    dict has the network's plain names under ``network.``. Logs "train/loss" (mean over the batch's tokens) and "lr" per step;
    per validation and test "val/loss", "val/perplexity", "test/loss", "test/perplexity", over all tokens of all batches and
    ranks. Which windows the perplexity is over, the data say: block windows, or sliding ones with ``TextData(stride=...)``.

    Args:
        model: a ``from_pretrained`` folder, also by its name in ``$SPARSETRAIN_DATA/models``, or a name on the Hugging Face
            hub; loaded in float32.
        config: instead of model: ``{model_type: llama, vocab_size: 258, hidden_size: 64, ...}``, built with random weights.
        network: instead of both: any module from ids (B, T) to logits (B, T, vocabulary), or to an output with ``logits``.
        optimizer: builds the optimizer from the parameters.
        lr_schedule: "constant", "cosine" or "linear" to zero, or a callable, as in `Classification`.
        warmup: fraction of all optimizer steps, in [0, 1), over which the rate rises linearly; not with a callable.

    Raises:
        RecipeError: unless exactly one of model, config and network is given; for what cannot be loaded or built; for a model
            that sees later tokens (an encoder); for a bad learning-rate schedule.

    Example: ``CausalLM(config={"model_type": "llama", "vocab_size": 258, "hidden_size": 64, "num_hidden_layers": 2})``.
    """

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        network: nn.Module | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_schedule: Literal["constant", "cosine", "linear"] | LRSchedulerCallable = "constant",
        warmup: float = 0.0,
    ) -> None:
        super().__init__(optimizer, lr_schedule, warmup)
        if network is not None and not (model is None and config is None):
            raise RecipeError(f"network and model={model!r} or config={config!r}: give one of the three")
        self.network: nn.Module = network if network is not None else load_network("CausalLM", model, config)
        if network is None:
            require_causal(self.network)
        #: Its weights were trained before: what it does before it is pruned can be compared with.
        self.pretrained = model is not None
        # Nobody generates here: a cache of keys and values would only take memory.
        cached = hasattr(self.network, "config") and "use_cache" in inspect.signature(self.network.forward).parameters
        self._options = {"use_cache": False} if cached else {}
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits (B, T, vocabulary) for ids (B, T)."""
        return logits_of(self.network, input_ids, **self._options)

    def training_step(self, batch: _Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the batch's predicted tokens."""
        total, count = next_token_loss(self(batch[0]), batch[1])
        loss = total / count.clamp(min=1)
        self.log_training(loss)
        return loss

    def validation_step(self, batch: _Batch, batch_idx: int) -> None:
        """Log "val/loss" and "val/perplexity"."""
        self._evaluate(batch, "val", self.val_perplexity)

    def test_step(self, batch: _Batch, batch_idx: int) -> None:
        """Log "test/loss" and "test/perplexity"."""
        self._evaluate(batch, "test", self.test_perplexity)

    def _evaluate(self, batch: _Batch, stage: str, perplexity: Perplexity) -> None:
        total, count = next_token_loss(self(batch[0]), batch[1])
        perplexity.update(total, count)
        # Lightning weighs a logged loss by its batch size. Over ranks it averages that size in its own type: an int is cut off.
        weight: Any = float(count)
        self.log(f"{stage}/loss", total / count.clamp(min=1), batch_size=weight, sync_dist=True)
        self.log(f"{stage}/perplexity", perplexity, prog_bar=True, batch_size=weight)
