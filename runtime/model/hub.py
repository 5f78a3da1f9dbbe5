"""Finds a model: in the package, in a local folder, or in the Hugging Face Hub's cache, downloaded if needed.

Nothing here imports torch. `HF_HUB_CACHE` or `HF_HOME` moves the cache, `HF_ENDPOINT` names another Hub.
"""

import logging
import os
import re
import shutil
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NoReturn

from ..checkpoint_folder import CheckpointFolder
from ..errors import CheckpointError
from .download import GGUF_SUFFIX, PARTS, Listing, Progress, download, weight_files

BUNDLED = "afnext-tiny"
"""The model that comes with the package: AF-Next's architecture with 11 million parameters and a closed vocabulary."""

SHORT_NAMES = {
    "tiny": BUNDLED,
    "next": "nvidia/audio-flamingo-next-hf",
    "next-think": "nvidia/audio-flamingo-next-think-hf",
    "next-captioner": "nvidia/audio-flamingo-next-captioner-hf",
}
"""Short names, accepted wherever a model is named, and their full names."""

_BUNDLED_FOLDER = Path(__file__).parent / "afnext_tiny"
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_FILE = re.compile(
    rf"({HUB_NAME.pattern}):([A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*\.gguf)", re.I
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_log = logging.getLogger("afnext")


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine.

    name: the name to load it by; folder: its path; commit: of the Hub, None for the bundled model; nbytes: size on
    disk; complete: whether all of its weights are present.
    """

    name: str
    folder: Path
    commit: str | None
    nbytes: int
    complete: bool

    @property
    def short_name(self) -> str | None:
        """Its short name, if it has one."""
        return next((short for short, name in SHORT_NAMES.items() if name == self.name), None)


def full_name(model: str) -> str:
    """The full name of a short name; other names are unchanged. A local folder of that name takes precedence."""
    return model if Path(model).expanduser().is_dir() else SHORT_NAMES.get(model, model)


def resolve(
    model: str | PathLike[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    weights: bool = True,
    progress: Progress | None = None,
) -> Path:
    """The path of `model`: the folder or GGUF file that it names, the package's own folder for `BUNDLED`, or the
    snapshot of the Hub repository `org/name`, downloaded if needed; for `org/name:FILE.gguf` that file, downloaded with
    the mmproj file beside it if there is one.

    An existing folder or file takes precedence, then short names; a path object, or a string that looks like a path, is
    never interpreted as a Hub name. `revision` is a branch, tag or commit on the Hub. With `offline`, or
    HF_HUB_OFFLINE=1 in the environment, only the cache is used; also, with a warning, if the Hub cannot be reached.
    weights: whether weights are needed, or only the settings. progress: called with (stage, bytes done, total bytes)
    while downloading. Raises CheckpointError, with advice, if the folder or repository is not available.
    """
    name = os.fspath(model)
    folder = Path(name).expanduser()
    if name and (folder.is_dir() or (folder.is_file() and folder.suffix.lower() == GGUF_SUFFIX)):
        if revision is not None:
            kind = "folder" if folder.is_dir() else "file"
            raise CheckpointError(
                f"{folder} is a local {kind}, which has no revision {revision!r}; leave revision out."
            )
        return folder
    name = SHORT_NAMES.get(name, name) if isinstance(model, str) else name
    if isinstance(model, str) and name == BUNDLED:
        if revision is not None:
            raise CheckpointError(f"{BUNDLED} comes with afnext and has no revision {revision!r}; leave revision out.")
        return _BUNDLED_FOLDER
    if name and folder.exists():
        raise CheckpointError(
            f"{folder} is a file but not a GGUF; give a {GGUF_SUFFIX} file, or the folder that holds config.json and "
            "weights."
        )
    if isinstance(model, str) and (found := _HUB_FILE.fullmatch(name)):
        return _snapshot(found[1], revision, offline or _is_offline(), True, progress, found[2]) / found[2]
    if not isinstance(model, str) or not HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"there is no folder {name!r}, and a name on the Hub has the form org/name; check the path. "
            f"Short names are {', '.join(SHORT_NAMES)}."
        )
    return _snapshot(name, revision, offline or _is_offline(), weights, progress)


def pull(model: str, *, revision: str | None = None, progress: Progress | None = None) -> Path:
    """Download a model from the Hub, or the missing part of it, and return its folder. Raises CheckpointError like
    `resolve`, and for a local folder."""
    if Path(model).expanduser().exists():
        raise CheckpointError(f"{model} is here already, as a local folder or file; there is nothing to download.")
    return resolve(model, revision=revision, progress=progress)


def where(model: str | PathLike[str], *, revision: str | None = None) -> Path:
    """The folder of a model on this machine; nothing is downloaded. Raises CheckpointError if it is missing or
    incomplete."""
    return resolve(model, revision=revision, offline=True)


def local_models() -> list[LocalModel]:
    """The models on this machine: the bundled one, packed copies, named by their folders, and models of the family in
    the Hub's cache."""
    from huggingface_hub import scan_cache_dir

    models = [LocalModel(BUNDLED, _BUNDLED_FOLDER, None, _bytes_in(_BUNDLED_FOLDER), True)]
    for folder in sorted(packed_folder().glob("*/")):
        complete = not folder.name.startswith(".")
        models.append(LocalModel(str(folder), folder, None, _bytes_in(folder), complete))
    cache = cache_folder()
    if not cache.is_dir():
        return models
    for repo in sorted(scan_cache_dir(cache).repos, key=lambda repo: repo.repo_id):
        for revision in sorted(repo.revisions, key=lambda revision: revision.last_modified, reverse=True):
            folder = revision.snapshot_path
            if repo.repo_type == "model" and _is_of_the_family(folder):
                nbytes = revision.size_on_disk + sum(
                    path.stat().st_size for path in repo.repo_path.glob("blobs/*.incomplete")
                )
                models.append(LocalModel(repo.repo_id, folder, revision.commit_hash, nbytes, _is_complete(folder)))
    return models


def remove(model: str) -> int:
    """Delete a packed copy, or a model in the Hub's cache with all its revisions and partial downloads; return the
    number of bytes freed. Raises CheckpointError for a model that is in neither place."""
    name = full_name(model)
    if name == BUNDLED:
        raise CheckpointError(f"{BUNDLED} comes with afnext; uninstalling afnext removes it.")
    if Path(name).is_dir() and Path(name).resolve().parent == packed_folder().resolve():
        freed = _bytes_in(Path(name))
        shutil.rmtree(name)
        return freed
    repository = _repository(name) if HUB_NAME.fullmatch(name) else None
    if repository is None or not repository.is_dir():
        raise CheckpointError(f"{name} is not in the Hub's cache; `afnext models list` shows what is there.")
    freed = _bytes_in(repository)
    shutil.rmtree(repository)
    shutil.rmtree(cache_folder() / ".locks" / repository.name, ignore_errors=True)
    return freed


def cache_folder() -> Path:
    """The folder of the Hub's cache, shared by all programs that use the Hub's client."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def packed_folder() -> Path:
    """The folder of packed copies: below AFNEXT_CACHE, or else $XDG_CACHE_HOME/afnext, or ~/.cache/afnext."""
    cache = os.environ.get("AFNEXT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "afnext")
    return Path(cache).expanduser() / "packed"


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _repository(name: str) -> Path:
    return cache_folder() / f"models--{name.replace('/', '--')}"


def _snapshot(
    name: str,
    revision: str | None,
    offline: bool,
    weights: bool,
    progress: Progress | None,
    file: str | None = None,
) -> Path:
    cached = _cached(name, revision)
    usable = cached if cached is not None and (not weights or _is_complete(cached, file)) else None
    if usable is not None and (offline or _COMMIT.fullmatch(revision or "")):
        return usable
    if offline:
        _raise_not_cached(name if file is None else f"{name}:{file}", revision, cached)
    try:
        listing = Listing.fetch(name, revision)
        if usable is not None and usable.name == listing.commit:
            return usable
        return download(listing, cache_folder(), revision, weights=weights, file=file, progress=progress)
    except CheckpointError as problem:
        raise CheckpointError(f"{name}: {problem}") from None
    except Exception as problem:  # the transport of the Hub's client, and its errors, change between versions
        from huggingface_hub import errors

        if usable is None or isinstance(problem, errors.RevisionNotFoundError):
            _explain(name, revision, problem)
        _log.warning(
            "the Hub did not answer for %s (%s); loading what is in the cache, commit %s, which may be out of date",
            name,
            type(problem).__name__,
            usable.name[:12],
        )
        return usable


def _cached(name: str, revision: str | None) -> Path | None:
    """The snapshot of a revision in the cache, complete or not. Raises CheckpointError for an invalid revision."""
    revision = revision or "main"
    if ".." in revision or revision.startswith("/") or "\\" in revision:
        raise CheckpointError(f"{revision!r} is not a revision; give a branch, tag or commit.")
    repository = _repository(name)
    reference = repository / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder = repository / "snapshots" / commit
    return folder if _COMMIT.fullmatch(commit) and folder.is_dir() else None


def _is_complete(folder: Path, file: str | None = None) -> bool:
    """Whether all weights that loading reads are in `folder`; file: the GGUF file that holds them."""
    if file is not None:
        return (folder / file).is_file()
    files = {part + path.name for part in PARTS for path in (folder / part).glob("*") if path.is_file()}
    try:
        return bool(weight_files(files, folder))
    except CheckpointError:
        return False


def _is_of_the_family(folder: Path) -> bool:
    """Whether a snapshot holds the settings of a model that afnext loads."""
    from .config import MODEL_TYPES

    if all((folder / part).is_dir() for part in PARTS):
        return True
    try:
        return CheckpointFolder(folder).settings("config.json").get("model_type") in MODEL_TYPES
    except CheckpointError:
        return False


def _bytes_in(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _raise_not_cached(name: str, revision: str | None, cached: Path | None) -> NoReturn:
    at = f"{name} at revision {revision}" if revision else name
    if cached is None:
        found = "is not in the local cache"
    else:
        found = "is in the local cache in part only, since its download was interrupted"
    advice = "unset HF_HUB_OFFLINE and run" if _is_offline() else "run"
    raise CheckpointError(f"{at} {found}; {advice} `afnext models pull {name}` to download it.")


def _explain(name: str, revision: str | None, problem: Exception) -> NoReturn:
    """Raise the CheckpointError for an error of huggingface_hub, the most specific first, since its classes overlap."""
    from huggingface_hub import errors

    at = f"{name} at revision {revision}" if revision else name
    if isinstance(problem, errors.GatedRepoError):
        advice = "is gated: accept its terms on huggingface.co, then log in with `hf auth login` or set HF_TOKEN."
    elif isinstance(problem, errors.RepositoryNotFoundError):
        advice = "is not on the Hub, or is private: check the name, or log in with `hf auth login` or set HF_TOKEN."
    elif isinstance(problem, errors.RevisionNotFoundError):
        advice = "is not on the Hub, though the repository is: check the revision."
    elif isinstance(problem, errors.LocalEntryNotFoundError):
        advice = "is not in the local cache, and the Hub cannot be reached: check the network, or give a local folder."
    elif isinstance(problem, errors.HFValidationError):
        advice = (
            "is not a valid name on the Hub, which has the form org/name. A local folder of that name does not exist "
            "either."
        )
    else:
        advice = (
            f"could not be downloaded from the Hub ({type(problem).__name__}); check network and disk, then retry: "
            "the download continues where it stopped."
        )
    raise CheckpointError(f"{at} {advice}") from problem
