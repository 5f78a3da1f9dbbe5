"""The worth of a candidate counts every launch of a whole prefill of 30 minutes, or of a decode step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from afnext.bench.ops import trial
from afnext.bench.ops.problems import FULL, QUICK, Problem, Stage
from afnext.bench.ops.trial import Request
from afnext.bench.ops.worth import prefill, wholes, worth


def launches(calls: Any, **wanted: Any) -> float:
    """How often the operation is called, at shapes with these values."""
    operation = wanted.pop("operation")
    return sum(
        count
        for problem, count in calls.items()
        if problem.operation == operation and all(problem.shape.get(name) == v for name, v in wanted.items())
    )


def test_a_30_minute_prefill_has_60_windows_and_45000_tokens() -> None:
    calls = prefill().calls
    assert launches(calls, operation="log_mel") == 15, "four windows at once"
    assert launches(calls, operation="gelu", channels=FULL.encoder_inner) == 15 * FULL.encoder_layers
    chunks = 45_000 / FULL.chunk
    assert launches(calls, operation="rms_norm") == pytest.approx(chunks)
    assert launches(calls, operation="kv_write") == pytest.approx(chunks * FULL.layers)
    assert launches(calls, operation="linear_swiglu") == pytest.approx(chunks * FULL.layers)
    assert launches(calls, operation="linear", out_features=FULL.vocab) == pytest.approx(1), "one token is scored"
    assert launches(calls, operation="decode_attention") == 0


def test_chunks_between_measured_depths_take_what_lies_between() -> None:
    """If attention takes a second per key, the sum is that over all chunks, the last of which is shorter."""
    calls = prefill().calls
    total = sum(
        count * (problem.context - FULL.chunk)
        for problem, count in calls.items()
        if problem.operation == "attention" and problem.context
    )
    starts = range(0, 45_000, FULL.chunk)
    expected = sum(start * min(FULL.chunk, 45_000 - start) / FULL.chunk for start in starts) * FULL.layers
    assert total == pytest.approx(expected)


def test_packed_weights_and_int8_keys_have_prefills_of_their_own() -> None:
    whole = prefill("int4", kv8=True)
    assert whole.name == "a 30-minute prefill, int4, int8 KV"
    assert launches(whole.calls, operation="linear_int4_swiglu") > 1000
    assert launches(whole.calls, operation="attention", kv8=1) > 1000
    assert launches(whole.calls, operation="attention", kv8=0) == 0


def test_a_problem_belongs_to_the_prefill_and_those_of_decoding_to_a_step() -> None:
    chunk = next(one for one in Stage("prefill", QUICK.chunk, 48).calls(QUICK) if one.operation == "attention")
    step = next(one for one in Stage("decode", 2, 40).calls(QUICK) if one.operation == "decode_attention")
    names = [whole.name for whole in wholes([chunk, step, chunk], "bfloat16", QUICK)]
    assert names == ["a 30-minute prefill", "one step, decode 2 at 40"]


def test_the_saving_is_the_candidates_over_all_launches_of_its_operation() -> None:
    whole = prefill(sizes=QUICK)
    total = sum(whole.calls.values())
    attention = {problem: count for problem, count in whole.calls.items() if problem.operation == "attention"}
    encoder = next(problem for problem in attention if not problem.context)

    def candidate(problem: Problem) -> float | None:
        return None if problem == encoder else 0.25

    found = worth(whole, "attention", lambda problem: 1.0, candidate)
    assert found.total == pytest.approx(total)
    assert found.launches == pytest.approx(sum(attention.values()))
    assert found.covered == pytest.approx(found.launches - attention[encoder])
    assert found.percent == pytest.approx(100 * 0.75 * found.covered / total)


def test_the_trial_measures_ours_everywhere_and_the_candidate_at_its_operations_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial, "wholes", lambda found, dtype: wholes(found, dtype, QUICK))
    measured: list[tuple[bool, str]] = []

    def ours(problem: Problem, arguments: Any, function: Callable[..., Any] | None = None) -> Any:
        measured.append((function is None, problem.operation))
        return problem

    monkeypatch.setattr(trial.rivals, "ours", ours)
    monkeypatch.setattr(trial, "_seconds", lambda subject, device: 1.0)
    problem = next(one for one in Stage("prefill", QUICK.chunk, 0).calls(QUICK) if one.operation == "rms_norm")
    events: list[dict[str, Any]] = []
    trial._worth(
        {problem: {"afnext": 1.0, "candidate": 0.5}},
        lambda x, weight: x,
        torch.device("cpu"),
        Request("", "rms_norm"),
        lambda event, **values: events.append({"event": event, **values}),
    )
    assert {operation for is_ours, operation in measured if not is_ours} <= {"rms_norm"}
    assert {"attention", "log_mel", "linear"} <= {operation for is_ours, operation in measured if is_ours}
    found = events[-1]
    whole = prefill(sizes=QUICK).calls
    assert found["percent"] == pytest.approx(100 * 0.5 * whole[problem] / sum(whole.values()))
    assert found["whole"] == "a 30-minute prefill"
