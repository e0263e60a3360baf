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

from sparsetrain.data.tokens import find_model
from sparsetrain.errors import MaskStateError, RecipeError, nearest

#: What every configuration takes beside the arguments of its class.
_COMMON = {"num_labels", "rope_theta", "rope_scaling"}


class SavesTokenizer(Protocol):
    """A tokenizer of ``sparsetrain.data``."""

    def save(self, folder: Path) -> None:
        """Write its files."""


def load_network(kind: str, model: str | None, config: dict[str, Any] | None, **options: Any) -> Any:
    """Return a transformers model in float32: from a folder or hub name, or with random weights from a configuration.

    On the meta device (``sparsetrain plan``) no weights are read.

    Args:
        kind: ``"CausalLM"``, ``"SequenceClassification"``, or ``""`` for the bare network, such as an encoder.
        model: a ``from_pretrained`` folder (also by its name in ``$SPARSETRAIN_DATA/models``) or a name on the hub.
        config: ``model_type`` and arguments of its configuration, with ``vocab_size``.
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
        folder = find_model(str(model))
        if torch.get_default_device().type == "meta":
            return auto.from_config(transformers.AutoConfig.from_pretrained(folder, **chosen))
        with _silent(transformers):
            network, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **chosen)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"model {model!r} cannot be loaded as {kind}: {first}. Give a folder that from_pretrained reads, or a hub name"
        ) from error
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
        overwrite: replace a folder that is there.

    Raises:
        RecipeError: for a network that is not of transformers, or a folder in use.
        MaskStateError: when what was written does not equal the model.

    Example: ``save_pretrained(task, "exported", tokenizer=data.tokenizer)``.
    """
    network: Any = model if hasattr(model, "save_pretrained") else getattr(model, "network", None)
    if not (hasattr(network, "save_pretrained") and hasattr(network, "config")):
        raise RecipeError(f"{type(model).__name__} holds no model of transformers; export its state_dict instead")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not overwrite)):
        raise RecipeError(f"{target} is in use; choose another folder, or overwrite=True to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("partial", "old"))
    try:
        with _silent(_transformers()):
            network.save_pretrained(partial)
        if tokenizer is not None:
            getattr(tokenizer, "save", getattr(tokenizer, "save_pretrained", None))(partial)  # type: ignore[misc]
        _verify(network, partial)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
    return target


def _verify(network: Any, folder: Path) -> None:
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
    config = network.config.get_text_config()
    length = min(16, getattr(config, "max_position_embeddings", None) or 16)
    # One text: a classifier without padding token takes no more.
    ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(network.device)
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            before, after = (_output(part, ids).float() for part in (network, again.eval()))
    finally:
        network.train(training)
    worst = float((before - after).abs().max())
    if not worst <= 1e-4 * max(1.0, float(before.abs().max())):
        raise MaskStateError(f"the outputs of {folder.name} differ from the model's by {worst:.2g}; nothing was written")


def _output(network: nn.Module, ids: Tensor) -> Tensor:
    """The logits of a model, or the hidden states of one without a head."""
    output = network(ids)
    found = getattr(output, "logits", None)
    hidden: Tensor = output.last_hidden_state if found is None else found
    return hidden


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)
