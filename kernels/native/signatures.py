"""Signatures of the native operations, and their check: C gets addresses and would read whatever they point to.

A signature lists the parameters of `afnext_<name>` in order. An array's dtype is a torch dtype or the name of a
parameter with the dtype; its dimensions are expressions of the other parameters. `native.call` checks every call
against the signature, except calls that a recording repeats, whose arguments stay the same.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The floating dtypes of the native kernels, and their numbers in C."""


@dataclass(frozen=True)
class Array:
    """A tensor on the CPU, given as the address of its first element.

    dtype: a torch dtype, or an expression of other parameters. shape: expressions of its dimensions, None for leading
    dimensions of any size. strides: None for a contiguous array, for which only the number of elements is compared
    with the shape; otherwise the parameters with the strides of all dimensions but the last, whose stride is 1.
    optional: whether the array may be None, or the condition under which it is None.
    """

    dtype: torch.dtype | str
    shape: tuple[str | None, ...]
    strides: tuple[str, ...] | None = None
    optional: bool | str = False

    def conditions(self, name: str) -> list[tuple[str, str]]:
        """Pairs of an expression that must be true and its meaning in words."""
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = ", ".join(size or "any" for size in self.shape)
        parts = [(f"{name}.dtype is {dtype}", f"have the dtype {dtype}"), (f"{name}.is_cpu", "be on the CPU")]
        if self.strides is None:
            count = " * ".join(f"({size})" for size in self.shape)
            parts += [
                (f"{name}.is_contiguous()", "be contiguous"),
                (f"{name}.numel() == {count}", f"have as many elements as [{sizes}]"),
            ]
        else:
            shape, strides = _tuple(size for size in self.shape if size), _tuple(self.strides)
            free = sum(size is None for size in self.shape)
            fits = f"{name}.shape == {shape}"
            if free:
                fits = f"{name}.ndim == {len(self.shape)} and {name}.shape[{free}:] == {shape}"
            one = f"({name}.shape[-1] == 1 and {name}.stride()[:-1] == {strides})"  # the last stride has no meaning
            parts += [
                (fits, f"have the shape [{sizes}]"),
                (f"({name}.stride() == {_tuple((*self.strides, '1'))} or {one})", f"have the strides {strides}, 1"),
            ]
        if self.optional is False:
            return parts
        given = [(f"({name} is None or {expression})", demand) for expression, demand in parts]
        if isinstance(self.optional, str):
            given.insert(0, (f"({name} is None) == ({self.optional})", f"be None exactly if {self.optional}"))
        return given


def _tuple(expressions: Iterable[str]) -> str:
    return f"({''.join(f'{expression}, ' for expression in expressions)})"


SIZE, NUMBER, DTYPE = "size", "number", "dtype"
"""The kinds of scalars: int64_t, double, and a floating dtype of DTYPES."""


class Signature:
    """The parameters of one operation in order, each an Array or a kind of scalar. require: further conditions."""

    def __init__(self, *require: str, **parameters: Array | str):
        self.parameters = parameters
        conditions = [(name, *pair) for name, kind in parameters.items() for pair in _conditions(name, kind)]
        self._conditions = conditions + [("the arguments", rule, f"satisfy {rule}") for rule in require]
        self._holds = self._compiled(" and ".join(condition for _, condition, _ in self._conditions))

    def _compiled(self, expression: str) -> Callable[..., bool]:
        # All expressions come from this file. One compiled expression takes a third of the time of a loop.
        names = {str(dtype).removeprefix("torch."): dtype for dtype in _ARRAY_DTYPES} | {"DTYPES": DTYPES}
        function: Callable[..., bool] = eval(f"lambda {', '.join((*self.parameters, 'threads'))}: {expression}", names)
        return function

    def check(self, name: str, arguments: tuple[Any, ...], threads: int) -> None:
        """Raise ValueError, naming operation and parameter, unless the arguments are as declared."""
        try:
            if self._holds(*arguments, threads):
                return
        except (AttributeError, TypeError, IndexError, ZeroDivisionError, RuntimeError):
            pass  # an argument is not a tensor, or has another rank; the code below finds which one
        if len(arguments) != len(self.parameters):
            raise ValueError(f"{name} takes {len(self.parameters)} arguments, got {len(arguments)}")
        for parameter, condition, demand in self._conditions:
            try:
                fits = self._compiled(condition)(*arguments, threads)
            except (AttributeError, TypeError, IndexError, ZeroDivisionError, RuntimeError):
                fits = False
            if not fits:
                value = dict(zip(self.parameters, arguments, strict=True)).get(parameter)
                raise ValueError(f"{name}: {parameter} must {demand}{_shown(value)}")


