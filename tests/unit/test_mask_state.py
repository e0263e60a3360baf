"""Masks at rest: bits by plain arithmetic, both forms there and back, and every kind of damage refused."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsetrain.errors import MaskStateError
from sparsetrain.masks import MaskManager, load_masks, read_masks, save_masks
from sparsetrain.masks.state import SavedMask, check_names, from_state, pack_bits, to_state, unpack_bits
from sparsetrain.pruning import prune

quick = settings(max_examples=150, deadline=None)
shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def saved(mask: Tensor, pattern: str = "unstructured") -> SavedMask:
    dead = Fraction(int((~mask).sum()), mask.numel())
    return SavedMask(tuple(mask.shape), pattern, dead, int(mask.sum()), pack_bits(mask))


MASK = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
STATE = {"fc1.weight": saved(MASK), "fc2.weight": saved(MASK.t().contiguous(), "2:4")}


def same(left: dict[str, SavedMask], right: dict[str, SavedMask]) -> bool:
    bits = all(torch.equal(left[name].bits, right[name].bits) for name in left)
    empty = torch.empty(0)
    rest = [{name: dataclasses.replace(mask, bits=empty).__repr__() for name, mask in side.items()} for side in (left, right)]
    return left.keys() == right.keys() and bits and rest[0] == rest[1]


@quick
@given(shapes, st.integers(0, 10**6), st.booleans())
def test_one_bit_a_weight_there_and_back(shape: tuple[int, ...], seed: int, transposed: bool) -> None:
    mask = draw(shape, seed)
    mask = mask.transpose(0, -1) if transposed else mask
    bits = pack_bits(mask)
    flat = mask.flatten().tolist()
    assert bits.dtype == torch.uint8
    assert bits.tolist() == [sum(b << i for i, b in enumerate(flat[at : at + 8])) for at in range(0, len(flat), 8)]
    assert torch.equal(unpack_bits(bits, tuple(mask.shape)), mask)
    assert torch.equal(saved(mask).unpack("w"), mask)


def test_ten_weights_take_two_bytes() -> None:
    assert pack_bits(MASK).tolist() == [0b11001101, 0b10]


@quick
@given(st.dictionaries(st.text("abc._", min_size=1), st.tuples(shapes, st.integers(0, 99)), min_size=1, max_size=4))
def test_both_forms_there_and_back(tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, Any]) -> None:
    masks = {name: saved(draw(shape, seed)) for name, (shape, seed) in drawn.items()}
    assert same(from_state(to_state(masks)), masks)
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    save_masks(path, masks)
    assert same(read_masks(path), masks)
    loaded = load_masks(path)
    assert all(torch.equal(loaded[name], draw(shape, seed)) for name, (shape, seed) in drawn.items())


def test_the_checkpoint_form_loads_with_weights_only(tmp_path: Path) -> None:
    torch.save(to_state(STATE), tmp_path / "state.pt")
    assert same(from_state(torch.load(tmp_path / "state.pt", weights_only=True)), STATE)


def test_any_program_reads_the_side_file(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(path, STATE)
    assert safetensors.torch.load_file(path)["fc1.weight"].tolist() == [0b11001101, 0b10]
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["sparsetrain"])
    crc = about["masks"]["fc2.weight"].pop("crc")
    assert crc == zlib.crc32(bytes(safetensors.torch.load_file(path)["fc2.weight"].tolist()))
    assert about["masks"]["fc2.weight"] == {"shape": [5, 2], "pattern": "2:4", "sparsity": "2/5", "alive": 6}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda m: dataclasses.replace(m, bits=m.bits ^ torch.tensor([1, 0], dtype=torch.uint8)),
            r"damaged: its bits \(5 weights alive\).*\(6 alive",
        ),
        (lambda m: dataclasses.replace(m, bits=m.bits[:1]), "truncated: 1 bytes .*2 expected"),
        (lambda m: dataclasses.replace(m, bits=torch.cat([m.bits, m.bits])), "truncated: 4 bytes"),
        (lambda m: dataclasses.replace(m, bits=m.bits.float()), "truncated"),
        (lambda m: dataclasses.replace(m, alive=7), r"damaged: its bits \(6 weights alive\).*\(7 alive"),
        (lambda m: dataclasses.replace(m, shape=(5, 5)), "truncated: 2 bytes .*4 expected"),
    ],
)
def test_damaged_bits_are_refused_by_name(damage: Callable[[SavedMask], SavedMask], says: str, tmp_path: Path) -> None:
    broken = damage(saved(MASK))
    with pytest.raises(MaskStateError, match=f"mask of 'fc1.weight' is {says}.*another copy"):
        broken.unpack("fc1.weight")
    save_masks(tmp_path / "masks.safetensors", {"fc1.weight": broken})
    with pytest.raises(MaskStateError, match=r"fc1\.weight"):
        load_masks(tmp_path / "masks.safetensors")


def test_every_single_flipped_bit_is_noticed() -> None:
    clean = saved(MASK)
    for at in range(MASK.numel()):
        bits = clean.bits.clone()
        bits[at // 8] ^= 1 << at % 8
        with pytest.raises(MaskStateError, match="damaged"):
            dataclasses.replace(clean, bits=bits).unpack("w")
    assert torch.equal(clean.unpack("w"), MASK)


def entry(**changed: Any) -> dict[str, Any]:
    state = to_state({"fc1.weight": saved(MASK)})
    state["tensors"]["fc1.weight"] |= changed
    return state


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (None, ["the file", "no sparsetrain masks", "MaskManager.adopt"]),
        ({"kind": "other"}, ["no sparsetrain masks"]),
        (to_state(STATE) | {"version": 99}, ["version 99", "version 1"]),
        (entry(shape=None), ["'fc1.weight'", "malformed"]),
        (entry(alive="many"), ["'fc1.weight'", "malformed"]),
        (entry(sparsity=[1, 0]), ["'fc1.weight'", "malformed"]),
        ({"kind": "sparsetrain.masks", "version": 1, "tensors": {"fc1.weight": {}}}, ["'fc1.weight'", "incomplete"]),
        (entry(bits=None), ["'fc1.weight'", "malformed"]),
        (entry(bits=[1, 2]), ["'fc1.weight'", "malformed"]),
    ],
)
def test_foreign_and_malformed_state_is_refused(state: Any, says: list[str]) -> None:
    with pytest.raises(MaskStateError) as caught:
        from_state(state, "the file")
    assert [text for text in says if text not in str(caught.value)] == []


def test_names_and_shapes_must_be_those_of_the_model() -> None:
    expected = {"fc1.weight": (2, 5), "fc2.weight": (5, 2)}
    check_names(STATE, expected, "the file")
    with pytest.raises(MaskStateError, match=r"the file has a mask of 'fc2.weight', which is no target.*another model"):
        check_names(STATE, {"fc1.weight": (2, 5)}, "the file")
    with pytest.raises(MaskStateError, match=r"Did you mean 'fc2\.weights'\?"):
        check_names(STATE, {"fc1.weight": (2, 5), "fc2.weights": (5, 2)}, "the file")
    with pytest.raises(MaskStateError, match=r"'fc2.weight' has shape \(5, 2\), the tensor here has \(2, 5\)"):
        check_names(STATE, expected | {"fc2.weight": (2, 5)}, "the file")
    with pytest.raises(MaskStateError, match=r"no mask of 'fc3.weight' and 1 more"):
        check_names(STATE, expected | {"fc3.weight": (1, 1), "fc4.weight": (1, 1)}, "the file")


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["sparsetrain"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    changed = change(about)  # in place, or another text altogether
    safetensors.torch.save_file(tensors, path, {"sparsetrain": changed if isinstance(changed, str) else json.dumps(about)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not a mask file at all"),
        lambda path: safetensors.torch.save_file({"w": torch.ones(2)}, path),
        lambda path: rewritten(path, lambda about: "{"),
        lambda path: rewritten(path, lambda about: about.update(version=2)),
        lambda path: rewritten(path, lambda about: about["masks"].update(extra=about["masks"]["fc1.weight"])),
        lambda path: rewritten(path, lambda about: about["masks"]["fc1.weight"].pop("alive")),
        lambda path: rewritten(path, lambda about: about["masks"]["fc1.weight"].update(sparsity="half")),
        lambda path: rewritten(path, lambda about: about["masks"]["fc1.weight"].update(sparsity="1/0")),
        lambda path: rewritten(path, lambda about: about["masks"]["fc1.weight"].update(shape=None)),
        lambda path: rewritten(path, lambda about: about.update(masks=[])),
        lambda path: rewritten(path, lambda about: json.dumps([1])),
    ],
)
def test_an_unreadable_side_file_is_refused_by_path(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(path, {"fc1.weight": saved(MASK)})
    assert same(read_masks(path), {"fc1.weight": saved(MASK)})
    damage(path)
    with pytest.raises(MaskStateError, match=r"masks\.safetensors"):
        read_masks(path)


def test_masks_at_rest_take_an_eighth_of_a_byte() -> None:
    mask = draw((64, 64), 0)
    assert pack_bits(mask).untyped_storage().nbytes() == math.prod(mask.shape) / 8


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def test_state_there_and_back_and_foreign_state_touches_nothing() -> None:
    manager = MaskManager(net(0))
    prune(manager, 0.75, step=7)
    other_model = net(1)
    other = MaskManager(other_model)
    other.load_state_dict(manager.state_dict())
    assert all(torch.equal(other.masks[n], m) for n, m in manager.masks.items())
    assert [c.step for c in other.changes] == [7, 7]
    assert other.verify(strict=True).sparsity == 0.75
    untouched = net(2)
    weights = {n: p.clone() for n, p in untouched.named_parameters()}
    state = manager.state_dict()
    state["tensors"]["2.weight"]["bits"] = state["tensors"]["2.weight"]["bits"] ^ 1
    with pytest.raises(MaskStateError, match=r"2\.weight"):
        MaskManager(untouched).load_state_dict(state)
    with pytest.raises(MaskStateError, match=r"0\.weight.*saved as unstructured and is no 2:4.*declare the pattern"):
        MaskManager(untouched, pattern="2:4").load_state_dict(manager.state_dict())
    assert all(torch.equal(p, weights[n]) for n, p in untouched.named_parameters())
