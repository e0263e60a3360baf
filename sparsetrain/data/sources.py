"""Where text comes from: the embedded corpora, local files and folders, Hugging Face data sets.

Where a name is looked for, in this order:

1. an embedded corpus: ``shakespeare``, ``math`` (GSM8K), ``python`` (standard library), ``law`` (D.C. Code), about 0.3 MB each;
   sources and licences are beside them in ``sparsetrain/data/corpora``;
2. ``$SPARSETRAIN_DATA/lm/NAME`` (``cls/NAME`` for labelled text), ``$SPARSETRAIN_DATA/NAME``, the name as a path. A file is the
   training text. A folder holds ``train``, ``valid`` and ``test`` files, or what ``datasets`` has saved;
3. a Hugging Face data set of that name; ``NAME:CONFIGURATION`` where it has several (``wikitext:wikitext-2-raw-v1``).

Files are UTF-8: ``.txt``, ``.jsonl`` and ``.tsv``, plain or ``.xz``. In a ``.txt`` file a line ``<|endoftext|>`` stands between
two documents. In a ``.jsonl`` file a line is a document, and so is a row of a data set; the text is in the column "text", or
in the only one that holds text.
"""

from __future__ import annotations

import json
import lzma
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsetrain.data.tokens import END
from sparsetrain.data.vision import FOLDER_VARIABLE
from sparsetrain.errors import DataError, nearest

CORPORA = ("law", "math", "python", "shakespeare")
_SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
_FOLDER = Path(__file__).parent / "corpora"


def read_documents(name: str) -> dict[str, list[str]]:
    """Return the documents of each split ("train" always, "valid" and "test" where there are) of a source.

    Raises `DataError` for what is not there, empty, not UTF-8, or without training text.

    Example: ``read_documents("shakespeare")["test"]``.
    """
    path = _FOLDER / name if name in CORPORA else _find(name, "lm")
    files = None if path is None else _files(path, (".txt", ".jsonl"))
    if files:
        return {split: _documents(file) for split, file in files.items()}
    return {split: _column(f"{name}[{split}]", data) for split, data in load_hub(name, path).items()}


def read_labelled(name: str) -> tuple[dict[str, tuple[list[str], list[str]]], list[str]]:
    """Return the texts and label names of each split of a source, and all labels in the order of their numbers.

    A source is ``.tsv`` files of ``label<TAB>text`` lines, or a data set. Where a data set numbers its labels, these are the
    numbers; labels that are numbers are sorted as such, names by letter. Of a data set, texts without a label (None, -1) are
    left out. Raises `DataError` as `read_documents` does, and for a line without a label.

    Example: ``splits, names = read_labelled("banking77")``, ``texts, labels = splits["train"]``.
    """
    path = _find(name, "cls")
    files = None if path is None else _files(path, (".tsv",))
    order: list[str] = []
    found = {split: _rows(file) for split, file in (files or {}).items()}
    if not found:
        for split, data in load_hub(name, path).items():
            pairs, names = _labelled(f"{name}[{split}]", data)
            order = order or names
            if pairs:
                found[split] = ([text for text, _ in pairs], [label for _, label in pairs])
        if "train" not in found:
            raise DataError(f"no text of {name}[train] has a label; take another source")
    numbers = all(re.fullmatch(r"-?\d+", label) for label in found["train"][1])
    return found, order or sorted(set(found["train"][1]), key=int if numbers else None)


