"""Caches of results that later requests can use: KV pages by content, encoder outputs by window.

A page's key is a hash of everything its keys and values depend on: its tokens, the audio windows of its placeholders,
and the key of the previous page. Prompts with a common beginning have equal keys up to the first page that differs. The
keys include the request's salt, so tenants with different salts share nothing and cannot learn about each other's
requests from timing.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .kv_cache import PagePool
from .prefill import KEY_BYTES, AudioInput, Encode, PlacedWindow, placed_windows
from .timings import Timings


class PageKeys:
    """The keys of a sequence's full pages, extended as tokens are added."""

    def __init__(self, audio: tuple[AudioInput, ...], page_size: int, salt: bytes = b""):
        """salt: keys of different salts are never equal."""
        self._page_size = page_size
        self._first_parent = hashlib.blake2b(salt, digest_size=KEY_BYTES).digest() if salt else b""
        self._windows = [(window.start, window.tokens, window.key) for window in placed_windows(audio)]
        self._keys: list[bytes] = []

    def of(self, token_ids: Sequence[int]) -> list[bytes]:
        """The keys of the pages that `token_ids` fill. `token_ids` must begin with the tokens of earlier calls."""
        for page in range(len(self._keys), len(token_ids) // self._page_size):
            start, stop = page * self._page_size, (page + 1) * self._page_size
            key = hashlib.blake2b(self._keys[-1] if self._keys else self._first_parent, digest_size=KEY_BYTES)
            key.update(np.array(token_ids[start:stop], np.int64).tobytes())
            for first, tokens, digest in self._windows:
                if first < stop and first + tokens > start:
                    key.update((first - start).to_bytes(8, "little", signed=True) + digest)
            self._keys.append(key.digest())
        return self._keys[: len(token_ids) // self._page_size]


class PrefixCache:
    """Keeps up to `capacity` pages of finished requests. Pages of the beginning of a prompt are evicted last."""

    def __init__(self, pool: PagePool, capacity: int):
        self._pool = pool
        self._capacity = capacity
        self._pages: OrderedDict[bytes, int] = OrderedDict()  # least recently used first, a page before its parent

    @property
    def pages(self) -> list[int]:
        """All pages in the cache."""
        return list(self._pages.copy().values())

    def match(self, keys: list[bytes], multiple: int = 1) -> list[int]:
        """Share with the caller the pages of the longest cached prefix of `keys` whose length is a multiple of
        `multiple`."""
        count = next((index for index, key in enumerate(keys) if key not in self._pages), len(keys))
        count -= count % multiple
        pages = [self._pages[key] for key in keys[:count]]
        self._touch(keys[:count])
        self._pool.share(pages)
        return pages

    def insert(self, keys: list[bytes], pages: list[int]) -> None:
        """Cache the pages with these keys, from the first of a prompt on, up to the capacity."""
        for key, page in list(zip(keys, pages, strict=True))[: self._capacity]:
            if key not in self._pages:
                self._pool.share([page])
                self._pages[key] = page
        self._touch(keys[: self._capacity])
        while len(self._pages) > self._capacity:
            self._evict_one()

    def evict(self, pages: int) -> None:
        """Evict the least recently used pages until `pages` more are free, or the cache is empty."""
        enough = self._pool.free + pages
        while self._pages and self._pool.free < enough:
            self._evict_one()

    def _touch(self, keys: list[bytes]) -> None:
        for key in reversed(keys):
            self._pages.move_to_end(key)

    def _evict_one(self) -> None:
        _, page = self._pages.popitem(last=False)
        self._pool.release([page])


class EncoderCache:
    """Outputs of encoder and adaptor by window, up to `capacity` bytes of them, in host memory."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._nbytes = 0
        self._outputs: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes, device: torch.device) -> Tensor | None:
        """The output of the window `key`, or None."""
        output = self._outputs.get(key)
        if output is None:
            return None
        self._outputs.move_to_end(key)
        return output.to(device, non_blocking=True)

    def put(self, key: bytes, output: Tensor) -> None:
        """Keep a window's output."""
        if key not in self._outputs and output.nbytes <= self._capacity:
            kept = torch.empty(output.shape, dtype=output.dtype, pin_memory=output.device.type == "cuda")
            self._outputs[key] = kept.copy_(output, non_blocking=True)  # complete before later work on this GPU
            self._nbytes += output.nbytes
        while self._nbytes > self._capacity:
            self._nbytes -= self._outputs.popitem(last=False)[1].nbytes

    def encode(
        self,
        encode: Encode,
        device: torch.device,
        batch: list[PlacedWindow],
        timings: Timings,
        *,
        salt: bytes = b"",
    ) -> list[Tensor]:
        """The audio embeddings of windows, computed by `encode` if not cached. Windows of different salts share
        nothing."""
        keys = [salt + window.key for window in batch]
        outputs = {key: output for key in keys if (output := self.get(key, device)) is not None}
        missing = {key: window for key, window in zip(keys, batch, strict=True) if key not in outputs}
        if missing:
            for key, output in zip(missing, encode(list(missing.values()), timings), strict=True):
                outputs[key] = output
                self.put(key, output)
        return [outputs[key] for key in keys]
