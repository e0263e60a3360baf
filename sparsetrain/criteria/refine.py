"""Once a mask is chosen: the weights that are left go to where a layer's output changes least.

For each row, ``min (v - w)' H (v - w)`` over ``v`` that is 0 where the mask is, by conjugate gradients on the mask with the
diagonal of ``H`` as preconditioner: the second stage of ALPS (Meng et al. 2024, arXiv 2406.07831, sec. 3.3). All rows at once,
one product with ``H`` a step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def refine(weights: Tensor, dense: Tensor, alive: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Weights after so many steps of conjugate gradients from ``weights`` towards the minimum; they are 0 where not ``alive``.

    Shapes: ``weights``, ``dense`` (what the output is compared with) and ``alive`` (groups, columns, rows), ``hessian``
    (groups, columns, columns), positive definite.

    Example: ``H = [[2, 1], [1, 2]]``, ``dense = (1, 1)``, the first pruned: after one step the second is ``1 + 1/2``.
    """
    tiny = torch.finfo(weights.dtype).tiny
    diagonal = hessian.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    rest = (hessian @ (dense - weights)).mul_(alive)
    direction = rest / diagonal
    power = (rest * direction).sum(1, keepdim=True)
    for _ in range(steps):
        pushed = (hessian @ direction).mul_(alive)
        # A row that has arrived has no power left, and stays.
        length = power / (direction * pushed).sum(1, keepdim=True).clamp_min(tiny)
        weights = torch.addcmul(weights, length, direction)
        rest = rest.addcmul_(length, pushed, value=-1)
        near = rest / diagonal
        before, power = power, (rest * near).sum(1, keepdim=True)
        direction = torch.addcmul(near, power / before.clamp_min(tiny), direction)
    return weights
