"""Language models through recipes: masks on a tied Llama, perplexity as the metric, exact resume, folders that keep zeros."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsetrain.callbacks import KeepMasks, PruneFinetune
from sparsetrain.data import TextData, get_tokenizer
from sparsetrain.masks import MaskManager
from sparsetrain.recipe import plan
from sparsetrain.schedules import OneShot
from sparsetrain.tasks import CausalLM, save_pretrained
from tests.contracts.promises import same_bits
from tests.recipes.conftest import Cli
from tests.recipes.llama import LLAMA
from tests.recipes.test_resume import assert_equal_runs, interrupt_at
from tests.recipes.test_run import metrics, same, weights

ROOT = Path(__file__).parents[2] / "recipes"
# 13 batches an epoch, 2 epochs.
TINY = f"""\
seed: 3
model:
  class_path: CausalLM
  init_args:
    config: {json.dumps(LLAMA)}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
    lr_schedule: cosine
data:
  class_path: TextData
  init_args: {{source: [law, math], tokenizer: bytes, window: 32, batch_size: 4, limit: 52}}
method:
  class_path: PruneFinetune
  init_args: {{pattern: "2:4", schedule: {{class_path: OneShot, init_args: {{at: 5st}}}}}}
trainer: {{max_epochs: 2}}
"""


# ---------------------------------------------------------------- masks on a tied Llama


def broken_groups(network: nn.Module) -> int:
    """Groups of 4 inputs with more than 2 weights that are not zero, over all linear layers of the blocks."""
    return sum(
        int(((weight.unflatten(1, (-1, 4)) != 0).sum(-1) > 2).sum())
        for name, weight in network.named_parameters()
        if name.endswith("proj.weight")
    )


class Watching(Callback):
    """Counts broken groups after every step, and looks whether the tied embedding is one tensor."""

    def __init__(self) -> None:
        self.broken: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, CausalLM)
        network: Any = pl_module.network
        self.broken.append(broken_groups(network))
        assert network.lm_head.weight is network.model.embed_tokens.weight
        assert int((network.lm_head.weight == 0).sum()) == 0


def fit(module: CausalLM, *callbacks: Callback, data: TextData | None = None, resume: Any = None, **options: Any) -> None:
    seed_everything(7, verbose=False)
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": False} | silent | options
    trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), **settings)
    data = data or TextData("law", window=32, batch_size=4, limit=40)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=None)


def llama(seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(config=LLAMA, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), lr_schedule="cosine")


def halved(module: CausalLM) -> CausalLM:
    """2:4 zeros as somebody else's checkpoint has them."""
    with torch.no_grad():
        for name, weight in module.network.named_parameters():
            if name.endswith("proj.weight"):
                weight[:, 1::4] = 0
                weight[:, 2::4] = 0
    return module


