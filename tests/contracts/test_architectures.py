"""Twenty architectures: pruned one-shot to 2:4, trained one step, saved, loaded by stock transformers with the same zeros."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from sparsetrain.errors import SparsetrainError
from sparsetrain.masks import MaskManager
from sparsetrain.oneshot import prune_oneshot
from sparsetrain.targets import Targets

WIDTH, FFN, LAYERS, HEADS, VOCABULARY, LENGTH = 16, 24, 2, 2, 40, 10


def tokens() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, VOCABULARY, (1, LENGTH), generator=generator)} for _ in range(3)]


def pairs() -> list[Any]:
    return [batch | {"decoder_input_ids": batch["input_ids"][:, :6]} for batch in tokens()]


def images() -> list[Any]:
    return [{"pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(i))} for i in range(3)]


def sounds() -> list[Any]:
    return [{"input_features": torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(i))} for i in range(3)]


LLAMA: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
BERT: dict[str, Any] = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Case:
    """Config and model class, sizes, data, where the blocks are, and what is left out with the reason."""

    name: str
    model: str
    sizes: dict[str, Any]
    blocks: list[str]
    data: Callable[[], list[Any]] = tokens
    exclude: tuple[str, ...] = ()
    outside: int = 0


def numbered(*lists: str) -> list[str]:
    return [f"{name}.{i}" for name in lists for i in range(LAYERS)]


def decoder(name: str, **more: Any) -> Case:
    return Case(name, f"{name}ForCausalLM", LLAMA | more, numbered("model.layers"))


CASES = [
    decoder("Llama"),
    decoder("Qwen2"),
    decoder("Qwen3"),
    decoder("Mistral", sliding_window=4),
    decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    decoder("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, decoder_sparse_step=1),
    decoder("Gemma2", query_pre_attn_scalar=8, **WINDOWS),
    Case("Gemma3Text", "Gemma3ForCausalLM", LLAMA | WINDOWS | {"query_pre_attn_scalar": 8}, numbered("model.layers")),
    decoder("Phi3"),
    Case(
        "GPT2",
        "GPT2LMHeadModel",
        {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32},
        numbered("transformer.h"),
    ),
    Case("GPTNeoX", "GPTNeoXForCausalLM", BERT | {"rotary_pct": 1.0}, numbered("gpt_neox.layers")),
    Case(
        "OPT",
        "OPTForCausalLM",
        BERT | {"ffn_dim": FFN, "word_embed_proj_dim": WIDTH},
        numbered("model.decoder.layers"),
    ),
    Case("Bloom", "BloomForCausalLM", {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}, numbered("transformer.h")),
    Case("Falcon", "FalconForCausalLM", BERT | {"multi_query": True}, numbered("transformer.h")),
    Case(
        "T5",
        "T5ForConditionalGeneration",
        {
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": FFN,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "decoder_start_token_id": 0,
            # attention of the first block makes the bias for all: the only other tensor that goes from block to block
            "relative_attention_num_buckets": 8,
        },
        numbered("encoder.block", "decoder.block"),
        pairs,
        exclude=("relative_attention_bias",),
    ),
    Case("Bert", "BertForMaskedLM", BERT, numbered("bert.encoder.layer"), exclude=("pooler",), outside=1),
    Case("Roberta", "RobertaForMaskedLM", BERT, numbered("roberta.encoder.layer"), outside=1),
    Case(
        "DistilBert",
        "DistilBertForMaskedLM",
        {"dim": WIDTH, "hidden_dim": FFN, "n_layers": LAYERS, "n_heads": HEADS, "max_position_embeddings": 32},
        numbered("distilbert.transformer.layer"),
        outside=1,
    ),
    Case(
        "ViT",
        "ViTForImageClassification",
        BERT | {"image_size": 8, "patch_size": 4},
        numbered("vit.layers"),
        images,
        exclude=("projection",),  # 3 colours do not divide by 4
    ),
    Case(
        "Whisper",
        "WhisperForConditionalGeneration",
        {
            "d_model": WIDTH,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": FFN,
            "decoder_ffn_dim": FFN,
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        numbered("model.encoder.layers", "model.decoder.layers"),
        lambda: [a | {"decoder_input_ids": b["input_ids"]} for a, b in zip(sounds(), tokens(), strict=True)],
        outside=2,  # the convolutions before the encoder
    ),
    Case(
        "Mamba",
        "MambaForCausalLM",
        {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 4, "time_step_rank": 4},
        numbered("backbone.layers"),
        # depthwise: one input a filter, nothing to choose among 4; and a layer whose weight is multiplied by hand
        exclude=("conv1d", "dt_proj"),
    ),
]


def build(case: Case) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.name}Config")(**({"vocab_size": VOCABULARY} | case.sizes))
    return getattr(transformers, case.model)(config).eval()


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    out = model(**batch)
    return out.logits.square().mean()


def test_there_are_twenty() -> None:
    assert len(CASES) >= 20


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pruned_trained_saved_and_loaded_by_stock_transformers(case: Case, tmp_path: Path) -> None:
    model = build(case)
    manager = MaskManager(model, Targets(exclude=case.exclude), "2:4")
    report = prune_oneshot(manager, case.data())
    assert report.blocks == case.blocks
    assert len({row.name for row in report.rows if row.block not in case.blocks}) == case.outside
    assert {row.actual for row in report.rows} == {0.5}
    assert all(row.error is None or 0 < row.error < 1 for row in report.rows)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    manager.attach(optimizer)
    loss_of(model, case.data()[0]).backward()
    before = {t.name: t.target.parameter.detach().clone() for t in manager}
    optimizer.step()
    assert manager.verify(strict=True).ok
    assert any(not torch.equal(before[t.name], t.target.parameter) for t in manager)
    model.save_pretrained(tmp_path)
    again = getattr(transformers, case.model).from_pretrained(tmp_path)
    saved, loaded = dict(model.named_parameters()), dict(again.named_parameters())
    assert saved.keys() == loaded.keys()
    for name, mask in manager.masks.items():
        assert torch.equal(saved[name], loaded[name])
        assert not bool(loaded[name].detach()[~mask].any())
    adopted = MaskManager.adopt(again, "2:4", Targets(exclude=case.exclude))
    assert all(torch.equal(adopted.masks[name], mask) for name, mask in manager.masks.items())


@pytest.mark.parametrize(
    ("name", "exclude", "says"),
    [
        ("ViT", (), r"projection\.weight: 2:4 needs an input dimension that divides by 4, this one is 3.*exclude"),
        ("Mamba", (), r"conv1d\.weight: 2:4 needs an input dimension that divides by 4, this one is 1.*exclude"),
        ("Mamba", ("conv1d",), r"cannot score .*dt_proj\.weight: no batch used its layer; leave it out \(targets\.exclude\)"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name_and_nothing_is_changed(
    name: str, exclude: tuple[str, ...], says: str
) -> None:
    case = next(c for c in CASES if c.name == name)
    model = build(case)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(SparsetrainError, match=says):
        prune_oneshot(MaskManager(model, Targets(exclude=exclude), "2:4"), case.data())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
