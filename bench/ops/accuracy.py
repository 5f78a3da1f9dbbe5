"""The accuracy rule for implementations of an operation, and a diagnosis of violations.

The rule: an implementation's RMS error against the float64 reference is at most twice that of the same computation
written naively in torch at the same dtype (`plain.py`), or one unit in the last place of the result. Integers that are
rounded numbers may differ by one if plain torch's may; tokens must be equal. Memory that an implementation allocates
holds NaN until it is written.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...kernels.dispatch import backend
from ...kernels.packed_product import FEW_ROWS
from ...kernels.packed_weight import Packed
from .inputs import parts_of
from .problems import Problem

DRAWS = 16  # draws of inputs that must keep the rule together if one draw breaks it
_NO_CHANCE = 10  # times the allowed error, which chance cannot explain
_CODES = 1e-3  # share of rounded integers that may always differ by one

# Arguments that are float32 whatever the dtype; the references widen them where it matters.
_FLOAT32 = frozenset({"k_scales", "v_scales", "angles", "logits", "penalty", "uniform"})

T = TypeVar("T")


@dataclass(frozen=True)
class Errors:
    """Mean squares over one comparison's elements: of both computations' errors, and of the exact result."""

    actual: float
    plain: float
    exact: float
    eps: float

    @classmethod
    def of(cls, actual: Tensor, exact: Tensor, plain: Tensor) -> "Errors":
        """actual, plain: of the dtype that is judged; exact: float64. All finite and of one shape."""
        differences = (actual.double() - exact, plain.double() - exact, exact)
        actual_square, plain_square, exact_square = (float(x.double().square().mean()) for x in differences)
        return cls(actual_square, plain_square, exact_square, torch.finfo(actual.dtype).eps)

    @property
    def allowed(self) -> float:
        """The largest RMS error that keeps the rule."""
        return max(2 * self.plain**0.5, self.eps * self.exact**0.5)

    @property
    def kept(self) -> bool:
        """Whether the rule is kept."""
        return self.actual**0.5 <= self.allowed

    @staticmethod
    def together(draws: Sequence["Errors"]) -> "Errors":
        """The same comparison over several draws of its inputs."""
        actual, plain, exact = (fmean(getattr(draw, name) for draw in draws) for name in ("actual", "plain", "exact"))
        return Errors(actual, plain, exact, draws[0].eps)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory allocated inside the block holds NaN (integers: their maximum) until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the switch that fill_uninitialized_memory hangs on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def exactly(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """The result of `function` for the same numbers in float64, computed by its reference."""
    with backend("reference"):
        return function(*map(_widened, args), **{name: _widened(value) for name, value in options.items()})


def _widened(value: Any) -> Any:
    if isinstance(value, Packed):
        return Packed(*map(_widened, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() and value.itemsize > 1 else value


@dataclass(frozen=True)
class Verdict:
    """The result of checking one problem.

    error, allowed: relative RMS error and the largest that keeps the rule, of the worst result; fault: "" for a sound
    implementation, otherwise its kind; diagnosis: where, how large, which case.
    """

    problem: str
    error: float = 0.0
    allowed: float = 0.0
    fault: str = ""
    diagnosis: str = ""


def check(problem: Problem, function: Callable[..., Any], device: torch.device, seed: int = 0) -> Verdict:
    """Call `function` on the problem's inputs and judge its results, including written arguments. Its errors
    propagate."""
    verdict = _check(problem, function, device, seed)
    if verdict.fault == "inaccurate" and problem.spec.also and problem.shape["rows"] <= FEW_ROWS:
        unrounded = Problem(problem.spec.also, problem.shape, problem.dtype, problem.odd)
        again = _check(unrounded, function, device, seed)
        return verdict if again.fault else replace(again, problem=problem.name)
    return verdict


def _check(problem: Problem, function: Callable[..., Any], device: torch.device, seed: int) -> Verdict:
    found = _judged(problem, function, device, seed)
    if isinstance(found, Verdict):
        return found
    broken = [i for i, errors in enumerate(found) if not errors.kept]
    if broken:
        # All channels of a row share the error of its norm, and plain torch's may be zero by chance.
        draws = [found]
        if all(found[i].actual ** 0.5 <= _NO_CHANCE * found[i].allowed for i in broken):
            for draw in range(1, DRAWS):
                again = _judged(problem, function, device, seed + draw)
                if isinstance(again, Verdict):
                    return again
                draws.append(again)
        found = [Errors.together(comparison) for comparison in zip(*draws, strict=True)]
        broken = [i for i, errors in enumerate(found) if not errors.kept]
    if broken:
        return _inaccurate(problem, function, device, seed, broken[0], found[broken[0]])
    worst = max(found, key=lambda errors: _relative(errors)[0] / max(_relative(errors)[1], 1e-300), default=None)
    return Verdict(problem.name, *(_relative(worst) if worst else (0.0, 0.0)))


def _relative(errors: Errors) -> tuple[float, float]:
    size = errors.exact**0.5 or 1.0
    return errors.actual**0.5 / size, errors.allowed / size


def _computed(
    problem: Problem, function: Callable[..., Any], device: torch.device, seed: int
) -> list[tuple[Tensor, Tensor, Tensor]] | Verdict:
    """The results as (actual, exact, plain), or the fault of results that cannot be compared."""
    spec = problem.spec
    ours, widened, plainly = (problem.arguments(device, seed) for _ in range(3))
    with poisoned_memory():
        actual = _flat(spec.results(ours, function(**ours)))
    for name, value in problem.arguments(device, seed).items():
        pairs = zip(parts_of(value), parts_of(ours[name]), strict=True)
        if name not in spec.written and not all(_same(*pair) for pair in pairs):
            return Verdict(problem.name, fault="changed input", diagnosis=f"the call writes into its argument {name}")
    exact = _flat(spec.results(widened, _exact(spec.function, widened)))
    plain = _flat(spec.results(plainly, spec.plain(**plainly)))
    if len(actual) != len(exact):
        return Verdict(problem.name, fault="results", diagnosis=f"{len(actual)} results instead of {len(exact)}")
    for i, (x, y, reference) in enumerate(zip(actual, plain, exact, strict=True)):
        if not isinstance(x, Tensor):
            return Verdict(problem.name, fault="results", diagnosis=f"result {i} is {type(x).__name__}, not a tensor")
        if x.shape != reference.shape:
            shapes = f"{tuple(x.shape)} instead of {tuple(reference.shape)}"
            return Verdict(problem.name, fault="shape", diagnosis=f"result {i} has the shape {shapes}")
        if x.dtype != y.dtype:
            return Verdict(problem.name, fault="dtype", diagnosis=f"result {i} is {x.dtype} instead of {y.dtype}")
        if x.device != y.device:
            return Verdict(problem.name, fault="device", diagnosis=f"result {i} is on {x.device}, not on {y.device}")
    return list(zip(actual, exact, plain, strict=True))


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _exact(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The reference in float64, caches that are written included."""
    for name, value in arguments.items():
        if name not in _FLOAT32:
            arguments[name] = _widened(value)
    if "dtype" in arguments:
        arguments["dtype"] = torch.float64
    with backend("reference"):
        return function(**arguments)


