"""Promise 8 for formats: what is chosen gives what the dense model gives, is faster, and is refused or left out otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from sparsetrain.errors import ExportError, MaskStateError
from sparsetrain.export import InferenceModel, for_inference, formats, inference
from sparsetrain.export.layers import Compact, FastLayer, Sparse
from sparsetrain.export.speed import Speed

Patch = pytest.MonkeyPatch


class Net(nn.Module):
    """A shared layer, two equal ones, one without zeros; weights in 16x16 blocks, 87.5 % of them zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3)
        self.again = self.first
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.again(self.drop(torch.relu(self.first(x)))))
        return {"logits": self.head(torch.relu(self.second(hidden))), "kind": "toy"}


def net() -> Net:
    torch.manual_seed(5)
    model = Net()
    with torch.no_grad():
        for turn, layer in enumerate((model.first, model.second)):
            alive = torch.zeros(4, 4)
            alive[0, turn] = alive[1, 2] = 1
            layer.weight.mul_(alive.repeat_interleave(16, 0).repeat_interleave(16, 1))
    return model


def costs(patch: Patch, by_batch: dict[str, tuple[float, float]]) -> list[str]:
    """Replace the clock: a format is so many times faster at batch 1 and 64. Returns what was measured, in order."""
    measured: list[str] = []

    def name(way: Any) -> str:
        if isinstance(way, Compact):
            return "compact"
        return "dense" if not isinstance(way, Sparse) else "csr" if way.block is None else "bsr:{}x{}".format(*way.block)

    def ratio(way: Any, x: Any) -> float:
        form = name(way)
        return 1.0 if form == "dense" else by_batch.get(form, (0.5, 0.5))[int(len(x) > 1)]

    def race(ways: list[Callable[..., Any]], **given: Any) -> list[list[float]]:
        modules, inputs = zip(*(way.__defaults__ for way in ways), strict=True)  # type: ignore[attr-defined]
        measured.append("race " + " ".join(map(name, modules)))
        return [[1 / ratio(module, x)] * 3 for module, x in zip(modules, inputs, strict=True)]

    def measure_speed(dense: Any, other: Any, sample: Any, **given: Any) -> Speed:
        measured.append(name(other))
        value = ratio(other, sample) if isinstance(other, FastLayer) else by_batch.get("whole", (2.0, 2.0))[0]
        return Speed(value, value, value, 1.0, 1 / value, 3)

    patch.setattr(formats, "race", race)
    patch.setattr(formats, "measure_speed", measure_speed)
    return measured


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({"csr": (2.0, 3.0), "compact": (2.0, 2.0)}, "csr"),
        ({"csr": (2.0, 1.04), "compact": (1.1, 1.1)}, "compact"),  # 4 % is a tie at batch 64, and dense wins ties
        ({"csr": (1.04, 9.0), "bsr:16x16": (0.9, 9.0)}, "dense"),
        ({"bsr:16x16": (1.2, 1.2), "csr": (1.3, 1.1)}, "bsr:16x16"),  # 1.44 over both, against 1.43
        ({}, "dense"),
    ],
)
def test_the_fastest_at_every_batch_size_is_chosen(
    monkeypatch: Patch, given: dict[str, tuple[float, float]], chosen: str
) -> None:
    measured = costs(monkeypatch, given)
    fast = for_inference(net())
    rows = fast.choice.layers
    assert [row.names for row in rows] == [("first", "again"), ("second",)]
    assert [row.format for row in rows] == [chosen] * 2
    assert rows[0].speed == ({1: 1.0, 64: 1.0} if chosen == "dense" else dict(zip((1, 64), given[chosen], strict=True)))
    assert sum(line.startswith("race") for line in measured) == 2  # one race a batch size: equal layers are measured once
    assert rows[0].sparsity == 0.875
    assert rows[0].shape == (64, 64)
    assert isinstance(fast.model.first, FastLayer) == (chosen != "dense")
    assert fast.model.first is fast.model.again
    assert chosen in str(fast.choice)
    assert "batch 64" in str(fast.choice)


