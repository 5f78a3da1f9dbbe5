"""What the tests of the kernels share: the accuracy rule, the backends to try, and caches cut into pages.

The rule: an implementation's RMS error against the float64 reference is at most twice that of the same computation
written naively in torch at the same dtype. Memory that an implementation allocates is NaN until it is written.

One draw of inputs decides where it keeps the rule. Where it does not, chance may have decided: one row's norm is one
error, shared by all its channels, and plain torch's may be zero by luck. Then the rule has to hold over the errors of
many further draws together (`judged_over_draws`, which conftest.py calls), where chance no longer decides.
"""

import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from afnext import kernels
from afnext.bench.ops.accuracy import Errors, exactly, poisoned_memory
from afnext.kernels import native
from afnext.kernels.dispatch import LIBRARIES, Operation

__all__ = ["Errors", "exactly"]  # of the lab, and used by most tests of kernels together with what is here

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNREAD_PAGE = 2**30  # stands past the end of a sequence in page tables: reading it fails


_on_gpu = False


def begin_test(*, on_gpu: bool) -> None:
    """To be called before each test. on_gpu: it has the `gpu` marker, so its tensors are on the GPU."""
    global _on_gpu
    _on_gpu = on_gpu


def backends(*operations: Operation[Any]) -> list[Any]:
    """Parameters for `backend`: every backend that all of `operations` have, once for each device it can run on here.

    Libraries of others are left out, as they cover less. On the CPU Triton's kernels run interpreted, whether or not
    there is a GPU. Native kernels run once for each instruction-set level of this machine, as "native-<level>", which
    `poisoned` understands. Parameters that need a GPU carry the `gpu` marker, by which the `device` fixture picks the
    device, and `poisoned` whether to interpret. The report's first lines name what this machine lacks.
    """
    shared = set.intersection(*(set(operation.implementations) for operation in operations))
    parameters: list[Any] = []
    for name in sorted(shared - {"reference", *LIBRARIES}):
        if name == "native":
            parameters.extend(native_backends(*operations))
            continue
        parameters.append(name)
        if torch.cuda.is_available():
            parameters.append(pytest.param(name, id=f"{name}-gpu", marks=pytest.mark.gpu))
    return parameters


def native_backends(*operations: Operation[Any]) -> list[str]:
    """Those of `backends` that are compiled for the CPU: one for each instruction-set level that runs here."""
    if not all("native" in operation.implementations for operation in operations):
        return []
    return [f"native-{level}" for level in native.supported_levels()]


def untested() -> list[str]:
    """What the parameters above leave out on this machine."""
    levels = [level for level in native.build.levels() if level not in native.supported_levels()]
    lacks = [f"the instruction-set levels {', '.join(levels)}"] if levels else []
    return [*lacks, *([] if torch.cuda.is_available() else ["compiled Triton kernels, CUDA graphs (no GPU)"])]


@contextmanager
def poisoned(backend: str) -> Iterator[None]:
    """Force `backend`; memory allocated inside the block holds NaN (integers: their maximum) until it is written.

    backend: one of `backends(...)`. In tests without the `gpu` marker Triton's kernels run in the interpreter, and are
    checked there.
    """
    backend, _, level = backend.partition("-")
    with poisoned_memory():
        assert torch.empty(1).isnan().all(), "uninitialized memory is not poisoned"
        with kernels.backend(backend), _interpreted(backend), _at_level(level):
            yield


def _interpreted(backend: str) -> AbstractContextManager[None]:
    if backend != "triton" or (_on_gpu and os.environ.get("TRITON_INTERPRET") != "1"):
        return nullcontext()
    from afnext.bench.ops.interpreter import interpreted  # here, because it needs Triton to be installed

    return interpreted()


