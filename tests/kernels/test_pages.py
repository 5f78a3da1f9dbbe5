"""Paged layout: what is written through slots is read back through pages, for any table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import UNREAD_PAGE

from afnext.kernels.pages import gather_pages, page_slots

PAGE_SIZES = st.sampled_from([1, 3, 16, 256])
LENGTHS = st.lists(st.integers(1, 600), min_size=1, max_size=4)


def filled_pool(lengths: list[int], page_size: int, order: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool in which token i of sequence b holds (b, i), and its page table over the pages in `order`."""
    counts = [-(-length // page_size) for length in lengths]
    table = torch.full((len(lengths), max(counts) + 1), UNREAD_PAGE, dtype=torch.int32)
    pool = torch.full((len(order), page_size, 1, 2), -1.0)
    pages = iter(order)
    for b, length in enumerate(lengths):
        table[b, : counts[b]] = torch.tensor([next(pages) for _ in range(counts[b])])
        slots = page_slots(table[b : b + 1], torch.arange(length)[None], page_size)[0]
        assert slots.dtype == torch.int64
        pool.view(-1, 1, 2)[slots, 0] = torch.stack((torch.full((length,), b), torch.arange(length)), -1).float()
    return pool, table


@settings(max_examples=60, database=None)
@given(data=st.data(), page_size=PAGE_SIZES, lengths=LENGTHS)
def test_written_tokens_are_read_back_in_order(data: st.DataObject, page_size: int, lengths: list[int]) -> None:
    total = sum(-(-length // page_size) for length in lengths) + 2
    order = data.draw(st.randoms(use_true_random=False)).sample(range(total), total)
    pool, table = filled_pool(lengths, page_size, order)
    for b, length in enumerate(lengths):
        tokens = gather_pages(pool, table[b], length)
        assert tokens.shape == (length, 1, 2)
        assert (tokens[:, 0, 0] == b).all()
        assert torch.equal(tokens[:, 0, 1], torch.arange(length).float())
    assert int((pool[..., 0] >= 0).sum()) == sum(lengths), "two tokens share a slot"


@settings(max_examples=60, database=None)
@given(page_size=PAGE_SIZES, first=st.integers(0, 3), length=st.integers(1, 600))
def test_consecutive_pages_are_read_without_a_copy(page_size: int, first: int, length: int) -> None:
    count = -(-length // page_size)
    pool, table = filled_pool([length], page_size, list(range(first, first + count)) + list(range(first)))
    tokens = gather_pages(pool, table[0], length)
    assert tokens.data_ptr() == pool[first].data_ptr()
    assert torch.equal(tokens[:, 0, 1], torch.arange(length).float())


def test_slots_of_single_tokens() -> None:
    table = torch.tensor([[7, 2, UNREAD_PAGE], [0, 5, 1]], dtype=torch.int32)
    slots = page_slots(table, torch.tensor([[0, 15, 16], [31, 32, 47]]), 16)
    assert slots.tolist() == [[7 * 16, 7 * 16 + 15, 2 * 16], [5 * 16 + 15, 16, 31]]


def test_no_tokens() -> None:
    assert gather_pages(torch.zeros(2, 16, 3, 8), torch.tensor([1], dtype=torch.int32), 0).shape == (0, 3, 8)


def test_too_few_pages_are_an_error_not_fewer_tokens() -> None:
    with pytest.raises(ValueError, match="33 tokens in pages of 16 need 3 pages, got 2"):
        gather_pages(torch.zeros(4, 16, 1, 8), torch.tensor([0, 1], dtype=torch.int32), 33)
