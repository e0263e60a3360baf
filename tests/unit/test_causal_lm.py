"""Perplexity against closed forms and a loop over single tokens; the language and text-classification tasks; their folders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch import multiprocessing as mp
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaForCausalLM,
)

from sparsetrain.data import LabelledTexts, ResumableLoader, TensorSet, TextClassificationData, TextData, TokenWindows
from sparsetrain.errors import DataError, MaskStateError, RecipeError
from sparsetrain.tasks import CausalLM, Perplexity, SequenceClassification, perplexity, pretrained, save_pretrained
from sparsetrain.tasks.perplexity import next_token_loss
from sparsetrain.tasks.training import Task
from tests.contracts.promises import same_bits
from tests.contracts.ranks import RANKS, _rank
from tests.contracts.test_architectures import CASES, build
from tests.recipes.llama import LLAMA

BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def llama(seed: int = 0, **changes: Any) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(config=LLAMA | changes)


def quiet(**options: Any) -> Trainer:
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", **silent, **options)


class Bigram(nn.Module):
    """Logits are the logarithm of a transition table, (vocabulary, vocabulary)."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table).log())

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


class Counting(nn.Module):
    """After t + 1 tokens of context, token 0 has probability 1 / (t + 2); so the context that was there can be read off."""

    def forward(self, ids: Tensor) -> Tensor:
        p = 1 / (torch.arange(ids.shape[1]) + 2.0)
        return torch.stack([p, 1 - p], -1).log().expand(len(ids), -1, -1)


# ---------------------------------------------------------------- perplexity


@pytest.mark.parametrize("stride", [None, 3])
def test_who_knows_nothing_has_the_perplexity_of_the_vocabulary(stride: int | None) -> None:
    ids = torch.arange(50) % 7
    assert perplexity(Bigram([[1 / 7] * 7] * 7), ids, window=8, stride=stride) == pytest.approx(7, rel=1e-6)


def test_a_markov_chain_by_hand() -> None:
    chain = Bigram([[3 / 4, 1 / 4], [1 / 2, 1 / 2]])
    ids = torch.tensor([0, 1, 0, 0])
    # p(1|0) p(0|1) p(0|0) = 1/4 1/2 3/4
    assert perplexity(chain, ids, window=4) == pytest.approx((32 / 3) ** (1 / 3))
    assert perplexity(chain, ids, window=2, stride=1) == pytest.approx((32 / 3) ** (1 / 3))
    # [0 1] [0 0]: p(1|0) p(0|0)
    assert perplexity(chain, ids, window=2) == pytest.approx((16 / 3) ** (1 / 2))
    # [0 1 0] [0]: nothing to predict in the last
    assert perplexity(chain, ids, window=3) == pytest.approx(8 ** (1 / 2))


def test_windows_give_the_context_they_promise() -> None:
    ids = torch.zeros(10, dtype=torch.int64)
    # Block: 0 1 2 3 | 4 5 6 7 | 8 9, so 2 3 4 twice and 2 once, over 7 tokens.
    assert perplexity(Counting(), ids, window=4) == pytest.approx((24 * 24 * 2) ** (1 / 7))
    # Sliding by 2: 2 3 4, then 3 4 for each of the 3 windows that follow, over all 9.
    assert perplexity(Counting(), ids, window=4, stride=2) == pytest.approx((24 * 12**3) ** (1 / 9))
    # Sliding by 1: full context from the 4th token on.
    assert perplexity(Counting(), ids, window=4, stride=1) == pytest.approx((24 * 4**6) ** (1 / 9))


