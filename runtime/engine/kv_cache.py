"""The paged KV cache: one pool of keys and one of values a layer, and the account of which pages are in use.

Layout: see `kernels/pages.py`. A token takes 2 * layers * kv_heads * head_dim elements: 57 344 bytes at full size in
bf16, 2.58 GB for the 45 000 tokens of 30 minutes of audio. In int8, with a float32 scale for each token, head and layer
of keys and of values (see `kernels/kv_write.py`), it takes 29 568 bytes, 1.33 GB for 30 minutes.
"""

import heapq

import torch
from torch import Tensor

from ..errors import OutOfPagesError
from ..model.config import DecoderConfig
from ..model.decoder import CacheView

KV_STORAGE = ("auto", "int8")


class PagePool:
    """Hands out page numbers, lowest first, and counts who holds each: a page is free once nobody does."""

    def __init__(self, pages: int):
        self.pages = pages
        self._free = list(range(pages))
        self._holders: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Number of pages not in use."""
        return len(self._free)

    @property
    def end(self) -> int:
        """One more than the highest page in use."""
        return max(self._holders, default=-1) + 1

    def holders(self, page: int) -> int:
        """How many hold the page, 0 for a free one."""
        return self._holders.get(page, 0)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, in ascending order. Raises OutOfPagesError, taking none, when fewer are free."""
        if count > self.free:
            raise OutOfPagesError(f"{count} KV pages are needed and {self.free} of {self.pages} are free")
        pages = [heapq.heappop(self._free) for _ in range(count)]
        self._holders.update(dict.fromkeys(pages, 1))
        return pages

    def share(self, pages: list[int]) -> None:
        """Hold pages that are in use once more. Raises ValueError, sharing none, for a page that is free."""
        for page in pages:
            self._check_in_use(page, "shared")
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: list[int]) -> None:
        """Let go of pages, once each. Raises ValueError for a page that is not in use."""
        for page in pages:
            self._check_in_use(page, "released")
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                heapq.heappush(self._free, page)

    def resize(self, pages: int) -> None:
        """Have `pages` pages from now on. Raises ValueError when one beyond them is in use."""
        if beyond := [page for page in self._holders if page >= pages]:
            raise ValueError(f"page {max(beyond)} is in use; the pool cannot end at {pages} pages")
        self._free = [page for page in range(pages) if page not in self._holders]  # ascending, hence a heap
        self.pages = pages

    def _check_in_use(self, page: int, what: str) -> None:
        if page not in self._holders:
            raise ValueError(f"page {page} is {what} but not in use")


class KVCache:
    """Keys and values of all layers. `keys[layer]`, `values[layer]`: [pages, page_size, kv_heads, head_dim].

    With dtype int8, `k_scales[layer]` and `v_scales[layer]` are [pages, page_size, kv_heads] float32; otherwise None.
    """

    def __init__(self, config: DecoderConfig, *, pages: int, page_size: int, device: torch.device, dtype: torch.dtype):
        shape = (pages, page_size, config.kv_heads, config.head_dim)

        def pools(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
            return [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)]

        self.page_size = page_size
        self.pool = PagePool(pages)
        self.keys, self.values = pools(shape, dtype), pools(shape, dtype)
        self.k_scales: list[Tensor] | None = None
        self.v_scales: list[Tensor] | None = None
        if dtype == torch.int8:
            self.k_scales, self.v_scales = pools(shape[:-1], torch.float32), pools(shape[:-1], torch.float32)

    @property
    def pools(self) -> list[Tensor]:
        """Every tensor of the cache, each with one entry a page."""
        return [*self.keys, *self.values, *(self.k_scales or ()), *(self.v_scales or ())]

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.nbytes for pool in self.pools)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page in every pool."""
        return sum(pool.element_size() * pool.shape[1:].numel() for pool in self.pools)

    @torch.inference_mode()
    def resize(self, pages: int) -> None:
        """Have room for `pages` pages, their contents kept. The tensors are replaced, one at a time, so that at no time
        more than one of them is there twice. Raises ValueError when a page beyond `pages` is in use."""
        if pages < self.pool.pages:
            self.pool.resize(pages)
        kept = self.pool.end
        for tensors in (self.keys, self.values, self.k_scales or [], self.v_scales or []):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_empty(pages, *old.shape[1:])
                tensors[layer][:kept] = old[:kept]
        self.pool.resize(pages)

    @torch.inference_mode()
    def copy_page(self, source: int, target: int) -> None:
        """Make the page `target` equal to the page `source` in every layer."""
        for pool in self.pools:
            pool[target] = pool[source]

    def view(self, page_table: Tensor, positions: Tensor) -> CacheView:
        """The cache as the decoder takes it, for new tokens at the indices `positions`; see `CacheView.of`."""
        return CacheView.of(
            self.keys, self.values, page_table, positions, k_scales=self.k_scales, v_scales=self.v_scales
        )

    def allocate(self, tokens: int) -> list[int]:
        """Pages for a sequence of `tokens` tokens. Raises OutOfPagesError when they are not free."""
        return self.pool.allocate(pages_for(tokens, self.page_size))


def page_bytes(config: DecoderConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page in the pools of all layers, scales included."""
    head = config.head_dim * dtype.itemsize + (torch.float32.itemsize if dtype == torch.int8 else 0)
    return 2 * config.layers * page_size * config.kv_heads * head


def pages_for(tokens: int, page_size: int) -> int:
    """Number of pages that hold `tokens` tokens."""
    return -(-tokens // page_size)


def page_table(rows: list[list[int]], device: torch.device) -> Tensor:
    """The pages of several sequences as one [batch, longest] int32 tensor, short rows padded with page 0."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32, device=device)
