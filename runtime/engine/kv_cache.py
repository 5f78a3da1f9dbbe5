"""The paged KV cache: a pool of keys and a pool of values per layer, and the reference counts of their pages.

Layout: see `kernels/pages.py`. A token takes 2 * layers * kv_heads * head_dim elements: 57 344 bytes at full size in
bf16, 2.58 GB for the 45 000 tokens of 30 minutes of audio. In int8, with a float32 scale for each token, head and layer
of keys and of values (see `kernels/kv_write.py`), it takes 29 568 bytes, 1.33 GB for 30 minutes, and so it does in
fp8, the 8-bit float e4m3; in int4 (see
`kernels/int4_cache.py`) 15 232, and 512 of the table of angles that attention needs: 0.71 GB.
"""

import heapq

import torch
from torch import Tensor

from ...kernels.device_state import sent
from ...kernels.int4_cache import DTYPE as INT4
from ...kernels.int4_cache import HEAD_DIMS
from ...kernels.quantize_rows import E4M3
from ...kernels.rotary import Rotation, rope_frequencies
from ..errors import OutOfPagesError
from ..model.config import DecoderConfig
from ..model.decoder import CacheView

KV_STORAGE = ("auto", "int8", "fp8", "int4")
"""Formats of keys and values: the model's dtype, or quantized."""
QUANTIZED = {"int8": torch.int8, "fp8": E4M3, "int4": INT4}
"""The dtypes of the pools of quantized keys and values; int4 pools hold two per byte."""


