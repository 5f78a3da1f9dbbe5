"""What reaches the native kernels: every array of every operation has the dtype, shape and place that C reads."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afnext.kernels import native
from afnext.kernels.native.recording import recording
from afnext.kernels.native.signatures import DTYPE, NUMBER, SIGNATURES, Array

SOURCES = sorted(Path(native.__file__).parent.glob("*.cpp"))
EXPORT = re.compile(r"AFNEXT_EXPORT void afnext_(\w+)\((.*?)\)\s*\{", re.DOTALL)
EXPORTED = {name: text for source in SOURCES for name, text in EXPORT.findall(source.read_text(encoding="utf-8"))}
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.bool,
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
ELEMENTS = {"float": torch.float32, "int8_t": torch.int8, "uint8_t": torch.uint8, "int32_t": torch.int32,
            "int64_t": torch.int64}  # fmt: skip

# The scalars of one valid call each; of attention, over pages of int8, pages of int4 and dense keys.
PRODUCT = {"rows": 3, "columns": 5, "inner": 64, "dtype": torch.float32}
CALLS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("gelu", {"count": 6, "dtype": torch.float16}, set()),
    ("swiglu", {"rows": 2, "columns": 3, "dtype": torch.bfloat16}, set()),
    ("norm", {"rows": 2, "width": 5, "eps": 1e-5, "dtype": torch.float32}, set()),
    ("norm", {"rows": 2, "width": 5, "residual_row": 0, "eps": 1e-5, "dtype": torch.float32}, {"residual", "hidden"}),
    ("quantize_rows", {"rows": 3, "width": 8, "dtype": torch.bfloat16}, set()),
    ("linear", PRODUCT, set()),
    ("linear_int8", PRODUCT, set()),
    ("linear_w8a8", PRODUCT, set()),
    ("unpack_int8", {"columns": 4, "inner": 32, "dtype": torch.float16}, set()),
    ("linear_int4", {**PRODUCT, "group": 32, "group_dtype": torch.float16}, set()),
    ("linear_w4a8", {**PRODUCT, "group": 32, "group_dtype": torch.float32}, set()),
    ("linear_w4a8", {**PRODUCT, "group": 64, "group_dtype": torch.bfloat16}, {"zeros", "up_zeros"}),
    ("unpack_int4", {"columns": 4, "inner": 64, "group": 32, "group_dtype": torch.float16, "dtype": torch.float32},
     set()),
    ("linear_int3", {**PRODUCT, "inner": 128, "group": 32, "group_dtype": torch.bfloat16}, set()),
    ("unpack_int3", {"columns": 4, "inner": 128, "group": 64, "group_dtype": torch.float16, "dtype": torch.float32},
     set()),
    ("linear_int8_groups", {**PRODUCT, "group": 16, "group_dtype": torch.float32}, set()),
    ("linear_int8_groups", {**PRODUCT, "group": 32, "group_dtype": torch.float16}, {"zeros", "up_zeros"}),
    ("unpack_int8_groups", {"columns": 4, "inner": 64, "group": 16, "group_dtype": torch.float32,
                            "dtype": torch.bfloat16}, set()),
    ("linear_nf4", PRODUCT, set()),
    ("unpack_nf4", {"columns": 4, "inner": 64, "dtype": torch.float32}, set()),
    ("rotary", {"batch": 2, "time": 3, "heads": 2, "head_dim": 8, "pairs": 4, "half": True, "dtype": torch.float32},
     set()),
    ("kv_write", {"batch": 2, "time": 3, "kv_heads": 2, "head_dim": 8, "pairs": 4, "half": False,
                  "dtype": torch.bfloat16, "cache_dtype": torch.bfloat16, "e4m3": False}, set()),
    ("kv_write", {"batch": 2, "time": 3, "kv_heads": 2, "head_dim": 8, "pairs": 4, "half": False,
                  "dtype": torch.bfloat16, "cache_dtype": torch.float32, "e4m3": False}, {"k_scales", "v_scales"}),
    ("kv_write_int4", {"batch": 2, "time": 3, "kv_heads": 2, "head_dim": 16, "pairs": 8, "half": True,
                       "dtype": torch.bfloat16}, set()),
    ("pool_norm_rotate", {"workspace_row": 40, "batch": 2, "length": 3, "channels": 8, "pairs": 2, "eps": 1e-5,
                          "dtype": torch.float32}, set()),
    ("sample", {"batch": 2, "vocab": 9}, set()),
    ("attention", {"batch": 2, "queries": 1, "heads": 4, "kv_heads": 2, "head_dim": 16, "max_keys": 6, "page_size": 2,
                   "pairs": 0, "half": False, "causal": True, "row_block": 2, "part_keys": 256,
                   "workspace_row": 60_000, "scale": 0.25, "dtype": torch.bfloat16, "int4": False, "e4m3": False,
                   "rounds": False, "turn_row": 0},
     {"cos", "sin", "k_bias", "key_cos", "key_sin"}),
    ("attention", {"batch": 2, "queries": 1, "heads": 4, "kv_heads": 2, "head_dim": 16, "max_keys": 6, "page_size": 2,
                   "pairs": 0, "half": False, "causal": True, "row_block": 2, "part_keys": 256,
                   "workspace_row": 60_000, "scale": 0.25, "dtype": torch.bfloat16, "int4": True, "e4m3": False,
                   "rounds": False}, {"cos", "sin"}),
    ("attention", {"batch": 2, "queries": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, "max_keys": 5, "page_size": 5,
                   "table_row": 0, "pairs": 4, "half": True, "causal": False, "row_block": 6, "part_keys": 0,
                   "workspace_row": 60_000, "scale": 0.25, "dtype": torch.float32, "int4": False, "e4m3": False,
                   "rounds": False, "turn_row": 0},
     {"k_bias", "key_cos", "key_sin", "k_scales", "v_scales", "key_lengths", "page_table", "parts", "statistics"}),
]  # fmt: skip
pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason="the native kernels are not built")


@dataclass
class Call:
    """One valid call: its operation and its arguments by name, in order."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name}-{sum(argument is None for argument in self.arguments.values())}"

    def run(self, **others: Any) -> None:
        native.call(self.name, *{**self.arguments, **others}.values())


