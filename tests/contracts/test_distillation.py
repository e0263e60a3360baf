"""Distillation: the loss is the one it says, nothing else of the run changes, the teacher stays, resume is exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as checkpoint_activations
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from sparsetrain.callbacks import PruneFinetune
from sparsetrain.callbacks.distillation import Distillation
from sparsetrain.callbacks.sparse_lora import SparseLoRA
from sparsetrain.distillation import hidden_loss, logits_loss
from sparsetrain.errors import MaskStateError, RecipeError, SparsetrainError, TargetError
from sparsetrain.masks import MaskManager
from sparsetrain.pruning import prune
from sparsetrain.schedules import OneShot, Rounds

from .promises import same_bits
from .test_resume import STEPS, SaveAlways, Trace
from .toys import Net, Task, loaders, task, trainer


def distill(teacher: nn.Module | str = "start", **settings: Any) -> Distillation:
    return Distillation(teacher, **{"network": "net"} | settings)


def fit(module: LightningModule, *callbacks: Callback, checkpoint: Path | None = None, **settings: Any) -> Trainer:
    run = trainer(*callbacks, **settings)
    run.fit(module, *loaders(), ckpt_path=checkpoint, weights_only=None if checkpoint is None else True)
    return run


class Logged(Callback):
    """What was logged after every batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


# -- the loss ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits

    def states(self, x: Tensor) -> list[Tensor]:
        first = self.layers[0](x)
        return [first, self.layers[1](first)]


class Plain(LightningModule):
    """A task that returns a dict."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = Network()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.network(batch[0]), batch[1])}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.network(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByHand(Plain):
    """The same, with the sum written out and the teacher called by name."""

    def __init__(self, seed: int, teacher: Network) -> None:
        super().__init__(seed)
        self.known = [teacher]

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, teacher = batch[0], self.known[0]
        with torch.no_grad():
            logits, states = teacher(x), teacher.states(x)
        mine = self.network(x)
        loss = 0.5 * F.cross_entropy(mine, batch[1]) + 0.7 * logits_loss(mine, logits, 3.0)
        return {"loss": loss + 0.2 * hidden_loss(self.network.states(x), states)}


def test_training_is_that_of_the_sum_written_out() -> None:
    teacher = Plain(5).network
    bits = {n: v.clone() for n, v in teacher.state_dict().items()}
    ours, hand, off = Plain(1), ByHand(1, teacher), Plain(1)
    logged = Logged()
    settings = {"weight": 0.7, "temperature": 3.0, "hidden": 0.2, "task": 0.5}
    run = fit(ours, Distillation(teacher, **settings), logged, log_every_n_steps=1)
    fit(hand)
    fit(off)
    for name, value in hand.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert any(float((ours.state_dict()[n] - v).abs().max()) > 0.01 for n, v in off.state_dict().items())  # the twin
    same_bits(bits, teacher.state_dict())
    assert not teacher.training
    assert list(ours.state_dict()) == list(off.state_dict())
    owned = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert owned == {id(p) for p in ours.parameters()}
    assert {"train/distillation", "train/distillation_hidden"} <= logged.rows[-1].keys()
    assert logged.rows[-1]["train/distillation"] < logged.rows[0]["train/distillation"]
    assert "training_step" not in vars(ours)


def test_named_layers_alone() -> None:
    logged = Logged()
    fit(Plain(1), Distillation(Plain(5).network, weight=0, hidden=1.0, layers=["layers.1"]), logged, log_every_n_steps=1)
    assert logged.rows[-1].keys() == {"train/distillation_hidden"}
    x, student, teacher = loaders()[0].dataset[:][0], Plain(1).network, Plain(5).network  # type: ignore[index]
    mine, theirs = student.states(x)[1].detach(), teacher.states(x)[1].detach()
    first = logged.rows[0]["train/distillation_hidden"]
    assert first == pytest.approx(float((mine - theirs).square().mean() / theirs.square().mean()), rel=0.5)


# -- nothing else changes ---------------------------------------------------------------------------------------------


class Noisy(Net):
    """A network that draws random numbers in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0 * torch.rand(1))


@pytest.mark.parametrize("pruned", [False, True])
def test_with_weight_zero_training_is_the_same_to_the_bit(pruned: bool) -> None:
    def one(*callbacks: Callback) -> dict[str, Any]:
        trace, module = Trace(), task(dropout=0.3)
        module.net = Noisy(0.3)
        module.net.load_state_dict(task(3).net.state_dict())
        more = [PruneFinetune(0.7, schedule=OneShot("5st"))] if pruned else []
        fit(module, *more, *callbacks, trace)
        return {"weights": module.state_dict(), "losses": trace.losses, "random": torch.get_rng_state()}

    bare, watched = one(), one(distill(weight=0.0))
    same_bits(bare["weights"], watched["weights"])
    assert bare["losses"] == watched["losses"]
    assert torch.equal(bare["random"], watched["random"])
    assert one(distill(weight=0.1))["losses"] != bare["losses"]


