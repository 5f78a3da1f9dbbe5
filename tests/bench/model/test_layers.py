"""The bench of single layers: both sides compute the same on a tiny checkpoint, and its figures hang together."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from afnext.bench.core.record import read
from afnext.bench.model.layers import run_layers
from afnext.kernels.errors import AfnextError


@pytest.mark.parametrize("baselines", [["bf16", "fp32"], ["fp32"]])
def test_stages_agree_with_the_reference(tmp_path: Path, baselines: list[str]) -> None:
    out = tmp_path / "results.jsonl"
    schemes = ["bf16", "bf16+kv8", "int8"]
    records = run_layers(
        out,
        shape="tiny",
        schemes=schemes,
        baselines=baselines,
        stages=["encode", "prefill", "decode"],
        chunk=20,
        prefixes=[0, 50],
        depths=[0, 33],
        repeats=2,
        quiet=True,
    )
    assert list(read(out)) == records
    assert len(records) == (1 + 2 + 2) * (len(baselines) + len(schemes))
    for record in records:
        assert record.values["median_s"] > 0
        if record.subject.startswith("afnext"):
            assert record.values["speedup_over"] == f"transformers {baselines[0]}"
            assert record.values["speedup"] is not None, (record.subject, record.case, record.values["reason"])
    steps = {r.case["depth"]: r.values["bytes"] for r in records if (r.name, r.subject) == ("decode", "afnext bf16")}
    assert steps[33] > steps[0]


def test_unknown_schemes_are_named(tmp_path: Path) -> None:
    with pytest.raises(AfnextError, match="int5"):
        run_layers(
            tmp_path / "results.jsonl",
            shape="tiny",
            schemes=["int5+kv8"],
            baselines=["bf16"],
            stages=["decode"],
            chunk=1,
            prefixes=[],
            depths=[0],
            repeats=2,
            quiet=True,
        )


def test_int4_keys_and_values_take_part(tmp_path: Path) -> None:
    """Their rounding is visible in the output, and the prefix is stored as attention reads it."""
    records = run_layers(
        tmp_path / "results.jsonl",
        shape="tiny",
        schemes=["fp32", "fp32+kv4"],
        baselines=["fp32"],
        stages=["decode"],
        chunk=1,
        prefixes=[],
        depths=[0, 33],
        repeats=2,
        quiet=True,
    )
    errors = {(r.subject, r.case["depth"]): r.values["error"] for r in records if r.subject.startswith("afnext")}
    assert errors["afnext fp32", 33] < 1e-4 < errors["afnext fp32+kv4", 33] < 0.1
