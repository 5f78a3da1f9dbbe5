"""LongAudioBench: open questions about recordings of minutes.

A JSON list in the layout of nvidia/LongAudio, which the model card refers to: id, sound (the recording), duration, and
conversations [{"from": "human", "value": "<sound>\\nQUESTION"}, {"from": "gpt", "value": ANSWER}].
Recordings are not in that repository; this reader looks for them below the folder of the list.

Source: Ghosh et al. 2025, arXiv:2503.03983.
"""

import json
from pathlib import Path

from ..data import Item, Items, ManifestError, string
from .rows import Recordings, Row, items_of, json_rows

_SOUND = "<sound>"


def local(path: Path, unpacked: Path) -> Items:
    """The questions of the file `path`, or of the only .json file of the folder `path`."""
    if path.is_dir():
        found = sorted(path.glob("*.json"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise ManifestError(f"{path} should hold one .json file and has {names}; name the file to use")
        path = found[0]
    elif not path.is_file():
        raise ManifestError(f"there is no file or folder at {path}")
    recordings = Recordings(path.parent, unpacked)

    def item(row: Row, number: int, where: str) -> Item:
        question, answer = _turns(row, where)
        name = string(row, "sound", where)
        audio = recordings.of(name, number, where)
        return Item(number, str(row.get("id", number)), audio, name, answer, question)

    return items_of(json_rows(path), item, where=f"{path}, row")


def _turns(row: Row, where: str) -> tuple[str, str]:
    """The first question and its answer."""
    turns = row.get("conversations")
    if isinstance(turns, str):  # some copies have the list as text
        try:
            turns = json.loads(turns)
        except ValueError:
            raise ManifestError(f"{where}: conversations is neither a list nor one as JSON") from None
    said: dict[str, str] = {}
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and isinstance(turn.get("value"), str):
            said.setdefault(str(turn.get("from")), turn["value"])
    if not {"human", "gpt"} <= said.keys():
        raise ManifestError(f"{where}: conversations has no turn of human or none of gpt")
    return said["human"].replace(_SOUND, "").strip(), said["gpt"].strip()