@pytest.mark.parametrize(("window", "stride"), [(8, None), (8, 3), (8, 1), (8, 7), (30, None)])
def test_as_a_loop_over_single_tokens(window: int, stride: int | None) -> None:
    module = llama().eval()
    ids = torch.randint(258, (27,), generator=torch.Generator().manual_seed(1))
    losses = []
    for at in range(1, len(ids)):
        first = 0 if stride is None or at < window else -(-(at - window + 1) // stride) * stride
        start = at // window * window if stride is None else first
        if at > start:
            with torch.no_grad():
                p = module.network(ids[None, start:at]).logits[0, -1].double().softmax(-1)[ids[at]]
            losses.append(-math.log(p))
    want = math.exp(sum(losses) / len(losses))
    for model in (module, module.network):
        assert perplexity(model, ids, window, stride, batch_size=2) == pytest.approx(want, rel=1e-5)
    shifted = perplexity(module, ids.roll(1), window, stride)
    assert abs(shifted / want - 1) > 1e-5  # the twin: other text is seen to be other text


def test_perplexity_leaves_the_model_as_it_was_and_refuses_nothing_to_predict() -> None:
    module = llama().train()
    perplexity(module, torch.arange(20), window=8)
    assert module.training
    assert all(p.grad is None for p in module.parameters())
    for ids, window, stride in ((torch.arange(1), 4, None), (torch.zeros(2, 3), 4, None), (torch.arange(9), 4, 4)):
        with pytest.raises(DataError, match="perplexity needs"):
            perplexity(module, ids, window, stride)
    with pytest.raises(DataError, match="window=1"):
        perplexity(module, torch.arange(9), window=1)


def test_perplexity_leaves_what_was_frozen_in_eval_mode_and_can_be_infinite(tmp_path: Path) -> None:
    module = llama().train()
    module.network.model.layers[0].eval()
    modes = [part.training for part in module.modules()]
    perplexity(module, torch.arange(20), window=8)
    save_pretrained(module, tmp_path / "out")
    assert [part.training for part in module.modules()] == modes
    # exp(710) is more than a float can hold, exp(700) is not.
    for size, want in ((710, math.inf), (700, math.exp(700))):
        sure = Bigram([[1.0, 1.0], [1.0, 1.0]])
        with torch.no_grad():
            sure.table.copy_(torch.tensor([[0.0, size], [0.0, size]]))
        assert perplexity(sure, torch.zeros(9, dtype=torch.int64), window=4) == pytest.approx(want)


def test_a_model_that_sees_what_it_is_to_predict_is_refused() -> None:
    bert = {"model_type": "bert", "vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    with pytest.raises(RecipeError, match="BertLMHeadModel sees the tokens it is to predict"):
        CausalLM(config=bert | {"num_attention_heads": 2})
    with torch.device("meta"):
        CausalLM(config=bert | {"num_attention_heads": 2})  # a plan has no weights to look at
    decoder = CausalLM(config=bert | {"num_attention_heads": 2, "is_decoder": True})
    assert decoder.network.training
    assert CausalLM(config=LLAMA).network.training


def test_ids_of_another_tokenizer_and_windows_beyond_the_positions_are_refused() -> None:
    with pytest.raises(DataError, match="the embedding of LlamaForCausalLM 258: they do not belong"):
        perplexity(llama(), torch.tensor([1, 258, 3]), window=8)
    with pytest.raises(DataError, match="longer than the 64 positions"):
        perplexity(llama(), torch.arange(100), window=65)


def test_the_shift_and_what_is_not_predicted() -> None:
    logits = torch.zeros(1, 4, 3)
    logits[0, 0, 2] = logits[0, 2, 1] = 100.0  # after the 1st token it expects 2, after the 3rd 1, in between anything
    total, count = next_token_loss(logits, torch.tensor([[0, 2, 0, 1]]))
    assert (float(total), int(count)) == (pytest.approx(math.log(3)), 3)
    total, count = next_token_loss(logits, torch.tensor([[-100, 2, -100, 1]]))
    assert (float(total), int(count)) == (0, 2)
    total, count = next_token_loss(logits.bfloat16(), torch.tensor([[2, -100, -100, -100]]))
    assert (float(total), int(count), total.dtype) == (0, 0, torch.float32)


def test_the_loss_is_that_of_transformers() -> None:
    module, ids = llama(), torch.randint(258, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :11] = -100
    total, count = next_token_loss(module(ids), labels)
    want = module.network(input_ids=ids, labels=labels).loss
    assert torch.allclose(total / count, want, rtol=1e-6)
    module.trainer = quiet(max_steps=1)
    object.__setattr__(module, "log_training", lambda loss: None)
    got = module.training_step((ids, labels), 0)
    grads = [torch.autograd.grad(loss, list(module.parameters())) for loss in (got, want)]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*grads, strict=True))


# ---------------------------------------------------------------- the task


class Loaders(LightningDataModule):
    """One ragged text for validation and test: batches of 3 windows of 7, 7, 4 and so on tokens."""

    def __init__(self, ids: Tensor, stride: int | None = None) -> None:
        super().__init__()
        self.windows = TokenWindows.cut([ids], 7, stride)

    def val_dataloader(self) -> ResumableLoader:
        return ResumableLoader(self.windows, 3)

    test_dataloader = val_dataloader


