"""Start from weights that somebody else pruned and saved: found under their own names, kept, and then made sparser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sparsetrain.callbacks import KeepMasks, PruneFinetune
from sparsetrain.callbacks.sparse_lora import SparseLoRA
from sparsetrain.checkpoints import matching, read_weights, require_merged, unwrapped
from sparsetrain.errors import MaskStateError, PatternError
from sparsetrain.masks import MaskManager
from sparsetrain.pruning import prune
from sparsetrain.recipe.build import check_weights, start_from
from sparsetrain.recipe.run import run
from sparsetrain.schedules import Cubic, OneShot, Rounds, Schedule
from sparsetrain.tasks.networks import MLP

from .promises import assert_pattern, same_bits
from .toys import TARGETS, Task, loaders, task, trainer


def third_party(folder: Path, pattern: str = "2:4", sparsity: float = 0.5, seed: int = 4) -> Path:
    """The bare network of a `Task`, pruned by somebody who left zeros and no masks."""
    network = task(seed).net
    prune(MaskManager(network, pattern=pattern), sparsity)
    save_file(network.state_dict(), str(folder / "pruned.safetensors"))
    return folder / "pruned.safetensors"


class Watch(Callback):
    """The sparsity after every batch; every zero of the start must still be one."""

    def __init__(self, path: Path) -> None:
        self.start = load_file(str(path))
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        now = {name: pl_module.net.get_parameter(name).detach() for name in TARGETS}  # type: ignore[union-attr]
        for name, weight in now.items():
            revived = torch.count_nonzero(weight[self.start[name] == 0])
            assert not revived, f"{revived} zeros of the start came back in {name}"
        self.seen.append(sum(int((w == 0).sum()) for w in now.values()) / sum(w.numel() for w in now.values()))


def begin(path: Path, method: Any) -> Task:
    module = task(0)
    method.use(module)
    start_from(path, module, method)
    return module


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize(
    "schedule",
    [
        Cubic("2st", "16st", "2st"),
        Rounds(rounds=4, start="2st", every="4st"),
        OneShot("7st"),
    ],
    ids=["cubic", "rounds", "once"],
)
def test_two_of_four_is_raised_to_three_quarters(schedule: Schedule, allocation: str, tmp_path: Path) -> None:
    path = third_party(tmp_path)
    method = PruneFinetune(0.75, allocation=allocation, schedule=schedule)
    module, watch = begin(path, method), Watch(path)
    assert method.masks.sparsity() == 0.5
    trainer(method, watch).fit(module, *loaders())
    assert watch.seen[0] == 0.5
    assert watch.seen == sorted(watch.seen)
    assert watch.seen[-1] == 0.75
    levels = len(set(watch.seen))
    assert levels == 2 if isinstance(schedule, OneShot) else levels > 2
    if allocation == "uniform":
        for name in TARGETS:
            assert_pattern(module.net.get_parameter(name) != 0, "unstructured", 0.75)


def test_without_adoption_the_zeros_of_the_start_fill_up(tmp_path: Path) -> None:
    """The twin: the same weights, loaded by somebody who makes no masks of their zeros."""
    path = third_party(tmp_path)
    method = PruneFinetune(0.75, schedule=Cubic("2st", "16st", "2st"))
    module, watch = task(0), Watch(path)
    module.net.load_state_dict(load_file(str(path)))
    with pytest.warns(UserWarning, match="zero already"), pytest.raises(AssertionError, match="came back"):
        trainer(method, watch).fit(module, *loaders())


def test_a_goal_below_the_start_changes_nothing(tmp_path: Path) -> None:
    path = third_party(tmp_path, "unstructured", 0.75)
    method = PruneFinetune(0.5, schedule=Cubic("2st", "16st", "2st"))
    module, watch = begin(path, method), Watch(path)
    trainer(method, watch).fit(module, *loaders())
    assert set(watch.seen) == {0.75}


def test_sparsity_within_a_pattern_rises_too(tmp_path: Path) -> None:
    path = third_party(tmp_path, "neurons", 0.25)
    method = PruneFinetune(0.5, pattern="neurons", schedule=Rounds(rounds=2, start="3st", every="4st"))
    module, watch = begin(path, method), Watch(path)
    trainer(method, watch).fit(module, *loaders())
    for name in TARGETS:
        assert_pattern(module.net.get_parameter(name) != 0, "neurons", 0.5)
    assert watch.seen[0] == 0.25


@pytest.mark.parametrize("method", [PruneFinetune(pattern="2:4"), KeepMasks("2:4")], ids=["PruneFinetune", "KeepMasks"])
def test_zeros_of_another_pattern_are_refused(method: Any, tmp_path: Path) -> None:
    path = third_party(tmp_path, "unstructured", 0.5)
    before = path.read_bytes()
    with pytest.raises(PatternError, match=r"net\.fc1\.weight: its 64 zeros are no 2:4 pattern: the weight at .* and is not"):
        begin(path, method)
    assert path.read_bytes() == before


def test_zeros_that_nobody_keeps_are_told() -> None:
    """A head that somebody pruned is no target by default; a model that was pruned further since has zeros beyond its masks."""
    module, method = task(), KeepMasks("2:4")
    prune(MaskManager(module, pattern="2:4"))
    with torch.no_grad():
        module.net.head.weight[:, ::2] = 0
    with pytest.warns(UserWarning, match=r"50% of net\.head\.weight are zeros that no mask keeps.*targets\.head: true"):
        trainer(method, max_epochs=1).fit(module, *loaders())
    assert int((module.net.head.weight == 0).sum()) == 0  # as it said
    trainer(method, max_epochs=1).fit(module, *loaders())
    prune(MaskManager(module), 0.75)
    with pytest.warns(UserWarning, match=r"25% of net\.fc[12]\.weight are zeros that no mask keeps.*pruned further"):
        trainer(method, max_epochs=1).fit(module, *loaders())
    prune(MaskManager(module), 0.75)
    lora = SparseLoRA(rank=2, pattern="2:4")
    lora.use(module, method.masks)
    with pytest.warns(UserWarning, match=r"25% of net\.fc[12]\.weight are .* and adapters fill them .*pruned further"):
        trainer(lora, max_epochs=1).fit(module, *loaders())


# -- names ------------------------------------------------------------------------------------------------------------


class Wrapped(LightningModule):
    """A task around a network, as ours are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **small))


