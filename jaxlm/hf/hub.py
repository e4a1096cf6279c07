"""Where a model or adapter is on this machine, downloaded from the Hugging Face hub if need be."""

from __future__ import annotations

from pathlib import Path

from jaxlm.core.errors import UserError

__all__ = ["local"]

# What is downloaded of a repository: weights, settings, and all that tokenizers are kept in.
_FILES = ("*.json", "*.safetensors", "*.model", "*.spm", "merges.txt", "*.jinja")


def local(path: str | Path) -> Path:
    """Where a model or adapter is, downloaded if need be."""
    if str(path).startswith("hf://"):
        return _download(str(path).removeprefix("hf://"))
    return Path(path).expanduser()


def _download(name: str) -> Path:
    """A repository of the Hugging Face hub, ``org/name`` or ``org/name@revision``, in the local cache.

    The cache, the token and the offline switch are those of huggingface_hub: HF_HOME, HF_TOKEN (or ``hf auth login``),
    HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(_FILES)))
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"hf://{name} is not in the cache, and HF_HUB_OFFLINE is set: unset it once") from None
        raise UserError(f"hf://{name} is not in the cache, and the hub cannot be reached: check the network") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"hf://{name} cannot be downloaded ({reason}); check the name and the network, and HF_TOKEN where it is "
            "not public"
        ) from None
