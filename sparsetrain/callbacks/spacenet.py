"""SpaceNet: class after class in one sparse network, without being told at test time which task it is.

When to use it: classes come in tasks, and nobody says later which task an image is of (class-incremental); old data are gone,
or a few samples of each class may be kept.

What it does (after Sokar et al. 2021, Neurocomputing 439, arXiv 2007.07617): each task selects some free neurons of every
hidden layer, connects them sparsely at random, and trains these connections alone; every ``every`` the least important
``fraction`` of them is dropped, and as many grow between the neurons that matter most, so that a task compacts into few
neurons. At its end the most important ``reserve`` of its neurons are reserved: later tasks neither read nor write them. There
is one mask for all tasks. With ``reserve`` 1 tasks share no neuron, and the logits of old classes stay the same, bit for bit,
without knowing the task.

Without samples the logits of tasks that never met must be comparable: train with scenario "class" and ``compete: zero``, which
is what the authors' code comes to, and not for long: what fits its own two classes too well is too sure of all others. With
``memory`` samples a class, stored when their task ends, every later batch has as many old samples of each class as new ones,
and the head trains all rows seen so far, ``compete: seen``.

Knobs: ``neurons`` of each layer a task selects, ``reserve``, ``sparsity`` of its connections. Authors: 0.2 of 400, half of them
reserved, about 0.84.

Combines with: networks whose targets form a chain (MLP, LeNet), any optimizer, LR schedule, accumulation, AMP, clipping.

How it fails: branches, shortcuts and whatever mixes neurons (LayerNorm) or keeps running statistics of them (BatchNorm) are
refused, FSDP2 and averaged weights too; a network without free neurons takes no task.
Memory-free, old and new classes are confused far more than with any replay: expect 70 to 80 % on split MNIST.
"""

from __future__ import annotations

from copy import deepcopy
from fractions import Fraction
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from sparsetrain.callbacks.base import current_step
from sparsetrain.callbacks.clock import clock_of
from sparsetrain.callbacks.task_order import TaskMethod, TaskOrder, current_classes
from sparsetrain.errors import DataError, PatternError, RecipeError
from sparsetrain.incremental.chain import require_chain
from sparsetrain.incremental.samples import SampleMemory
from sparsetrain.incremental.spaces import Spaces, fresh_weights
from sparsetrain.masks import MaskedTensor, MaskManager
from sparsetrain.nm import around_step
from sparsetrain.patterns import exact
from sparsetrain.targets import Targets


