"""Models and adapters on the Hugging Face hub: ``hf://org/name`` is downloaded and becomes a local path."""

from __future__ import annotations

from pathlib import Path

from jaxlm.core.errors import UserError

__all__ = ["local_path"]

# The files of a repository that are downloaded: weights, settings, and all files of tokenizers.
DOWNLOADED_FILES = ("*.json", "*.safetensors", "*.model", "*.spm", "merges.txt", "*.jinja")


def local_path(path: str | Path) -> Path:
    """The local path of a model or adapter: a path itself, or ``hf://org/name`` (maybe with ``@revision``), which is
    downloaded first.

    Raises:
        UserError: it cannot be downloaded.
    """
    if str(path).startswith("hf://"):
        return _download(str(path).removeprefix("hf://"))
    return Path(path).expanduser()


def _download(name: str) -> Path:
    """The directory of a repository, ``org/name`` or ``org/name@revision``, in the cache of huggingface_hub.

    Its environment variables hold: HF_HOME (the cache), HF_TOKEN (or ``hf auth login``), HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(DOWNLOADED_FILES)))
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
