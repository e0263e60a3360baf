"""Perplexity: exp of the mean negative log-likelihood of a text's tokens, by block or by sliding windows.

PPL = exp(-1/N sum_i log p(x_i | context of x_i)), the sum over the N tokens that are predicted. What a token's context is must
be said with the number:

* block windows (``stride`` None): the text is cut into windows, the last one as long as is left; context is what stands before
  a token in its window, and the first token of each is not predicted. What Wanda, SparseGPT and most pruning papers report.
* sliding windows (``stride`` s): a window every s tokens; every token but the very first is scored once, with
  ``window - s`` tokens of context at least. Lower, and ``window / s`` times the work.

Perplexities of different tokenizers are not comparable; the shift by one token is done in `next_token_loss` alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from sparsetrain.data.tokenized import require_fit
from sparsetrain.data.windows import IGNORED, TokenWindows
from sparsetrain.errors import DataError, RecipeError


class Perplexity(Metric):
    """exp of the mean loss over all tokens of all batches and ranks.

    Example: ``metric.update(*next_token_loss(logits, labels))``, then ``metric.compute()``.
    """

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Take in the summed loss of so many tokens."""
        # Under bf16-true the state is bfloat16, which cannot add up.
        self.total = self.total.float() + total.detach().float()
        self.count = self.count + count

    def compute(self) -> Tensor:
        """Return the perplexity of what it was updated with."""
        return (self.total / self.count).exp()


def logits_of(model: nn.Module, input_ids: Tensor, **inputs: Any) -> Tensor:
    """Return the logits of a model that gives them, or an output with ``logits`` as transformers' models do.

    Example: ``logits_of(network, ids)``, (B, T, vocabulary) for ids (B, T).
    """
    output = model(input_ids, **inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def next_token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of -log p(label at t + 1 | output at t), in float32 at least, and the number of labels that are not -100.

    Args:
        logits: (B, T, vocabulary).
        labels: int64 (B, T); the one at t is the token at t, as input, or -100.

    Example: ``total, count = next_token_loss(model(ids).logits, ids)``.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    total = F.cross_entropy(exact(logits.flatten(0, 1)), targets, ignore_index=IGNORED, reduction="sum")
    return total, (targets != IGNORED).sum()


def exact(logits: Tensor) -> Tensor:
    """Return logits in float32 at least. Example: ``exact(torch.zeros(2).bfloat16()).dtype``."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode inside; afterwards every module, also one that was frozen in eval mode, is in the mode it was in.

    Example: ``with evaluating(model): ...``.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def require_causal(model: nn.Module) -> None:
    """Raise `RecipeError` if what comes later changes what a model says of earlier positions: its perplexity means nothing.

    Example: ``require_causal(BertLMHeadModel(BertConfig()))`` raises; with ``BertConfig(is_decoder=True)`` it does not.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    with evaluating(model):
        one, other = logits_of(model, torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]], device=device))[:, :-1]
    if bool((one - other).abs().max() > 1e-4 * one.abs().max()):
        raise RecipeError(
            f"{type(model).__name__} sees the tokens it is to predict: another last token changes what it says before. Take a "
            "decoder (or is_decoder: true in its configuration), or SequenceClassification for an encoder"
        )


def perplexity(model: nn.Module, tokens: Tensor, window: int, stride: int | None = None, batch_size: int = 8) -> float:
    """Return the perplexity of a text under a model, in eval mode, on the model's device; sums in float64.

    Args:
        model: a `CausalLM`, a transformers causal language model, or any module from ids (B, T) to logits (B, T, vocabulary).
        tokens: the text's ids (N,), at least 2.
        window: tokens a model sees at once, at least 2.
        stride: None for block windows, a number in [1, window) for sliding ones.
        batch_size: windows at once.

    Raises:
        DataError: for fewer than 2 tokens, a window below 2, or a stride outside [1, window); for ids or a window beyond what
            a transformers model can read.

    Example: ``perplexity(model, ids, window=512)`` (block), ``perplexity(model, ids, window=512, stride=256)`` (sliding).
    """
    if tokens.ndim != 1 or len(tokens) < 2 or batch_size < 1 or stride == window:
        raise DataError(
            f"tokens of shape {tuple(tokens.shape)}, window={window}, stride={stride}, batch_size={batch_size}: perplexity "
            "needs one row of at least 2 ids, a stride below the window (None for block windows), and a batch_size from 1 on"
        )
    windows = TokenWindows.cut([tokens.cpu()], window, stride)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    require_fit(model, int(tokens.max()) + 1, min(window, len(tokens)))
    total, count = 0.0, 0
    with evaluating(model), torch.no_grad():
        for indices in torch.split(torch.arange(len(windows)), batch_size):
            ids, labels = (part.to(device) for part in windows.__getitems__(indices))
            loss, scored = next_token_loss(logits_of(model, ids), labels)
            total, count = total + float(loss), count + int(scored)
    mean = total / count
    return math.inf if mean > math.log(sys.float_info.max) else math.exp(mean)