def _flat(results: Any) -> list[Any]:
    return list(results) if isinstance(results, list | tuple) else [results]


def _judged(problem: Problem, function: Callable[..., Any], device: torch.device, seed: int) -> list[Errors] | Verdict:
    """The errors of every floating result, or the verdict on a fault that no error measures."""
    computed = _computed(problem, function, device, seed)
    if isinstance(computed, Verdict):
        return computed
    errors = []
    for i, (actual, exact, plain) in enumerate(computed):
        name = f"result {i}" if len(computed) > 1 else "the result"
        if not actual.is_floating_point():
            wrong = _wrong_integers(actual, exact, plain)
            if wrong:
                return Verdict(problem.name, math.inf, 0.0, "wrong integers", f"{name}: {wrong}")
            continue
        bad = ~actual.isfinite() & exact.isfinite()
        if bad.any():
            kind = "unwritten" if actual[bad].isnan().all() else "not finite"
            return Verdict(problem.name, math.inf, 0.0, kind, f"{name}: {_unwritten(actual, bad)}")
        if exact.numel():
            errors.append(Errors.of(actual, exact, plain))
    return errors


def _wrong_integers(actual: Tensor, exact: Tensor, plain: Tensor) -> str:
    """The fault of an integer result, "" for none. int8 are rounded numbers, int64 are tokens."""
    difference = (actual.long() - exact.long()).abs()
    wrong = int((difference > 0).sum())
    allowed = 0.0
    if actual.dtype == torch.int8 and wrong and int(difference.amax()) == 1:
        allowed = max(2 * float((plain.long() != exact.long()).sum()), _CODES * actual.numel())
    if wrong <= allowed:
        return ""
    at = tuple(int(i) for i in difference.nonzero()[0])
    return f"{wrong} of {actual.numel()} differ, the first at {list(at)}: {int(actual[at])} instead of {int(exact[at])}"


