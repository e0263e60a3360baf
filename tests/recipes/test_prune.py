"""The command `prune`: a folder goes in, a folder that stock transformers loads comes out, and mistakes leave nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from sparsetrain.data import TextData
from sparsetrain.errors import RecipeError
from sparsetrain.patterns import parse_pattern
from sparsetrain.recipe.prune import network_of
from sparsetrain.tasks.perplexity import perplexity
from sparsetrain.tasks.places import locate
from sparsetrain.tasks.pretrained import require_free
from tests.recipes.conftest import Cli

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 258}


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama that reads bytes, as somebody else saved it; its folder's parent is the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, max_position_embeddings=64, bos_token_id=None, eos_token_id=257)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


SMALL = ("--data", "shakespeare", "--tokenizer", "bytes", "--window", "32", "--samples", "8", "--evaluate", "4")


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "magnitude"])
def test_stock_transformers_loads_what_was_pruned(llama: Path, cli: Cli, criterion: str) -> None:
    ended = cli("prune", llama, *SMALL, "--pattern", "4:8", "--criterion", criterion, "--out", "out")
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert "after, by block windows of 32 tokens" in " ".join(ended.out.split())
    stock, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("out", llama))
    pattern = parse_pattern("4:8")
    for name, weight in stock.named_parameters():
        if ".layers." in name and weight.ndim == 2:
            pattern.check(weight != 0, 0.5)
            with pytest.raises(Exception, match=r"4:8|pruned"):  # the same check on what was not pruned
                pattern.check(before.get_parameter(name) != 0, 0.5)
        elif weight.ndim == 2:
            assert bool((weight != 0).all())
    found = json.loads(Path("out/sparsetrain.json").read_text(encoding="utf-8"))
    assert (found["sparsity"], found["asked"]["pattern"], len(found["layers"])) == (0.5, "4:8", 14)
    assert found["samples"] == (0 if criterion == "magnitude" else 8)
    # The first 4 windows of validation text, whose first tokens nothing predicts.
    data = TextData("shakespeare", tokenizer="bytes", window=32)
    data.setup()
    assert data.val_set is not None
    text = torch.cat([data.val_set[i][0] for i in range(4)])
    for key, model in (("dense", before), ("pruned", stock)):
        assert found[key]["tokens"] == 4 * 31
        assert found[key]["perplexity"] == pytest.approx(perplexity(model, text, 32), rel=1e-5)


def test_wanda_compares_within_rows_unless_a_pattern_is_given(llama: Path, cli: Cli) -> None:
    assert cli("prune", llama, *SMALL, "--sparsity", "0.25", "--out", "out").code == 0
    weight = AutoModelForCausalLM.from_pretrained("out").model.layers[1].mlp.down_proj.weight
    assert (weight == 0).sum(1).tolist() == [16] * 32
    assert cli("prune", llama, *SMALL, "--sparsity", "0.25", "--pattern", "unstructured", "--out", "other").code == 0
    weight = AutoModelForCausalLM.from_pretrained("other").model.layers[1].mlp.down_proj.weight
    assert int((weight == 0).sum()) == 512
    assert len(set((weight == 0).sum(1).tolist())) > 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--pattern", "3:5"), ["3:5"]),
        (("--criterion", "wonda", "--sparsity", "0.5"), ["wonda", "Did you mean 'wanda'"]),
        (("--criterion", "taylor", "--sparsity", "0.5"), ["gradient"]),
        (("--sparsity", "50"), ["50", "0.5"]),
        ((), ["how sparse"]),
        (("--sparsity", "0.5", "--data", "shakespear"), ["shakespear", "Did you mean 'shakespeare'"]),
        (("--sparsity", "0.5", "--window", "100"), ["100", "64"]),
        (("--sparsity", "0.5", "--samples", "0"), ["samples=0"]),
        (("--sparsity", "0.5", "--dtype", "float8"), ["float8"]),
        (("--sparsity", "0.5", "--weights", "float8"), ["float8", "auto"]),
        (("--sparsity", "0.5", "--exclude", "["), ["targets.exclude"]),
        (("--sparsity", "0.5", "--tokenizer", "bpe:4096"), ["4096", "258"]),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(llama: Path, cli: Cli, arguments: tuple[str, ...], told: list[str]) -> None:
    ended = cli("prune", llama, *SMALL, *arguments, "--out", "out")
    assert ended.code == 2, ended.out
    assert "Traceback" not in ended.err
    for text in told:
        assert text in ended.err, ended.err
    assert not Path("out").exists()


def test_neither_the_model_nor_a_folder_in_use_is_overwritten(llama: Path, cli: Cli) -> None:
    before = (llama / "model.safetensors").read_bytes()
    ended = cli("prune", llama, *SMALL, "--pattern", "2:4", "--out", llama)
    assert (ended.code, "in use" in ended.err) == (2, True)
    assert (llama / "model.safetensors").read_bytes() == before
    ended = cli("prune", "no/such/model", *SMALL, "--pattern", "2:4", "--out", "out")
    assert (ended.code, "no/such/model" in ended.err) == (2, True)


@pytest.mark.parametrize("name", ["--out", "--work"])
def test_a_folder_that_cannot_be_is_told_before_anything_is_pruned(llama: Path, cli: Cli, name: str) -> None:
    Path("file").write_text("taken")
    ended = cli("prune", llama, *SMALL, "--pattern", "2:4", "--out", "out", name, "file/inside")
    assert (ended.code, ended.out, "file is a file" in ended.err) == (2, "", True), ended.err
    assert not Path("out").exists()


def test_an_encoder_has_no_perplexity_and_is_pruned_too(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained("bert")
    ended = cli("prune", "bert", *SMALL, "--pattern", "2:4", "--out", "out")
    assert (ended.code, "perplexity" in ended.out) == (0, False), ended.err
    weight = AutoModel.from_pretrained("out").encoder.layer[1].output.dense.weight
    assert (weight.view(-1, 4) == 0).sum(1).tolist() == [2] * 512


HEADS = {
    "MaskedLM": (BertForMaskedLM, "cls.predictions.decoder.bias"),
    "TokenClassification": (BertForTokenClassification, "classifier.weight"),
    "SequenceClassification": (RobertaForSequenceClassification, "classifier.out_proj.weight"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_model_keeps_its_head(kind: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    made, head = HEADS[kind]
    model = made(made.config_class(**SIZES))
    with torch.no_grad():
        model.get_parameter(head).normal_()
    model.save_pretrained("model")
    ended = cli("prune", "model", *SMALL, "--pattern", "2:4", "--exclude", "^classifier", "--out", "out")
    assert (ended.code, "perplexity" in ended.out) == (0, False), ended.err
    again, info = made.from_pretrained("out", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(again.get_parameter(head), model.get_parameter(head))
    weight = again.base_model.encoder.layer[0].intermediate.dense.weight
    assert (weight.view(-1, 4) == 0).sum(1).tolist() == [2] * (64 * 8)


def test_a_model_that_would_lose_its_head_or_reads_more_than_text_is_refused(llama: Path, cli: Cli) -> None:
    sizes = T5Config(vocab_size=258, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(sizes).save_pretrained("t5")
    ViTModel(ViTConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained("vit")
    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    for name, architectures in (("nameless", None), ("other", ["TwoHeadedLlamaForCausalLM"])):
        shutil.copytree(llama, name)
        Path(name, "config.json").write_text(json.dumps(config | {"architectures": architectures}), encoding="utf-8")
    for model, told in (
        ("t5", "T5ForConditionalGeneration"),
        ("vit", "ViTModel"),
        ("nameless", "names no architecture"),
        ("other", "TwoHeadedLlama"),
    ):
        ended = cli("prune", model, *SMALL, "--pattern", "2:4", "--out", "out")
        assert (ended.code, told in ended.err, "prune_oneshot(" in ended.err) == (2, True, True), ended.err
        assert not Path("out").exists()


def test_what_is_asked_wrongly_is_told_before_anything_is_measured(
    llama: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    monkeypatch.setattr("sparsetrain.recipe.prune.measure", lambda *_: measured.append("measured"))
    for wrong in (("--criterion", "wonda"), ("--allocation", "owll"), ("--sparsity", "0.7"), ("--criterion", "taylor")):
        assert cli("prune", llama, *SMALL, "--pattern", "2:4", *wrong, "--out", "out").code == 2
    assert measured == []
    assert cli("prune", llama, *SMALL, "--pattern", "2:4", "--out", "out").code == 0
    assert measured == ["measured", "measured"]


def test_what_is_no_model_is_not_replaced(llama: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter1.tex").write_text("years of work", encoding="utf-8")
    ended = cli("prune", llama, *SMALL, "--pattern", "2:4", "--out", "thesis", "--overwrite")
    assert (ended.code, ended.out, "no model" in ended.err) == (2, "", True), ended.err
    assert Path("thesis/chapter1.tex").read_text(encoding="utf-8") == "years of work"
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    ended = cli("prune", llama, *SMALL, "--pattern", "2:4", "--out", ".")
    assert (ended.code, ended.out, "the working directory" in ended.err) == (2, "", True), ended.err
    monkeypatch.chdir("..")
    for weights in ("2:4", "1:4"):
        assert cli("prune", llama, *SMALL, "--pattern", weights, "--out", "out", "--overwrite").code == 0
    assert json.loads(Path("out/sparsetrain.json").read_text(encoding="utf-8"))["sparsity"] == 0.75


def test_a_sparse_model_is_not_pruned_to_another_pattern(llama: Path, cli: Cli) -> None:
    assert cli("prune", llama, *SMALL, "--sparsity", "0.5", "--out", "half").code == 0
    ended = cli("prune", "half", *SMALL, "--pattern", "2:4", "--out", "out")
    assert (ended.code, "50% zero already" in ended.err) == (2, True), ended.err
    assert not Path("out").exists()


def test_a_folder_that_is_not_there_is_told_at_once_and_nobody_is_asked(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(*_: Any, **__: Any) -> Any:
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", nobody)
    monkeypatch.setattr("socket.socket.connect", nobody)
    for name in ("./model", "/x/y", "no/such/model", "model/", "~/model", "../model"):
        ended = cli("prune", name, *SMALL, "--pattern", "2:4", "--out", "out")
        assert (ended.code, f"there is no model '{name}'" in ended.err, "does not exist" in ended.err) == (2, True, True)


def test_a_name_on_a_hub_that_does_not_answer_is_looked_for_in_the_cache_alone(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def offline(url: str, **_: Any) -> Any:
        asked.append(url)
        raise ConnectionError("unplugged")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(llama.parent / "cache"))
    with pytest.raises(RecipeError, match=r"'owner/net'.*nothing of that name in the cache.*does not answer \(unplugged\)"):
        network_of("owner/net")
    assert ["owner/net" in url for url in asked] == [True]
    snapshot = llama.parent / "cache" / "models--owner--net" / "snapshots" / ("0" * 40)
    shutil.copytree(llama, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    network, writes = network_of("owner/net")
    assert (type(network), writes) == (LlamaForCausalLM, True)


@pytest.mark.parametrize("answer", ["yes", "no"])
def test_a_name_on_a_hub_that_answers_is_left_to_transformers(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(*_: Any, **__: Any) -> None:
        if answer == "no":
            raise RepositoryNotFoundError("404", response=MagicMock())

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", says)
    assert (locate("owner/net"), locate("gpt2")) == ("owner/net", "gpt2")


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_a_model_is_written_in_the_type_it_was_saved_in(llama: Path, cli: Cli, criterion: str) -> None:
    LlamaForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained("half")
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for out, more in (("own", ()), ("wide", ("--weights", "float32"))):
        ended = cli("prune", "half", *SMALL, "--pattern", "2:4", "--criterion", criterion, "--out", out, *more)
        assert ended.code == 0, ended.err
        kept[out] = load_file(f"{out}/model.safetensors")
    before = load_file("half/model.safetensors")
    for name, weight in kept["own"].items():
        assert (weight.dtype, kept["wide"][name].dtype) == (torch.bfloat16, torch.float32)
        if ".layers." not in name or weight.ndim == 1:
            assert torch.equal(weight, before[name])
        else:
            assert (weight.view(-1, 4) == 0).sum(1).tolist() == [2] * (weight.numel() // 4)
            if criterion == "wanda":
                assert torch.equal(weight, before[name] * (weight != 0))
    # The first block is measured alike in both: statistics are float32, and so is what a block adds up.
    first = [n for n in before if ".layers.0." in n and before[n].ndim == 2]
    assert all(torch.equal(kept["own"][n] != 0, kept["wide"][n] != 0) for n in first)
    assert AutoModelForCausalLM.from_pretrained("own").dtype == torch.bfloat16


def test_replacing_is_said_as_the_command_line_says_it(llama: Path, cli: Cli) -> None:
    ended = cli("prune", llama, *SMALL, "--pattern", "2:4", "--out", llama)
    assert ("or --overwrite to replace" in ended.err, "overwrite=True" in ended.err) == (True, False)
    with pytest.raises(RecipeError, match=r"or overwrite=True to replace"):
        require_free(llama)