@contextmanager
def _at_level(level: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if level:
            patch.setenv("AFNEXT_ISA", level)
        yield


class InaccurateError(AssertionError):
    """The accuracy rule is broken by `errors`, in comparison number `comparison` of a test."""

    def __init__(self, errors: "Errors", comparison: int):
        actual, plain = errors.actual**0.5, errors.plain**0.5
        super().__init__(f"RMS error {actual:.3g}, allowed {errors.allowed:.3g}; plain torch has {plain:.3g}")
        self.errors, self.comparison = errors, comparison


_compared: list[Errors] = []
_judged_later = False


def assert_accurate(actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Raise InaccurateError unless `actual` is at most twice as far from `exact` as `plain` is.

    One unit in the last place of the result is allowed in any case: on a handful of elements `plain` can be exact by
    luck.
    """
    assert (actual.shape, actual.dtype) == (exact.shape, plain.dtype)
    assert plain.shape == exact.shape, f"the plain computation returned {tuple(plain.shape)}"
    assert actual.isfinite().all(), f"{int((~actual.isfinite()).sum())} of {actual.numel()} values are not finite"
    errors = Errors.of(actual, exact, plain)
    _compared.append(errors)
    if not (errors.kept or _judged_later):
        raise InaccurateError(errors, len(_compared) - 1)


def judged_over_draws(test: Callable[[], object], seed: int, broken: InaccurateError, draws: int = 32) -> None:
    """Raise InaccurateError unless every comparison in `test` keeps the rule over `draws` draws of its inputs together,
    the one that broke it among them.

    What exceeds the rule ten times is no chance, and is raised again at once.
    """
    global _judged_later
    if broken.errors.actual**0.5 > 10 * broken.errors.allowed:
        raise broken
    observed = []
    _judged_later = True
    try:
        for draw in range(draws - 1):
            seeded(seed + 1 + draw)
            test()
            observed.append(tuple(_compared))
    finally:
        _judged_later = False
    for number, comparison in enumerate(zip(*observed, strict=True)):
        first = [broken.errors] if number == broken.comparison else []
        errors = Errors.together([*first, *comparison])
        if not errors.kept:
            raise InaccurateError(errors, number) from broken
    warnings.warn(f"{broken}: one draw of {draws}, which keep the rule together", stacklevel=2)


def seeded(seed: int) -> None:
    """Begin a draw: every generator of random numbers that tests draw from starts at `seed`, below 2^32."""
    _compared.clear()
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def paged(
    k: Tensor, v: Tensor, lengths: list[int], page_size: int, consecutive: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut dense keys and values, [batch, keys, kv_heads, head_dim], into pools of pages and their page table.

    Slots that hold no token of the first lengths[b] are NaN. The pages are shuffled, or in order and `consecutive`.
    """
    counts = [-(-length // page_size) for length in lengths]
    spare = 3
    total = sum(counts) + spare
    order = list(range(1, total)) if consecutive else torch.randperm(total).tolist()
    pools = [torch.full((total, page_size, *x.shape[2:]), torch.nan, dtype=x.dtype) for x in (k, v)]
    table = torch.full((len(lengths), max(counts) + 1), UNREAD_PAGE, dtype=torch.int32)
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        pages, order = order[:count], order[count:]
        table[b, :count] = torch.tensor(pages, dtype=torch.int32)
        for token in range(length):
            for pool, dense in zip(pools, (k, v), strict=True):
                pool[pages[token // page_size], token % page_size] = dense[b, token]
    return pools[0].to(k.device), pools[1].to(k.device), table.to(k.device)


def far_apart(pages: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random keys and values [pages, tokens, 1, 16] float16, each page 2^30 elements after the one before it.

    Nothing between the pages is touched, so that the memory is only reserved.
    """
    far = 2**30
    memory = torch.empty((pages - 1) * far + 4096, dtype=torch.float16, device=device)
    k, v = (memory.as_strided((pages, tokens, 1, 16), (far, 16, 16, 1), offset) for offset in (0, 2048))
    for pool in (k, v):
        pool.copy_(torch.randn(pool.shape))
    return k, v


def without_races(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter keep no record of who touched which address, which for `far_apart` would not fit into memory.

    Bounds are still checked.
    """
    if backend == "triton" and device.type == "cpu":
        for name in ("read", "write"):
            unrecorded = staticmethod(lambda addresses, program, ordered: addresses != addresses)
            monkeypatch.setattr(f"afnext.bench.ops.interpreter._Allocation.{name}", unrecorded)