@pytest.mark.parametrize("kind", ["KeepMasks", "PruneFinetune"])
def test_the_pattern_holds_after_every_step_and_in_the_folder(kind: str, tmp_path: Path) -> None:
    watching = Watching()
    if kind == "KeepMasks":
        module, method = halved(llama()), KeepMasks(pattern="2:4")
        method.use(module, MaskManager.adopt(module, "2:4"))
    else:
        module, method = llama(), PruneFinetune(pattern="2:4", schedule=OneShot("0st"))
    fit(module, method, watching)
    assert watching.broken == [0] * 10
    zeros = {name: weight == 0 for name, weight in module.network.named_parameters() if name.endswith("proj.weight")}
    # Of each of the 2 layers: q and o 16x16, k and v 8x16, three of 16x24, a half each.
    assert sum(int(mask.sum()) for mask in zeros.values()) == 2 * (2 * 256 + 2 * 128 + 3 * 384) // 2
    save_pretrained(module, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same_bits(stock.state_dict(), module.network.state_dict())
    assert broken_groups(stock) == 0
    assert all(torch.equal(stock.get_parameter(name) == 0, mask) for name, mask in zeros.items())


def test_without_a_method_the_same_check_fails() -> None:
    module, watching = halved(llama()), Watching()
    assert broken_groups(module.network) == 0
    fit(module, watching)
    assert min(watching.broken) > 0


# ---------------------------------------------------------------- runs


def test_perplexity_is_what_a_run_is_judged_by(tiny: Path, cli: Cli) -> None:
    ended = cli("run", tiny, "--dense_twin", "true", "--out", "out")
    assert ended.code == 0, ended.err
    found = metrics("out")
    assert (found["metric"], found["higher_is_better"]) == ("test/perplexity", False)
    assert found["final"].keys() == {"test/loss", "test/perplexity"} == found["dense"].keys()
    # The 2 layers of 1,920 weights at 32 positions, halved; the tied head, at 32 positions, is left dense.
    assert found["flops"] == {"dense": 2 * 32 * (3840 + 258 * 16), "sparse": 2 * 32 * (1920 + 258 * 16)}
    assert (found["sparsity"]["prunable"], found["sparsity"]["kept"], found["verified"]) == (3840, 1920, True)
    assert "perplexity (test)" in ended.out
    report = Path("out/report.html").read_text(encoding="utf-8")
    change = 100 * (found["final"]["test/perplexity"] / found["dense"]["test/perplexity"] - 1)
    assert f"{change:+.1f}\u00a0%".replace("-", "\u2212") in report
    assert "Perplexity (test)" in report
    history = [json.loads(line) for line in Path("out/history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history if "val/perplexity" in row] == [12, 25]


@pytest.mark.usefixtures("no_report")
def test_the_seed_decides_a_run_interrupted_or_not(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--checkpoint_every", "7st", "--data.tokenizer", "bpe:258"]
    assert cli("run", tiny, *options, "--out", "whole").code == 0
    interrupt_at(20, monkeypatch)
    assert cli("run", tiny, *options, "--out", "broken").code == 130
    assert torch.load("broken/checkpoints/last.ckpt", weights_only=True)["global_step"] == 14
    assert cli("run", tiny, *options, "--out", "broken", "--ckpt_path", "last").code == 0
    assert_equal_runs("whole", "broken")
    assert cli("run", tiny, *options, "--seed", "4", "--out", "other").code == 0
    assert not same(weights("whole"), weights("other"))


def test_text_resumes_in_mid_epoch_and_not_without_its_state(tmp_path: Path) -> None:
    def run(resume: Path | None = None) -> CausalLM:
        module = llama()
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=3)
        data = TextData("law", window=32, batch_size=4, limit=40, seed=5)
        fit(module, keep, data=data, resume=resume, max_epochs=2, enable_checkpointing=True)
        return module

    whole = run().state_dict()
    same_bits(run(tmp_path / "step=6.ckpt").state_dict(), whole)
    same_bits(run(tmp_path / "step=15.ckpt").state_dict(), whole)
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    del checkpoint["TextData"]
    torch.save(checkpoint, tmp_path / "forgetful.ckpt")
    assert not same(run(tmp_path / "forgetful.ckpt").state_dict(), whole)


@pytest.mark.usefixtures("no_report")
def test_a_trained_tokenizer_is_beside_the_run_and_goes_on(tiny: Path, cli: Cli) -> None:
    text = ["--data.tokenizer", "bpe:300", "--model.config", json.dumps(LLAMA | {"vocab_size": 300})]
    assert cli("run", tiny, *text, "--method", "null", "--out", "out").code == 0
    data = TextData(["law", "math"], tokenizer="out/tokenizer", window=32, limit=4)
    data.setup()
    stock = AutoTokenizer.from_pretrained("out/tokenizer")
    assert stock("The Mayor shall")["input_ids"] == get_tokenizer("out/tokenizer").encode(["The Mayor shall"])[0]
    module = CausalLM(config=LLAMA | {"vocab_size": 300})
    module.load_state_dict(weights("out"))
    save_pretrained(module, "exported", data.tokenizer)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in Path("exported").iterdir()}
    # The next run starts from the folder alone.
    network = ["--model.config", "null", "--model.model", "exported", "--data.tokenizer", "exported", "--data.source", "python"]
    ended = cli("run", tiny, *network, "--out", "next")
    assert ended.code == 0, ended.err
    assert metrics("next")["verified"] is True


def test_a_run_that_cannot_start_leaves_no_tokenizer(tiny: Path, cli: Cli) -> None:
    late = ["--data.tokenizer", "bpe:258", "--method.schedule", "OneShot", "--method.schedule.at", "90ep"]
    ended = cli("run", tiny, *late, "--out", "out")
    assert (ended.code, "90ep" in ended.err) == (2, True), ended.err
    assert not Path("out").exists()


@pytest.mark.usefixtures("no_report")
def test_without_test_text_a_run_is_judged_by_its_validation_text(tiny: Path, cli: Cli) -> None:
    Path("own").mkdir()
    for split, lines in (("train", 60), ("valid", 9)):
        Path(f"own/{split}.txt").write_text("".join(f"{split} {number}\n" for number in range(lines)), encoding="utf-8")
    ended = cli("run", tiny, "--data.source", "own", "--data.held_out", "0", "--out", "out")
    assert ended.code == 0, ended.err
    found = metrics("out")
    assert (found["metric"], found["final"].keys()) == ("val/perplexity", {"val/loss", "val/perplexity"})
    last = [json.loads(line) for line in Path("out/history.jsonl").read_text().splitlines() if "val/perplexity" in line][-1]
    assert found["final"]["val/perplexity"] == pytest.approx(last["val/perplexity"], rel=1e-6)


def test_a_tokenizer_that_is_not_the_models_stops_the_run_before_it_begins(tiny: Path, cli: Cli) -> None:
    ended = cli("run", tiny, "--data.tokenizer", "bpe:400", "--out", "out")
    assert ended.code == 2
    assert "the tokenizer has 400 entries, the embedding of LlamaForCausalLM 258" in ended.err
    assert not Path("out").exists()


def test_the_quickstart_in_short(cli: Cli, tmp_path: Path) -> None:
    short = ["--data.limit", "60", "--trainer.max_epochs", "1", "--dense_twin", "false"]
    assert cli("run", ROOT / "text_quickstart.yaml", *short, "--out", tmp_path / "out").code == 0
    found = metrics(str(tmp_path / "out"))
    assert found["sparsity"]["kept"] * 2 == found["sparsity"]["prunable"] == 92_160
    assert found["verified"] is True
    assert found["final"]["test/perplexity"] < 100
    planned = plan(ROOT / "text_quickstart.yaml")
    assert planned.problems == []
    assert planned.flops == {"dense": 27_820_032, "sparse": 16_023_552}
