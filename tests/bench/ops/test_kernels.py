"""The kernel benchmark: counts as an independent count does, tells slow from fast, refuses wrong outputs, resumes."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from afnext import kernels
from afnext.bench.core.record import Record, read
from afnext.bench.core.timing import compare_outputs
from afnext.bench.ops import kernels as module
from afnext.bench.ops.cases import COMMON, Case, cases
from afnext.bench.ops.kernels import KernelBenchmarkError, run_kernels
from afnext.bench.ops.problems import QUICK
from afnext.bench.ops.rivals import Subject, Subjects

CPU = torch.device("cpu")
EVERY = {(case.operation, case.label): case for case in cases(COMMON)}


def planted(name: str, **calls: Callable[[], Any]) -> Case:
    """A case of one's own, with the subjects given."""

    def subjects(device: torch.device) -> Subjects:
        return {subject.replace("_", "-"): Subject(call) for subject, call in calls.items()}

    return Case(name, "planted", {"rows": 1}, "float32", 1e6, 1e6, subjects, 1e-4)


def run(path: Path, *only: Case, **options: Any) -> dict[tuple[str, str], Record]:
    settings: dict[str, Any] = {"quick": True, "repeats": 3, "min_time": 0, "cold_cache": False, "progress": False}
    found = run_kernels(path, only=only, **(settings | options))
    return {(record.name, record.subject): record for record in found}


def slowly(x: torch.Tensor, seconds: float) -> torch.Tensor:
    time.sleep(seconds)
    return x.clone()


# ---- judging


def test_a_planted_slow_operation_shows_as_slower(tmp_path: Path) -> None:
    x = torch.randn(10)
    found = run(
        tmp_path / "r.jsonl", planted("planted", afnext=lambda: slowly(x, 0.03), torch=lambda: slowly(x, 0.005))
    )
    ours = found["planted", "afnext float32"].values
    assert ours["speedup"] < 0.5
    assert ours["speedup_low"] <= ours["speedup"] <= ours["speedup_high"]
    assert ours["speedup_over"] == "torch float32"
    assert ours["median_s"] > 2 * found["planted", "torch float32"].values["median_s"]


def test_a_faster_operation_with_the_same_output_gets_its_speedup(tmp_path: Path) -> None:
    x = torch.randn(10)
    found = run(tmp_path / "r.jsonl", planted("planted", afnext=x.clone, torch=lambda: slowly(x, 0.01)))
    assert found["planted", "afnext float32"].values["speedup"] > 2
    assert "no_speedup" not in found["planted", "afnext float32"].values
    assert "speedup" not in found["planted", "torch float32"].values


@pytest.mark.parametrize("wrong", [lambda x: x * 1.01, lambda x: x[:-1], lambda x: x * torch.nan])
def test_a_planted_wrong_output_forbids_the_speedup(tmp_path: Path, wrong: Callable[[Any], Any]) -> None:
    x = torch.randn(10)
    path = tmp_path / "r.jsonl"
    found = run(path, planted("planted", afnext=lambda: wrong(x), torch=lambda: slowly(x, 0.01)))
    ours = found["planted", "afnext float32"].values
    assert ours["speedup"] is None
    assert ours["speedup_low"] is None
    assert ours["speedup_high"] is None
    assert "outputs differ" in ours["no_speedup"]
    assert ours["median_s"] > 0
    for line in path.read_text().splitlines():  # strict JSON, also where the error is infinite
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the results"))


def test_a_rival_that_fails_is_left_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(10)

    def fails() -> None:
        raise RuntimeError("no kernel image [for this GPU]")

    found = run(tmp_path / "r.jsonl", planted("planted", afnext=x.clone, torch=x.clone, flash_attn=fails))
    assert set(found) == {("ceiling", "machine"), ("planted", "afnext float32"), ("planted", "torch float32")}
    told = " ".join(capsys.readouterr().err.split())
    assert "flash-attn is left out of planted" in told
    assert "no kernel image [for this GPU]" in told


def test_without_the_baseline_there_is_no_speedup(tmp_path: Path) -> None:
    x = torch.randn(10)

    def fails() -> None:
        raise RuntimeError

    found = run(tmp_path / "r.jsonl", planted("planted", afnext=x.clone, torch=fails))
    assert found["planted", "afnext float32"].values["speedup"] is None
    assert "not measured" in found["planted", "afnext float32"].values["no_speedup"]


