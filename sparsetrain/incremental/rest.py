"""What tasks share beside the weights that a method gives them: the head's rows, biases, norms and whatever else there is.

* **The head** is one layer with an output for every class. A row belongs to the first task that has its class: trained by that
  task, frozen ever after, and in tasks that do not have the class.
* **The rest** (biases, norms with their running statistics, embeddings, layers that are no targets) is trained by the first
  task and frozen ever after, as in PackNet; or, ``per_task``, trained by every task, which then has a copy of its own.

Without classes (a model that does not say ``current_classes``) the head is one of the rest. Pure torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _NormBase

from sparsetrain.errors import TargetError
from sparsetrain.incremental.frozen import FrozenEntries
from sparsetrain.incremental.owners import FREE
from sparsetrain.targets import Targets, plain_name


def head_of(model: nn.Module) -> tuple[str, ...]:
    """Plain names of the parameters of a model's output head, weight first; empty if it has none.

    Example: ``head_of(LeNet300())`` is ``("fc3.weight", "fc3.bias")``.
    """
    with_head = {target.name: target for target in Targets(head=True).match(model).targets}
    for target in Targets().match(model).targets:
        del with_head[target.name]
    names: list[str] = []
    for target in with_head.values():
        names.append(target.name)
        bias = getattr(target.module, "bias", None)
        names += [plain_name(name) for name, parameter in model.named_parameters() if parameter is bias]
    return tuple(names)


class Rest:
    """The rest of a model beside the named targets, task by task.

    Args:
        model: its parameters outside of ``targets`` are the rest.
        targets: plain names of the parameters that a method gives to tasks itself.
        per_task: a copy of the rest for each task, instead of the first task's for all.
        head: whether the head's rows are kept here; otherwise the method does that, and names them in ``targets``.

    Raises `TargetError` if the head is kept here and one of the targets.
    """

    def __init__(self, model: nn.Module, targets: set[str], per_task: bool = False, head: bool = True) -> None:
        self.model = model
        self.per_task = per_task
        self.head = head_of(model) if head else ()
        if shared := targets & set(self.head):
            raise TargetError(
                f"{sorted(shared)[0]} is the output head, whose rows belong to the classes; leave it out (targets.head: false)"
            )
        parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        self._others = {name: p for name, p in parameters.items() if name not in targets and name not in self.head}
        self._rows = {name: parameters[name] for name in self.head}
        self._norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
        #: Owner of each row of the head; None while no task has said its classes.
        self.owners: Tensor | None = None
        self.copies: dict[int, dict[str, Tensor]] = {}
        self._classes: list[int] | None = None

    def begin(self, task: int, classes: list[int] | None, frozen: FrozenEntries) -> None:
        """Freeze what task ``task`` (from 1) may not move."""
        self._classes = classes
        if classes is None or not self._rows:
            self._join_head()
        elif self.owners is None:
            self.owners = torch.zeros(len(next(iter(self._rows.values()))), dtype=torch.uint8)
        if task > 1 and not self.per_task:
            for parameter in self._others.values():
                frozen.freeze(parameter)
        for parameter in self._rows.values():
            assert self.owners is not None
            mine = torch.zeros_like(self.owners, dtype=torch.bool)
            mine[self._classes] = True
            mine &= (self.owners == FREE) | (self.owners == task)
            rows = (~mine).to(parameter.device).view(-1, *[1] * (parameter.ndim - 1))
            frozen.freeze(parameter, rows.expand(parameter.shape))

    def _join_head(self) -> None:
        """Without classes the head is one of the rest."""
        self._others |= self._rows
        self._rows = {}

    def refuse_norms(self, way_out: str) -> None:
        """Raise `TargetError` if a norm keeps running statistics: the first task's say nothing of neurons it leaves free."""
        for name, module in self.model.named_modules():
            if module in self._norms:
                raise TargetError(
                    f"{name} keeps running statistics, which stay those of the first task: of neurons it leaves free they are "
                    f"those of zeros, and later tasks would learn through them. {way_out}"
                )

    def hold_norms(self, task: int) -> None:
        """Let norms use the first task's running statistics, and leave them alone, while later tasks train."""
        if task > 1 and not self.per_task:
            for module in self._norms:
                module.eval()

    def end(self, task: int) -> None:
        """Task ``task`` is over: rows of the head that were free are its own, and so is a copy of the rest."""
        if dist.is_available() and dist.is_initialized():
            for module in self._norms:  # ranks have seen other samples last; later on all will have what the first has
                for statistic in module.buffers(recurse=False):
                    dist.broadcast(statistic, 0)
        if self.owners is not None and self._classes is not None:
            owners, classes = self.owners.clone(), torch.tensor(self._classes)
            owners[classes] = torch.where(owners[classes] == FREE, task, owners[classes])
            self.owners = owners
        if self.per_task:
            self.copies[task] = {name: tensor.detach().cpu().clone() for name, tensor in self._own().items()}
        else:
            for module in self._norms:
                module.train()

    @contextmanager
    def serving(self, task: int) -> Iterator[None]:
        """The rest as task ``task`` left it, for as long as the context lasts."""
        copy = self.copies.get(task, {})
        now = {name: tensor.detach().clone() for name, tensor in self._own().items()} if copy else {}
        try:
            self._write(copy)
            yield
        finally:
            self._write(now)

    def weights(self) -> int:
        """Numbers kept in all, the copies of tasks included."""
        shared = sum(p.numel() for p in (*self._others.values(), *self._rows.values()))
        return shared + sum(tensor.numel() for copy in list(self.copies.values())[1:] for tensor in copy.values())

    def state_dict(self) -> dict[str, Any]:
        """Owners of the head's rows and the copies of tasks; whether the head is one of the rest."""
        return {"owners": self.owners, "copies": dict(self.copies), "joined": not self._rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.owners = state["owners"]
        self.copies = {int(task): copy for task, copy in state["copies"].items()}
        if state.get("joined"):
            self._join_head()

    def _own(self) -> dict[str, Tensor]:
        own: dict[str, Tensor] = dict(self._others)
        for index, module in enumerate(self._norms):
            own |= {f"norm {index} {name}": tensor for name, tensor in module.named_buffers(recurse=False)}
        return own

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        own = self._own()
        for name, value in values.items():
            own[name].detach().copy_(value)
