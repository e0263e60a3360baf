"""SparseLoRA: the adapters train, nothing else moves, the merged model has every zero it had, and a resumed run is the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from sparsetrain.callbacks import KeepMasks
from sparsetrain.callbacks.sparse_lora import SparseLoRA
from sparsetrain.errors import MaskStateError, PatternError, RecipeError, SparsetrainError, TargetError
from sparsetrain.masks import MaskManager, Override, save_masks
from sparsetrain.nn import lora
from sparsetrain.nn.adapters import Adapters
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets

from .promises import assert_pattern, same_bits, zeros_of
from .test_resume import STEPS, SaveAlways, Trace
from .toys import TARGETS, Int8Linear, Task, loaders, task, trainer, weights

PATTERNS = {"unstructured": 0.75, "2:4": 0.5, "neurons": 0.25}


def pruned(pattern: str = "2:4", seed: int = 0, **settings: Any) -> Task:
    """A task somebody pruned: zeros in its weights, and nobody who knows of masks."""
    module = task(seed, **settings)
    prune(MaskManager(module, pattern=pattern), PATTERNS[pattern])
    return module


def method(pattern: str = "2:4", **settings: Any) -> SparseLoRA:
    return SparseLoRA(**{"rank": 3, "alpha": 6, "pattern": pattern} | settings)


class During(Callback):
    """What the model is while it trains: the frozen bits, the effective zeros, who trains."""

    def __init__(self) -> None:
        self.zeros: set[tuple[int, ...]] = set()
        self.frozen: list[dict[str, Tensor]] = []
        self.adapters: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        layers = [m for m in pl_module.modules() if isinstance(m, lora.MaskedLoraLinear)]
        own = {n: v.detach().clone() for n, v in pl_module.state_dict().items()}
        self.frozen.append({n: v for n, v in own.items() if ".lora_" not in n})
        self.adapters.append({n: v for n, v in own.items() if ".lora_" in n})
        self.zeros.add(tuple(int((layer.merged_weight() == 0).sum()) for layer in layers))


def fit(module: Task, *callbacks: Callback, checkpoint: Path | None = None, **settings: Any) -> Trainer:
    run = trainer(*callbacks, **settings)
    run.fit(module, *loaders(), ckpt_path=checkpoint, weights_only=None if checkpoint is None else True)
    return run


# -- training and merging ---------------------------------------------------------------------------------------------


def test_what_is_merged_is_verified_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Adapters.merge

    def fills_a_zero(self: Adapters) -> None:
        plain(self)
        weight = self.model.get_parameter(f"net.{TARGETS[0]}")
        with torch.no_grad():
            weight[tuple((weight == 0).nonzero()[0])] = 1.0

    monkeypatch.setattr(Adapters, "merge", fills_a_zero)
    with pytest.raises(PatternError, match=rf"net\.{TARGETS[0]}: 1 pruned weights are not zero"):
        fit(pruned(), method())
    monkeypatch.undo()
    chosen = method()
    fit(pruned(), chosen)
    assert chosen.verification is not None
    assert [row.ok for row in chosen.verification.rows] == [True] * len(TARGETS)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_only_adapters_move_and_merging_keeps_every_zero(pattern: str) -> None:
    module, during, chosen = pruned(pattern), During(), method(pattern)
    names = list(module.state_dict())
    before = {n: w.clone() for n, w in weights(module).items()}
    head = module.net.head.weight.detach().clone()
    run = fit(module, chosen, during, gradient_clip_val=0.5)
    for seen in during.frozen[1:]:
        same_bits(during.frozen[0], seen)
    assert any(not torch.equal(during.adapters[0][n], during.adapters[-1][n]) for n in during.adapters[0])
    assert list(module.state_dict()) == names
    assert chosen.verification is not None
    assert chosen.verification.ok
    after = weights(module)
    for name in TARGETS:
        dead = before[name] == 0
        assert_pattern(~dead, pattern, PATTERNS[pattern])
        assert torch.count_nonzero(after[name][dead]) == 0
        assert torch.count_nonzero(after[name][~dead] != before[name][~dead]) > 0
    assert during.zeros == {tuple(zeros_of(before.values()))}
    assert zeros_of(after.values()) == zeros_of(before.values())
    assert torch.equal(module.net.head.weight, head)
    # rank 3: fc1 3 * (8 + 16), fc2 3 * (16 + 16); the model has 144 + 272 + 51
    assert chosen.facts() == {"rank": 3, "adapters": 2, "trainable": 168, "share": 168 / 467, "merged": True}
    moments = [k for state in run.optimizers[0].state.values() for k in state]
    assert len(moments) == 4 * 3  # AdamW remembers A and B of two layers, nothing of what is frozen


def test_the_merged_model_computes_what_was_trained() -> None:
    module, batch = pruned(), loaders()[1].dataset[:][0]  # type: ignore[index]
    seen: list[Tensor] = []

    class Last(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            seen.append(pl_module(batch).detach())

    fit(module, method(), Last())
    same_bits({"logits": seen[0]}, {"logits": module(batch).detach()})


def test_without_the_mask_the_zeros_would_be_lost_and_the_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = lora.effective_weight

    def dense(weight: Any, a: Tensor, b: Tensor, mask: Any, *rest: Any) -> Tensor:
        return plain(weight, a, b, None, *rest)

    monkeypatch.setattr(lora, "effective_weight", dense)
    module, chosen = pruned("unstructured"), method("unstructured")
    with pytest.raises(PatternError, match=r"net\.fc1\.weight: 96 pruned weights would not be zero after merging"):
        fit(module, chosen)
    layer = module.net.fc1
    a, b, s = layer.factors  # type: ignore[operator, misc]
    assert int((dense(layer.base_layer.weight, a, b, None, s) == 0).sum()) < 10  # type: ignore[union-attr, arg-type]


def test_the_adapters_learn() -> None:
    trace = Trace()
    fit(pruned("unstructured"), SparseLoRA(rank=8), trace, max_epochs=12)
    assert sum(trace.losses[-8:]) < 0.7 * sum(trace.losses[:8])


def test_overrides_targets_and_modules_to_save() -> None:
    module = task()
    prune(MaskManager(module, Targets(include=("fc2",)), "2:4"), 0.5)
    chosen = SparseLoRA(
        rank=2,
        pattern="unstructured",
        overrides={"fc2": Override(pattern="2:4")},
        config={"modules_to_save": ["head"], "lora_dropout": 0.2},
    )
    dense, head = module.net.fc1.weight.detach().clone(), module.net.head.weight.detach().clone()
    fit(module, chosen)
    assert_pattern(module.net.fc2.weight != 0, "2:4", 0.5)
    assert not torch.equal(module.net.fc1.weight, dense)  # no zeros, an ordinary adapter
    assert not torch.equal(module.net.head.weight, head)
    assert all(p.requires_grad for p in module.parameters())


def test_a_second_fit_starts_new_adapters_from_the_merged_weights() -> None:
    module, chosen = pruned(), method()
    fit(module, chosen, max_epochs=1)
    once = {n: w.clone() for n, w in weights(module).items()}
    fit(module, chosen, max_epochs=1)
    twice = weights(module)
    assert zeros_of(twice.values()) == zeros_of(once.values()) == [64, 128]
    assert not torch.equal(once["fc1.weight"], twice["fc1.weight"])
    assert list(module.state_dict()) == list(task().state_dict())
    module.load_state_dict(task().state_dict())  # nothing is left that listens


def test_adapters_can_stay_and_be_saved(tmp_path: Path) -> None:
    module, chosen = pruned(), method(merge=False)
    bare = {n: v.clone() for n, v in module.state_dict().items()}
    fit(module, chosen)
    assert chosen.facts()["merged"] is False
    assert chosen.adapters is not None
    chosen.adapters.save(tmp_path)
    fresh = task(5)
    fresh.load_state_dict(bare)
    x = torch.randn(3, 8)
    Adapters.load(fresh, tmp_path).merge()
    same_bits({"y": module(x)}, {"y": fresh(x)})
    fit(module, chosen, max_epochs=1)  # goes on with the adapters that are there
    assert not torch.equal(module(x), fresh(x))


def test_under_ddp_it_is_the_same_run(tmp_path: Path) -> None:
    """A group of one rank: the wrapper, its buffers and its redirected training step, without starting processes."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", world_size=1, rank=0)
    try:
        module, chosen = pruned(), method()
        with patch.dict(os.environ):  # Lightning leaves its address there
            fit(module, chosen, strategy=DDPStrategy(), devices=1, use_distributed_sampler=False, limit_val_batches=0)
    finally:
        dist.destroy_process_group()
    alone = pruned()
    fit(alone, method())
    same_bits(alone.state_dict(), module.state_dict())
    assert zeros_of(weights(module).values()) == [64, 128]


