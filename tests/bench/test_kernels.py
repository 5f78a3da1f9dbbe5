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
from afnext.bench import kernels as module
from afnext.bench.kernel_cases import Case, cases
from afnext.bench.kernel_subjects import FULL, QUICK, Subject, Subjects
from afnext.bench.kernels import KernelBenchmarkError, run_kernels
from afnext.bench.record import Record, read
from afnext.bench.timing import compare_outputs

CPU = torch.device("cpu")
EVERY = {(case.operation, case.label): case for case in cases(FULL)}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_case_agrees_with_its_baseline_and_with_the_specification(seed: int, dtype: torch.dtype) -> None:
    for case in cases(QUICK, dtype):
        subjects = case.subjects(CPU)
        outputs = {name: subject.output(subject.call()) for name, subject in subjects.items()}
        with kernels.backend("reference"):
            exact = subjects["afnext"].output(subjects["afnext"].call())
        for name, output in outputs.items():
            agreement = compare_outputs(exact, output, case.tolerance)
            assert agreement.agrees, f"{name}, {case.operation}, {case.label}: {agreement.reason}"


@pytest.mark.parametrize(
    "case",
    [case for case in cases(QUICK, torch.float32) if case.operation in ("linear", "conv_stem", "attention")],
    ids=lambda case: f"{case.operation}, {case.label}",
)
def test_operations_are_what_torch_counts(case: Case) -> None:
    """Of what torch can count: matrix products, convolutions and attention."""
    call = case.subjects(CPU)["torch"].call
    with FlopCounterMode(display=False) as counter:
        call()
    counted = counter.get_total_flops()
    if case.operation == "attention":  # torch counts masked pairs too
        queries, keys = case.shape["queries"], case.shape["keys"]
        counted = 4 * queries * keys * case.shape["heads"] * case.shape["head_dim"]
        if "prefill" in case.label:
            hidden = 4 * queries * (queries - 1) // 2 * case.shape["heads"] * case.shape["head_dim"]
            counted -= hidden
    assert case.flops == pytest.approx(counted, rel=1e-6)


def test_the_full_shapes_are_those_of_the_model() -> None:
    assert EVERY["conv_stem", "3000 frames"].flops == pytest.approx(17.7e9, rel=0.01)
    assert EVERY["attention", "encoder 1500 x 1500"].flops == 4 * 64 * 20 * 1500**2
    # 2 KiB a cached token and layer: 92 MB at 45 000 tokens, and eight times that for eight rows.
    assert EVERY["decode_attention", "decode 1 x 45000"].bytes == pytest.approx(92e6, rel=0.01)
    assert EVERY["decode_attention", "decode 8 x 45000"].bytes == pytest.approx(8 * 92e6, rel=0.01)
    assert EVERY["linear", "lm_head, 1 rows"].shape == {"rows": 1, "in_features": 3584, "out_features": 151_672}
    labels = {label for operation, label in EVERY if operation == "attention"}
    assert labels == {"encoder 1500 x 1500", *(f"prefill 1024 after {n}" for n in (0, 16_384, 45_000))}


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
    monkeypatch.setattr("afnext.bench.timing.CacheEvictor.__call__", lambda self: evictions.append(1))
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
    repository = Path(module.__file__).parents[1]
    if not (repository / "pyproject.toml").is_file():
        pytest.skip("not a checkout")
    saved = tmp_path / "saved.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "-k", "gelu or greedy"]
    environment = {"AFNEXT_BENCH_SIZES": "quick", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [*command, f"--benchmark-json={saved}"], cwd=repository, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = {entry["name"] for entry in json.loads(saved.read_text())["benchmarks"]}
    assert names == {
        f"test_kernel[{case}-{subject}]"
        for case in ("gelu, encoder 60 x 64", "greedy, 1 x 512", "greedy, 2 x 512")
        for subject in ("afnext", "torch")
    }
