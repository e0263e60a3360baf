"""Where a model is: a folder, a folder in the shared data, the hub or its cache; what is nowhere is told at once."""

from __future__ import annotations

import re
from pathlib import Path

from sparsetrain.data.tokens import find_model
from sparsetrain.errors import RecipeError

#: A name on the hub, with or without its owner.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def locate(model: str) -> str:
    """What ``from_pretrained`` is to be given for a model: its folder, or its name on a hub that answers.

    Raises `RecipeError` for a path (all that is no ``NAME`` or ``OWNER/NAME``) that is not there, and for a name on a hub that
    does not answer, unless the model is in its cache. Example: ``AutoConfig.from_pretrained(locate("models/llama"))``.
    """
    place = find_model(model)
    if Path(place).exists():
        return place
    if not _HUB_NAME.fullmatch(place):
        raise RecipeError(f"there is no model {model!r}: {Path(place).absolute()} does not exist; give a folder, or a hub name")
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # Asked once: from_pretrained asks for minutes, for each of several files.
        get_hf_file_metadata(hf_hub_url(place, "config.json"), timeout=5)
    except HfHubHTTPError:  # an answer, if only that there is none, or not for you: from_pretrained says which
        pass
    except Exception as error:  # no network, one that swallows all, HF_HUB_OFFLINE: each has an error of its own
        try:
            return snapshot_download(place, local_files_only=True)
        except Exception as missing:
            raise RecipeError(
                f"there is no model {model!r}: no folder {Path(place).absolute()}, nothing of that name in the cache, and the "
                f"hub does not answer ({' '.join(str(error).split())[:120]})"
            ) from missing
    return place
