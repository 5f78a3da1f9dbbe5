"""Runs Triton kernels on CPU tensors in Triton's interpreter, and fixes or refuses what the interpreter gets wrong.

`with interpreted():` redirects the launches of `@triton.jit` functions to the interpreter, also in a process where they
can be compiled (`TRITON_INTERPRET` unset); with `TRITON_INTERPRET=1` it only adds the repairs and checks below.

Fixed, so that results equal those of the compiled kernel: bfloat16 (kept as raw bits: products, sums, comparisons and
conversions would work on the bit patterns, and float32 -> bfloat16 truncate), conversions to e4m3 (they would not round
to the nearest) and minimum and maximum, which return the number when the other operand is NaN. Refused: sums, atomics
and fma in bfloat16, and products with an inner dimension that no tensor core takes. Float32 products are exact float32
here, not tf32.

Checked, in every launch:
- loads, stores and atomics touch only memory of the tensors passed to the kernel (masked-out lanes may point anywhere);
- no two programs, nor two lanes of one store with different values, write to one address, and no program reads what
  another writes. After an atomic operation, a program may have waited for the others, so its reads are not checked.
  Atomic operations are not races.

An access outside its tensor but inside another argument is not detected.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

Handle = interpreter.TensorHandle
Array = np.ndarray[Any, Any]
NOBODY, SEVERAL = -1, -2  # special values beside program numbers, in the records of accesses


class OutOfBoundsError(AssertionError):
    """A kernel accessed memory outside the tensors it was given."""


class RaceError(AssertionError):
    """The contents of memory after a launch depend on the order of its programs or lanes."""


def bf16_bits(x: Array) -> Array:
    """The bits of `x`, float32, rounded to bfloat16, ties to even. NaN stays NaN, made quiet."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # rounds up at the tie if the result is odd
    quiet = bits | np.uint32(0x400000)
    return np.asarray(np.where(np.isnan(x), quiet, bits + half) >> np.uint32(16)).astype(np.uint16)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _widened(handle: Any) -> Any:
    """The same numbers in float32, if `handle` holds bfloat16."""
    if not _is_bf16(handle):
        return handle
    return Handle((handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)


def _narrowed(x: Array) -> Any:
    return Handle(bf16_bits(x), tl.bfloat16)


def _is_e4m3(handle: Any) -> bool:
    return handle.dtype.scalar == tl.float8e4nv


_E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def _from_e4m3(handle: Any) -> Any:
    """The same numbers in float32, if `handle` holds e4m3."""
    return Handle(_E4M3_VALUES[handle.data], tl.float32) if _is_e4m3(handle) else handle


def _to_e4m3(x: Array) -> Any:
    """`x` rounded to e4m3, ties to even; as on GPUs, what is too large becomes the largest number."""
    wide = torch.from_numpy(np.ascontiguousarray(x, np.float32)).clamp(-448, 448)
    return Handle(wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), tl.float8e4nv)