@pytest.mark.parametrize("form", ["compact", "csr", "bsr:16x16"])
def test_the_copy_gives_what_the_model_gives(monkeypatch: Patch, tmp_path: Path, form: str) -> None:
    costs(monkeypatch, {form: (2.0, 2.0)})
    model, x = net().train(), torch.randn(7, 64)
    fast = for_inference(model, {"x": x})
    assert model.training
    assert model.first.weight.requires_grad
    assert type(model.first) is nn.Linear
    expected = model.eval()(x)["logits"]
    torch.testing.assert_close(fast(x)["logits"], expected, rtol=1e-5, atol=1e-6)
    assert fast.choice.difference is not None
    assert fast.choice.difference < 1e-5
    assert fast.choice.whole is not None
    assert fast.choice.whole.ratio == 2
    other = Net()
    other.load_state_dict(fast.state_dict(), strict=True)  # plain names, dense weights
    assert torch.equal(other.eval()(x)["logits"], expected)
    loaded = InferenceModel.load(fast.save(tmp_path / "out"), Net())
    assert torch.equal(loaded(x)["logits"], fast(x)["logits"])
    assert loaded.choice == fast.choice
    assert isinstance(loaded.model.first, FastLayer)
    assert loaded.model.first is loaded.model.again


def test_a_model_without_zeros_stays_dense_and_says_so() -> None:
    model = nn.Linear(8, 8)
    fast = for_inference(model, torch.ones(2, 8))
    assert str(fast.choice).startswith("no layer has zeros")
    assert fast.choice.difference == 0
    assert fast.choice.whole is None
    assert type(fast.model) is nn.Linear
    assert fast.model is not model


def test_a_whole_model_that_is_slower_stays_dense(monkeypatch: Patch) -> None:
    costs(monkeypatch, {"csr": (2.0, 2.0), "whole": (0.8, 0.8)})
    fast = for_inference(net(), torch.randn(3, 64))
    assert [row.format for row in fast.choice.layers] == ["dense", "dense"]
    assert type(fast.model.first) is nn.Linear
    assert "slower" in fast.choice.layers[0].notes["csr"]
    assert "every layer stays dense" in str(fast.choice)


def test_sabotage_a_layer_that_is_wrong_is_left_out(monkeypatch: Patch) -> None:
    costs(monkeypatch, {"csr": (9.0, 9.0), "compact": (2.0, 2.0)})
    multiply = Sparse.multiply
    monkeypatch.setattr(Sparse, "multiply", lambda self, x: multiply(self, x) * 1.001)
    fast = for_inference(net())
    assert [row.format for row in fast.choice.layers] == ["compact", "compact"]
    assert "csr differs from the dense output" in fast.choice.layers[0].notes["csr"]


def test_sabotage_a_whole_model_that_is_wrong_is_refused(monkeypatch: Patch) -> None:
    costs(monkeypatch, {"csr": (9.0, 9.0)})
    multiply = Sparse.multiply
    # Right on the 5 and 1 vectors that a layer is checked with, wrong on the sample.
    monkeypatch.setattr(Sparse, "multiply", lambda self, x: multiply(self, x) * (1 if len(x) != 7 else 1.001))
    with pytest.raises(ExportError, match=r"output 0 of the whole model differs"):
        for_inference(net(), torch.randn(7, 64))
    with pytest.raises(ExportError, match="0 floating-point tensors"):
        for_inference(Strings(), torch.ones(1))


