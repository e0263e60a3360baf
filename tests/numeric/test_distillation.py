"""Distillation losses against numbers done by hand, torch's own, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from sparsetrain.distillation import find_layers, hidden_loss, hidden_of, kept, logits_loss, logits_of
from sparsetrain.errors import TargetError


def test_two_classes_by_hand() -> None:
    """The teacher says 3/4 and 1/4, the student does not know: 3/4 ln(3/2) + 1/4 ln(1/2), whatever T; T^2 goes with it."""
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    student = torch.zeros(1, 2, dtype=torch.float64)
    for temperature in (1.0, 3.0):
        teacher = temperature * torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
        found = logits_loss(student, teacher, temperature)
        assert float(found) == pytest.approx(temperature**2 * expected, abs=1e-14)


def test_the_gradient_is_the_difference_of_the_probabilities() -> None:
    """d/ds = T (softmax(s/T) - softmax(t/T)) / positions (Hinton et al. 2015, eq. 2, times T^2)."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    student.requires_grad_()
    teacher.requires_grad_()
    logits_loss(student, teacher, 4.0).backward()
    expected = 4.0 * ((student / 4).softmax(-1) - (teacher / 4).softmax(-1)) / 6
    torch.testing.assert_close(student.grad, expected, rtol=1e-12, atol=1e-14)
    assert teacher.grad is None


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.floats(0.5, 8), st.integers(0, 999))
def test_torch_agrees(rows: int, classes: int, temperature: float, seed: int) -> None:
    torch.manual_seed(seed)
    student, teacher = 5 * torch.randn(rows, classes), 5 * torch.randn(rows, classes)
    expected = nn.KLDivLoss(reduction="batchmean")((student / temperature).log_softmax(1), (teacher / temperature).softmax(1))
    torch.testing.assert_close(logits_loss(student, teacher, temperature), expected * temperature**2, rtol=1e-4, atol=1e-5)
    assert float(logits_loss(student, student + 3.0, temperature)) == pytest.approx(0, abs=1e-4)


def test_padding_does_not_count() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    keep = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    few = [logits_loss(student[i, j], teacher[i, j], 2.0) for i, j in keep.nonzero().tolist()]
    torch.testing.assert_close(logits_loss(student, teacher, 2.0, keep), torch.stack(few).mean())
    noise = torch.where(keep[..., None], student, torch.full((), 1e6))
    assert torch.equal(logits_loss(noise, teacher, 2.0, keep), logits_loss(student, teacher, 2.0, keep))
    assert float(logits_loss(student, teacher, 2.0, torch.zeros_like(keep))) == 0
    masked = F.mse_loss(student[keep], teacher[keep]) / teacher[keep].square().mean()
    torch.testing.assert_close(hidden_loss([student], [teacher], keep), masked)


def test_squarehead_by_hand() -> None:
    """Layer one: (3, 4) for (0, 4), 9 of 25; layer two: twice as large as the teacher's, 1 of 1."""
    teacher = [torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, -2.0, 5.0]])]
    student = [torch.tensor([[0.0, 4.0]]), torch.tensor([[2.0, -4.0, 10.0]])]
    assert float(hidden_loss(student, teacher)) == pytest.approx(9 / 25 + 1)
    # It knows no scale: all of a layer times a thousand is the same loss.
    assert float(hidden_loss([1000 * s for s in student], [1000 * t for t in teacher])) == pytest.approx(9 / 25 + 1)
    assert float(hidden_loss(teacher, teacher)) == 0


def test_gradcheck() -> None:
    torch.manual_seed(2)
    options: dict[str, Any] = {"dtype": torch.float64}
    student, teacher = torch.randn(2, 3, 4, requires_grad=True, **options), torch.randn(2, 3, 4, **options)
    keep = torch.tensor([[True, True, False], [True, False, True]])
    assert torch.autograd.gradcheck(lambda s: logits_loss(s, teacher, 1.5, keep), (student,))
    assert torch.autograd.gradcheck(lambda s: hidden_loss([s, s**2], [teacher, teacher + 1], keep), (student,))


def test_half_precision_is_measured_in_single() -> None:
    torch.manual_seed(3)
    student, teacher = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    assert logits_loss(student, teacher, 2.0).dtype == hidden_loss([student], [teacher]).dtype == torch.float32
    torch.testing.assert_close(logits_loss(student, teacher, 2.0), logits_loss(student.float(), teacher.float(), 2.0))


def test_a_teacher_of_zeros_gives_no_nan() -> None:
    found = hidden_loss([torch.zeros(1, 3)], [torch.zeros(1, 3)])
    assert float(found) == 0


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(TargetError, match=r"logits have shape \(2, 3\), the teacher's \(2, 4\)"):
        logits_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(TargetError, match="hidden states"):
        hidden_loss([torch.zeros(2, 3)], [torch.zeros(2, 4)])


def test_positions_are_read_from_what_the_network_was_given() -> None:
    attention, labels = torch.tensor([[1, 1, 0]]), torch.tensor([[-100, 4, 4]])
    shape = torch.Size([1, 3])
    assert kept({"attention_mask": attention}, shape).tolist() == [[True, True, False]]  # type: ignore[union-attr]
    assert kept({"attention_mask": attention, "labels": labels}, shape).tolist() == [[False, True, False]]  # type: ignore[union-attr]
    assert kept({"labels": torch.tensor([3])}, torch.Size([1])) is None  # one label a sample says nothing of positions
    assert kept({"attention_mask": torch.ones(1, 1, 3, 3)}, shape) is None
    assert kept({}, shape) is None


def test_blocks_are_found_by_structure() -> None:
    small = {"vocab_size": 8, "num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **small))
    assert find_layers(llama) == [f"model.layers.{i}" for i in range(3)]
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=8, n_positions=8))
    assert find_layers(gpt2) == ["transformer.h.0", "transformer.h.1"]
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    assert find_layers(t5) == ["encoder.block.0", "encoder.block.1"]
    experts = nn.ModuleList(nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(5)) for _ in range(3))
    assert find_layers(nn.ModuleDict({"layers": experts})) == ["layers.0", "layers.1", "layers.2"]  # longer, but inside
    with pytest.raises(TargetError, match="no list of like blocks"):
        find_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    tokens = torch.arange(4)[None]
    assert logits_of(gpt2(tokens)).shape == (1, 4, 8)
    assert logits_of(gpt2(tokens, labels=tokens, return_dict=False)).shape == (1, 4, 8)


def test_logits_and_states_are_found_in_what_networks_return() -> None:
    values = torch.zeros(2, 3)
    assert logits_of(values) is logits_of({"logits": values}) is logits_of((torch.zeros(()), values)) is values
    assert hidden_of(values) is hidden_of((values, None)) is values
    for nothing in (None, {"loss": values}, (torch.zeros(()),)):
        with pytest.raises(TargetError, match="without logits"):
            logits_of(nothing)
    with pytest.raises(TargetError, match="without hidden states"):
        hidden_of((None, Tensor()))
