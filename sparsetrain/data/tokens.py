"""Tokenizers by name: bytes, a byte-pair encoding trained on the spot, or any that transformers can load.

* ``"bytes"``: ids 0 to 255 are the bytes of UTF-8, 256 ends a document, 257 pads. Needs no package.
* ``"bpe:4096"``: byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; Radford et al. 2019) with exactly so many entries:
  the end mark (id 0), the 256 bytes, and merges learned from the training text. The same text gives the same merges.
* anything else: a folder with a tokenizer (also by its name in ``$SPARSETRAIN_DATA/models``), or a name on the Hugging Face
  hub, through ``AutoTokenizer``.

A folder written by ``save`` is read by ``AutoTokenizer`` too, with the same ids.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from sparsetrain.data.vision import FOLDER_VARIABLE
from sparsetrain.errors import DataError

#: The line that ends a document inside a text file, and the token it becomes.
END = "<|endoftext|>"
_BYTES = 256
_PIECE = 1 << 16
_PACKAGE = "package:"
_KINDS = "'bytes', 'bpe:4096', a folder with a tokenizer, or a name on the Hugging Face hub"


class Tokenizer(ABC):
    """Text to ids. ``vocab_size``: one more than the largest id; ``eos``: ends a document, or None; ``pad``: fills batches."""

    vocab_size: int
    eos: int | None
    pad: int

    @abstractmethod
    def encode(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Return the ids of each text with the special tokens this tokenizer itself puts around it; cut to ``max_length``."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a folder that ``AutoTokenizer.from_pretrained`` and this module read."""

    def documents(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yield the ids of each document, ended by ``eos`` unless the tokenizer itself marks documents (Llama's: BOS first).

        Example: ``list(ByteTokenizer().documents(["ab"]))`` gives ``[[97, 98, 256]]``.
        """
        marks = self.encode([""])[0]
        end = [] if self.eos is None or marks else [self.eos]
        for ids in self.encode(texts):
            yield ids + end


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8 as ids 0 to 255; 256 ends a document, 257 pads.

    Example: ``ByteTokenizer().encode(["é"])`` gives ``[[195, 169]]``.
    """

    def __init__(self) -> None:
        self.vocab_size, self.eos, self.pad = _BYTES + 2, _BYTES, _BYTES + 1

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Return the bytes of each text."""
        return [list(text.encode("utf-8")[:max_length]) for text in texts]

    def save(self, folder: Path) -> None:
        """Write it as a byte-level BPE without merges."""
        letters = _letters()
        added = [_special(self.vocab_size - 2, END), _special(self.vocab_size - 1, "<|pad|>")]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": level,
            "post_processor": None,
            "decoder": level,
            "model": {"type": "BPE", "vocab": {letters[byte]: byte for byte in range(_BYTES)}, "merges": []},
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        _write_config(folder, {"pad_token": "<|pad|>"})


class BPETokenizer(Tokenizer):
    """Byte-level BPE of exactly ``vocab_size`` entries, trained on ``texts``; needs the package tokenizers.

    Raises `DataError` where the texts have too few distinct pairs for so many entries, or the package is missing.

    Example: ``BPETokenizer(["low lower lowest"] * 9, 262).encode(["low"])``.
    """

    def __init__(self, texts: Sequence[str], vocab_size: int) -> None:
        tokenizers = _tokenizers(f"bpe:{vocab_size}")
        self._inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        self._inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        self._inner.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
        if (size := self._inner.get_vocab_size()) != vocab_size:
            raise DataError(
                f"tokenizer 'bpe:{vocab_size}': the training text has pairs for {size} entries only; write bpe:{size} or less, "
                "or give more text"
            )
        self.vocab_size, self.eos, self.pad = vocab_size, 0, 0

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Return the ids of each text."""
        found = []
        for text in texts:
            ids: list[int] = []
            pieces = _pieces(text)
            # A few at a time: what the package remembers of a token is 30 times its id.
            while batch := list(islice(pieces, 16)):
                for encoding in self._inner.encode_batch(batch, add_special_tokens=False):
                    ids += encoding.ids
            found.append(ids[:max_length])
        return found

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and its configuration."""
        folder.mkdir(parents=True, exist_ok=True)
        self._inner.save(str(folder / "tokenizer.json"))
        _write_config(folder, {})


class PretrainedTokenizer(Tokenizer):
    """A tokenizer of transformers, from a folder or the hub.

    Raises `DataError` where there is none, or transformers is missing.

    Example: ``PretrainedTokenizer("runs/reference/tokenizer").vocab_size``.
    """

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer  # seconds of import time that the other tokenizers should not pay
        except ImportError as error:
            raise DataError(
                f"tokenizer {name!r} is read by the package transformers, which is missing: pip install 'sparsetrain[text]'. "
                "Without it there is 'bytes'"
            ) from error
        try:
            place = find_model(name)
            if _is_path(place) and not Path(place).exists():
                raise DataError("there is no such folder; if a run is to leave it there, do that run first")
            self.inner: Any = AutoTokenizer.from_pretrained(place)
        except Exception as error:  # whatever a broken file makes the package raise
            first = str(error).strip().splitlines()[:1]
            raise DataError(f"tokenizer {name!r} cannot be read ({' '.join(first)}); known are {_KINDS}") from error
        self.vocab_size = 1 + max(self.inner.get_vocab().values(), default=0)
        self.eos = self.inner.eos_token_id
        pads = (self.inner.pad_token_id, self.eos, 0)
        self.pad = next(pad for pad in pads if pad is not None)

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Return the ids of each text, with what the tokenizer puts around it."""
        if not texts:
            return []
        options = {"truncation": max_length is not None, "max_length": max_length}
        found: list[list[int]] = self.inner(list(texts), **options, verbose=False)["input_ids"]
        return found

    def save(self, folder: Path) -> None:
        """Write it as transformers does."""
        self.inner.save_pretrained(str(folder))


def find_model(name: str) -> str:
    """A model by name: where its folder or file is, or the name itself, which is then a path or a name on the hub.

    ``package:NAME/folder`` is a folder inside an installed Python package; anything else is looked for as
    ``$SPARSETRAIN_DATA/models/NAME``. Raises `DataError` where there is no such package, or no such folder in it.

    Example: ``AutoConfig.from_pretrained(find_model("stories260K"))``.
    """
    if name.startswith(_PACKAGE):
        package, _, rest = name.removeprefix(_PACKAGE).partition("/")
        spec = find_spec(package) if package.isidentifier() else None  # does not import it
        places = [Path(place, rest) for place in (spec.submodule_search_locations or ())] if spec else []
        found = next((place for place in places if place.exists()), None)
        if found is None:
            problem = f"it has no {rest!r}" if spec else f"install it: pip install {package.replace('_', '-')}"
            raise DataError(f"model {name!r} is to come with the Python package {package!r}: {problem}")
        return str(found)
    shared = os.environ.get(FOLDER_VARIABLE)
    place = Path(shared, "models", name) if shared else None
    return name if place is None or not place.exists() else str(place)


def _is_path(name: str) -> bool:
    """Whether a name can be no name on the hub, which has one slash at most: ``owner/name``."""
    return name.count("/") > 1 or name.startswith(("/", ".", "~")) or "\\" in name


def known_size(name: str) -> int | None:
    """The vocabulary of a tokenizer as its name tells it, None for one that must be loaded first.

    Raises `DataError` for a name that is no tokenizer's. Example: ``known_size("bpe:4096")`` gives ``4096``.
    """
    if name == "bytes":
        return ByteTokenizer().vocab_size
    if not name.startswith("bpe:"):
        return None
    least = _BYTES + 1
    size = int(name[4:]) if re.fullmatch(r"[0-9]{1,9}", name[4:]) else 0
    if size < least:
        raise DataError(f"tokenizer {name!r}: a vocabulary has at least {least} entries (256 bytes and the end mark); bpe:4096")
    return size


def get_tokenizer(name: str, texts: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of this name; ``texts`` are what a ``bpe:`` one is trained on. Raises `DataError`.

    Example: ``get_tokenizer("bytes").vocab_size`` gives ``258``.
    """
    size = known_size(name)
    if name == "bytes":
        return ByteTokenizer()
    return PretrainedTokenizer(name) if size is None else BPETokenizer(texts, size)


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text where byte-level BPE never merges, so that it is never all in work at once.

    After a line break between two characters that are not space, or before the one space that starts a line: there its
    regular expression begins a new word anyway (Radford et al. 2019).
    """
    start = 0
    for match in re.finditer(r"(?<=\S\n)(?=\S)|(?<=\n)(?= \S)", text):
        if match.start() - start >= _PIECE:
            yield text[start : match.start()]
            start = match.start()
    yield text[start:]


def _tokenizers(name: str) -> Any:
    try:
        import tokenizers  # only whoever trains one needs it
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise DataError(
            f"tokenizer {name!r} is trained by the package tokenizers, which is missing: pip install 'sparsetrain[text]'. "
            "Without it there is 'bytes'"
        ) from error
    return tokenizers


def _letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level tokenizer.json (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 2 * _BYTES))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(_BYTES)]


def _special(index: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, "special": True} | flags


def _write_config(folder: Path, more: dict[str, str]) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False} | more
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
