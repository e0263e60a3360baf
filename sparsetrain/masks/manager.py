"""MaskManager: the one writer of masked weights. Plain torch; Lightning callbacks only tell it *when*.

How a mask is kept intact:

* the optimizer's post-step hook multiplies the weights by their mask, so that whoever reads them next sees exact zeros,
  whatever the optimizer did (weight decay, orthogonalized updates, a line search, somebody's own writing), and so it does
  with what the optimizer remembers of each weight;
* where entries influence each other (LBFGS, Muon, Adafactor, clipping by norm) a post-accumulate hook zeroes the gradient of
  pruned entries as soon as it exists, so that the living see the dead as if they were not there;
* when a mask changes, the optimizer state of everything that died or was regrown is reset, pending gradients and averaged
  copies of the weights (`follow`) are masked too.

A mask costs one byte a weight, and nothing while a tensor is dense.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsetrain.errors import PatternError, TargetError, nearest
from sparsetrain.masks import persistence, sharding
from sparsetrain.masks.erase import Eraser, erase
from sparsetrain.masks.optimizer_state import forget, needs_masked_gradients, per_weight_state
from sparsetrain.masks.state import SavedMask
from sparsetrain.masks.tensor import MaskChange, MaskedTensor, Override
from sparsetrain.masks.verification import Verification, adopt_zeros, verify_tensor
from sparsetrain.patterns import Pattern, Sparsity, exact, parse_pattern
from sparsetrain.targets import Targets, compile_regex, plain_name


class MaskManager:
    """Masks for the weights of one model, kept intact through every optimizer step.

    Args:
        model: any module; wrapped ones (``torch.compile``, FSDP2, DDP) too.
        targets: which tensors; a `Targets`, by default every weight but norms, biases, embeddings and the output head.
        pattern: what masks may look like, a `Pattern` or its text (``"unstructured"``, ``"2:4"``, ``"block:16x16"`` ...).
        overrides: ``{regular expression: Override}``; the first that matches a tensor's name wins.

    Raises `TargetError` for no match and for an override that matches nothing.

    Example::

        manager = MaskManager(model, pattern="2:4").attach(optimizer)
        prune(manager, 0.5)        # from sparsetrain import prune
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets | None = None,
        pattern: Pattern | str = "unstructured",
        overrides: Mapping[str, Override] | None = None,
    ) -> None:
        self.model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        matched = (targets or Targets()).match(self.model)
        self.skipped = matched.skipped
        self.unclaimed: dict[str, str] = {}
        self.changes: list[MaskChange] = []
        self.optimizers: list[tuple[Optimizer, tuple[RemovableHandle, ...]]] = []
        self.followers: list[Mapping[str, Tensor]] = []
        self._masks_gradients = False
        self._erase = Eraser()
        default = parse_pattern(pattern)
        self.tensors = {t.name: MaskedTensor(t, default) for t in matched.targets}
        settled: set[str] = set()
        for regex, override in (overrides or {}).items():
            compiled = compile_regex(regex, "overrides")
            hits = [t for t in self.tensors.values() if any(compiled.search(n) for n in (t.name, *t.target.aliases))]
            if not hits:
                few = ", ".join(list(self.tensors)[:4])
                raise TargetError(f"override {regex!r} matches no target ({few}, ...).{nearest(regex, self.tensors)}")
            for tensor in (t for t in hits if t.name not in settled):
                settled.add(tensor.name)
                tensor.pattern = parse_pattern(override.pattern) if override.pattern is not None else tensor.pattern
                tensor.goal = override.sparsity if override.sparsity is not None else tensor.goal

    # -- reading ----------------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> MaskedTensor:
        plain = plain_name(name)
        for tensor in self:
            if plain == tensor.name or plain in tensor.target.aliases:
                return tensor
        raise TargetError(f"{name!r} is no target of this manager.{nearest(plain, self.tensors)}")

    def __iter__(self) -> Iterator[MaskedTensor]:
        sharding.reshard(self.model)
        for tensor in self.tensors.values():
            tensor.go_along()
        return iter(self.tensors.values())

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks of this rank by tensor name (True = alive), dense tensors left out."""
        return {t.name: t.mask for t in self if t.mask is not None}

    def counts(self) -> dict[str, tuple[int, int]]:
        """Tensor name -> (weights pruned, weights) over all ranks."""
        result = {}
        for tensor in self:
            parameter = tensor.fitting()
            dead = 0 if tensor.mask is None else sharding.total([~tensor.mask], parameter)[0]
            result[tensor.name] = (dead, math.prod(parameter.shape))
        return result

    def sparsity(self) -> float:
        """Fraction of zeros over all targets."""
        counts = self.counts().values()
        return sum(dead for dead, _ in counts) / sum(numel for _, numel in counts)

    # -- keeping ----------------------------------------------------------------------------------------------------------

    def attach(self, *optimizers: Optimizer, mask_gradients: bool | None = None) -> MaskManager:
        """Keep masks intact through these optimizers' steps; attaching one twice is attaching it once. Returns self.

        ``mask_gradients``: zero the gradients of pruned entries as soon as they exist; by default only for optimizers that need
        it (LBFGS, Muon, ...). Say True if you clip by norm, so that
        pruned entries do not count; the callbacks do by themselves.
        """
        for optimizer in optimizers:
            if not any(optimizer is known for known, _ in self.optimizers):
                before = optimizer.register_step_pre_hook(lambda opt, *_: self._before_step())
                after = optimizer.register_step_post_hook(lambda opt, *_: self.enforce(opt))
                self.optimizers.append((optimizer, (before, after)))
            if needs_masked_gradients(optimizer) if mask_gradients is None else mask_gradients:
                self._masks_gradients = True
        self._require_own()
        for tensor in self:
            tensor.bind(self._masks_gradients)
        return self

    def _require_own(self) -> None:
        """Whoever replaces a layer (LoRA, quantization) leaves its masks without a model."""
        there = {id(module) for module in self.model.modules()}
        for tensor in self:
            if id(tensor.target.module) not in there:
                raise TargetError(
                    f"the layer of {tensor.name} is no longer in the model; make a new MaskManager after replacing it"
                )
            tensor.fitting()

    def detach(self) -> None:
        """Take every hook off; weights and masks stay as they are."""
        for _, handles in self.optimizers:
            for handle in handles:
                handle.remove()
        self.optimizers.clear()
        self.followers.clear()
        self._masks_gradients = False
        for tensor in self:
            tensor.unbind()

    def follow(self, copy: nn.Module) -> MaskManager:
        """Keep an averaged copy of the model (EMA, SWA) as sparse as the model, from now on."""
        named = [(plain_name(n), p) for n, p in copy.named_parameters(remove_duplicate=False)]
        by_plain = {n.removeprefix("module."): p for n, p in named} | dict(named)
        found = {t.name: by_plain[t.name] for t in self if t.name in by_plain}
        if not found:
            raise TargetError(
                f"the copy ({type(copy).__name__}) has none of the model's masked tensors; is it of another model?"
            )
        if not any(found.keys() == known.keys() and all(found[n] is known[n] for n in found) for known in self.followers):
            self.followers.append(found)
        self.enforce()
        return self

    def _before_step(self) -> None:
        """Gradients that were written by hand have passed no hook."""
        if self._masks_gradients:
            for tensor in self:
                tensor.mask_gradient(tensor.bind(True))

    @torch.no_grad()
    def enforce(self, optimizer: Optimizer | None = None) -> None:
        """Multiply weights by their masks: those of one optimizer, or all of them and every followed copy."""
        owned = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
        for tensor in self:
            if tensor.mask is None:
                continue
            parameter = tensor.bind(self._masks_gradients)
            erased = [] if optimizer is None or needs_masked_gradients(optimizer) else per_weight_state(optimizer, parameter)
            if owned is None or id(parameter) in owned:
                erased.append(sharding.local(parameter))
            tensor.erase(erased, self._erase)
        for copy in self.followers if optimizer is None else ():
            for name, value in copy.items():
                if (alive := self.tensors[name].mask) is not None:
                    erase(sharding.local(value), alive)

    # -- changing ---------------------------------------------------------------------------------------------------------

    def update(self, name: str, sparsity: Sparsity, scores: Tensor, *, step: int = 0, why: str = "prune") -> MaskChange:
        """Select a new mask of one tensor from scores (this rank's entries, stored layout), check it, install it.

        Entries that are already pruned stay so as long as the sparsity does not fall.
        """
        tensor = self[name]
        parameter = tensor.target.parameter
        if scores.shape != sharding.local(parameter).shape:
            raise TargetError(f"scores of {name} have shape {tuple(scores.shape)}, the weight {tuple(parameter.shape)}")
        if tensor.mask is not None:
            scores = torch.where(tensor.mask, scores, torch.full((), -math.inf, dtype=scores.dtype, device=scores.device))
        try:
            mask = sharding.select(tensor.pattern, scores, parameter, tensor.target.layout, sparsity)
            return self.install(name, mask, sparsity, step=step, why=why)
        except PatternError as error:
            raise PatternError(f"{tensor.name}: {error}") from error

    @torch.no_grad()
    def install(self, name: str, mask: Tensor, sparsity: Sparsity, *, step: int = 0, why: str = "install") -> MaskChange:
        """Check a ready mask (this rank's part) against the tensor's pattern at this sparsity, then make it the mask."""
        tensor = self[name]
        parameter = tensor.fitting()
        old = torch.ones_like(mask) if tensor.mask is None else tensor.mask
        sharding.check(tensor.pattern, mask, parameter, tensor.target.layout, sparsity)
        died, grew = old & ~mask, mask & ~old
        tensor.mask = mask.contiguous() if exact(sparsity) else None
        tensor.sparsity = exact(sparsity)
        tensor.bind(self._masks_gradients)
        dead, changed = ~mask, died | grew
        weight = sharding.local(parameter)
        weight.masked_fill_(dead, 0.0)
        if parameter.grad is not None and not parameter.grad.is_sparse:
            sharding.local(parameter.grad).masked_fill_(dead, 0.0)
        for copy in self.followers:
            if tensor.name in copy:
                sharding.local(copy[tensor.name]).masked_fill_(dead, 0.0)
        for optimizer, _ in self.optimizers:
            forget(optimizer, parameter, changed, dead)
        lost, back = sharding.total([died, grew], parameter)
        change = MaskChange(step, tensor.name, lost, back, why)
        if change.died or change.grew:
            self.changes.append(change)
        return change

    @torch.no_grad()
    def write(self, name: str, values: Tensor) -> None:
        """Write new values of a whole tensor (this rank's part), masked: for methods that move weights themselves."""
        tensor = self[name]
        sharding.local(tensor.target.parameter).copy_(values if tensor.mask is None else torch.where(tensor.mask, values, 0.0))

    @classmethod
    def adopt(
        cls,
        model: nn.Module,
        pattern: Pattern | str = "unstructured",
        targets: Targets | None = None,
        overrides: Mapping[str, Override] | None = None,
    ) -> MaskManager:
        """Make the zeros that a model already has its masks, checked against the declared pattern.

        ``manager.unclaimed`` tells what was not claimed, by tensor: targets without zeros, zeros beyond the pattern, and
        zeros in tensors that are no targets. Raises `PatternError` naming the tensor whose zeros do not form the pattern.

        Example: ``manager = MaskManager.adopt(model, "2:4").attach(optimizer)``.
        """
        manager = cls(model, targets, pattern, overrides)
        manager.unclaimed = adopt_zeros(manager)
        return manager

    # -- proving ----------------------------------------------------------------------------------------------------------

    def verify(self, strict: bool = False) -> Verification:
        """Check every promise on every tensor: the pattern exact, pruned weights exactly 0.0 (averaged copies too),
        optimizer memory clear, weights finite. Under sharding every rank must call it, and a problem of one is told by all.

        Raises `PatternError` with the first broken promise if ``strict``. Example: ``print(manager.verify())``.
        """
        self._require_own()
        optimizers = [optimizer for optimizer, _ in self.optimizers]
        rows = [(verify_tensor(t, optimizers, self.followers), t.target.parameter) for t in self]
        found = Verification([replace(row, problem=sharding.agreed(row.problem, p)) for row, p in rows])
        if strict and found.problems:
            raise PatternError(found.problems[0])
        return found

    # -- remembering ------------------------------------------------------------------------------------------------------

    def saved(self) -> dict[str, SavedMask]:
        """Every mask at rest, bit-packed. Under sharding every rank must call it, and each gets the whole masks."""
        return {tensor.name: persistence.saved_mask(tensor) for tensor in self}

    def state_dict(self) -> dict[str, Any]:
        """Masks and their history as plain tensors, numbers and text; 1 bit a weight; the same on one rank or many."""
        return persistence.to_state(self)

    def load_state_dict(self, state: Mapping[str, Any], where: str = "the checkpoint") -> None:
        """Install saved masks. Raises `MaskStateError` by name for foreign, truncated or mismatching state, before any
        mask or weight is touched."""
        persistence.load_state(self, state, where)