def test_a_teacher_that_may_draw_would_change_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: without the fork of the streams the test above fails."""
    import contextlib

    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    with pytest.raises(AssertionError):
        test_with_weight_zero_training_is_the_same_to_the_bit(False)


def test_checkpoints_have_plain_names_and_the_teacher_apart(tmp_path: Path) -> None:
    run = fit(task(), distill(), max_epochs=1)
    run.save_checkpoint(tmp_path / "start.ckpt")
    saved = torch.load(tmp_path / "start.ckpt", weights_only=True)
    task(9).load_state_dict(saved["state_dict"], strict=True)
    same_bits(saved["callbacks"]["Distillation"]["teacher"], task().net.state_dict())
    run = fit(task(), distill(Net()), max_epochs=1)
    run.save_checkpoint(tmp_path / "module.ckpt")
    assert not torch.load(tmp_path / "module.ckpt", weights_only=True)["callbacks"].get("Distillation")


def test_the_start_is_before_pruning_and_stays_in_a_second_fit() -> None:
    module, start = task(), copy.deepcopy(task().net)
    chosen, method = distill(), PruneFinetune(0.7, schedule=OneShot("0st"))
    for _ in range(2):
        fit(module, method, chosen, max_epochs=1)
        assert chosen._frozen is not None
        same_bits(start.state_dict(), chosen._frozen.state_dict())
    assert method.masks.sparsity() > 0.69


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["start", "path"])
def test_resume_equals_uninterrupted(kind: str, tmp_path: Path) -> None:
    save_file(task(7).net.state_dict(), str(tmp_path / "teacher.safetensors"))

    def one(checkpoint: Path | None = None, *more: Callback) -> dict[str, Any]:
        teacher = "start" if kind == "start" else str(tmp_path / "teacher.safetensors")
        callbacks = [
            PruneFinetune(0.7, schedule=Rounds(2, start="3st", every="4st")),
            distill(teacher, hidden=0.5, layers=["fc2"]),
        ]
        trace, module = Trace(), task(0 if checkpoint is None else 99, dropout=0.3, scheduler=True)
        fit(module, *callbacks, *more, trace, checkpoint=checkpoint, accumulate_grad_batches=2, val_check_interval=0.5)
        return {"weights": module.state_dict(), "losses": trace.losses, "random": torch.get_rng_state()}

    (tmp_path / "all").mkdir()
    whole = one(None, SaveAlways(tmp_path / "all"))
    for checkpoint in sorted((tmp_path / "all").iterdir())[::3]:
        if not checkpoint.name.startswith(f"{STEPS}-"):
            again = one(checkpoint)
            same_bits(whole["weights"], again["weights"])
            assert again["losses"] == whole["losses"][len(whole["losses"]) - len(again["losses"]) :]
            assert torch.equal(whole["random"], again["random"])
    if kind == "start":  # the twin: the student as it is when resumed is another teacher
        keep, Distillation.load_state_dict = Distillation.load_state_dict, lambda self, state: None  # type: ignore[method-assign]
        try:
            other = one(tmp_path / "all" / "06-step.ckpt")
        finally:
            Distillation.load_state_dict = keep  # type: ignore[method-assign]
        assert other["losses"] != whole["losses"][len(whole["losses"]) - len(other["losses"]) :]


def test_a_checkpoint_without_the_start_is_refused(tmp_path: Path) -> None:
    fit(task(), max_epochs=1).save_checkpoint(tmp_path / "bare.ckpt")
    with pytest.raises(MaskStateError, match="holds no teacher"):
        fit(task(), distill(), checkpoint=tmp_path / "bare.ckpt")


# -- with others ------------------------------------------------------------------------------------------------------


def test_beside_sparse_lora_in_either_order(tmp_path: Path) -> None:
    save_file(task(7).net.state_dict(), str(tmp_path / "teacher.safetensors"))
    ended = []
    for turn in (1, -1):
        module = task()
        prune(MaskManager(module, pattern="2:4"))
        callbacks: list[Callback] = [
            SparseLoRA(rank=2, pattern="2:4"),
            distill(str(tmp_path / "teacher.safetensors"), hidden=1.0, layers=["fc1", "fc2"]),
        ]
        logged = Logged()
        fit(module, *callbacks[::turn], logged, log_every_n_steps=1)
        ended.append(logged.rows[0])
        assert [int((w == 0).sum()) for w in (module.net.fc1.weight, module.net.fc2.weight)] == [64, 128]
    assert ended[0] == ended[1]


class LanguageModel(LightningModule):
    """A task whose network is given padded text by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        self.network = LlamaForCausalLM(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.network(**batch, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def text(padding: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(1, 15, (8, 6), generator=generator)
    attention = torch.ones_like(tokens)
    attention[:, 4:] = 0
    tokens[:, 4:] = padding
    labels = torch.where(attention == 1, tokens, -100)
    rows = [{"input_ids": tokens[i], "attention_mask": attention[i], "labels": labels[i]} for i in range(8)]
    return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


def test_what_stands_in_the_padding_does_not_matter(tmp_path: Path) -> None:
    teacher = LanguageModel().network
    torch.manual_seed(3)
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=1.0)
    teacher.save_pretrained(tmp_path / "folder")
    seen = []
    for padding, source in ((0, teacher), (9, str(tmp_path / "folder"))):
        logged, run = Logged(), trainer(max_epochs=2, log_every_n_steps=1)
        run.callbacks += [Distillation(source, hidden=1.0), logged]  # type: ignore[attr-defined]
        run.fit(LanguageModel(), text(padding))
        seen.append(logged.rows)
    assert seen[0][0]["train/distillation"] > 0.01
    for one, other in zip(*seen, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_half_precision_teacher_keeps_what_the_student_keeps_in_single() -> None:
    """Rotary frequencies stay in float32 in a model of bfloat16; a teacher that rounds them is not the student at its start."""
    module = LanguageModel()
    config = module.network.config.to_dict() | {"hidden_size": 64, "head_dim": 32}
    module.network = LlamaForCausalLM(LlamaConfig(**config))
    for parameter in module.network.parameters():
        nn.init.normal_(parameter, std=1.0)
        parameter.data = parameter.data.bfloat16()
    assert module.network.model.rotary_emb.inv_freq.dtype == torch.float32
    logged, chosen = Logged(), Distillation(copy.deepcopy(module.network).float(), hidden=1.0)
    run = trainer(chosen, logged, max_epochs=1, log_every_n_steps=1)
    run.fit(module, text(0))
    assert chosen._frozen is not None
    assert {p.dtype for p in chosen._frozen.parameters()} == {torch.bfloat16}
    assert logged.rows[0]["train/distillation"] == logged.rows[0]["train/distillation_hidden"] == 0
    assert logged.rows[1]["train/distillation"] > 0  # the twin: a student that has moved is told apart


class Checkpointed(Network):
    """Activations of the blocks are computed again in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x = x.requires_grad_()
        for layer in self.layers:
            x = checkpoint_activations(layer, x, use_reentrant=self.reentrant)
        logits: Tensor = self.head(x)
        return logits


def test_activation_checkpointing_changes_nothing() -> None:
    def run(reentrant: bool) -> Plain:
        module = Plain(1)
        module.network = Checkpointed()
        module.network.load_state_dict(Plain(1).network.state_dict())
        module.network.reentrant = reentrant
        fit(module, Distillation(Plain(5).network, hidden=1.0), max_epochs=1)
        return module

    plain = Plain(1)
    fit(plain, Distillation(Plain(5).network, hidden=1.0), max_epochs=1)
    same_bits(plain.state_dict(), run(False).state_dict())
    same_bits(plain.state_dict(), run(True).state_dict())


def test_hidden_states_that_nothing_moves_are_refused() -> None:
    module = Plain(1)
    module.network.layers.requires_grad_(False)
    with pytest.raises(RecipeError, match="no gradient flows from the hidden states"):
        fit(module, Distillation(Plain(5).network, hidden=1.0))


# -- what is refused --------------------------------------------------------------------------------------------------


class Manual(Task):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Silent(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net.head(self.net.fc1(batch[0])), batch[1])


def shares() -> tuple[Task, Distillation]:
    module = task()
    return module, distill(module.net)


REFUSED: dict[str, tuple[Callable[[], tuple[LightningModule, Distillation]], type[SparsetrainError], str]] = {
    "no network": (lambda: (task(), Distillation()), RecipeError, "Task has no network 'network'.*children are net"),
    "manual": (lambda: (Manual(), distill()), RecipeError, "manual optimization"),
    "not called": (lambda: (Silent(), distill()), RecipeError, "did not call its 'net'"),
    "shared": (shares, RecipeError, "shares parameters"),
    "another shape": (lambda: (task(), distill(nn.Linear(8, 5))), TargetError, r"logits have shape \(4, 3\)"),
    "no blocks": (lambda: (task(), distill(hidden=1.0)), TargetError, "no list of like blocks"),
    "no such layer": (lambda: (task(), distill(hidden=1.0, layers=["fc3"])), TargetError, "no layer 'fc3'. Did you mean 'fc"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused(name: str) -> None:
    make, kind, message = REFUSED[name]
    module, chosen = make()
    with pytest.raises(kind, match=message):
        fit(module, chosen)
    assert "training_step" not in vars(module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1}, "weight=-1"),
        ({"temperature": 0}, "temperature=0"),
        ({"hidden": float("nan")}, "hidden=nan"),
        ({"teacher": "runs/nowhere"}, "teacher 'runs/nowhere' is neither"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Distillation(**arguments)


def test_a_teacher_of_another_architecture_is_refused(tmp_path: Path) -> None:
    save_file(Net(hidden=32).state_dict(), str(tmp_path / "wide.safetensors"))
    with pytest.raises(MaskStateError, match=r"another architecture.*fc1\.weight"):
        fit(task(), distill(str(tmp_path / "wide.safetensors")))
    save_file(Net().state_dict() | {"fc1.lora_A.default.weight": torch.ones(2, 8)}, str(tmp_path / "lora.safetensors"))
    with pytest.raises(MaskStateError, match="holds LoRA adapters that are not merged"):
        fit(task(), distill(str(tmp_path / "lora.safetensors")))
