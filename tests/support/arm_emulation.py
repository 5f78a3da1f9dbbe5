"""A pytest plugin: the native kernels of ARM in an emulator, in place of this machine's, for `make test-arm`.

The libraries are compiled for ARM; everything else of the package runs on this machine. Each native call sends what its
tensors hold to a program in the emulator (arm_runner.cpp), which calls the kernel, and takes back what they hold then.
Settings are environment variables: AFNEXT_ARM_EMULATOR is the command to run an ARM program, such as "qemu-aarch64 -cpu
max", and AFNEXT_ARM the folder of the libraries and of arm_runner.
"""

import ctypes
import os
import shlex
import struct
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afnext.kernels import native
from afnext.kernels.native import attention, build, products, recording
from afnext.kernels.native.signatures import DTYPES, NUMBER, SIGNATURES

FOLDER = Path(os.environ["AFNEXT_ARM"]).resolve()
EMULATOR = shlex.split(os.environ["AFNEXT_ARM_EMULATOR"])
MOST_BYTES = 1 << 30  # of one call
INTEGER, FLOATING, ADDRESS = 0, 1, 2
LEVELS_OF_CPUS = {"max": ("portable", "neon", "neondot", "i8mm"), "cortex-a72": ("portable", "neon")}
_arm_levels = build.levels("aarch64")


def _command(*arguments: str) -> list[str]:
    return [*EMULATOR, str(FOLDER / "arm_runner"), *arguments]


def _library(level: str) -> Path:
    return FOLDER / build.library_name(level)


@cache
def supported_levels() -> tuple[str, ...]:
    """The levels that the emulated CPU runs, as the library finds out."""
    library = str(_library("portable"))
    statuses = {level: subprocess.run(_command(library, level), check=False).returncode for level in _arm_levels}
    if not set(statuses.values()) <= {0, 3}:
        raise pytest.UsageError(f"{shlex.join(_command())} does not run: {statuses}")
    levels = tuple(level for level, status in statuses.items() if status == 0)
    cpu = EMULATOR[-1]
    if levels != LEVELS_OF_CPUS.get(cpu, levels):
        raise pytest.UsageError(f"the library finds {levels} on {cpu}, which has {LEVELS_OF_CPUS[cpu]}")
    return levels


@cache
def _runner() -> subprocess.Popen[bytes]:
    return subprocess.Popen(_command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)


class Spans:
    """The memory of a call's tensors: runs of bytes that do not overlap."""

    def __init__(self, tensors: list[Tensor]):
        extents = sorted((tensor.data_ptr(), tensor.data_ptr() + _bytes(tensor)) for tensor in tensors)
        self.runs: list[tuple[int, int]] = []
        for first, end in extents:
            if self.runs and first < self.runs[-1][1]:
                self.runs[-1] = (self.runs[-1][0], max(end, self.runs[-1][1]))
            else:
                self.runs.append((first, end))

    def place(self, tensor: Tensor) -> tuple[int, int]:
        """The offset of a tensor's first element in its run, and the run's number."""
        first, end = tensor.data_ptr(), tensor.data_ptr() + _bytes(tensor)
        return next((first - a, i) for i, (a, b) in enumerate(self.runs) if a <= first and end <= b)


def _bytes(tensor: Tensor) -> int:
    """From the first element of a tensor to behind its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def call(name: str, *arguments: Any) -> None:
    """`native.call`, in the emulator."""
    threads = torch.get_num_threads()
    SIGNATURES[name].check(name, arguments, threads)
    if recording.current() is not None:
        pytest.skip("a recording holds addresses of this process, which the emulated one does not have")
    spans = Spans([argument for argument in arguments if isinstance(argument, Tensor)])
    if sum(end - first for first, end in spans.runs) > MOST_BYTES:
        pytest.skip(
            f"the tensors reach over more than {MOST_BYTES >> 30} GiB, which are copied to the emulated process"
        )
    kinds = SIGNATURES[name].parameters.values()
    packed = [_packed(kind, argument, spans) for kind, argument in zip(kinds, arguments, strict=True)]
    packed.append(struct.pack("<3q", INTEGER, threads, 0))
    request = [_text(str(_library(native.isa()))), _text(f"afnext_{name}"), struct.pack("<q", len(spans.runs))]
    for first, end in spans.runs:
        request += [struct.pack("<q", end - first), ctypes.string_at(first, end - first)]
    _send(b"".join([*request, struct.pack("<q", len(packed)), *packed]))
    for first, end in spans.runs:
        ctypes.memmove(first, _receive(end - first), end - first)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<q", len(encoded)) + encoded


def _packed(kind: Any, argument: Any, spans: Spans) -> bytes:
    if isinstance(argument, Tensor):
        return struct.pack("<3q", ADDRESS, *spans.place(argument))
    if kind == NUMBER:
        return struct.pack("<qdq", FLOATING, argument, 0)
    return struct.pack("<3q", INTEGER, DTYPES.get(argument, argument) or 0, 0)


def _send(request: bytes) -> None:
    stream = _runner().stdin
    assert stream is not None
    try:
        stream.write(request)
        stream.flush()
    except BrokenPipeError:
        _receive(1)


def _receive(size: int) -> bytes:
    runner = _runner()
    assert runner.stdout is not None
    answer = runner.stdout.read(size)
    if len(answer) < size:
        status = runner.wait()
        _runner.cache_clear()
        raise AssertionError(f"the kernel ended the emulated process, with status {status}")
    return answer


def pytest_report_header() -> str:
    """What is tested."""
    return f"emulated by {shlex.join(EMULATOR)}: the levels {', '.join(supported_levels())}"


def pytest_configure(config: pytest.Config) -> None:
    """Put the emulated kernels in the place of this machine's."""
    if not native.AVAILABLE:
        raise pytest.UsageError("the native kernels of this machine are not built, without which none are tested")
    for module in (native, products, attention):
        module.call = call  # type: ignore[attr-defined]
    native.supported_levels = supported_levels
    native.best_level = lambda: supported_levels()[-1]
    build.levels = lambda machine=None: _arm_levels
