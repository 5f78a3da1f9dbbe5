"""Damaged and forged context files against `Model.resume`.

The right outcome is an AfnextError that leaves every KV page free, or a context that answers. Half of the files have a
digest that is right for what they hold, so that the checks behind it are reached.
"""

import contextlib
import json
import multiprocessing
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support.audio import speech_like
from support.contexts import put_together, sealed, take_apart

import afnext
from afnext.bench.core.random_checkpoint import write_random_checkpoint

SECONDS = 30.0
RATE = 16_000
EXTREMES: list[Any] = [
    *(0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1e308, 0.5, True, None, "", "x", [], {}, [[]], [1], ["x"]),
    *("\ud800", "\0", "<sound>", "x" * 10_000, "I8", "F64", {"source": "x", "samples": 1, "truncated": False}),
]
_folder: Path | None = None


def check(data: bytes) -> None:
    """`data`: one byte that says what the cache stores, and a context file."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "context"
        path.write_bytes(data[1:])
        model = load(_folder or write_random_checkpoint(Path(temporary) / "model"), bool(data[0] & 1))
        with contextlib.suppress(afnext.AfnextError), model.resume(path) as context:
            context.ask("What?", max_new_tokens=2)
        model.engine.release_memory()
        pool = model.engine.cache.pool
        assert pool.free == pool.pages, "pages are lost"


def cases(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Saved contexts, each changed in one to three ways."""
    global _folder
    with tempfile.TemporaryDirectory() as temporary:
        _folder = write_random_checkpoint(Path(temporary) / "model")
        saved = corpus(_folder, Path(temporary))
        while True:
            index = rng.randrange(len(saved))
            data, how = saved[index], []
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                mutate = rng.choice(MUTATIONS)
                with contextlib.suppress(Exception):  # what an earlier change has damaged too much for this one
                    data = mutate(data, rng)
                    how.append(mutate.__name__)
            yield ", ".join(how), bytes([index]) + data


def corpus(model: Path, folder: Path) -> list[bytes]:
    """A context of float32 and one of int8, saved by a process of their own: this one may start no threads."""
    process = multiprocessing.get_context("fork").Process(target=save, args=(model, folder))
    process.start()
    process.join()
    return [(folder / str(int8)).read_bytes() for int8 in (False, True)]


def save(model: Path, folder: Path) -> None:
    for int8 in (False, True):
        audio = [(speech_like(1.0, 1), RATE), (speech_like(0.4, 2), RATE)]
        with load(model, int8).listen(audio, system="Be brief.") as context:
            context.save(folder / str(int8))


def load(folder: Path, int8: bool) -> afnext.Model:
    return afnext.load(folder, dtype="float32", page_size=16, prefix_cache_bytes=0, kv="int8" if int8 else "auto")


def flips(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(2 ** rng.randrange(6)):
        changed[place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def resealed_flips(data: bytes, rng: random.Random) -> bytes:
    """Flipped bits under a right digest."""
    changed, length = flips(data, rng), int.from_bytes(data[:8], "little")
    return sealed(changed[8 : 8 + length], changed[8 + length : -32])


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: place(data, rng)]


def extended(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 8, 32, 4096)))


def overwritten(data: bytes, rng: random.Random) -> bytes:
    start, size = place(data, rng), 2 ** rng.randrange(14)
    return data[:start] + rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size))) + data[start + size :]


def forged_length(data: bytes, rng: random.Random) -> bytes:
    length = rng.choice((0, 1, len(data) - 8, len(data), 2**24, 2**31, 2**32, 2**63, 2**64 - 1, rng.randrange(10_000)))
    return struct.pack("<Q", length) + data[8:]


def forged_header(data: bytes, rng: random.Random) -> bytes:
    """One value somewhere in the header is another one; the digest is right."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return sealed(json.dumps(forged(header, rng)).encode(), data[8 + length : -32])


def forged_conversation(data: bytes, rng: random.Random) -> bytes:
    """One value in the description of the conversation is another one; everything else is right."""
    header, tensors = take_apart(data)
    metadata = header["__metadata__"]
    metadata["conversation"] = json.dumps(forged(json.loads(metadata["conversation"]), rng))
    return put_together(header, tensors)


def nested_header(data: bytes, rng: random.Random) -> bytes:
    depth = 10 ** rng.randrange(2, 6)
    length = int.from_bytes(data[:8], "little")
    return sealed(b'{"a":' * depth + b"1" + b"}" * depth, data[8 + length : -32])


def swapped_tensors(data: bytes, rng: random.Random) -> bytes:
    """Tensors in another order, one twice, or one missing, under a header that fits and a right digest."""
    header, tensors = take_apart(data)
    names = list(tensors)
    one, other = rng.choice(names), rng.choice(names)
    kind = rng.randrange(4)
    if kind == 0:
        del tensors[one]
    elif kind == 1:
        rng.shuffle(names)
        tensors = {name: tensors[name] for name in names}
    elif kind == 2:
        tensors[one], header[one] = tensors[other], header[other]
    else:
        tensors[f"{one}x"], header[f"{one}x"] = tensors[other], header[other]
    return put_together(header, tensors)


def random_values(data: bytes, rng: random.Random) -> bytes:
    """A tensor of arbitrary bits, infinities and NaN among them, under a right digest."""
    header, tensors = take_apart(data)
    name = rng.choice(list(tensors))
    tensors[name] = rng.randbytes(len(tensors[name]))
    return put_together(header, tensors)


def forged(values: Any, rng: random.Random) -> Any:
    """`values` with one value, anywhere within, replaced, removed or added."""
    if not isinstance(values, dict | list) or not values or rng.random() < 0.1:
        return rng.choice(EXTREMES)
    keys: list[Any] = list(values) if isinstance(values, dict) else list(range(len(values)))
    key, kind = rng.choice(keys), rng.random()
    if kind < 0.1:
        del values[key]
    elif kind < 0.2 and isinstance(values, dict):
        values["x" * rng.randrange(3)] = rng.choice(EXTREMES)
    elif kind < 0.2:
        values.extend(values * rng.choice((1, 10, 1000)))
    else:
        values[key] = forged(values[key], rng)
    return values


def place(data: bytes, rng: random.Random) -> int:
    """Where to change `data`: most often in its header, now and then in its digest."""
    header = min(8 + int.from_bytes(data[:8], "little"), len(data))
    part = rng.random()
    if part < 0.6:
        return rng.randrange(max(1, header))
    return rng.randrange(max(0, len(data) - 32), len(data)) if part < 0.7 else rng.randrange(len(data))


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    *(flips, resealed_flips, truncated, extended, overwritten, forged_length, forged_header, forged_header),
    *(forged_conversation, forged_conversation, nested_header, swapped_tensors, random_values),
]
