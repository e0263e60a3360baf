"""Train a sparse student towards a dense teacher: its logits, and if wanted its hidden states.

When to use it: a pruned model is fine-tuned on little data, or at high sparsity, and the dense model (or any other of the same
task) is at hand. A plain callback, used beside a method (under ``callbacks:`` in a recipe): it sets no masks.

What it does: the teacher, frozen and in evaluation mode, sees what the student's network saw, and to the loss of
``training_step`` is added, l running over layers,
``task * loss + weight * T^2 KL(teacher_T || student_T) + hidden * sum_l MSE(f_t, f_s) / MSE(f_t, 0)``
(Hinton et al. 2015, arXiv 1503.02531; SquareHead, Kurtic et al. 2023, arXiv 2310.06927, who set all three to 1). Positions with
``attention_mask`` 0, or whose own label is -100, do not count.

Knobs: ``teacher``, ``weight`` and ``temperature``; ``hidden`` and ``layers`` for hidden states (same shapes needed);
``task=0.1`` with ``weight=0.9`` weighs as Hinton does.

Combines with: every method, AMP, accumulation, clipping, DDP. Random streams are those of a run without it: dropout of the
student is the same. It costs a forward pass of the teacher a batch, and its memory.

How it fails: a task whose ``training_step`` never calls ``network``, manual optimization and a teacher of other shapes are
refused by name. ``teacher="start"`` keeps the teacher's weights in every checkpoint (once more the size of the model), for a
resumed run needs them; a path is read again instead, and must still hold the same weights.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsetrain.checkpoints import matching, read_weights, require_merged, unwrapped
from sparsetrain.distillation import find_layers, hidden_loss, hidden_of, kept, logits_loss, logits_of
from sparsetrain.errors import MaskStateError, RecipeError, TargetError, nearest


@dataclass
class _Call:
    """One call of a network: what it was given, what it returned, the hidden states on the way."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    hidden: list[Tensor]


