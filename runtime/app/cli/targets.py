"""The recordings that `afnext transcribe` reads, and the output paths of the transcripts."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ....kernels.errors import AfnextError
from ...errors import AudioError
from .output import descriptor
from .sources import STDIN

SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in """
    3gp aac ac3 aif aiff amr au avi caf flac m4a m4b m4v mka mkv mov mp2 mp3 mp4 mpeg mpg mts oga ogg opus ts wav webm
    wma wmv
    """.split()  # noqa: SIM905
)
"""Suffixes of the files that are read from a folder; a file named directly may have any suffix."""


@dataclass(frozen=True)
class Recording:
    """A recording: its path or "-", and its path relative to the named folder."""

    source: str
    below: Path


def recordings(names: Sequence[str]) -> list[Recording]:
    """The named files and, sorted, the files at any depth in the named folders.

    Hidden files and folders are skipped, and links to folders are not followed. Raises AudioError for a folder without
    any.
    """
    return [recording for name in names for recording in _found(name)]


def _found(name: str) -> list[Recording]:
    if name == STDIN:
        return [Recording(STDIN, Path("stdin"))]
    if not os.path.isdir(name):
        return [Recording(name, Path(Path(name).name))]
    found = []
    for folder, folders, files in os.walk(name):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and Path(file).suffix.lower() in SUFFIXES:
                path = Path(folder, file)
                found.append(Recording(str(path), path.relative_to(name)))
    if not found:
        raise AudioError(f"the folder {name} holds no audio or video files; name the files, or another folder.")
    return found


def is_folder(output: str, count: int) -> bool:
    """Whether `--output` is a folder: it ends in a slash, exists as one, or receives several transcripts."""
    separators = tuple(filter(None, (os.sep, os.altsep)))
    return output.endswith(separators) or Path(output).is_dir() or count > 1


def output_paths(found: Sequence[Recording], output: str | None, suffix: str, *, several: bool) -> list[Path | None]:
    """The output path of each transcript: None for stdout, one file, or files in a folder.

    In a folder each has the name of its recording. Equal names keep the recordings' subfolders and, if necessary, their
    suffixes. several: treat `output` as a folder in any case. Raises AfnextError if two transcripts had the same path,
    or one would replace a recording.
    """
    if output is None or descriptor(output) == 1:
        return [None] * len(found)
    if not (several or is_folder(output, len(found))):
        paths = [Path(output)]
    else:
        if Path(output).exists() and not Path(output).is_dir():
            raise AfnextError(f"{output} is a file; several transcripts need a folder, so choose another --output.")
        paths = [Path(output, name) for name in _names(found, suffix)]
    files = {_identity(recording.source) for recording in found if os.path.exists(recording.source)}
    for path in paths:
        if path.exists() and _identity(path) in files:
            raise AfnextError(f"{path} is a recording; choose another --output.")
    return list(paths)


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _names(found: Sequence[Recording], suffix: str) -> list[Path]:
    """A name for each transcript: its recording's, with more of the path and the suffix if names are equal."""
    common = _below_common([recording.source for recording in found])
    names = [_named(recording.below, suffix, whole=False) for recording in found]
    for whole in (False, True):
        counts = Counter(map(_key, names))
        names = [
            name if counts[_key(name)] == 1 else _named(path, suffix, whole=whole)
            for name, path in zip(names, common, strict=True)
        ]
    counts = Counter(map(_key, names))
    for name in names:
        if counts[_key(name)] > 1:
            raise AfnextError(f"several transcripts would be written to {name}; name each recording only once.")
    return names


def _key(path: Path) -> str:
    return str(path).casefold()  # some file systems ignore case


def _named(path: Path, suffix: str, *, whole: bool) -> Path:
    return path.with_name(f"{path.name}.{suffix}") if whole else path.with_suffix(f".{suffix}")


def _below_common(sources: Sequence[str]) -> list[Path]:
    """The paths relative to their deepest common folder."""
    paths = [Path("stdin") if source == STDIN else Path(os.path.abspath(source)) for source in sources]
    files = [str(path.parent) for path in paths if path.is_absolute()]
    try:
        common = os.path.commonpath(files) if files else ""
    except ValueError:  # the paths are on several drives
        common = ""
    return [path.relative_to(common) if path.is_absolute() and common else Path(path.name) for path in paths]
