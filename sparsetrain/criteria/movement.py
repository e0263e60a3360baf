"""Movement: weights that training pushes towards zero go first (Sanh et al. 2020, arXiv 2005.07683, sec. 4).

Formula: every weight has a score ``S``, 0 at first and learnt by gradient descent along with the weights; its gradient is
``dL/dS = w dL/dw`` (straight through the mask). So after some steps ``S = -lr * sum over steps of w_t g_t``.

* ``form="hard"``: the highest ``S`` stay (Top_v in the paper).
* ``form="soft"``: the score is ``sigmoid(S)``, and a penalty ``penalty * sum of sigmoid(S)`` joins the loss. The paper keeps
  what is above a fixed threshold, and the sparsity follows from the penalty. Here the sparsity is what is asked: the
  threshold is whatever meets it, over the whole network with ``allocation="global"``. The penalty pulls back scores of
  weights that stopped moving.

When to use it: fine-tuning a pretrained model on a new task, where the way a weight goes says more than how large it is. It
watches every optimizer step from the first one, so prune after some hundred of them (``schedule.start``).

How it fails: right after the start, and from scratch, scores are noise. In the paper a pruned weight keeps its old value in
secret and may come back; here pruned weights are zero and stay pruned.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparsetrain.criteria.base import Seen, StatisticsCriterion, wide
from sparsetrain.errors import RecipeError, nearest


def movement(scores: Tensor, weight: Tensor, gradient: Tensor, lr: float = 0.01, penalty: float = 0.0) -> Tensor:
    """One step of the scores: ``S - lr * (w g + penalty * sigmoid'(S))``; all of one shape.

    Example: ``movement(torch.zeros(1), torch.tensor([2.]), torch.tensor([-3.]), lr=1.0)`` is 6: it moves away from zero.
    """
    step = weight * gradient
    if penalty:
        gate = torch.sigmoid(scores)
        step = step + penalty * gate * (1 - gate)
    return scores - lr * step


class Movement(StatisticsCriterion):
    """Scores learnt during training.

    Args:
        form: ``"hard"`` or ``"soft"``.
        lr: learning rate of the scores; with ``"hard"`` it changes no ranking.
        penalty: weight of the sum of ``sigmoid(S)`` in the loss; for ``"soft"`` alone.

    Raises `RecipeError` for another form, a rate that is not positive, or a penalty that is negative or without ``"soft"``.

    Example: ``PruneFinetune(0.9, criterion=Movement("soft", penalty=1.0), allocation="global")``.
    """

    source = "training"

    def __init__(self, form: Literal["hard", "soft"] = "hard", lr: float = 0.01, penalty: float = 0.0) -> None:
        super().__init__()
        if form not in ("hard", "soft"):
            raise RecipeError(f"Movement form {form!r} is unknown; use 'hard' or 'soft'.{nearest(str(form), ['hard', 'soft'])}")
        if not 0 < lr < float("inf"):
            raise RecipeError(f"Movement lr={lr}: the learning rate of the scores must be positive, such as 0.01")
        if not 0 <= penalty < float("inf") or (penalty and form == "hard"):
            raise RecipeError(
                f"Movement penalty={penalty} with form={form!r}: a penalty is at least 0, and for form='soft' alone"
            )
        self.form = form
        self.lr = lr
        self.penalty = penalty

    def observe(self, seen: Seen) -> None:
        """Move the scores by one step."""
        if seen.gradient is None:
            return
        weight = wide(seen.weight)
        scores = self.beside(seen.tensor.name, weight).get("scores", torch.zeros_like(weight))
        scores = movement(scores, weight, wide(seen.gradient), self.lr, self.penalty)
        self.memory[seen.tensor.name] = {"scores": scores}

    def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
        """``S``, or ``sigmoid(S)`` in float64, where it is 1 much later than in float32."""
        scores = self.remembered(name)["scores"].to(weight.device)
        return torch.sigmoid(scores.double()) if self.form == "soft" else scores.clone()