class Distillation(Callback):
    """Add a distillation loss to whatever ``training_step`` returns.

    Args:
        teacher: a module (frozen, moved to the student's device and precision); a checkpoint, run directory or transformers
            folder of the student's architecture; or ``"start"``: the student itself as it is when ``trainer.fit`` sets it up
            for the first time, before a method prunes it.
        weight: of the logits' term, 0 or more. With ``weight=0, hidden=0`` the teacher is measured and nothing is added.
        temperature: T of the logits' term, above 0.
        hidden: of the hidden states' term, 0 or more.
        task: factor of the loss itself, 0 or more.
        layers: modules of the network whose outputs are compared; by default its blocks, see `find_layers`.
        network: the student's attribute that is the network; ``""`` for the LightningModule itself.

    Logs ``train/distillation`` and, with ``hidden``, ``train/distillation_hidden``, before they are weighted. Raises
    `RecipeError` for numbers that cannot be and tasks it cannot wrap, `TargetError` for shapes that do not fit,
    `MaskStateError` for a teacher of another architecture.

    Example: ``Trainer(callbacks=[PruneFinetune(0.9), Distillation("start", hidden=1.0)])``.
    """

    def __init__(
        self,
        teacher: nn.Module | str = "start",
        weight: float = 1.0,
        temperature: float = 2.0,
        hidden: float = 0.0,
        task: float = 1.0,
        layers: Sequence[str] | None = None,
        network: str = "network",
    ) -> None:
        super().__init__()
        numbers = {"weight": weight, "hidden": hidden, "task": task}
        wrong = [f"{name}={value}" for name, value in numbers.items() if not 0 <= value < math.inf]
        if wrong or not 0 < temperature < math.inf:
            raise RecipeError(
                f"{', '.join(wrong) or f'temperature={temperature}'}: weights are 0 or more, the temperature above 0"
            )
        if isinstance(teacher, str) and teacher != "start" and not Path(teacher).exists():
            raise RecipeError(f"teacher {teacher!r} is neither 'start' nor a checkpoint, run directory or folder that is there")
        self.teacher, self.network = teacher, network
        self.weight, self.temperature, self.hidden, self.task = weight, temperature, hidden, task
        self.layers = list(layers or [])
        self._model: LightningModule | None = None
        self._frozen: nn.Module | None = None
        self._hooks: list[RemovableHandle] = []
        self._calls: list[_Call] = []
        self._states: list[Tensor] = []
        self._open = False
        self._measures_logits = bool(weight) or not hidden
        self._wrapped: tuple[LightningModule, dict[str, Any]] | None = None

    # -- the teacher ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the teacher ready, before anything is pruned."""
        if stage == "fit":
            self.use(pl_module)

    def use(self, pl_module: LightningModule) -> None:
        """Make the teacher of a model as it is now, before a model that goes on loses what had been taken out of it."""
        if not pl_module.automatic_optimization:
            raise RecipeError("Distillation adds to the loss that training_step returns, and manual optimization returns none")
        if self._model is pl_module:
            return  # a second fit: the teacher is who it was
        student = self._student(pl_module)
        teacher = self.teacher if isinstance(self.teacher, nn.Module) else copy.deepcopy(student)
        if isinstance(self.teacher, nn.Module):
            shared = {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}
            if shared:
                raise RecipeError("the teacher shares parameters with the student and would be trained; give a copy of it")
        elif self.teacher != "start":
            _load(teacher, Path(self.teacher))
        for parameter in teacher.requires_grad_(False).parameters():
            parameter.grad = None
        if self.hidden:
            self.layers = self.layers or find_layers(student)
            for module in (student, teacher):
                names = dict(module.named_modules())
                lost = [name for name in self.layers if name not in names]
                if lost:
                    raise TargetError(f"{type(module).__name__} has no layer {lost[0]!r}.{nearest(lost[0], names)}")
        self._model, self._frozen = pl_module, teacher.eval()

    def _student(self, module: LightningModule) -> nn.Module:
        found = module if not self.network else getattr(module, self.network, None)
        if not isinstance(found, nn.Module):
            names = ", ".join(name for name, _ in module.named_children())
            raise RecipeError(
                f"{type(module).__name__} has no network {self.network!r}; name the module that maps inputs to logits (its "
                f"children are {names}), or network='' for the LightningModule itself"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """The teacher's weights, if it is the student as it was."""
        return {"teacher": self._frozen.state_dict()} if self.teacher == "start" and self._frozen is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back the teacher."""
        if self.teacher == "start" and self._frozen is not None:
            self._frozen.load_state_dict(state_dict["teacher"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with a teacher that is not the one of the run."""
        if self.teacher == "start" and self.state_key not in checkpoint.get("callbacks", {}):
            raise MaskStateError(
                "the checkpoint holds no teacher: it was written by a run without Distillation('start'), and the student at "
                "its start is not known any more; give the teacher as a path"
            )

    # -- what Lightning calls ---------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to both networks and wrap ``training_step``."""
        student, teacher = self._student(pl_module), self._frozen
        assert teacher is not None
        _move(teacher, student)
        self._remove()
        for network in (student, teacher):
            for name in self.layers if self.hidden else ():
                self._hooks.append(network.get_submodule(name).register_forward_hook(self._note_state))
            self._hooks.append(network.register_forward_hook(self._note_call, with_kwargs=True))
        plain = pl_module.training_step
        self._wrapped = pl_module, {k: v for k, v in vars(pl_module).items() if k == "training_step"}

        @functools.wraps(plain)
        def distilled(*args: Any, **kwargs: Any) -> Any:
            calls, result = self._listen(plain, *args, **kwargs)
            return result if result is None else self._add(pl_module, args, calls, result)

        pl_module.training_step = distilled  # type: ignore[method-assign]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go."""
        self._remove()

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._wrapped is not None:
            module, before = self._wrapped
            vars(module).pop("training_step")
            vars(module).update(before)
            self._wrapped = None

    # -- doing it ---------------------------------------------------------------------------------------------------------

    def _note_state(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open:
            self._states.append(hidden_of(output))

    def _note_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._open:
            self._calls.append(_Call(args, kwargs, output, self._states))
            self._states = []

    def _listen(self, run: Any, *args: Any, **kwargs: Any) -> tuple[list[_Call], Any]:
        self._calls, self._states, self._open = [], [], True
        try:
            result = run(*args, **kwargs)
        finally:
            calls, self._calls, self._states, self._open = self._calls, [], [], False
        return calls, result

    def _add(self, module: LightningModule, args: tuple[Any, ...], calls: list[_Call], result: Any) -> Any:
        loss = result["loss"] if isinstance(result, Mapping) else result
        if not calls:
            raise RecipeError(
                f"training_step of {type(module).__name__} did not call its {self.network or 'forward'!r}: Distillation "
                "compares what that returns; name the module it calls (network)"
            )
        terms = [self._compare(call, args[0] if args else None) for call in calls]
        logits, hidden = (torch.stack(term).mean() for term in zip(*terms, strict=True))
        every = module.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (every and (module.global_step + 1) % every == 0) or module.trainer.is_last_batch:
            shown = {"train/distillation": logits} if self._measures_logits else {}
            shown |= {"train/distillation_hidden": hidden} if self.hidden else {}
            module.log_dict({name: value.detach() for name, value in shown.items()}, on_step=True, on_epoch=False)
        loss = loss if self.task == 1 else self.task * loss
        for factor, term in ((self.weight, logits), (self.hidden, hidden)):
            loss = loss + factor * term if factor else loss
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _compare(self, call: _Call, batch: Any) -> tuple[Tensor, Tensor]:
        """The logits' and the hidden states' term of one call."""
        assert self._frozen is not None
        device = next((v.device for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor)), torch.device("cpu"))
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            (teacher,), _ = self._listen(self._frozen, *call.args, **call.kwargs)
        seen = {**_labels(batch), **call.kwargs}
        zero = torch.zeros((), device=device)
        logits = hidden = zero
        if self._measures_logits:
            mine, theirs = logits_of(call.output), logits_of(teacher.output)
            mine = mine if self.weight else mine.detach()
            logits = logits_loss(mine, theirs, self.temperature, kept(seen, mine.shape[:-1]))
        if self.hidden:
            if call.hidden and not any(state.requires_grad for state in call.hidden):
                raise RecipeError(
                    "no gradient flows from the hidden states: all of the network below them is frozen; name later layers, or "
                    "hidden=0"
                )
            hidden = hidden_loss(call.hidden, teacher.hidden, kept(seen, call.hidden[0].shape[:-1]))
        return logits, hidden


def _move(teacher: nn.Module, student: nn.Module) -> None:
    """Bring a teacher to the student's device and precision, each tensor to that of the student's of the same name."""
    like = next((p for p in student.parameters() if p.is_floating_point()), None)
    if like is None:
        return
    # A model of half precision may keep some buffers in single, such as the frequencies of rotary positions.
    kinds = {name: value.dtype for name, value in (*student.named_parameters(), *student.named_buffers())}
    teacher.to(like.device)
    for name, value in (*teacher.named_parameters(), *teacher.named_buffers()):
        if value.is_floating_point():
            value.data = value.data.to(kinds.get(name, like.dtype))


def _labels(batch: Any) -> dict[str, Any]:
    """What a batch says about positions: a mapping by its own names, a pair by its second."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return {"labels": batch[1]} if isinstance(batch, tuple | list) and len(batch) == 2 else {}


def _load(teacher: nn.Module, path: Path) -> None:
    """Load weights into a copy of the student, which may have adapters that do nothing yet."""
    weights = read_weights(path)["state_dict"]
    require_merged(path, weights)
    stored = {name: name.replace(".base_layer.", ".") for name in teacher.state_dict() if ".lora_" not in name}
    found = matching(weights, teacher)
    own = unwrapped(teacher.state_dict())
    wrong = [name for name in own if name not in found or found[name].shape != own[name].shape]
    wrong += [name for name in found if name not in own]
    if wrong:
        raise MaskStateError(
            f"teacher {path} is of another architecture than the student: they differ in {wrong[0]}; give it as a module"
        )
    teacher.load_state_dict({name: found[plain] for name, plain in stored.items()}, strict=False)
