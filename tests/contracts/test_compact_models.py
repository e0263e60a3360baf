"""Compact transformers that stock `from_pretrained` loads, and compact models of any kind in a folder of their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsetrain import CausalLM, GroupLasso, Groups, TextData, save_pretrained
from sparsetrain.calibration import runner
from sparsetrain.errors import ExportError, MaskStateError
from sparsetrain.export import as_ordinary, load_compact, save_compact
from sparsetrain.structure import Compacted, compact, coupled_manager, find_structure, prune_units
from sparsetrain.structure.budget import Budget, alike
from sparsetrain.structure.recording import outputs_of

from .test_structure_zoo import ZOO
from .toys import trainer

#: Where heads can go and a configuration can still say so, and where neurons only.
HEADS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "vit")
NEURONS = ("bert", "roberta", "distilbert", "gpt2", "opt", "gpt-neox", "t5", "falcon", "whisper")


def smaller(name: str, *kinds: Any, even: bool = True) -> tuple[nn.Module, nn.Module, Any, Compacted]:
    """A model masked, and the same one compact, about half of its heads and neurons gone; ``even``: in all blocks alike."""
    torch.manual_seed(1)
    build, sample, _ = ZOO[name]
    net = build().eval()
    structure = find_structure(net, sample)
    # Not the head of a classifier: it is no layer of a block.
    groups = [g for g in structure.of_kind(*kinds) if any(part.isdigit() for part in g.name.split("."))]
    nothing = {g.name: torch.zeros(g.units, dtype=torch.bool) for g in groups}
    scores = {g.name: torch.rand(g.units, generator=torch.Generator().manual_seed(len(g.name))) for g in groups}
    dead = Budget(net, groups).choose(scores, nothing, 0.5, alike=alike(groups) if even else ())
    if not even:
        dead = {name: torch.arange(len(units)) < (1 + number % 2) for number, (name, units) in enumerate(dead.items())}
    prune_units(coupled_manager(net, groups), dead)
    masked = copy.deepcopy(net)
    return masked, net, sample, compact(net, structure, dead, sample)


def made(model: nn.Module, sample: Any) -> list[Tensor]:
    with torch.no_grad():
        return outputs_of(runner(model)(sample))


@pytest.mark.parametrize("name", [*HEADS, *NEURONS])
def test_stock_transformers_load_the_compact_model(name: str, tmp_path: Path) -> None:
    masked, net, sample, done = smaller(name, *(("head", "neuron") if name in HEADS else ("neuron",)))
    ordinary: Any = as_ordinary(net, [done], lambda model: runner(model)(sample))
    ordinary.save_pretrained(tmp_path)
    back = type(net).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
    assert type(back) is type(masked)
    assert sum(p.numel() for p in back.parameters()) == done.after < done.before
    if name in HEADS:
        assert any(left < of and of <= 4 for left, of in done.units.values())
    for ours, stock in zip(made(masked, sample), made(back, sample), strict=True):
        torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5 * max(1.0, float(ours.abs().max())))


@pytest.mark.parametrize(("name", "kinds"), [("bert", ("head",)), ("gpt2", ("head", "neuron"))])
def test_what_no_configuration_can_say_is_refused(name: str, kinds: Any, tmp_path: Path) -> None:
    _, net, sample, done = smaller(name, *kinds)
    with pytest.raises(ExportError, match=r"no configuration of .* has these sizes.*save_compact"):
        as_ordinary(net, [done], lambda model: runner(model)(sample))


def test_blocks_that_differ_are_refused() -> None:
    _, net, sample, done = smaller("llama", "neuron", even=False)
    assert len({left for left, _ in done.units.values()}) > 1
    with pytest.raises(ExportError, match=r"every block must have lost alike"):
        as_ordinary(net, [done], lambda model: runner(model)(sample))


def test_a_model_that_answers_otherwise_is_refused() -> None:
    _, net, sample, done = smaller("llama", "head", "neuron")
    with pytest.raises(ExportError, match="no configuration"):
        as_ordinary(net, [done], lambda model: made(model, sample)[0] * (1 if model is net else 1.001))
    with pytest.raises(ExportError, match="Linear has no transformers configuration"):
        as_ordinary(nn.Linear(2, 2), [done], lambda model: model(sample))


def test_two_rounds_are_one_configuration() -> None:
    _, net, sample, first = smaller("llama", "neuron")
    structure = find_structure(net, sample)
    groups = structure.of_kind("neuron")
    dead = {group.name: torch.arange(group.units) < 2 for group in groups}
    prune_units(coupled_manager(net, groups), dead)
    second = compact(net, structure, dead, sample)
    ordinary: Any = as_ordinary(net, [first, second], lambda model: runner(model)(sample))
    assert ordinary.config.intermediate_size == next(iter(second.units.values()))[0]


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "vgg", "mobilenet", "resnext", "bloom"])
def test_any_compact_model_comes_back_from_its_folder(name: str, tmp_path: Path) -> None:
    _, net, sample, done = smaller(name, "head", "neuron", "filter", "input", even=False)
    torch.manual_seed(1)
    again = ZOO[name][0]().eval()
    assert done.after < done.before
    found = load_compact(save_compact(net, [done], tmp_path / "small"), again)
    assert [record.units for record in found] == [done.units]
    for a, b in zip(made(net, sample), made(again, sample), strict=True):
        assert torch.equal(a, b)
    state = net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_a_folder_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    _, net, _, done = smaller("vgg", "filter")
    folder = save_compact(net, [done], tmp_path / "small")
    other = nn.Linear(3, 2)
    before = other.weight.clone()
    with pytest.raises(MaskStateError, match="another kind than this Linear"):
        load_compact(folder, other)
    assert torch.equal(other.weight, before)
    whole = ZOO["vgg"][0]()
    record = (folder / "compaction.json").read_text()
    (folder / "compaction.json").write_text(record.replace('"version": 1', '"version": 9'))
    with pytest.raises(MaskStateError, match="layout 9, known is 1"):
        load_compact(folder, whole)
    (folder / "compaction.json").write_text(record[:-9])
    with pytest.raises(MaskStateError, match="no compact model that can be read"):
        load_compact(folder, whole)
    with pytest.raises(MaskStateError, match="no compact model that can be read"):
        load_compact(tmp_path / "nowhere", whole)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="the compact model could not be written"):
        save_compact(net, [done], tmp_path / "file")


def test_a_language_model_shrinks_in_training_and_loads_in_stock_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    task = CausalLM(
        config={"model_type": "llama", "vocab_size": 258, "num_key_value_heads": 2, "tie_word_embeddings": True, **sizes}
    )
    data = TextData("shakespeare", window=16, batch_size=8, limit={"train": 160, "valid": 8, "test": 8})
    method = GroupLasso(0.4, groups=Groups(kinds=("head", "neuron"), alike=True, multiple=4, at_least=1), compact="5st")
    trainer(method, max_epochs=1, limit_val_batches=0).fit(task, datamodule=data)
    tokens = {"input_ids": torch.randint(258, (2, 16))}
    ordinary: Any = as_ordinary(task.network, method.compacted, lambda model: model(**tokens))
    save_pretrained(ordinary, tmp_path / "small")
    back = type(ordinary).from_pretrained(tmp_path / "small").eval()
    assert method.gone() >= 0.4
    assert back.config.intermediate_size % 4 == 0
    assert back.config.intermediate_size < 24
    with torch.no_grad():
        torch.testing.assert_close(back(**tokens).logits, task.eval().network(**tokens).logits, rtol=0, atol=1e-5)
