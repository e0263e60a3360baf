"""What methods share that prune coupled groups: the structure of the model, its masks, and compaction while training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, get_args

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from sparsetrain.calibration import at_rest, runner
from sparsetrain.calibration.data import first_sample
from sparsetrain.callbacks.base import SparsityCallback, averaged_copies
from sparsetrain.callbacks.clock import clock_of
from sparsetrain.callbacks.groups import Groups, first_training_sample
from sparsetrain.errors import MaskStateError, RecipeError, TargetError
from sparsetrain.masks import sharding
from sparsetrain.structure import (
    Compacted,
    CoupledGroup,
    CoupledManager,
    Structure,
    compact,
    compact_again,
    coupled_manager,
    dead_units,
    find_structure,
    prune_units,
    remaining,
)
from sparsetrain.structure.budget import Budget, Measure, alike, positions
from sparsetrain.targets import compile_regex


class StructuredCallback(SparsityCallback):
    """A method on coupled groups: ``structure`` is all that was found, ``chosen`` what this method may prune.

    Args:
        groups: see `Groups`.
        compact: how often pruned units are taken out of the model while it trains (``"1ep"``, ``"500st"``), and at the end;
            ``"end"``: then only; None: they stay, as zeros.
        budget: what ``cost`` counts of the weights the groups cut: ``"parameters"``, or ``"flops"`` (multiplications of one
            sample).

    ``compacted`` has what was taken out, each time. Raises `TargetError` where nothing can go.
    """

    sets_sparsity = True
    follows = "by unit"

    def __init__(self, groups: Groups | None, compact: str | None, budget: Measure) -> None:
        super().__init__()
        if budget not in get_args(Measure):
            raise RecipeError(f"budget={budget!r}; there are {', '.join(get_args(Measure))}")
        self.groups = groups or Groups()
        self.compact = compact
        self.budget: Measure = budget
        self.compacted: list[Compacted] = []
        self.structure: Structure | None = None
        self.chosen: list[CoupledGroup] = []
        self.units: dict[str, int] = {}
        self.cost: Budget | None = None
        self._sample = self.groups.sample
        self._taken: list[dict[str, Tensor]] = []
        self._compact_every = 0

    # -- the structure ------------------------------------------------------------------------------------------------------

    def look(self, data: Any) -> None:
        """Take the first training sample as the sample, unless there is one; of a data module, or a loader."""
        if self._sample is not None or data is None:
            return
        self._sample = first_training_sample(data)

    def create_manager(self, model: nn.Module) -> CoupledManager:
        """Find the groups and make masks for all that they cut. Raises `TargetError` where nothing can go."""
        given = self._sample if self._sample is not None else getattr(model, "example_input_array", None)
        if given is None:
            raise RecipeError(
                f"{type(self).__name__} runs the model once to see what belongs together: set the model's example_input_array, "
                "give groups.sample, or train on a data module"
            )
        self._sample, self.compacted, self._taken = first_sample(given), [], []
        structure = find_structure(model, self._sample)
        patterns = [compile_regex(pattern, "exclude") for pattern in self.groups.exclude]
        names = {g.name for g in structure.of_kind(*self.groups.kinds) if not any(p.search(g.name) for p in patterns)}
        if not names:
            why = "; ".join(f"{g.name} ({g.kind}): {g.fixed or 'not asked for'}" for g in structure)
            asked = ", ".join(self.groups.kinds)
            raise TargetError(f"no group of kind {asked} is left that can be pruned. There are {why[:900]}")
        self.cost = None
        manager = self._bind(model, structure, names)
        self.units = {group.name: group.units for group in self.chosen}
        return manager

    def _bind(self, model: nn.Module, structure: Structure, names: set[str]) -> CoupledManager:
        """Make masks and costs for a structure; what was there before a compaction still counts as gone."""
        self.structure = structure
        self.chosen = [group for group in structure if group.name in names]
        used = None
        if self.budget == "flops":
            with at_rest(model, [], gradients=False):
                used = positions(model, lambda: runner(model)(self._sample))
        full = None if self.cost is None else self.cost.full
        self.cost = Budget(model, self.chosen, used)
        self.cost.full = full or self.cost.full
        if not self.cost.full:
            raise TargetError(f"no multiplication of {', '.join(sorted(names))} is counted; use budget: parameters")
        return coupled_manager(model, self.chosen)

    # -- units ------------------------------------------------------------------------------------------------------------

    def dead(self) -> dict[str, Tensor]:
        """Group -> bool (units,), the units that are pruned and not taken out yet."""
        return {group.name: dead_units(self.masks, group) for group in self.chosen}

    def left(self) -> dict[str, tuple[int, int]]:
        """Group -> (units left, units at first)."""
        return {name: (len(gone) - int(gone.sum()), self.units[name]) for name, gone in self.dead().items()}

    def gone(self) -> float:
        """The share of the budget that is gone."""
        assert self.cost is not None
        return self.cost.gone(self.dead())

    def prune(self, dead: dict[str, Tensor], step: int, why: str) -> int:
        """Units that die, beside those that are dead already; returns how many entries changed."""
        manager = self.masks
        assert isinstance(manager, CoupledManager)
        before = self.dead()
        return prune_units(manager, {name: units.cpu() | before[name] for name, units in dead.items()}, step, why)

    def asked(self) -> float | None:
        """Nothing is asked of single tensors."""
        return None

    def facts(self) -> dict[str, Any]:
        """For metrics.json: units left of each group, and the share of the budget that is gone."""
        taken = [{"parameters": [c.before, c.after], "difference": c.difference} for c in self.compacted]
        units = {name: list(pair) for name, pair in self.left().items()}
        return {"structure": {"budget": self.budget, "gone": self.gone(), "units": units, "compacted": taken}}

    def sparsity_now(self) -> float:
        """The share of the targets' weights that is gone, what was taken out included."""
        counts = self.masks.counts().values()
        taken = sum(done.before - done.after for done in self.compacted)
        return (taken + sum(dead for dead, _ in counts)) / (taken + sum(numel for _, numel in counts))

    def choose(self, worth: dict[str, Tensor], dead: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        """Units to go, least worth for their cost first, until a share of the budget is gone; see `Budget.choose`."""
        assert self.cost is not None
        families = alike(self.chosen) if self.groups.alike else ()
        return self.cost.choose(worth, dead, share, self.groups.at_least, families, self.groups.multiple)

    # -- compaction ---------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """When to compact; and refuse where nobody can."""
        if any(sharding.local(tensor.target.parameter) is not tensor.target.parameter for tensor in self.masks):
            raise RecipeError(
                f"{type(self).__name__} looks at whole units, and this model is sharded (FSDP2): use DDP, or one process"
            )
        if self.compact not in (None, "end"):
            self._compact_every = clock_of(trainer).steps(str(self.compact))
            if trainer.world_size > 1:
                raise RecipeError(
                    f"compact={self.compact!r} cuts parameters while they train, and {trainer.world_size} processes share "
                    "their gradients by shapes; use compact: end"
                )
            if not self._compact_every:
                raise RecipeError(f"compact={self.compact!r} is never; write 1ep, 500st, or end")
        super().on_train_start(trainer, pl_module)

    def on_step(self, trainer: Trainer, step: int) -> None:
        """Take out what is pruned, when it is time."""
        if self._compact_every and step % self._compact_every == 0:
            self.take_out(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify, then take out what is left of the pruned units."""
        super().on_fit_end(trainer, pl_module)
        if self.compact is not None:
            self.take_out(trainer)

    def take_out(self, trainer: Trainer) -> None:
        """Take pruned units out of model, optimizers and averaged copies, and make masks for what is left."""
        dead = {name: units for name, units in self.dead().items() if bool(units.any())}
        if not dead:
            return
        assert self.structure is not None
        model, old = trainer.lightning_module, self.masks
        old.detach()
        copies, optimizers = averaged_copies(trainer), trainer.optimizers
        try:
            done = compact(model, self.structure, dead, self._sample, optimizers=optimizers, copies=copies)
        except BaseException:
            self.attach(trainer)  # everything is as it was, and stays masked
            raise
        self._renew(done, dead)
        self.attach(trainer)
        self.log_sparsity(trainer)

    def _renew(self, done: Compacted, dead: dict[str, Tensor]) -> None:
        assert self.structure is not None
        old = self.masks
        self.compacted.append(done)
        self._taken.append(dead)
        names = {group.name for group in self.chosen}
        self.manager = self._bind(old.model, remaining(self.structure, dead, done), names)
        self.manager.changes = old.changes

    # -- resuming -----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the groups on a sample of the trainer's data; a checkpoint's model may be smaller than this one."""
        if stage == "fit" and self._sample is None and getattr(pl_module, "example_input_array", None) is None:
            source: Any = trainer.fit_loop._data_source.instance
            self.look(source.train_dataloader() if isinstance(source, LightningModule) else source)
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        # Weights are loaded before callbacks get their states back, and after this hook of the model.
        pl_module.__dict__.pop("on_load_checkpoint", None)
        own: Callable[[dict[str, Any]], None] = pl_module.on_load_checkpoint

        def shrunk_first(checkpoint: dict[str, Any]) -> None:
            state = checkpoint.get("callbacks", {}).get(self.state_key) or {}
            self.catch_up(state.get("compacted", []), averaged_copies(trainer))
            own(checkpoint)

        object.__setattr__(pl_module, "on_load_checkpoint", shrunk_first)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was to be loaded is."""
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def catch_up(self, saved: Sequence[dict[str, Any]], copies: Iterable[nn.Module] = ()) -> None:
        """Take out of the model (and copies of it) what the one had lost whose checkpoint this is: its ``compacted``."""
        if len(saved) < len(self.compacted):
            raise MaskStateError("this model has lost more units than the checkpoint's had; go on with a model built anew")
        for state in saved[len(self.compacted) :]:
            done = Compacted(**state["record"])
            for model in (self.masks.model, *copies):
                compact_again(model, done)
            self._renew(done, state["dead"])

    def state_dict(self) -> dict[str, Any]:
        """Masks, and what was taken out so far."""
        state = super().state_dict()
        taken = zip(self.compacted, self._taken, strict=True)
        return state | {"compacted": [{"record": asdict(c), "dead": dead} for c, dead in taken]} if state else state