def _conditions(name: str, kind: Array | str) -> list[tuple[str, str]]:
    if isinstance(kind, Array):
        return kind.conditions(name)
    return [(f"{name} in DTYPES", "be float32, bfloat16 or float16")] if kind == DTYPE else []


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f", got {type(value).__name__}" if value is not None else ""
    strided = value.layout == torch.strided
    strides = f" with strides {tuple(value.stride())}" if strided else f" {value.layout}"
    return f", got {value.dtype} {tuple(value.shape)}{strides} on {value.device}"


_ARRAY_DTYPES = (torch.float32, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32, torch.int64)
_PACKED = {"rows": SIZE, "columns": SIZE, "inner": SIZE}


def _x() -> Array:
    return Array("dtype", ("rows", "inner"))


def _out() -> Array:
    return Array("dtype", ("rows", "columns"))


def _bias() -> Array:
    return Array(torch.float32, ("columns",), optional=True)


def _residual() -> Array:
    return Array("dtype", ("rows", "columns"), optional=True)


def _int8_product() -> Signature:
    codes, scales = ("columns", "inner"), ("columns",)
    return Signature(
        "inner % 16 == 0",
        x=_x(),
        weight=Array(torch.int8, codes),
        scales=Array(torch.float32, scales),
        up=Array(torch.int8, codes, optional=True),
        up_scales=Array(torch.float32, scales, optional="up is None"),
        bias=_bias(),
        residual=_residual(),
        out=_out(),
        **_PACKED,
        dtype=DTYPE,
    )


def _grouped_product(dtype: torch.dtype, width: str, sizes: str, multiple: str = "group") -> Signature:
    """The signature of a product with codes [columns, width] in groups of one of the sizes; inner: a multiple of
    `multiple`."""
    codes, groups = ("columns", width), ("columns", "inner // group")
    return Signature(
        f"group in ({sizes}) and inner % {multiple} == 0",
        x=_x(),
        weight=Array(dtype, codes),
        scales=Array("group_dtype", groups),
        zeros=Array("group_dtype", groups, optional=True),
        up=Array(dtype, codes, optional=True),
        up_scales=Array("group_dtype", groups, optional="up is None"),
        up_zeros=Array("group_dtype", groups, optional="up is None or zeros is None"),
        bias=_bias(),
        residual=_residual(),
        out=_out(),
        **_PACKED,
        group=SIZE,
        group_dtype=DTYPE,
        dtype=DTYPE,
    )


def _unpacking(dtype: torch.dtype, width: str, sizes: str, multiple: str = "group") -> Signature:
    """The signature that unpacks the weights of `_grouped_product`."""
    return Signature(
        f"group in ({sizes}) and inner % {multiple} == 0",
        weight=Array(dtype, ("columns", width)),
        scales=Array("group_dtype", ("columns", "inner // group")),
        zeros=Array("group_dtype", ("columns", "inner // group"), optional=True),
        out=Array("dtype", ("columns", "inner")),
        columns=SIZE,
        inner=SIZE,
        group=SIZE,
        group_dtype=DTYPE,
        dtype=DTYPE,
    )