class Strings(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "no tensor"


def test_training_it_is_refused(monkeypatch: Patch) -> None:
    costs(monkeypatch, {"csr": (2.0, 2.0)})
    fast = for_inference(net())
    assert not any(p.requires_grad for p in fast.parameters())
    assert not fast.training
    assert fast.eval() is fast
    refused: list[Callable[[], object]] = [
        fast.train,
        fast.requires_grad_,
        lambda: fast.load_state_dict(fast.state_dict()),
        lambda: fast(torch.ones(1, 64, requires_grad=True)),
        lambda: fast.model(torch.ones(1, 64, requires_grad=True)),
    ]
    for action in refused:
        with pytest.raises(ExportError, match="inference"):
            action()
    assert not fast(torch.ones(1, 64))["logits"].requires_grad


def test_a_saved_choice_that_does_not_fit_is_refused(monkeypatch: Patch, tmp_path: Path) -> None:
    costs(monkeypatch, {"csr": (2.0, 2.0)})
    folder = for_inference(net()).save(tmp_path)
    record = folder / "formats.json"
    text = record.read_text()

    def rewritten(change: Callable[[dict[str, Any]], object]) -> None:
        content = json.loads(text)
        change(content)
        record.write_text(json.dumps(content))

    changes: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda r: r.update(torch="1.13.1"), "written with torch 1.13.1"),
        (lambda r: r["choice"].update(device="cuda"), "measured on cuda, this model is on cpu"),
        (lambda r: r["choice"]["layers"][0].update(names=["third"]), "'third' of shape .64, 64. is not in this Net"),
        (lambda r: r.pop("choice"), "KeyError"),
    ]
    for change, says in changes:
        rewritten(change)
        with pytest.raises(MaskStateError, match=says):
            InferenceModel.load(folder, Net())
    rewritten(lambda r: r["choice"]["layers"][0].update(format="bsr:5x5"))
    with pytest.raises(ExportError, match=r"first: bsr:5x5.*measure again"):
        InferenceModel.load(folder, Net())
    record.write_text(text)
    with pytest.raises(MaskStateError, match="weights of another model"):
        InferenceModel.load(folder, nn.Linear(2, 2))
    with pytest.raises(MaskStateError, match="FileNotFoundError"):
        InferenceModel.load(tmp_path / "nowhere", Net())