class SpaceNet(TaskMethod):
    """Give each task neurons of its own in one sparse network.

    Args:
        neurons: share of every hidden layer's neurons that a task selects, in (0, 1); "even" for one over the tasks there are.
        reserve: share of these that no later task touches, in [0, 1].
        sparsity: of the connections between them, in [0, 1). The head is dense between a task's neurons and its classes.
        every: duration between two moves of connections.
        fraction: of a task's connections that move each time, in [0, 1); none in the last ``every`` of a task.
        memory: samples a class to keep and to replay; 0 for none.
        targets: the hidden layers, in forward order; see `Targets`. The head belongs to them always.

    Raises `RecipeError`, `TargetError` or `PatternError` for what cannot work; `PatternError` when too few neurons are free.

    Example, with one object for all tasks and a trainer for each::

        method = SpaceNet()
        for name in sequence:
            sequence.enter(name)
            Trainer(callbacks=[method]).fit(model, datamodule=sequence)
    """

    def __init__(
        self,
        neurons: float | Literal["even"] = "even",
        reserve: float = 1.0,
        sparsity: float = 0.8,
        every: str = "1ep",
        fraction: float = 0.2,
        memory: int = 0,
        targets: Targets | None = None,
    ) -> None:
        super().__init__()
        if neurons != "even" and not (isinstance(neurons, float) and 0 < neurons < 1):
            raise RecipeError(f"neurons={neurons!r}: give the share of a layer a task selects, in (0, 1), or 'even'")
        if not 0 <= reserve <= 1 or not 0 <= fraction < 1:
            raise RecipeError(f"reserve={reserve}, fraction={fraction}: reserve must be in [0, 1], fraction in [0, 1)")
        self.neurons, self.reserve, self.every, self.fraction = neurons, reserve, every, fraction
        self.sparsity = exact(sparsity)
        self.memory = SampleMemory(memory)
        chosen = targets or Targets()
        self.targets = Targets(chosen.include, chosen.exclude, chosen.embeddings, head=True)
        self._spaces: Spaces | None = None
        self._importance: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._moves: list[int] = []
        self._moved = 0
        self._chained = False

    # -- building ---------------------------------------------------------------------------------------------------------

    def create_manager(self, model: nn.Module) -> MaskManager:
        """A manager of the one mask, the head's included."""
        return MaskManager(model, self.targets)

    def forget(self, made: MaskManager) -> TaskOrder:
        """All neurons are free, no sample is kept. Refuses norms whose statistics would tell nothing of free neurons."""
        biases = {t.name.removesuffix("weight") + "bias" for t in made if getattr(t.target.module, "bias", None) is not None}
        order = TaskOrder("SpaceNet", made, False, own={*made.tensors, *biases})
        order.rest.refuse_norms("SpaceNet needs a network without (MLP, LeNet5Caffe)")
        self._spaces = Spaces({t.name: t.target.view_shape for t in made})
        self.memory = SampleMemory(self.memory.per_class)
        self._importance, self._chained = {}, False
        return order

    @property
    def spaces(self) -> Spaces:
        """Whose neurons and connections are whose; raises before there is a model."""
        if self._spaces is None:
            raise PatternError("SpaceNet has no model yet: call use(model), or trainer.fit")
        return self._spaces

    # -- running ----------------------------------------------------------------------------------------------------------

    def begin_domain(self, trainer: Trainer, index: int, name: str) -> None:
        """A task begins: it gets neurons and connections, everything else is frozen."""
        classes = current_classes(trainer)
        if classes is None:
            raise RecipeError("SpaceNet gives rows of the head to classes; use the task IncrementalClassification")
        module = trainer.lightning_module
        if self.memory.per_class:
            if getattr(module, "scenario", None) != "class":
                raise RecipeError(
                    f"memory={self.memory.per_class} replays samples of old classes, which do not compete in "
                    f"{type(module).__name__}: use IncrementalClassification with scenario 'class'"
                )
            self._samples(trainer)  # better now than after the training
        every, total = max(1, clock_of(trainer).steps(self.every)), clock_of(trainer).total_steps
        if total is None:
            raise RecipeError("SpaceNet must know the length of a task's training; set max_epochs or max_steps")
        self._moves = list(range(every, total - every + 1, every))
        if self.order.enter(trainer, name):
            self._allocate(trainer, classes, self.order.task + 1)
            self.order.commit(name)
        if len(self.memory):
            module.replay = lambda x, y: self.memory.extend(x, y, self._key(trainer))  # type: ignore[assignment]
        self._hold(trainer)

    def _samples(self, trainer: Trainer) -> tuple[Tensor, ...]:
        data = trainer.datamodule[trainer.datamodule.current]  # type: ignore[attr-defined]
        tensors: tuple[Tensor, ...] | None = getattr(getattr(data, "train_set", None), "tensors", None)
        if tensors is None:
            raise DataError(f"memory={self.memory.per_class}: {type(data).__name__} has no train_set to keep samples of")
        return tensors

    def _key(self, trainer: Trainer) -> tuple[int, ...]:
        # Batches, not steps: those accumulated to one step see other samples each.
        batch: int = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        return self.resume.seed, self.order.task, batch, trainer.global_rank

    def _allocate(self, trainer: Trainer, classes: list[int], task: int) -> None:
        spaces = deepcopy(self.spaces)  # a refusal leaves everything as it was
        tasks = len(trainer.datamodule.names)  # type: ignore[attr-defined]
        share = Fraction(1, tasks) if self.neurons == "even" else exact(float(self.neurons))
        key = f"{self.resume.seed}/{task}"
        spaces.allocate(share, self.sparsity, classes, key)
        if self.memory.per_class:
            seen = sorted({*classes, *(self.memory.labels.tolist() if self.memory.labels is not None else [])})
            used = spaces.alive(spaces.hidden[-1]).any(1)
            spaces.open_head(seen, used)
        self._spaces, self._moved = spaces, 0
        for tensor in self.masks:
            new = self._entries(tensor, spaces.mine[tensor.name]) & ~self._alive(tensor)
            fresh = fresh_weights(tensor.target.view_shape, spaces.mine[tensor.name], f"{key}/{tensor.name}/weights")
            before = tensor.target.parameter.detach().clone()
            self._install(tensor, current_step(trainer), f"task {task} begins")
            fresh = tensor.target.layout.view(fresh).to(before)
            self.masks.write(tensor.name, torch.where(new.to(before.device), fresh, before))
            self._importance[tensor.name] = torch.zeros(spaces.shapes[tensor.name])

    def _alive(self, tensor: MaskedTensor) -> Tensor:
        return torch.zeros(tensor.target.shape, dtype=torch.bool) if tensor.mask is None else tensor.mask.cpu()

    def _entries(self, tensor: MaskedTensor, connections: Tensor) -> Tensor:
        """Connections (out, in) as entries of the stored weight."""
        shape = tensor.target.view_shape
        return tensor.target.layout.view(connections.view(*shape[:2], *[1] * (len(shape) - 2)).expand(shape)).contiguous()

    def _install(self, tensor: MaskedTensor, step: int, why: str) -> None:
        mask = self._entries(tensor, self.spaces.alive(tensor.name))
        sparsity = Fraction(int((~mask).sum()), mask.numel())
        self.masks.install(tensor.name, mask.to(tensor.target.parameter.device), sparsity, step=step, why=why)

    def _hold(self, trainer: Trainer) -> None:
        """Only the task's connections move, and the biases of its neurons."""
        frozen, spaces = self.order.frozen, self.spaces
        frozen.release()
        for tensor in self.masks:
            parameter, bias = tensor.target.parameter, getattr(tensor.target.module, "bias", None)
            frozen.freeze(parameter, ~self._entries(tensor, spaces.mine[tensor.name]).to(parameter.device))
            if bias is not None:
                neurons = spaces.selected.get(tensor.name, spaces.mine[tensor.name].any(1))
                frozen.freeze(bias, ~neurons.to(bias.device))
        self.order.freeze(trainer)
        for optimizer in trainer.optimizers:
            frozen.keep(*around_step(optimizer, self._note, self._weigh))

    @torch.no_grad()
    def _note(self) -> None:
        self._before = {t.name: t.target.parameter.detach().clone() for t in self.masks if t.target.parameter.grad is not None}

    @torch.no_grad()
    def _weigh(self) -> None:
        """A step was taken: connections that moved along their gradient matter."""
        for name, before in self._before.items():
            target = self.masks[name].target
            assert target.parameter.grad is not None
            effect = target.layout.view(((target.parameter.detach() - before) * target.parameter.grad).abs())
            found = effect.flatten(2).sum(2) if effect.ndim > 2 else effect
            self._importance[name] += found.float().cpu() * self.spaces.mine[name]
        self._before = {}

    def on_step(self, trainer: Trainer, step: int) -> None:
        """Move connections when it is due."""
        if self._moved < len(self._moves) and step >= self._moves[self._moved] and self.fraction:
            self._moved += 1
            for name in self.spaces.hidden:
                self.spaces.renew(name, self._importance, self.fraction)
            for tensor in self.masks:
                self._install(tensor, step, "drop and grow")
            self._hold(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first batch: the layers must be a chain."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._chained:
            require_chain(pl_module, {t.name: t.target.module for t in self.masks}, batch[0][:2])
            self._chained = True

    def finish(self, trainer: Trainer) -> None:
        """Reserve neurons, keep samples."""
        trainer.lightning_module.replay = None  # type: ignore[assignment]
        self.spaces.close(self._importance, Fraction(1) if self.reserve == 1 else exact(self.reserve))
        if self.memory.per_class:
            inputs, labels = self._samples(trainer)[:2]
            self.memory.add(inputs, labels, (self.resume.seed, self.order.task))

    def facts(self) -> dict[str, Any]:
        """Connections there are, neurons reserved by layer, and the samples kept."""
        spaces = self.spaces
        return {
            "connections": {name: int(spaces.alive(name).sum()) for name in spaces.names},
            "reserved": {name: int(neurons.sum()) for name, neurons in spaces.reserved.items()},
            "samples": len(self.memory),
        }

    # -- remembering ------------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        """Spaces, importance, the samples, the tasks."""
        return {
            "spaces": self.spaces.state_dict(),
            "importance": {name: value.clone() for name, value in self._importance.items()},
            "moved": self._moved,
            "memory": self.memory.state_dict(),
            **super().method_state(),
        }

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.spaces.load_state_dict(state["spaces"])
        self._importance = {name: value.clone() for name, value in state["importance"].items()}
        self._moved = state["moved"]
        self.memory.load_state_dict(state["memory"])
        super().load_method_state(state)
