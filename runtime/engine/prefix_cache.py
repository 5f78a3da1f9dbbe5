"""What was computed for one request and may serve another: KV pages by content, encoder outputs by window.

A page's key is a hash of all that its keys and values depend on: the tokens in it, the audio windows behind its
placeholders, and the key of the page before it. So equal keys mean equal beginnings of a prompt, page by page: the
system message, the recording, and the turns of a conversation so far.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..model.audio_flamingo import AudioFlamingo
from .kv_cache import PagePool
from .prefill import AudioInput, PlacedWindow, encode_windows, placed_windows
from .timings import Timings

_DIGEST_BYTES = 16


def window_key(window: PlacedWindow) -> bytes:
    """What a window's encoder output depends on: its samples, and its place in its audio."""
    samples = window.waveform.contiguous().numpy().tobytes()
    return hashlib.blake2b(samples, digest_size=_DIGEST_BYTES, salt=window.index.to_bytes(8, "little")).digest()


class PageKeys:
    """The keys of a sequence's full pages, as its tokens become known."""

    def __init__(self, audio: tuple[AudioInput, ...], page_size: int):
        self._page_size = page_size
        self._windows = [(window.start, window.tokens, window_key(window)) for window in placed_windows(audio)]
        self._keys: list[bytes] = []

    def of(self, token_ids: Sequence[int]) -> list[bytes]:
        """The keys of the pages that `token_ids`, which go on from the last call's, fill."""
        for page in range(len(self._keys), len(token_ids) // self._page_size):
            start, stop = page * self._page_size, (page + 1) * self._page_size
            key = hashlib.blake2b(self._keys[-1] if self._keys else b"", digest_size=_DIGEST_BYTES)
            key.update(np.array(token_ids[start:stop], np.int64).tobytes())
            for first, tokens, digest in self._windows:
                if first < stop and first + tokens > start:
                    key.update((first - start).to_bytes(8, "little", signed=True) + digest)
            self._keys.append(key.digest())
        return self._keys[: len(token_ids) // self._page_size]


class PrefixCache:
    """Holds up to `capacity` pages of past requests, those of the beginnings of prompts longest."""

    def __init__(self, pool: PagePool, capacity: int):
        self._pool = pool
        self._capacity = capacity
        self._pages: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first, a page before its parent

    @property
    def pages(self) -> list[int]:
        """All pages that are held."""
        return list(self._pages.values())

    def match(self, keys: list[bytes]) -> list[int]:
        """The pages of the longest beginning of `keys` that is there, held once more for the caller."""
        count = next((index for index, key in enumerate(keys) if key not in self._pages), len(keys))
        pages = [self._pages[key] for key in keys[:count]]
        self._touch(keys[:count])
        self._pool.share(pages)
        return pages

    def insert(self, keys: list[bytes], pages: list[int]) -> None:
        """Hold the pages with these keys, from the first of a prompt on, as far as there is room for them."""
        for key, page in list(zip(keys, pages, strict=True))[: self._capacity]:
            if key not in self._pages:
                self._pool.share([page])
                self._pages[key] = page
        self._touch(keys[: self._capacity])
        while len(self._pages) > self._capacity:
            self._drop()

    def evict(self, pages: int) -> None:
        """Let go of the least recently used until `pages` more pages are free, or nothing is held."""
        enough = self._pool.free + pages
        while self._pages and self._pool.free < enough:
            self._drop()

    def _touch(self, keys: list[bytes]) -> None:
        for key in reversed(keys):
            self._pages.move_to_end(key)

    def _drop(self) -> None:
        _, page = self._pages.popitem(last=False)
        self._pool.release([page])


class EncoderCache:
    """Outputs of encoder and adaptor by window, up to `capacity` bytes of them, in the host's memory."""

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
        return output.to(device)

    def put(self, key: bytes, output: Tensor) -> None:
        """Keep a window's output."""
        if key not in self._outputs and output.nbytes <= self._capacity:
            self._outputs[key] = output.detach().cpu().clone()
            self._nbytes += output.nbytes
        while self._nbytes > self._capacity:
            self._nbytes -= self._outputs.popitem(last=False)[1].nbytes

    def encode(self, model: AudioFlamingo, batch: list[PlacedWindow], timings: Timings) -> list[Tensor]:
        """`encode_windows` for those that are not there."""
        keys = [window_key(window) for window in batch]
        outputs = {key: output for key in keys if (output := self.get(key, model.device)) is not None}
        missing = {key: window for key, window in zip(keys, batch, strict=True) if key not in outputs}
        if missing:
            for key, output in zip(missing, encode_windows(model, list(missing.values()), timings), strict=True):
                outputs[key] = output
                self.put(key, output)
        return [outputs[key] for key in keys]
