"""A prefix in a file: its keys and values as safetensors, with all that is needed to reject a wrong file.

Tensors: `token_ids` [tokens] int64; for each layer i `keys.i`, `values.i` [tokens, kv_heads, head_dim], of an int4
cache [.., head_dim / 2], and for an int8, fp8 or int4 cache `k_scales.i`, `v_scales.i` [tokens, kv_heads]; last
`digest`, 32 bytes of BLAKE2b over everything before it. The metadata has the format, the model (`model_fingerprint`),
its dtype, the format of the cache, and the caller's additions. A file takes as many bytes per token as the cache.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import torch
from torch import Tensor

from ...quant.convert import TORCH_DTYPES, spelled
from ..errors import CheckpointError, ContextFileError
from ..files import open_regular
from ..model.safetensors_header import MAX_HEADER_BYTES, StoredTensor, parse_header_and_metadata
from .executor import Executor
from .kv_cache import QUANTIZED, KVCache

FORMAT = "afnext-context-1"
_DIGEST_BYTES = 32
_BLOCK = 1 << 24
_STORAGE = {dtype: name for name, dtype in QUANTIZED.items()}

T = TypeVar("T")


class Together(Protocol):
    """Calls a function that runs on every process of an executor, and returns its result."""

    def __call__(self, function: Callable[[], T], /) -> T:
        """See the class."""


def identity(executor: Executor) -> dict[str, str]:
    """The metadata that a file must have to be read by this model into this cache."""
    stored = executor.cache.keys[0].dtype
    return {
        "format": FORMAT,
        "dtype": str(executor.model.dtype).removeprefix("torch."),
        "kv": _STORAGE.get(stored, str(stored).removeprefix("torch.")),
        "model": executor.fingerprint(),
    }


def write_prefix(
    file: BinaryIO,
    token_ids: list[int],
    pages: list[int],
    executor: Executor,
    extra: Mapping[str, str],
    together: Together,
) -> None:
    """Write the prefix that `pages` of the cache hold to `file`.

    together: calls functions that use the executor. The caller keeps the pages in use. Other requests may run and the
    cache may be resized meanwhile.
    """
    shapes = _shapes(executor, len(token_ids))
    header: dict[str, Any] = {"__metadata__": {**together(partial(identity, executor)), **extra}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": spelled(dtype), "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header["digest"] = {"dtype": "U8", "shape": [_DIGEST_BYTES], "data_offsets": [offset, offset + _DIGEST_BYTES]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    start: Iterator[bytes | memoryview] = iter((len(encoded).to_bytes(8, "little"), encoded))
    for piece in chain(start, _contents(token_ids, pages, executor, together)):
        digest.update(piece)
        file.write(piece)
    file.write(digest.digest())


class SavedPrefix:
    """A file of `write_prefix`. Opening it checks its header against a model and a cache; `load` reads the rest, once.

    Every byte is read once. Before the digest has been checked, only `metadata` and `token_ids` are used, which the
    caller compares with what it expects.
    """

    def __init__(self, path: Path, executor: Executor, together: Together):
        """together: calls functions that use the executor. Raises ContextFileError for a file that cannot be read, has
        a damaged header, or belongs to another model."""
        self._executor = executor
        self._path = path
        self._digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        self._file = open_regular(path, str(path), ContextFileError)
        try:
            self._tensors, self.metadata = self._header()
            self._check_identity(together(partial(identity, executor)))
            self._check_shapes(executor.model.config.decoder.max_positions)
            self.token_ids: list[int] = self._tensor("token_ids").tolist()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def load(self, pages: list[int], between_steps: Callable[[Callable[[], None]], object]) -> None:
        """Copy keys, values and scales INTO `pages` of the cache; they are valid only if this returns.

        between_steps: calls a function between two steps of the engine; steps run while the file is read. Raises
        ContextFileError for a file that is damaged or has been changed meanwhile.
        """
        for index, (name, _) in enumerate(_pools(self._executor.cache)):
            between_steps(partial(self._executor.write, index, pages, self._tensor(name)))
        self.verify()

    def verify(self) -> None:
        """Read the rest of the file. Raises ContextFileError if its contents are not those saved."""
        while left := self._tensors["digest"].start - self._file.tell():
            self._read(min(left, _BLOCK))
        if self._read(_DIGEST_BYTES, hashed=False) != self._digest.digest():
            raise ContextFileError(f"{self._path} is damaged: its contents are not those saved; listen and save again.")

    def _header(self) -> tuple[dict[str, StoredTensor], dict[str, str]]:
        start = self._read(8)
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER_BYTES:
            raise ContextFileError(f"{self._path} is not a context: its header is too long; listen and save again.")
        head = start + self._read(length)
        try:
            return parse_header_and_metadata(_Head(head, os.fstat(self._file.fileno()).st_size), self._path.name)
        except CheckpointError as error:
            raise ContextFileError(f"{self._path} is not a valid context ({error}); listen and save again.") from None

    def _tensor(self, name: str) -> Tensor:
        """The next tensor of the file, whose name and shape have been checked."""
        stored = self._tensors[name]
        data = self._read(stored.end - stored.start)
        return torch.frombuffer(data, dtype=TORCH_DTYPES[stored.dtype]).view(stored.shape)

    def _read(self, size: int, *, hashed: bool = True) -> bytearray:
        """The next `size` bytes. Raises ContextFileError if they cannot be read."""
        data = bytearray()
        try:
            while len(data) < size and (piece := self._file.read(min(size - len(data), _BLOCK))):
                data += piece
        except OSError as error:
            raise ContextFileError(f"{self._path} cannot be read ({error.strerror or error}).") from None
        if len(data) < size:
            raise ContextFileError(f"{self._path} is cut short; listen and save again.")
        if hashed:
            self._digest.update(data)
        return data

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

    def _check_shapes(self, most: int) -> None:
        stored = self._tensors.get("token_ids")
        tokens = stored.shape[0] if stored is not None and len(stored.shape) == 1 else 0
        expected = {name: (spelled(dtype), shape) for name, (dtype, shape) in _shapes(self._executor, tokens).items()}
        expected["digest"] = ("U8", (_DIGEST_BYTES,))
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in self._tensors.items()}
        if not 0 < tokens <= most or list(found.items()) != list(expected.items()):  # also in this order
            raise ContextFileError(f"{self._path} does not hold the tensors of a context; listen and save again.")


@dataclass(frozen=True)
class _Head:
    """A file of `size` bytes, only the beginning of which has been read."""

    head: bytes | bytearray
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: slice, /) -> bytes:
        return bytes(self.head[index])


def _pools(cache: KVCache) -> Iterator[tuple[str, Tensor]]:
    """The cache's tensors and their names in a file."""
    kinds = {"keys": cache.keys, "values": cache.values, "k_scales": cache.k_scales, "v_scales": cache.v_scales}
    for kind, pools in kinds.items():
        for layer, pool in enumerate(pools or ()):
            yield f"{kind}.{layer}", pool


def _shapes(executor: Executor, tokens: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes in a file: it has the heads of all processes, as their number may differ when it is read."""
    shapes = {
        name: (pool.dtype, (tokens, pool.shape[2] * executor.size, *pool.shape[3:]))
        for name, pool in _pools(executor.cache)
    }
    return {"token_ids": (torch.int64, (tokens,)), **shapes}


def _contents(token_ids: list[int], pages: list[int], executor: Executor, together: Together) -> Iterator[memoryview]:
    """The bytes of all tensors but the digest, one tensor at a time."""
    yield _bytes(torch.tensor(token_ids))
    for index in range(len(executor.cache.pools)):
        yield _bytes(together(partial(executor.read, index, pages))[: len(token_ids)])


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
