"""Where a model's files are: the embedded checkpoint, a folder, or a snapshot of a hub repository."""

from __future__ import annotations

import json
from pathlib import Path

from polar_ray.config import EMBEDDED_MODEL
from polar_ray.errors import CheckpointError

EMBEDDED_FOLDER = Path(__file__).parent.parent / "checkpoints" / "polar-tiny"

HUB_FILES = [
    *("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.model", "tokenizer_config.json"),
    "README*.md",
]
"""All that is ever read of a hub repository: no code, no pickles. Its card publishes rewards to compare with."""


def locate_model(model: str, revision: str | None = None) -> Path:
    """The folder of `model`, downloaded to the hub's cache if it is a repository name and not there yet.

    Raises `CheckpointError` that says what was tried.
    """
    if model == EMBEDDED_MODEL:
        return EMBEDDED_FOLDER
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.count("/") != 1 or model.startswith("."):
        raise CheckpointError(
            f"{model}: no such folder; give a checkpoint's folder or a hub name such as internlm/POLAR-7B"
        )
    return _download(model, revision)


def absolute_model(model: str) -> str:
    """`model` by a name that means the same in another process, whose working folder is another."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def is_untrained(folder: Path) -> bool:
    """Whether the checkpoint says of itself, in config.json, that its weights are random."""
    return bool(json.loads((folder / "config.json").read_bytes()).get("untrained", False))


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError:
        raise CheckpointError(f"{model}: neither a folder here nor a repository on the hub") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{model}: no such folder here, and it could not be downloaded ({type(error).__name__}); "
            "check the name and the network, or give a local folder"
        ) from None
