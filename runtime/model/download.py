"""Downloads a checkpoint from the Hugging Face Hub into its cache: only what is loaded, resumed after interruptions.

The Hub's client manages the layout of its cache; this module adds what the client lacks. Only the weights that are
loaded are downloaded (one file or shards, never both, no pickle), free disk space is checked first, an interrupted file
is resumed, in the next process too, and the SHA-256 of each file of weights is compared with the Hub's.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..files import read_json_object, shown

if TYPE_CHECKING:
    from typing_extensions import Self

SINGLE_FILE = "model.safetensors"
INDEX_FILE = f"{SINGLE_FILE}.index.json"
GGUF_SUFFIX = ".gguf"
PARTS = ("", "llm/", "sound_tower/", "sound_mm_projector/")
"""Folders of a checkpoint's files: the top, or those of NVIDIA's component layout."""

# Text files that loading reads, and the licence: neither pickle nor code is ever downloaded.
_TEXTS = ("*.json", "*.jinja", "LICENSE*", "NOTICE*")
_MAX_TEXT_BYTES = 1 << 26
_READ_AT_ONCE = 1 << 24
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its bytes, and its SHA-256 if it is stored in LFS."""

    nbytes: int
    sha256: str | None


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    name: str
    commit: str
    files: Mapping[str, RemoteFile]

    @classmethod
    def fetch(cls, name: str, revision: str | None) -> "Listing":
        """Ask the Hub. Raises what its client raises, and CheckpointError for an invalid answer."""
        from huggingface_hub import HfApi

        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        files = {
            file.rfilename: RemoteFile(file.size or 0, file.lfs.sha256 if file.lfs else None)
            for file in info.siblings or ()
        }
        hashes = [info.sha, *(file.sha256 for file in files.values() if file.sha256 is not None)]
        if wrong := [value for value in hashes if not _HASH.fullmatch(value or "")]:  # hashes become file names
            raise CheckpointError(f"the Hub's answer has {shown(wrong[0])} in the place of a hash; check HF_ENDPOINT.")
        return cls(name, str(info.sha), files)


def text_files(files: Iterable[str]) -> list[str]:
    """The settings, templates and licence among `files`. The index of shards is left out if there is a single file of
    weights beside it: some repositories have the same weights twice."""
    names = set(files)
    return sorted(
        name
        for name in names
        if (folder := name.rpartition("/")[0]) in ("", *(part.rstrip("/") for part in PARTS))
        and any(fnmatch(name.rpartition("/")[2], pattern) for pattern in _TEXTS)
        and not (name.endswith(INDEX_FILE) and f"{folder}/{SINGLE_FILE}".lstrip("/") in names)
    )


def weight_files(files: Collection[str], folder: Path) -> list[str]:
    """The weight files among `files` that loading reads; the text files are already in `folder`.

    Raises CheckpointError if there are none, or if an index names a file that does not exist.
    """
    parts = PARTS[:1] if _has_weights("", files) else PARTS[1:]
    found: list[str] = []
    for part in parts:
        if part + SINGLE_FILE in files:
            found.append(part + SINGLE_FILE)
        elif part + INDEX_FILE in files:
            found += _shards(part, files, folder)
        else:
            gguf = sorted(name for name in files if name.lower().endswith(GGUF_SUFFIX))
            hint = f" Name one of its GGUF files, as in org/name:{gguf[0]}." if gguf else ""
            raise CheckpointError(
                f"there are no safetensors weights: neither {SINGLE_FILE} nor {INDEX_FILE}, nor the folders "
                f"{', '.join(PARTS[1:])} with one of them. Weights in pickle are never downloaded.{hint}"
            )
    return found


def gguf_weights(files: Collection[str], file: str) -> list[str]:
    """A GGUF file of a repository, and the mmproj file in the same folder, if there is one.

    Raises CheckpointError if the file does not exist, or there are several mmproj files.
    """
    there = sorted(name for name in files if name.lower().endswith(GGUF_SUFFIX))
    if file not in there:
        raise CheckpointError(
            f"there is no file {file}; the repository has {', '.join(there[:20]) or 'no GGUF files'}."
        )
    folder = file.rpartition("/")[0]
    beside = [name for name in there if "mmproj" in name.lower() and name.rpartition("/")[0] == folder and name != file]
    if len(beside) > 1:
        raise CheckpointError(
            f"several mmproj files lie beside {file} ({', '.join(beside[:5])}); download it and one of them into a "
            "separate folder, and give that folder."
        )
    return [file, *beside]


def _has_weights(part: str, files: Collection[str]) -> bool:
    return part + SINGLE_FILE in files or part + INDEX_FILE in files


def _shards(part: str, files: Collection[str], folder: Path) -> list[str]:
    index = read_json_object(folder / part / INDEX_FILE, part + INDEX_FILE, CheckpointError, _MAX_TEXT_BYTES)
    weight_map = index.get("weight_map")
    names = sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []
    missing = [name for name in names if part + name not in files or not _SHARD.fullmatch(name)]
    if not names or missing:
        what = f"names {shown(missing[0])}, which the repository lacks" if missing else "has no weight_map"
        raise CheckpointError(f"{part}{INDEX_FILE} {what}; the repository is incomplete.")
    return [part + name for name in names]


