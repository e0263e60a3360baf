"""Models of transformers: loaded from a folder or the hub, built small from a configuration, saved for stock transformers.

transformers is imported when a model is asked for, not before; ``pip install 'sparsetrain[text]'`` brings it.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsetrain.errors import MaskStateError, RecipeError, nearest
from sparsetrain.tasks.perplexity import evaluating
from sparsetrain.tasks.places import locate

#: What every configuration takes beside the arguments of its class.
_COMMON = {"num_labels", "rope_theta", "rope_scaling"}


class SavesTokenizer(Protocol):
    """A tokenizer of ``sparsetrain.data``."""

    def save(self, folder: Path) -> None:
        """Write its files."""


def load_network(
    kind: str, model: str | None, config: dict[str, Any] | None, dtype: torch.dtype | str = torch.float32, **options: Any
) -> Any:
    """Return a transformers model: from a folder or hub name, or with random weights from a configuration (in float32).

    On the meta device (``sparsetrain plan``) no weights are read.

    Args:
        kind: ``"CausalLM"``, ``"SequenceClassification"``, or ``""`` for the bare network, such as an encoder.
        model: a ``from_pretrained`` folder (also by its name in ``$SPARSETRAIN_DATA/models``) or a name on the hub.
        config: ``model_type`` and arguments of its configuration, with ``vocab_size``.
        dtype: of what is loaded: float32, as training wants it; ``"auto"``: as it was saved.
        options: of the configuration, over what it says itself (``num_labels``).

    Raises:
        RecipeError: unless exactly one of model and config is given; for a model that is not there, lacks weights or does
            not fit its configuration; for an unknown model type or configuration key; where transformers is missing.

    Example: ``load_network("CausalLM", None, {"model_type": "llama", "vocab_size": 258, "hidden_size": 64})``.
    """
    if (model is None) == (config is None):
        raise RecipeError(f"model={model!r} and config={config!r}: give one of them, a folder or name, or a configuration")
    transformers = _transformers()
    auto = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
    chosen = {key: value for key, value in options.items() if value is not None}
    if config is not None:
        return _built(transformers, auto, config | chosen)
    try:
        folder = locate(str(model))
        if torch.get_default_device().type == "meta":
            return auto.from_config(transformers.AutoConfig.from_pretrained(folder, **chosen))
        with _silent(transformers):
            network, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **chosen)
    except RecipeError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"model {model!r} cannot be loaded as {kind}: {first}. Give a folder that from_pretrained reads, or a hub name"
        ) from error
    if any(".lora_A." in name for name, _ in network.named_parameters()):
        raise RecipeError(
            f"model {model!r} is a LoRA adapter, not a model; merge it into its base first (peft: merge_and_unload, then "
            "save_pretrained)"
        )
    lost = sorted(info["missing_keys"])
    # A classifier's head (and pooler) may be new, a language model may not.
    if kind == "SequenceClassification":
        inside = f"{network.base_model_prefix}."
        lost = [name for name in lost if name.startswith(inside)]
    if kind != "CausalLM":
        lost = [name for name in lost if "pooler." not in name]
    if lost:
        raise RecipeError(f"model {model!r} lacks {lost[0]} and {len(lost) - 1} other weights of {type(network).__name__}")
    return network.train()  # from_pretrained leaves it in eval mode, where nothing drops out


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise RecipeError(
            "language models come from the package transformers, which is missing: pip install 'sparsetrain[text]'"
        ) from error
    return transformers


def _built(transformers: Any, auto: Any, config: dict[str, Any]) -> Any:
    kinds = list(transformers.CONFIG_MAPPING.keys())
    kind = config.get("model_type")
    if kind not in kinds:
        raise RecipeError(f"config.model_type={kind!r} is no model type of transformers.{nearest(str(kind), kinds)}")
    cls = transformers.CONFIG_MAPPING[kind]
    known = {*inspect.signature(cls.__init__).parameters, *(getattr(cls, "attribute_map", None) or {}), *_COMMON, "model_type"}
    for key in config:
        # transformers itself takes whatever it is given, and builds the default in its place.
        if key not in known:
            raise RecipeError(f"config.{key} is no setting of {kind}.{nearest(key, known)}")
    if config.get("vocab_size") is None:
        raise RecipeError(f"config of {kind} has no vocab_size; give that of the tokenizer (data.vocab_size; 258 for 'bytes')")
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        usual = getattr(inspect.signature(cls.__init__).parameters.get(token), "default", None)
        if isinstance(usual, int) and usual >= config["vocab_size"]:
            config = {token: None} | config
    try:
        return auto.from_config(transformers.AutoConfig.for_model(**config))
    except Exception as error:  # each of some hundred model classes has ways of its own to fail
        raise RecipeError(
            f"config of {kind} cannot be built: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """No progress bars, no advice."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def save_pretrained(
    model: nn.Module, folder: str | Path, tokenizer: SavesTokenizer | None = None, overwrite: bool = False
) -> Path:
    """Write a model as a stock transformers folder: configuration, safetensors, tokenizer; zeros are zeros in it.

    Verified before it is there: written beside ``folder``, loaded again by stock ``from_pretrained``, every weight compared
    bit for bit and the logits of a random batch numerically; only then renamed. On failure nothing is left and nothing was
    overwritten. Whatever reads such folders reads this one: ``AutoModelForCausalLM``, lm-evaluation-harness
    (``--model hf --model_args pretrained=FOLDER``), vLLM.

    Args:
        model: a `CausalLM` or `SequenceClassification`, or a model of transformers.
        folder: must be new or empty, unless ``overwrite``.
        tokenizer: of the data (``data.tokenizer``), or of transformers; without one only the model is written.
        overwrite: replace a folder that holds a model.

    Raises:
        RecipeError: for a network that is not of transformers or has adapters in it, or a folder in use.
        MaskStateError: when what was written does not equal the model.

    Example: ``save_pretrained(task, "exported", tokenizer=data.tokenizer)``.
    """
    network: Any = model if hasattr(model, "save_pretrained") else getattr(model, "network", None)
    if not (hasattr(network, "save_pretrained") and hasattr(network, "config")):
        raise RecipeError(f"{type(model).__name__} holds no model of transformers; export its state_dict instead")
    if any(".lora_A." in name for name, _ in network.named_parameters()):
        raise RecipeError(
            "the model holds LoRA adapters that are not merged; merge them first (adapters.merge()), then save it"
        )
    target = Path(folder).resolve()
    require_free(target, overwrite)
    inputs = _inputs(network)
    partial, old = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("partial", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _silent(_transformers()):
            network.save_pretrained(partial)
        if tokenizer is not None:
            getattr(tokenizer, "save", getattr(tokenizer, "save_pretrained", None))(partial)  # type: ignore[misc]
        _verify(network, partial, inputs)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        if isinstance(error, OSError):
            raise RecipeError(f"{folder} cannot be written: {error}; choose another folder") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
    return Path(folder)


def require_free(folder: Path, overwrite: bool = False, way: str = "overwrite=True") -> None:
    """Raise `RecipeError` unless a model may be written to ``folder``: it is new, empty, or holds a model to be replaced.

    ``way``: how whoever asks says ``overwrite``. Example: ``require_free(Path("pruned"), overwrite=True)``.
    """
    target = folder.resolve()
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not overwrite):
        raise RecipeError(f"{target} is in use; choose another folder, or {way} to replace it")
    if Path.cwd().is_relative_to(target):
        raise RecipeError(f"{target} is the working directory, or holds it, and would be replaced; choose another folder")
    if any(target.iterdir()) and not (target / "config.json").is_file():
        raise RecipeError(
            f"{target} holds something that is no model (no config.json) and would be lost; choose another folder"
        )