_INT4 = (torch.uint8, "inner // 2", "32, 64, 128")
_INT3 = (torch.uint8, "inner // 8 * 3", "32, 64, 128", "128")
_INT8_GROUPS = (torch.int8, "inner", "16, 32, 64, 128")


def _turns(tokens: str) -> dict[str, Array]:
    return {name: Array(torch.float32, (tokens, "pairs")) for name in ("cos", "sin")}


def _cache(scales: str) -> str:
    return f"(cache_dtype if {scales} is None else float8_e4m3fn if e4m3 else int8)"


_ATTENDED = "(dtype if k_scales is None else uint8 if int4 else float8_e4m3fn if e4m3 else int8)"
_POWER_OF_TWO = "16 <= head_dim <= 512 and head_dim & (head_dim - 1) == 0"
_NEW_KEYS = {
    **dict.fromkeys(("batch", "time", "kv_heads", "head_dim", "pairs", "half"), SIZE),
    **dict.fromkeys(("k_batch", "k_time", "k_head", "v_batch", "v_time", "v_head"), SIZE),
}


def _new_keys() -> dict[str, Array]:
    return {
        name: Array(
            "dtype", ("batch", "time", "kv_heads", "head_dim"), (f"{name}_batch", f"{name}_time", f"{name}_head")
        )
        for name in ("k", "v")
    }


