"""Print an answer while it is generated. Usage: python examples/stream.py [RECORDING] [QUESTION]"""

import sys
from pathlib import Path

import afnext

SCENE = Path(__file__).parents[1] / "bench" / "data" / "scene.flac"


def main(recording: str = str(SCENE), question: str = "Transcribe the input speech.") -> None:
    with afnext.load() as model:
        stream = model.stream(recording, question)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        assert stream.answer is not None
        print("finished because of:", stream.answer.finish_reason, file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
