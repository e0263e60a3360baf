"""Masked LoRA: the product never fills a zero, training computes what merging writes, PEFT reads what is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM
from transformers.pytorch_utils import Conv1D

from sparsetrain.errors import MaskStateError, PatternError, RecipeError, TargetError
from sparsetrain.masks import MaskManager
from sparsetrain.nn import lora
from sparsetrain.nn.adapters import Adapters
from sparsetrain.nn.choice import choose_layers
from sparsetrain.nn.lora import MaskedLoraLinear, effective_weight, masked_lora
from sparsetrain.patterns import parse_pattern
from sparsetrain.pruning import prune
from sparsetrain.targets import Targets
from tests.contracts.toys import Int8Linear


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        bits = [t[name].detach().reshape(-1).contiguous().view(torch.uint8) for t in (one, other)]
        assert torch.equal(*bits), name


def two_of_four(weight: Tensor) -> bool:
    """Two zeros in every four inputs, counted by hand; a weight is (out, in)."""
    return all((row[i : i + 4] == 0).sum() == 2 for row in weight for i in range(0, len(row), 4))


PATTERNS = {"unstructured": 0.6, "unstructured:row": 0.25, "2:4": 0.5, "4:8": 0.5, "block:4x4": 0.5, "neurons": 0.5}


def pruned(model: nn.Module, pattern: str = "2:4") -> MaskManager:
    manager = MaskManager(model, Targets(head=True), pattern)
    prune(manager, PATTERNS[pattern])
    return manager


def masks_of(manager: MaskManager) -> dict[str, Tensor | None]:
    return {tensor.name: tensor.mask for tensor in manager}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12, bias=False), nn.Tanh(), Conv1D(8, 12))


def noisy(rank: int = 3, **fields: Any) -> LoraConfig:
    """Adapters that do something from the start: B is random too."""
    return LoraConfig(r=rank, lora_alpha=7, init_lora_weights=False, **fields)


def adapted(pattern: str = "2:4", **fields: Any) -> tuple[nn.Module, MaskManager, Adapters]:
    model = net()
    manager = pruned(model, pattern)
    return model, manager, Adapters(model, masks_of(manager), noisy(**fields))


# -- the mathematics --------------------------------------------------------------------------------------------------


def test_by_head() -> None:
    """W = [[1, 0], [0, 2]], B A = [[1, 2], [3, 6]], s = 10: the zeros stay, the rest moves by 10 and 60."""
    weight, mask = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[True, False], [False, True]])
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]])
    assert effective_weight(weight, a, b, mask, 10.0).tolist() == [[11.0, 0.0], [0.0, 62.0]]
    assert effective_weight(weight, a, b, None, 10.0).tolist() == [[11.0, 20.0], [30.0, 62.0]]
    assert effective_weight(None, a, b, mask, 10.0, transposed=True).tolist() == [[10.0, 0.0], [0.0, 60.0]]
    assert masked_lora(torch.tensor([[1.0, 1.0]]), a, b, mask, 10.0, weight).tolist() == [[11.0, 62.0]]


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.sampled_from(sorted(PATTERNS)),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    rank=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_no_product_fills_a_zero(
    pattern: str, rows: int, columns: int, rank: int, dtype: torch.dtype, transposed: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    out, inner = 4 * rows, 8 * columns
    mask = parse_pattern(pattern).select(torch.rand(out, inner), PATTERNS[pattern])
    weight = (torch.randn(out, inner) * mask).to(dtype)
    a, b = (1000 * torch.randn(rank, inner)), torch.randn(out, rank)
    stored = [t.t().contiguous() if transposed else t for t in (weight, mask)]
    full = effective_weight(stored[0], a, b, stored[1], 0.3, transposed)
    assert full.dtype == dtype
    full = full.t() if transposed else full
    assert torch.count_nonzero(full[~mask]) == 0
    assert int((full == 0).sum()) >= int((~mask).sum())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("frozen", ["weight", "product"])
def test_gradients_are_those_of_the_formula(transposed: bool, frozen: str) -> None:
    torch.manual_seed(1)
    options: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    x, a, b = torch.randn(2, 3, 8, **options), torch.randn(2, 8, **options), torch.randn(6, 2, **options)
    bias = torch.randn(6, **options)
    mask = torch.rand(6, 8) > 0.5
    weight = torch.randn(6, 8, dtype=torch.float64) * mask if frozen == "weight" else None
    stored = [t if t is None or not transposed else t.t().contiguous() for t in (weight, mask)]

    def ours(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return masked_lora(x, a, b, stored[1], 0.7, stored[0], bias, transposed)

    def formula(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return x @ ((0 if weight is None else weight) + mask * (0.7 * b @ a)).t() + bias

    inputs = (x, a, b, bias)
    assert torch.autograd.gradcheck(ours, inputs)
    seen = torch.randn(2, 3, 6, dtype=torch.float64)
    mine = torch.autograd.grad((ours(*inputs) * seen).sum(), inputs)
    theirs = torch.autograd.grad((formula(*inputs) * seen).sum(), inputs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_nothing_as_large_as_the_weight_waits_for_the_backward_pass() -> None:
    def kept(run: Callable[[], Tensor]) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter) and tensor.dtype != torch.bool:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            run()
        return max(sizes.values(), default=0)

    layer = nn.Linear(64, 64)
    pruned(nn.Sequential(layer), "unstructured")
    model = nn.Sequential(layer)
    Adapters(model, {"0.weight": layer.weight.detach() != 0}, noisy())
    x = torch.randn(2, 64, requires_grad=True)
    masked = model[0]
    assert isinstance(masked, MaskedLoraLinear)
    a, b, s = masked.factors
    assert kept(lambda: model(x)) <= x.numel()
    # The formula as it stands keeps the product, so that this test can tell.
    assert kept(lambda: F.linear(x, layer.weight + masked.mask * (s * b @ a))) == 64 * 64


@pytest.mark.parametrize("transposed", [False, True])
def test_a_backward_pass_inside_autocast_rounds_no_more_than_one_outside(transposed: bool) -> None:
    """Factors are float32, and so are their gradients: only what the layer was given, and gives, is rounded to bfloat16."""
    torch.manual_seed(2)
    x, a, b = (
        torch.randn(5, 8, requires_grad=True),
        torch.randn(3, 8, requires_grad=True),
        torch.randn(6, 3, requires_grad=True),
    )
    mask = torch.rand(6, 8) > 0.5
    weight = torch.randn(6, 8) * mask
    stored = [t.t().contiguous() if transposed else t for t in (weight, mask)]
    seen = torch.randn(5, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        outside = masked_lora(x, a, b, stored[1], 0.7, stored[0], None, transposed)
        inside = masked_lora(x, a, b, stored[1], 0.7, stored[0], None, transposed)
        found = torch.autograd.grad(inside, (x, a, b), seen)
    wanted = torch.autograd.grad(outside, (x, a, b), seen)
    same_bits({str(i): t for i, t in enumerate(found)}, {str(i): t for i, t in enumerate(wanted)})
    # dL/d(B A) is a product in bfloat16; what follows is not: the gradients of A and B, in float64 from there on.
    dense = (seen.t() @ x.detach().bfloat16()).double() * mask * 0.7
    torch.testing.assert_close(found[1].double(), b.detach().double().t() @ dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2].double(), dense @ a.detach().double().t(), rtol=1e-5, atol=1e-5)


# -- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_training_computes_what_merging_writes(precision: str) -> None:
    model = net().to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    manager = pruned(model)
    adapters = Adapters(model, masks_of(manager), noisy())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    x = torch.randn(5, 3, 8, dtype=next(model.parameters()).dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        before = model(x)
    before.float().square().mean().backward()
    names = [n for n, p in model.named_parameters() if p.grad is not None]
    assert len(names) == 6
    assert all(".lora_" in n for n in names)
    plain = list(net().state_dict())
    adapters.merge()
    assert list(model.state_dict()) == plain
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, Conv1D]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        after = model(x)
    same_bits({"y": before}, {"y": after})
    assert manager.verify().ok
    assert all(two_of_four(tensor.target.layout.view(tensor.target.parameter.detach())) for tensor in manager)
    assert all(p.requires_grad for p in model.parameters())


@contextmanager
def mask_off() -> Iterator[None]:
    """Sabotage: the product is not masked."""
    plain = effective_weight

    def dense(weight: Any, a: Tensor, b: Tensor, mask: Any, *rest: Any) -> Tensor:
        return plain(weight, a, b, None, *rest)

    lora.effective_weight = dense
    try:
        yield
    finally:
        lora.effective_weight = plain


def test_without_the_mask_a_merge_would_fill_the_zeros_and_is_refused() -> None:
    model, _, adapters = adapted()
    with mask_off():
        layer = adapters.layers["0"]
        a, b, s = layer.factors
        dense = lora.effective_weight(layer.get_base_layer().weight, a, b, layer.mask, s)
        assert int((dense == 0).sum()) < 10  # 64 of 128 were zero
        before = {n: v.clone() for n, v in model.state_dict().items()}
        with pytest.raises(PatternError, match=r"0\.weight: 64 pruned weights would not be zero"):
            adapters.merge()
    same_bits(before, model.state_dict())


def test_with_dropout_the_bound_is_that_of_rounding() -> None:
    """Two sums instead of one: each of the products is rounded at most once more per addition."""
    _, _, adapters = adapted()
    layer = adapters.layers["0"]
    base, x = layer.get_base_layer(), torch.randn(50, 8)
    a, b, s = layer.factors
    merged = layer(x)
    layer.lora_dropout["default"] = nn.Dropout(1e-30)  # the other path, dropping nothing
    apart = layer(x)
    weight: Any = base.weight
    size = x.abs() @ (weight.abs() + s * b.abs() @ a.abs()).t() + base.bias.abs()  # type: ignore[union-attr, operator]
    bound = (8 + 3 + 3) * torch.finfo(torch.float32).eps * size
    assert not torch.equal(merged, apart)
    assert bool(((merged - apart).abs() <= bound).all())


def test_dropout_acts_on_the_adapter_alone_and_only_in_training() -> None:
    _, _, adapters = adapted(lora_dropout=0.5)
    layer = adapters.layers["0"]
    base, x = layer.get_base_layer(), torch.ones(1, 8)
    torch.manual_seed(5)
    trained = layer(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    assert 0 < int((dropped == 0).sum()) < 8
    torch.testing.assert_close(trained, base(x) + F.linear(dropped, layer.get_delta_weight()))
    layer.eval()
    torch.testing.assert_close(layer(x), base(x) + F.linear(x, layer.get_delta_weight()))


@pytest.mark.parametrize("how", ["hook", "pre-hook", "replaced", "thawed"])
def test_who_listens_to_the_base_layer_is_heard(how: str) -> None:
    """The short way computes base and adapter at once; it is not taken where somebody needs the base by itself."""
    _, _, adapters = adapted()
    layer, x = adapters.layers["0"], torch.randn(5, 8)
    base: Any = layer.get_base_layer()
    if how == "thawed":
        base.weight.requires_grad_(True)
        layer(x).sum().backward()
        torch.testing.assert_close(base.weight.grad, x.sum(0).expand(16, 8))
        return
    weight, bias, forward = base.weight.detach().clone(), base.bias.detach().clone(), base.forward
    if how == "hook":
        base.register_forward_hook(lambda module, args, output: 2 * output)
    elif how == "pre-hook":
        base.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        bias /= 2
    else:
        base.forward = lambda x: 2 * forward(x)
    torch.testing.assert_close(layer(x), 2 * F.linear(x, weight, bias) + F.linear(x, layer.get_delta_weight()))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 7 / 4), (True, 7 / 2)])
def test_scaling_is_pefts(rslora: bool, scale: float) -> None:
    _, _, adapters = adapted(rank=4, use_rslora=rslora)
    assert all(layer.factors[2] == scale for layer in adapters.layers.values())


def test_pefts_own_merge_keeps_zeros_too() -> None:
    model, manager, _ = adapted()
    layer = model[0]
    assert isinstance(layer, MaskedLoraLinear)
    x = torch.randn(4, 8)
    before = layer(x)
    layer.merge(safe_merge=True)
    layer.merge()
    same_bits({"y": before}, {"y": layer(x)})
    assert manager.verify().ok
    with pytest.raises(RecipeError, match="cannot be taken out"):
        layer.unmerge()


def test_gpt2_and_its_conv1d() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=16)).eval()
    manager = MaskManager(model, pattern="2:4")
    prune(manager)
    adapters = Adapters(model, masks_of(manager), noisy())
    assert len(adapters.layers) == 8
    tokens = torch.arange(8)[None]
    before = model(tokens).logits
    before.sum().backward()
    adapters.merge()
    same_bits({"y": before}, {"y": model(tokens).logits})
    assert manager.verify().ok


def test_a_broken_adapter_is_refused_and_nothing_is_written() -> None:
    model, _, adapters = adapted()
    with torch.no_grad():
        adapters.layers["4"].factors[0][0, 0] = torch.nan
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(PatternError, match=r"4\.weight: .*NaN"):
        adapters.merge()
    same_bits(before, model.state_dict())


def test_frozen_weights_lose_stale_gradients() -> None:
    model = net()
    manager = pruned(model)
    model(torch.randn(2, 8)).sum().backward()
    Adapters(model, masks_of(manager))
    assert all(p.grad is None for p in model.parameters())


def test_modules_to_save_train_in_place_and_are_restored() -> None:
    model = net()
    manager = pruned(model)
    masks = masks_of(manager)
    del masks["4.weight"]
    adapters = Adapters(model, masks, noisy(modules_to_save=["4"]))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trainable if ".lora_" not in n} == {"4.weight", "4.bias"}
    # rank 3: 3 * (8 + 16) + 3 * (16 + 12) + 12 * 8 + 8; the model has 144 + 192 + 104
    assert adapters.facts() == {"rank": 3, "adapters": 2, "trainable": 260, "share": 260 / 440}
    adapters.remove()
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(RecipeError, match="modules_to_save trains all of 4"):
        Adapters(model, masks_of(manager), noisy(modules_to_save=["4"]))


# -- quantized --------------------------------------------------------------------------------------------------------


def quantized() -> tuple[nn.Module, dict[str, Tensor | None], nn.Module]:
    model = net()
    masks = masks_of(pruned(model))
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    small = nn.Sequential(Int8Linear(layer), nn.Tanh(), nn.LayerNorm(16))
    return small, {"0.weight": masks["0.weight"]}, layer


def test_a_quantized_base_is_used_as_it_is() -> None:
    small, masks, _ = quantized()
    bits = {n: v.clone() for n, v in small.state_dict().items()}
    plain = small[0](torch.eye(8)).detach()
    adapters = Adapters(small, masks, noisy())
    layer = adapters.layers["0"]
    optimizer = torch.optim.AdamW(small.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        small(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    same_bits(bits, {n.replace("base_layer.", ""): v for n, v in small.state_dict().items() if ".lora_" not in n})
    mask = masks["0.weight"]
    assert mask is not None
    moved = (layer(torch.eye(8)) - plain).detach().t()
    assert torch.count_nonzero(moved[~mask]) == 0
    assert torch.count_nonzero(moved[mask]) == int(mask.sum())
    with pytest.raises(PatternError, match=r"0\.weight: .*Int8Linear is no ordinary.*save the adapter"):
        adapters.merge()


def test_an_adapter_trained_on_a_quantized_base_merges_into_the_model_before(tmp_path: Path) -> None:
    small, masks, layer = quantized()
    Adapters(small, masks, noisy()).save(tmp_path)
    whole = nn.Sequential(layer, nn.Tanh(), nn.LayerNorm(16))
    before = layer.weight.detach().clone()  # type: ignore[union-attr, operator]
    Adapters.load(whole, tmp_path).merge()
    assert two_of_four(layer.weight.detach())  # type: ignore[union-attr, operator]
    assert not torch.equal(before, layer.weight)  # type: ignore[arg-type]


# -- at rest ----------------------------------------------------------------------------------------------------------


class Task(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = net()


def test_peft_loads_the_folder_and_ours_masks_it_again(tmp_path: Path) -> None:
    task = Task()
    manager = MaskManager(task, Targets(head=True, exclude=("4",)), "2:4")
    prune(manager)
    bare = {n.removeprefix("network."): v.clone() for n, v in task.state_dict().items()}
    adapters = Adapters(task, masks_of(manager), noisy(use_rslora=True, modules_to_save=["4"]))
    with torch.no_grad():
        task.network[4].bias += 1  # type: ignore[index, union-attr, operator]
    adapters.save(tmp_path / "adapter", prefix="network.")
    x = torch.randn(3, 8)

    fresh = net(seed=9)
    fresh.load_state_dict(bare)
    again = Adapters.load(fresh, tmp_path / "adapter")
    same_bits({"y": task.network(x)}, {"y": fresh(x)})
    again.merge()
    assert MaskManager.adopt(fresh, "2:4", Targets(head=True, exclude=("4",))).verify().ok

    theirs = net(seed=9)
    theirs.load_state_dict(bare)
    loaded = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    assert torch.equal(loaded.base_model.model[4].bias, task.network[4].bias)  # type: ignore[index, union-attr]
    for name, layer in adapters.layers.items():
        other = loaded.base_model.model[int(name.removeprefix("network."))]
        assert torch.equal(other.lora_A["default"].weight, layer.factors[0])
        product = other.get_delta_weight("default")
        assert torch.equal(product * layer.mask, layer.get_delta_weight())
        assert torch.count_nonzero(product[~layer.mask]) > 0  # PEFT knows no masks


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    model, manager, adapters = adapted()
    adapters.save(tmp_path)
    with pytest.raises(TargetError, match=r"'network\.'"):
        adapters.save(tmp_path, prefix="network.")
    with pytest.raises(TargetError, match="no layer 4"):
        Adapters.load(nn.Sequential(*net()[:3]), tmp_path)
    with pytest.raises(MaskStateError, match=r"0\.weight has 64 weights that its mask says are pruned"):
        Adapters.load(net(), tmp_path)
    (tmp_path / "masks.safetensors").unlink()
    with pytest.raises(MaskStateError, match=r"no masks\.safetensors"):
        Adapters.load(net(), tmp_path)
    adapters.remove()
    Adapters.load(model, tmp_path, masks_of(manager)).merge()
    assert manager.verify().ok
    with pytest.raises(MaskStateError, match="cannot be read as a LoRA adapter"):
        Adapters.load(model, tmp_path / "nothing")


@pytest.mark.parametrize("change", ["lacks", "shape"])
def test_a_damaged_adapter_changes_nothing(change: str, tmp_path: Path) -> None:
    model = net()
    manager = pruned(model)
    masks = {n: m for n, m in masks_of(manager).items() if n != "4.weight"}
    adapters = Adapters(model, masks, noisy(modules_to_save=["4"]))
    adapters.save(tmp_path)
    adapters.remove()
    tensors = load_file(str(tmp_path / "adapter_model.safetensors"))
    tensors["base_model.model.4.bias"] += 1
    broken = "base_model.model.2.lora_B.weight"
    tensors[broken] = torch.ones(5, 3)
    if change == "lacks":
        del tensors[broken]
    save_file(tensors, str(tmp_path / "adapter_model.safetensors"))
    bits = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(MaskStateError, match=r"lacks 2\.lora_B|2\.lora_B.* of shape \(5, 3\)"):
        Adapters.load(model, tmp_path, masks)
    same_bits(bits, model.state_dict())


@pytest.mark.parametrize("last", ["adapter_model.safetensors", "masks.safetensors"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_what_breaks_off_while_an_adapter_is_saved_leaves_what_was_there(
    error: BaseException, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> dict[str, bytes]:
        return {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def broken(path: Any, *_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error

    def broken_tensors(tensors: Any, path: str, *_: Any) -> None:
        broken(path)

    _, _, adapters = adapted()
    adapters.save(tmp_path / "adapter")
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    before = files()
    with torch.no_grad():
        for layer in adapters.layers.values():
            layer.factors[0].add_(1)
    with monkeypatch.context() as patch:
        name = "save_masks" if last.startswith("masks") else "save_file"
        patch.setattr(f"sparsetrain.nn.adapters.{name}", broken if name == "save_masks" else broken_tensors)
        for folder in ("adapter", "new"):
            with pytest.raises(RecipeError if isinstance(error, OSError) else KeyboardInterrupt) as told:
                adapters.save(tmp_path / folder)
            assert isinstance(error, KeyboardInterrupt) or "no space left" in str(told.value)
    assert files() == before
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    adapters.save(tmp_path / "adapter")
    changed = {name for name, content in files().items() if content != before[name]}
    assert changed == {"adapter/adapter_model.safetensors"}  # and what others put there is still there


def test_the_layers_of_an_adapter_that_peft_wrote_are_those_it_has(tmp_path: Path) -> None:
    theirs = get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "2"], exclude_modules=["2"], init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path))
    adapters = Adapters.load(net(), tmp_path, {})
    assert list(adapters.layers) == ["0"]
    x = torch.randn(3, 8)
    torch.testing.assert_close(theirs(x), adapters.model(x))


# -- what is refused --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)
        self.conv = nn.Conv2d(3, 4, 3)
        self.embedding = nn.Embedding(5, 8)
        self.tied = nn.Linear(8, 5, bias=False)
        self.tied.weight = self.embedding.weight
        self.fc = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("attention.in_proj_weight", "another parameter"),
        ("attention.out_proj.weight", "MultiheadAttention reads the weight without calling"),
        ("encoder.linear1.weight", "TransformerEncoderLayer reads the weight without calling"),
        ("conv.weight", "is a Conv2d"),
        ("embedding.weight", "is a Embedding"),
        ("tied.weight", r"tied to embedding\.weight"),
        ("fcc.weight", "no layer fcc. Did you mean 'fc'"),
    ],
)
def test_layers_that_cannot_are_refused_by_name(weight: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        choose_layers(Attention(), [weight], LoraConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' rewrites"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),  # would train what save() does not write
        ({"exclude_modules": ["fc"]}, "exclude_modules=.*which layers get adapters say targets"),
        ({"modules_to_save": ["fd"]}, "modules_to_save 'fd' matches no module"),
        ({"target_modules": ["fd"]}, "target_modules 'fd' matches no target"),
        ({"target_modules": "f.*d"}, "matches no target"),
    ],
)
def test_configurations_that_cannot_are_refused(fields: dict[str, Any], message: str) -> None:
    model = Attention()
    with pytest.raises((RecipeError, TargetError), match=message):
        Adapters(model, {"fc.weight": None}, LoraConfig(**fields))
    assert type(model.fc) is nn.Linear


def test_what_peft_refuses_half_way_leaves_the_model_as_it_was() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2))
    mixer = "backbone.layers.0.mixer"
    bits, trainable = {n: v.clone() for n, v in model.state_dict().items()}, [p.requires_grad for p in model.parameters()]
    with pytest.raises(RecipeError, match=r"PEFT refuses the adapters: .*Mamba"):
        Adapters(model, {f"{mixer}.in_proj.weight": None, f"{mixer}.out_proj.weight": None})
    same_bits(bits, model.state_dict())
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not hasattr(model, "peft_config")
    Adapters(model, {f"{mixer}.in_proj.weight": None})


def test_target_modules_narrow_the_targets() -> None:
    names = ["0.weight", "2.weight", "4.weight"]
    for asked, found in ((["2", "4"], ["2", "4"]), (r"[02]", ["0", "2"]), ("all-linear", ["0", "2", "4"])):
        assert choose_layers(net(), names, LoraConfig(target_modules=asked))[0] == found


def test_wrong_masks_and_second_adapters_are_refused() -> None:
    model, manager, adapters = adapted()
    with pytest.raises(TargetError, match="adapters already"):
        Adapters(model, masks_of(manager))
    with pytest.raises(RecipeError, match="second adapter"):
        adapters.layers["0"].update_layer("other", 4, 8, config=LoraConfig())
    adapters.remove()
    with pytest.raises(MaskStateError, match="use bool"):
        Adapters(model, {"0.weight": torch.ones(16, 8)})
    with pytest.raises(MaskStateError, match=r"\(16, 8\)"):
        Adapters(model, {"0.weight": torch.ones(8, 16, dtype=torch.bool)})


def test_saved_masks_are_counted(tmp_path: Path) -> None:
    from sparsetrain.masks.state import read_masks

    _, _, adapters = adapted("unstructured")
    adapters.save(tmp_path)
    saved = read_masks(tmp_path / "masks.safetensors")
    assert {n: (s.alive, s.sparsity) for n, s in saved.items()} == {
        "0.weight": (52, Fraction(76, 128)),
        "2.weight": (77, Fraction(115, 192)),
        "4.weight": (39, Fraction(57, 96)),
    }
