"""MMAU (test-mini, v05.15.25) and MMAR: 1000 multiple-choice questions each.

    mmau    mmau-test-mini.json with `audio_id` relative to it
    mmar    MMAR-meta.json with `audio_path` relative to it

Sources: Sakshi et al. 2024 (MMAU), Ma et al. 2025 (MMAR).
"""

from collections.abc import Callable
from pathlib import Path

from ..data import Items, ManifestError, read_manifest


def local(file: str) -> Callable[[Path, Path], Items]:
    """A reader of the JSON list `file`, given its path or its folder."""

    def read(folder: Path, _unpacked: Path) -> Items:
        path = folder / file if folder.is_dir() else folder
        if not path.is_file():
            raise ManifestError(f"{folder} has no {file}; name that file or its folder")
        manifest = read_manifest(path, "choice")
        missing = [item.audio_name for item in manifest.items if item.audio is None or not item.audio.is_file()]
        if missing:
            raise ManifestError(f"{path} names {len(missing)} recordings that are not there, first {missing[0]!r:.200}")
        return Items(manifest.items, manifest.fingerprint)

    return read
