"""KL divergence of variational dropout: how uncertain a weight is, what that costs, and the gradient by hand.

A weight is normal, ``w ~ N(theta, sigma^2)``, and ``alpha = sigma^2 / theta^2`` is how much of it is noise. The prior is
log-uniform (Kingma et al. 2015, arXiv 1506.02557); its divergence is known to be a function of alpha, for which Molchanov et
al. (2017, arXiv 1701.05369, eq. 14) give an approximation that holds for every alpha.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: k1, k2, k3 of equation 14.
_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695
#: Beside theta^2, so that the logarithm of a zero is finite.
EPSILON = 1e-8
_CHUNK = 2**16


def log_alpha(weight: Tensor, log_sigma2: Tensor) -> Tensor:
    """``log sigma^2 - log(theta^2 + 1e-8)``, of the tensors' shape. Example: ``log_alpha(torch.ones(1), torch.zeros(1))``."""
    return log_sigma2 - (weight * weight + EPSILON).log_()


def variational_kl(log_alpha: Tensor) -> Tensor:
    """``KL(q || p)`` of each weight, up to a constant: ``k1 (1 - sigmoid(k2 + k3 log a)) + log(1 + 1/a) / 2``.

    At least 0; it falls as alpha rises, to 0 for a weight that is all noise. Source: Molchanov et al. 2017, equation 14, with
    the sign turned and its constant dropped. Example: ``variational_kl(torch.tensor([-8.0, 8.0]))`` is about ``[4.64, 0.0]``.
    """
    return _K1 * torch.sigmoid(-_K2 - _K3 * log_alpha) + 0.5 * torch.nn.functional.softplus(-log_alpha)


@torch.no_grad()
def kl_slope(weight: Tensor, sigma2: Tensor, clamp: float, out: Tensor) -> Tensor:
    """``h = (d KL / d log alpha) (1 + alpha)``: between -1 and -1/2 it changes slowly, so that one serves for several steps.

    Args:
        weight, sigma2: theta and sigma^2, of one shape.
        clamp: where ``|log alpha|`` is beyond it, the divergence counts as constant and h is 0.
        out: of that shape, contiguous; what is returned.

    With it ``d KL / d log sigma^2 = h theta^2 / (theta^2 + sigma^2)`` and ``d KL / d theta = -2 h theta / (theta^2 + sigma^2)``
    (theta^2 standing for theta^2 + 1e-8). Example: ``kl_slope(theta, sigma2, 8.0, torch.empty_like(theta))``.
    """
    shape = (2, min(_CHUNK, weight.numel()))
    scratch = torch.empty(shape, dtype=out.dtype, device=out.device)
    for theta, value, slope in _in_parts(weight, sigma2, out):
        ratio, other = scratch[:, : len(theta)]
        torch.div(value, torch.mul(theta, theta, out=other).add_(EPSILON), out=ratio)  # alpha
        torch.log(ratio, out=other)
        torch.mul(other, _K3, out=slope).add_(_K2).sigmoid_()
        slope.addcmul_(slope, slope, value=-1).mul_(ratio.add_(1)).mul_(-_K1 * _K3).sub_(0.5)
        # Zero outside of the clamp; with a mask of bool it would take ten times as long.
        torch.ops.aten.hardtanh_backward.grad_input(slope, other, -clamp, clamp, grad_input=slope)
    return out


@torch.no_grad()
def add_kl_gradient(
    weight: Tensor, sigma2: Tensor, slope: Tensor, strength: float, weight_grad: Tensor, log_sigma2_grad: Tensor
) -> None:
    """Add ``strength`` times the gradient of ``variational_kl(log_alpha).sum()`` to two gradients, in place.

    Args:
        weight, sigma2: theta and sigma^2, of one shape.
        slope: h of `kl_slope`.
        strength: what the divergence is multiplied by in the loss, at least 0.
        weight_grad, log_sigma2_grad: what is added to, contiguous.

    Example: ``add_kl_gradient(theta, sigma2, slope, 1 / 60_000, theta.grad, log_sigma2.grad)``.
    """
    shape = (2, min(_CHUNK, weight.numel()))
    scratch = torch.empty(shape, dtype=sigma2.dtype, device=sigma2.device)
    for theta, value, h, theta_grad, value_grad in _in_parts(weight, sigma2, slope, weight_grad, log_sigma2_grad):
        square, share = scratch[:, : len(theta)]
        torch.mul(theta, theta, out=square).add_(EPSILON)
        torch.div(h, torch.add(square, value, out=share), out=share)
        value_grad.addcmul_(share, square, value=strength)
        theta_grad.addcmul_(share, theta, value=-2 * strength)


def _in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same entries of all tensors, so many at a time that what is computed on the way stays in the cache."""
    return zip(*(torch.split(tensor.view(-1), _CHUNK) for tensor in tensors), strict=True)
