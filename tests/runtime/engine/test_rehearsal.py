"""What `load` does on GPUs so that no request waits for the compiler, on GPUs that are not there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.audio import speech_like
from support.fake_cuda import FakeCuda

import afnext
from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.kernels import autotune, configs
from afnext.kernels.compilation import Uncompiled
from afnext.runtime.engine import executor
from afnext.runtime.engine.engine import Engine

REHEARSE = Engine.rehearse
SMALL = {"page_size": 16, "chunk_size": 64, "max_batch": 2, "prefix_cache_bytes": 0, "encoder_cache_bytes": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("random"))


@pytest.fixture(autouse=True)
def _rehearsing(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "rehearse", REHEARSE)


def load(folder: Path, **options: Any) -> afnext.Model:
    return afnext.load(folder, device="cuda:1", dtype="bfloat16", **{**SMALL, **options})


def ask(model: afnext.Model, seconds: float = 1.0, **options: Any) -> None:
    audio = (speech_like(seconds, 0), 16_000) if seconds else None
    model.ask(audio, "What is said?", max_new_tokens=6, **options)


@pytest.mark.parametrize(("quant", "kv"), [pytest.param(None, "auto", marks=pytest.mark.slow), ("int4-g32", "int8")])
def test_requests_compile_nothing_that_loading_has_not(
    folder: Path, cuda: FakeCuda, quant: str | None, kv: str
) -> None:
    reports: list[tuple[str, int, int]] = []
    options = {"quant": quant, "kv": kv, "draft_tokens": 2, "max_batch": 4, "chunk_size": 200}
    with load(folder, progress=lambda *report: reports.append(report), **options) as model:
        compiled = list(cuda.compiled)
        assert compiled
        for seconds in (0.4, 7.3):
            ask(model, seconds)
        ask(model, 0, temperature=0.7, top_k=5, repetition_penalty=1.2)
        model.chat([[{"role": "user", "content": "a" * length}] for length in (1, 20, 77)], max_new_tokens=5)
    assert cuda.compiled == compiled
    stages = [stage for stage in dict.fromkeys(report[0] for report in reports) if stage.endswith("kernels")]
    assert stages == ["compiling kernels", "running kernels"]
    for stage in stages:
        counts = [report[1:] for report in reports if report[0] == stage]
        assert counts == [(done, len(counts) - 1) for done in range(len(counts))]


@pytest.mark.parametrize(
    "options",
    [{"draft_tokens": 2}, {"quant": "int8-w8a8", "kv": "int4"}, {"encode_ahead": True}, {"batch_invariant": True}],
    ids=str,
)
def test_kernels_are_compiled_before_any_is_launched(
    folder: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    compile_all, collected = executor.compile_all, []

    def compile_noted(kernels: list[Uncompiled], progress: Callable[[int, int], None]) -> None:
        assert not cuda.compiled
        assert not cuda.launches
        assert not cuda.graphs
        compile_all(kernels, progress)
        collected.extend(kernel.name for kernel in kernels)
        assert len(collected) == len(cuda.compiled) == len(set(cuda.compiled))

    monkeypatch.setattr(executor, "compile_all", compile_noted)
    with load(folder, **options):
        assert len(cuda.compiled) == len(collected)
        assert {launch.kernel for launch in cuda.launches} == set(collected)
        assert not cuda.graphs


def test_a_second_model_compiles_only_what_differs(folder: Path, cuda: FakeCuda) -> None:
    with load(folder, encode_ahead=False):
        first = len(cuda.compiled)
        with load(folder, encode_ahead=False):
            assert len(cuda.compiled) == first
        with load(folder, encode_ahead=False, kv="int8"):
            assert first < len(cuda.compiled) < 2 * first


def test_a_kernel_that_does_not_compile_ends_loading(
    folder: Path, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> None:
        if name == "_attend_part":
            raise RuntimeError("ptxas fatal")

    cuda.compiling = fail
    with pytest.raises(RuntimeError, match="ptxas fatal"):
        load(folder)
    assert "the kernel decode_attention._attend_part does not compile" in caplog.text
    assert not cuda.launches


def test_nothing_is_timed_before_the_kernels_are_compiled(
    folder: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AFNEXT_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "_winners", {})
    timed: list[int] = []

    def milliseconds(function: Callable[[], object]) -> float:
        compiled = len(cuda.compiled)
        function()
        timed.append(len(cuda.compiled) - compiled)
        return 1.0

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    with load(folder, quant="int4-g32"):
        assert timed
        assert not any(timed)


def test_only_tritons_kernels_are_collected(folder: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFNEXT_BACKEND", "torch")
    reports: list[str] = []
    with load(folder, progress=lambda stage, done, total: reports.append(stage)):
        assert "running kernels" in reports
        assert "compiling kernels" not in reports
    assert not cuda.compiled
