"""Prune domain after domain: each is measured on the base weights, and what was measured of the earlier ones still counts.

For every block, in the order of one-shot pruning (`sparsetrain.oneshot`): its base weights come back, one pass measures what
its layers are given by the blocks before it (pruned for this domain already), the means of this domain are added to those of
the domains before, ``A <- decay * A + weight * C``, and from ``A`` and the base weights the mask is chosen anew, over all
weights. So a weight that one domain dropped comes back if the next one needs it (no weight stasis), and one that an earlier
domain needs stays though the present one has no use for it (no forgetting). Data of earlier domains is not kept.

After Malla et al. 2024 (COPAL, arXiv 2405.02347) in spirit; ``A`` may hold any statistics that add up: of `Copal`, of `Wanda`
(what a Wanda that accumulates is), of `SparseGPT` (whose survivors then move to fit all domains at once), of `Fisher`.

Ties: a score of exactly 0 (nothing a layer is given reaches it) says nothing; such weights rank below all others, those that
were alive before first, then by magnitude.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsetrain.allocation import Allocation, get_allocation
from sparsetrain.calibration import agree, at_rest, calibrate, checksum, count_samples, runner
from sparsetrain.continual.remembering import Remembering
from sparsetrain.continual.settings import Memory, require_unsharded, validate_continual
from sparsetrain.criteria import Criterion, StatisticsCriterion, get_criterion
from sparsetrain.errors import DataError, MaskStateError, RecipeError
from sparsetrain.masks import MaskManager
from sparsetrain.oneshot import OneShotReport, Streaming
from sparsetrain.oneshot.engine import data_for
from sparsetrain.oneshot.job import Job, row_of, together
from sparsetrain.oneshot.settings import require_sane, to_prune
from sparsetrain.patterns import Sparsity
from sparsetrain.pruning import allocate

#: The segment of criteria that take the model as a whole.
_WHOLE = "the model"


@dataclass(frozen=True)
class Domain:
    """What one domain did. ``revived``: weights that came back; ``died``; ``pruned_before``: how many were pruned before it;
    ``samples``: of this process. ``churn`` is the share of what was pruned that came back, ``None`` for the first domain."""

    name: str
    samples: int
    weight: float
    died: int
    revived: int
    pruned_before: int
    seconds: float

    @property
    def churn(self) -> float | None:
        """``revived / pruned_before``; 1 - churn is the stasis rate."""
        return self.revived / self.pruned_before if self.pruned_before else None


class ContinualPruner:
    """Masks for domains that come one after the other.

    Args:
        manager: the masks; dense when the first domain is learned.
        sparsity: fraction of zeros in [0, 1); may be left out where the pattern has only one (2:4 is 0.5).
        criterion: ``"copal"``, ``"wanda"``, ``"sparsegpt"``, ``"output_fisher"``, ``"magnitude"``, or of gradients of the loss
            (``"fisher"``, ``"taylor"``), which are taken on the base weights of the whole model at once.
        allocation: how much where; one that does not pool scores: ``"uniform"``, ``"erk"``.
        memory: what a domain leaves to the next; see `Memory`.
        streaming: how data is taken through the blocks; see `Streaming`.

    ``domains`` is what was learned so far. `state_dict` holds all that another process needs to go on. Raises what
    `validate_continual` raises.

    Example::

        pruner = ContinualPruner(MaskManager(model, pattern="2:4"), criterion="copal")
        pruner.learn("news", news_batches)
        pruner.learn("law", law_batches)
    """

    def __init__(
        self,
        manager: MaskManager,
        sparsity: Sparsity | None = None,
        *,
        criterion: Criterion | str = "copal",
        allocation: Allocation | str = "uniform",
        memory: Memory | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        self.manager, self.sparsity = manager, sparsity
        self.score, self.spread = get_criterion(criterion), get_allocation(allocation)
        self.memory, self.streaming = memory or Memory(), streaming or Streaming()
        validate_continual(manager, sparsity, self.score, self.spread, self.memory)
        self.kept = Remembering(manager, self.score, self.memory)
        self.domains: list[Domain] = []
        self._checksum = ""
        self._data: list[Any] = []

    def learn(
        self,
        name: str,
        batches: Iterable[Any] | None = None,
        *,
        run: Callable[[Any], Any] | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        weight: float = 1.0,
        step: int = 0,
        progress: bool = False,
    ) -> OneShotReport:
        """Prune for one more domain.

        Args:
            name: of the domain, one that was not learned yet.
            batches: its calibration data, read once, with the base weights in the model (but for memory ``"stasis"``), should
                it make the data itself; criteria that need no data take none.
            run: gives a batch to the model; by default a mapping by name, of a tuple the first entry, a tensor as it is.
            loss: batch -> loss, for criteria of gradients.
            weight: of this domain's statistics, above 0; those of every domain are means, whatever its size.
            step: recorded with the changes.
            progress: a bar with the time left.

        An error, or a keyboard interrupt, leaves weights, masks and what was learned as they were. Raises `DataError` for a
        repeated name and for no data, `RecipeError` for a weight that is not positive, `MaskStateError` for a model that was
        changed since the last domain (see `absorb`), `RecipeError` for a sharded model and for a memory folder that is not
        this run's alone, and what `prune_oneshot` raises for data and activations.
        """
        together(lambda: self._require_ready(name, weight))
        started = time.perf_counter()
        with self.kept.unpruned():
            data = self._data_of(batches, loss)
        before = self.manager.counts()
        changes = len(self.manager.changes)
        with self._undone_on_error(changes):
            self.kept.begin(weight, step, f"domain {name}")
            if not isinstance(self.score, StatisticsCriterion) or self.score.needs == "gradient":
                report = self._whole([*self._data, *data], loss, step, progress)
            else:
                report = self._stream([*self._data, *data], run, step, progress)
            self.kept.commit()
        for tensor in self.manager:  # what was pending while the model was at rest
            tensor.mask_gradient(tensor.target.parameter)
        self._data = [*self._data, *data] if self.memory.mode == "joint" else []
        self._checksum = self._sum()
        died, revived = self.kept.changed
        report.seconds = time.perf_counter() - started
        pruned = sum(dead for dead, _ in before.values())
        self.domains.append(Domain(name, count_samples(data), weight, died, revived, pruned, report.seconds))
        return report

    def absorb(self) -> dict[str, float]:
        """Take over weights that training has changed since the last domain; returns tensor -> relative change.

        Survivors of the base weights become what they are now, pruned ones stay as they were in the base. What was measured
        stays: inputs (of Wanda, SparseGPT, Copal ``"final"``) were those of the old weights upstream, outputs (of other
        Copals) those of the old weights themselves, so that they are as far off as the weights have moved, which is what is
        returned. Empty if nothing has changed. Raises `DivergedError` for weights that are not finite; the base is then as it
        was.
        """
        changed = bool(self.domains) and self._sum() != self._checksum
        if not any(agree(None, changed)):
            return {}
        drift: dict[str, float] = together(lambda: self.kept.absorb(self.domains[-1].name))
        self._checksum = self._sum()
        return drift

    def state_dict(self) -> dict[str, Any]:
        """Everything but model and masks: what was learned, as plain tensors, numbers and text (or where its files are)."""
        return {
            "domains": [asdict(domain) for domain in self.domains],
            "asked": self._asked(),
            "kept": self.kept.state_dict(),
            "checksum": self._checksum,
            "data": self._data,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; model and masks are loaded by whoever keeps them.

        Raises `MaskStateError` for what another criterion (or one with other settings, but for ``batches``) has measured, for
        another ``memory.mode``, and for files that are gone or another run's.
        """
        was, now = state.get("asked", {}), self._asked()
        for key in {**was, **now}:
            if was.get(key) != now.get(key):
                raise MaskStateError(
                    f"what was learned is of {key} {was.get(key)!r}, and this run has {now.get(key)!r}: they do not add up. Go "
                    "on with the same, or start again from the first domain"
                )
        self.domains = [Domain(**domain) for domain in state["domains"]]
        self.kept.load_state_dict(state["kept"])
        self._checksum, self._data = state["checksum"], list(state["data"])

    # -- one domain -------------------------------------------------------------------------------------------------------

    def _asked(self) -> dict[str, Any]:
        """Whose statistics these are, and what is remembered; of how much data they are may change from domain to domain."""
        simple = (int, float, str, bool, type(None))
        options = {f"criterion.{k}": v for k, v in vars(self.score).items() if isinstance(v, simple) and k[0] != "_"}
        options.pop("criterion.batches", None)
        return {"memory.mode": self.memory.mode, "criterion": type(self.score).__name__} | options

    def _require_ready(self, name: str, weight: float) -> None:
        require_unsharded(self.manager)
        known = [domain.name for domain in self.domains]
        if not name or name in known:
            raise DataError(
                f"domain {name!r} was learned already (so far: {', '.join(known)}); give every domain a name of its own"
                if name
                else "a domain needs a name"
            )
        if not 0 < weight < float("inf"):
            raise RecipeError(f"domain {name!r}: weight={weight}; a positive number, 1 for a domain like any other")
        if self.domains and self._sum() != self._checksum:
            raise MaskStateError(
                f"the model was changed since domain {known[-1]!r} was learned, and what was measured is of the weights it "
                "had; call absorb() if training changed them on purpose, or load the model as it was"
            )
        for tensor in to_prune(self.manager) if not self.domains else ():
            require_sane(tensor)
        self.kept.claim()

    def _sum(self) -> str:
        """Of parameters alone. Buffers (running statistics) are not what is pruned, and every rank of DDP has its own: who
        changes them, changes what later domains are measured on, and is not told."""
        return checksum(parameter for _, parameter in sorted(self.manager.model.named_parameters()))

    def _data_of(self, batches: Iterable[Any] | None, loss: Callable[[Any], Tensor] | None) -> list[Any]:
        if not isinstance(self.score, StatisticsCriterion):
            return []
        if self.score.needs == "gradient" and loss is None:
            raise RecipeError(f"criterion {type(self.score).__name__} needs gradients: give loss, batch -> loss of the model")
        return data_for(self.score, batches, self.streaming, None)

    def _stream(self, data: list[Any], run: Callable[[Any], Any] | None, step: int, progress: bool) -> OneShotReport:
        job = _Job(self.manager, self.score, self.streaming, data, run or runner(self.manager.model), step)  # type: ignore[arg-type]
        job.kept = self.kept
        with at_rest(self.manager.model, [], gradients=False), tempfile.TemporaryDirectory() as scratch:
            return job.run_all(self.sparsity, self.spread, None, Path(scratch), progress)

    def _whole(self, data: list[Any], loss: Callable[[Any], Tensor] | None, step: int, progress: bool) -> OneShotReport:
        """Criteria of weights alone, and of gradients: all base weights at once."""
        tensors = to_prune(self.manager)
        plan = allocate(self.manager, self.sparsity, criterion=self.score, allocation=self.spread, step=step)
        self.kept.bring_back(_WHOLE, tensors)
        if isinstance(self.score, StatisticsCriterion) and loss is not None:
            asked, self.score.batches = self.score.batches, len(data)
            try:
                calibrate(self.manager, self.score, data, loss, progress=progress)
            finally:
                self.score.batches = asked
        self.kept.choose(_WHOLE, tensors, plan)
        if isinstance(self.score, StatisticsCriterion):
            self.score.reset()
        return OneShotReport([row_of(t, plan[t.name], "") for t in self.manager], [], count_samples(data))

    @contextmanager
    def _undone_on_error(self, changes: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.kept.undo()
            del self.manager.changes[changes:]
            raise


class _Job(Job):
    """One-shot pruning whose blocks begin with their base weights and are pruned by all that is remembered."""

    undone = True
    kept: Remembering

    def enter(self, segment: Any) -> None:
        """The block's base weights come back."""
        together(lambda: self.kept.bring_back(segment.name, to_prune(self.stream.tensors_of(segment))))

    def choose(self, segment: Any, own: dict[str, Sparsity], unseen: Sequence[str]) -> None:
        """Masks from this domain's statistics and those of the domains before."""
        self.kept.choose(segment.name, to_prune(self.stream.tensors_of(segment)), own, unseen, self.alike)
