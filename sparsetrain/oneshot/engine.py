"""Prune block by block: each block is measured on what the blocks before it, pruned already, give it; then it is pruned.

The order of Frantar and Alistarh 2023 (arXiv 2301.00774, sec. 3) and Sun et al. 2023 (arXiv 2306.11695, sec. 3): for each
block one pass measures what its layers are given, with its own weights still dense; the block is pruned; a second pass gives
the next block's inputs. Here the first pass ends at the last layer's input, the second is left out after the last block, and
layers that are given the same tensor are measured once.

An allocation that needs all scores (``owl``, ``global``) takes a dense pass first; the statistics of all tensors are in
memory at once: of SparseGPT ``4 * in^2`` bytes for every input of ``in`` features (that of q, k and v counts once), 22 GB for a
Llama of 7B; of Wanda next to nothing.

Targets outside of all blocks (a patch embedding, the head, where asked for) are measured and pruned where they run: those
before the first block on the data itself, those after the last on what the pruned blocks give. A model without blocks is one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsetrain.allocation import Allocation, get_allocation
from sparsetrain.calibration import at_rest, first_alone, ranks, rebatch, require_some, runner
from sparsetrain.criteria import Criterion, StatisticsCriterion, get_criterion
from sparsetrain.errors import DataError, RecipeError
from sparsetrain.masks import MaskManager
from sparsetrain.oneshot.job import Job, row_of, together
from sparsetrain.oneshot.report import OneShotReport
from sparsetrain.oneshot.settings import Streaming, require_sane, to_prune, validate_oneshot
from sparsetrain.patterns import Sparsity
from sparsetrain.pruning import allocate, prune
from sparsetrain.targets import REPLACED, UNSUPPORTED


def prune_oneshot(
    manager: MaskManager,
    batches: Iterable[Any] | None = None,
    sparsity: Sparsity | None = None,
    *,
    criterion: Criterion | str = "wanda",
    allocation: Allocation | str = "uniform",
    run: Callable[[Any], Any] | None = None,
    streaming: Streaming | None = None,
    work: Path | str | None = None,
    progress: bool = False,
    step: int = 0,
) -> OneShotReport:
    """Prune a trained model block by block on a few samples.

    Args:
        manager: the masks; weights that are pruned stay so, and no tensor becomes less sparse.
        batches: the calibration data, all of it, read once: token tensors, dictionaries, tuples; cut and put together to
            ``streaming.batch`` samples. Criteria that need no data take none.
        sparsity: fraction of zeros in [0, 1); may be left out where the pattern has only one (2:4 is 0.5).
        criterion: of weights, or of what layers are given or give: ``"wanda"``, ``"ria"``, ``"sparsegpt"``, ``"magnitude"``.
            Published Wanda compares within rows: pattern ``unstructured:row``.
        allocation: ``"uniform"``, ``"erk"``, ...; one that needs all scores (``"owl"``, ``"global"``) takes a dense pass first.
        run: gives a batch to the model; by default a mapping by name, of a tuple the first entry, a tensor as it is.
        streaming: see `Streaming`.
        work: a folder; after every block weights, masks and hidden states are kept there, and the same call goes on after a
            kill and ends bit for bit where an uninterrupted one ends. One process only.
        progress: a bar with the time left, and a line for each block.
        step: recorded with the changes.

    Before anything is changed: `RecipeError` for criteria that need gradients or training, for sharded models and for another
    run's ``work``; `PatternError` for what cannot be reached, and for zeros that are no masks; `DivergedError` for weights that
    are not finite; `DataError` for no data; `TargetError` for a layer no sample uses (experts go by magnitude). Later, saying
    what is pruned already: `DivergedError` where activations are not finite, `DataError` for inputs that are all zero.

    Example::

        manager = MaskManager(model, pattern="2:4")
        print(prune_oneshot(manager, [tokens], criterion="sparsegpt"))
    """
    score, spread = get_criterion(criterion), get_allocation(allocation)
    validate_oneshot(manager, sparsity, score, spread)
    for tensor in to_prune(manager):
        require_sane(tensor)
    started = time.perf_counter()
    if not isinstance(score, StatisticsCriterion):
        own = allocate(manager, sparsity, criterion=score, allocation=spread, step=step)
        prune(manager, criterion=score, own=own, regrow=False, step=step, why="one-shot")
        report = OneShotReport([row_of(t, own[t.name], "") for t in manager])
    else:
        how, folder = streaming or Streaming(), None if work is None else Path(work)
        data = data_for(score, batches, how, folder)
        job = Job(manager, score, how, data, run or runner(manager.model), step)
        with at_rest(manager.model, [], gradients=False), tempfile.TemporaryDirectory() as scratch:
            report = job.run_all(sparsity, spread, folder, Path(scratch), progress)
    for tensor in manager:  # what was pending while the model was at rest
        tensor.mask_gradient(tensor.target.parameter)
    report.seconds = time.perf_counter() - started
    report.dense = {name: why for name, why in manager.skipped.items() if why in (UNSUPPORTED, REPLACED)}
    return report


def data_for(criterion: StatisticsCriterion, batches: Iterable[Any] | None, how: Streaming, folder: Path | None) -> list[Any]:
    """The batches as they go through the blocks. Raises for no data, and for a folder that several processes would share."""
    name = f"criterion {type(criterion).__name__}"
    if batches is None:
        raise DataError(f"{name} needs data: give batches, such as a DataLoader or a list of tensors")
    if isinstance(batches, Tensor | Mapping):
        raise DataError(f"{name} is given one {type(batches).__name__} and not several batches; give a list: [batch]")
    if folder is not None and ranks() > 1:
        raise RecipeError(f"{ranks()} processes cannot go on from one folder: leave `work` out, or use one process")
    data = first_alone(rebatch(batches, 1 if criterion.per_sample else how.batch))
    together(lambda: require_some(len(data), name))
    return data
