"""One run of one-shot pruning over all blocks: measure, prune, take the data on, remember."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsetrain.allocation import Allocation
from sparsetrain.calibration import (
    LayerWatch,
    NotShared,
    Segment,
    Stream,
    agree,
    checksum,
    count_samples,
    relative_error,
    require_seen,
    siblings,
    unused,
)
from sparsetrain.criteria import Known, StatisticsCriterion
from sparsetrain.errors import SparsetrainError, TargetError
from sparsetrain.masks import MaskedTensor, MaskManager, sharding
from sparsetrain.oneshot.report import OneShotReport, OneShotRow
from sparsetrain.oneshot.settings import DTYPES, Streaming, to_prune
from sparsetrain.oneshot.work import Work
from sparsetrain.patterns import Sparsity, exact
from sparsetrain.pruning import allocate, prune


def together(call: Callable[[], Any]) -> Any:
    """A call whose error on one rank is raised on all."""
    problem, result = None, None
    try:
        result = call()
    except SparsetrainError as error:
        problem = error
    agree(problem)
    return result


def row_of(tensor: MaskedTensor, asked: Sparsity, block: str, **more: Any) -> OneShotRow:
    """What became of a tensor."""
    mask, numel = tensor.mask, tensor.target.parameter.numel()
    dead = 0 if mask is None else sharding.total([~mask], tensor.target.parameter)[0]
    return OneShotRow(tensor.name, block, float(asked), dead / numel, numel, **more)


class Job:
    """One run over all segments.

    ``undone``: after an error whoever called undoes what was pruned.
    """

    undone = False

    def __init__(
        self,
        manager: MaskManager,
        score: StatisticsCriterion,
        how: Streaming,
        data: list[Any],
        run: Callable[[Any], Any],
        step: int,
    ) -> None:
        self.manager, self.score, self.how, self.data, self.run, self.step = manager, score, how, data, run, step
        #: Experts that are tensors of their own: one may stand for another where inputs are measured.
        self.alike = siblings(manager.model, to_prune(manager)) if score.needs == "input" else []

    def run_all(
        self, sparsity: Sparsity | None, spread: Allocation, folder: Path | None, scratch: Path, progress: bool
    ) -> OneShotReport:
        """Everything; the model is at rest."""
        bar = _Bar(progress)
        self.score.reset()
        dtype = None if self.how.dtype is None else DTYPES[self.how.dtype]
        with bar:
            self.stream: Stream = together(
                lambda: Stream(
                    self.manager.model, list(self.manager), self.run, self.data, dtype, self.how.offload, scratch, bar.tick
                )
            )
            segments = self.stream.segments
            self._require_used()
            self.work = together(lambda: Work(folder, self._asked(sparsity, spread) if folder else {}))
            pass_first = spread.pooled and not spread.by_shape
            two = sum(s.is_block for s in segments[:-1]) if self.how.inputs == "pruned" else 0
            bar.total((len(segments) * (1 + (pass_first and not self.work.plan)) + two) * len(self.data))
            if self.work.plan is None:
                if pass_first:
                    self._measure_all()
                self.work.keep_plan(allocate(self.manager, sparsity, criterion=self.score, allocation=spread, step=self.step))
                self.score.reset()
            self.work.restore(self.manager, [s.targets for s in segments], self.stream.hidden, self.step)
            for number in range(self.work.done, len(segments)):
                with _telling([] if self.undone else segments[:number]):
                    bar.say(self._segment(segments[number]))
        self.score.reset()
        blocks = [block.name for block in self.stream.blocks]
        return OneShotReport(self.work.rows, blocks, count_samples(self.data), self.work.unseen)

    def _require_used(self) -> None:
        """Raise `TargetError`, while everything is dense, for a layer that no sample uses; mostly the first one uses all."""
        pruned = {t.name: t.target.module for t in to_prune(self.manager)}
        idle = {name: pruned[name] for s in self.stream.segments for name in s.idle if name in pruned}
        lost = together(lambda: unused(idle, self.alike, self.run, self.data))
        for name in sorted(set.intersection(*agree(None, lost))):
            raise TargetError(
                f"criterion {type(self.score).__name__} cannot score {name}: no batch used its layer; leave it out "
                "(targets.exclude), or use criterion 'magnitude'. Nothing was pruned"
            )

    def _measure_all(self) -> None:
        """One dense pass over all blocks, after which every tensor can be scored; another where layers that were given one
        tensor are given different ones later on."""
        for share in (True, False):
            try:
                for segment in self.stream.segments:
                    first, _ = self._measure(segment, True, (share,))
                    self.stream.put(segment, 0, first)
                return
            except NotShared:
                self.score.reset()
            finally:
                self.stream.hidden.clear()

    def _measure(self, segment: Segment, keep: bool, shares: tuple[bool, ...]) -> tuple[Any, list[str]]:
        """Measure a segment, layers with one input once (True) or each for itself (False); raises `NotShared`, on every rank,
        if True is all there is and does not do."""
        tensors = to_prune(self.stream.tensors_of(segment))
        for share in shares:
            watch, problem, first, apart = LayerWatch(tensors, self.score, share, self.alike), None, None, False
            for part in (p for parts in watch.parts.values() for p in parts):
                self.score.memory.pop(part.name, None)
            try:
                first = self.stream.measure(segment, watch, keep)
            except NotShared:
                apart = True
            except SparsetrainError as error:
                problem = error
            if shares == (True,) and any(agree(None, apart)):
                raise NotShared
            if not apart:
                break
        unseen = watch.finish(problem)
        require_seen(self.score, tensors)
        return first, unseen

    def _segment(self, segment: Segment) -> str:
        started = time.perf_counter()
        stream, plan = self.stream, self.work.plan or {}
        dense_inputs, last = self.how.inputs == "dense", stream.is_last(segment)
        first, unseen, error = None, list[str](), None
        changes = bool(to_prune(stream.tensors_of(segment)))
        if changes:
            self.enter(segment)
            # What a block was given is gone once it is taken on: then nothing can be measured again.
            first, unseen = self._measure(segment, dense_inputs, (False,) if dense_inputs else (True, False))
            self.choose(segment, {name: plan[name] for name in segment.targets}, unseen)
            self.score.memory.clear()
        if dense_inputs and changes:
            after = stream.peek(segment)
            stream.put(segment, 0, first)
        else:
            after = stream.peek(segment) if last else stream.advance(segment)
        if segment.is_block and changes:
            error = relative_error(after, first, segment.name)
        seconds = time.perf_counter() - started
        notes = getattr(self.score, "notes", {})
        rows = []
        for tensor in stream.tensors_of(segment):
            parts = {part.name for part in Known.parts(tensor)}
            idle = len(parts & set(unseen))
            told = [f"{idle} of {len(parts)} experts saw no data" if len(parts) > 1 else "saw no data"] * bool(idle)
            told += dict.fromkeys(notes[name] for name in sorted({tensor.name, *parts}) if name in notes)
            row = row_of(tensor, plan[tensor.name], segment.name, error=error, seconds=seconds, note="; ".join(told))
            rows.append(row)
        self.work.unseen += unseen
        self.work.finish_segment(self.manager, segment.targets, rows, None if last else stream.hidden)
        share = sum(r.actual * r.numel for r in rows) / max(1, sum(r.numel for r in rows))
        off = "" if error is None else f", output off by {error:.4f}"
        return f"{segment.name}: {len(rows)} tensors, sparsity {share:.4f}{off}, {seconds:.1f} s" if rows else ""

    def enter(self, segment: Segment) -> None:
        """A segment is about to be measured."""

    def choose(self, segment: Segment, own: dict[str, Sparsity], unseen: list[str]) -> None:
        """Prune what was measured, each tensor to its sparsity; ``unseen``: experts that no sample was routed to."""
        prune(self.manager, criterion=self.score, own=own, only=own, regrow=False, step=self.step, why="one-shot")

    def _asked(self, sparsity: Sparsity | None, spread: Allocation) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        simple = (int, float, str, bool, type(None))
        settings = {k: v for k, v in vars(self.score).items() if isinstance(v, simple) and not k.startswith("_")}
        tensors = list(self.manager)
        return {
            "sparsity": None if sparsity is None else str(exact(sparsity)),
            "criterion": [type(self.score).__name__, settings],
            "allocation": repr(spread),
            "batch": self.how.batch,
            "inputs": self.how.inputs,
            "dtype": self.how.dtype,
            "targets": [[t.name, str(t.pattern), t.goal, list(t.target.shape)] for t in tensors],
            "weights": checksum(value for _, value in sorted(self.manager.model.state_dict().items())),
            "masks": checksum([t.mask for t in tensors]),
            "data": checksum(self.data),
        }


@contextmanager
def _telling(done: list[Segment]) -> Iterator[None]:
    """Errors say what is pruned already."""
    try:
        yield
    except SparsetrainError as error:
        pruned = [segment.name for segment in done if segment.targets]
        if not pruned:
            raise
        raise type(error)(
            f"{error}. Pruned already: {pruned[0]}"
            + f" to {pruned[-1]}" * (len(pruned) > 1)
            + "; start again from dense weights "
            "(with the same `work` folder it goes on from there)"
        ) from error


class _Bar:
    """A progress bar with the time left, and lines above it; or nothing."""

    def __init__(self, shown: bool) -> None:
        columns = (TextColumn("pruning"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, transient=True) if shown else None
        self.task = None if self.bar is None else self.bar.add_task("batches")

    def __enter__(self) -> _Bar:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def total(self, count: int) -> None:
        """So many batches in all."""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, total=count)

    def tick(self) -> None:
        """One batch is through."""
        if self.bar is not None and self.task is not None:
            self.bar.advance(self.task)

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self.bar is not None and line:
            self.bar.console.print(line)
