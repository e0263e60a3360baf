"""Text: tokens as their names say, windows that score every token once, sources that say what is wrong with them."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

from sparsetrain.data import TextData, TokenWindows, get_tokenizer, tokens
from sparsetrain.data.sources import CORPORA, cut_tail, read_documents
from sparsetrain.data.tokenized import require_fit
from sparsetrain.data.tokens import END, ByteTokenizer, known_size
from sparsetrain.data.windows import IGNORED
from sparsetrain.errors import DataError
from sparsetrain.tasks import CausalLM

LINES = "".join(f"line {number} of the text, which says {number * number}\n" for number in range(60))


@pytest.fixture(autouse=True)
def _no_shared_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPARSETRAIN_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def folder(path: Path, ending: str = ".txt", **splits: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for split, text in splits.items():
        raw = text.encode("utf-8")
        (path / f"{split}{ending}").write_bytes(lzma.compress(raw) if ending.endswith(".xz") else raw)
    return path


def loaded(*arguments: Any, **options: Any) -> TextData:
    data = TextData(*arguments, **options)
    data.setup()
    return data


def text_of(ids: Tensor) -> str:
    return bytes(ids[ids < 256].tolist()).decode("utf-8", "replace")


# ---------------------------------------------------------------- tokenizers


def test_bytes_are_bytes() -> None:
    tokenizer = get_tokenizer("bytes")
    assert tokenizer.encode(["aé"]) == [[97, 195, 169]]
    assert list(tokenizer.documents(["ab", ""])) == [[97, 98, 256], [256]]
    assert (tokenizer.vocab_size, tokenizer.eos, tokenizer.pad) == (258, 256, 257)
    assert tokenizer.encode(["abcdef"], max_length=2) == [[97, 98]]


@given(st.text(max_size=40))
def test_transformers_reads_saved_bytes_as_the_same_ids(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    place = tmp_path_factory.getbasetemp() / "bytes"
    if not place.exists():
        ByteTokenizer().save(place)
    stock = STOCK.setdefault(place, AutoTokenizer.from_pretrained(place))
    assert stock(text)["input_ids"] == list(text.encode("utf-8"))
    assert stock.decode(list(text.encode("utf-8"))) == text
    assert (stock.eos_token_id, stock.pad_token_id, len(stock)) == (256, 257, 258)


STOCK: dict[Path, Any] = {}


def test_bpe_is_deterministic_exact_and_readable_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_PIECE", 40)
    text = LINES + "\n\n".join(LINES.split("\n")) + " \n = Title = \n \n Text of it \n\n  two spaces\n\tand a tab \n" * 20
    assert len(list(tokens._pieces(text))) > 40
    first, second = (get_tokenizer("bpe:300", [text]) for _ in range(2))
    for name, tokenizer in (("one", first), ("two", second)):
        tokenizer.save(tmp_path / name)
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    stock = AutoTokenizer.from_pretrained(tmp_path / "one")
    [ids] = first.encode([text])
    assert len(text.encode()) > 1.5 * len(ids)
    assert stock.decode(ids) == text
    assert stock(text, verbose=False)["input_ids"] == ids  # whole, where ours was cut into pieces
    assert (stock.eos_token, stock.eos_token_id) == (END, 0)
    assert known_size("bpe:300") == first.vocab_size == len(stock) == 1 + max(stock.get_vocab().values())
    again = get_tokenizer(str(tmp_path / "one"))
    assert (again.encode([text]), again.eos, again.vocab_size) == ([ids], 0, 300)
    assert next(again.documents(["low"]))[-1] == 0


def test_a_tokenizer_that_marks_documents_itself_gets_no_second_mark(tmp_path: Path) -> None:
    get_tokenizer("bpe:260", [LINES]).save(tmp_path / "t")
    content = json.loads((tmp_path / "t/tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
    }
    (tmp_path / "t/tokenizer.json").write_text(json.dumps(content))
    [ids] = get_tokenizer(str(tmp_path / "t")).documents(["of"])
    assert ids[0] == 0
    assert 0 not in ids[1:]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bpe:256", "at least 257 entries"),
        ("bpe:4k", "at least 257 entries"),
        ("bpe:-300", "at least 257 entries"),
        ("bpe:90000", r"entries only; write bpe:\d+ or less"),
        ("no/such/tokenizer", r"cannot be read \(there is no such folder; if a run is to leave it there, do that run first\)"),
        ("./tokenizer", "there is no such folder"),
    ],
)
def test_a_tokenizer_that_cannot_be(name: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        get_tokenizer(name, [LINES])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, name in (("tokenizers", "bpe:300"), ("transformers", "some/name")):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(DataError, match=r"sparsetrain\[text\]"):
            get_tokenizer(name, [LINES])


# ---------------------------------------------------------------- windows


def scored(windows: TokenWindows) -> list[tuple[int, int]]:
    """(position in the stream, tokens of context) of everything that is scored; the stream is 0, 1, 2, ..."""
    found = []
    for index in range(len(windows)):
        ids, labels = windows[index]
        for place in range(1, len(ids)):
            if labels[place] != IGNORED:
                assert labels[place] == ids[place] == ids[0] + place
                found.append((int(labels[place]), place))
    return found


def test_block_windows_by_hand() -> None:
    windows = TokenWindows.cut([torch.arange(10)], window=4)
    ids, labels = windows.__getitems__([0, 1, 2])
    assert ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert labels.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -100, -100]]
    assert (ids.dtype, labels.dtype) == (torch.int64, torch.int64)
    assert windows.__getitems__([2])[0].tolist() == [[8, 9]]  # as wide as the longest
    assert [p for p, _ in scored(windows)] == [1, 2, 3, 5, 6, 7, 9]
    assert windows.predicted == 7


def test_sliding_windows_by_hand() -> None:
    windows = TokenWindows.cut([torch.arange(9)], window=4, stride=3)
    ids, labels = windows.__getitems__(torch.arange(3))
    assert ids.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 0]]
    assert labels.tolist() == [[0, 1, 2, 3], [-100, 4, 5, 6], [-100, 7, 8, -100]]
    assert windows.predicted == 8


@given(st.integers(2, 60), st.integers(2, 12), st.data())
def test_sliding_scores_every_token_but_the_first_once(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    windows = TokenWindows.cut([torch.arange(length)], window, stride)
    found = scored(windows)
    assert [position for position, _ in found] == list(range(1, length))
    assert all(context >= min(position, window - stride) for position, context in found)
    assert windows.predicted == length - 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(2, 9))
def test_blocks_cross_no_border_and_lose_only_first_tokens(lengths: list[int], window: int) -> None:
    streams = [torch.arange(100 * index, 100 * index + length) for index, length in enumerate(lengths)]
    windows = TokenWindows.cut(streams, window)
    found = [position for position, _ in scored(windows)]
    assert found == [int(t) for stream in streams for place, t in enumerate(stream) if place % window]
    assert windows.predicted == len(found)
    whole = TokenWindows.cut(streams, window, whole=True)
    assert len(whole) == sum(length // window for length in lengths)
    assert not len(whole) or {len(whole[index][0]) for index in range(len(whole))} == {window}


@pytest.mark.parametrize(("window", "stride"), [(1, None), (4, 0), (4, 5)])
def test_windows_that_cannot_be(window: int, stride: int | None) -> None:
    with pytest.raises(DataError, match=f"window={window}, stride={stride}"):
        TokenWindows.cut([torch.arange(10)], window, stride)
    with pytest.raises(DataError, match="no stream"):
        TokenWindows.cut([], 4)


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("name", CORPORA)
def test_an_embedded_corpus_is_there_with_its_licence(name: str) -> None:
    found = read_documents(name)
    sizes = {split: sum(map(len, documents)) for split, documents in found.items()}
    assert list(sizes) == ["train", "valid", "test"]
    assert 200_000 < sizes["train"] < 350_000
    assert min(sizes["valid"], sizes["test"]) > 10_000
    assert (len(found["train"]) > 5) == (name != "shakespeare")
    assert not set(found["train"]) & {*found["valid"], *found["test"]}
    place = Path(__import__("sparsetrain").__file__).parent / "data/corpora" / name
    assert "icen" in (place / "LICENSE.txt").read_text(encoding="utf-8")
    assert sum(file.stat().st_size for file in place.glob("*.xz")) < 120_000


@pytest.mark.parametrize("ending", [".txt", ".txt.xz"])
def test_a_folder_with_its_own_splits(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "lm/mine", ending, train=f"one\n{END}\ntwo\n", valid="three\n", test="four\n")
    want = {"train": ["one\n", "two\n"], "valid": ["three\n"], "test": ["four\n"]}
    assert read_documents("lm/mine") == want
    monkeypatch.setenv("SPARSETRAIN_DATA", str(tmp_path))
    monkeypatch.chdir("/")
    assert read_documents("mine") == read_documents("lm/mine") == want
    data = loaded("mine", window=2)
    # A document ends with 256: "one\n" and "two\n" are 5 tokens each, 5 windows of 2.
    assert len(data.train_set) == 5
    assert data.train_set.tokens.tolist() == [*b"one\n", 256, *b"two\n", 256]


def test_other_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x y", "id": "1"}\n\n{"text": "z", "id": "2"}\n')
    assert read_documents("a.jsonl") == {"train": ["x y", "z"]}
    (tmp_path / "b.jsonl").write_text('{"body": "x", "n": 1}\n')
    assert read_documents(str(tmp_path / "b.jsonl")) == {"train": ["x"]}
    # What JSON leaves as it is inside a string, and other programs put at the start of a file.
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "x\u2028y"}, ensure_ascii=False) + "\r\n", encoding="utf-8-sig")
    assert read_documents("c.jsonl") == {"train": ["x\u2028y"]}
    (tmp_path / "d.txt").write_text("x", encoding="utf-8-sig")
    assert read_documents("d.txt") == {"train": ["x"]}
    rows = datasets.Dataset.from_dict({"n": [1, 2], "text": ["first", "second"]})
    datasets.DatasetDict({"train": rows, "validation": rows.select([1])}).save_to_disk(tmp_path / "set")
    assert read_documents("set") == {"train": ["first", "second"], "valid": ["second"]}


def write(path: Path, content: bytes | str) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "latin1": (lambda: write(Path("a.txt"), "caf\xe9 \n".encode("latin1")), "not UTF-8: byte 0xe9 at 3"),
    "empty": (lambda: write(Path("a.txt"), " \n"), "a.txt is empty"),
    "truncated": (lambda: write(Path("a.txt.xz"), lzma.compress(LINES.encode())[:-9]), "truncated"),
    "no json": (lambda: write(Path("a.jsonl"), '{"text": "x"}\nhello\n'), "line 2 is no JSON"),
    "no object": (lambda: write(Path("a.jsonl"), "[1]\n"), "line 1 is a list"),
    "two texts": (lambda: write(Path("a.jsonl"), '{"a": "x", "b": "y"}\n'), r"columns \['a', 'b'\]"),
    "no train": (lambda: folder(Path("a"), test="x\n"), r"test.txt, but no train.txt"),
    "two trains": (lambda: (folder(Path("a"), train="x"), write(Path("a/train.jsonl"), "{}")), "more than one train"),
    "other ending": (lambda: write(Path("a.csv"), "x"), "none of .txt, .txt.xz"),
    "missing": (lambda: None, "is not there"),
    "nothing in it": (lambda: Path("a").mkdir(), "no train text file"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_source_says_what_and_where(kind: str) -> None:
    make, says = BROKEN[kind]
    make()
    [path] = [*Path().glob("a*")] or [Path("./a.txt")]
    with pytest.raises(DataError, match=says):
        loaded(f"./{path}", window=2)


def test_an_unknown_corpus_gets_the_nearest_name() -> None:
    with pytest.raises(DataError, match="Did you mean 'shakespeare'"):
        loaded("shakespear")


def test_a_data_set_of_several_is_named_with_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, configuration: str | None = None) -> Any:
        if configuration is None:
            raise ValueError("Config name is missing. Please pick one among: ['raw', 'small']")
        return datasets.Dataset.from_dict({"text": [f"{configuration} {name}"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_documents("owner/wiki:raw") == {"train": ["raw owner/wiki"]}
    with pytest.raises(DataError, match=r"\['raw', 'small'\].* Name one of them: owner/wiki:CONFIGURATION"):
        read_documents("owner/wiki")
    for nothing in ("", " "):
        with pytest.raises(DataError, match="is empty"):
            read_documents(nothing)


def test_what_is_cut_off_is_the_end_at_a_line_break() -> None:
    head, tail = cut_tail([LINES[:700], LINES[700:]], 0.25)
    assert "".join(head + tail) == LINES
    assert "".join(head).endswith("\n")
    assert 0.2 < len("".join(tail)) / len(LINES) < 0.25
    # Where no line ends any more: between two documents, else there and then, rather than nothing.
    assert cut_tail(["ab", "cdef", "gh"], 0.5) == (["ab", "cdef"], ["gh"])
    assert cut_tail(["ab cd ef"], 0.25) == (["ab cd "], ["ef"])
    Path("a.txt").write_text("word " * 100)
    assert [len(data) for data in (loaded("a.txt", window=8, held_out=0.1).val_set, loaded("a.txt", window=8).test_set)] == [
        7,
        4,
    ]


# ---------------------------------------------------------------- the data module


def test_a_single_file_gives_its_end_for_validation_and_test() -> None:
    Path("a.txt").write_text(LINES)
    data = loaded("a.txt", window=32, held_out=0.2)
    sets = [data.train_set, data.val_set, data.test_set]
    text = [text_of(windows.tokens) for windows in sets]
    assert "".join(text) == LINES
    assert [round(len(part) / len(LINES), 1) for part in text] == [0.6, 0.2, 0.2]
    alone = loaded("a.txt", window=32, held_out=0)
    assert (alone.val_set, alone.test_set) == (None, None)
    assert (alone.val_dataloader(), alone.test_dataloader()) == ([], [])


def test_batches_are_windows_of_the_text_in_an_order_of_the_seed() -> None:
    def epoch(seed: int) -> list[str]:
        data = loaded("law", window=16, batch_size=4, limit=10, seed=seed)
        return [text_of(row) for ids, labels in data.train_dataloader() for row in ids if torch.equal(ids, labels)]

    first, again, other = epoch(0), epoch(0), epoch(1)
    assert first == again != other
    start = read_documents("law")["train"][0].encode()[:160]
    assert sorted(first) == sorted(other) == sorted(start[at : at + 16].decode("utf-8", "replace") for at in range(0, 160, 16))


def test_stride_is_for_the_test_text_alone() -> None:
    block, sliding = (loaded("math", window=64, stride=stride, limit=5) for stride in (None, 16))
    assert block.val_set.predicted == sliding.val_set.predicted == 5 * 63
    assert sliding.test_set.predicted == 63 + 4 * 16


def test_shares_are_shares_of_the_training_windows() -> None:
    data = loaded({"law": 3, "python": 1}, window=64)
    starts = data.train_set.starts
    law = len(data._streams[0])
    # law runs out first: all its windows are 3 of 4.
    assert int((starts < law).sum()) == law // 64
    assert int((starts >= law).sum()) == law // 64 // 3
    assert len(set(starts.tolist())) == len(starts)
    few = loaded({"law": 3, "python": 1}, window=64, limit=40)
    assert [int((few.train_set.starts < law).sum()), len(few.train_set)] == [30, 40]
    both = loaded(["law", "python"], window=64)
    assert len(both.train_set) == sum(len(stream) // 64 for stream in both._streams)


def test_calibration_windows_are_random_training_text() -> None:
    data = TextData("shakespeare", window=64)
    ids = data.calibration(12, window=20, seed=5)
    assert (ids.shape, ids.dtype) == ((12, 20), torch.int64)
    train = read_documents("shakespeare")["train"][0]
    assert all(text_of(row) in train for row in ids)
    assert len({text_of(row) for row in ids}) == 12
    assert torch.equal(ids, data.calibration(12, window=20, seed=5))
    assert not torch.equal(ids, data.calibration(12, window=20, seed=6))
    assert data.calibration(2).shape == (2, 64)
    law = END.join(read_documents("law")["train"])
    mixed = loaded({"law": 9, "python": 1}, window=64).calibration(200, window=32)
    assert 5 <= sum(text_of(row).strip("\ufffd") not in law for row in mixed if 256 not in row) <= 40
    for n, window in ((0, 8), (3, 1), (3, 10**7)):
        with pytest.raises(DataError, match=f"n={n}, window={window}"):
            data.calibration(n, window)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": 1}, "window=1"),
        ({"stride": 256}, "stride=256"),
        ({"stride": 0}, "stride=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"held_out": math.nan}, "held_out=nan"),
        ({"held_out": 0.5}, "held_out=0.5"),
        ({"limit": math.nan}, "limit=nan"),
        ({"limit": 0}, "limit=0"),
        ({"source": []}, "names nothing"),
        ({"source": ["law", "law"]}, "something twice"),
        ({"source": {"law": math.nan}}, "shares must be positive"),
        ({"source": {"law": 0}}, "shares must be positive"),
        ({"tokenizer": "bpe:7"}, "at least 257"),
    ],
)
def test_impossible_settings_fail_at_construction(options: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        TextData(**options)


def test_too_little_text() -> None:
    Path("a.txt").write_text("short\n")
    with pytest.raises(DataError, match=r"'a.txt' has 7 tokens, fewer than one window of 64"):
        loaded("a.txt", window=64, held_out=0)
    Path("b.txt").write_text(LINES)
    with pytest.raises(DataError, match="leave a source without any"):
        loaded({"b.txt": 1, "law": 10000}, window=64)
    with pytest.raises(DataError, match="call setup"):
        TextData().train_dataloader()


def tiny(vocabulary: int, positions: int = 64) -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=positions, **sizes))


class Wrapped(CausalLM):
    """Somebody's own module, with the model deeper inside."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network=nn.Sequential(network))