def download(
    listing: Listing,
    cache: Path,
    revision: str | None,
    *,
    weights: bool = True,
    file: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Download the files of a listed repository that loading reads, and return the folder of the snapshot.

    weights: whether to download the weights, too; file: the GGUF file to download instead of them; progress: called
    with (stage, bytes done, total bytes). Raises CheckpointError for a repository without usable weights, too little
    disk space and damaged files, and what the Hub's client raises.
    """
    from huggingface_hub import snapshot_download

    def snapshot(names: list[str]) -> Path:
        return Path(
            snapshot_download(
                listing.name, revision=revision, cache_dir=cache, allow_patterns=names, tqdm_class=_silent_bar()
            )
        )

    texts = text_files(listing.files)
    if large := [name for name in texts if listing.files[name].nbytes > _MAX_TEXT_BYTES]:
        raise CheckpointError(f"{large[0]} is larger than {_MAX_TEXT_BYTES:,} bytes, more than settings ever need.")
    folder = snapshot(texts)
    if not weights:
        return folder
    needed = weight_files(listing.files, folder) if file is None else gguf_weights(listing.files, file)
    repository = folder.parents[1]
    missing = {name: listing.files[name] for name in needed if not (folder / name).exists()}
    blobs = {name: repository / "blobs" / (file.sha256 or "") for name, file in missing.items()}
    there = sum(_partial_bytes(blobs[name], file) for name, file in missing.items())
    total = sum(listing.files[name].nbytes for name in needed)
    check_disk_space(sum(file.nbytes for file in missing.values()) - there, cache)
    bar = _Bar(progress, done=total - sum(file.nbytes for file in missing.values()), total=total)
    for name, remote in missing.items():
        if remote.sha256 is not None:
            _download_blob(listing, name, remote, blobs[name], cache, bar)
    return snapshot([*texts, *needed])


def check_disk_space(nbytes: int, folder: Path) -> None:
    """Raise CheckpointError unless the disk of `folder` has room for `nbytes`, with 64 MiB to spare."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > 0 and nbytes + (1 << 26) > free:
        raise CheckpointError(
            f"{nbytes / 1e9:.1f} GB are still to be downloaded, and the disk of {folder} has {free / 1e9:.1f} GB free. "
            "Free some space (`afnext models list` shows what is there), or set HF_HOME to a folder on another disk."
        )


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _partial_bytes(blob: Path, file: RemoteFile) -> int:
    """Bytes of a file that are in the cache although no snapshot refers to them yet."""
    if file.sha256 is None:
        return 0
    if blob.exists():
        return file.nbytes
    return _partial(blob).stat().st_size if _partial(blob).exists() else 0


def _download_blob(listing: Listing, name: str, file: RemoteFile, blob: Path, cache: Path, bar: "_Bar") -> None:
    """Download one file of weights into the cache's blobs, resuming an earlier download."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    url = hf_hub_url(listing.name, name, revision=listing.commit)
    lock = cache / ".locks" / blob.parents[1].name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            bar.update(file.nbytes)
            return
        partial = _partial(blob)
        if partial.exists() and partial.stat().st_size > file.nbytes:
            partial.unlink()
        metadata = get_hf_file_metadata(url)
        headers = build_hf_headers()
        if _host(metadata.location) != _host(url):  # a signed URL of a file server, which must not get the token
            headers.pop("authorization", None)
        with partial.open("ab") as target:
            tqdm_class: Any = bar
            http_get(
                metadata.location,
                target,
                resume_size=target.tell(),
                headers=headers,
                expected_size=file.nbytes,
                displayed_filename=name,
                tqdm_class=tqdm_class,
            )
        _check_hash(partial, file, name)
        os.replace(partial, blob)


def _host(url: str) -> str:
    from urllib.parse import urlsplit

    return urlsplit(url).netloc


def _check_hash(path: Path, file: RemoteFile, name: str) -> None:
    """Raise CheckpointError, and delete the file, unless its hash is the Hub's."""
    digest = hashlib.sha256()
    with path.open("rb") as data:
        while piece := data.read(_READ_AT_ONCE):
            digest.update(piece)
    if digest.hexdigest() != file.sha256:
        path.unlink()
        raise CheckpointError(f"{name} was damaged on its way: its SHA-256 is not the Hub's. Download it again.")


class _Bar:
    """Reports bytes to a Progress callback, or shows the bar of the Hub's client. Replaces a tqdm class."""

    def __init__(self, progress: Progress | None, *, done: int, total: int):
        self._report = progress
        self._done, self._total = done, total
        self._shown: Any = None
        if progress is None and done < total:
            from huggingface_hub.utils import tqdm

            self._shown = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="downloading")

    def __call__(self, *, initial: int = 0, **options: Any) -> "Self":
        self.update(initial)
        return self

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def update(self, nbytes: int) -> None:
        """Count bytes; negative if the server restarts a download."""
        self._done += nbytes
        if self._report is not None:
            self._report("downloading", self._done, self._total)
        if self._shown is not None:
            self._shown.update(nbytes)


def _silent_bar() -> Any:
    """A tqdm class that shows nothing, for settings files of a few kilobytes."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    return Silent
