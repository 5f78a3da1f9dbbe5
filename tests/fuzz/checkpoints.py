"""Mutated checkpoints: configs, safetensors headers, indexes, tokenizers and settings, loaded and asked once.

The right outcome is an AfnextError, or a model that answers (or refuses with an AfnextError).
"""

import contextlib
import io
import json
import random
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.kernels.errors import AfnextError
from afnext.quant.recipe import recipe
from afnext.runtime.app.api import load
from afnext.runtime.model.opened import open_checkpoint

SECONDS = 60.0
MEGABYTES = 1500

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), -1e-320),
    *("", "x", "int8", "\ud800", "[" * 50_000, [], [[]], [1, 2], {}, {"type": "linear"}, [None] * 1000),
]
FILES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")


def check(data: bytes) -> None:
    """`data`: a zip of the checkpoint's files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            packed.extractall(folder)
        with contextlib.suppress(AfnextError):
            open_checkpoint(folder)
        with contextlib.suppress(AfnextError):
            model = load(folder, device="cpu", memory="600MB", prefix_cache_bytes=0)
            model.ask(None, "What?", max_new_tokens=2)


def cases(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as name:
        sources = []
        for scheme in (None, "int8", "int4-g32-zeros"):
            folder = Path(name) / str(scheme)
            write_random_checkpoint(folder, quant=None if scheme is None else recipe(scheme))
            sources.append({path.name: path.read_bytes() for path in folder.iterdir()})
        while True:
            files = dict(rng.choice(sources))
            how = [mutate(files, rng) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                for name_of_file, content in files.items():
                    archive.writestr(name_of_file, content)
            yield "; ".join(how), packed.getvalue()


def mutate(files: dict[str, bytes], rng: random.Random) -> str:
    """Change one of the files; returns how."""
    kind = rng.choice(("settings", "settings", "settings", "header", "header", "bytes", "index", "remove"))
    if kind == "settings":
        name = rng.choice(FILES)
        value = loaded(files.get(name, b"{}"))
        place = change_value(value, rng)
        files[name] = json.dumps(value).encode()
        return f"{name}: {place}"
    weights = "model.safetensors"
    if kind == "remove" or weights not in files:
        name = rng.choice(sorted(files) or [weights])
        files.pop(name, None)
        return f"{name} removed"
    if kind == "bytes":
        name = rng.choice(sorted(files))
        changed = bytearray(files[name])
        for _ in range(rng.choice((1, 4, 64))):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        files[name] = bytes(changed[: rng.choice((len(changed), rng.randrange(len(changed) + 1)))])
        return f"{name}: bytes"
    data = files[weights]
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    header = loaded(data[8 : 8 + length])
    if kind == "index":
        files["model.safetensors.index.json"] = json.dumps(
            {"weight_map": dict.fromkeys(header, rng.choice((weights, "../x.safetensors", "model-1.safetensors", 5)))}
        ).encode()
        files["model-1.safetensors"] = files.pop(weights)
        return "an index"
    place = change_value(header, rng)
    text = json.dumps(header).encode()
    claimed = rng.choice((len(text), len(text), len(text), 0, 2**63, len(text) + 1))
    files[weights] = struct.pack("<Q", claimed) + text + data[8 + length :]
    return f"header: {place}"


def loaded(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def change_value(value: dict[str, Any], rng: random.Random) -> str:
    """Replace, remove, copy or add something at a random place in a JSON value; returns where."""
    at: Any = value
    path = []
    while True:
        keys: list[Any] = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            at["x"] = rng.choice(VALUES)
            return "x added"
        key = rng.choice(keys[:200])
        path.append(str(key)[:40])
        if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.8:
            at = at[key]
            continue
        action = rng.choice(("value", "value", "value", "remove", "many"))
        if action == "remove":
            del at[key]
        elif action == "many" and isinstance(at, dict):
            for index in range(rng.choice((10, 1000, 40_000))):
                at[f"{key}{index}"] = at[key]
        else:
            at[key] = rng.choice([*VALUES, at[key] * 2 if isinstance(at[key], int | str) else 7])
        return f"{'.'.join(path)} {action}"