@pytest.mark.parametrize(
    ("vocabulary", "positions", "says"),
    [(257, 64, "258 entries, the embedding of LlamaForCausalLM 257"), (300, 31, "window of 32 tokens is longer than the 31")],
)
def test_text_and_model_that_do_not_fit_meet_before_training(vocabulary: int, positions: int, says: str) -> None:
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for module in (CausalLM(network=tiny(vocabulary, positions)), Wrapped(tiny(vocabulary, positions))):
        before = {name: value.clone() for name, value in module.state_dict().items()}
        with pytest.raises(DataError, match=says):
            trainer.fit(module, datamodule=TextData("law", window=32, limit=4))
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


def test_positions_that_a_model_does_not_use_do_not_count() -> None:
    """RoBERTa's first position is the one after its padding index."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 258}
    for make, longest in ((BertModel(BertConfig(**sizes, max_position_embeddings=20)), 20), (roberta(sizes), 17)):
        require_fit(make, 258, longest)
        make(torch.full((1, longest), 9))
        with pytest.raises(DataError, match=f"window of {longest + 1} tokens .* at most {longest}"):
            require_fit(make, 258, longest + 1)
        with pytest.raises((IndexError, RuntimeError)):  # what training would have said
            make(torch.full((1, longest + 1), 9))


def roberta(sizes: dict[str, int]) -> RobertaModel:
    return RobertaModel(RobertaConfig(**sizes, max_position_embeddings=20, pad_token_id=2))


def test_the_size_of_the_vocabulary_is_known_before_anything_is_read(tmp_path: Path) -> None:
    assert TextData("not/there", tokenizer="bytes").vocab_size == 258
    assert TextData("not/there", tokenizer="bpe:777").vocab_size == 777
    get_tokenizer("bpe:280", [LINES]).save(tmp_path / "t")
    assert TextData("not/there", tokenizer=str(tmp_path / "t")).vocab_size == 280
