"""SR-STE against its authors' code, run once: the same dense weights and masks after every step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sparsetrain import nm
from sparsetrain.callbacks import nm_training
from sparsetrain.callbacks.nm_training import NMTraining
from sparsetrain.masks import Override
from sparsetrain.patterns import NM

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sr_ste.json").read_text())
NAMES = ("conv.weight", "fc.weight")


class Task(LightningModule):
    """The network of the golden runs, from their start."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 2, 2, bias=False)
        self.fc = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)
        self.settings = settings
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.tensor(GOLDEN["start"][name]).view_as(parameter))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = torch.relu(self.conv(batch[0])).flatten(1)
        return F.cross_entropy(self.head(torch.relu(self.fc(hidden))), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), **self.settings)


class Record(Callback):
    """Loss of every step; dense weights and zeros after it."""

    def __init__(self, method: NMTraining) -> None:
        self.method = method
        self.losses: list[float] = []
        self.dense: dict[str, list[Tensor]] = {name: [] for name in NAMES}
        self.mask: dict[str, list[str]] = {name: [] for name in NAMES}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        for name in self.method.hidden:
            weight = pl_module.get_parameter(name).detach()
            self.dense[name].append((weight + self.method.hidden[name]).flatten())
            self.mask[name].append("".join("01"[int(v != 0)] for v in weight.flatten()))


def train(run: dict[str, Any]) -> Record:
    method = NMTraining("2:4", decay=run["decay"], freeze="9st", overrides={"fc": Override(pattern="1:4")})
    record = Record(method)
    data = TensorDataset(torch.tensor(GOLDEN["x"]).view(12, 8, 3, 3), torch.tensor(GOLDEN["y"]))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=5,
        callbacks=[method, record],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Task(run["settings"]), DataLoader(data, batch_size=6))
    return record


def assert_agrees(record: Record, run: dict[str, Any]) -> None:
    torch.testing.assert_close(record.losses[:8], run["losses"], rtol=0, atol=1e-6)
    for name in NAMES:
        assert record.mask[name] == run["mask"][name]
        assert len(set(run["mask"][name])) > 1  # the masks do move
        for ours, theirs in zip(record.dense[name], run["dense"][name], strict=True):
            torch.testing.assert_close(ours, torch.tensor(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", GOLDEN["runs"])
def test_as_the_authors_train(name: str) -> None:
    assert_agrees(train(GOLDEN["runs"][name]), GOLDEN["runs"][name])


@pytest.mark.parametrize("name", GOLDEN["runs"])
def test_without_the_decay_it_is_another_run(name: str) -> None:
    run = GOLDEN["runs"][name]
    with pytest.raises(AssertionError):
        assert_agrees(train(run | {"decay": 0.0}), run)


def test_without_hidden_weights_it_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer steps on the sparse weights: what is pruned starts again from zero."""
    monkeypatch.setattr(nm_training, "reveal", lambda *args: None)
    run = GOLDEN["runs"]["momentum"]
    with pytest.raises(AssertionError):
        assert_agrees(train(run), run)


# -- the update, by numbers one can do in one's head ------------------------------------------------------------------


def step(kind: type[torch.optim.Optimizer], decay: float, scaler: dict[str, Tensor] | None = None, **settings: Any) -> Tensor:
    """One update of W = (4, 3, 2, -1), pruned to (4, 3, 0, 0), with gradient (1, 0, 1, 0)."""
    weight = nn.Parameter(torch.tensor([[4.0, 3.0, 0.0, 0.0]]))
    weight.grad = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    optimizer = kind([weight], **settings)  # type: ignore[call-arg]
    for name, value in (scaler or {}).items():
        setattr(optimizer, name, value)
    nm.reveal(optimizer, optimizer.param_groups[0], weight, weight.grad, torch.tensor([[0.0, 0.0, 2.0, -1.0]]), decay)
    if scaler is None:
        optimizer.step()
    return torch.cat([weight.detach(), weight.grad])


def test_sgd_adds_the_decay_to_the_gradient() -> None:
    # g = (1, 0, 1 + 0.5 * 2, 0.5 * -1), W - 0.5 * g
    assert step(torch.optim.SGD, 0.5, lr=0.5).tolist() == [[3.5, 3.0, 1.0, -0.75], [1.0, 0.0, 2.0, -0.5]]


def test_ascending_sgd_decays_all_the_same() -> None:
    # g = (1, 0, 1 - 0.5 * 2, -0.5 * -1), W + 0.5 * g: up for the objective, still towards zero for the decay
    assert step(torch.optim.SGD, 0.5, lr=0.5, maximize=True)[0].tolist() == [4.5, 3.0, 2.0, -0.75]


def test_adam_decays_beside_the_gradient() -> None:
    # pruned entries first shrink by 1 - lr * decay = 3/4; then Adam's first step moves by lr against the sign of g
    found = step(torch.optim.Adam, 0.5, lr=0.5, eps=0.0)
    torch.testing.assert_close(found[0, [0, 2]], torch.tensor([3.5, 1.0]))
    assert found[1].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert step(torch.optim.RMSprop, 0.5, lr=0.5)[0, [1, 3]].tolist() == [3.0, -0.75]


def test_a_fused_optimizer_scales_and_skips() -> None:
    """Under an AMP scaler a fused optimizer gets scaled gradients, and skips a step by itself."""
    scaled = step(torch.optim.SGD, 0.5, {"grad_scale": torch.tensor(8.0)}, lr=0.5)
    assert scaled[1].tolist() == [1.0, 0.0, 1.0 + 8.0, -4.0]
    assert step(torch.optim.Adam, 0.5, {"found_inf": torch.tensor(1.0)}, lr=0.5)[0].tolist() == [4.0, 3.0, 2.0, -1.0]
    assert step(torch.optim.Adam, 0.5, {"found_inf": torch.tensor(0.0)}, lr=0.5)[0].tolist() == [4.0, 3.0, 1.5, -0.75]


def test_the_largest_magnitudes_stay() -> None:
    assert nm.select(torch.tensor([[4.0, -1.0, -3.0, 2.0]]), NM(2, 4)).tolist() == [[True, False, True, False]]


def test_n_falls_one_at_a_time() -> None:
    assert nm.stages(NM(2, 8), 10, 60) == [
        (10, NM(7, 8)), (20, NM(6, 8)), (30, NM(5, 8)), (40, NM(4, 8)), (50, NM(3, 8)), (60, NM(2, 8))
    ]  # fmt: skip
    assert nm.stages(NM(3, 4), 10, 60) == [(10, NM(3, 4))]
