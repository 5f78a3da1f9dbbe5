"""A process that decodes audio for the server: `python -m afnext.serve.worker`, without torch.

A hostile file can kill or stall this process, never the server. It reads one JSON object per line and writes one:

    {"op": "decode", "path", "name", "out", "max_seconds", "truncate"}
        -> {"samples", "rate", "channels", "truncated", "warnings"}; float32 samples at 16 kHz are in the file `out`
    {"op": "extract", "path", "out"}
        -> {"files"}: the files in the folder `out` with the base64 audio of a request's JSON body; the body, with each
        audio replaced by {"spooled": file}, is in the file `body` there

or {"error": message, "kind": "too_long" | "audio" | "json"}. It exits when its standard input closes.
"""

import base64
import binascii
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from ..runtime.errors import AudioError, AudioTooLongError
from ..runtime.io.audio import load_audio

_MOST_FILES = 64
_MOST_TEXT = 16 << 20  # bytes of JSON


def decode(path: str, name: str, out: str, max_seconds: float, truncate: bool) -> dict[str, Any]:
    """Decode one file; see the module. Raises AudioError."""
    with io.FileIO(path) as file:
        file.name = name  # errors and warnings carry the client's name for the file, not its path
        audio = load_audio(io.BufferedReader(file), max_seconds=max_seconds, truncate=truncate)
    Path(out).write_bytes(audio.samples.data)
    return {
        "samples": len(audio.samples),
        "rate": audio.sample_rate_in,
        "channels": audio.channels_in,
        "truncated": audio.truncated,
        "warnings": list(audio.warnings),
    }


def extract(path: str, out: str) -> dict[str, Any]:
    """Move the base64 audio of a request's JSON body into files 0, 1, ... of the folder `out`; see the module.

    Raises ValueError for a body that is not JSON or has too much other text, and binascii.Error for damaged base64.
    """
    body = msgspec.json.decode(Path(path).read_bytes())
    files: list[str] = []

    def moved(data: str) -> dict[str, str]:
        if len(files) == _MOST_FILES:
            raise ValueError(f"it holds more than {_MOST_FILES} recordings")
        target = str(Path(out, str(len(files))))
        Path(target).write_bytes(decoded_base64(data))
        files.append(target)
        return {"spooled": target}

    def walk(value: Any, depth: int, inside: str) -> Any:
        if depth > 64:
            raise ValueError("it is nested too deeply")
        if isinstance(value, list):
            return [walk(item, depth + 1, inside) for item in value]
        if isinstance(value, dict):
            return {
                key: moved(item) if _is_audio(inside, key, item) else walk(item, depth + 1, key)
                for key, item in value.items()
            }
        return value

    slim = json.dumps(walk(body, 0, "")).encode()
    if len(slim) > _MOST_TEXT:
        raise ValueError(f"it holds more than {_MOST_TEXT >> 20} MiB besides audio")
    Path(out, "body").write_bytes(slim)
    return {"files": files}


def _is_audio(inside: str, key: str, value: Any) -> bool:
    if not isinstance(value, str):
        return False
    return (
        (inside == "input_audio" and key == "data")
        or key == "file_data"
        or (inside == "audio_url" and key == "url" and value.startswith("data:"))
    )


def decoded_base64(data: str) -> bytes:
    """The bytes of base64 text, with or without a `data:...;base64,` prefix. Raises binascii.Error."""
    if data.startswith("data:"):
        header, comma, data = data.partition(",")
        if not comma or not header.endswith(";base64"):
            raise binascii.Error("a data: URL has to be base64")
    if not data.isascii():
        raise binascii.Error("only ASCII characters are allowed")
    return base64.b64decode("".join(data.split()), validate=True)


_OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {"decode": decode, "extract": extract}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Handle one request."""
    try:
        return _OPERATIONS[request.pop("op")](**request)
    except MemoryError:
        return {"error": "it takes more memory than a request may use", "kind": "audio"}
    except AudioTooLongError as error:
        return {"error": str(error), "kind": "too_long"}
    except AudioError as error:
        return {"error": str(error), "kind": "audio"}
    except binascii.Error as error:
        return {"error": f"the audio is not valid base64 ({error})", "kind": "audio"}
    except (ValueError, RecursionError) as error:
        return {"error": f"the body is not valid JSON ({error})", "kind": "json"}


def limit(max_bytes: int) -> None:
    """Limit this process's memory, file sizes and open descriptors, where the system can."""
    try:
        import resource
    except ImportError:
        return
    limits = {"RLIMIT_AS": max_bytes, "RLIMIT_FSIZE": 2 << 30, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    for line in requests:
        answers.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    limit(int(sys.argv[1]))
    serve(sys.stdin.buffer, sys.stdout.buffer)
