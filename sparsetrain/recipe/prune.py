"""``sparsetrain prune``: a model of transformers goes in, a sparse one comes out, in a folder that stock transformers loads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from sparsetrain.allocation import get_allocation
from sparsetrain.criteria import get_criterion
from sparsetrain.data import TextData
from sparsetrain.data.tokenized import require_fit
from sparsetrain.errors import RecipeError, nearest
from sparsetrain.masks import MaskManager
from sparsetrain.oneshot import OneShotReport, Streaming, prune_oneshot, validate_oneshot
from sparsetrain.oneshot.settings import DTYPES
from sparsetrain.patterns import parse_pattern
from sparsetrain.targets import Targets
from sparsetrain.tasks.perplexity import evaluating, logits_of, next_token_loss, require_causal
from sparsetrain.tasks.places import locate
from sparsetrain.tasks.pretrained import _transformers, load_network, require_free, save_pretrained

#: What the published methods compare: weights of one row.
_WITHIN_ROWS = {"wanda", "ria"}
#: What may stand after "For" in the name of an architecture that reads nothing but token ids.
_HEADS = ("CausalLM", "SequenceClassification", "MaskedLM", "TokenClassification", "QuestionAnswering", "PreTraining")


@dataclass(frozen=True)
class Prune:
    """What is asked of ``sparsetrain prune``.

    Args:
        model: a ``from_pretrained`` folder or a name on the hub.
        data: what is calibrated on: an embedded corpus, a text file, a folder, a data set (see `TextData`).
        sparsity, pattern, criterion, allocation: as everywhere; without a pattern ``wanda`` and ``ria`` compare within rows.
        tokenizer: by default the model's own.
        samples, window, seed: so many random windows of training text are looked at.
        evaluate: so many windows of validation text give the perplexity before and after; 0 for none.
        streaming: see `Streaming`; blocks run in float32.
        include, exclude: regular expressions of tensor names, see `Targets`.
        weights: type of what is pruned and written, ``"float32"`` and so on; ``"auto"``: as the model was saved.

    Example: ``Prune("models/llama", "shakespeare", pattern="2:4")``.
    """

    model: str
    data: str
    sparsity: float | None = None
    pattern: str | None = None
    criterion: str = "wanda"
    allocation: str = "uniform"
    tokenizer: str | None = None
    samples: int = 128
    window: int = 256
    seed: int = 0
    evaluate: int = 64
    streaming: Streaming = field(default_factory=lambda: Streaming(dtype="float32"))
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    weights: str = "auto"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.evaluate < 0 or self.window < 2 or self.seed < 0:
            raise RecipeError(
                f"samples={self.samples}, window={self.window}, evaluate={self.evaluate}, seed={self.seed}: at least 1 sample "
                "of 2 tokens; evaluate and seed not negative"
            )
        if self.weights not in (known := ("auto", *DTYPES)):
            raise RecipeError(f"weights={self.weights!r}; use one of {', '.join(known)}.{nearest(self.weights, known)}")


def prune_model(asked: Prune, out: Path, work: Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Prune a model into the folder ``out`` and return what was done, which is in its ``sparsetrain.json`` too.

    The model is written in the type it was saved in, unless another is asked for. Raises `RecipeError` and its kin for what
    cannot work; nothing is written then, and nothing overwritten.

    Example: ``prune_model(Prune("models/llama", "shakespeare", pattern="2:4"), Path("pruned"))``.
    """
    require_free(out, overwrite, "--overwrite")
    for name, folder in (("--out", out), ("--work", work)):
        # Told now, not when the pruned model is to be written.
        taken = [place for place in (folder, *folder.parents) if place.is_file()] if folder is not None else []
        if taken:
            raise RecipeError(f"{name} {folder}: {taken[0]} is a file; choose another folder")
    pattern = asked.pattern or ("unstructured:row" if asked.criterion in _WITHIN_ROWS else "unstructured")
    parse_pattern(pattern)
    model = locate(asked.model)
    network, writes = network_of(model, asked.weights)
    data = TextData(asked.data, tokenizer=asked.tokenizer or model, window=asked.window)
    require_fit(network, data.vocab_size, asked.window)
    manager = MaskManager(network, Targets(include=asked.include, exclude=asked.exclude), pattern)
    criterion, allocation = get_criterion(asked.criterion), get_allocation(asked.allocation)
    validate_oneshot(manager, asked.sparsity, criterion, allocation)
    data.setup("calibration")
    batches = list(torch.split(data.calibration(asked.samples, seed=asked.seed), asked.streaming.batch))
    before = measure(network, data, asked.evaluate, "perplexity before") if writes else None
    report = prune_oneshot(
        manager,
        batches,
        asked.sparsity,
        criterion=criterion,
        allocation=allocation,
        streaming=asked.streaming,
        work=work,
        progress=True,
    )
    manager.verify(strict=True)
    after = measure(network, data, asked.evaluate, "perplexity after") if writes else None
    save_pretrained(network, out, tokenizer=data.tokenizer, overwrite=overwrite)
    found = _record(asked, pattern, report, before, after)
    (out / "sparsetrain.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def network_of(model: str, dtype: str = "auto") -> tuple[nn.Module, bool]:
    """The network in a folder or of a name, head and all, and whether it writes text (so that it has a perplexity).

    ``dtype``: of its weights; ``"auto"``: as they were saved. Raises `RecipeError` for what is not there, and for a network
    that does not read text, or more than that.

    Example: ``network, writes = network_of("models/llama")``.
    """
    transformers = _transformers()
    folder = locate(model)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"model {model!r} cannot be loaded: {' '.join(str(error).split())[:200]}. Give a folder that from_pretrained "
            "reads, or a hub name"
        ) from error
    name = (config.architectures or ["a model that names no architecture in its config.json"])[0]
    kind = next((k for k in _HEADS if name.endswith(f"For{k}")), "CausalLM" if name.endswith("LMHeadModel") else "")
    network = None
    if not config.is_encoder_decoder and (kind or name.endswith("Model")):
        network = load_network(kind, model, None, DTYPES.get(dtype, dtype))
    if network is None or type(network).__name__ != name or network.main_input_name != "input_ids":
        # Loaded as anything else it would lose its head.
        raise RecipeError(
            f"model {model!r} is {name}; this command prunes models that read text alone. In Python: "
            "prune_oneshot(MaskManager(model, pattern=...), batches)"
        )
    if kind == "CausalLM":
        require_causal(network)
    return network, kind == "CausalLM"


