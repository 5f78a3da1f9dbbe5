"""Hear a recording once and ask several questions about it. Usage: python examples/listen_once.py [RECORDING]"""

import sys
from pathlib import Path

import afnext

SCENE = Path(__file__).parents[1] / "bench" / "data" / "scene.flac"
QUESTIONS = ("Transcribe the input speech.", "Describe the audio with timestamps.")


def main(recording: str = str(SCENE)) -> None:
    with afnext.load() as model, model.listen(recording) as context:
        for question in QUESTIONS:
            answer = context.ask(question)
            print(f"{question}\n{answer.text}")
            print(answer.usage.cached_tokens, "tokens were computed before", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
