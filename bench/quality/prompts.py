"""Recorded speech with transcripts that anyone can obtain: the telephone prompts of Debian's Asterisk packages.

    python -m afnext.bench.quality.prompts FOLDER

Writes FOLDER/data with a manifest for `afnext bench quality` and `quantization`, and FOLDER/calibrate with other
prompts by the same speaker. Needs the Debian package asterisk-core-sounds-en-wav (the texts are in
asterisk-core-sounds-en), CC BY-SA 3.0, Allison Smith's voice, 8 kHz.
"""

import gzip
import json
import re
import shutil
from pathlib import Path

import typer

SOUNDS = Path("/usr/share/asterisk/sounds/en")
TEXTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
_WORDS = range(10, 25)
_LINE = re.compile(r"^([\w/-]+): ([^\[\]\d]+)$")  # neither [a tone] nor digits, whose spelling varies


def select(lines: list[str], recorded: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Prompts to measure on and prompts to calibrate on, name to text. Every third whole sentence is for calibration.
    lines: `name: text`; recorded: names with a recording."""
    found = filter(None, map(_LINE.match, lines))
    sentences = {line[1]: line[2].strip() for line in found if len(line[2].split()) in _WORDS and line[1] in recorded}
    calibration = set(sorted(sentences)[::3])
    data = {name: text for name, text in sentences.items() if name not in calibration}
    return data, {name: sentences[name] for name in sorted(calibration)}


def main(folder: Path) -> None:
    """Write the two sets into FOLDER; see the module."""
    if not TEXTS.exists() or not SOUNDS.is_dir():
        raise SystemExit(f"{TEXTS} and {SOUNDS} are not here: install the Debian package asterisk-core-sounds-en-wav")
    recorded = {str(path.relative_to(SOUNDS).with_suffix("")) for path in SOUNDS.rglob("*.wav")}
    data, calibration = select(gzip.decompress(TEXTS.read_bytes()).decode().splitlines(), recorded)
    for name, texts in (("data", data), ("calibrate", calibration)):
        part = folder / name
        part.mkdir(parents=True, exist_ok=True)
        for prompt in texts:
            shutil.copy(SOUNDS / f"{prompt}.wav", part / f"{prompt.replace('/', '-')}.wav")
    rows = [{"audio": f"{name.replace('/', '-')}.wav", "text": text} for name, text in data.items()]
    manifest = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / "manifest.jsonl").write_text(manifest, encoding="utf-8")
    words = sum(len(text.split()) for text in data.values())
    print(f"{len(data)} prompts with {words} words, and {len(calibration)} to calibrate on, in {folder}")


if __name__ == "__main__":
    typer.run(main)