CHAIN = [[0.7, 0.1, 0.2], [0.3, 0.3, 0.4], [0.05, 0.9, 0.05]]
IDS = torch.tensor([0, 0, 2, 1, 1, 2, 1, 0, 0, 0, 0, 2, 1, 2, 1, 1, 0, 2, 1, 0, 0, 0, 2, 2, 1, 1, 2, 1, 0, 0, 2])


def test_logged_means_are_over_tokens_not_batches() -> None:
    module = CausalLM(network=Bigram(CHAIN))
    [found] = quiet().validate(module, datamodule=Loaders(IDS), verbose=False)
    want = [
        -math.log(CHAIN[a][b]) for at, (a, b) in enumerate(zip(IDS.tolist(), IDS.tolist()[1:], strict=False)) if (at + 1) % 7
    ]
    assert found["val/loss"] == pytest.approx(sum(want) / len(want), rel=1e-6)
    assert found["val/perplexity"] == pytest.approx(math.exp(sum(want) / len(want)), rel=1e-6)
    means = [sum(want[:18]) / 18, sum(want[18:]) / len(want[18:])]
    assert abs(sum(means) / 2 - found["val/loss"]) > 0.01  # the twin: the mean of batch means is another number
    [test] = quiet().test(module, datamodule=Loaders(IDS, stride=3), verbose=False)
    assert test["test/perplexity"] == pytest.approx(perplexity(module, IDS, 7, 3), rel=1e-6)


