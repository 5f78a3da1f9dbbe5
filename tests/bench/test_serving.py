"""The serving bench runs from end to end on a tiny checkpoint and reports figures that hang together."""

from pathlib import Path

import pytest

pytest.importorskip("psutil")

from afnext.bench.record import read
from afnext.bench.serving import run_serving


def test_all_stages_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    records = run_serving(out, shape="tiny", seconds=40, lengths=[35, 5], repeats=1, scheme="float32")
    assert list(read(out)) == records
    assert [record.name for record in records] == ["throughput", "listening", "listening", "second question"]
    throughput, short, long, question = (record.values for record in records)
    assert throughput["ratio"] == throughput["together_tokens_per_s"] / throughput["apart_tokens_per_s"]
    assert short["kv_bytes"] < long["kv_bytes"]
    assert short["grown_bytes"] <= long["grown_bytes"]
    assert 0 < question["ratio"] < 1
    assert question["cached_tokens"] > 1000
