"""Ask a question about a recording. Usage: python examples/ask.py [RECORDING] [QUESTION]"""

import sys
from pathlib import Path

import afnext

SCENE = Path(__file__).parents[1] / "bench" / "data" / "scene.flac"


def main(recording: str = str(SCENE), question: str = "Describe the audio with timestamps.") -> None:
    with afnext.load() as model:  # afnext-tiny; name another model or folder for real questions
        answer = model.ask(recording, question)
        print(answer.text)
        print(answer.usage.audio_tokens, "audio tokens,", answer.usage.new_tokens, "new tokens", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
