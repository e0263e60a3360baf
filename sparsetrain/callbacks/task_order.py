"""Tasks in the order they came: what every method that keeps them apart does alike. A base, not a method."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from sparsetrain.callbacks.base import SparsityCallback, averaged_copies
from sparsetrain.errors import PatternError, RecipeError
from sparsetrain.incremental import LAST_TASK, FrozenEntries, Rest
from sparsetrain.masks import MaskedTensor, MaskManager
from sparsetrain.masks.sharding import local


class TaskOrder:
    """The tasks so far by name, what is frozen while one is trained, and the rest of the model beside the targets.

    Args:
        method: what errors call the method.
        manager: of the model; its tensors are what the method gives to tasks itself.
        per_task: a copy of the rest for each task, instead of the first task's for all.
        own: names of the parameters the method keeps itself, the head's too, if these are more than its tensors.
    """

    def __init__(self, method: str, manager: MaskManager, per_task: bool, own: set[str] | None = None) -> None:
        self.method = method
        self.rest = Rest(manager.model, own or set(manager.tensors), per_task, head=own is None)
        self.frozen = FrozenEntries()
        self.names: list[str] = []
        self.ended = 0
        for tensor in manager:
            if local(tensor.target.parameter) is not tensor.target.parameter:
                raise RecipeError(f"{tensor.name} is sharded: {method} does not train under FSDP2; use ddp")

    @property
    def task(self) -> int:
        """The task that is trained, or was trained last, from 1 on; 0 before the first."""
        return len(self.names)

    def enter(self, trainer: Trainer, name: str) -> bool:
        """Training of a task starts; True if it is a new one, to `commit`, False if it goes on after an interruption.

        Raises `RecipeError` for a task that is over, and where averaged weights would be mixed with frozen ones.
        """
        self.frozen.release()
        if averaged_copies(trainer):
            raise RecipeError(
                f"{self.method} cannot train with averaged weights (EMA, SWA): an average of frozen weights is not they, bit "
                "for bit; drop that callback"
            )
        new = self.ended == self.task
        if new and name in self.names:
            raise RecipeError(
                f"task {name!r} was trained before and is frozen; {self.method} trains each task once. Tasks so far: "
                f"{', '.join(self.names)}"
            )
        if not new and name != self.names[-1]:
            raise RecipeError(
                f"task {self.names[-1]!r} was not trained to its end, and {name!r} is to begin; resume {self.names[-1]!r} first"
            )
        if new and self.task == LAST_TASK:
            raise PatternError(f"{LAST_TASK} tasks are the most that {self.method} tells apart; start a new network")
        return new

    def commit(self, name: str) -> None:
        """Nothing refuses the new task any more: it is the one at work."""
        self.names.append(name)

    def freeze(self, trainer: Trainer) -> None:
        """Freeze the rest for the task at work, and hold everything frozen through the steps of the trainer's optimizers."""
        self.rest.begin(self.task, current_classes(trainer), self.frozen)
        # A clipped norm must not count the gradients of frozen entries.
        clips = trainer.gradient_clip_val is not None or not trainer.lightning_module.automatic_optimization
        self.frozen.attach(*trainer.optimizers, mask_gradients=True if clips else None)

    def leave(self) -> None:
        """The task at work is over."""
        self.frozen.release()
        self.rest.end(self.task)
        self.ended = self.task

    def place(self, name: str) -> int:
        """The number of a task, from 1 on; of one that was not trained yet, that of the last."""
        return self.names.index(name) + 1 if name in self.names else self.task

    def require_sequence(self, trainer: Trainer) -> None:
        """Raise `RecipeError` unless the data come as a `DomainSequence`, which says what a task is."""
        if not hasattr(trainer.datamodule, "domains"):  # type: ignore[attr-defined]
            raise RecipeError(
                f"{self.method} learns task by task, and the data do not say which task this is: give the trainer a "
                "DomainSequence as datamodule, and enter one domain after the other"
            )

    def state_dict(self) -> dict[str, Any]:
        """Names, how many are over, and the rest."""
        return {"names": list(self.names), "ended": self.ended, "rest": self.rest.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.names, self.ended = list(state["names"]), int(state["ended"])
        self.rest.load_state_dict(state["rest"])


class TaskMethod(SparsityCallback):
    """A method that keeps tasks apart. A subclass needs `create_manager`, `forget`, `begin_domain` and `finish`, and
    `weights_of` where the model depends on the task.
    """

    sets_sparsity = True
    follows = "by task"
    _order: TaskOrder | None = None

    # -- to fill in -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def forget(self, made: MaskManager) -> TaskOrder:
        """Another model, with this manager: begin anew. Returns the order of its tasks."""

    @abstractmethod
    def finish(self, trainer: Trainer) -> None:
        """The task at work is over, and verified."""

    def weights_of(self, tensor: MaskedTensor, task: int) -> Tensor:
        """The weights that task ``task`` (from 1) has ended with; as they are now, where tasks do not move each other's."""
        return tensor.target.parameter.detach()

    # -- what all do alike ------------------------------------------------------------------------------------------------

    def use(self, model: nn.Module, manager: MaskManager | None = None) -> MaskManager:
        """Bind to a model; on another one than before everything begins anew."""
        if manager is not None:
            raise RecipeError(f"{type(self).__name__} makes its own masks: call use(model), with a dense model and no manager")
        known = self.manager
        made = super().use(model)
        if made is not known:
            self.manager = known  # what is refused now is refused when it is asked for again
            self._order = self.forget(made)
            self.manager = made
        return made

    @property
    def order(self) -> TaskOrder:
        """The tasks so far; raises before there is a model."""
        if self._order is None:
            raise PatternError(f"{type(self).__name__} has no model yet: call use(model), or trainer.fit")
        return self._order

    def on_begin(self, trainer: Trainer, resumed: bool) -> None:
        """Only a sequence says what a task is, and the first one starts from a dense model."""
        self.order.require_sequence(trainer)
        if self.order.names:
            return
        me = type(self).__name__
        if self.masks.masks:
            raise RecipeError(f"{me} starts from a dense model, and this one has masks; start from its dense weights")
        for tensor in self.masks:
            weight = tensor.target.parameter.detach()
            zeros = int((weight == 0).sum())
            if zeros * 100 > weight.numel():  # a random start in low precision has some
                raise RecipeError(
                    f"{tensor.name}: {zeros} of {weight.numel()} weights are exactly 0, and this {me} knows of no task: has "
                    f"another one packed this model, its tasks would be lost. Pass the same {me} object for all tasks, or "
                    "resume; else start from dense weights, or leave the tensor out (targets.exclude)"
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Norms of the first task keep their statistics."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.order.rest.hold_norms(self.order.task)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The task is over: verify, and leave it. Raises `RecipeError` if it was never begun."""
        super().on_fit_end(trainer, pl_module)
        self.order.require_sequence(trainer)
        name = trainer.datamodule.domain  # type: ignore[attr-defined]
        if name not in self.order.names:
            raise RecipeError(
                f"no step was trained on {name!r}: the trainer had reached max_epochs; make a new Trainer for each task"
            )
        if self.order.ended < self.order.task:
            self.finish(trainer)
            self.order.leave()

    @contextmanager
    def serving(self, index: int, name: str) -> Iterator[None]:
        """The network as the task left it; for a task that was not trained, or not to its end, as it is now."""
        task = self.order.place(name)
        if not 0 < task <= self.order.ended:
            yield
            return
        now = {t.name: t.target.parameter.detach().clone() for t in self.masks}
        try:
            for tensor in self.masks:
                tensor.target.parameter.detach().copy_(self.weights_of(tensor, task))
            with self.order.rest.serving(task):
                yield
        finally:
            for tensor in self.masks:
                tensor.target.parameter.detach().copy_(now[tensor.name])

    def method_state(self) -> dict[str, Any]:
        """The tasks so far; a subclass adds to it."""
        return {"order": self.order.state_dict()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what `method_state` gave."""
        self.order.load_state_dict(state["order"])


def current_classes(trainer: Trainer) -> list[int] | None:
    """The classes of the task at work, of a model that says them (`IncrementalClassification`), or None."""
    return getattr(trainer.lightning_module, "current_classes", None) or None
