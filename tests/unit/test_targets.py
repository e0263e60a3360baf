"""What is found in real models: layers of torch, of transformers, ties, wrappers, and what is left dense and why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from sparsetrain.errors import TargetError
from sparsetrain.targets import Layout, Targets, aliases, plain_name

SMALL = {
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 8,
    "vocab_size": 20,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = LlamaConfig(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
BERT = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=8,
)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def convnet() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 2))


def found(model: nn.Module, targets: Targets | None = None) -> list[str]:
    return [target.name for target in (targets or Targets()).match(model).targets]


def dense(model: nn.Module, targets: Targets | None = None) -> dict[str, str]:
    """Why weights (not biases and norms) are left dense."""
    skipped = (targets or Targets()).match(model).skipped
    return {name: why.split(" (")[0] for name, why in skipped.items() if not why.startswith("a bias")}


def every(prefix: str, blocks: int, *names: str) -> list[str]:
    return [f"{prefix}.{block}.{name}.weight" for block in range(blocks) for name in names]


GPT2_BLOCK = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
LLAMA_BLOCK = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
BERT_BLOCK = tuple(f"attention.self.{x}" for x in ("query", "key", "value"))
BERT_BLOCK += ("attention.output.dense", "intermediate.dense", "output.dense")


@pytest.mark.parametrize(
    ("build", "expected", "left"),
    [
        (mlp, ["0.weight", "3.weight"], {"5.weight": "the output head"}),
        (convnet, ["0.weight", "2.weight"], {"4.weight": "the output head"}),
        (lambda: nn.Linear(4, 2), ["weight"], {}),
        (lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv3d(1, 1, 2)), ["0.weight", "1.weight"], {}),
        (lambda: nn.Sequential(nn.Bilinear(3, 4, 5), nn.Linear(5, 2)), ["0.weight"], {"1.weight": "the output head"}),
        (
            lambda: nn.Sequential(nn.Linear(3, 4), nn.ConvTranspose2d(4, 4, 2), nn.Linear(4, 2)),
            ["0.weight"],
            {"1.weight": "no supported layer", "2.weight": "the output head"},
        ),
        (
            lambda: nn.ModuleDict({"emb": nn.Embedding(9, 4), "bag": nn.EmbeddingBag(9, 4), "rnn": nn.GRU(4, 8)}),
            ["rnn.weight_ih_l0", "rnn.weight_hh_l0"],
            {"emb.weight": "an embedding", "bag.weight": "an embedding"},
        ),
        (
            lambda: nn.LSTM(4, 8, bidirectional=True, proj_size=3),
            [f"weight_{kind}_l0{way}" for way in ("", "_reverse") for kind in ("ih", "hh", "hr")],
            {},
        ),
        (lambda: nn.Sequential(nn.RNN(4, 8)), ["0.weight_ih_l0", "0.weight_hh_l0"], {}),
        (
            lambda: GPT2Model(GPT2Config(**SMALL)),
            every("h", 2, *GPT2_BLOCK),
            {"wte.weight": "an embedding", "wpe.weight": "an embedding"},
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(**SMALL)),
            every("transformer.h", 2, *GPT2_BLOCK),
            {"transformer.wte.weight": "the output head", "transformer.wpe.weight": "an embedding"},
        ),
        (lambda: LlamaModel(LLAMA), every("layers", 2, *LLAMA_BLOCK), {"embed_tokens.weight": "an embedding"}),
        (
            lambda: LlamaForCausalLM(LLAMA),
            every("model.layers", 2, *LLAMA_BLOCK),
            {"model.embed_tokens.weight": "an embedding", "lm_head.weight": "the output head"},
        ),
        (
            lambda: BertForSequenceClassification(BERT),
            [*every("bert.encoder.layer", 2, *BERT_BLOCK), "bert.pooler.dense.weight"],
            {f"bert.embeddings.{x}_embeddings.weight": "an embedding" for x in ("word", "position", "token_type")}
            | {"classifier.weight": "the output head"},
        ),
    ],
)
def test_defaults(build: Callable[[], nn.Module], expected: list[str], left: dict[str, str]) -> None:
    model = build()
    assert found(model) == expected
    assert dense(model) == left
    # nothing is silent: targets and skipped are all the parameters, biases and norms among them
    matched = Targets().match(model)
    assert sorted([*expected, *matched.skipped]) == sorted(name for name, _ in model.named_parameters())


def test_a_transformer_of_torch_has_no_head() -> None:
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
    names = found(model)
    parts = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    cross = ("multihead_attn.in_proj_weight", "multihead_attn.out_proj.weight")
    wanted = [f"encoder.layers.{i}.{part}" for i in range(2) for part in parts]
    wanted += [f"decoder.layers.{i}.{part}" for i in range(2) for part in (*parts, *cross)]
    assert sorted(names) == sorted(wanted)
    assert dense(model) == {}


def test_attention_with_separate_projections() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4, vdim=6), nn.Linear(8, 2))
    assert found(model) == ["0.q_proj_weight", "0.k_proj_weight", "0.v_proj_weight", "0.out_proj.weight"]


def test_head_embeddings_include_and_exclude() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 2))
    assert found(model) == ["1.weight"]
    assert found(model, Targets(head=True)) == ["1.weight", "2.weight"]
    assert found(model, Targets(embeddings=True)) == ["0.weight", "1.weight"]
    assert found(model, Targets(embeddings=True, head=True, exclude=("^1",))) == ["0.weight", "2.weight"]
    # naming a tensor is asking for it, an embedding or a head as well; exclude has the last word
    assert found(model, Targets(include=("0", "^2"))) == ["0.weight", "2.weight"]
    assert found(model, Targets(include=("weight",), exclude=("0", "2"))) == ["1.weight"]
    assert Targets(include="fc") == Targets(include=("fc",))
    reasons = Targets(include="^1", exclude="bias").match(model).skipped
    assert reasons["2.weight"] == "not included (targets.include)"
    assert reasons["1.bias"] == "excluded (targets.exclude)"


def test_a_head_inside_a_wrapper_is_found_and_one_among_like_blocks_is_none() -> None:
    wrapped = nn.ModuleDict({"net": GPT2LMHeadModel(GPT2Config(**SMALL)), "probe": nn.Linear(4, 4)})
    assert dense(wrapped)["net.transformer.wte.weight"] == "the output head"
    assert "probe.weight" in found(wrapped)
    alike = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    assert found(alike) == ["blocks.0.weight", "blocks.1.weight"]
    # twin: the same two layers in a row end in a head
    assert found(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == ["0.weight"]


def test_tied_weights_are_one_target_with_all_their_names() -> None:
    model = GPT2LMHeadModel(GPT2Config(**SMALL))
    [tied] = [t for t in Targets(head=True).match(model).targets if "wte" in t.name]
    assert (tied.name, tied.aliases) == ("transformer.wte.weight", ("lm_head.weight",))
    assert tied.module is model.lm_head
    assert tied.view_shape == (20, 8)
    for alias in ("lm_head", "wte"):
        assert found(model, Targets(include=alias)) == ["transformer.wte.weight"]
        assert "transformer.wte.weight" not in found(model, Targets(head=True, exclude=alias))
    # twin: untied, they are two
    untied = GPT2LMHeadModel(GPT2Config(**SMALL, tie_word_embeddings=False))
    assert found(untied, Targets(include=("wte", "lm_head"))) == ["transformer.wte.weight", "lm_head.weight"]


def test_tied_linears_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    model[1].weight = model[0].weight
    assert found(model) == ["0.weight"]
    assert [names for _, names in aliases(model)] == [("0.weight", "1.weight"), ("2.weight",)]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # inside peft
def test_the_factors_of_an_adapter_stay_dense() -> None:
    model = get_peft_model(LlamaForCausalLM(LLAMA), LoraConfig(r=2, target_modules=["q_proj"]))
    matched = Targets().match(model)
    assert [t.name for t in matched.targets if "q_proj" in t.name] == [
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.base_layer.weight" for layer in (0, 1)
    ]
    factor = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert matched.skipped[factor] == "a factor of a low-rank adapter"
    assert next(t.name for t in Targets(include=("lora_A",)).match(model).targets) == factor  # who names it gets it


def test_layouts() -> None:
    model = GPT2LMHeadModel(GPT2Config(**SMALL))
    by_name = {t.name: t for t in Targets().match(model).targets}
    fc = by_name["transformer.h.0.mlp.c_fc.weight"]
    assert fc.layout == Layout(transposed=True)
    assert (fc.shape, fc.view_shape) == ((8, 32), (32, 8))
    [conv, *_] = Targets().match(convnet()).targets
    assert conv.layout == Layout()
    assert conv.view_shape == (4, 3, 3, 3)
    stored = torch.arange(6).view(2, 3)
    assert torch.equal(fc.layout.view(fc.layout.view(stored)), stored)
    assert fc.layout.view(stored)[2, 1] == stored[1, 2]
    assert Layout(transposed=True).shape((2, 3, 5)) == (3, 2, 5)


def test_a_compiled_model_has_plain_names() -> None:
    inner = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on its first import of the compiler
        inner[0] = torch.compile(inner[0])
        model = torch.compile(inner)
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert found(model) == found(mlp())
    assert found(model, Targets(include="^3")) == ["3.weight"]
    assert plain_name("_orig_mod.a._fsdp_wrapped_module.b._checkpoint_wrapped_module.weight") == "a.b.weight"


def test_a_target_follows_a_replaced_parameter() -> None:
    model = mlp()
    [first, *_] = Targets().match(model).targets
    model[0].weight = nn.Parameter(torch.full((6, 4), 2.0))
    assert first.parameter is model[0].weight


def parametrized(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", nn.Identity())


def torch_pruned(layer: nn.Module) -> None:
    torch_prune.l1_unstructured(layer, "weight", 0.5)


def weight_normed(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


@pytest.mark.parametrize("disturb", [parametrized, torch_pruned, weight_normed])
def test_a_weight_that_is_no_plain_parameter_is_told(disturb: Callable[[nn.Module], None]) -> None:
    model = mlp()
    targets = Targets().match(model).targets
    disturb(model[3])
    # replaced after matching: whoever asks for the parameter is told
    with pytest.raises(TargetError, match=r"3\.weight is no parameter of its .*Linear any more.*parametrization.*exclude"):
        _ = targets[1].parameter
    # before matching: left dense, and listed as such
    assert found(model) == ["0.weight"]
    assert any(why.startswith("replaced by") for name, why in dense(model).items() if name.startswith("3."))
    disturb(model[0])
    with pytest.raises(TargetError, match=r"no tensor of Sequential matches.*0.*replaced by a parametrization"):
        Targets().match(model)


def test_torch_prune_on_a_recurrent_layer_is_no_target_either() -> None:
    model = nn.LSTM(4, 4)
    torch_prune.l1_unstructured(model, "weight_hh_l0", 0.5)
    assert found(model) == ["weight_ih_l0"]
    assert dense(model)["weight_hh_l0_orig"].startswith("replaced by")


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (
            lambda: Targets(include="fc1.wieght").match(nn.ModuleDict({"fc1": nn.Linear(2, 2)})),
            ["fc1.wieght", "Did you mean 'fc1.weight'"],
        ),
        (lambda: Targets(exclude=".").match(mlp()), ["no tensor of Sequential", "exclude=['.']", "0.weight: excluded"]),
        (
            lambda: Targets().match(nn.Sequential(nn.Embedding(4, 4))),
            ["0.weight: an embedding", "targets.embeddings: true"],
        ),
        (lambda: Targets().match(nn.ReLU()), ["no tensor of ReLU"]),
        (lambda: Targets(include="fc["), ["targets.include", "'fc['", "no regular expression", "escape"]),
        (lambda: Targets(exclude=("ok", "(")), ["targets.exclude", "'('"]),
    ],
)
def test_errors_name_the_value_and_the_way_out(broken: Callable[[], Any], says: list[str]) -> None:
    with pytest.raises(TargetError) as caught:
        broken()
    assert [text for text in says if text not in str(caught.value)] == []
