"""The bench of tensor parallelism runs on a tiny checkpoint, and refuses to compare models that answer differently."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil")

import afnext
from afnext.bench.core.record import read
from afnext.bench.model import ranks
from afnext.bench.model.ranks import run_ranks


def test_each_number_of_ranks_is_a_record(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    records = run_ranks(out, shape="tiny", ways=["tp1", "tp2"], seconds=1, new_tokens=3, repeats=1, scheme="fp32")
    assert list(read(out)) == records
    assert [record.case["way"] for record in records] == ["tp1", "tp2"]
    for record in records:
        assert record.values["first_s"] > 0
        assert record.values["tokens_per_s"] > 0


def test_different_answers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, tp: int, sp: int, **options: Any) -> Any:
        """Other weights for each number of ranks."""
        afnext.bench.core.random_checkpoint.write_random_checkpoint(args[0], "tiny", seed=tp)
        return afnext.load(*args, **options)

    monkeypatch.setattr(ranks, "load", load)
    ways = ["tp1", "tp2", "tp4"]
    with pytest.raises(afnext.AfnextError, match="answer differently"):
        run_ranks(tmp_path / "out", shape="tiny", ways=ways, seconds=1, new_tokens=2, repeats=1, scheme="fp32")
    assert not (tmp_path / "out").exists()