def test_what_does_not_fit_into_memory_is_left_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("tried to allocate 90 GiB")

    x = torch.randn(10)
    large = planted("large", afnext=too_large, torch=x.clone)
    found = run(tmp_path / "r.jsonl", large, planted("small", afnext=x.clone, torch=x.clone))
    assert {name for name, _ in found} == {"ceiling", "small"}
    assert "large planted is left out" in " ".join(capsys.readouterr().err.split())


def test_our_own_failure_is_raised(tmp_path: Path) -> None:
    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "r.jsonl", planted("planted", afnext=fails, torch=lambda: torch.ones(1)))


# ---- resuming


def test_an_interrupted_run_resumes_without_measuring_again(tmp_path: Path) -> None:
    calls: list[str] = []
    x = torch.randn(10)

    def counted(name: str, stop: bool = False) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            if stop:
                raise KeyboardInterrupt
            calls.append(name)
            return x.clone()

        return call

    def three(stop: bool) -> list[Case]:
        return [
            planted("first", afnext=counted("first"), torch=counted("first")),
            planted("second", afnext=counted("second", stop), torch=counted("second")),
            planted("third", afnext=counted("third"), torch=counted("third")),
        ]

    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, *three(stop=True))
    assert {record.name for record in read(path)} == {"ceiling", "first"}
    before = path.read_bytes()
    calls.clear()
    found = run(path, *three(stop=False))
    assert set(calls) == {"second", "third"}
    assert path.read_bytes().startswith(before)
    expected = {(name, f"{who} float32") for name in ("first", "second", "third") for who in ("afnext", "torch")}
    assert set(found) == expected | {("ceiling", "machine")}
    calls.clear()
    again = run(path, *three(stop=False))
    assert not calls
    assert again == found


def test_other_settings_are_other_measurements(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    case = planted("planted", afnext=lambda: torch.ones(1), torch=lambda: torch.ones(1))
    before = torch.get_num_threads()
    run(path, case)
    one = run(path, case, thread_count=1)
    assert one["planted", "afnext float32"].case["threads"] == 1
    assert one["planted", "afnext float32"].machine["threads"] == 1
    assert torch.get_num_threads() == before
    assert sum(record.name == "planted" for record in read(path)) == 4


def test_a_forced_backend_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    case = planted("planted", afnext=lambda: torch.ones(1), torch=lambda: torch.ones(1))
    run(path, case)
    with kernels.backend("reference"):
        found = run(path, case)
    assert ("planted", "afnext float32 (reference backend)") in found


# ---- the model's cases


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    path = tmp_path_factory.mktemp("kernels") / "results.jsonl"
    return run_kernels(path, quick=True, repeats=2, min_time=0, cold_cache=False, progress=False, thread_count=1)


def test_the_quick_run_covers_every_operation_and_says_what_it_found(quick: list[Record]) -> None:
    ours = [record for record in quick if record.subject.startswith("afnext")]
    assert {record.name for record in ours} == {case.operation for case in EVERY.values()}
    for record in ours:
        values = record.values
        assert values["tflops_per_s"] == pytest.approx(values["flops"] / values["median_s"] / 1e12)
        assert values["gb_per_s"] == pytest.approx(values["bytes"] / values["median_s"] / 1e9)
        assert values["percent_of_ceiling"] > 0
        assert values["limit"] in ("compute", "memory")
        assert record.machine["cpu"]
        assert record.kind == "measured"


def test_on_the_quick_run_no_output_differs_from_the_baseline(quick: list[Record]) -> None:
    refused = {(r.name, r.case["label"]): r.values["no_speedup"] for r in quick if "no_speedup" in r.values}
    assert not refused


def test_every_case_agrees_with_its_baseline_in_float32() -> None:
    for case in cases(QUICK, torch.float32):
        subjects = case.subjects(CPU)
        outputs = {name: subject.output(subject.call()) for name, subject in subjects.items()}
        agreement = compare_outputs(outputs["torch"], outputs["afnext"], case.tolerance)
        assert agreement.agrees, f"{case.operation}, {case.label}: {agreement.reason}"


@pytest.mark.parametrize(
    "case",
    [case for case in cases(QUICK, torch.float32) if case.operation in ("linear", "conv_stem", "attention")],
    ids=lambda case: f"{case.operation}, {case.label}",
)
def test_flops_are_what_torch_counts(case: Case) -> None:
    """Of what torch can count: matrix products, convolutions and attention."""
    call = case.subjects(CPU)["torch"].call
    with FlopCounterMode(display=False) as counter:
        call()
    counted = counter.get_total_flops()
    if case.operation == "attention":  # torch counts masked pairs too
        queries, keys = case.shape["queries"], case.shape.get("keys", case.shape["queries"])
        pairs = queries * keys - ("keys" in case.shape) * queries * (queries - 1) // 2
        counted = 4 * case.shape["batch"] * pairs * case.shape["heads"] * case.shape["head_dim"]
    assert case.flops == pytest.approx(counted, rel=1e-6)


def test_the_full_shapes_are_those_of_the_model() -> None:
    assert EVERY["conv_stem", "4 x 3000 x 128 x 1280"].flops == pytest.approx(4 * 17.7e9, rel=0.01)
    assert EVERY["attention", "encoder 4 x 1500"].flops == 4 * 4 * 64 * 20 * 1500**2
    # 2 KiB a cached token and layer: 92 MB at 45 000 tokens, and eight times that for eight rows.
    assert EVERY["decode_attention", "1 x 1 of 45001"].bytes == pytest.approx(92e6, rel=0.01)
    assert EVERY["decode_attention", "8 x 1 of 45001"].bytes == pytest.approx(8 * 92e6, rel=0.01)
    assert EVERY["decode_attention", "8 x 1 of 45001, int8 KV"].bytes == pytest.approx(8 * 47.5e6, rel=0.01)
    assert EVERY["linear_int8", "1 rows, 3584 to 151672"].bytes == pytest.approx(151_672 * 3590, rel=0.01)


def test_operations_and_dtypes_are_chosen_by_name(tmp_path: Path) -> None:
    found = run_kernels(
        tmp_path / "r.jsonl",
        dtypes=["float32", "bfloat16"],
        operations=["gelu", "greedy"],
        quick=True,
        repeats=2,
        min_time=0,
        cold_cache=False,
        progress=False,
    )
    ours = {(record.name, record.subject) for record in found if record.subject.startswith("afnext")}
    assert ours == {("gelu", "afnext float32"), ("gelu", "afnext bfloat16"), ("greedy", "afnext float32")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"device": "xpu"}, "unknown device 'xpu'"),
        ({"dtypes": ["int3"]}, "unknown dtype 'int3'"),
        ({"operations": ["gelu", "gulu"]}, "unknown operations gulu; there are add_layer_norm"),
    ],
)
def test_unknown_choices_are_named_before_anything_is_measured(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(KernelBenchmarkError, match=message):
        run_kernels(path, quick=True, **options)
    assert not path.exists()


def test_a_gpu_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelBenchmarkError, match=r"no CUDA device.*cpu"):
        run_kernels(tmp_path / "r.jsonl", device="cuda")


