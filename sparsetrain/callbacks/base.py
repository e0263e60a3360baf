"""What every method shares: one mask manager in a Lightning run, kept, saved, followed by averages, logged and verified."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from sparsetrain.callbacks.agreement import require_agreement
from sparsetrain.callbacks.exact_resume import ExactResume
from sparsetrain.errors import MaskStateError, PatternError, RecipeError
from sparsetrain.masks import MaskedTensor, MaskManager, Verification
from sparsetrain.patterns import Sparsity
from sparsetrain.schedules import Clock, Curve


class SparsityCallback(Callback):
    """A method: says *when*; the manager does the rest. A subclass needs `create_manager`, and usually `on_step`.

    Hooks a subclass fills in:

    * ``create_manager(model)``: the manager for this method's targets and pattern; raises for what cannot work;
    * ``validate()``: raises if a target cannot do what is asked (called once the model is known);
    * ``on_begin(trainer, resumed)``: training starts, optimizers are there, masks of a checkpoint are loaded;
    * ``on_step(trainer, step)``: an optimizer step was taken;
    * ``method_state()`` and ``load_method_state(state)``: what it must remember to resume exactly.

    One such callback a trainer: two would undo each other's masks. After ``fit`` the result of the last check is in
    ``verification``; a broken promise raises `PatternError` there.
    """

    manager: MaskManager | None = None
    verification: Verification | None = None
    #: Called with the trainer once, right before the first weight is pruned, by methods that have a dense phase.
    before_first_change: Callable[[Trainer], None] | None = None

    _state: dict[str, Any] | None = None
    _seen = 0
    _validation_due = False

    # -- to fill in -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def create_manager(self, model: nn.Module) -> MaskManager:
        """The manager for this method's targets and pattern."""

    def validate(self) -> None:
        """Raise if a target cannot do what is asked."""

    def on_begin(self, trainer: Trainer, resumed: bool) -> None:
        """Training starts."""

    def begin_domain(self, trainer: Trainer, index: int, name: str) -> None:
        """Training on a domain of a `DomainSequence` starts (or goes on); after `on_begin`."""

    def serving(self, index: int, name: str) -> AbstractContextManager[None]:
        """Around the evaluation of a domain: by methods whose model depends on it."""
        return nullcontext()

    def on_step(self, trainer: Trainer, step: int) -> None:
        """An optimizer step was taken."""

    def on_validated(self, trainer: Trainer) -> None:
        """A validation inside training has ended."""

    #: How sparse the targets become follows from the method's other settings: nobody need ask for a sparsity.
    sets_sparsity = False
    #: What a plan says of a target without a sparsity of its own.
    follows = "as it is"
    #: The targets share one budget: how much each of them loses is decided when it is pruned.
    pooled = False

    def final(self, tensor: MaskedTensor) -> Sparsity | None:
        """The sparsity a tensor is to reach in the end (with a pooled budget: all of them together); None: as it is."""
        return None

    def asked(self) -> float | None:
        """The final sparsity asked for over all targets; None for a method that asks for none."""
        goals = [(self.final(t), math.prod(t.target.shape)) for t in self.masks]
        if any(goal is None for goal, _ in goals):
            return None
        return sum(float(goal or 0) * numel for goal, numel in goals) / sum(numel for _, numel in goals)

    def curves(self, clock: Clock) -> dict[float, Curve]:
        """The resolved schedule for every final sparsity among the tensors; empty for a method without one."""
        return {}

    def shortfall(self) -> str | None:
        """What the method was asked for and has not reached, or None."""
        return None

    def facts(self) -> dict[str, Any]:
        """What is worth reading of a finished run beside its masks; plain numbers and text, for metrics.json."""
        return {}

    def method_state(self) -> dict[str, Any]:
        """What the method must remember."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what `method_state` gave."""

    # -- what Lightning calls ---------------------------------------------------------------------------------------------

    @property
    def masks(self) -> MaskManager:
        """The manager; raises before ``setup`` has made it."""
        if self.manager is None:
            raise PatternError(f"{type(self).__name__} has no model yet: masks exist once trainer.fit has set it up")
        return self.manager

    @property
    def resume(self) -> ExactResume:
        """The streams and position this run resumes with."""
        found = self.__dict__.get("_resume")
        if found is None:
            found = self.__dict__["_resume"] = ExactResume()
        return found

    def use(self, model: nn.Module, manager: MaskManager | None = None) -> MaskManager:
        """Bind this method to a model, with a ready manager or one of its own making; validates at once.

        With a ready manager, its patterns and targets are what holds. Raises `PatternError` where this method was asked for
        others than it has.
        """
        if manager is None and self.manager is not None and self.manager.model is model:
            manager = self.manager
        elif manager is not None:
            require_agreement(self, manager)
        self.manager = manager or self.create_manager(model)
        self.validate()
        return self.manager

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find or make the manager, before anything is sharded or loaded."""
        if stage != "fit":
            return
        others = [c for c in trainer.callbacks if isinstance(c, SparsityCallback) and c is not self]  # type: ignore[attr-defined]
        if others:
            raise RecipeError(
                f"{type(self).__name__} and {type(others[0]).__name__} both set masks in this trainer, and one would undo the "
                "other; give one method both jobs by overrides, or run them one after the other"
            )
        self.use(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Masks (bit-packed), random streams, position in the data, and the method's own memory."""
        if self.manager is None:
            return {}
        return {
            "masks": self.manager.state_dict(),
            "unclaimed": dict(self.manager.unclaimed),
            "resume": self.resume.state_dict(),
            "method": self.method_state(),
            "seen": self._seen,
            "validation_due": self._validation_due,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load masks into the manager, and the rest when training starts."""
        if not state_dict:
            return
        if self.manager is not None:
            self.manager.load_state_dict(state_dict["masks"])
            self.manager.unclaimed = dict(state_dict.get("unclaimed", {}))
        self._state = state_dict

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume from a checkpoint that knows no masks: the run would go on dense."""
        if trainer.state.fn == "fit" and self.state_key not in checkpoint.get("callbacks", {}):
            others = [key.split("{")[0] for key in checkpoint.get("callbacks", {})]
            raise MaskStateError(
                f"the checkpoint holds no masks of {type(self).__name__} (callbacks in it: {', '.join(others) or 'none'}): "
                "resuming would go on dense. Resume from a checkpoint this method wrote, or start a new run from its weights "
                "(init_from in a recipe, MaskManager.adopt in code)"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizers, follow averaged copies, hand over to the method."""
        resumed, self._state = self._state, None
        if all(
            type(optimizer).__name__ == "_MockOptimizer" for optimizer in trainer.optimizers
        ):  # Lightning's stand-in for none
            raise RecipeError(
                "configure_optimizers returns no optimizer: masks are kept through the steps of optimizers Lightning knows; "
                "return them (also with manual optimization), or attach a MaskManager to yours"
            )
        self.attach(trainer)
        if resumed is not None:
            self.resume.load_state_dict(resumed["resume"])
        self.resume.on_train_start(trainer)
        if resumed is not None:
            self._seen = int(resumed["seen"])
            self.load_method_state(resumed["method"])
        else:
            self._seen = current_step(trainer)
        self.on_begin(trainer, resumed is not None)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "domains"):
            self.begin_domain(trainer, data.current, data.domain)
        self.log_sparsity(trainer)
        if resumed is not None and resumed["validation_due"]:
            # The checkpoint was written between a batch and its validation, which Lightning would take for done.
            self.resume.validate(trainer)

    def attach(self, trainer: Trainer) -> None:
        """Keep the masks through the steps of the trainer's optimizers, and in averaged copies of the weights."""
        self.masks.detach()
        # A clipped norm must not count the gradients of pruned entries; with manual optimization nobody knows who clips.
        clips = trainer.gradient_clip_val is not None or not trainer.lightning_module.automatic_optimization
        self.masks.attach(*trainer.optimizers, mask_gradients=True if clips else None)
        for copy in averaged_copies(trainer):
            self.masks.follow(copy)
        self.masks.enforce()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the first batch of a resumed run from the streams saved."""
        self.resume.on_train_batch_start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the method of every optimizer step, once (accumulated batches and skipped steps are none)."""
        step = current_step(trainer)
        if step > self._seen:
            self._seen = step
            changes = len(self.masks.changes)
            self.on_step(trainer, step)
            if len(self.masks.changes) > changes:
                self.log_sparsity(trainer)
        # With the last batch the epoch is over: nothing of the next one is done.
        self.resume.on_train_batch_end(-1 if trainer.is_last_batch else batch_idx)
        loop: Any = trainer.fit_loop.epoch_loop
        self._validation_due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation must not move the random streams of training."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.resume.on_validation_start()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the method, and put the streams back."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validation_due = False
        self.resume.on_validation_end()
        self.on_validated(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify. Raises `PatternError` for a broken promise; warns if less was reached than asked."""
        if self._state is not None:
            # Resumed at its very end, a run never starts: what it remembers is still to be taken back.
            self._state["validation_due"] = False
            self.on_train_start(trainer, pl_module)
        self.verification = self.masks.verify(strict=True)
        missing = self.shortfall()
        if missing:
            warnings.warn(f"{type(self).__name__}: {missing}", stacklevel=2)

    def sparsity_now(self) -> float:
        """The share of the targets' weights that is gone."""
        return self.masks.sparsity()

    def log_sparsity(self, trainer: Trainer) -> None:
        """Give every logger ``sparsity/global`` and ``sparsity/<tensor>``."""
        counts = self.masks.counts()
        series = {f"sparsity/{name}": dead / numel for name, (dead, numel) in counts.items()}
        series = {"sparsity/global": self.sparsity_now()} | series
        for logger in trainer.loggers:
            logger.log_metrics(series, step=current_step(trainer))


def current_step(trainer: Trainer) -> int:
    """Optimizer steps so far. With manual optimization one training batch counts as one step, whatever it does inside."""
    if trainer.lightning_module.automatic_optimization:
        return int(trainer.global_step)
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def averaged_copies(trainer: Trainer) -> list[nn.Module]:
    """The averaged models that Lightning's ``WeightAveraging`` and ``StochasticWeightAveraging`` callbacks keep."""
    found = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return [copy for copy in found if isinstance(copy, nn.Module)]