SIGNATURES = {
    "gelu": Signature(x=Array("dtype", ("count",)), out=Array("dtype", ("count",)), count=SIZE, dtype=DTYPE),
    "swiglu": Signature(
        gate=Array("dtype", ("rows", "columns"), ("gate_row",)),
        up=Array("dtype", ("rows", "columns"), ("up_row",)),
        out=_out(),
        rows=SIZE,
        columns=SIZE,
        gate_row=SIZE,
        up_row=SIZE,
        dtype=DTYPE,
    ),
    "norm": Signature(
        x=Array("dtype", ("rows", "width"), ("x_row",)),
        residual=Array("dtype", ("rows", "width"), ("residual_row",), optional=True),
        weight=Array("dtype", ("width",)),
        bias=Array("dtype", ("width",), optional=True),
        normed=Array("dtype", ("rows", "width")),
        hidden=Array("dtype", ("rows", "width"), optional="residual is None"),
        rows=SIZE,
        width=SIZE,
        x_row=SIZE,
        residual_row=SIZE,
        eps=NUMBER,
        dtype=DTYPE,
    ),
    "quantize_rows": Signature(
        x=Array("dtype", ("rows", "width")),
        codes=Array(torch.int8, ("rows", "width")),
        scales=Array(torch.float32, ("rows",)),
        rows=SIZE,
        width=SIZE,
        dtype=DTYPE,
    ),
    "linear": Signature(
        x=_x(),
        weight=Array("dtype", ("columns", "inner")),
        up=Array("dtype", ("columns", "inner"), optional=True),
        bias=_bias(),
        out=_out(),
        **_PACKED,
        dtype=DTYPE,
    ),
    "linear_int8": _int8_product(),
    "linear_w8a8": _int8_product(),
    "unpack_int8": Signature(
        "inner % 16 == 0",
        weight=Array(torch.int8, ("columns", "inner")),
        scales=Array(torch.float32, ("columns",)),
        out=Array("dtype", ("columns", "inner")),
        columns=SIZE,
        inner=SIZE,
        dtype=DTYPE,
    ),
    "linear_int4": _grouped_product(*_INT4),
    "linear_w4a8": _grouped_product(*_INT4),
    "unpack_int4": _unpacking(*_INT4),
    "linear_int3": _grouped_product(*_INT3),
    "unpack_int3": _unpacking(*_INT3),
    "linear_int8_groups": _grouped_product(*_INT8_GROUPS),
    "unpack_int8_groups": _unpacking(*_INT8_GROUPS),
    "linear_nf4": Signature(
        "inner % 64 == 0",
        x=_x(),
        weight=Array(torch.uint8, ("columns", "inner // 2")),
        scales=Array(torch.float32, ("columns", "inner // 64")),
        up=Array(torch.uint8, ("columns", "inner // 2"), optional=True),
        up_scales=Array(torch.float32, ("columns", "inner // 64"), optional="up is None"),
        bias=_bias(),
        residual=_residual(),
        out=_out(),
        **_PACKED,
        dtype=DTYPE,
    ),
    "unpack_nf4": Signature(
        "inner % 64 == 0",
        weight=Array(torch.uint8, ("columns", "inner // 2")),
        scales=Array(torch.float32, ("columns", "inner // 64")),
        out=Array("dtype", ("columns", "inner")),
        columns=SIZE,
        inner=SIZE,
        dtype=DTYPE,
    ),
    "attention": Signature(
        "heads % kv_heads == 0 and 2 * pairs <= head_dim and row_block > 0 and part_keys >= 0",
        "(max_keys <= page_size and k.shape[0] >= batch if page_table is None else"
        " max_keys <= page_size * page_table.shape[1] and page_table.shape[0] == batch and key_lengths is not None)",
        "v.shape == k.shape",
        f"(not int4 or {_POWER_OF_TWO} and k_scales is not None and page_table is not None)",
        "(not e4m3 or not int4 and k_scales is not None)",
        q=Array("dtype", ("batch", "queries", "heads", "head_dim"), ("q_batch", "q_token", "q_head")),
        k=Array(_ATTENDED, (None, "page_size", "kv_heads", "head_dim // (1 + int4)"), ("k_page", "k_slot", "k_head")),
        v=Array(_ATTENDED, (None, "page_size", "kv_heads", "head_dim // (1 + int4)"), ("v_page", "v_slot", "v_head")),
        out=Array("dtype", ("batch", "queries", "heads", "head_dim")),
        k_scales=Array(torch.float32, ("k.shape[0]", "page_size", "kv_heads"), optional="v_scales is None"),
        v_scales=Array(torch.float32, ("k.shape[0]", "page_size", "kv_heads"), optional="k_scales is None"),
        k_bias=Array("dtype", ("kv_heads", "head_dim"), optional="key_cos is None"),
        key_cos=Array(torch.float32, (None, "head_dim // 2"), ("turn_row",), optional="key_sin is None"),
        key_sin=Array(torch.float32, (None, "head_dim // 2"), ("turn_row",), optional="k_bias is None"),
        cos=Array(torch.float32, ("batch", "queries", "pairs"), optional="sin is None"),
        sin=Array(torch.float32, ("batch", "queries", "pairs"), optional="cos is None"),
        key_lengths=Array(torch.int64, ("batch",), optional=True),
        page_table=Array(torch.int32, (None, None), ("table_row",), optional=True),
        workspace=Array(torch.float32, ("threads", "workspace_row")),
        parts=Array(
            torch.float32,
            ("batch", "heads", "queries", "-(-max_keys // part_keys)", "head_dim"),
            optional="part_keys == 0",
        ),
        statistics=Array(
            torch.float32, ("batch", "heads", "queries", "-(-max_keys // part_keys)", "2"), optional="part_keys == 0"
        ),
        batch=SIZE,
        queries=SIZE,
        heads=SIZE,
        kv_heads=SIZE,
        head_dim=SIZE,
        max_keys=SIZE,
        page_size=SIZE,
        table_row=SIZE,
        turn_row=SIZE,
        pairs=SIZE,
        half=SIZE,
        causal=SIZE,
        int4=SIZE,
        e4m3=SIZE,
        rounds=SIZE,
        q_batch=SIZE,
        q_token=SIZE,
        q_head=SIZE,
        k_page=SIZE,
        k_slot=SIZE,
        k_head=SIZE,
        v_page=SIZE,
        v_slot=SIZE,
        v_head=SIZE,
        row_block=SIZE,
        part_keys=SIZE,
        workspace_row=SIZE,
        scale=NUMBER,
        dtype=DTYPE,
    ),
    "rotary": Signature(
        "head_dim <= 512 and 2 * pairs <= head_dim",
        x=Array("dtype", ("batch", "time", "heads", "head_dim"), ("x_batch", "x_time", "x_head")),
        out=Array("dtype", ("batch", "time", "heads", "head_dim")),
        **_turns("batch * time"),
        batch=SIZE,
        time=SIZE,
        heads=SIZE,
        head_dim=SIZE,
        pairs=SIZE,
        half=SIZE,
        x_batch=SIZE,
        x_time=SIZE,
        x_head=SIZE,
        dtype=DTYPE,
    ),
    "kv_write": Signature(
        "head_dim <= 512 and 2 * pairs <= head_dim",
        "k_cache.shape[-2:] == (kv_heads, head_dim)",
        **_new_keys(),
        k_cache=Array(_cache("k_scales"), ("k_cache.numel()",)),
        v_cache=Array(_cache("v_scales"), ("k_cache.numel()",)),
        k_scales=Array(torch.float32, ("k_cache.numel() // head_dim",), optional="v_scales is None"),
        v_scales=Array(torch.float32, ("k_cache.numel() // head_dim",), optional="k_scales is None"),
        slots=Array(torch.int64, ("batch", "time")),
        **_turns("batch * time"),
        **_NEW_KEYS,
        dtype=DTYPE,
        cache_dtype=DTYPE,
        e4m3=SIZE,
    ),
    "kv_write_int4": Signature(
        _POWER_OF_TWO,
        "2 * pairs <= head_dim and k_cache.shape[-2:] == (kv_heads, head_dim // 2)",
        **_new_keys(),
        k_cache=Array(torch.uint8, ("k_cache.numel()",)),
        v_cache=Array(torch.uint8, ("k_cache.numel()",)),
        k_scales=Array(torch.float32, ("2 * k_cache.numel() // head_dim",)),
        v_scales=Array(torch.float32, ("2 * k_cache.numel() // head_dim",)),
        k_bias=Array("dtype", ("kv_heads", "head_dim"), optional=True),
        slots=Array(torch.int64, ("batch", "time")),
        **_turns("batch * time"),
        **_NEW_KEYS,
        dtype=DTYPE,
    ),
    "pool_norm_rotate": Signature(
        "x.shape[0] == batch and x.shape[1] >= 2 * length and 2 * pairs <= channels and workspace_row >= channels + 16",
        "(angles is None or angles.shape[1] >= length and (windows is not None or angles.shape[0] >= batch))",
        x=Array("dtype", (None, None, "channels"), ("x_window", "x_position")),
        weight=Array("dtype", ("channels",)),
        bias=Array("dtype", ("channels",)),
        angles=Array(torch.float32, (None, None, "pairs"), ("angles_window", "angles_token"), optional=True),
        windows=Array(torch.int64, ("batch",), optional=True),
        out=Array("dtype", ("batch", "length", "channels")),
        workspace=Array(torch.float32, ("threads", "workspace_row")),
        workspace_row=SIZE,
        batch=SIZE,
        length=SIZE,
        channels=SIZE,
        x_window=SIZE,
        x_position=SIZE,
        angles_window=SIZE,
        angles_token=SIZE,
        pairs=SIZE,
        eps=NUMBER,
        dtype=DTYPE,
    ),
    "sample": Signature(
        logits=Array(torch.float32, ("batch", "vocab"), ("stride",)),
        temperature=Array(torch.float32, ("batch",)),
        top_k=Array(torch.int64, ("batch",)),
        top_p=Array(torch.float32, ("batch",)),
        min_p=Array(torch.float32, ("batch",)),
        uniform=Array(torch.float32, ("batch",)),
        out=Array(torch.int64, ("batch",)),
        batch=SIZE,
        vocab=SIZE,
        stride=SIZE,
    ),
}
"""By the name that `native.call` takes, without the number of threads, which is always the last parameter."""
