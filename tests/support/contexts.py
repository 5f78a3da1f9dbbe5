"""Saved contexts taken apart and put together again, with a digest that is right for whatever they hold."""

import hashlib
import json
from typing import Any


def take_apart(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The header of a saved context without the digest, and the bytes of its tensors."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["digest"]
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return header, {name: data[8 + length + start : 8 + length + end] for name, (start, end) in places.items()}


def put_together(header: dict[str, Any], tensors: dict[str, bytes]) -> bytes:
    """The file that holds `tensors` in this order under `header`, whose offsets are set right, and its digest."""
    entries = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    offset = 0
    for name, contents in {**tensors, "digest": bytes(32)}.items():
        entry = {"dtype": "U8", "shape": [32]} if name == "digest" else header[name]
        entries[name] = {**entry, "data_offsets": [offset, offset + len(contents)]}
        offset += len(contents)
    return sealed(json.dumps(entries).encode(), b"".join(tensors.values()))


def sealed(header: bytes, tensors: bytes) -> bytes:
    """The file with these bytes, closed by their digest."""
    contents = len(header).to_bytes(8, "little") + header + tensors
    return contents + hashlib.blake2b(contents, digest_size=32).digest()
