"""The paged layout of the KV cache: token i of a sequence is in slot i % page_size of its page i // page_size.

A layer's keys are one tensor [pages, page_size, kv_heads, head_dim], its values another. A sequence is a row of the
page table, [batch, max_pages] int32: the pages that hold its tokens, in order; entries past its end are not read.
"""

import torch
from torch import Tensor

from .int4_cache import DTYPE as INT4
from .quantize_rows import E4M3
from .triton_language import tl, triton

QUANTIZED = frozenset((torch.int8, E4M3, INT4))
"""The dtypes of pools that have a float32 scale for each token and head; see `kv_write.py`."""


def page_slots(page_table: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Flat slot of each token. page_table: [batch, max_pages] int; positions: [batch, time] int64, token indices.

    Returns [batch, time] int64: indices into a cache viewed as [pages * page_size, ...].
    """
    pages = page_table.long().gather(1, positions // page_size)
    return pages * page_size + positions % page_size


def gather_pages(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """The first `length` tokens of the sequence held by `pages`: [length, kv_heads, head_dim].

    Returns a view if the pages are consecutive in the pool, as for a sequence that was allocated at once; otherwise a
    copy. Raises ValueError if the pages cannot hold that many tokens.
    """
    count = -(-length // cache.shape[1])
    if count > len(pages):
        raise ValueError(f"{length} tokens in pages of {cache.shape[1]} need {count} pages, got {len(pages)} pages")
    numbers = pages[:count].tolist()
    first = numbers[0] if count else 0
    if numbers == list(range(first, first + count)):
        return cache[first : first + count].flatten(0, 1)[:length]
    return cache[pages[:count].long()].flatten(0, 1)[:length]


@triton.jit
def locate_tokens(pages, first, end, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """In a kernel: the page, and the slot in it, of the tokens first .. first + BLOCK - 1, `first` a multiple of BLOCK.

    pages: the sequence's row of the page table. Returns (int64, [BLOCK] int32). The page is one number if all tokens
    are in the same page; otherwise [BLOCK], with 0 for tokens from `end` on.
    """
    if PAGE_SIZE % BLOCK == 0:
        page = tl.load(pages + first // PAGE_SIZE)
        slots = first % PAGE_SIZE + tl.arange(0, BLOCK)
    else:
        tokens = first + tl.arange(0, BLOCK)
        page = tl.load(pages + tokens // PAGE_SIZE, mask=tokens < end, other=0)
        slots = tokens % PAGE_SIZE
    return page.to(tl.int64), slots


@triton.jit
def page_of(pages, token, end, PAGE_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """In a kernel: the page of one token; for a token from `end` on, the page of the last token before `end`.

    For loops that load tiles ahead: they look up a tile's page one iteration earlier, so that no load waits for it.
    """
    return tl.load(pages + tl.maximum(tl.minimum(token, end - 1), 0) // PAGE_SIZE)