def _unwritten(actual: Tensor, bad: Tensor) -> str:
    """Which rows of a result hold NaN or infinity."""
    rows = bad.reshape(-1, bad.shape[-1]) if bad.ndim else bad.reshape(1, 1)
    whole, some = rows.all(1), rows.any(1)
    words = "NaN, which memory is filled with before it is written" if actual[bad].isnan().all() else "not finite"
    if whole.any() and torch.equal(whole, some):
        return f"{_ranges(whole, 'row')} of {len(rows)} hold {words}: not written at all"
    columns = rows[some].any(0)
    return f"{_ranges(some, 'row')} of {len(rows)} hold {words}, in {_ranges(columns, 'column')} of {rows.shape[1]}"


def _inaccurate(
    problem: Problem, function: Callable[..., Any], device: torch.device, seed: int, number: int, errors: Errors
) -> Verdict:
    """The location of the error, from another computation, made only if the rule is broken."""
    error, allowed = _relative(errors)
    computed = _computed(problem, function, device, seed)
    assert isinstance(computed, list)
    floating = [pair for pair in computed if pair[0].is_floating_point() and pair[1].numel()]
    actual, exact, _ = floating[number]
    difference = (actual.double() - exact).abs()
    at = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    parts = [
        f"relative RMS error {error:.3g}, allowed {allowed:.3g} (plain torch has {errors.plain**0.5:.3g} absolute)",
        f"the worst element is {list(at)}: {float(actual[at]):.6g} instead of {float(exact[at]):.6g}",
    ]
    rows, limit = difference.reshape(-1, difference.shape[-1]), 4 * errors.allowed
    high = rows.square().mean(1).sqrt() > limit
    if high.any() and not high.all():
        columns = (rows[high] > limit).any(0)
        parts.append(f"the error is in {_ranges(high, 'row')} of {len(rows)}, {_ranges(columns, 'column')}")
    factor = float((actual.double() * exact).sum() / exact.square().sum()) if float(exact.square().sum()) else 1.0
    rest = float((actual.double() - factor * exact).square().mean().sqrt())
    if abs(factor - 1) > 1e-6 and rest <= max(errors.allowed, 0.1 * errors.actual**0.5):
        parts.append(f"all of it is the exact result times {factor:.4g}")
    return Verdict(problem.name, error, allowed, "inaccurate", "; ".join(parts))


def _ranges(flags: Tensor, noun: str) -> str:
    """The indices that are set, in words: row 3; rows 3 to 7; 12 rows from 3 to 99."""
    indices = flags.nonzero().flatten().tolist()
    if len(indices) == 1:
        return f"{noun} {indices[0]}"
    first, last = indices[0], indices[-1]
    if last - first + 1 == len(indices):
        return f"{noun}s {first} to {last}"
    return f"{len(indices)} {noun}s from {first} to {last}"