class Reads(nn.Module):
    """One layer is called, of the other only the weight is read, as WavLM's attention and Mamba's fast path do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.linear(self.fc1(x), self.fc2.weight))
        return logits


def test_an_adapter_that_never_moved_is_told() -> None:
    module = task()
    module.net = Reads()  # type: ignore[assignment]
    prune(MaskManager(module, pattern="2:4"))
    with pytest.warns(UserWarning, match=r"the adapter of net\.fc2 and 0 others never moved"):
        fit(module, method(), max_epochs=1)


def test_the_best_checkpoint_can_be_merged_instead_of_the_last(tmp_path: Path) -> None:
    module, chosen = pruned(), method(merge=False)
    run = fit(module, chosen, SaveAlways(tmp_path))
    early = torch.load(tmp_path / "06-step.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(early["net.fc1.lora_A.default.weight"], module.state_dict()["net.fc1.lora_A.default.weight"])
    run.validate(module, loaders()[1], ckpt_path=tmp_path / "06-step.ckpt", verbose=False, weights_only=True)
    same_bits(early, module.state_dict())
    assert chosen.adapters is not None
    chosen.adapters.merge()
    assert zeros_of(weights(module).values()) == [64, 128]


# -- resuming ---------------------------------------------------------------------------------------------------------


def resumed(callbacks: list[Callback], checkpoint: Path | None = None, seed: int = 0) -> dict[str, Any]:
    trace = Trace()
    make: Callable[..., Task] = pruned if checkpoint is None else task
    module = make(seed=seed, dropout=0.3, scheduler=True)
    own: dict[str, Any] = {"accumulate_grad_batches": 2, "val_check_interval": 0.5}
    run = fit(module, *callbacks, trace, checkpoint=checkpoint, **own)
    optimizer = [{k: v for k, v in state.items() if isinstance(v, Tensor)} for state in run.optimizers[0].state.values()]
    flat = {f"{i}.{k}": v for i, state in enumerate(optimizer) for k, v in state.items()}
    return {"weights": module.state_dict(), "optimizer": flat, "losses": trace.losses, "random": torch.get_rng_state()}


def test_resume_equals_uninterrupted_from_every_step(tmp_path: Path) -> None:
    def lora_method() -> SparseLoRA:
        return method(config={"lora_dropout": 0.3})

    whole = resumed([lora_method(), SaveAlways(tmp_path)])
    broken = {}
    checkpoints = sorted(p for p in tmp_path.iterdir() if not p.name.startswith(f"{STEPS}-"))
    assert len(checkpoints) >= 14
    for checkpoint in checkpoints:
        again = resumed([lora_method()], checkpoint, seed=99)
        try:
            same_bits(whole["weights"], again["weights"])
            same_bits(whole["optimizer"], again["optimizer"])
            assert again["losses"] == whole["losses"][len(whole["losses"]) - len(again["losses"]) :]
            assert torch.equal(again["random"], whole["random"])
        except AssertionError as error:
            broken[checkpoint.name] = str(error).splitlines()[0]
    assert not broken, broken
    # The twin: adapters that come back without their masks end elsewhere.
    plain, Adapters.set_masks = Adapters.set_masks, lambda self, masks: None  # type: ignore[method-assign, assignment]
    try:
        other = resumed([method(config={"lora_dropout": 0.3}, merge=False)], checkpoints[5], seed=99)
    finally:
        Adapters.set_masks = plain  # type: ignore[method-assign]
    assert other["losses"] != whole["losses"][len(whole["losses"]) - len(other["losses"]) :]


def test_resumed_at_its_very_end_it_still_merges(tmp_path: Path) -> None:
    whole = resumed([method(), SaveAlways(tmp_path)])
    again = resumed([method()], tmp_path / f"{STEPS}-epoch.ckpt", seed=99)
    same_bits(whole["weights"], again["weights"])


def test_a_merged_checkpoint_is_no_place_to_resume(tmp_path: Path) -> None:
    run = fit(pruned(), method(), max_epochs=1)
    run.save_checkpoint(tmp_path / "final.ckpt")
    with pytest.raises(MaskStateError, match=r"holds no adapters.*init_from"):
        fit(task(), method(), checkpoint=tmp_path / "final.ckpt")


# -- quantized --------------------------------------------------------------------------------------------------------


def quantized(folder: Path) -> tuple[Task, str]:
    module = task()
    manager = MaskManager(module, pattern="2:4")
    prune(manager)
    save_masks(folder / "masks.safetensors", manager.saved())
    for name in ("fc1", "fc2"):
        setattr(module.net, name, Int8Linear(getattr(module.net, name)))
    return module, str(folder / "masks.safetensors")


def test_a_quantized_base_trains_with_masks_from_a_file(tmp_path: Path) -> None:
    module, file = quantized(tmp_path)
    chosen, during = method(masks=file, merge=False), During()
    during.on_train_batch_end = lambda trainer, pl_module, *args: during.frozen.append(  # type: ignore[method-assign]
        {n: v.clone() for n, v in pl_module.state_dict().items() if ".lora_" not in n}
    )
    fit(module, chosen, during, SaveAlways(tmp_path))
    same_bits(during.frozen[0], during.frozen[-1])
    assert chosen.adapters is not None
    assert [int((layer.get_delta_weight() == 0).sum()) for layer in chosen.adapters.layers.values()] == [64, 128]
    assert chosen.masks.sparsity() == 0.5
    again, _ = quantized(tmp_path)
    fit(again, method(masks=file, merge=False), checkpoint=tmp_path / "12-step.ckpt")
    same_bits(module.state_dict(), again.state_dict())


def test_a_quantized_base_refuses_what_it_cannot(tmp_path: Path) -> None:
    module, file = quantized(tmp_path)
    with pytest.raises(RecipeError, match="merge=False and save the adapter"):
        fit(module, method(masks=file))
    with pytest.raises(RecipeError, match=r"fc1 has ordinary weights"):
        fit(pruned(), method(masks=file, merge=False))
    del module.net.fc2.weight
    module.net.fc2.register_parameter("weight", nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False))
    with pytest.raises(RecipeError, match=r"net\.fc2\.weight is no ordinary floating-point weight.*give masks="):
        fit(module, method())


# -- what is refused --------------------------------------------------------------------------------------------------


class Conv(Task):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)


REFUSED: dict[str, tuple[Callable[[], Task], Callable[[], list[Callback]], type[SparsetrainError], str]] = {
    "dense": (task, lambda: [method()], PatternError, "no zeros to keep"),
    "another pattern": (
        lambda: pruned("unstructured"),
        lambda: [method("2:4")],
        PatternError,
        r"net\.fc1\.weight: its 96 zeros are no 2:4",
    ),
    "another layer": (Conv, lambda: [method()], TargetError, "conv is a Conv2d"),
    "two methods": (pruned, lambda: [method(), KeepMasks()], RecipeError, "both set masks"),
    "EMA": (pruned, lambda: [method(), EMAWeightAveraging()], RecipeError, "averaged copy"),
    "SWA": (pruned, lambda: [StochasticWeightAveraging(0.1), method()], RecipeError, "averaged copy"),
}


@pytest.mark.filterwarnings("ignore:.*IntervalTrainer")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_and_changes_nothing(name: str) -> None:
    make, callbacks, kind, message = REFUSED[name]
    module = make()
    before = {n: v.clone() for n, v in module.state_dict().items()}
    with pytest.raises(kind, match=message):
        fit(module, *callbacks())
    same_bits(before, module.state_dict())


def test_sharded_models_are_refused() -> None:
    class Sharded:
        strategy = object()

    with pytest.raises(RecipeError, match="strategy object shards or moves weights"):
        method().setup(Sharded(), pruned(), "fit")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"alpha": -1}, "alpha=-1"),
        ({"config": {"r": 4}}, "config has 'r'; say rank=4"),
        ({"config": {"lora_droput": 0.1}}, "is none for PEFT's LoraConfig.*lora_droput"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SparseLoRA(**arguments)


def test_without_peft_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain.nn.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'sparsetrain\[lora\]'"):
        SparseLoRA()
