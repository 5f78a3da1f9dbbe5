"""Ask about a recording while it goes on; here a file stands in for a microphone. Usage: python examples/live.py"""

from pathlib import Path

import afnext

SCENE = Path(__file__).parents[1] / "bench" / "data" / "scene.flac"
RATE = 16_000


def main() -> None:
    audio = afnext.load_audio(str(SCENE))
    with afnext.load() as model, model.listen() as live:
        for second in range(0, len(audio.samples), RATE):
            live.feed(audio.samples[second : second + RATE], RATE)
            if second == 5 * RATE:
                print("so far:", live.ask("Describe the audio with timestamps."))
        with live.finish() as context:
            print("all of it:", context.ask("Describe the audio with timestamps."))


if __name__ == "__main__":
    main()