def _verify(network: Any, folder: Path, inputs: dict[str, Tensor]) -> None:
    """Raise `MaskStateError` unless stock transformers reads the folder as this very model."""
    transformers = _transformers()
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    stock = getattr(transformers, kind, type(network))
    with torch.random.fork_rng(), _silent(transformers):
        again = stock.from_pretrained(folder, dtype=network.dtype).to(network.device)
    written, own = again.state_dict(), network.state_dict()
    for name in dict.fromkeys([*own, *written]):
        if name not in written or name not in own or not _same_bits(own[name], written[name]):
            raise MaskStateError(f"{name} is not the same in {folder.name} as in the model; nothing was written")
    # A cast to bfloat16 rounds what no folder holds (the frequencies of rotary positions); a loaded model has it exact.
    kinds = {name: buffer.dtype for name, buffer in network.named_buffers()}
    for name, buffer in again.named_buffers():
        buffer.data = buffer.data.to(kinds.get(name, buffer.dtype))
    before, after = (_output(part, inputs).float() for part in (network, again))
    worst = float((before - after).abs().max())
    if not worst <= 1e-4 * max(1.0, float(before.abs().max())):
        raise MaskStateError(f"the outputs of {folder.name} differ from the model's by {worst:.2g}; nothing was written")


def _inputs(network: Any) -> dict[str, Tensor]:
    """One random text, image or spectrogram (a classifier without padding token takes no more); `RecipeError` where a model
    does not take them: what is written could not be verified."""
    noise, config = torch.Generator().manual_seed(0), network.config
    text, kind = config.get_text_config(decoder=True), network.main_input_name
    found = {}
    try:
        if kind == "pixel_values":
            found[kind] = torch.randn(1, config.num_channels, config.image_size, config.image_size, generator=noise)
        if kind == "input_features":
            found[kind] = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, generator=noise)
        if kind == "input_ids" or config.is_encoder_decoder:
            length = min(16, getattr(text, "max_position_embeddings", None) or 16)
            ids = torch.randint(text.vocab_size, (1, length), generator=noise)
            names = (*(() if found else ("input_ids",)), *(("decoder_input_ids",) if config.is_encoder_decoder else ()))
            found |= dict.fromkeys(names, ids)
        inputs = {k: v.to(network.device, network.dtype if v.is_floating_point() else v.dtype) for k, v in found.items()}
        finite = bool(torch.isfinite(_output(network, inputs)).all())
    except Exception as error:  # each of some hundred model classes has ways of its own to fail
        raise RecipeError(
            f"{type(network).__name__} cannot be run on a random {kind}, by which what is written is verified: "
            f"{' '.join(str(error).split())}; use its own save_pretrained"
        ) from error
    if not finite:
        raise RecipeError(f"the outputs of {type(network).__name__} hold NaN or infinity; find what diverged before saving it")
    return inputs


@torch.no_grad()
def _output(network: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of a model, or the hidden states of one without a head."""
    with evaluating(network):
        output = network(**inputs)
    found = getattr(output, "logits", None)
    hidden: Tensor = output.last_hidden_state if found is None else found
    return hidden


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)
