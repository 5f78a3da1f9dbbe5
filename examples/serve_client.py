"""Ask a running `afnext serve` with OpenAI's client. Usage: python examples/serve_client.py [URL] [RECORDING]

Needs `pip install openai`, and a server: `afnext serve --port 8000`.
"""

import base64
import sys
from pathlib import Path

from openai import OpenAI

SCENE = Path(__file__).parents[1] / "bench" / "data" / "scene.flac"


def main(url: str = "http://localhost:8000/v1", recording: str = str(SCENE)) -> None:
    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id
    data = base64.b64encode(Path(recording).read_bytes()).decode()
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": Path(recording).suffix[1:]}}
    question = {"type": "text", "text": "Transcribe the input speech."}
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": [audio, question]}])
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main(*sys.argv[1:])
