"""One tensor under the mask manager, the overrides it may carry, and the record of how its mask changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsetrain.errors import TargetError
from sparsetrain.masks import sharding
from sparsetrain.masks.erase import Eraser, erase
from sparsetrain.patterns import Pattern, exact
from sparsetrain.targets import Target


@dataclass(frozen=True)
class Override:
    """Another pattern or sparsity for the tensors whose name a regular expression matches; sparsity 0 leaves them dense.

    Example: ``{"fc3": Override(sparsity=0.5), "fc1": Override(pattern="2:4")}``.
    """

    pattern: str | Pattern | None = None
    sparsity: float | None = None

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            exact(self.sparsity)


@dataclass(frozen=True)
class MaskChange:
    """One change of one mask: what died, what grew, when and why."""

    step: int
    tensor: str
    died: int
    grew: int
    why: str


@dataclass
class MaskedTensor:
    """One tensor under the manager. ``mask`` is this rank's part in stored layout, None while the tensor is dense.

    ``tap`` is shown every gradient (this rank's part) right before that of pruned entries is erased; see `erases_gradient`.
    """

    target: Target
    pattern: Pattern
    goal: float | None = None
    sparsity: Fraction = Fraction(0)
    mask: Tensor | None = None
    tap: Callable[[Tensor], None] | None = field(default=None, repr=False)
    _bound: nn.Parameter | None = field(default=None, repr=False)
    _handle: RemovableHandle | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The plain name of the tensor."""
        return self.target.name

    def fitting(self) -> nn.Parameter:
        """The parameter. Raises `TargetError` where the mask has another shape."""
        parameter = self.target.parameter
        if self.mask is not None and self.mask.shape != sharding.local(parameter).shape:
            raise TargetError(
                f"{self.name} has shape {tuple(sharding.local(parameter).shape)} and its mask {tuple(self.mask.shape)}: it was "
                "compacted under this manager; detach() before compact, and make a new manager of the compact model"
            )
        return parameter

    def go_along(self) -> None:
        """Move the mask to where the weight is: trainers move models after masks were made, and back at the end."""
        if self.mask is not None:
            device = sharding.local(self.target.parameter).device
            if self.mask.device != device:
                self.mask = self.mask.to(device)

    def full_mask(self) -> Tensor:
        """The whole mask, stored layout, gathered if sharded (then every rank must call it)."""
        parameter = self.target.parameter
        if self.mask is None:
            return torch.ones(tuple(parameter.shape), dtype=torch.bool, device=sharding.local(parameter).device)
        whole = sharding.full(sharding.like(self.mask.view(torch.uint8), parameter))
        return whole.contiguous().view(torch.bool)

    def bind(self, mask_gradient: bool) -> nn.Parameter:
        """Hook the gradient of the parameter there is now (sharding and ``to()`` replace parameters), and return it."""
        parameter = self.target.parameter
        if parameter is not self._bound or mask_gradient != (self._handle is not None):
            self.unbind()
            self._bound = parameter
            if mask_gradient:
                # A frozen parameter takes no hook, but keeps one: it may be thawed later.
                trainable = parameter.requires_grad
                parameter.requires_grad_(True)
                self._handle = parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
                parameter.requires_grad_(trainable)
        return parameter

    def erase(self, tensors: Sequence[Tensor], eraser: Eraser) -> None:
        """Erase pruned entries of these tensors, in place. The shape is looked at where that fails: every step comes here."""
        try:
            eraser(tensors, self.mask)  # type: ignore[arg-type]
        except RuntimeError:
            self.fitting()
            raise

    def unbind(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._bound = None

    @property
    def erases_gradient(self) -> bool:
        """Whether the gradient of pruned entries is erased as soon as it exists, and ``tap`` shown it before."""
        return self._handle is not None

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        if self.tap is not None and parameter.grad is not None:
            self.tap(sharding.local(parameter.grad))
        self.mask_gradient(parameter)

    @torch.no_grad()
    def mask_gradient(self, parameter: Tensor) -> None:
        """Zero the gradient of pruned entries; called as soon as there is one."""
        if self.mask is None or parameter.grad is None:
            return
        grad = sharding.local(parameter.grad)
        try:
            if grad.is_sparse:
                grad = grad.coalesce()
                values = grad.values() * self.mask[grad.indices()[0]]
                parameter.grad = torch.sparse_coo_tensor(
                    grad.indices(), values, grad.shape, is_coalesced=True, check_invariants=False
                )
            else:
                erase(grad, self.mask)
        except RuntimeError:
            self.fitting()
            raise
