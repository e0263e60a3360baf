"""Networks have their published sizes; the classification task trains, schedules and logs what it says."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau, StepLR

from sparsetrain.data import ResumableLoader, TensorSet, VisionData
from sparsetrain.errors import RecipeError
from sparsetrain.tasks import MLP, Classification, LeNet5Caffe, LeNet300, SmallResNet, lr_factor

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # inside Lightning


def weights(network: nn.Module) -> int:
    return sum(p.numel() for name, p in network.named_parameters() if name.endswith("weight") and p.ndim > 1)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# ---------------------------------------------------------------- networks


def test_published_sizes() -> None:
    assert weights(LeNet300()) == 266_200
    assert parameters(LeNet300()) == 266_610
    assert weights(LeNet5Caffe()) == 430_500
    assert parameters(LeNet5Caffe()) == 431_080
    assert parameters(SmallResNet()) == 269_722
    assert parameters(SmallResNet(shortcut="conv")) == 272_474
    assert parameters(SmallResNet(depth=56, shortcut="conv")) == 855_770


def test_layer_names_are_the_literatures() -> None:
    assert [name for name, _ in LeNet300().named_children()] == ["fc1", "fc2", "fc3"]
    assert [name for name, _ in LeNet5Caffe().named_children()] == ["conv1", "conv2", "fc1", "fc2"]
    assert [name for name, _ in MLP(4, [], 2).named_children()] == ["fc1"]


def test_mlp_by_hand() -> None:
    network = MLP(2, [2], 1)
    state = {
        "fc1.weight": [[1.0, 0.0], [0.0, 1.0]],
        "fc1.bias": [0.0, -1.0],
        "fc2.weight": [[2.0, 3.0]],
        "fc2.bias": [0.5],
    }
    network.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    # (1, 3): 2*1 + 3*(3-1) + 0.5; (-1, 0): both hidden units are off
    assert network(torch.tensor([[[1.0], [3.0]], [[-1.0], [0.0]]])).flatten().tolist() == [8.5, 0.5]


def test_lenet5_follows_the_caffe_definition() -> None:
    network = LeNet5Caffe()
    pool = nn.MaxPool2d(2, 2)
    head = [nn.Flatten(), network.fc1, nn.ReLU(), network.fc2]
    reference = nn.Sequential(network.conv1, pool, network.conv2, pool, *head)
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(network(images), reference(images))


@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_resnet_stages_halve_the_resolution(shortcut: Any) -> None:
    network = SmallResNet(depth=8, widths=[4, 6, 8], in_channels=1, num_classes=5, shortcut=shortcut)
    shapes = []
    for stage in (network.layer1, network.layer2, network.layer3):
        stage.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    assert network(torch.randn(2, 1, 16, 16)).shape == (2, 5)
    assert shapes == [(4, 16, 16), (6, 8, 8), (8, 4, 4)]


def test_padding_shortcut_centres_the_channels() -> None:
    block = SmallResNet(depth=8, widths=[2, 4, 8]).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3]].any()


@pytest.mark.skipif("SPARSETRAIN_DATA" not in os.environ, reason="SPARSETRAIN_DATA names no folder with checkpoints")
@pytest.mark.parametrize("depth", [20, 56])
def test_resnet_loads_published_checkpoints(depth: int) -> None:
    path = Path(os.environ["SPARSETRAIN_DATA"]) / "models" / "resnet_cifar10" / f"resnet{depth}.safetensors"
    state = load_file(path)
    network = SmallResNet(depth=depth)
    counters = {name for name in network.state_dict() if name.endswith("num_batches_tracked")}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert set(missing) <= counters
    assert not unexpected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP(0, [3], 2), "at least 1"),
        (lambda: LeNet5Caffe(image_size=8), "at least 16"),
        (lambda: SmallResNet(depth=21), r"6 \* n \+ 2"),
        (lambda: SmallResNet(depth=2), r"6 \* n \+ 2"),
        (lambda: SmallResNet(widths=[4, 2]), "must not shrink"),
        (lambda: SmallResNet(shortcut="none"), "'pad' or 'conv'"),  # type: ignore[arg-type]
        (lambda: Classification(nn.Linear(2, 2)), "pass num_classes="),
        (lambda: Classification(MLP(2, [], 2), lr_schedule="cosin"), "Did you mean 'cosine'"),  # type: ignore[arg-type]
        (lambda: Classification(MLP(2, [], 2), warmup=1.0), "warmup=1.0"),
        (lambda: Classification(MLP(2, [], 2), label_smoothing=-0.1), "label_smoothing=-0.1"),
        (lambda: Classification(MLP(2, [], 2), lr_schedule=lambda o: StepLR(o, 1), warmup=0.1), "not a callable"),
    ],
)
def test_impossible_networks_and_tasks_are_refused(build: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build()


# ---------------------------------------------------------------- classification

N = 20
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def fit(task: Classification, batch_size: int = 4, callbacks: Any = (), logger: Any = False, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {"max_epochs": 3, "accelerator": "cpu", "enable_checkpointing": False} | options
    trainer = pl.Trainer(
        callbacks=list(callbacks), logger=logger, enable_progress_bar=False, enable_model_summary=False, **settings
    )
    data = TensorSet(X, Y)
    trainer.fit(task, ResumableLoader(data, batch_size, shuffle=True), ResumableLoader(data, 7))
    return trainer


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def rates(accumulate: int = 1, **options: Any) -> list[float]:
    callback = Rates()
    task = Classification(MLP(6, [], 3), optimizer=sgd, **options)
    fit(task, callbacks=[callback], accumulate_grad_batches=accumulate)
    return [*callback.seen, task.trainer.optimizers[0].param_groups[0]["lr"]]


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 15), (2, 9)])
def test_schedules_are_torchs_own_over_all_optimizer_steps(accumulate: int, steps: int) -> None:
    for name, build in {
        "constant": lambda o: StepLR(o, 10_000),
        "cosine": lambda o: CosineAnnealingLR(o, steps),
        "linear": lambda o: LinearLR(o, 1.0, 0.0, steps),
    }.items():
        optimizer = sgd([nn.Parameter(torch.zeros(1))])
        scheduler, want = build(optimizer), []
        for _ in range(steps + 1):
            want.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates(accumulate, lr_schedule=name) == pytest.approx(want, abs=1e-12)


def test_warmup_rises_linearly_before_the_schedule() -> None:
    assert rates(warmup=0.2)[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    linear = rates(warmup=0.2, lr_schedule="linear")
    assert linear[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5 * 11 / 12])
    assert linear[-1] == 0
    assert lr_factor("cosine", 8)(2) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert lr_factor("linear", 1, warmup=0.9)(0) == 1


def test_a_callable_steps_once_an_epoch() -> None:
    assert rates(lr_schedule=lambda o: StepLR(o, 1, gamma=0.5)) == [0.5] * 5 + [0.25] * 5 + [0.125] * 5 + [0.0625]
    plateau = rates(lr_schedule=lambda o: ReduceLROnPlateau(o, mode="max", patience=0, threshold=10))
    assert [plateau[0], plateau[-1]] == pytest.approx([0.5, 0.005])


def test_a_schedule_without_an_end_is_refused() -> None:
    with pytest.raises(RecipeError, match="max_epochs= or max_steps="):
        fit(Classification(MLP(6, [], 3), lr_schedule="cosine"), max_epochs=-1, max_time="00:00:00:01")


def test_validation_and_test_metrics_count_each_sample_once() -> None:
    task = Classification(MLP(6, [5], 3))
    trainer = fit(task)
    logits = task.network.double()(X.double()).detach().numpy()
    task.network.float()
    accuracy = float((logits.argmax(1) == Y.numpy()).mean())
    loss = float(np.mean([np.log(np.exp(row - row[label]).sum()) for row, label in zip(logits, Y, strict=True)]))
    # three batches of 7, 7 and 6: a mean of batch means would differ
    assert float(trainer.callback_metrics["val/accuracy"]) == pytest.approx(accuracy, abs=1e-6)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(loss, abs=1e-5)
    tested = trainer.test(task, ResumableLoader(TensorSet(X, Y), 7), verbose=False)[0]
    assert tested == pytest.approx({"test/accuracy": accuracy, "test/loss": loss}, abs=1e-5)


def test_the_training_loss_is_logged_when_written_and_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    fit(Classification(MLP(6, [], 3)), logger=CSVLogger(tmp_path), log_every_n_steps=2)
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        written = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"] and row["lr"]]
    assert [step for step in written if step % 2] == [1, 3, 5, 7, 9, 11, 13]
    assert "train/loss" in fit(Classification(MLP(6, [], 3)), max_epochs=1).callback_metrics  # 5 steps, fewer than 50


def test_label_smoothing_mixes_in_the_uniform_distribution() -> None:
    losses = {}
    for smoothing in (0.0, 0.3):
        network = MLP(6, [], 3)
        nn.init.zeros_(network.fc1.weight)
        network.fc1.bias.data = torch.tensor([0.0, 0.0, math.log(2)])  # probabilities 1/4, 1/4, 1/2
        task = Classification(network, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), label_smoothing=smoothing)
        losses[smoothing] = float(fit(task, batch_size=N, max_epochs=1).callback_metrics["train/loss"])
    plain = (14 * math.log(4) + 6 * math.log(2)) / 20
    assert losses[0.0] == pytest.approx(plain, abs=1e-6)
    assert losses[0.3] == pytest.approx(0.7 * plain + 0.3 * (2 * math.log(4) + math.log(2)) / 3, abs=1e-6)


def test_the_state_dict_has_plain_names() -> None:
    assert set(Classification(LeNet300()).state_dict()) == {"network." + name for name in LeNet300().state_dict()}


def test_builds_from_a_configuration() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.LightningModule, "model")
    network = {
        "class_path": "sparsetrain.tasks.MLP",
        "init_args": {"in_features": 64, "hidden": [8], "num_classes": 10},
    }
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.25}}
    options = {"network": network, "optimizer": optimizer, "lr_schedule": "cosine"}
    config = parser.parse_object({"model": {"class_path": "sparsetrain.tasks.Classification", "init_args": options}})
    task = parser.instantiate(config).model
    built = task.optimizer(task.parameters())
    assert [type(task.network), task.lr_schedule, type(built)] == [MLP, "cosine", torch.optim.SGD]
    assert built.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(("rate", "learns"), [(1e-2, True), (0.0, False)])
def test_digits_are_learned(rate: float, learns: bool) -> None:
    torch.manual_seed(0)
    task = Classification(MLP(64, [32], 10), optimizer=lambda p: torch.optim.Adam(p, lr=rate), lr_schedule="cosine")
    trainer = pl.Trainer(
        max_epochs=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    data = VisionData("digits", batch_size=50)
    trainer.fit(task, datamodule=data)
    tested = trainer.test(task, datamodule=data, verbose=False)[0]
    assert (tested["test/accuracy"] > 0.93) == learns
