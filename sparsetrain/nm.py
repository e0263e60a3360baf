"""N:M training with dense weights behind the sparse ones: the SR-STE update, and a seam around an optimizer's step.

The network only ever holds ``W~ = E * W``, where the mask ``E`` keeps the N largest ``|W|`` of every M. What ``W`` has where
``E`` is 0 is hidden beside it: ``hidden = (1 - E) * W``, so that ``W = W~ + hidden``. Since autograd differentiates with
respect to ``W~``, the gradient it leaves is the straight-through one, for pruned entries too. Pure torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from sparsetrain.errors import PatternError, RecipeError
from sparsetrain.patterns import NM


@torch.no_grad()
def reveal(optimizer: Optimizer, group: dict[str, Any], weight: Tensor, grad: Tensor, hidden: Tensor, decay: float) -> None:
    """Make a weight dense again right before its optimizer steps, with the decay of pruned entries (SR-STE).

    ``W <- W - lr * (g(W~) + decay * (1 - E) * W)`` (Zhou et al. 2021, arXiv 2102.04010, eq. 9). Under SGD the decay is
    part of the gradient, as in the paper, and so of the momentum. Under any other optimizer it is decoupled as AdamW does it
    (``W <- W - lr * decay * (1 - E) * W``): an adaptive optimizer would divide it by the size of past gradients.

    Args:
        optimizer: the one about to step; an AMP gradient scaler that it handles itself (``fused=True``) is taken care of.
        group: its parameter group of this weight.
        weight: ``W~``, of any shape; afterwards ``W``.
        grad: of the weight, the same shape; under SGD the decay is added to it.
        hidden: ``(1 - E) * W``, the same shape.
        decay: strength, 0 or more; 0 is the plain straight-through estimator.

    Example: ``reveal(sgd, sgd.param_groups[0], weight, weight.grad, hidden, 2e-4)``.
    """
    share = 1.0
    if isinstance(optimizer, SGD):
        scale = getattr(optimizer, "grad_scale", None)
        strength = decay * (1.0 if scale is None else float(scale))
        if strength:
            grad.add_(hidden, alpha=-strength if group["maximize"] else strength)
    elif not getattr(optimizer, "found_inf", None):  # a step that its scaler skips decays nothing
        share = 1.0 - decay * float(group["lr"])
    weight.add_(hidden, alpha=share)


@torch.no_grad()
def select(weight: Tensor, pattern: NM) -> Tensor:
    """The mask of the ``keep`` largest ``|weight|`` of every group; both of shape (out, in, \\*kernel).

    Raises `PatternError` for NaN and for an input dimension that does not divide.

    Example: ``select(torch.tensor([[4.0, -1.0, -3.0, 2.0]]), NM(2, 4))`` is ``[[True, False, True, False]]``.
    """
    return pattern.select(weight.abs(), pattern.sparsity)


def stages(pattern: NM, start: int, end: int) -> list[tuple[int, NM]]:
    """Steps at which ``keep`` falls, one at a time, from ``group - 1`` at ``start`` to its final value at ``end``.

    The structure decay of Kao et al. 2022 (arXiv 2209.07617), spread evenly.

    Example: ``stages(NM(2, 4), 0, 100)`` is ``[(0, NM(3, 4)), (100, NM(2, 4))]``.
    """
    if end < start:
        raise PatternError(f"N cannot fall from step {start} to step {end}: it would end before it starts")
    falls = pattern.group - pattern.keep
    span = (end - start) / max(falls - 1, 1)
    # A pattern with one stage only is there at once.
    return [(start + round(i * span), NM(pattern.group - 1 - i, pattern.group)) for i in range(falls)]


def around_step(optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]) -> list[RemovableHandle]:
    """Call ``before`` when gradients are there and the update is about to happen, ``after`` when it has.

    An optimizer that is given a closure computes its gradients inside ``step``: then ``before`` is called once the closure
    has returned, so that the forward pass has not seen what ``before`` does. Steps that a gradient scaler skips call neither.

    Raises `RecipeError` out of ``step`` if the optimizer calls its closure twice: the second pass would be a dense one.

    Example: ``handles = around_step(sgd, lambda: print("now"), lambda: print("done"))``.
    """

    def enter(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure: Callable[[], Any] | None = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            before()
            return None
        evaluate, called = closure, False

        def once() -> Any:
            nonlocal called
            if called:
                raise RecipeError(
                    f"{type(optimizer).__name__} evaluates its closure more than once a step, and would see dense weights the "
                    "second time; use an optimizer that evaluates it once, such as SGD or AdamW"
                )
            called = True
            loss = evaluate()
            before()
            return loss

        return ((args[0], once, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": once})

    return [optimizer.register_step_pre_hook(enter), optimizer.register_step_post_hook(lambda *_: after())]
