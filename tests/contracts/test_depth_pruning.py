"""Depth pruning finds residual blocks by what they do, removes those the loss misses least, and changes nothing else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sparsetrain.callbacks import PruneFinetune
from sparsetrain.callbacks.depth_pruning import DepthPruning
from sparsetrain.depth import Block, bypass, choose, find_blocks, removal, remove, remove_again, sensitivity
from sparsetrain.depth import blocks as depth_blocks
from sparsetrain.errors import DivergedError, MaskStateError, PatternError, RecipeError, TargetError
from sparsetrain.schedules import OneShot
from sparsetrain.targets import Targets
from sparsetrain.tasks.networks import SmallResNet

from .promises import same_bits
from .test_resume import SaveAlways, Trace
from .toys import Task, loaders, trainer


class Residual(nn.Module):
    """x + out(tanh(inner(x)))."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.norm(self.inner(x))))


class Stack(LightningModule):
    """Five residual blocks; block ``identity`` adds exactly nothing."""

    def __init__(self, identity: int = 3, dropout: float = 0.0, conv: Any = Residual) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(conv() for _ in range(5))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)
        if identity >= 0:
            nn.init.zeros_(self.blocks[identity].out.weight)
            nn.init.zeros_(self.blocks[identity].out.bias)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.dropout(block(x))
        logits: Tensor = self.head(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def stack(seed: int = 0, **settings: Any) -> Stack:
    torch.manual_seed(seed)
    return Stack(**settings)


def batches(**settings: Any) -> Any:
    return loaders(**settings)[0]


# -- finding ------------------------------------------------------------------------------------------------------------


def names(blocks: list[Block]) -> list[str]:
    return [block.name for block in blocks]


@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_blocks_that_change_the_shape_are_none(shortcut: Any) -> None:
    torch.manual_seed(0)
    net = SmallResNet(14, [4, 8, 8], shortcut=shortcut).eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    found = find_blocks(net, lambda: net(torch.randn(2, 3, 8, 8)))
    assert names(found) == ["layer1.0", "layer1.1", "layer2.1", "layer3.1"]
    same_bits(state, net.state_dict())


class Branches(nn.Module):
    """x + f(x) written out in the model: f keeps the shape, yet without it x would be counted twice."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2))
        self.plain = nn.ModuleList(Wrapped() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for branch, plain in zip(self.branches, self.plain, strict=True):
            x = branch(x)
            x = x + plain(x)
        return x


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self.norm(x))
        return out


def test_a_branch_without_the_skip_is_no_block() -> None:
    net = Branches().train()
    assert names(find_blocks(net, lambda: net(torch.randn(2, 5, 8)))) == ["branches.0", "branches.1"]


def test_blocks_inside_blocks_go_with_them() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Residual() for _ in range(2))

        def forward(self, *, inputs: Tensor) -> tuple[Tensor, None]:
            return self.parts[1](self.parts[0](inputs)), None

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Outer() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x, nothing = layer(inputs=x)
                assert nothing is None
            return x

    net, x = Whole().eval(), torch.randn(4, 8)
    found = find_blocks(net, lambda: net(x))
    assert found == [Block(f"layers.{i}", 2) for i in range(3)]
    with bypass(net, found):
        assert torch.equal(net(x), x)
    assert remove(net, found[:1], lambda: net(x)) == {"layers.0": "deleted"}


# -- ranking: sums one does in one's head -----------------------------------------------------------------------------


class Add(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)
        nn.init.zeros_(self.inner.weight)
        nn.init.constant_(self.inner.bias, value)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


def sums() -> tuple[nn.Sequential, Any]:
    """0 + 2 - 2 + 1.5; the loss is the distance from 1.5."""
    net = nn.Sequential(Add(2.0), Add(-2.0), Add(1.5))
    return net, lambda: float((net(torch.zeros(1, 1)).detach() - 1.5).abs())


def test_sensitivity_is_the_rise_of_the_loss() -> None:
    net, loss = sums()
    assert sensitivity(net, [Block("0"), Block("1"), Block("2")], loss) == {"0": 2.0, "1": 2.0, "2": 1.5}


def test_greedy_measures_anew() -> None:
    net, loss = sums()
    blocks = [Block("0"), Block("1"), Block("2")]
    assert choose(net, blocks, 2, loss, greedy=False) == {"2": 1.5, "0": 2.0}  # of equals the earlier
    assert choose(net, blocks, 2, loss) == {"2": 1.5, "1": -1.0}  # without 1.5, 2 is nearer than 0
    assert loss() == 0.0


def test_losses_that_are_not_finite() -> None:
    net, _ = sums()
    blocks = [Block("0"), Block("1")]
    values = iter([1.0, float("nan"), 3.0])
    assert sensitivity(net, blocks, lambda: next(values)) == {"0": float("inf"), "1": 2.0}
    with pytest.raises(DivergedError, match="nan"):
        sensitivity(net, blocks, lambda: float("nan"))
    with pytest.raises(TargetError, match=r"2 residual blocks.*found are 2 \(0, 1\)"):
        choose(net, blocks, 2, lambda: 0.0)


# -- removing -----------------------------------------------------------------------------------------------------------

TINY = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
GPT = {"vocab_size": 16, "n_positions": 16, "n_embd": 8, "n_layer": 4, "n_head": 2}
MODELS: dict[str, Any] = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=2)),
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TINY, num_key_value_heads=2)),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(**GPT, bos_token_id=0, eos_token_id=0)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_shorter_transformer_loads_without_us(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    ids = torch.randint(0, 16, (2, 6))
    optimizer = torch.optim.AdamW(model.parameters())
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    found = find_blocks(model, lambda: model(ids))
    assert len(found) == 4
    with bypass(model, found[1:3]):
        expected = model(ids).logits
    assert not torch.equal(model(ids).logits, expected)
    assert set(remove(model, found[1:3], lambda: model(ids), [optimizer]).values()) == {"deleted"}
    assert torch.equal(model(ids).logits, expected)
    left = {id(p) for p in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == left == {id(p) for p in optimizer.state}
    assert [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")] == [0, 1]
    model.save_pretrained(tmp_path)
    fresh = type(model).from_pretrained(tmp_path).eval()
    assert fresh.config.num_hidden_layers == 2
    assert torch.equal(fresh(ids).logits, expected)
    assert fresh.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 8)


def test_code_that_counts_blocks_gets_a_pass_through() -> None:
    class Counting(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for index in range(5):
                x = self.blocks[index](x) * (index + 1)
            return x

    x = torch.randn(4, 8)
    for kind, config in ((Counting, None), (Stack, {"layers": 5})):
        torch.manual_seed(0)
        net = kind().eval()
        net.config = config
        with bypass(net, [Block("blocks.1")]):
            expected = net(x)
        kept = [name for name, _ in net.named_parameters() if not name.startswith("blocks.1.")]
        assert remove(net, [Block("blocks.1")], lambda net=net: net(x)) == {"blocks.1": "passed through"}
        assert torch.equal(net(x), expected)
        assert [name for name, _ in net.named_parameters()] == kept


def test_a_pass_that_changes_is_refused_and_undone() -> None:
    net = stack(dropout=0.5).train()
    state, keys = {name: v.clone() for name, v in net.state_dict().items()}, list(net.state_dict())
    with pytest.raises(PatternError, match=r"without blocks\.0 the model computes something else"):
        remove(net, [Block("blocks.0")], lambda: net(torch.ones(4, 8)))
    assert list(net.state_dict()) == keys
    assert torch.equal(net.blocks[0].inner.weight, state["blocks.0.inner.weight"])


def test_without_the_configuration_the_shorter_model_does_not_load_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "setattr", lambda *args: None, raising=False)
    model = MODELS["Llama"]().eval()
    ids = torch.randint(0, 16, (2, 6))
    remove(model, find_blocks(model, lambda: model(ids))[1:3], lambda: model(ids))
    model.save_pretrained(tmp_path)
    assert not torch.equal(type(model).from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


# -- in a training run --------------------------------------------------------------------------------------------------


def test_the_block_that_does_nothing_goes_first(capsys: pytest.CaptureFixture[str]) -> None:
    module, method = stack(identity=3), DepthPruning(2, start="60st", end="70st")
    module.blocks[3].requires_grad_(False)  # so it stays the identity
    run = trainer(method, max_epochs=12)
    run.fit(module, batches())
    first, second = method.bypassed
    assert first == "blocks.3"
    assert method.bypassed["blocks.3"] == 0.0
    assert method.removed == {first: "deleted", second: "deleted"}
    assert len(module.blocks) == 3
    assert "DepthPruning removed 2 of 5 residual blocks: blocks.3" in capsys.readouterr().out
    owned = [p for group in run.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in owned} == {id(p) for p in module.parameters()}
    assert len(owned) == 3 * 6 + 2
    plain = Stack()
    plain.blocks = nn.ModuleList(Residual() for _ in range(3))
    plain.load_state_dict(module.state_dict(), strict=True)


def test_without_measuring_another_block_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth_blocks, "sensitivity", lambda model, blocks, evaluate: {b.name: 0.0 for b in blocks})
    method = DepthPruning(1, start="0st", end="0st")
    trainer(method).fit(stack(identity=3), batches())
    assert list(method.bypassed) == ["blocks.0"]


class Shape(Trace):
    """How many blocks compute after each step; parameters of the others do not move."""

    def __init__(self) -> None:
        super().__init__()
        self.working: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, *args)
        self.working.append(sum("forward" not in vars(block) for block in pl_module.blocks))


def test_blocks_go_one_at_a_time_when_they_are_due() -> None:
    shape = Shape()
    trainer(DepthPruning(0.6, start="4st", end="12st"), shape).fit(stack(), batches())  # 3 of 5: at 4, 8, 12 of 24
    assert shape.working == [5] * 3 + [4] * 4 + [3] * 4 + [2] * 13


def test_measuring_moves_nothing() -> None:
    """Until the first block goes the run is the same as without the callback, bit for bit, dropout and norms included."""
    runs = []
    for callbacks in ([], [DepthPruning(1, start="20st", end="20st")]):
        module = stack(dropout=0.3)
        trace = Trace()
        trainer(*callbacks, trace).fit(module, batches())
        runs.append(trace.losses)
    assert runs[0][:20] == runs[1][:20]
    assert runs[0][20:] != runs[1][20:]


def test_a_share_a_second_fit_and_another_model() -> None:
    method, module = DepthPruning(0.4, start="10%", end="20%"), stack()
    trainer(method).fit(module, batches())
    assert len(module.blocks) == 3
    trainer(method).fit(module, batches())
    assert len(module.blocks) == 3
    other = stack(seed=1)
    trainer(method).fit(other, batches())
    assert len(other.blocks) == 3


def fit(callbacks: list[Any], checkpoint: Path | None = None) -> dict[str, Any]:
    exact = PruneFinetune(0.5, schedule=OneShot("1st"), targets=Targets(include=("head",)))
    method, trace = DepthPruning(2, start="3st", end="7st"), Trace()
    run = trainer(exact, method, *callbacks, trace, accumulate_grad_batches=2)
    seed_everything(7 if checkpoint is None else 1234, verbose=False)
    module = stack(seed=0 if checkpoint is None else 99, identity=-1, dropout=0.3)
    run.fit(module, batches(), ckpt_path=checkpoint, weights_only=True)
    state = [v for s in run.optimizers[0].state.values() for v in s.values() if isinstance(v, Tensor)]
    return {
        "weights": module.state_dict(),
        "optimizer": {str(i): v for i, v in enumerate(state)},
        "removed": {"removed": method.removed, "bypassed": method.bypassed},
        "losses": trace.losses,
    }


def assert_same(resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    assert resumed["removed"] == whole["removed"]
    for part in ("weights", "optimizer"):
        same_bits(whole[part], resumed[part])
    assert resumed["losses"] == whole["losses"][len(whole["losses"]) - len(resumed["losses"]) :]


def test_resume_equals_uninterrupted(tmp_path: Path) -> None:
    whole = fit([SaveAlways(tmp_path)])
    assert len(whole["removed"]["removed"]) == 2
    for step in (1, 2, 3, 5, 6, 7, 9, 11, 12):
        assert_same(fit([], tmp_path / f"{step:02d}-step.ckpt"), whole)


def test_without_its_memory_resume_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit([SaveAlways(tmp_path)])
    monkeypatch.setattr(DepthPruning, "load_state_dict", lambda self, state: None)
    with pytest.raises(AssertionError):
        assert_same(fit([], tmp_path / "09-step.ckpt"), whole)


# -- what cannot work -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"blocks": 0}, {"blocks": 1.5}, {"blocks": -0.5}, {"batches": 0}])
def test_numbers_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=rf"{next(iter(settings))} is"):
        DepthPruning(**settings)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (DepthPruning(5), r"found are 5 .*\(blocks\.0, blocks\.1, .*one must stay"),
        (DepthPruning(0.1), "at least one must go"),
    ],
)
def test_too_few_blocks_are_refused(method: DepthPruning, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        trainer(method).fit(stack(), batches())


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(TargetError, match=r"found are 0 .*\(none\)"):
        trainer(DepthPruning()).fit(Task(), *loaders())


def test_masks_inside_blocks_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"PruneFinetune masks blocks\.0\.inner\.weight.*fit the shortened model"):
        trainer(DepthPruning(), PruneFinetune(0.5)).fit(stack(), batches())


class Manual(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_runs_that_cannot_be_measured_are_refused() -> None:
    with pytest.raises(RecipeError, match="automatic optimization"):
        trainer(DepthPruning()).fit(Manual(), batches())
    with pytest.raises(RecipeError, match="no averaged copy"):
        trainer(DepthPruning(), EMAWeightAveraging(decay=0.9)).fit(stack(), batches())
    with pytest.raises(RecipeError, match="a dataset with __getitem__"):
        trainer(DepthPruning()).fit(stack(), list(batches()))
    with pytest.raises(RecipeError, match=r"start \(step 12\) to end \(step 2\)"):
        trainer(DepthPruning(start="50%", end="2st")).fit(stack(), batches())
    with pytest.raises(RecipeError, match=r"to end \(step 24\)"):
        trainer(DepthPruning(start="50%", end="100%")).fit(stack(), batches())


def test_an_early_end_and_a_foreign_checkpoint_are_told(tmp_path: Path) -> None:
    method = DepthPruning(2, start="25%", end="75%")

    class Stop(Trace):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= 8
            trainer.save_checkpoint(tmp_path / "some.ckpt")

    with pytest.warns(UserWarning, match="ended with 1 of 2 blocks removed"):
        trainer(method, Stop()).fit(stack(), batches())
    saved = torch.load(tmp_path / "some.ckpt", weights_only=True)
    saved["callbacks"]["DepthPruning"]["bypassed"] = {"layers.7": 0.1}
    torch.save(saved, tmp_path / "some.ckpt")
    with pytest.raises(MaskStateError, match=r"bypassed layers\.7"):
        trainer(DepthPruning()).fit(stack(), batches(), ckpt_path=tmp_path / "some.ckpt", weights_only=True)


def test_a_model_built_anew_is_shortened_the_same_way() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    for kind in ("deleted", "passed through"):
        torch.manual_seed(0)
        short, fresh = Stack(), Stack()
        if kind == "deleted":
            gone = remove(short, [Block("blocks.1"), Block("blocks.3")], partial(short.eval(), x))
        else:
            gone = {"blocks.1": kind, "blocks.3": kind}
            remove_again(short, gone)
        assert set(gone.values()) == {kind}
        with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
            fresh.load_state_dict(short.state_dict())
        remove_again(fresh, gone)
        fresh.load_state_dict(short.state_dict())
        assert torch.equal(fresh.eval()(x), short.eval()(x))
    with pytest.raises(TargetError, match=r"blocks\.9"):
        remove_again(Stack(), {"blocks.9": "deleted"})
