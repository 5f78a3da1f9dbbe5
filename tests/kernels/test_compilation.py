"""Kernels collected from launches and compiled in threads, on simulated GPUs."""

import threading
from collections.abc import Iterator

import pytest
import torch
from support.fake_cuda import FakeCuda

from afnext.kernels import activation, compilation
from afnext.kernels.compilation import collecting, compile_all, is_collecting
from afnext.kernels.cpus import Cpus
from afnext.kernels.sampling import greedy

GREEDY = ["sampling._chunk_best_kernel", "sampling._best_kernel"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    with FakeCuda(monkeypatch).active() as cuda:
        yield cuda


def best(rows: int = 3) -> torch.Tensor:
    return greedy(torch.zeros(rows, 5000, device="cuda:0"))


def test_collected_kernels_are_compiled_once_and_launched_later(cuda: FakeCuda) -> None:
    with collecting() as kernels:
        assert is_collecting()
        for _ in range(3):
            best()
        assert [kernel.name for kernel in kernels] == GREEDY
        assert not cuda.launches
        assert not cuda.compiled
    assert not is_collecting()
    compile_all(kernels, lambda done, total: None)
    assert len(cuda.compiled) == 2
    assert not cuda.launches
    best()
    assert [launch.kernel for launch in cuda.launches] == GREEDY
    assert len(cuda.compiled) == 2
    with collecting() as kernels:
        best()
    assert not kernels


def test_a_kernel_that_was_only_collected_is_compiled_by_its_launch(cuda: FakeCuda) -> None:
    with collecting():
        best()
    best()
    best()
    assert len(cuda.compiled) == 2
    assert len(cuda.launches) == 4


def test_other_threads_launch_meanwhile(cuda: FakeCuda) -> None:
    """Also kernels that were collected."""
    with collecting() as kernels:
        best()
        other = threading.Thread(target=best_in_thread, args=(cuda,))
        other.start()
        other.join()
        assert [launch.kernel for launch in cuda.launches] == GREEDY
    compile_all(kernels, lambda done, total: None)
    best()
    assert len(cuda.compiled) == 2
    assert len(cuda.launches) == 4


def best_in_thread(cuda: FakeCuda) -> None:
    with cuda.in_this_thread():
        best()


def test_results_of_collected_kernels_are_zeros() -> None:
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory with NaN and large integers
    try:
        like = torch.ones(9)
        assert not torch.empty(9).eq(0).any()
        with collecting():
            made = [
                torch.empty(2, 3),
                torch.empty(7, dtype=torch.int64),
                torch.empty_like(like),
                torch.empty_strided((2, 2), (2, 1)),
                like.new_empty(4),
                like.new_empty_strided((2,), (1,)),
            ]
            assert like.sum() == 9
        assert all(tensor.eq(0).all() for tensor in made)
        assert not torch.empty(9).eq(0).any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("threads", [1, 4])
def test_progress_counts_the_kernels(cuda: FakeCuda, threads: int) -> None:
    with collecting() as kernels:
        best()
        for columns in (16, 17, 32):
            activation.gelu(torch.zeros(columns, 1 << 14, dtype=torch.bfloat16, device="cuda:0"))
        activation.gelu(torch.zeros(3, 5, device="cuda:0"))
    reports: list[tuple[int, int]] = []
    compile_all(kernels, lambda *report: reports.append(report), threads=threads)
    assert reports == [(done, len(kernels)) for done in range(len(kernels) + 1)]
    assert len(kernels) == len(set(cuda.compiled)) == len(cuda.compiled) > 3


@pytest.mark.parametrize("threads", [2, None])
def test_kernels_are_compiled_at_the_same_time(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, threads: int | None
) -> None:
    monkeypatch.setattr(compilation, "usable_cpus", lambda: Cpus((frozenset([0]), frozenset([1]))))
    both = threading.Barrier(2, timeout=60)
    cuda.compiling = lambda name: both.wait()
    with collecting() as kernels:
        best()
    compile_all(kernels, lambda done, total: None, threads=threads)
    assert len(cuda.compiled) == 2


def test_nothing_is_reported_without_kernels() -> None:
    reports: list[tuple[int, int]] = []
    compile_all([], lambda *report: reports.append(report))
    assert not reports


def test_a_failure_names_the_kernel_and_may_be_retried(cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    error = AttributeError("ptxas is missing")

    def fail(name: str) -> None:
        if name == "_best_kernel":
            raise error

    with collecting() as kernels:
        best()
    cuda.compiling = fail
    for run in (lambda: compile_all(kernels, lambda done, total: None), best):
        with pytest.raises(AttributeError) as raised:
            run()
        assert raised.value is error
    assert [record.getMessage() for record in caplog.records] == [f"the kernel {GREEDY[1]} does not compile"]
    cuda.compiling = lambda name: None
    best()
    assert [launch.kernel for launch in cuda.launches][-2:] == GREEDY


def test_code_that_fails_while_kernels_are_collected(cuda: FakeCuda) -> None:
    with pytest.raises(ValueError, match="expected logits"), collecting():
        greedy(torch.zeros(3, device="cuda:0"))
    assert not is_collecting()
    best()
    assert [launch.kernel for launch in cuda.launches] == GREEDY
