"""Labelled text from data sets: every text keeps its own label, and a label its own number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch import Trainer
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from sparsetrain.data import TextClassificationData
from sparsetrain.data.sources import read_labelled
from sparsetrain.errors import DataError
from sparsetrain.tasks import SequenceClassification

NAMES = ["World", "Sports", "Business"]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPARSETRAIN_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def saved(names: list[str] | None = None, **splits: tuple[list[str | None], list[Any]]) -> str:
    """A folder ``set`` as ``datasets`` writes it; labels are numbers with these names, or as they are."""
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    rows = {k: datasets.Dataset.from_dict({"text": v[0], "label": v[1]}, features=features) for k, v in splits.items()}
    datasets.DatasetDict(rows).save_to_disk("set")
    return "set"


def of(data: TextClassificationData) -> list[tuple[str, int]]:
    """Texts and numbers of the training set, which reads bytes."""
    assert data.train_set is not None
    return [(bytes(ids).decode(), label) for ids, label in zip(data.train_set.ids, data.train_set.labels, strict=True)]


def quiet() -> Trainer:
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", max_steps=1, num_sanity_val_steps=0, limit_val_batches=0, **silent)


def test_a_text_that_is_left_out_takes_its_label_with_it() -> None:
    saved(NAMES, train=(["w", "", "s", None, "b"], [0, 2, 1, 2, 2]))
    data = TextClassificationData("set", validation=0)
    data.setup()
    assert of(data) == [("w", 0), ("s", 1), ("b", 2)]


def test_labels_keep_the_numbers_of_the_data_set() -> None:
    saved(NAMES, train=(["b", "w"], [2, 0]))
    data = TextClassificationData("set", validation=0)
    data.setup()
    assert data.label_names == NAMES  # not sorted, and Sports is one of them though nobody writes about it
    assert of(data) == [("b", 2), ("w", 0)]


def test_labels_that_are_numbers_are_sorted_as_numbers() -> None:
    Path("train.tsv").write_text("10\tten\n9\tnine\n2\ttwo\n", encoding="utf-8")
    splits, names = read_labelled("train.tsv")
    assert (names, splits["train"]) == (["2", "9", "10"], (["ten", "nine", "two"], ["10", "9", "2"]))
    saved(None, train=(["ten", "two"], [10, 2]))
    assert read_labelled("set")[1] == ["2", "10"]


def test_a_test_set_that_keeps_its_labels_to_itself_is_none() -> None:
    saved(NAMES, train=(["a", "b"], [0, 1]), test=(["c", "d"], [-1, -1]))
    data = TextClassificationData("set", validation=0)
    data.setup()
    assert data.test_set is None
    saved(NAMES, train=(["a", "b"], [-1, -1]))
    with pytest.raises(DataError, match=r"no text of set\[train\] has a label"):
        read_labelled("set")


def test_marks_and_line_separators_inside_a_file() -> None:
    Path("train.tsv").write_bytes("\ufeffa\tone\u2028line\r\nb\tnext\x85too\r\n".encode())
    splits, names = read_labelled("train.tsv")
    assert (names, splits["train"][0]) == (["a", "b"], ["one\u2028line", "next\x85too"])


SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 258}


def classifier(**names: int) -> SequenceClassification:
    torch.manual_seed(0)
    numbered = {number: name for name, number in names.items()}
    return SequenceClassification(network=BertForSequenceClassification(BertConfig(**SIZES, id2label=numbered, label2id=names)))


def test_a_model_that_numbers_labels_otherwise_is_refused() -> None:
    Path("train.tsv").write_text("good\tyes\nbad\tno\n" * 8, encoding="utf-8")
    data = TextClassificationData("train.tsv", max_length=8, validation=0)
    with pytest.raises(DataError, match=r"label 'bad' is number 0 of 'train\.tsv', but 1 of Bert"):
        quiet().fit(classifier(Good=0, Bad=1), datamodule=data)
    quiet().fit(classifier(Bad=0, Good=1), datamodule=data)
    Path("numbers.tsv").write_text("0\tyes\n1\tno\n" * 8, encoding="utf-8")
    quiet().fit(classifier(Good=0, Bad=1), datamodule=TextClassificationData("numbers.tsv", max_length=8, validation=0))


def test_every_model_is_padded_as_it_expects_however_often_the_data_were_set_up() -> None:
    Path("train.tsv").write_text("a\tlonger text\nb\tshort\n" * 8, encoding="utf-8")
    data = TextClassificationData("train.tsv", max_length=16, validation=0)
    data.setup()
    decoder = GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=16, vocab_size=258, bos_token_id=None, eos_token_id=None)
    for config, pad in ((decoder, 257), (BertConfig(**SIZES, pad_token_id=7), 7)):
        kind = GPT2ForSequenceClassification if config is decoder else BertForSequenceClassification
        module = SequenceClassification(network=kind(config))
        quiet().fit(module, datamodule=data)
        assert module.network.config.pad_token_id == pad
        batch = next(iter(data.train_dataloader()))
        assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {pad}