def on_two_ranks(folder: Path) -> dict[str, float]:
    trainer = Trainer(
        accelerator="cpu",
        strategy=DDPStrategy(),
        devices=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = TensorSet(IDS[:28].reshape(4, 7), torch.where(torch.arange(28).reshape(4, 7) < 16, IDS[:28].reshape(4, 7), -100))
    [found] = trainer.validate(CausalLM(network=Bigram(CHAIN)), ResumableLoader(rows, 1), verbose=False)
    return dict(found)


def test_two_ranks_measure_what_one_process_measures(tmp_path: Path) -> None:
    # Forked: a rank has nothing to import.
    ranks = mp.start_processes(_rank, (on_two_ranks, tmp_path), nprocs=RANKS, join=False, start_method="fork")
    ids = IDS[:28].reshape(4, 7).tolist()
    # Labels end after 16 tokens: 6 and 6 predictions in the first two rows, 1 in the third, none in the fourth.
    pairs = [(row[at], row[at + 1]) for row, count in zip(ids, (6, 6, 1, 0), strict=True) for at in range(count)]
    mean = -sum(math.log(CHAIN[a][b]) for a, b in pairs) / len(pairs)
    while not ranks.join():
        pass
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert found["val/loss"] == pytest.approx(mean, rel=1e-6)
        assert found["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)


def test_the_metric_weighs_by_tokens() -> None:
    metric = Perplexity()
    metric.update(torch.tensor(30 * math.log(2.0)), torch.tensor(30))
    metric.update(torch.tensor(10 * math.log(16.0)), torch.tensor(10))
    assert float(metric.compute()) == pytest.approx(2 ** (30 / 40 + 4 * 10 / 40))


def test_names_are_plain_and_tied_weights_stay_tied() -> None:
    module = llama()
    assert {name.removeprefix("network.") for name in module.state_dict()} == set(module.network.state_dict())
    assert module.network.lm_head.weight is module.network.model.embed_tokens.weight
    stock = AutoModelForCausalLM.from_config(module.network.config)
    stock.load_state_dict({name.removeprefix("network."): value for name, value in module.state_dict().items()}, strict=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_small_model_learns(precision: Any) -> None:
    module = CausalLM(config=LLAMA, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), lr_schedule="cosine", warmup=0.2)
    data = TextData("shakespeare", window=32, batch_size=8, limit=64)
    trainer = quiet(max_epochs=3, precision=precision, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=data)
    found = trainer.callback_metrics
    assert float(found["val/perplexity"]) < 60  # 258 before
    assert float(found["val/perplexity"]) == pytest.approx(math.exp(float(found["val/loss"])), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give one of them"),
        ({"model": "x", "config": LLAMA}, "give one of them"),
        ({"network": nn.Linear(2, 2), "config": LLAMA}, "give one of the three"),
        ({"model": "./not/there"}, r"no model './not/there': .*does not exist"),
        ({"model": "owner/none"}, r"no model 'owner/none': .*the hub does not answer"),
        ({"config": LLAMA | {"model_type": "lama"}}, "Did you mean"),
        ({"config": LLAMA | {"hidden_sise": 32}}, "config.hidden_sise is no setting of llama. Did you mean 'hidden_size'"),
        ({"config": LLAMA | {"vocab_size": None}}, "no vocab_size"),
        ({"config": LLAMA | {"num_attention_heads": 3}}, "config of llama cannot be built"),
        ({"config": LLAMA, "lr_schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"config": LLAMA, "warmup": math.nan}, "warmup=nan"),
    ],
)
def test_a_language_model_that_cannot_be(options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RecipeError, match=says):
        CausalLM(**options)


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(RecipeError, match=r"pip install 'sparsetrain\[text\]'"):
        CausalLM(config=LLAMA)


# ---------------------------------------------------------------- folders


def pruned(module: Any) -> Any:
    with torch.no_grad():
        for name, weight in module.network.named_parameters():
            if name.endswith("proj.weight"):
                weight[:, ::2] = 0.0
    return module


def test_a_saved_folder_is_a_stock_model_with_its_zeros_and_its_tokenizer(tmp_path: Path) -> None:
    module, data = pruned(llama()), TextData(tokenizer="bytes")
    data.setup()
    rng = torch.get_rng_state()
    assert save_pretrained(module, tmp_path / "out", data.tokenizer) == tmp_path / "out"
    assert torch.equal(torch.get_rng_state(), rng)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same_bits(stock.state_dict(), module.network.state_dict())
    assert int((stock.model.layers[1].mlp.up_proj.weight == 0).sum()) == 24 * 8
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("Some text", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [list(b"Some text")]
    assert torch.equal(stock(ids).logits, module.eval()(ids))
    again = CausalLM(model=str(tmp_path / "out"))
    same_bits(again.state_dict(), module.state_dict())
    assert all(part.training for part in again.modules())
    # bfloat16 stays what it is, though rounding the model has rounded its rotary frequencies, which no folder holds
    for weight in module.network.parameters():
        nn.init.normal_(weight)
    save_pretrained(module.network.bfloat16(), tmp_path / "half")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert stock.dtype == torch.bfloat16
    ids = torch.arange(40)[None]
    assert not torch.equal(stock(ids).logits, module.eval()(ids))


def test_nothing_is_written_or_overwritten_when_the_folder_would_not_be_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(llama(seed=1), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(RecipeError, match="overwrite=True"):
        save_pretrained(llama(), tmp_path / "out")

    def fails(folder: str, says: str) -> None:
        with pytest.raises(MaskStateError, match=says):
            save_pretrained(module, tmp_path / folder, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before

    # One weight is written that is not zero any more.
    module = pruned(llama())
    plain, wrong = module.network.save_pretrained, pruned(llama())
    with torch.no_grad():
        wrong.network.model.layers[0].mlp.up_proj.weight[0, 0] = 1e-30
    monkeypatch.setattr(module.network, "save_pretrained", wrong.network.save_pretrained)
    for folder in ("out", "new"):
        fails(folder, "layers.0.mlp.up_proj.weight is not the same")
    # The weights are right, what surrounds them is not.
    module = llama()
    other = module.network.config.__class__(**(module.network.config.to_dict() | {"rms_norm_eps": 10.0}))
    monkeypatch.setattr(module.network, "save_pretrained", lambda folder: (plain(folder), other.save_pretrained(folder)))
    monkeypatch.setattr(pretrained, "_same_bits", lambda one, two: True)
    other.architectures = ["LlamaForCausalLM"]
    fails("new", "outputs of .* differ")
    monkeypatch.undo()
    save_pretrained(llama(), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() != before["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_model_of_transformers_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="CausalLM holds no model of transformers"):
        save_pretrained(CausalLM(network=Bigram(CHAIN)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["T5", "ViT", "Whisper"])
def test_models_that_take_more_than_a_text_are_verified_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(next(case for case in CASES if case.name == name))
    save_pretrained(network, tmp_path / "out")
    same_bits(network.state_dict(), type(network).from_pretrained(tmp_path / "out").state_dict())
    monkeypatch.setattr(network, "forward", lambda input_values: None)  # a model of something else
    with pytest.raises(RecipeError, match=r"cannot be run on a random \w+, .*use its own save_pretrained"):
        save_pretrained(network, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_would_be_lost_by_overwriting_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("all of it")
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"holds something that is no model \(no config.json\)"):
        save_pretrained(llama(), tmp_path / "work", overwrite=True)
    monkeypatch.chdir(tmp_path / "work")
    for folder in (".", "..", tmp_path):
        with pytest.raises(RecipeError, match="is the working directory, or holds it"):
            save_pretrained(llama(), folder, overwrite=True)
    with pytest.raises(RecipeError, match="file/out cannot be written"):
        save_pretrained(llama(), tmp_path / "file/out")
    assert (tmp_path / "work/thesis.txt").read_text() == "all of it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "work"]
    (tmp_path / "link").symlink_to(tmp_path / "there")
    save_pretrained(llama(), tmp_path / "there")
    save_pretrained(llama(seed=2), tmp_path / "link", overwrite=True)
    same_bits(CausalLM(model=str(tmp_path / "there")).state_dict(), llama(seed=2).state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "there", "work"]


def test_a_disk_that_refuses_at_the_last_moment_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(llama(seed=1), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    plain = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if "partial" in self.name:
            raise OSError("disk is gone")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(RecipeError, match="out cannot be written: disk is gone"):
        save_pretrained(llama(), tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # inside peft
def test_adapters_and_broken_weights_are_not_saved_nor_taken_for_a_model(tmp_path: Path) -> None:
    module = llama()
    save_pretrained(module, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(RecipeError, match="is a LoRA adapter, not a model; merge it"):
        CausalLM(model=str(tmp_path / "adapter"))
    with pytest.raises(RecipeError, match="adapters that are not merged"):
        save_pretrained(base, tmp_path / "new")
    with torch.no_grad():
        module.network.lm_head.weight[0, 0] = math.nan
    with pytest.raises(RecipeError, match="hold NaN or infinity"):
        save_pretrained(module, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    config = BertConfig(**{key: value for key, value in BERT.items() if key != "model_type"}, is_decoder=True)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    with pytest.raises(RecipeError, match=r"lacks cls\.predictions"):
        CausalLM(model=str(tmp_path / "encoder"))
    # A classifier's head is new.
    module = SequenceClassification(model=str(tmp_path / "encoder"), num_labels=3)
    assert module.network.classifier.weight.shape == (3, 16)


# ---------------------------------------------------------------- text classification

TRAIN = "".join(
    f"{label}\tthis one is {word} indeed {n}\n" for n in range(30) for label, word in (("good", "fine"), ("bad", "xxxx"))
)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    (tmp_path / "train.tsv").write_text(TRAIN)
    (tmp_path / "test.tsv").write_text("bad\txxxx\ngood\tthe fine one is longer\ngood\tfine\n")
    return tmp_path


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_small_classifier_learns(labelled: Path, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = SequenceClassification(
        config=BERT if kind == "bert" else LLAMA,
        num_labels=2,
        optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3),
        macro_f1=True,
    )
    data = TextClassificationData(str(labelled), batch_size=8, max_length=40)
    trainer = quiet(max_epochs=5, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=data)
    assert float(trainer.callback_metrics["val/accuracy"]) == 1.0
    [found] = trainer.test(module, datamodule=data, verbose=False)
    assert found.keys() == {"test/loss", "test/accuracy", "test/macro_f1"}
    assert data.label_names == ["bad", "good"]
    save_pretrained(module, tmp_path / "out", data.tokenizer)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    batch = data.test_set.__getitems__([0, 1, 2])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(stock(**inputs).logits, module.eval()(**inputs))
    # A padded batch says what each text alone says: the pad token is the model's own.
    alone = torch.cat([stock(input_ids=data.test_set[i]["input_ids"][None]).logits for i in range(3)])
    assert torch.allclose(stock(**inputs).logits, alone, atol=1e-5)
    single = SequenceClassification(network=module.network, num_labels=2)
    as_tuple = single._run((inputs["input_ids"], inputs["attention_mask"], batch["labels"]))
    assert torch.equal(as_tuple[0], single._run(batch)[0])


def test_batches_are_padded_to_their_longest_text() -> None:
    batch = LabelledTexts([[5, 6, 7], [8], [9, 9]], [1, 0, 2], pad=4).__getitems__([1, 2])
    assert batch["input_ids"].tolist() == [[8, 4], [9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["labels"].tolist() == [0, 2]


def test_labelled_text_from_a_data_set_and_fewer_of_it(tmp_path: Path) -> None:
    kinds = datasets.ClassLabel(names=["no", "yes", "maybe"])
    columns = datasets.Features({"sentence": datasets.Value("string"), "label": kinds})
    rows = datasets.Dataset.from_dict({"sentence": [f"s{n}" for n in range(20)], "label": [n % 3 for n in range(20)]}, columns)
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "set")
    data = TextClassificationData(str(tmp_path / "set"), validation=0.2, limit=7)
    data.setup()
    assert data.label_names == ["no", "yes", "maybe"]  # as the data set numbers them
    assert [len(split) for split in (data.train_set, data.val_set, data.test_set)] == [7, 4, 1]
    batch = data.test_set.__getitems__([0])
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == ([list(b"s1")], [1])


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("god\tfine\n", "label 'god', which its training text has not. Did you mean 'good'"),
        ("good\tfine\njust text\n", "line 2 is not label<TAB>text: 'just text'"),
        ("\ttext\n", "line 1 is not label<TAB>text"),
        ("", "empty"),
    ],
)
def test_labels_that_are_not_there(labelled: Path, rows: str, says: str) -> None:
    (labelled / "test.tsv").write_text(rows)
    with pytest.raises(DataError, match=says):
        TextClassificationData(str(labelled)).setup()


@pytest.mark.parametrize(
    ("labels", "vocabulary", "length", "says"),
    [(2, 258, 32, "3 labels, BertForSequenceClassification 2"), (3, 257, 32, "embedding"), (3, 258, 65, "64 positions")],
)
def test_a_classifier_that_does_not_fit_the_data(labelled: Path, labels: int, vocabulary: int, length: int, says: str) -> None:
    (labelled / "train.tsv").write_text(TRAIN + "other\tx\n")
    module = SequenceClassification(config=BERT | {"vocab_size": vocabulary}, num_labels=labels)
    with pytest.raises(DataError, match=says):
        quiet(max_steps=1).fit(module, datamodule=TextClassificationData(str(labelled), max_length=length))


@pytest.mark.parametrize(
    "options", [{"max_length": 1}, {"batch_size": 0}, {"validation": math.nan}, {"limit": math.nan}, {"limit": 0}, {"seed": -1}]
)
def test_impossible_classification_data(options: dict[str, Any]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(DataError, match=f"{name}={value}"):
        TextClassificationData("x", **options)
    with pytest.raises(RecipeError, match="num_labels=1"):
        SequenceClassification(network=nn.Linear(2, 2), num_labels=1)


class Draws(LlamaForCausalLM):
    """A model of somebody's own whose constructor draws a random number."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.drawn = float(torch.rand((), device="cpu"))


def test_what_is_loaded_again_to_be_compared_draws_no_random_number_of_training(tmp_path: Path) -> None:
    model = Draws(llama().network.config)
    rng = torch.get_rng_state()
    save_pretrained(model, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), rng)
    Draws(model.config)  # Twin: this does draw one.
    assert not torch.equal(torch.get_rng_state(), rng)


def test_what_validation_has_counted_is_not_in_the_test() -> None:
    torch.manual_seed(0)
    module = SequenceClassification(config=BERT, num_labels=2, macro_f1=True)
    right, wrong = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    module.val_metrics.update(wrong, torch.tensor([0, 1]))
    module.test_metrics.update(right, torch.tensor([0, 1]))
    assert {k: float(v) for k, v in module.test_metrics.compute().items()} == {"test/accuracy": 1.0, "test/macro_f1": 1.0}
    assert {k: float(v) for k, v in module.val_metrics.compute().items()} == {"val/accuracy": 0.0, "val/macro_f1": 0.0}


@pytest.mark.parametrize("keeps", [True, False])
def test_rotary_frequencies_stay_exact_in_half_precision(keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base 10000, heads of 8: 1, 0.1, 0.01, 0.001, of which bfloat16 holds the first alone."""
    if not keeps:
        monkeypatch.setattr(Task, "_apply", nn.Module._apply)
    model = llama()
    data = TextData("shakespeare", window=32, batch_size=4, limit=8)
    quiet(max_epochs=1, precision="bf16-true").fit(model, datamodule=data)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    rotary = model.network.model.rotary_emb
    exact = torch.tensor([1.0, 10**-1, 10**-2, 10**-3])
    for found in (rotary.inv_freq, rotary.original_inv_freq):
        assert (found.dtype == torch.float32) == keeps
        assert torch.allclose(found.float(), exact, rtol=1e-6, atol=0) == keeps
    # What stock transformers loads says what was trained.
    save_pretrained(model, tmp_path / "saved")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.randint(258, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, model.eval()(ids)) == keeps
    assert model.double().network.model.rotary_emb.inv_freq.dtype == torch.float64
