"""Load a model with 4-bit weights and compare an answer. Usage: python examples/quantize.py [MODEL]

`afnext quantize MODEL OUT --scheme int4` writes the quantized weights to a folder once; see docs/quantization.md.
"""

import sys
from pathlib import Path

import afnext

SCENE = Path(__file__).parents[1] / "bench" / "data" / "scene.flac"


def main(model: str = "afnext-tiny") -> None:
    for scheme in (None, "int4"):
        with afnext.load(model, quant=scheme) as loaded:
            answer = loaded.ask(str(SCENE), "Transcribe the input speech.")
            print(f"{scheme or 'dense'}: {answer.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