def valid_call(name: str, scalars: dict[str, Any], absent: set[str]) -> Call:
    """Arrays of zeros, which are valid indices, too, and lengths of one; what may have any size has the least one."""
    parameters = SIGNATURES[name].parameters
    known: dict[str, Any] = {**scalars, "threads": torch.get_num_threads(), **dict.fromkeys(absent)}
    known |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    batch = scalars.get("batch", 0)
    first = {
        "k": (batch if "page_table" in absent else 3,),
        "v": (batch if "page_table" in absent else 3,),
        "x": (batch, 2 * scalars.get("length", 0)),
        "page_table": (batch, 3),
        "key_cos": (6,),
        "key_sin": (6,),
        "angles": (3, scalars.get("length", 0)),
    }
    # `k` and its like come first, as the shapes of others refer to them.
    for parameter in sorted(parameters, key=lambda name: name not in ("x", "k", "k_cache")):
        kind = parameters[parameter]
        if isinstance(kind, Array) and parameter not in absent:
            if name.startswith("kv_write") and parameter in ("k_cache", "v_cache"):
                int4 = name == "kv_write_int4"
                shape: tuple[int, ...] = (2, 3, scalars["kv_heads"], scalars["head_dim"] // (1 + int4))
                quantized = torch.uint8 if int4 else torch.int8
                dtype = quantized if "k_scales" not in absent else scalars["cache_dtype"]
            else:
                given = [eval(size, {}, known) for size in kind.shape if size is not None]
                shape = (*first[parameter], *given) if None in kind.shape else tuple(given)
                known.setdefault("k_scales", 0)
                dtype = eval(kind.dtype, {}, known) if isinstance(kind.dtype, str) else kind.dtype
            known[parameter] = torch.zeros(shape, dtype=dtype)
            if parameter == "key_lengths":
                known[parameter] += 1
            for dimension, stride in enumerate(kind.strides or ()):
                known[stride] = known[parameter].stride(dimension)
    return Call(name, {parameter: known[parameter] for parameter in parameters})


CASES = [valid_call(*call) for call in CALLS] if native.AVAILABLE else []
ARRAYS = [
    pytest.param(case, parameter, id=f"{case}-{parameter}")
    for case in CASES
    for parameter, argument in case.arguments.items()
    if isinstance(argument, Tensor)
]


def test_every_exported_operation_is_declared_and_called_here() -> None:
    assert EXPORTED.keys() == SIGNATURES.keys()
    assert {case.name for case in CASES} == SIGNATURES.keys()
    for name, signature in SIGNATURES.items():
        arrays = {parameter for parameter, kind in signature.parameters.items() if isinstance(kind, Array)}
        given = {p for case in CASES if case.name == name for p, value in case.arguments.items() if value is not None}
        assert arrays <= given, f"{name}: no call here has {arrays - given}"


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_declaration_is_that_of_the_source(name: str) -> None:
    """The same parameters in the same order, of the same types."""
    declared = SIGNATURES[name].parameters
    written = [parameter.split() for parameter in EXPORTED[name].replace("*", " * ").split(",")]
    assert [words[-1] for words in written] == [*declared, "threads"]
    for words, (parameter, kind) in zip(written, declared.items(), strict=False):
        words = [word for word in words[:-1] if word != "const"]
        if not isinstance(kind, Array):
            assert words == (["double"] if kind == NUMBER else ["int64_t"]), parameter
        elif words[0] in ("void", "char"):
            assert isinstance(kind.dtype, str), f"{parameter} has any dtype in C"
        else:
            assert kind.dtype == ELEMENTS[words[0]], parameter


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_valid_call_runs(case: Call) -> None:
    case.run()


@pytest.mark.parametrize(("case", "parameter"), ARRAYS)
def test_every_other_dtype_is_refused(case: Call, parameter: str) -> None:
    argument = case.arguments[parameter]
    for dtype in DTYPES:
        if dtype != argument.dtype:
            with pytest.raises(ValueError, match=f"^{case.name}: "):
                case.run(**{parameter: argument.to(dtype)})


@pytest.mark.parametrize(("case", "parameter"), ARRAYS)
def test_another_shape_layout_or_place_is_refused(case: Call, parameter: str) -> None:
    argument = case.arguments[parameter]
    twice = torch.stack((argument, argument), dim=-1)
    others = {
        "one more": torch.cat((argument.flatten(), argument.flatten()[:1])),
        "one less": argument.flatten()[1:],
        "empty": argument.flatten()[:0],
        "every other element": twice[..., 0] if argument.numel() > 1 else twice,
        "on no device": argument.to("meta"),
        "sparse": argument.to_sparse(),
    }
    for other in others.values():
        with pytest.raises(ValueError, match=f"^{case.name}: "):
            case.run(**{parameter: other})


@pytest.mark.parametrize(("case", "parameter"), ARRAYS)
def test_no_number_goes_as_an_address(case: Call, parameter: str) -> None:
    for other in (12345, 1.5, torch.float32):
        with pytest.raises(ValueError, match=f"^{case.name}: "):
            case.run(**{parameter: other})
    kind = SIGNATURES[case.name].parameters[parameter]
    assert isinstance(kind, Array)
    if kind.optional is not True:
        with pytest.raises(ValueError, match=f"^{case.name}: "):
            case.run(**{parameter: None})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_other_dtypes_and_sizes_than_those_of_the_arrays_are_refused(case: Call) -> None:
    for parameter, kind in SIGNATURES[case.name].parameters.items():
        if kind == DTYPE:
            with pytest.raises(ValueError, match=f"^{case.name}: "):
                case.run(**{parameter: torch.float64})
    with pytest.raises(ValueError, match=f"{case.name} takes"):
        native.call(case.name, *list(case.arguments.values())[:-1])


def test_repeated_calls_are_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == "gelu")
    with recording() as made:
        case.run()
    monkeypatch.setattr(native, "SIGNATURES", {})
    made()
