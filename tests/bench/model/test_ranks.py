"""The bench of several processes runs on a tiny checkpoint, and refuses to compare models that answer differently."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil")

import afnext
from afnext.bench.core.record import read
from afnext.bench.model import ranks
from afnext.bench.model.ranks import run_ranks


def test_each_way_is_a_record(tmp_path: Path) -> None:
    out, ways = tmp_path / "results.jsonl", ["tp1", "tp2", "copies2"]
    asked = {"seconds": 1, "new_tokens": 3, "requests": 3}
    records = run_ranks(out, shape="tiny", ways=ways, repeats=1, scheme="fp32", **asked)
    assert list(read(out)) == records
    assert [record.case["way"] for record in records] == ways
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
