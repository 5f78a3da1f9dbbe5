"""The account of KV pages under any order of allocations and releases."""

import dataclasses

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from afnext.kernels.rotary import Rotation, rope_frequencies
from afnext.runtime.engine.kv_cache import KVCache, PagePool, page_table, pages_for, turns_bytes
from afnext.runtime.errors import OutOfPagesError
from afnext.runtime.model.config import DecoderConfig

PAGES = 20


class PagePoolMachine(RuleBasedStateMachine):
    """Allocations, shares, releases and resizes against a plain list of what each holder holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = PAGES
        self.pool = PagePool(PAGES)
        self.held: list[list[int]] = []

    @property
    def in_use(self) -> set[int]:
        return {page for pages in self.held for page in pages}

    @rule(count=st.integers(0, PAGES + 2))
    def allocate(self, count: int) -> None:
        free = self.pages - len(self.in_use)
        if count > free:
            with pytest.raises(OutOfPagesError, match=rf"{count} KV pages are needed and {free} of {self.pages}"):
                self.pool.allocate(count)
        else:
            pages = self.pool.allocate(count)
            assert len(pages) == count
            assert pages == sorted(pages)
            assert not self.in_use & set(pages)
            self.held.append(pages)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.integers(0, self.pages), unique=True))
        if set(pages) <= self.in_use:
            self.pool.share(pages)
            self.held.append(pages)
        else:
            with pytest.raises(ValueError, match="shared but not in use"):
                self.pool.share(pages)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(data=st.data())
    def releasing_twice_is_refused(self, data: st.DataObject) -> None:
        unused = sorted(set(range(self.pages + 1)) - self.in_use)
        with pytest.raises(ValueError, match="released but not in use"):
            self.pool.release([data.draw(st.sampled_from(unused))])

    @rule(pages=st.integers(0, PAGES + 5))
    def resize(self, pages: int) -> None:
        if max(self.in_use, default=-1) >= pages:
            with pytest.raises(ValueError, match=f"page {max(self.in_use)} is in use"):
                self.pool.resize(pages)
        else:
            self.pool.resize(pages)
            self.pages = pages

    @invariant()
    def every_page_has_the_holders_that_hold_it(self) -> None:
        for page in range(self.pages):
            assert self.pool.ref_count(page) == sum(page in pages for pages in self.held)
        assert self.in_use <= set(range(self.pages))
        assert self.pool.free == self.pages - len(self.in_use)
        assert self.pool.end == max(self.in_use, default=-1) + 1


TestPagePool = PagePoolMachine.TestCase


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (45_000, 2813)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens, 16) == pages


def test_page_table_pads_short_rows() -> None:
    table = page_table([[3, 1, 2], [5]], torch.device("cpu"))
    assert table.tolist() == [[3, 1, 2], [5, 0, 0]]
    assert table.dtype == torch.int32


FULL_SIZE = DecoderConfig(
    vocab_size=10,
    hidden_size=3584,
    intermediate_size=10,
    layers=28,
    heads=28,
    kv_heads=4,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_positions=100,
    tie_word_embeddings=False,
)


def full_size(page_size: int, pages: int, dtype: torch.dtype) -> KVCache:
    """A cache of the full model's shape."""
    return KVCache(FULL_SIZE, pages=pages, page_size=page_size, device=torch.device("cpu"), dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.bfloat16, 57_344), (torch.int8, 29_568), (torch.float8_e4m3fn, 29_568), (torch.uint8, 15_232)],
)
def test_bytes_of_a_token_at_full_size(dtype: torch.dtype, size: int) -> None:
    """57 344 bytes per token in bfloat16, by the model's shape; in 8 bits half, in int4 a quarter, and scales."""
    cache = full_size(16, 3, dtype)
    assert cache.nbytes == 3 * 16 * size
    assert len(cache.allocate(33)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_view_has_the_scales_of_quantized_caches_and_of_nothing_else(dtype: torch.dtype) -> None:
    cache = full_size(4, 3, dtype)
    view = cache.view(page_table([[2, 1]], torch.device("cpu")), torch.tensor([[3, 4]]))
    assert view.slots.tolist() == [[2 * 4 + 3, 1 * 4]]
    assert view.key_lengths.tolist() == [5]
    k_scales, v_scales = view.scales(7)
    assert (view.key_turns is not None) == (dtype == torch.uint8)
    if dtype == torch.float32:
        assert k_scales is v_scales is None
        return
    assert cache.k_scales is not None
    assert cache.v_scales is not None
    assert k_scales is cache.k_scales[7]
    assert v_scales is cache.v_scales[7]
    assert (k_scales.shape, k_scales.dtype) == ((3, 4, 4), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_resizing_keeps_what_is_in_use(dtype: torch.dtype, seed: int) -> None:
    cache = full_size(4, 3, dtype)
    kept = cache.pool.allocate(2)
    for pool in cache.pools:
        pool.copy_(torch.randint(0, 9, pool.shape))
    before = [pool[kept].float() for pool in cache.pools]
    for pages in (7, 2):
        cache.resize(pages)
        assert {len(pool) for pool in cache.pools} == {pages} == {cache.pool.pages}
        assert all(torch.equal(pool[kept].float(), old) for pool, old in zip(cache.pools, before, strict=True))
    with pytest.raises(ValueError, match="page 1 is in use"):
        cache.resize(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_a_page_is_copied_in_every_layer(dtype: torch.dtype, seed: int) -> None:
    cache = full_size(4, 3, dtype)
    for pool in cache.pools:
        pool.copy_(torch.randint(0, 9, pool.shape))
    before = [pool.float() for pool in cache.pools]
    cache.copy_page(2, 0)
    for pool, old in zip(cache.pools, before, strict=True):
        assert torch.equal(pool.float(), old[[2, 1, 2]])


def test_an_int4_cache_has_the_angles_of_every_token_that_it_has_room_for() -> None:
    """As the decoder rotates keys, bit for bit, and no more than the longest sequence has."""
    cache = full_size(4, 3, torch.uint8)
    for pages in (3, 7, 1000, 2):
        cache.resize(pages)
        assert cache.key_turns is not None
        positions = torch.arange(min(pages * 4, 100))  # max_positions
        rotation = Rotation(positions[None].float(), rope_frequencies(128, 1e6), "half")
        assert all(torch.equal(ours, one[0, :, 0]) for ours, one in zip(cache.key_turns, rotation.cos_sin, strict=True))
        assert turns_bytes(FULL_SIZE, pages * 4, torch.uint8) == sum(turn.nbytes for turn in cache.key_turns)
    assert turns_bytes(FULL_SIZE, 8, torch.int8) == 0


def test_heads_that_int4_cannot_store_are_refused() -> None:
    config = dataclasses.replace(FULL_SIZE, head_dim=96)
    with pytest.raises(ValueError, match='those of this model have 96; use kv="int8"'):
        KVCache(config, pages=1, page_size=4, device=torch.device("cpu"), dtype=torch.uint8)
