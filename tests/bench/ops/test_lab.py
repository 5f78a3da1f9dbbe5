"""The lab says the right thing about kernels that somebody brings: correct, slow, and wrong in every way."""

import importlib.metadata
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.command_line import CommandLine

from afnext.bench.core.ceilings import Ceilings
from afnext.bench.ops import candidate as module
from afnext.bench.ops import rivals, trial
from afnext.bench.ops.accuracy import check
from afnext.bench.ops.candidate import CandidateError, load_candidate, swapped_in
from afnext.bench.ops.lab import defaults_to_time, fault_of, show, try_candidate
from afnext.bench.ops.problems import QUICK, odd_problems, problems
from afnext.bench.ops.specs import spec
from afnext.bench.ops.trial import Request, run
from afnext.kernels import activation
from afnext.kernels.norm import rms_norm

HERE = Path(__file__).parent / "candidates"
TORCH, TRITON = HERE / "torch_kernels.py", HERE / "triton_kernels.py"


def tried(file: Path, function: str, operation: str, **options: Any) -> list[dict[str, Any]]:
    """The events of a trial in this process, for candidates that leave it alive."""
    events: list[dict[str, Any]] = []
    request = Request(f"{file}:{function}", operation, **{"dtype": "float32", "seed": 3, **options})
    run(request, lambda event, **values: events.append({"event": event, **values}))
    return events


