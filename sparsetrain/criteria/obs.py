"""Optimal Brain Surgeon by blocks: what the loss loses with a weight when the others move to make up for it.

Formula (Hassibi and Stork 1993; with blocks of the empirical Fisher matrix: Kurtic et al. 2022, arXiv 2203.07259, sec. 3;
Singh and Alistarh 2020, arXiv 2004.14340): near a minimum ``L(w + d) - L(w) = 1/2 d' F d``. The weights of a tensor, in the
order of its view ``(out, in * kernel)``, are cut into blocks of ``block`` weights, and for each

    ``F = damp * 1 + mean over samples of g g'``,    ``score_q = w_q^2 / (2 [F^-1]_qq)``,

the rise of ``L`` when ``w_q`` goes and the rest of its block moves to where it is best. Once the set ``Q`` to prune is known,
the survivors ``S`` of each block move to the exact minimum for the whole set: ``d_S = F_SS^-1 F_SQ w_Q``.

Weights that are zero already are absent: they can neither move nor make up for others, so rows and columns of ``F`` leave
them out. With ``block=1`` it is `Fisher`.

When to use it: few changes at high quality, one-shot or a few rounds, on a trained model. Costs one backward pass a sample,
and ``8 * block`` bytes a weight. Works with every pattern; units score the mean of their weights.

Knobs: more samples than ``block`` (else ``F`` has no full rank, and ``damp`` alone says how far weights may move where no
sample objects); a larger ``damp`` moves weights less.

How it fails: a model that is not trained, where the first-order term is not small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.criteria.base import Known, Seen, StatisticsCriterion
from sparsetrain.errors import RecipeError

#: Entries of the matrices that are factorized at a time: 64 MiB in float64.
_CHUNK = 1 << 23
#: Samples taken in at a time: one by one, all matrices would be read and written for each.
_TOGETHER = 16


def obs_scores(weight: Tensor, curvature: Tensor) -> Tensor:
    """``w_q^2 / (2 [F^-1]_qq)``; weights that are zero are absent, and score 0.

    Shapes: ``weight`` (blocks, size), ``curvature`` (blocks, size, size), both float64. Raises `RecipeError` if a matrix is not
    positive definite. Example: ``obs_scores(torch.tensor([[2.]]).double(), torch.tensor([[[3.]]]).double())`` is 6.
    """
    alive = weight != 0
    inverse = torch.cholesky_inverse(_factor(curvature, alive))
    return weight.square() / (2 * inverse.diagonal(dim1=-2, dim2=-1))


def obs_update(weight: Tensor, curvature: Tensor, alive: Tensor) -> Tensor:
    """The values that minimize ``1/2 d' F d`` when all weights that are not ``alive`` become 0; shapes as in `obs_scores`.

    Example: ``w = (1, 1)``, ``F = [[2, 1], [1, 2]]``, the second pruned: the first becomes ``1 + 1/2``.
    """
    pull = curvature @ weight.masked_fill(alive, 0.0).unsqueeze(-1)
    pull = pull.masked_fill(~alive.unsqueeze(-1), 0.0)
    move = torch.cholesky_solve(pull, _factor(curvature, alive)).squeeze(-1)
    return (weight + move).masked_fill(~alive, 0.0)


def _factor(curvature: Tensor, alive: Tensor) -> Tensor:
    """Cholesky factors of the rows and columns that are alive, with ones on the rest of the diagonal."""
    pair = alive.unsqueeze(-1) & alive.unsqueeze(-2)
    eye = torch.eye(curvature.shape[-1], dtype=curvature.dtype, device=curvature.device)
    factor: Tensor
    factor, broken = torch.linalg.cholesky_ex(torch.where(pair, curvature, eye))
    if bool(broken.any()):
        raise RecipeError("OBS: the Fisher matrix of a block is not positive definite in float64; raise damp, such as to 1e-4")
    return factor


class OBS(StatisticsCriterion):
    """Block-wise Optimal Brain Surgeon, with its update of the survivors.

    Args:
        batches: how many batches are cut into samples, at least 1; together more samples than ``block``.
        block: weights in a block, at least 1.
        damp: what is added to the diagonal of ``F``, positive.
        memory_gib: refuse to take more memory than this, in GiB.

    Raises `RecipeError` for what is out of range, and, when bound to a model, if the matrices need more than ``memory_gib``.

    Example: ``PruneFinetune(0.8, criterion=OBS(batches=8), allocation="global", schedule=OneShot("10%"))``.
    """

    elementwise = False
    per_sample = True

    def __init__(self, batches: int = 16, block: int = 50, damp: float = 1e-7, memory_gib: float = 4.0) -> None:
        super().__init__(batches)
        if block < 1:
            raise RecipeError(f"OBS block={block}: a block has at least 1 weight")
        if not 0 < damp < float("inf"):
            raise RecipeError(f"OBS damp={damp}: it must be positive, such as 1e-7")
        if not memory_gib > 0:
            raise RecipeError(f"OBS memory_gib={memory_gib}: it must be positive, such as 4.0")
        self.block = block
        self.damp = damp
        self.memory_gib = memory_gib
        self._views: dict[str, Known] = {}
        self._waiting: dict[str, list[Tensor]] = {}

    def prepare(self, model: nn.Module, tensors: Sequence[Known]) -> None:
        """Refuse what does not fit into memory."""
        super().prepare(model, tensors)
        self._views = {tensor.name: tensor for tensor in tensors}
        weights = sum(tensor.parameter.numel() for tensor in tensors)
        needed = 8 * self.block * weights / 2**30
        if needed > self.memory_gib:
            fits = int(self.memory_gib * 2**30 / (8 * weights))
            way = f"use block={fits}, " if fits else ""
            raise RecipeError(
                f"OBS with block={self.block} needs {needed:.3g} GiB for {weights} weights, and memory_gib={self.memory_gib:g} "
                f"is allowed; {way}prune fewer tensors (targets), raise memory_gib, or use criterion 'fisher'"
            )

    def observe(self, seen: Seen) -> None:
        """Take in the gradient of a sample."""
        if seen.gradient is None:
            return
        name = seen.tensor.name
        self._waiting.setdefault(name, []).append(seen.tensor.view(seen.gradient).reshape(-1).clone())
        if len(self._waiting[name]) == _TOGETHER:
            self._take_in(name)

    def _take_in(self, name: str) -> None:
        """Add ``g g'`` of the samples that wait to the matrix of each block."""
        waiting = self._waiting.pop(name, [])
        if not waiting:
            return
        gradients = torch.stack([self._blocks(gradient) for gradient in waiting], dim=1)  # (blocks, samples, size)
        blocks, samples, size = gradients.shape
        memory = self.memory.setdefault(
            name,
            {"outer": gradients.new_zeros(blocks, size, size), "count": torch.zeros((), device=gradients.device)},
        )
        memory["outer"].baddbmm_(gradients.transpose(1, 2), gradients)
        memory["count"] += samples

    def finish(self) -> None:
        """Take in what waits."""
        for name in list(self._waiting):
            self._take_in(name)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._waiting = {}

    def remembered(self, name: str) -> dict[str, Tensor]:
        """The matrices of a tensor and the number of samples; raises `RecipeError` if it has seen none."""
        self._take_in(name)
        return super().remembered(name)

    def score(self, weight: Tensor, *, name: str, step: int = 0) -> Tensor:
        """``w_q^2 / (2 [F^-1]_qq)``."""
        return self._by_blocks(name, obs_scores, weight)

    def compensate(self, weight: Tensor, mask: Tensor, *, name: str) -> Tensor:
        """Survivors at the minimum for the whole set that was pruned."""
        return self._by_blocks(name, lambda w, f, alive: obs_update(w, f, alive > 0), weight, mask)

    def _by_blocks(self, name: str, function: Callable[..., Tensor], weight: Tensor, *others: Tensor) -> Tensor:
        memory = self.remembered(name)
        view = self._views[name].view
        parts = [self._blocks(view(tensor.detach())) for tensor in (weight, *others)]
        eye = self.damp * torch.eye(self.block, dtype=torch.float64, device=weight.device)
        found = []
        chunk = max(1, _CHUNK // self.block**2)
        for start in range(0, len(parts[0]), chunk):
            rows = slice(start, start + chunk)
            curvature = memory["outer"][rows] / memory["count"] + eye
            found.append(function(parts[0][rows], curvature, *(part[rows] for part in parts[1:])))
        flat = torch.cat(found).flatten()[: weight.numel()]
        result = view(flat.view(view(weight).shape))
        # Scores stay in float64: their range is that of squares.
        return result.to(weight.dtype) if others else result

    def _blocks(self, tensor: Tensor) -> Tensor:
        """Entries in order, cut into blocks, in float64; the last block is filled up with zeros, which are absent weights."""
        flat = tensor.reshape(-1).double()
        return F.pad(flat, (0, -flat.numel() % self.block)).view(-1, self.block)
