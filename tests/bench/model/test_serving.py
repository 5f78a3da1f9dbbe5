"""The serving bench runs from end to end on a tiny checkpoint and reports figures that hang together."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil")

import afnext
from afnext.bench.core.record import read
from afnext.bench.model import serving
from afnext.bench.model.serving import run_serving


def test_all_stages_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        model = afnext.load(*args, **options)
        loaded.append(model.network.config.quantization)
        return model

    monkeypatch.setattr(serving, "load", load)
    out = tmp_path / "results.jsonl"
    records = run_serving(out, shape="tiny", seconds=40, lengths=[35, 5], repeats=1, scheme="int8")
    assert list(read(out)) == records
    assert [record.name for record in records] == ["throughput", "listening", "listening", "second question"]
    for record in records:
        assert (record.subject, record.case["scheme"]) == ("afnext int8", "int8")
    assert [str(scheme) for _, scheme in loaded[0].rules] == ["int8"] * 5
    throughput, short, long, question = (record.values for record in records)
    assert throughput["ratio"] == throughput["together_tokens_per_s"] / throughput["apart_tokens_per_s"]
    assert short["kv_bytes"] < long["kv_bytes"]
    assert short["grown_bytes"] <= long["grown_bytes"]
    assert 0 < question["ratio"] < 1
    assert question["cached_tokens"] > 1000