@pytest.mark.parametrize("function", ["rms_norm", "gelu", "decode_attention", "linear_int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_correct_candidates_are_correct(function: str, dtype: str) -> None:
    events = tried(TORCH, function, function, dtype=dtype)
    assert fault_of(events) is None
    assert sum(event["event"] == "verdict" for event in events) == len(odd_problems(function, dtype))


@pytest.mark.parametrize(
    ("function", "operation", "fault", "diagnosis"),
    [
        ("rms_norm_inexact", "rms_norm", "inaccurate", "relative RMS error"),
        ("decode_attention_inexact", "decode_attention", "inaccurate", "relative RMS error"),
        ("linear_int8_inexact", "linear_int8", "inaccurate", "relative RMS error"),
        ("decode_attention_without_last_row", "decode_attention", "unwritten", "not written at all"),
        ("rms_norm_scaled", "rms_norm", "inaccurate", "the exact result times 1.02"),
        ("rms_norm_without_last_row", "rms_norm", "unwritten", "not written at all"),
        ("rms_norm_in_place", "rms_norm", "changed input", "its argument x"),
        ("rms_norm_of_another_dtype", "rms_norm", "dtype", "torch.float32 instead of torch.bfloat16"),
        ("rms_norm_raises", "rms_norm", "raised", "ValueError at torch_kernels.py:"),
        ("decode_attention_without_the_first_keys", "decode_attention", "inaccurate", "the worst element is"),
        ("linear_int8_without_bias", "linear_int8", "inaccurate", "relative RMS error"),
        ("linear_int8_without_last_row", "linear_int8", "unwritten", "row 2 of 3"),
        ("linear_int8_with_other_arguments", "linear_int8", "import", "cannot be called like linear_int8(x"),
        ("no_such_function", "gelu", "import", "has no 'no_such_function'"),
    ],
)
def test_wrong_candidates_get_a_diagnosis_and_no_times(
    function: str, operation: str, fault: str, diagnosis: str
) -> None:
    timed = [one.name for one in problems(QUICK) if one.operation == operation][:1]
    events = tried(TORCH, function, operation, dtype="bfloat16", timed=timed)
    found = fault_of(events)
    assert found is not None
    assert found["fault"] == fault
    assert diagnosis in found["diagnosis"]
    assert not [event for event in events if event["event"] in ("time", "worth", "compiled")]


@pytest.mark.parametrize("operation", ["rms_norm", "swiglu", "quantize_rows"])
def test_triton_candidates_are_checked_in_the_interpreter(operation: str) -> None:
    pytest.importorskip("triton")
    is_int8 = operation == "quantize_rows"
    for ending, fault, diagnosis in (
        ("", None, ""),
        ("_inexact", "wrong integers" if is_int8 else "inaccurate", "differ" if is_int8 else "relative RMS error"),
        ("_without_last_row", "wrong integers" if is_int8 else "unwritten", "of"),
        ("_race", "race", "program"),
        ("_out_of_bounds", "out of bounds", "program"),
    ):
        found = fault_of(tried(TRITON, operation + ending, operation, dtype="bfloat16"))
        assert (found and found["fault"]) == fault, ending
        assert found is None or diagnosis in found["diagnosis"]


def test_a_triton_candidate_is_compiled_for_chips_and_not_timed_on_a_cpu() -> None:
    pytest.importorskip("triton")
    timed = [one.name for one in problems() if one.operation == "gelu"][:1]
    events = tried(TRITON, "gelu", "gelu", dtype="bfloat16", timed=timed, targets=["sm_80", "sm_90"])
    compiled = [event for event in events if event["event"] == "compiled"]
    assert [(event["kernel"], event["target"], event["violations"]) for event in compiled] == [
        ("_gelu", "sm_80", []),
        ("_gelu", "sm_90", []),
    ]
    assert all(event["registers"] > 0 for event in compiled)
    assert not [event for event in events if event["event"] == "time"]
    assert any("not timed" in event["text"] for event in events if event["event"] == "note")


@pytest.mark.parametrize(
    ("function", "operation"),
    [("rms_norm_slow", "rms_norm"), ("decode_attention_slow", "decode_attention"), ("linear_int8_slow", "linear_int8")],
)
def test_a_slow_candidate_is_correct_and_slower(function: str, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afnext.bench.ops.trial.problems", lambda dtype: problems(QUICK, dtype))
    monkeypatch.setattr(
        "afnext.bench.ops.trial.measured_ceilings", lambda device: Ceilings(1e10, 1e10, {"float32": 1e11})
    )
    name = next(one.name for one in problems(QUICK, "float32") if one.operation == operation)
    events = tried(TORCH, function, operation, timed=[name], repeats=2, worth=False)
    assert fault_of(events) is None
    seconds = {event["subject"]: event["seconds"] for event in events if event["event"] == "time"}
    assert set(seconds) == {"candidate", "afnext", "torch"}
    assert seconds["candidate"] >= 0.05
    for event in events:
        if event["event"] == "time":
            assert {"tflops_per_s", "gb_per_s", "percent_of_ceiling"} <= set(event)


@pytest.mark.parametrize(
    ("function", "operation", "diagnosis"),
    [
        ("rms_norm_out_of_bounds", "rms_norm", "SIGSEGV: memory outside the tensors was touched"),
        pytest.param("linear_int8_out_of_bounds", "linear_int8", "SIGSEGV: memory outside", marks=pytest.mark.slow),
        pytest.param("decode_attention_out_of_bounds", "decode_attention", "SIGSEGV", marks=pytest.mark.slow),
        pytest.param("rms_norm_exits", "rms_norm", "exit code 7; it wrote: about to leave", marks=pytest.mark.slow),
    ],
)
def test_a_candidate_that_ends_its_process_is_diagnosed(function: str, operation: str, diagnosis: str) -> None:
    started: list[str] = []
    events = try_candidate(Request(f"{TORCH}:{function}", operation), started=started.append)
    found = fault_of(events)
    assert found is not None
    assert (found["fault"], found["problem"]) == ("crashed", odd_problems(operation, "bfloat16")[0].name)
    assert diagnosis in found["diagnosis"]


@pytest.mark.slow
def test_a_candidate_that_does_not_end_is_stopped() -> None:
    found = fault_of(try_candidate(Request(f"{TORCH}:rms_norm_hangs", "rms_norm"), timeout=8.0))
    assert found is not None
    assert found["fault"] == "too slow"


def test_candidates_come_from_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("my-gelu", "afnext.kernels.activation:gelu", module.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == module.GROUP else [])
    assert load_candidate("my-gelu") is activation.gelu
    with pytest.raises(CandidateError, match="there are: my-gelu"):
        load_candidate("another")


def test_in_the_model_tokens_are_compared() -> None:
    events = tried(TORCH, "rms_norm", "rms_norm", in_model="afnext-tiny")
    model = next(event for event in events if event["event"] == "model")
    assert model["calls"] > 10
    assert model["same"] == model["tokens"] > 3
    assert model["first_difference"] is None


def test_swapping_in_reaches_every_call_and_ends_with_the_block() -> None:
    seen: list[float] = []

    def candidate(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        seen.append(eps)
        return torch.zeros_like(x)

    x, weight = torch.ones(2, 4), torch.ones(4)
    with swapped_in(candidate, spec("rms_norm")) as calls:
        assert not rms_norm(x, weight).any()
        rms_norm(x, weight, 0.5)
    assert (len(calls), seen) == (2, [1e-6, 0.5])
    assert rms_norm(x, weight).any()


def test_chance_does_not_decide_but_an_error_does() -> None:
    """A tenth more than allowed on one draw is judged over many."""
    problem = odd_problems("rms_norm", "float32")[0]

    def noisy(scale: float) -> Callable[..., torch.Tensor]:
        return lambda x, weight: rms_norm(x, weight) * (1 + scale)

    assert not check(problem, noisy(0.0), torch.device("cpu")).fault
    assert check(problem, noisy(3e-6), torch.device("cpu")).fault == "inaccurate"


def test_a_problem_that_does_not_fit_into_memory_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afnext.bench.ops.trial.problems", lambda dtype: problems(QUICK, dtype))
    monkeypatch.setattr("afnext.bench.ops.trial.measured_ceilings", lambda device: Ceilings(1e10, 1e10, {}))
    real = rivals.ours

    def ours(problem: Any, arguments: Any, function: Any = None) -> rivals.Subject:
        if problem.shape["channels"] == QUICK.hidden and function is None:
            return rivals.Subject(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("90 GiB")))
        return real(problem, arguments, function)

    monkeypatch.setattr(rivals, "ours", ours)
    names = [one.name for one in problems(QUICK) if one.operation == "gelu"]
    events = tried(TORCH, "gelu", "gelu", dtype="bfloat16", timed=names, repeats=1, worth=False)
    assert fault_of(events) is None
    assert [event["text"] for event in events if "does not fit" in event.get("text", "")]


def test_compiled_kernels_are_counted_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What finds out on a GPU that a candidate launches Triton kernels; the launch itself is a stand-in here."""
    jit = pytest.importorskip("triton.runtime.jit")
    monkeypatch.setattr(jit.JITFunction, "run", lambda kernel, *args, **options: None)
    kernels = load_candidate(f"{TRITON}:swiglu")
    with trial._launches(torch.device("cuda")) as launched:
        kernels(torch.ones(3, 4), torch.ones(3, 4))
    assert launched == ["_double_silu"]


def test_three_very_different_problems_are_timed_by_default() -> None:
    found = [one for one in problems() if one.operation == "decode_attention"]
    names = defaults_to_time(found)
    assert names[0] == "decode_attention/1x1-of-1-int8-kv-bfloat16"
    assert names[-1] == "decode_attention/32x1-of-45001-bfloat16"
    assert len(names) == 3


def test_what_is_printed() -> None:
    events = tried(TORCH, "gelu", "gelu")
    time = {"spread": 0.1, "tflops_per_s": 1.0, "gb_per_s": 2.0, "percent_of_ceiling": 50.0, "limit": "memory"}
    for subject, seconds in (("candidate", 0.001), ("afnext", 0.002), ("torch", 0.004)):
        events.append({"event": "time", "problem": "gelu/1", "subject": subject, "seconds": seconds, **time})
    saved = {"whole": "a 30-minute prefill", "percent": 3.1, "total": 2.0, "launches": 480.0}
    events += [{"event": "worth", **saved, "covered": 480.0}, {"event": "worth", **saved, "covered": 60.0}]
    model = {"model": "tiny", "calls": 9, "same": 3, "tokens": 8, "first_difference": 3}
    events.append({"event": "model", **model})
    console = Console(width=200, file=io.StringIO())
    show(events, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "correct on 3 odd problems" in said
    assert "4.00x as fast" in said
    assert "It saves 3.1 % of a 30-minute prefill, whose operations take 2 s here (480 of its calls)." in said
    assert "(60 of 480 of its calls; at the others the candidate was not timed)" in said
    assert "9 calls, 3 of 8 tokens: other tokens from 3 on" in said


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(monkeypatch, capsys, ("bench", "ops"))


def test_the_command_reports_and_ends_with_a_status(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    def tried_here(request: Request, timeout: float, started: Any) -> list[dict[str, Any]]:
        asked.append(request)
        return tried(TORCH, request.candidate.partition(":")[2], request.operation, dtype=request.dtype)

    monkeypatch.setattr("afnext.bench.ops.lab.try_candidate", tried_here)
    done = cli("--op", "gelu", "--candidate", f"{TORCH}:gelu", "--problem", "gelu/3000x3584*", "--target", "sm_90")
    assert done.returncode == 0, done.stderr
    assert "correct on 3 odd problems" in done.stdout
    assert (asked[0].timed, asked[0].targets) == (["gelu/3000x3584-bfloat16"], ["sm_90"])
    done = cli("--op", "rms_norm", "--candidate", f"{TORCH}:rms_norm_scaled", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)[-1]["fault"] == "inaccurate"
    assert len(asked[1].timed) == 3
    done = cli("--candidate", f"{TORCH}:gelu")
    assert done.returncode == 2
    assert "name the one operation" in done.stderr
