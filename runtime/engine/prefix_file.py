"""A prefix in a file: its keys and values as safetensors, with all it takes to refuse the wrong ones.

Tensors: `token_ids` [tokens] int64; for each layer i `keys.i`, `values.i` [tokens, kv_heads, head_dim], and for an int8
cache `k_scales.i`, `v_scales.i` [tokens, kv_heads]; last `digest`, 32 bytes of BLAKE2b over everything before it. The
metadata names the format, the model (`model_fingerprint`), the dtype that it computed in, what the cache stores, and
what the caller adds. A file of t tokens takes t times the bytes of a token in the cache.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...quant.convert import TORCH_DTYPES, spelled
from ..errors import CheckpointError, ContextFileError
from ..model.audio_flamingo import AudioFlamingo
from ..model.safetensors_header import StoredTensor, parse_header_and_metadata
from .kv_cache import KVCache
from .prefix import Prefix

FORMAT = "afnext-context-1"
_DIGEST_BYTES = 32
_BLOCK = 1 << 24
_SAMPLES = 4096


def model_fingerprint(model: AudioFlamingo) -> str:
    """What tells a model's keys and values from another's: a hash of its config, the shapes and dtypes of its weights,
    and up to 8191 numbers of each."""
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=_DIGEST_BYTES)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        step = max(1, weight.numel() // _SAMPLES)
        digest.update(_bytes(weight.flatten()[::step]))
    return digest.hexdigest()


def identity(model: AudioFlamingo, cache: KVCache) -> dict[str, str]:
    """What a file must say to be read by this model into this cache."""
    return {
        "format": FORMAT,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv": str(cache.keys[0].dtype).removeprefix("torch."),
        "model": model_fingerprint(model),
    }


def save_prefix(path: Path, prefix: Prefix, model: AudioFlamingo, cache: KVCache, extra: Mapping[str, str]) -> None:
    """Write a prefix, one layer at a time, to a new file that takes the place of `path` once it is whole.

    Raises ContextFileError when it cannot be written.
    """
    shapes = _shapes(cache, len(prefix.token_ids))
    header: dict[str, Any] = {"__metadata__": {**identity(model, cache), **extra}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": spelled(dtype), "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header["digest"] = {"dtype": "U8", "shape": [_DIGEST_BYTES], "data_offsets": [offset, offset + _DIGEST_BYTES]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    partial = path.with_name(f"{path.name}.part")
    try:
        with partial.open("wb") as file:
            for piece in (len(encoded).to_bytes(8, "little"), encoded, *_contents(prefix, cache)):
                digest.update(piece)
                file.write(piece)
            file.write(digest.digest())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ContextFileError(f"{path} cannot be written: {error.strerror or error}.") from None


class SavedPrefix:
    """A file of `save_prefix`, checked against a model and a cache; `load` brings it into the cache's pages."""

    def __init__(self, path: Path, model: AudioFlamingo, cache: KVCache):
        """Raises ContextFileError for a file that cannot be read, is damaged, or is of another model or dtype."""
        self._cache = cache
        self._path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch asks for writable memory
        except (OSError, ValueError) as error:
            raise ContextFileError(f"{path} cannot be read ({error}); check the path.") from None
        try:
            self._tensors, self.metadata = parse_header_and_metadata(self._data, path.name)
        except CheckpointError as error:
            raise ContextFileError(f"{path} is no sound context ({error}); listen and save again.") from None
        self._check_identity(identity(model, cache))
        self._check_shapes()
        self._check_digest()
        self.token_ids: list[int] = self._tensor("token_ids").tolist()

    @torch.inference_mode()
    def load(self, pages: list[int]) -> None:
        """Copy keys, values and scales INTO `pages` of the cache."""
        size, tokens = self._cache.page_size, len(self.token_ids)
        for name, pool in _pools(self._cache):
            stored = self._tensor(name)
            for index, page in enumerate(pages):
                count = min(size, tokens - index * size)
                pool[page, :count] = stored[index * size : index * size + count].to(pool.device)

    def _check_identity(self, expected: dict[str, str]) -> None:
        what = {
            "format": "a context of this version",
            "model": "of this model",
            "dtype": "computed in",
            "kv": "stored in",
        }
        for key, value in expected.items():
            if self.metadata.get(key) != value:
                detail = f" {value}" if key in ("dtype", "kv") else ""
                raise ContextFileError(
                    f"{self._path} is not {what[key]}{detail}; resume it with the model and the settings that it was "
                    "saved with, or listen again."
                )

    def _check_shapes(self) -> None:
        stored = self._tensors.get("token_ids")
        tokens = stored.shape[0] if stored is not None and len(stored.shape) == 1 else 0
        expected = {name: (spelled(dtype), shape) for name, (dtype, shape) in _shapes(self._cache, tokens).items()}
        expected["digest"] = ("U8", (_DIGEST_BYTES,))
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in self._tensors.items()}
        if not tokens or found != expected or next(reversed(self._tensors)) != "digest":
            raise ContextFileError(f"{self._path} does not hold the tensors of a context; listen and save again.")

    def _check_digest(self) -> None:
        stored: StoredTensor = self._tensors["digest"]
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for start in range(0, stored.start, _BLOCK):
            digest.update(self._data[start : min(start + _BLOCK, stored.start)])
        if digest.digest() != self._data[stored.start : stored.end]:
            raise ContextFileError(f"{self._path} is damaged: its contents are not those saved; listen and save again.")

    def _tensor(self, name: str) -> Tensor:
        stored = self._tensors[name]
        flat = torch.frombuffer(
            self._data, dtype=TORCH_DTYPES[stored.dtype], count=stored.elements, offset=stored.start
        )
        return flat.view(stored.shape)


def _pools(cache: KVCache) -> Iterator[tuple[str, Tensor]]:
    """The cache's tensors and the names that they have in a file."""
    kinds = {"keys": cache.keys, "values": cache.values, "k_scales": cache.k_scales, "v_scales": cache.v_scales}
    for kind, pools in kinds.items():
        for layer, pool in enumerate(pools or ()):
            yield f"{kind}.{layer}", pool


def _shapes(cache: KVCache, tokens: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    shapes = {name: (pool.dtype, (tokens, *pool.shape[2:])) for name, pool in _pools(cache)}
    return {"token_ids": (torch.int64, (tokens,)), **shapes}


def _contents(prefix: Prefix, cache: KVCache) -> Iterator[bytes]:
    """The bytes of all tensors but the digest, a page at a time."""
    yield _bytes(torch.tensor(prefix.token_ids))
    size, tokens = cache.page_size, len(prefix.token_ids)
    for _, pool in _pools(cache):
        for index, page in enumerate(prefix.pages):
            yield _bytes(pool[page, : min(size, tokens - index * size)])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