class _Allocation:
    """A memory block of a launch's arguments: the parts that may be accessed, and by which programs they were."""

    def __init__(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        self.start, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.itemsize = tensor.element_size()
        self.spans: dict[tuple[int, int], str] = {}
        self._writer: Array | None = None
        self._reader: Array | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Allow the memory between the first and the last element of the argument `name`."""
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        self.spans[start, start + (last + 1) * tensor.element_size()] = name
        self.itemsize = min(self.itemsize, tensor.element_size())

    def _records(self) -> tuple[Array, Array]:
        if self._writer is None or self._reader is None:
            elements = -(-(self.end - self.start) // self.itemsize)
            self._writer, self._reader = np.full((2, elements), NOBODY, np.int32)
        return self._writer, self._reader

    def read(self, addresses: Array, program: int, ordered: bool) -> Array:
        """Record a load. Returns which of `addresses` another program has written."""
        writer, reader = self._records()
        at = (addresses - np.uint64(self.start)) // np.uint64(self.itemsize)
        before = reader[at]
        reader[at] = np.where((before == NOBODY) | (before == program), program, SEVERAL)
        return self._of_others(writer[at], program) & (not ordered)

    def write(self, addresses: Array, program: int, ordered: bool) -> Array:
        """Record a store. Returns which of `addresses` another program has read or written."""
        writer, reader = self._records()
        at = (addresses - np.uint64(self.start)) // np.uint64(self.itemsize)
        wrong = self._of_others(writer[at], program) | (self._of_others(reader[at], program) & (not ordered))
        writer[at] = program
        return wrong

    @staticmethod
    def _of_others(record: Array, program: int) -> Array:
        return np.asarray((record != NOBODY) & (record != program))


class _Launch:
    """The memory that one launch may access, and the record of accesses by program."""

    def __init__(self, kernel: str, arguments: list[tuple[str, Any]]):
        self.kernel = kernel
        self.allocations: dict[int, _Allocation] = {}
        self.ordered: set[int] = set()  # the programs that have made an atomic operation
        for name, value in arguments:
            self._add(name, value)

    def _add(self, name: str, value: Any) -> None:
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                self._add(f"{name}[{i}]", item)
        elif isinstance(value, TensorDescriptor):
            self._add(name, value.base)
        elif hasattr(value, "data_ptr"):
            tensor = interpreter._unwrap_tensor(value)
            if tensor.numel():
                start = tensor.untyped_storage().data_ptr()
                self.allocations.setdefault(start, _Allocation(tensor)).add(name, tensor)

    def touch(self, what: str, addresses: Array, itemsize: int, program: tuple[int, int, int]) -> None:
        """Check and record one access. addresses: [active lanes] uint64."""
        if not addresses.size:
            return
        number = _number(program)
        if what == "atomic":
            self.ordered.add(number)
        left = np.ones(addresses.shape, bool)
        for allocation in self.allocations.values():
            inside = self._inside(allocation, addresses, itemsize)
            if not inside.any():
                continue
            left &= ~inside
            if what == "atomic":
                continue
            here = addresses if inside.all() else addresses[inside]
            record = allocation.read if what == "load" else allocation.write
            races = record(here, number, number in self.ordered)
            if races.any():
                raise RaceError(
                    f"{self.kernel}: program {program} makes a {what} at {int(races.sum())} addresses that another "
                    f"program {'writes' if what == 'load' else 'reads or writes'}, the first of them "
                    f"{self._place(int(here[races][0]))}"
                )
            if not left.any():
                break
        if left.any():
            raise OutOfBoundsError(
                f"{self.kernel}: program {program} makes a {what} out of bounds in {int(left.sum())} of "
                f"{left.size} lanes, the first of them {self._place(int(addresses[left][0]))}"
            )

    @staticmethod
    def _inside(allocation: _Allocation, addresses: Array, itemsize: int) -> Array:
        inside = np.zeros(addresses.shape, bool)
        for start, end in allocation.spans:
            inside |= (addresses >= np.uint64(start)) & (addresses + np.uint64(itemsize) <= np.uint64(end))
            if inside.all():
                break
        return inside

    def _place(self, address: int) -> str:
        """Where `address` is, in words, from the argument nearest to it."""
        spans = [(*span, name) for a in self.allocations.values() for span, name in a.spans.items()]
        if not spans:
            return f"at {address:#x}: the kernel has no tensor"
        start, end, name = min(spans, key=lambda span: max(span[0] - address, address - span[1] + 1, 0))
        return f"{address - start} bytes after the start of `{name}`, which has {end - start}"


def _number(program: tuple[int, int, int]) -> int:
    x, y, z = program
    _, ny, nz = interpreter.interpreter_builder.grid_dim
    return (x * ny + y) * nz + z


class _CheckedExecutor(interpreter.GridExecutor):  # type: ignore[misc]
    """Runs the programs of a launch and records the memory that they may access."""

    def _init_args_hst(self, args: Any, kwargs: Any) -> Any:
        """Called by the base with the arguments of a launch, to bring them to the host."""
        on_host = super()._init_args_hst(args, kwargs)
        named = [*zip(self.arg_names, on_host[0], strict=False), *on_host[1].items()]
        _CheckedBuilder.launch = _Launch(self.fn.__name__, named)
        return on_host

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        # Triton's own functions (tl.sum, tl.zeros) see `tl.core`, which is patched once a launch here rather than in
        # each of their calls, whose patches the interpreter never takes back.
        patches = interpreter._patch_lang(tl.sum.fn)
        try:
            with np.errstate(all="ignore"):  # overflow and NaN raise no flag on a GPU either
                super().__call__(*args, **kwargs)
        except interpreter.InterpreterError as error:
            raise error.__cause__ or error from None
        finally:
            patches.restore()


class _CheckedBuilder(interpreter.InterpreterBuilder):  # type: ignore[misc]
    """The interpreter's operations, with the fixes and the checks of this module."""

    launch: _Launch

    def get_bf16(self, value: float) -> Any:
        return _narrowed(np.array([value], np.float32))

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., Array]) -> Any:
        if not (_is_bf16(lhs) or _is_bf16(rhs)):
            return super().binary_op(lhs, rhs, op)
        result = op(_widened(lhs).data, _widened(rhs).data)
        return Handle(result, tl.int1) if result.dtype == bool else _narrowed(result)

    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def unary_op(self, arg: Any, op: Callable[..., Array]) -> Any:
        return _narrowed(op(_widened(arg).data)) if _is_bf16(arg) else super().unary_op(arg, op)

    def ternary_op(self, lhs: Any, rhs: Any, other: Any, op: Callable[..., Array]) -> Any:
        if not _is_bf16(other) or op is np.where:
            return super().ternary_op(lhs, rhs, other, op)
        return _narrowed(op(*(_widened(x).data for x in (lhs, rhs, other))))

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        if _is_bf16(z):
            raise NotImplementedError("fma in bfloat16: compute in float32")
        return super().create_fma(x, y, z)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bf16(src) else _narrowed(src.data.astype(np.float32))
        wide = _widened(src)
        return wide if dst_type.scalar == wide.dtype.scalar else super().cast_impl(wide, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        truncates = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if _is_e4m3(src):
            return self.cast_impl(_from_e4m3(src), dst_type)
        if dst_type.scalar == tl.float8e4nv:
            if truncates:
                raise NotImplementedError("conversions to e4m3 that truncate")
            return _to_e4m3(_widened(src).data)
        if dst_type.scalar == tl.bfloat16 and not truncates and src.dtype.scalar == tl.float32:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_dot(self, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.data.dtype == b.data.dtype == np.int8:
            # Exact, and multiplied by a library; that of integers is plain loops in NumPy.
            product = a.data.astype(np.float64) @ b.data.astype(np.float64)
            return Handle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)
        a, b = (_from_e4m3(_widened(x)) for x in (a, b))
        return super().create_dot(a, b, d, *rest)

    def create_masked_load(self, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        self._touch("load", ptrs, mask)
        return super().create_masked_load(ptrs, mask, *rest, **options)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        self._touch("store", ptrs, mask)
        result = super().create_masked_store(ptrs, value, mask, *rest, **options)
        bits = np.ascontiguousarray(value.data).view(f"u{value.data.itemsize}")
        if (interpreter._interpreter.load(ptrs.data, mask.data, bits, bits.dtype) != bits).any():
            raise RaceError(f"{self.launch.kernel}: lanes of one store write different values to one address")
        return result

    def create_atomic_cas(self, ptr: Any, *rest: Any) -> Any:
        self._touch("atomic", ptr)
        return super().create_atomic_cas(ptr, *rest)

    def create_atomic_rmw(self, operation: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        if _is_bf16(val):
            raise NotImplementedError("atomic operations on bfloat16")
        self._touch("atomic", ptr, mask)
        return super().create_atomic_rmw(operation, ptr, val, mask, *rest)

    def _touch(self, what: str, ptrs: Any, mask: Any = None) -> None:
        addresses = ptrs.data
        active = None if mask is None else np.asarray(mask.data)  # that of a descriptor is a bare array
        if active is not None and not active.all():
            addresses = addresses[np.broadcast_to(active, addresses.shape)]
        itemsize = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        self.launch.touch(what, addresses.reshape(-1), itemsize, self.grid_idx)


def _smallest_product(lhs: Any, rhs: Any) -> tuple[int, int, int]:
    """The smallest M, N and K of a product, as the compiler for NVIDIA GPUs has them."""
    return (1, 1, 32) if lhs.scalar.primitive_bitwidth == 8 else (1, 1, 16)


def _refuse_bf16(self: Any, input: tuple[Any, ...]) -> None:
    _check_tensor(self, input)
    if any(_is_bf16(x.handle) for x in input):
        raise NotImplementedError("sums and scans in bfloat16: compute in float32")


_slow_numpy_dtype = interpreter._get_np_dtype
_numpy_dtypes: dict[str, Any] = {}


def _numpy_dtype(dtype: Any) -> Any:
    """The NumPy dtype of a Triton type. The interpreter's own function builds its whole table in every call."""
    scalar = dtype.scalar
    name = "pointer" if scalar.is_ptr() else scalar.name
    if name not in _numpy_dtypes:
        _numpy_dtypes[name] = _slow_numpy_dtype(scalar)
    return _numpy_dtypes[name]


_check_tensor = interpreter.ReduceScanOpInterface.check_tensor
_forms: dict[Callable[..., Any], Any] = {}  # by the plain function: a JITFunction's hash reads its whole source


def _interpretable(function: Any) -> Any:
    if isinstance(function, interpreter.InterpretedFunction):
        return function
    if function.fn not in _forms:
        _forms[function.fn] = interpreter.InterpretedFunction(function.fn)
    return _forms[function.fn]


def _launch(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
    _interpretable(self).run(*args, grid=grid, warmup=warmup, **options)


def _call(self: Any, *args: Any, **options: Any) -> Any:
    """Call a device function from a kernel; the launch has patched the language already."""
    return _interpretable(self).rewrite()(*args, **options)


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


_active = False


@contextmanager
def interpreted() -> Iterator[None]:
    """Run the kernels launched inside the block in the fixed and checked interpreter. May be nested."""
    global _active
    if _active:
        yield
        return
    builder = interpreter.interpreter_builder
    _active = True
    try:
        with (
            triton.knobs.runtime.scope(),
            _replaced(JITFunction, run=_launch, __call__=_call),
            _replaced(interpreter.InterpretedFunction, __call__=_call),
            _replaced(interpreter, GridExecutor=_CheckedExecutor, _get_np_dtype=_numpy_dtype),
            _replaced(interpreter.ReduceScanOpInterface, check_tensor=_refuse_bf16),
            _replaced(builder, __class__=_CheckedBuilder, codegen_fns={**builder.codegen_fns}),
        ):
            builder.codegen_fns["min_dot_size"] = _smallest_product
            triton.knobs.runtime.interpret = True
            yield
    finally:
        _active = False
