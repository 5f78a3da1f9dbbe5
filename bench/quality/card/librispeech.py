"""LibriSpeech, test-clean and test-other.

    local   LibriSpeech/test-clean/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt beside its .flac files, as in the archives
    hub     openslr/librispeech_asr: id, audio, text

Source: Panayotov et al. 2015.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from ..data import Item, Items, ManifestError, inside, string
from .rows import Fingerprint, Recordings, Row, items_of


def local(part: str) -> Callable[[Path, Path], Items]:
    """A reader of one part, such as test-clean, from the folder LibriSpeech, its parent or the part's own folder."""

    def read(folder: Path, _unpacked: Path) -> Items:
        root = next((path for path in (folder / "LibriSpeech" / part, folder / part, folder) if path.is_dir()), folder)
        transcripts = sorted(root.glob("*/*/*.trans.txt"))
        if not transcripts:
            raise ManifestError(f"{root} has no SPEAKER/CHAPTER/*.trans.txt; name the folder that holds {part}")
        fingerprint, items = Fingerprint(), list[Item]()
        for path in transcripts:
            for line in path.read_text(encoding="utf-8").splitlines():
                key, _, words = line.strip().partition(" ")
                if not key:
                    continue
                fingerprint.add({key: words})
                audio = inside(path.parent, f"{key}.flac", f"{path}, {key}")
                if not audio.is_file():
                    raise ManifestError(f"{path} names {key}, and {audio.name} is not beside it")
                name = audio.relative_to(root.resolve()).as_posix()
                items.append(Item(len(items) + 1, key, audio, name, words))
        return Items(items, str(fingerprint))

    return read


def from_rows(rows: Iterable[Row], recordings: Recordings) -> Items:
    """The utterances of a table."""

    def item(row: Row, number: int, where: str) -> Item:
        key = string(row, "id", where)
        return Item(number, key, recordings.of(row.get("audio"), number, where), key, string(row, "text", where))

    return items_of(rows, item)
