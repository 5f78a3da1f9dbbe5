"""The paged KV cache: one pool of keys and one of values a layer, and the account of which pages are in use.

Layout: see `kernels/pages.py`. A token takes 2 * layers * kv_heads * head_dim elements: 57 344 bytes at full size in
bf16, 2.58 GB for the 45 000 tokens of 30 minutes of audio.
"""

import heapq

import torch
from torch import Tensor

from ..errors import OutOfPagesError
from ..model.config import DecoderConfig


class PagePool:
    """Hands out page numbers 0 .. pages - 1, lowest first, and takes them back."""

    def __init__(self, pages: int):
        self.pages = pages
        self._free = list(range(pages))
        self._used: set[int] = set()

    @property
    def free(self) -> int:
        """Number of pages not in use."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, in ascending order. Raises OutOfPagesError, taking none, when fewer are free."""
        if count > self.free:
            raise OutOfPagesError(f"{count} KV pages are needed and {self.free} of {self.pages} are free")
        pages = [heapq.heappop(self._free) for _ in range(count)]
        self._used.update(pages)
        return pages

    def release(self, pages: list[int]) -> None:
        """Give pages back. Raises ValueError for a page that is not in use."""
        for page in pages:
            if page not in self._used:
                raise ValueError(f"page {page} is released but not in use")
            self._used.remove(page)
            heapq.heappush(self._free, page)


class KVCache:
    """Keys and values of all layers. `keys[layer]`, `values[layer]`: [pages, page_size, kv_heads, head_dim]."""

    def __init__(self, config: DecoderConfig, *, pages: int, page_size: int, device: torch.device, dtype: torch.dtype):
        shape = (pages, page_size, config.kv_heads, config.head_dim)
        self.page_size = page_size
        self.pool = PagePool(pages)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.nbytes for pool in (*self.keys, *self.values))

    def allocate(self, tokens: int) -> list[int]:
        """Pages for a sequence of `tokens` tokens. Raises OutOfPagesError when they are not free."""
        return self.pool.allocate(pages_for(tokens, self.page_size))


def pages_for(tokens: int, page_size: int) -> int:
    """Number of pages that hold `tokens` tokens."""
    return -(-tokens // page_size)


def page_table(rows: list[list[int]], device: torch.device) -> Tensor:
    """The pages of several sequences as one [batch, longest] int32 tensor, short rows padded with page 0."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32, device=device)
