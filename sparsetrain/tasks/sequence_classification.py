"""Text classification: an encoder or decoder of transformers with a classification head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from sparsetrain.errors import RecipeError
from sparsetrain.tasks.perplexity import exact, logits_of
from sparsetrain.tasks.pretrained import load_network
from sparsetrain.tasks.training import Task

_Batch = Mapping[str, Tensor] | tuple[Tensor, ...]


class SequenceClassification(Task):
    """Train a classifier of texts on batches of `TextClassificationData`.

    A batch is ``{"input_ids", "attention_mask", "labels"}`` or a tuple in this order (the mask may be left out): int64, (B, T),
    (B, T) and (B,). The state dict has the network's plain names under ``network.``. Logs "train/loss" and "lr" per step,
    "val/loss", "val/accuracy" (share of texts that are right), "test/loss", "test/accuracy" per epoch.

    Args:
        model: a ``from_pretrained`` folder, or a name on the Hugging Face hub; its classification head may be new.
        config: instead of model: ``{model_type: bert, vocab_size: 258, num_labels: 3, ...}``, built with random weights.
        network: instead of both: any module from ``(input_ids, attention_mask=...)`` to logits, or an output with ``logits``.
        num_labels: of the head; by default what the model or configuration says.
        optimizer: builds the optimizer from the parameters.
        lr_schedule: "constant", "cosine" or "linear" to zero, or a callable, as in `Classification`.
        warmup: fraction of all optimizer steps, in [0, 1), over which the rate rises linearly; not with a callable.
        macro_f1: log "val/macro_f1" and "test/macro_f1" too, the unweighted mean over labels.

    Raises:
        RecipeError: unless exactly one of model, config and network is given; for what cannot be loaded or built; for fewer
            than 2 labels; for a bad learning-rate schedule.

    Example: ``SequenceClassification(model="path/to/encoder", num_labels=77)``.
    """

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        network: nn.Module | None = None,
        num_labels: int | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_schedule: Literal["constant", "cosine", "linear"] | LRSchedulerCallable = "constant",
        warmup: float = 0.0,
        macro_f1: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_schedule, warmup)
        if network is not None and not (model is None and config is None):
            raise RecipeError(f"network and model={model!r} or config={config!r}: give one of the three")
        if network is None:
            network = load_network("SequenceClassification", model, config, num_labels=num_labels)
        self.network: nn.Module = network
        labels = num_labels if num_labels is not None else getattr(getattr(network, "config", None), "num_labels", None)
        if not isinstance(labels, int) or labels < 2:
            raise RecipeError(f"num_labels={labels} for {type(network).__name__}; pass num_labels=, at least 2")
        self.num_labels = labels
        kinds: dict[str, Metric | MetricCollection] = {"accuracy": MulticlassAccuracy(labels, average="micro")}
        if macro_f1:
            kinds["macro_f1"] = MulticlassF1Score(labels, average="macro")
        self.val_metrics = MetricCollection(kinds, prefix="val/")
        self.test_metrics = MetricCollection(kinds, prefix="test/").clone()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits (B, num_labels) for ids and mask (B, T)."""
        return logits_of(self.network, input_ids, attention_mask=attention_mask)

    def _run(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Logits in float32 or better, and labels."""
        if isinstance(batch, Mapping):
            ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch["labels"]
        else:
            ids, mask, labels = (batch[0], None, batch[1]) if len(batch) == 2 else batch
        return exact(self(ids, mask)), labels

    def training_step(self, batch: _Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        loss = F.cross_entropy(*self._run(batch))
        self.log_training(loss)
        return loss

    def validation_step(self, batch: _Batch, batch_idx: int) -> None:
        """Log "val/loss", "val/accuracy" and what else was asked for."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: _Batch, batch_idx: int) -> None:
        """Log "test/loss", "test/accuracy" and what else was asked for."""
        self._evaluate(batch, "test", self.test_metrics)

    def _evaluate(self, batch: _Batch, stage: str, metrics: MetricCollection) -> None:
        logits, labels = self._run(batch)
        size = len(labels)
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), batch_size=size, sync_dist=True)
        metrics.update(logits, labels)
        self.log_dict(metrics, prog_bar=True, batch_size=size)
