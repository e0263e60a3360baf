"""Linear and convolutional layers whose weights are noisy: additive noise, sampled where it costs least.

``w = theta + sigma * eps`` (additive parameterization, Molchanov et al. 2017, arXiv 1701.05369, section 4.1), so that the
gradient of theta knows no noise; and instead of a weight for each sample, the pre-activation is sampled, which is normal too
(local reparameterization, Kingma et al. 2015, arXiv 1506.02557, eq. 6)::

    out = x @ theta.T + b + sqrt((x * x) @ (sigma * sigma).T + 1e-8) * eps,   eps ~ N(0, 1) of the shape of out

A layer keeps its parameters, their names and its place: only its class changes, and changes back. ``log sigma^2`` is beside
them, no parameter of the model, so that optimizers (weight decay!), averages and checkpoints see the plain network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsetrain.errors import TargetError
from sparsetrain.penalties.variational import EPSILON, kl_slope


@dataclass
class WeightNoise:
    """How noisy the weights of a layer are.

    Args:
        log_sigma2: of the weight's shape, requires grad; minus infinity where a weight has no noise (a pruned one).
        threshold: of log alpha; weights at or past it are zero in evaluation.
        clamp: of ``|log alpha|``, for `slope`.
        clip: they are also zero in training; their noise stays.

    ``alive`` (1 or 0) and ``slope`` (of `kl_slope`) are as old as the last `refresh`.
    """

    log_sigma2: Tensor
    threshold: float
    clamp: float = 8.0
    clip: bool = True
    alive: Tensor = field(init=False)
    slope: Tensor = field(init=False)
    _theta: Tensor = field(init=False, repr=False)
    _sigma2: Tensor = field(init=False, repr=False)
    _made: tuple[int, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        value = self.log_sigma2.detach()
        # Memory that is kept: new memory for every step would take longer than what is computed in it.
        self.alive, self.slope, self._theta, self._sigma2 = (torch.empty_like(value) for _ in range(4))

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Bring ``alive`` and ``slope`` up to date with a weight."""
        self.forget()
        _, sigma2 = self.ready(weight)
        self.alive.copy_(self.is_alive(weight))
        kl_slope(weight, sigma2, self.clamp, self.slope)
        self.forget()

    @torch.no_grad()
    def ready(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """theta as the layer multiplies by it, and sigma^2; made once for all calls until weight or noise change."""
        made = (id(weight), weight._version, self.log_sigma2._version)
        if self._made != made:
            # Half of what exp takes on a CPU.
            torch.mul(self.log_sigma2, math.log2(math.e), out=self._sigma2).exp2_()
            torch.mul(weight, self.alive, out=self._theta) if self.clip else self._theta.copy_(weight)
            self._made = made
        return self._theta, self._sigma2

    def forget(self) -> None:
        """Make everything anew at the next call: weights may have been written where nobody counts."""
        self._made = ()

    @torch.no_grad()
    def is_alive(self, weight: Tensor) -> Tensor:
        """bool, of the weight's shape: log alpha is below the threshold now (no logarithm is needed to see that)."""
        limit = (weight * weight).add_(EPSILON).mul_(math.exp(self.threshold))
        return limit > self.log_sigma2.mul(math.log2(math.e)).exp2_()


class NoisyLinear(torch.autograd.Function):
    """``NoisyLinear.apply(x, weight, bias, log_sigma2, noise, made, alive)``: the output above, with a backward pass by hand.

    ``x`` (N, in), ``weight`` and ``log_sigma2`` (out, in), ``noise`` (N, out), ``made``: what `WeightNoise.ready`
    gives, ``alive``: 1 or 0, which of theta have a gradient, or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_sigma2: Tensor,
        noise: Tensor,
        made: tuple[Tensor, Tensor],
        alive: Tensor | None,
    ) -> Tensor:
        """The noisy output."""
        theta, sigma2 = made
        squares = x * x
        deviation = F.linear(squares, sigma2).add_(EPSILON).sqrt_()
        ctx.save_for_backward(x, squares, theta, sigma2, deviation, noise, alive)
        return F.linear(x, theta, bias).addcmul_(deviation, noise)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and log sigma^2."""
        x, squares, theta, sigma2, deviation, noise, alive = ctx.saved_tensors
        spread = (grad * noise).div_(deviation).mul_(0.5)  # gradient of the variance of the output
        dx = torch.addcmul(grad @ theta, x, spread @ sigma2, value=2.0) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = grad.t() @ x
            if alive is not None:
                dweight *= alive
        dbias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, (spread.t() @ squares).mul_(sigma2), None, None, None


class _Variational(nn.Module):
    """What the layers share; ``noise`` is set when a layer becomes one of these."""

    noise: WeightNoise
    weight: Any
    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        """Noisy in training, deterministic in evaluation; in single precision also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == self.weight.dtype else x.to(self.weight.dtype)
            if self.training:
                return self.noisy(x)
            return self.plain(x, self.weight * self.noise.is_alive(self.weight), self.bias)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with another weight."""
        raise TypeError(f"{type(self).__name__} is no layer")

    def noisy(self, x: Tensor) -> Tensor:
        """One sample of the output, by autograd."""
        mean = self.plain(x, self.weight * self.noise.alive if self.noise.clip else self.weight, self.bias)
        deviation = (self.plain(x * x, self.noise.log_sigma2.exp(), None) + EPSILON).sqrt()
        return torch.addcmul(mean, deviation, torch.randn_like(mean))


class VariationalLinear(_Variational, nn.Linear):
    """`torch.nn.Linear` with noisy weights."""

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with another weight."""
        return F.linear(x, weight, bias)

    def noisy(self, x: Tensor) -> Tensor:
        """One sample of the output."""
        rows = x.reshape(-1, x.shape[-1])
        noise = torch.randn(len(rows), self.out_features, dtype=x.dtype, device=x.device)
        known = self.noise
        given = (known.log_sigma2, noise, known.ready(self.weight), known.alive if known.clip else None)
        out: Tensor = NoisyLinear.apply(rows, self.weight, self.bias, *given)  # type: ignore[no-untyped-call]
        return out.reshape(*x.shape[:-1], -1)


class _Convolution(_Variational):
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with another weight, padded as it pads."""
        return self._conv_forward(x, weight, bias)


class VariationalConv1d(_Convolution, nn.Conv1d):
    """`torch.nn.Conv1d` with noisy weights."""


class VariationalConv2d(_Convolution, nn.Conv2d):
    """`torch.nn.Conv2d` with noisy weights."""


class VariationalConv3d(_Convolution, nn.Conv3d):
    """`torch.nn.Conv3d` with noisy weights."""


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: VariationalLinear,
    nn.Conv1d: VariationalConv1d,
    nn.Conv2d: VariationalConv2d,
    nn.Conv3d: VariationalConv3d,
}
_PLAIN = {noisy: plain for plain, noisy in _KINDS.items()}


def require_convertible(name: str, module: nn.Module) -> None:
    """Raise `TargetError` unless the layer of a weight can be made noisy: torch's own Linear and Conv1d, 2d, 3d, no others.

    A class of somebody's may use its weight in ways of its own. Example: ``require_convertible("fc1.weight", net.fc1)``.
    """
    if type(module) not in _KINDS and type(module) not in _PLAIN:
        known = ", ".join(kind.__name__ for kind in _KINDS)
        raise TargetError(
            f"{name} is the weight of a {type(module).__name__}, which cannot be given noise (known are torch's own {known}); "
            "leave it out by targets.exclude"
        )


def make_variational(module: nn.Module, noise: WeightNoise) -> None:
    """Give the weights of a layer noise, in place. Example: ``make_variational(net.fc1, WeightNoise(log_sigma2, 3.0))``."""
    module.__class__ = _KINDS.get(type(module), type(module))
    module.__dict__["noise"] = noise


def make_plain(module: nn.Module) -> None:
    """Take the noise away; the weights stay as they are. Example: ``make_plain(net.fc1)``."""
    module.__class__ = _PLAIN.get(type(module), type(module))
    module.__dict__.pop("noise", None)
