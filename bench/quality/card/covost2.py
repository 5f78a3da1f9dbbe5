"""CoVoST 2: speech translation from English into 15 languages and from 21 languages into English, the test split.

    local   covost_v2.SOURCE_TARGET.test.tsv (path, sentence, translation, client_id) from the publisher's script, or
            the script's inputs: covost_v2.SOURCE_TARGET.tsv (path, translation, split) and Common Voice's
            validated.tsv. Recordings are in clips/ or SOURCE/clips/, as Common Voice 4 unpacks
    hub     fixie-ai/covost2, configuration SOURCE_TARGET: id, audio, sentence, translation

Source: Wang et al. 2020, arXiv:2007.10310.
"""

import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..data import Item, Items, ManifestError, string
from .rows import Recordings, Row, items_of

LANGUAGES = {
    "ar": "Arabic",
    "ca": "Catalan",
    "cy": "Welsh",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "fa": "Persian",
    "fr": "French",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "lv": "Latvian",
    "mn": "Mongolian",
    "nl": "Dutch",
    "pt": "Portuguese",
    "ru": "Russian",
    "sl": "Slovenian",
    "sv-SE": "Swedish",
    "ta": "Tamil",
    "tr": "Turkish",
    "zh-CN": "Chinese",
}
_TARGETS = ("ar", "ca", "cy", "de", "et", "fa", "id", "ja", "lv", "mn", "sl", "sv-SE", "ta", "tr", "zh-CN")
PAIRS = tuple(("en", target) for target in _TARGETS) + tuple((source, "en") for source in LANGUAGES if source != "en")
"""Every source and target of the corpus."""


def local(source: str, target: str) -> Callable[[Path, Path], Items]:
    """A reader of the test split of one pair, from a folder with its table and Common Voice's recordings."""

    def read(folder: Path, unpacked: Path) -> Items:
        spoken = folder / source if (folder / source / "clips").is_dir() else folder
        return from_rows(_test_rows(folder, spoken, f"{source}_{target}"), Recordings(spoken / "clips", unpacked))

    return read


def _test_rows(folder: Path, spoken: Path, pair: str) -> Iterator[Row]:
    """Rows of the test split as in the publisher's script: those of its table that Common Voice has validated."""
    split, whole, validated = (
        folder / f"covost_v2.{pair}.test.tsv",
        folder / f"covost_v2.{pair}.tsv",
        spoken / "validated.tsv",
    )
    if split.is_file():
        yield from _tsv(split, ("path", "translation"))
        return
    missing = [path for path in (whole, validated) if not path.is_file()]
    if missing:
        raise ManifestError(
            f"{folder} has no {split.name}, and to make it {' and '.join(str(path) for path in missing)} "
            "would be needed, too; name the folder of CoVoST 2's tables and Common Voice's recordings"
        )
    known = {row["path"] for row in _tsv(validated, ("path",))}
    for row in _tsv(whole, ("path", "translation", "split")):
        if row["split"] == "test" and row["path"] in known:
            yield row


def _tsv(path: Path, columns: Iterable[str]) -> Iterator[dict[str, str]]:
    csv.field_size_limit(2**27)
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, restkey="more", delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\")
        lacking = [column for column in columns if column not in (reader.fieldnames or ())]
        if lacking:
            raise ManifestError(f"{path} has no column {', '.join(lacking)}")
        try:
            yield from reader
        except (csv.Error, UnicodeDecodeError) as error:
            raise ManifestError(f"{path}, line {reader.line_num}: {error}") from None


def from_rows(rows: Iterable[Row], recordings: Recordings) -> Items:
    """The utterances of a table."""

    def item(row: Row, number: int, where: str) -> Item:
        value = row.get("audio") if row.get("audio") is not None else row.get("path")
        audio = recordings.of(value, number, where)
        key = str(row.get("id") or row.get("path") or number)
        return Item(number, key, audio, audio.name, string(row, "translation", where))

    found = items_of(rows, item)
    if not found.items:
        raise ManifestError("the table has no row of the test split")
    return found
