"""Parts of decode attention, merged by the programs that write them or by a launch of their own."""

import pytest
import torch
from support.accuracy import exactly, paged, poisoned

pytest.importorskip("triton")

from afnext.bench.codegen.trace import recorded_launches
from afnext.kernels import decode_attention as attention_module
from afnext.kernels import merge_parts
from afnext.kernels.attention import attention
from afnext.kernels.counters import counters_of
from afnext.kernels.decode_attention import decode_attention
from afnext.kernels.merge_parts import PARTS

PAGE = 64


@pytest.mark.parametrize("parts", [1, 2, PARTS, PARTS + 1, 2 * PARTS + 3])
def test_programs_merge_their_parts_in_one_launch_and_again(
    parts: int, seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exactly as by a separate launch; for the shorter sequence most parts are without keys."""
    monkeypatch.setattr(attention_module, "split_count", lambda *_: parts)
    lengths = [70, 64 * (2 * PARTS + 3) - 5]
    q = torch.randn(2, 2, 6, 16).to(device)
    k, v = torch.randn(2, 2, max(lengths), 2, 16).to(device)
    k_pool, v_pool, table = paged(k, v, lengths, PAGE)
    key_lengths = torch.tensor(lengths, device=device)
    results = []
    for most_rows in (merge_parts.MERGED_ROWS, merge_parts.MERGED_ROWS, 0):
        monkeypatch.setattr(merge_parts, "MERGED_ROWS", most_rows)
        with poisoned("triton"):
            results.append(decode_attention(q, k_pool, v_pool, key_lengths=key_lengths, page_table=table))
    merged, again, separate = results
    assert torch.equal(merged, again)
    torch.testing.assert_close(merged, separate, rtol=1e-5, atol=1e-6)
    expected = exactly(attention, q, k, v, causal=True, key_lengths=key_lengths)
    torch.testing.assert_close(merged.double(), expected, rtol=0, atol=2e-6)
    assert not counters_of(k_pool, 1).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.uint8], ids=str)
def test_one_new_token_takes_one_launch_and_many_take_two(dtype: torch.dtype) -> None:
    pool = torch.empty(64, 256, 4, 64 if dtype == torch.uint8 else 128, dtype=dtype, device="meta")
    scales = None if dtype == torch.bfloat16 else torch.empty(64, 256, 4, device="meta")
    found = {}
    for new_tokens in (1, 8):
        q = torch.empty(1, new_tokens, 28, 128, dtype=torch.bfloat16, device="meta")
        table, lengths = torch.empty(1, 64, dtype=torch.int32, device="meta"), torch.empty(1, dtype=int, device="meta")
        with recorded_launches() as recording:
            decode_attention(q, pool, pool, key_lengths=lengths, page_table=table, k_scales=scales, v_scales=scales)
        found[new_tokens] = [launch.kernel.rpartition(".")[2] for launch in recording.launches]
    (attend,) = found[1]
    assert found[8] == [attend, "_merge_parts"]