@torch.no_grad()
def measure(network: nn.Module, data: TextData, windows: int, title: str) -> dict[str, Any] | None:
    """Perplexity by block windows over the first ``windows`` windows of validation text; None where there are none.

    Example: ``measure(network, data, 64, "before")["perplexity"]``.
    """
    kept = data.val_set
    if kept is None or not windows:
        return None
    kept = kept.subset(torch.arange(min(windows, len(kept))))
    total, count = 0.0, 0
    with evaluating(network):
        for indices in track(torch.split(torch.arange(len(kept)), 8), description=title, transient=True):
            ids, labels = kept.__getitems__(indices)
            loss, scored = next_token_loss(logits_of(network, ids), labels)
            total, count = total + float(loss), count + int(scored)
    return {"perplexity": float(torch.tensor(total / count, dtype=torch.float64).exp()), "tokens": count}


def _record(asked: Prune, pattern: str, report: OneShotReport, before: Any, after: Any) -> dict[str, Any]:
    return {
        "asked": {key: value for key, value in asdict(asked).items() if key != "pattern"} | {"pattern": pattern},
        "sparsity": report.sparsity,
        "dense": before,
        "pruned": after,
        "samples": report.samples,
        "unseen_experts": report.unseen,
        "left_dense": report.left_dense(),
        "layers": [asdict(row) for row in report.rows],
        "seconds": report.seconds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("sparsetrain", "torch", "transformers")},
    }