def test_a_cold_run_evicts_before_each_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evictions: list[int] = []
    monkeypatch.setattr("afnext.bench.core.timing.CacheEvictor.__call__", lambda self: evictions.append(1))
    case = planted("planted", afnext=lambda: torch.ones(1), torch=lambda: torch.ones(1))
    found = run(tmp_path / "r.jsonl", case, repeats=3, cold_cache=True)
    assert len(evictions) == 6
    assert found["planted", "afnext float32"].case["cache"] == "cold"


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_the_quick_run_works_on_a_gpu(tmp_path: Path, graphs: bool) -> None:
    found = run_kernels(
        tmp_path / "r.jsonl", device="cuda", dtypes=["float16"], quick=True, graphs=graphs, progress=False
    )
    assert {record.values["clock"] for record in found if record.name == "linear"} == {
        "cuda graph" if graphs else "cuda events"
    }


def test_the_pytest_benchmarks_run_when_named(tmp_path: Path) -> None:
    repository = Path(module.__file__).parents[2]
    if not (repository / "pyproject.toml").is_file():
        pytest.skip("not a checkout")
    saved = tmp_path / "saved.json"
    command = [sys.executable, "-m", "pytest", "tests/benchmarks/kernels.py", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "gelu or greedy", f"--benchmark-json={saved}"]
    environment = {"AFNEXT_BENCH_SIZES": "quick", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {entry["name"] for entry in json.loads(saved.read_text())["benchmarks"]}
    assert names == {
        f"test_kernel[{case}-{subject}]"
        for case in ("gelu, 120 x 128", "gelu, 60 x 128", "greedy, 1 x 512", "greedy, 2 x 512")
        for subject in ("afnext", "torch")
    }
