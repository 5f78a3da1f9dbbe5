"""Write subtitles for a recording. Usage: python examples/transcribe.py [RECORDING] [OUT.srt]"""

import sys
from pathlib import Path

import afnext

SCENE = Path(__file__).parents[1] / "bench" / "data" / "scene.flac"


def main(recording: str = str(SCENE), out: str = "scene.srt") -> None:
    with afnext.load() as model:
        transcript = model.transcribe(recording)
    Path(out).write_text(transcript.to_srt(), encoding="utf-8")
    print(f"{len(transcript.segments)} segments in {out}")
    for warning in transcript.warnings:
        print("warning:", warning, file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
