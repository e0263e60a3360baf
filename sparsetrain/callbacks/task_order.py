"""Tasks in the order they came: what every method that keeps them apart does alike. Not a callback."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from sparsetrain.callbacks.base import averaged_copies
from sparsetrain.errors import PatternError, RecipeError
from sparsetrain.incremental import LAST_TASK, FrozenEntries, Rest
from sparsetrain.masks import MaskManager
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
        """Training of a task starts; True if it is a new one, False if it goes on after an interruption.

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
        if new:
            if self.task == LAST_TASK:
                raise PatternError(f"{LAST_TASK} tasks are the most that {self.method} tells apart; start a new network")
            self.names.append(name)
        return new

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


def current_classes(trainer: Trainer) -> list[int] | None:
    """The classes of the task at work, of a model that says them (`IncrementalClassification`), or None."""
    return getattr(trainer.lightning_module, "current_classes", None) or None
