"""The cases of `afnext bench kernels`: problems of the model and the subjects timed on them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import rivals
from .problems import FULL, Problem, Sizes, problems
from .rivals import Subjects

# Sizes with reasonable times on a CPU: one sequence and eight, after a medium and a long context.
COMMON = replace(FULL, batches=(1, 8), decode_depths=(8192, 45_000))


@dataclass(frozen=True)
class Case:
    """One operation on one shape. label: the shape for people; flops, bytes: the least work; kind: the dtype whose peak
    bounds it; subjects: makes the inputs on a device and what to time on them, "afnext", "torch" and others."""

    operation: str
    label: str
    shape: dict[str, int]
    dtype: str
    flops: float
    bytes: float
    subjects: Callable[[torch.device], Subjects]
    tolerance: float
    kind: str = ""


def case_of(problem: Problem) -> Case:
    """The case of a problem."""
    return Case(
        problem.operation,
        problem.label,
        dict(problem.shape),
        problem.dtype,
        problem.work.flops,
        problem.least_bytes,
        lambda device: rivals.subjects(problem, device),
        problem.tolerance,
        problem.work.dtype,
    )


def cases(sizes: Sizes = COMMON, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """All cases, in the order of the model's data flow. dtype: of weights and activations."""
    return [case_of(problem) for problem in problems(sizes, str(dtype).removeprefix("torch."))]
