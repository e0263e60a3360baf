"""Variational dropout in a run: what is noise is pruned, layers and names are plain again, and resuming is exact."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sparsetrain.callbacks import Noise, VariationalDropout, weight_noise
from sparsetrain.errors import DivergedError, PatternError, RecipeError, TargetError
from sparsetrain.masks import MaskManager
from sparsetrain.nn.variational import VariationalLinear
from sparsetrain.penalties import log_alpha, variational_kl
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets

from .promises import same_bits, zeros_of
from .test_resume import SaveAlways, Trace
from .toys import TARGETS, Task, adamw, loaders, task, trainer, weights

TOTAL = 128 + 256


def method(sparsity: float | None = None, **changed: Any) -> VariationalDropout:
    """16 steps: warm-up from 2 to 4, noise until 12. It starts close to noise and learns fast."""
    settings: dict[str, Any] = {"warmup": ("2st", "4st"), "until": "12st", "kl": 5.0, "noise": Noise(-3.0, 0.2)}
    return VariationalDropout(sparsity, **(settings | changed))


def plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-5)


def fit(
    dropout: VariationalDropout, *others: Callback, checkpoint: Path | None = None, optimizer: Any = adamw, **settings: Any
) -> dict[str, Any]:
    trace = Trace()
    run = trainer(dropout, *others, trace, **({"val_check_interval": 0.5, "max_epochs": 2} | settings))
    seed_everything(7, verbose=False)
    module = task(seed=0 if checkpoint is None else 99, dropout=0.3, scheduler=True, optimizer=optimizer)
    run.fit(module, *loaders(), ckpt_path=checkpoint, weights_only=True)
    memory = [{k: v for k, v in state.items() if isinstance(v, Tensor)} for state in run.optimizers[0].state.values()]
    return {
        "module": module,
        "weights": module.state_dict(),
        "optimizer": {f"{i}.{k}": v for i, state in enumerate(memory) for k, v in state.items()},
        "masks": {n: m.view(torch.uint8) for n, m in dropout.masks.masks.items()},
        "kl": dropout.kl_now,
        "changes": dropout.masks.changes,
        "losses": trace.losses,
        "random": torch.get_rng_state(),
    }


class Watch(Callback):
    """Names in the state dict, classes, zeros and trained parameters after every step."""

    def __init__(self) -> None:
        self.names: set[tuple[str, ...]] = set()
        self.noisy: list[bool] = []
        self.zeros: list[list[int]] = []
        self.trained: set[int] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.names.add(tuple(pl_module.state_dict()))
        self.noisy.append(isinstance(pl_module.net.fc1, VariationalLinear))
        self.zeros.append(zeros_of(weights(pl_module).values()))
        self.trained.add(sum(len(group["params"]) for group in trainer.optimizers[0].param_groups))


RUNS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "SGD": {"optimizer": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)},
    "accumulate": {"accumulate_grad_batches": 2, "max_epochs": 4},
    "clip norm": {"gradient_clip_val": 0.1},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("name", RUNS)
def test_noise_becomes_exact_zeros_and_plain_layers(name: str) -> None:
    dropout, watch = method(), Watch()
    found = fit(dropout, watch, **RUNS[name])
    assert watch.names == {tuple(task().state_dict())}
    assert watch.trained == {len(list(task().parameters()))}
    per_step = RUNS[name].get("accumulate_grad_batches", 1)
    assert watch.noisy == [(batch + 1) // per_step < 12 for batch in range(16 * per_step)]
    zeros = zeros_of(weights(found["module"]).values())
    assert 0 < sum(zeros) < TOTAL
    assert watch.zeros[-1] == watch.zeros[-4 * per_step] == zeros
    assert dropout.verification is not None
    assert dropout.verification.ok
    assert {(change.step, change.why) for change in found["changes"]} == {(12, "variational")}


def test_it_is_the_divergence_that_makes_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet: dict[str, Any] = {"noise": Noise(-6.0, 0.3)}
    with_it = sum(zeros_of(weights(fit(method(**quiet))["module"]).values()))
    monkeypatch.setattr(weight_noise, "add_kl_gradient", lambda *args: None)
    without = sum(zeros_of(weights(fit(method(**quiet))["module"]).values()))
    assert without < 0.1 * TOTAL < 0.3 * TOTAL < with_it
    with pytest.warns(UserWarning, match="no weight passed log alpha = 7.9: the model is dense"):
        assert zeros_of(weights(fit(method(threshold=7.9, noise=Noise(-12.0, 1e-3)))["module"]).values()) == [0, 0]


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_the_asked_share_is_pruned_exactly_and_the_noisiest_go(sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    dropout, seen = method(sparsity), {}
    fold = VariationalDropout._fold

    def looked(self: VariationalDropout, trainer: Any, noisy: Any, step: int) -> None:
        seen.update({t.name: log_alpha(t.target.parameter, noisy.layers[t.name].log_sigma2).detach() for t in noisy.tensors})
        fold(self, trainer, noisy, step)

    monkeypatch.setattr(VariationalDropout, "_fold", looked)
    found = fit(dropout)
    masks = dropout.masks.masks
    assert sum(zeros_of(weights(found["module"]).values())) == math.floor(Fraction(str(sparsity)) * TOTAL)
    dead = torch.cat([seen[name][~masks[name]] for name in seen])
    alive = torch.cat([seen[name][masks[name]] for name in seen])
    assert float(dead.min()) >= float(alive.max())
    assert dropout.kl_now != 5.0


def test_the_controller_raises_kl_where_too_few_pass_and_lowers_it_where_too_many_do() -> None:
    many, few = method(0.95, noise=Noise(-6.0, 1e-4)), method(0.05)
    fit(many)
    fit(few)
    assert many.kl_now > 5.0 > few.kl_now


def test_the_folded_network_is_the_deterministic_one(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, fold = [], VariationalDropout._fold
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(5))

    def looked(self: VariationalDropout, trainer: Any, noisy: Any, step: int) -> None:
        net = trainer.lightning_module.net.eval()
        with torch.no_grad():
            answers.append(net(x))
            fold(self, trainer, noisy, step)
            answers.append(net(x))
        net.train()

    monkeypatch.setattr(VariationalDropout, "_fold", looked)
    dropout = method()
    fit(dropout)
    before, after = answers
    assert dropout.masks.sparsity() > 0
    assert torch.equal(before, after)


def test_a_step_descends_the_loss_plus_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of SGD, against autograd through the sampled output and the published formula."""
    dropout = method(warmup=("0st", "0st"), until="3st", kl=7.0, threshold=7.9, noise=Noise(-3.0, 1e-5, clip=False))
    module, data = task(seed=0, optimizer=plain_sgd), loaders(batches=4)[0].dataset
    begun = {name: value.clone() for name, value in module.state_dict().items()}
    validation = loaders()[1]
    noise: list[Tensor] = []
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: noise.append(draw(*args, **kwargs)) or noise[-1])
    seen: dict[str, Tensor] = {}

    class Stop(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if not seen:
                seen.update({n: p.grad.clone() for n, p in pl_module.named_parameters()})
                assert dropout.noisy is not None
                seen.update({f"noise {n}": k.log_sigma2.grad.clone() for n, k in dropout.noisy.layers.items()})  # type: ignore[union-attr]

    run = trainer(dropout, Stop(), max_steps=3, max_epochs=-1, limit_val_batches=0)
    run.fit(module, DataLoader(data, batch_size=16), validation)
    leaves = {name: value.clone().requires_grad_() for name, value in begun.items()}
    values = {f"net.{n}": torch.full_like(begun[f"net.{n}"], -3.0).requires_grad_() for n in TARGETS}

    def layer(name: str, x: Tensor, eps: Tensor) -> Tensor:
        weight = f"{name}.weight"
        mean = x @ leaves[weight].t() + leaves[f"{name}.bias"]
        return mean + (x.pow(2) @ values[weight].exp().t() + 1e-8).sqrt() * eps

    x, y = next(iter(DataLoader(data, batch_size=16)))
    hidden = torch.tanh(layer("net.fc2", torch.relu(layer("net.fc1", x, noise[0])), noise[1]))
    loss = F.cross_entropy(hidden @ leaves["net.head.weight"].t() + leaves["net.head.bias"], y)
    (loss + 7.0 / 16 * sum(variational_kl(log_alpha(leaves[n], v).clamp(-8, 8)).sum() for n, v in values.items())).backward()
    assert isinstance(data, TensorDataset)
    assert len(data) == 16
    for name, leaf in leaves.items():
        assert torch.allclose(seen[name], leaf.grad, rtol=1e-4, atol=1e-5), name  # type: ignore[arg-type]
    for name, value in values.items():
        assert torch.allclose(seen[f"noise {name}"], value.grad, rtol=1e-4, atol=1e-6), name  # type: ignore[arg-type]


@pytest.mark.parametrize("sparsity", [None, 0.8])
def test_resuming_anywhere_is_exact(sparsity: float | None, tmp_path: Path) -> None:
    whole = fit(method(sparsity), SaveAlways(tmp_path))
    assert sum(zeros_of(weights(whole["module"]).values()))
    for checkpoint in sorted(tmp_path.iterdir()):
        if checkpoint.name.startswith("16-"):
            continue
        again = fit(method(sparsity), checkpoint=checkpoint)
        for key in ("weights", "optimizer", "masks"):
            same_bits(again[key], whole[key])
        assert again["kl"] == whole["kl"], checkpoint.name
        assert again["losses"] == whole["losses"][-len(again["losses"]) :]
        assert torch.equal(again["random"], whole["random"])


@pytest.mark.parametrize("forgotten", ["adam", "slope", "log_sigma2"])
def test_resuming_without_its_memory_is_not_exact(forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, state = fit(method(), SaveAlways(tmp_path)), weight_noise.NoisyWeights.state

    def lossy(self: weight_noise.NoisyWeights) -> dict[str, Any]:
        found = state(self)
        if forgotten == "adam":
            return found | {"adam": torch.optim.Adam(self.adam.param_groups[0]["params"]).state_dict()}
        return found | {forgotten: {name: torch.full_like(value, -2.0) for name, value in found[forgotten].items()}}

    monkeypatch.setattr(weight_noise.NoisyWeights, "state", lossy)
    folder = tmp_path / "lossy"
    folder.mkdir()
    fit(method(), SaveAlways(folder))
    again = fit(method(), checkpoint=folder / "07-step.ckpt")
    assert any(not torch.equal(value, whole["weights"][name]) for name, value in again["weights"].items())


def test_a_second_fit_goes_on_from_the_zeros_of_the_first() -> None:
    dropout = method(0.5)
    module = task(seed=0)
    trainer(dropout, max_epochs=2).fit(module, *loaders())
    first = dict(dropout.masks.masks)
    dropout.sparsity, dropout._sparsity = 0.7, Fraction(7, 10)
    trainer(dropout, max_epochs=2).fit(module, *loaders())
    second = dropout.masks.masks
    assert sum(zeros_of(weights(module).values())) == math.floor(0.7 * TOTAL)
    assert not any(bool((second[name] & ~mask).any()) for name, mask in first.items())


def test_a_sparse_start_has_noise_only_where_it_is_alive() -> None:
    module, dropout = task(seed=0), method(0.8)
    manager = MaskManager(module)
    prune(manager, 0.5)
    dropout.use(module, manager)
    begun, zeros = dict(manager.masks), []

    class Look(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            zeros.append(sum(zeros_of(weights(module).values())))
            for name, noise in dropout.noisy.layers.items() if dropout.noisy else ():
                assert torch.equal(noise.log_sigma2.isfinite(), begun[name])

    trainer(dropout, Look(), max_epochs=2).fit(module, *loaders())
    assert zeros[:11] == [TOTAL // 2] * 11
    assert zeros[-1] == math.floor(0.8 * TOTAL)


def test_averaged_weights_are_as_sparse() -> None:
    average = EMAWeightAveraging(decay=0.9)
    dropout = method(0.6)
    module = task(seed=0)
    trainer(dropout, average, max_epochs=2).fit(module, *loaders())
    assert sum(zeros_of(weights(module).values())) == math.floor(0.6 * TOTAL)
    assert dropout.verification is not None
    assert dropout.verification.ok


class Unsized(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.zeros(8), 0)])


class Reads(Task):
    """Uses the weight of fc2 without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net.forward = lambda x: self.net.head(F.linear(self.net.fc1(x), self.net.fc2.weight))  # type: ignore[method-assign]


def test_what_cannot_work_is_refused() -> None:
    for wrong, says in (
        ({"kl": 0.0}, "kl is above 0"),
        ({"samples": 0}, "samples 1 or more"),
        ({"threshold": 9.0}, "must lie within noise.clamp"),
        ({"sparsity": 0.0}, r"must be in \(0, 1\)"),
    ):
        with pytest.raises(RecipeError, match=says):
            method(**wrong)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"lr=0\.0: lr and clamp are above 0"):
        Noise(lr=0.0)
    with pytest.raises(RecipeError, match=r"must end before until='12st' \(step 12\)"):
        fit(method(warmup=("2st", "12st")))
    with pytest.raises(RecipeError, match="within the run of 16 steps"):
        fit(method(until="17st"))
    with pytest.raises(RecipeError, match="LBFGS"):
        trainer(method(), max_epochs=2).fit(task(optimizer=torch.optim.LBFGS), *loaders())
    with pytest.raises(RecipeError, match="give VariationalDropout samples"):
        trainer(method(), max_steps=16, max_epochs=-1, limit_train_batches=8, limit_val_batches=0).fit(
            task(), DataLoader(Unsized()), loaders()[1]
        )
    with pytest.raises(RecipeError, match=r"fc2.weight was not called in this step"):
        trainer(method(), max_epochs=2).fit(Reads(), *loaders())
    frozen = task()
    frozen.net.fc1.requires_grad_(False)
    with pytest.raises(RecipeError, match=r"fc1.weight is not trained"):
        trainer(method(), max_epochs=2).fit(frozen, *loaders())
    with pytest.raises(DivergedError, match=r"fc.\.weight: at step \d+ every weight is noise"):
        fit(method(threshold=-7.0, noise=Noise(5.0, 0.2)))


def test_layers_that_cannot_be_noisy_are_refused_when_the_model_is_known() -> None:
    with pytest.raises(TargetError, match=r"0.weight is the weight of a Embedding, which cannot be given noise"):
        VariationalDropout(targets=Targets(include=("0",))).use(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 2)))
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    with pytest.raises(TargetError, match=r"0.weight is also 2.weight: the noise of a tied weight"):
        VariationalDropout(targets=Targets(head=True)).use(tied)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(PatternError, match="variational dropout prunes single weights"):
        VariationalDropout().use(model, MaskManager(model, Targets(head=True), pattern="2:4"))
    manager = MaskManager(model, Targets(head=True))
    prune(manager, 0.5)
    with pytest.raises(RecipeError, match=r"sparsity=0.4 is below the 0.5"):
        VariationalDropout(0.4).use(model, manager)