def _labelled(where: str, data: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """Texts with their labels, and the names of the labels in the order of their numbers, where they have some."""
    column = next((key for key in ("label", "labels", "intent", "category") if key in data.column_names), None)
    if column is None:
        raise DataError(f"{where} has no label column; its columns are {data.column_names}. Name one of them 'label'")
    names = list(getattr(data.features[column], "names", None) or ())
    texts = data[_text_column(where, _texts(data.remove_columns(column)))]
    # A test set that keeps its labels to itself says -1.
    known = [
        (str(text), label) for text, label in zip(texts, data[column], strict=True) if text and label not in (None, -1, "")
    ]
    return [(text, names[label] if names else str(label)) for text, label in known], names


def cut_tail(documents: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Cut the last ``share`` of the characters off, at the next line break if there is one: what stays, what was cut off.

    Example: ``cut_tail(["a\\nb\\nc\\nd\\n"], 0.25)`` gives ``(["a\\nb\\nc\\n"], ["d\\n"])``.
    """
    left = round((1 - share) * sum(map(len, documents)))
    for index, document in enumerate(documents):
        if left < len(document):
            # The last line of all may have no end.
            end = document.find("\n", max(left - 1, 0)) + 1 or (len(document) if documents[index + 1 :] else left)
            parts = [*documents[:index], document[:end]], [document[end:], *documents[index + 1 :]]
            return [text for text in parts[0] if text], [text for text in parts[1] if text]
        left -= len(document)
    return list(documents), []


def _find(name: str, kind: str) -> Path | None:
    """The file or folder of this name, None for what may be on the hub; raises for a path that is not there."""
    if not name.strip():
        raise DataError(f"the name of a text is empty ({name!r}); give a file, a folder or a data set")
    shared = os.environ.get(FOLDER_VARIABLE)
    places = ([Path(shared) / kind / name, Path(shared) / name] if shared else []) + [Path(name).expanduser()]
    for place in places:
        if place.exists():
            return place
    known = CORPORA if kind == "lm" else ()
    if name.startswith((".", "~", os.sep)) or re.search(r"\.(txt|jsonl|tsv|xz|csv|gz)$", name) or nearest(name, known):
        embedded = f" Embedded are {', '.join(known)}." if known else ""
        raise DataError(
            f"the text {name!r} is not there; looked in {', '.join(str(place.absolute()) for place in places)}."
            f"{nearest(name, known)}{embedded} Folders in {FOLDER_VARIABLE}/{kind} are found by their names"
        )
    return None


def _files(path: Path, kinds: tuple[str, ...]) -> dict[str, Path]:
    """The file of each split; none for a folder that ``datasets`` reads."""
    endings = tuple(f"{kind}{packed}" for kind in kinds for packed in ("", ".xz"))
    if path.is_file():
        if not path.name.endswith(endings):
            raise DataError(f"{path} is none of {', '.join(endings)}; rename or convert it")
        return {"train": path}
    found: dict[str, Path] = {}
    for split, stems in _SPLITS.items():
        files = [path / f"{stem}{ending}" for stem in stems for ending in endings]
        present = [file for file in files if file.is_file()]
        if len(present) > 1:
            raise DataError(f"{path} has more than one {split} text: {', '.join(f.name for f in present)}; keep one")
        if present:
            found[split] = present[0]
    if found and "train" not in found:
        raise DataError(f"{path} has {', '.join(f.name for f in found.values())}, but no train{endings[0]}; add it")
    return found


def _text(path: Path) -> str:
    try:
        raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        text = raw.decode("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at {error.start}; convert it (iconv -f latin1 -t utf-8)"
        ) from error
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path} cannot be read: it is truncated or of another kind ({error})") from error
    if not text.strip():
        raise DataError(f"{path} is empty; give it text or leave it out")
    return text


def _lines(text: str) -> list[str]:
    """At line breaks alone: ``str.splitlines`` also cuts at characters that stand inside texts, such as U+2028."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _documents(path: Path) -> list[str]:
    text = _text(path)
    if ".jsonl" not in path.suffixes[-2:]:
        found = re.split(rf"(?m)^{re.escape(END)}\n?", text)
    else:
        rows = []
        for number, line in enumerate(_lines(text), 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is no JSON ({error.msg}); a line is one object") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} is a {type(row).__name__}, not an object like {{'text': '...'}}")
            rows.append(row)
        held = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, str))
        column = _text_column(str(path), list(held))
        found = [row[column] for row in rows if isinstance(row.get(column), str)]
    return [document for document in found if document.strip()]


def _text_column(where: str, columns: Sequence[str]) -> str:
    if "text" in columns or len(columns) == 1:
        return "text" if "text" in columns else columns[0]
    raise DataError(f"{where} has the text columns {list(columns)}, which leaves open what to read; name one of them 'text'")


def _rows(path: Path) -> tuple[list[str], list[str]]:
    texts, labels = [], []
    for number, line in enumerate(_lines(_text(path)), 1):
        label, tab, text = line.partition("\t")
        if not (tab and label.strip() and text.strip()):
            raise DataError(f"{path}, line {number} is not label<TAB>text: {line[:60]!r}; give every text a label")
        texts.append(text)
        labels.append(label)
    return texts, labels


def _column(where: str, data: Any) -> list[str]:
    """The text column of a ``datasets.Dataset``."""
    documents = [str(text) for text in data[_text_column(where, _texts(data))] if text]
    if not documents:
        raise DataError(f"{where} is empty; give it text or leave it out")
    return documents


def _texts(data: Any) -> list[str]:
    kinds = {key: getattr(feature, "dtype", None) for key, feature in data.features.items()}
    return [key for key, kind in kinds.items() if kind in ("string", "large_string")]


def load_hub(name: str, folder: Path | None) -> dict[str, Any]:
    """Return the splits of a data set that ``datasets`` reads, under the names "train", "valid" and "test".

    Raises `DataError` where it cannot be had, or has no training split. Example: ``load_hub("imdb", None)["train"]``.
    """
    try:
        import datasets  # a second of import time that the other sources should not pay
    except ImportError as error:
        raise DataError(
            f"{name!r} is read by the package datasets, which is missing: pip install 'sparsetrain[hub]'. Without it there are "
            f"{', '.join(CORPORA)}, and local text files"
        ) from error
    try:
        if folder is not None and any((folder / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(*name.split(":", 1)) if folder is None else datasets.load_dataset(str(folder))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        place = f"the folder {folder}, which has no train text file," if folder else f"{name!r}, which is no file here,"
        hint = f" Name one of them: {name}:CONFIGURATION." * ("Config name" in str(error))
        raise DataError(
            f"{place} cannot be read as a data set either: {' '.join(str(error).split())}.{hint} "
            f"Embedded are {', '.join(CORPORA)}"
        ) from error
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    if "train" not in splits:
        raise DataError(f"the data set {name!r} has the splits {sorted(splits)}, but no 'train'")
    present = {split: [key for key in names if key in splits] for split, names in _SPLITS.items()}
    return {split: splits[keys[0]] for split, keys in present.items() if keys}
