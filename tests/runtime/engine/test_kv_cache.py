"""The account of KV pages under any order of allocations and releases."""

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from afnext.runtime.engine.kv_cache import KVCache, PagePool, page_table, pages_for
from afnext.runtime.errors import OutOfPagesError
from afnext.runtime.model.config import DecoderConfig

PAGES = 20


class PagePoolMachine(RuleBasedStateMachine):
    """Allocations and releases against a plain list of what each owner holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES)
        self.owned: list[list[int]] = []

    @rule(count=st.integers(0, PAGES + 2))
    def allocate(self, count: int) -> None:
        free = PAGES - sum(map(len, self.owned))
        if count > free:
            with pytest.raises(OutOfPagesError, match=rf"{count} KV pages are needed and {free} of {PAGES}"):
                self.pool.allocate(count)
        else:
            pages = self.pool.allocate(count)
            assert len(pages) == count
            assert pages == sorted(pages)
            self.owned.append(pages)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.owned:
            self.pool.release(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @rule(data=st.data())
    def releasing_twice_is_refused(self, data: st.DataObject) -> None:
        unused = sorted(set(range(PAGES + 1)) - {page for pages in self.owned for page in pages})
        with pytest.raises(ValueError, match="not in use"):
            self.pool.release([data.draw(st.sampled_from(unused))])

    @invariant()
    def every_page_is_owned_once_or_free(self) -> None:
        owned = [page for pages in self.owned for page in pages]
        assert len(set(owned)) == len(owned)
        assert set(owned) <= set(range(PAGES))
        assert self.pool.free == PAGES - len(owned)


TestPagePool = PagePoolMachine.TestCase


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (45_000, 2813)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens, 16) == pages


def test_page_table_pads_short_rows() -> None:
    table = page_table([[3, 1, 2], [5]], torch.device("cpu"))
    assert table.tolist() == [[3, 1, 2], [5, 0, 0]]
    assert table.dtype == torch.int32


def full_size(page_size: int, pages: int, dtype: torch.dtype) -> KVCache:
    """A cache of the full model's shape."""
    config = DecoderConfig(
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
    return KVCache(config, pages=pages, page_size=page_size, device=torch.device("cpu"), dtype=dtype)


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 57_344), (torch.int8, 29_568)])
def test_bytes_of_a_token_at_full_size(dtype: torch.dtype, size: int) -> None:
    """57 344 bytes a token in bfloat16, as the model's shape has it; in int8 half, and 4 bytes a scale."""
    cache = full_size(16, 3, dtype)
    assert cache.nbytes == 3 * 16 * size
    assert len(cache.allocate(33)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_view_has_the_scales_of_int8_and_of_nothing_else(dtype: torch.dtype) -> None:
    cache = full_size(4, 3, dtype)
    view = cache.view(page_table([[2, 1]], torch.device("cpu")), torch.tensor([[3, 4]]))
    assert view.slots.tolist() == [[2 * 4 + 3, 1 * 4]]
    assert view.key_lengths.tolist() == [5]
    k_scales, v_scales = view.scales(7)
    if dtype != torch.int8:
        assert k_scales is v_scales is None
        return
    assert cache.k_scales is not None
    assert cache.v_scales is not None
    assert k_scales is cache.k_scales[7]
    assert v_scales is cache.v_scales[7]
    assert (k_scales.shape, k_scales.dtype) == ((3, 4, 4), torch.float32)