class Tied(nn.Module):
    """A head that shares its weight with the embedding, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x))


@pytest.mark.parametrize("form", ["dense", "csr"])
def test_any_program_loads_the_file_of_tied_weights(monkeypatch: Patch, tmp_path: Path, form: str) -> None:
    costs(monkeypatch, {"csr": (2.0, 2.0)})
    torch.manual_seed(5)
    model, x = Tied().eval(), torch.tensor([[3, 9, 60]])
    with torch.no_grad():
        model.words.weight.mul_(torch.rand(64, 32) > 0.9)
    fast = for_inference(model, x, formats=("dense", form))
    assert [row.format for row in fast.choice.layers] == [form]
    folder = fast.save(tmp_path)
    other = Tied().eval()
    other.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    assert torch.equal(other(x), model(x))
    loaded = InferenceModel.load(folder, Tied())
    assert isinstance(loaded.model.head, FastLayer) == (form == "csr")
    assert torch.equal(loaded(x), fast(x))
    state = loaded.state_dict()
    assert torch.equal(state["head.weight"], model.words.weight)
    assert torch.equal(state["words.weight"], model.words.weight)


class Masked(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (torch.arange(weight.numel()).view_as(weight) % 8 == 0)


def pruned(module: nn.Linear) -> None:
    prune.l1_unstructured(module, "weight", 0.8)


def pruned_and_run(module: nn.Linear) -> None:
    pruned(module)
    with torch.no_grad():
        module(torch.ones(1, 64))  # its weight is then a plain tensor, which can be copied


@pytest.mark.parametrize(
    ("replace", "put_back"),
    [
        (pruned, lambda module: prune.remove(module, "weight")),
        (pruned_and_run, lambda module: prune.remove(module, "weight")),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
        (
            lambda module: parametrize.register_parametrization(module, "weight", Masked()),
            lambda module: parametrize.remove_parametrizations(module, "weight"),
        ),
    ],
)
def test_weights_computed_from_others_are_refused(
    replace: Callable[[nn.Linear], object], put_back: Callable[[nn.Linear], object], tmp_path: Path
) -> None:
    model, folder = net(), for_inference(net(), formats=("dense",)).save(tmp_path)
    replace(model.second)
    refused: list[Callable[[], object]] = [
        lambda: for_inference(model),
        lambda: for_inference(model.second),
        lambda: InferenceModel.load(folder, model),
    ]
    for action, name in zip(refused, ("second.weight", "weight", "second.weight"), strict=True):
        with pytest.raises(ExportError, match=f"^{name} is replaced by a parametrization or torch.nn.utils.prune: remove that"):
            action()
    put_back(model.second)
    rows = for_inference(model, formats=("dense",)).choice.layers
    assert [row.names[0] for row in rows] == ["first", "second"]


def test_weights_are_not_rounded_to_the_type_of_another_model(tmp_path: Path) -> None:
    folder = for_inference(net(), formats=("dense",)).save(tmp_path)
    with pytest.raises(
        MaskStateError, match=r"first\.weight in torch\.float32, this Net in torch\.bfloat16.*to\(torch\.float32\) f"
    ):
        InferenceModel.load(folder, Net().bfloat16())
    loaded = InferenceModel.load(folder, Net().bfloat16().to(torch.float32))
    assert torch.equal(loaded.state_dict()["first.weight"], net().first.weight)


@pytest.mark.parametrize("fails", [0, 1])
def test_a_save_that_breaks_off_leaves_the_folder_as_it_was(monkeypatch: Patch, tmp_path: Path, fails: int) -> None:
    def files() -> dict[str, bytes]:
        return {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    first = for_inference(net(), formats=("dense",))
    folder = first.save(tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    before, found = files(), {path.name for path in folder.iterdir()}
    other = for_inference(Net(), formats=("dense",))

    def broken(*given: Any, **named: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(*[(inference, "save_file", broken), (Path, "write_text", broken)][fails])
        for name in ("out", "new/deep"):
            with pytest.raises(ExportError, match=r"the model could not be written to .*no space left.*another folder"):
                other.save(tmp_path / name)
    assert files() == before
    assert {path.name for path in folder.iterdir()} == found  # nothing half-written either
    with pytest.raises(ExportError, match=r"notes\.txt .*[Dd]irectory.*choose another folder"):
        other.save(folder / "notes.txt")
    assert files() == before
    other.save(folder)
    assert torch.equal(InferenceModel.load(folder, Net()).state_dict()["first.weight"], other.state_dict()["first.weight"])
    assert (folder / "notes.txt").read_text() == "mine"
    assert {path.name for path in folder.iterdir()} == found


class Noted(nn.Linear):
    """A layer with a state of its own."""

    note: Any = None

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


def test_models_without_tensors_and_states_that_are_none(tmp_path: Path) -> None:
    empty = for_inference(nn.ReLU(), torch.tensor([-1.0, 1.0])).save(tmp_path / "empty")
    assert InferenceModel.load(empty, nn.ReLU())(torch.tensor([-2.0, 3.0])).tolist() == [0, 3]
    with pytest.raises(MaskStateError, match="weights of another model"):
        InferenceModel.load(for_inference(nn.Linear(2, 2)).save(tmp_path / "some"), nn.ReLU())
    model = nn.Sequential(Noted(2, 2))
    with pytest.raises(ExportError, match=r"0\._extra_state is a NoneType, and safetensors.*only tensors"):
        for_inference(model).save(tmp_path / "noted")
    assert not (tmp_path / "noted").exists()
    model[0].note = torch.tensor([7])
    loaded = InferenceModel.load(for_inference(model).save(tmp_path / "noted"), nn.Sequential(Noted(2, 2)))
    assert loaded.model[0].note.tolist() == [7]


class Pyramid(nn.Module):
    """Two equal 1x1 convolutions, the second on images of half the size; one that no image reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = (nn.Conv2d(16, 16, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.avg_pool2d(self.first(x), 2))


def test_convolutions_are_measured_on_images_of_their_own_size(monkeypatch: Patch) -> None:
    costs(monkeypatch, {"compact": (2.0, 2.0)})
    seen: list[tuple[int, ...]] = []
    race = formats.race

    def look(ways: list[Callable[..., Any]], **given: Any) -> list[list[float]]:
        shapes = {tuple(way.__defaults__[1].shape) for way in ways}  # type: ignore[attr-defined]
        seen.extend(shapes)
        assert len(shapes) == 1
        return race(ways, **given)

    monkeypatch.setattr(formats, "race", look)
    model = Pyramid()
    with torch.no_grad():
        for layer in (model.first, model.second, model.idle):
            layer.weight[4:] = 0
    why = "without a sample that reaches it the size of its images is unknown"
    fast = for_inference(model, torch.ones(2, 16, 6, 4), batch_sizes=(1, 5))
    assert seen == [(1, 16, 6, 4), (5, 16, 6, 4), (1, 16, 3, 2), (5, 16, 3, 2)]
    assert [row.format for row in fast.choice.layers] == ["compact", "compact"]
    assert fast.choice.left == {"idle.weight": why}
    blind = for_inference(model)
    assert blind.choice.left == {f"{name}.weight": why for name in ("first", "second", "idle")}
    assert len(seen) == 4
    assert why in str(blind.choice)


def test_a_layer_that_is_wrong_for_one_vector_alone_is_left_out(monkeypatch: Patch) -> None:
    costs(monkeypatch, {"csr": (9.0, 9.0), "compact": (2.0, 2.0)})
    multiply = Sparse.multiply
    monkeypatch.setattr(Sparse, "multiply", lambda self, x: multiply(self, x) * (1.001 if len(x) == 1 else 1))
    fast = for_inference(net())
    assert [row.format for row in fast.choice.layers] == ["compact", "compact"]
    assert "csr differs from the dense output" in fast.choice.layers[0].notes["csr"]


@pytest.mark.parametrize(("low", "chosen"), [(0.9, "dense"), (1.0, "csr")])
def test_a_format_slower_in_a_quarter_of_the_rounds_is_not_taken(monkeypatch: Patch, low: float, chosen: str) -> None:
    costs(monkeypatch, {"csr": (2.0, 2.0)})
    monkeypatch.setattr(formats, "measure_speed", lambda *given, **named: Speed(1.2, low, 1.3, 1.2, 1.0, 5))
    assert [row.format for row in for_inference(net()).choice.layers] == [chosen] * 2


@pytest.mark.parametrize(
    ("zeros", "dead", "tried"),
    [(1, 3, []), (1, 4, ["compact"]), (31, 0, []), (32, 0, ["csr"])],  # 61 and 60 rows of 64; 33 and 32 weights of 64
)
def test_formats_are_tried_only_where_they_may_pay(monkeypatch: Patch, zeros: int, dead: int, tried: list[str]) -> None:
    measured = costs(monkeypatch, {"compact": (9.0, 9.0), "csr": (9.0, 9.0)})
    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight.fill_(1)[(torch.arange(64)[:, None] + torch.arange(64)) % 64 < zeros] = 0
        model.weight[:dead] = 0
    [row] = for_inference(model, formats=("dense", "compact", "csr")).choice.layers
    assert list(row.tried) == tried
    assert row.format == (tried[0] if tried else "dense")
    assert sum(line.startswith("race") for line in measured) == (2 if tried else 0)


def test_measured_for_real_dead_rows_are_faster() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU())
    with torch.no_grad():
        model[0].weight[64:] = 0
    fast = for_inference(model, torch.randn(16, 1024), batch_sizes=(16,), formats=("dense", "compact"))
    [row] = fast.choice.layers
    assert row.format == "compact"
    assert row.speed[16] > 1.5
    assert fast.choice.whole is not None
    assert fast.choice.whole.ratio > 1.2
