"""Where a model lies: in the package, in a local folder, or on the Hugging Face Hub, downloaded into its cache."""

import os
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NoReturn

from ..errors import CheckpointError

# Weights and text only: neither pickle nor code ever reaches the disk.
ALLOWED_FILES = ("*.safetensors", "*.json", "*.jinja")

BUNDLED = "afnext-tiny"
"""The model that comes with the package: AF-Next's architecture with 8 million parameters and a closed vocabulary."""

_BUNDLED_FOLDER = Path(__file__).parent / "afnext_tiny"
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def resolve(
    model: str | PathLike[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    files: Sequence[str] = ALLOWED_FILES,
) -> Path:
    """The local folder of `model`: the folder that it names, the package's own for `BUNDLED`, or the snapshot of the
    Hub repository `org/name`.

    A folder that exists comes first; a path object, or a string that looks like a path, is never taken for a Hub name.
    `revision` is a branch, tag or commit on the Hub; `files` are patterns of what is downloaded from there. With
    `offline`, or HF_HUB_OFFLINE=1 in the environment, only the cache is looked at. Raises CheckpointError saying what
    to do when the folder or repository cannot be had.
    """
    name = os.fspath(model)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{folder} is a local folder, which has no revision {revision!r}; leave revision out."
            )
        return folder
    if model == BUNDLED:
        if revision is not None:
            raise CheckpointError(f"{BUNDLED} comes with afnext and has no revision {revision!r}; leave revision out.")
        return _BUNDLED_FOLDER
    if name and folder.exists():
        raise CheckpointError(f"{folder} is a file; give the folder that holds config.json and the weights.")
    if not isinstance(model, str) or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"there is no folder {name!r}, and a name on the Hub would read org/name; check the path."
        )
    return _snapshot(name, revision, offline or _is_offline(), files)


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _snapshot(name: str, revision: str | None, offline: bool, files: Sequence[str]) -> Path:
    # Imported here: most runs read a local folder and need none of it.
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(files), local_files_only=offline
            )
        )
    except Exception as problem:  # the transport below the Hub's client, and its errors, change between versions
        _explain(name, revision, offline, problem)


def _explain(name: str, revision: str | None, offline: bool, problem: Exception) -> NoReturn:
    """Raise the CheckpointError for what huggingface_hub reported; most telling first, since its classes overlap."""
    from huggingface_hub import errors

    at = f"{name} at revision {revision}" if revision else name
    if isinstance(problem, errors.GatedRepoError):
        advice = "is gated: accept its terms on huggingface.co, then log in with `hf auth login` or set HF_TOKEN."
    elif isinstance(problem, errors.RepositoryNotFoundError):
        advice = "is not on the Hub, or is private: check the name, or log in with `hf auth login` or set HF_TOKEN."
    elif isinstance(problem, errors.RevisionNotFoundError):
        advice = "is not on the Hub, though the repository is: check the revision."
    elif isinstance(problem, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled) and offline:
        advice = (
            "is not in the local cache, and the Hub is off limits: unset HF_HUB_OFFLINE (and offline) to download it."
        )
    elif isinstance(problem, errors.LocalEntryNotFoundError):
        advice = "is not in the local cache, and the Hub cannot be reached: check the network, or give a local folder."
    elif isinstance(problem, errors.HFValidationError):
        advice = (
            "is no valid name on the Hub; it would read org/name. A local folder of that name does not exist either."
        )
    else:
        advice = f"could not be downloaded from the Hub ({type(problem).__name__}); check network and disk, then retry."
    raise CheckpointError(f"{at} {advice}") from problem
