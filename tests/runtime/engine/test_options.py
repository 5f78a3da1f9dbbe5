"""Options out of range are refused by name."""

import pytest

from afnext.runtime.engine.options import EngineOptions


@pytest.mark.parametrize("name", ["page_size", "chunk_size", "encode_batch", "max_batch", "max_kv_tokens"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        EngineOptions(**{name: 0})


def test_an_unknown_kv_storage_is_refused() -> None:
    with pytest.raises(ValueError, match="kv must be one of auto, int8, fp8, int4, got 'int3'"):
        EngineOptions(kv="int3")


def test_attention_in_int8_needs_keys_in_int8() -> None:
    EngineOptions(kv="int8", attention="int8")
    with pytest.raises(ValueError, match="attention must be one of auto, int8, got 'fp8'"):
        EngineOptions(attention="fp8")
    for kv in ("auto", "fp8", "int4"):
        with pytest.raises(ValueError, match=f'use kv="int8", not kv="{kv}"'):
            EngineOptions(kv=kv, attention="int8")