def gpt2(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=16))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_transformers_folder_is_read(make: Any, shards: bool, tmp_path: Path) -> None:
    source = make(1)
    prune(MaskManager(source, pattern="2:4"))
    source.save_pretrained(tmp_path, max_shard_size="8KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors").is_file() != shards
    module, method = Wrapped(make(2)), KeepMasks("2:4")
    method.use(module)
    start_from(tmp_path, module, method)
    same_bits(source.state_dict(), module.network.state_dict())
    assert len(method.masks.masks) == len(method.masks.tensors) == (14 if make is llama else 8)
    assert method.masks.sparsity() == 0.5


def test_a_base_models_weights_fit_with_its_prefix(tmp_path: Path) -> None:
    """Checkpoints of the bare transformer, as GPT-2's own: no ``transformer.``, no head, a buffer that is no more."""
    source = gpt2(1)
    weights = {n: v.clone() for n, v in source.transformer.state_dict().items()} | {"h.0.attn.bias": torch.ones(4)}
    save_file(weights, str(tmp_path / "model.safetensors"))
    module = Wrapped(gpt2(2))
    start_from(tmp_path, module, None)
    same_bits(source.state_dict(), module.network.state_dict())
    assert module.network.lm_head.weight is module.network.transformer.wte.weight  # type: ignore[union-attr]