class PagePool:
    """Hands out page numbers, the lowest first, and counts the users of each page: a page without users is free."""

    def __init__(self, pages: int):
        self.pages = pages
        self._free = list(range(pages))
        self._ref_counts: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    @property
    def end(self) -> int:
        """One more than the highest page in use."""
        return max(self._ref_counts, default=-1) + 1

    def ref_count(self, page: int) -> int:
        """Number of users of the page, 0 for a free one."""
        return self._ref_counts.get(page, 0)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, in ascending order. Raises OutOfPagesError, taking none, if fewer are free."""
        if count > self.free:
            raise OutOfPagesError(f"{count} KV pages are needed and {self.free} of {self.pages} are free")
        pages = [heapq.heappop(self._free) for _ in range(count)]
        self._ref_counts.update(dict.fromkeys(pages, 1))
        return pages

    def use(self, pages: list[int]) -> None:
        """Add a user to pages, free or not. Raises ValueError, changing nothing, for a page that does not exist."""
        if beyond := [page for page in pages if not 0 <= page < self.pages]:
            raise ValueError(f"page {max(beyond)} does not exist; the pool has {self.pages}")
        for page in pages:
            self._ref_counts[page] = self.ref_count(page) + 1
        self._free = [page for page in range(self.pages) if page not in self._ref_counts]  # ascending, hence a heap

    def share(self, pages: list[int]) -> None:
        """Add a user to pages that are in use. Raises ValueError, changing nothing, for a free page."""
        for page in pages:
            self._check_in_use(page, "shared")
        for page in pages:
            self._ref_counts[page] += 1

    def release(self, pages: list[int]) -> None:
        """Remove a user from each page. Raises ValueError for a free page."""
        for page in pages:
            self._check_in_use(page, "released")
            self._ref_counts[page] -= 1
            if not self._ref_counts[page]:
                del self._ref_counts[page]
                heapq.heappush(self._free, page)

    def resize(self, pages: int) -> None:
        """Change the number of pages. Raises ValueError if a page beyond the new end is in use."""
        if beyond := [page for page in self._ref_counts if page >= pages]:
            raise ValueError(f"page {max(beyond)} is in use; the pool cannot end at {pages} pages")
        self._free = [page for page in range(pages) if page not in self._ref_counts]  # ascending, hence a heap
        self.pages = pages

    def _check_in_use(self, page: int, what: str) -> None:
        if page not in self._ref_counts:
            raise ValueError(f"page {page} is {what} but not in use")


class KVCache:
    """Keys and values of all layers. `keys[layer]`, `values[layer]`: [pages, page_size, kv_heads, head_dim].

    With a dtype of `QUANTIZED`, `k_scales[layer]` and `v_scales[layer]` are [pages, page_size, kv_heads] float32;
    otherwise None. With int4, keys and values are [.., head_dim / 2], and `key_turns` are the cos and sin of the angles
    of each token of the longest sequence that fits; see `CacheView`. Raises ValueError if int4 does not support
    head_dim. With `padded` the tensors have one more page, `padding_page`, which belongs to no sequence: the padding of
    a batch is written there, several rows to the same slots. rounds_attention: of views, see `CacheView`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        pages: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
        padded: bool = False,
        rounds_attention: bool = False,
    ):
        self._padding = int(padded)
        if dtype == INT4 and config.head_dim not in HEAD_DIMS:
            raise ValueError(
                f'kv="int4" takes heads of {", ".join(map(str, HEAD_DIMS))} channels, and those of this model have '
                f'{config.head_dim}; use kv="int8"'
            )
        shape = (pages + self._padding, page_size, config.kv_heads, head_width(config, dtype))

        def pools(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
            return [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)]

        self.page_size = page_size
        self.rounds_attention = rounds_attention
        self.resizes = 0
        self.pool = PagePool(pages)
        self.keys, self.values = pools(shape, dtype), pools(shape, dtype)
        self.k_scales: list[Tensor] | None = None
        self.v_scales: list[Tensor] | None = None
        if dtype in QUANTIZED.values():
            self.k_scales, self.v_scales = pools(shape[:-1], torch.float32), pools(shape[:-1], torch.float32)
        self._config, self._device = config, device
        self.key_turns = self._turns(pages) if dtype == INT4 else None

    def _turns(self, pages: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(turned_tokens(self._config, pages * self.page_size), device=self._device)
        frequencies = rope_frequencies(self._config.head_dim, self._config.rope_theta, self._device)
        cos, sin = Rotation(positions[None].float(), frequencies).cos_sin
        return cos[0, :, 0], sin[0, :, 0]

    @property
    def padding_page(self) -> int | None:
        """The page after those of the pool, or None. Its number changes when the cache is resized."""
        return self.pool.pages if self._padding else None

    @property
    def allocated_pages(self) -> int:
        """Pages for which every tensor has room; after a failed resize, this may differ from the pool's."""
        return min(map(len, self.pools)) - self._padding

    @property
    def pools(self) -> list[Tensor]:
        """Every tensor of the cache, each with one entry per page."""
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
        """Make room for `pages` pages and keep the contents of those in use.

        Tensors are replaced one at a time, so at most one exists twice, and only after its contents have been copied:
        another thread may read pages in use meanwhile. Raises ValueError if a page beyond `pages` is in use. If an
        allocation fails, the number of pages stays as it was.
        """
        if pages < self.pool.pages:
            self.pool.resize(pages)
        try:
            self._resize_tensors(pages)
        except (MemoryError, RuntimeError):
            self._resize_tensors(self.pool.pages)
            raise
        self.pool.resize(pages)
        self.resizes += 1

    def _resize_tensors(self, pages: int) -> None:
        kept = self.pool.end
        if self.key_turns is not None:
            self.key_turns = self._turns(pages)
        for tensors in (self.keys, self.values, self.k_scales or [], self.v_scales or []):
            for layer, old in enumerate(tensors):
                if len(old) != pages + self._padding:
                    new = old.new_empty(pages + self._padding, *old.shape[1:])
                    new[:kept] = old[:kept]
                    tensors[layer] = new

    @torch.inference_mode()
    def copy_page(self, source: int, target: int) -> None:
        """Make the page `target` equal to the page `source` in every layer."""
        for pool in self.pools:
            pool[target] = pool[source]

    def view(self, page_table: Tensor, positions: Tensor) -> CacheView:
        """The cache as the decoder takes it, for new tokens at the indices `positions`; see `CacheView.of`."""
        return CacheView.of(
            self.keys,
            self.values,
            page_table,
            positions,
            k_scales=self.k_scales,
            v_scales=self.v_scales,
            key_turns=self.key_turns,
            rounds_attention=self.rounds_attention,
        )

    def allocate(self, tokens: int) -> list[int]:
        """Pages for a sequence of `tokens` tokens. Raises OutOfPagesError when they are not free."""
        return self.pool.allocate(pages_for(tokens, self.page_size))


def head_width(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Elements of a pool per token and head: head_dim, or half as many bytes in int4."""
    return config.head_dim // (2 if dtype == INT4 else 1)


def page_bytes(config: DecoderConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page in the pools of all layers, scales included."""
    scale = torch.float32.itemsize if dtype in QUANTIZED.values() else 0
    head = head_width(config, dtype) * dtype.itemsize + scale
    return 2 * config.layers * page_size * config.kv_heads * head


def turns_bytes(config: DecoderConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the table of angles of an int4 cache for `tokens` tokens; 0 for other caches."""
    return turned_tokens(config, tokens) * config.head_dim * torch.float32.itemsize if dtype == INT4 else 0


def turned_tokens(config: DecoderConfig, tokens: int) -> int:
    """Tokens of the longest sequence in a cache of `tokens` tokens."""
    return min(tokens, config.max_positions)


def pages_for(tokens: int, page_size: int) -> int:
    """Number of pages that hold `tokens` tokens."""
    return -(-tokens // page_size)


def page_table(rows: list[list[int]], device: torch.device, *, width: int = 0, padding: int = 0) -> Tensor:
    """The pages of several sequences as one [batch, width] int32 tensor, `width` at least that of the longest row.

    Short rows are filled up with the page `padding`.
    """
    width = max(width, *map(len, rows))
    return sent(torch.tensor([row + [padding] * (width - len(row)) for row in rows], dtype=torch.int32), device)