def test_names_are_matched_both_ways() -> None:
    bare, wrapped = task(3).net, task(5)
    given = {f"net.{name}": value for name, value in bare.state_dict().items()}
    same_bits(given, matching(bare.state_dict(), wrapped))
    same_bits(dict(bare.state_dict()), matching(given, task(5).net))
    same_bits(given, matching(given, wrapped))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    weights = dict(task(3).net.state_dict())
    for change, message in (
        ({"fc9.weight": torch.ones(1)}, r"it has 'net\.fc9\.weight'"),
        ({"fc1.weight": torch.ones(16, 9)}, r"net\.fc1\.weight has shape \(16, 9\), here it is \(16, 8\)"),
    ):
        save_file(weights | change, str(tmp_path / "other.safetensors"))
        with pytest.raises(MaskStateError, match=message):
            start_from(tmp_path / "other.safetensors", task(), None)
    save_file({n: v for n, v in weights.items() if n != "fc2.bias"}, str(tmp_path / "less.safetensors"))
    with pytest.raises(MaskStateError, match=r"lacks 'net\.fc2\.bias'"):
        start_from(tmp_path / "less.safetensors", task(), None)


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    llama(1).save_pretrained(tmp_path, max_shard_size="8KB")
    index = tmp_path / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    name, lost = next(iter(files.items()))
    content = (tmp_path / lost).read_bytes()
    (tmp_path / lost).unlink()
    with pytest.raises(MaskStateError, match=f"names {lost}, which is not there"):
        read_weights(tmp_path)
    (tmp_path / lost).write_bytes(content[: len(content) // 2])
    with pytest.raises(MaskStateError, match="truncated or of another kind"):
        read_weights(tmp_path)
    save_file({"other": torch.ones(1)}, str(tmp_path / lost))
    with pytest.raises(MaskStateError, match=f"names {name}, which is not in {lost}"):
        read_weights(tmp_path)
    index.write_text("{}")
    with pytest.raises(MaskStateError, match="cannot be read"):
        read_weights(tmp_path)
    index.unlink()
    with pytest.raises(MaskStateError, match=r"holds no checkpoint; looked for .*model\.safetensors\.index\.json"):
        read_weights(tmp_path)


def test_pytorch_bin_files_are_read(tmp_path: Path) -> None:
    torch.save(task(3).net.state_dict(), tmp_path / "pytorch_model.bin")
    module = task(5)
    start_from(tmp_path, module, None)
    same_bits(dict(task(3).state_dict()), dict(module.state_dict()))


def test_adapters_that_are_not_merged_are_no_start() -> None:
    weights: dict[str, Tensor] = {"fc.base_layer.weight": torch.ones(2), "fc.lora_A.default.weight": torch.ones(1)}
    assert list(unwrapped(weights)) == ["fc.weight"]
    assert list(unwrapped({"fc.base_layer.weight": torch.ones(2)})) == ["fc.base_layer.weight"]
    with pytest.raises(MaskStateError, match="adapters that are not merged"):
        require_merged(Path("last.ckpt"), weights)
    require_merged(Path("final.ckpt"), {"fc.weight": torch.ones(2)})


# -- as a recipe ------------------------------------------------------------------------------------------------------

RECIPE = """\
question: Can it be made sparser?
seed: 3
model:
  class_path: Classification
  init_args:
    network: {class_path: MLP, init_args: {in_features: 64, hidden: [16, 16], num_classes: 10}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01, weight_decay: 0.1}}
data:
  class_path: VisionData
  init_args: {name: digits, batch_size: 100}
trainer: {max_epochs: 1}
"""
RAISE = """\
method:
  class_path: PruneFinetune
  init_args:
    sparsity: 0.75
    pattern: PATTERN
    schedule: {class_path: Cubic, init_args: {start: 2st, end: 8st, every: 2st}}
"""
LORA = """\
method:
  class_path: sparsetrain.callbacks.sparse_lora.SparseLoRA
  init_args: {rank: 4, alpha: 8, pattern: "2:4"}
"""


@pytest.fixture
def pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the weights of a pruned network; the working directory beside it. No report is written."""
    monkeypatch.setattr("sparsetrain.recipe.directory.write_report", lambda out: out)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    network = MLP(in_features=64, hidden=[16, 16], num_classes=10)
    prune(MaskManager(network, pattern="2:4"))
    (tmp_path / "folder").mkdir()
    save_file(network.state_dict(), str(tmp_path / "folder" / "model.safetensors"))
    return tmp_path / "folder"


def write(text: str) -> Path:
    Path("recipe.yaml").write_text(RECIPE + text, encoding="utf-8")
    return Path("recipe.yaml")


def test_a_recipe_raises_the_sparsity_of_a_foreign_folder(pruned: Path) -> None:
    recipe = write(RAISE.replace("PATTERN", "unstructured"))
    metrics = run(recipe, ["--init_from", str(pruned)], Path("out"))
    assert metrics["verified"] is True
    assert metrics["sparsity"]["actual"] == 0.75
    final = torch.load("out/checkpoints/final.ckpt", weights_only=True)["state_dict"]
    for name, value in load_file(str(pruned / "model.safetensors")).items():
        if value.ndim > 1 and int((value == 0).sum()):
            assert torch.count_nonzero(final[f"network.{name}"][value == 0]) == 0


def test_a_recipe_with_another_pattern_leaves_nothing_behind(pruned: Path) -> None:
    before = {path: path.read_bytes() for path in pruned.rglob("*") if path.is_file()}
    recipe = write(RAISE.replace("PATTERN", "neurons"))
    with pytest.raises(PatternError, match=r"network\.fc1\.weight: its 512 zeros hold no neurons"):
        run(recipe, ["--init_from", str(pruned)], Path("out"))
    assert not Path("out").exists()
    assert {path: path.read_bytes() for path in before} == before


def test_a_recipe_with_sparse_lora_is_interrupted_and_goes_on(pruned: Path) -> None:
    recipe = write(LORA)
    whole = run(recipe, ["--init_from", str(pruned), "--trainer.max_epochs", "2"], Path("whole"))
    assert whole["verified"] is True
    assert whole["sparsity"]["actual"] == 0.5
    # rank 4: 4 * (64 + 16) + 4 * (16 + 16); the network has 1040 + 272 + 170
    assert whole["method"] == {"rank": 4, "adapters": 2, "trainable": 448, "share": 448 / 1482, "merged": True}
    final = torch.load("whole/checkpoints/final.ckpt", weights_only=True)["state_dict"]
    start = load_file(str(pruned / "model.safetensors"))
    assert sorted(final) == sorted(f"network.{name}" for name in start)
    for name, value in start.items():
        assert torch.equal(final[f"network.{name}"] == 0, value == 0), name
    check_weights(Path("whole"), final, task_of(recipe))

    run(recipe, ["--init_from", str(pruned), "--trainer.max_epochs", "1"], Path("parts"))
    run(recipe, ["--init_from", str(pruned), "--trainer.max_epochs", "2"], Path("parts"), "last")
    again = torch.load("parts/checkpoints/final.ckpt", weights_only=True)["state_dict"]
    same_bits(final, again)
    with pytest.raises(MaskStateError, match="adapters that are not merged"):
        run(recipe, ["--init_from", "parts/checkpoints/last.ckpt"], Path("third"))


def task_of(recipe: Path) -> nn.Module:
    from sparsetrain.recipe.build import instantiate
    from sparsetrain.recipe.schema import load_recipe

    model: nn.Module = instantiate(load_recipe(recipe, []), "model")
    return model
