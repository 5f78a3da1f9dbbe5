"""Other libraries are called as their sources want it, and compute what torch computes for the same problem."""

import sys
from typing import Any

import pytest
import torch
from support.gpu_libraries import MODULES

from afnext.bench.core.timing import compare_outputs
from afnext.bench.ops import libraries, rivals
from afnext.bench.ops.libraries import LIBRARIES, Library, available
from afnext.bench.ops.problems import Problem, problems

CPU = torch.device("cpu")
HEADS = {"heads": 14, "kv_heads": 2, "head_dim": 32}
PAGED = {**HEADS, "page_size": 16, "kv8": 0}
ENCODER = Problem("attention", {"batch": 2, "queries": 37, "heads": 4, "head_dim": 32}, "bfloat16")
PROMPT = Problem("attention", {"batch": 1, "queries": 19, "keys": 19, **PAGED}, "bfloat16")
CHUNK = Problem("attention", {"batch": 1, "queries": 19, "keys": 53, **PAGED}, "float16")
DECODE = Problem("decode_attention", {"batch": 3, "queries": 1, "keys": 53, **PAGED}, "bfloat16")
INT8_KV = Problem("decode_attention", {"batch": 3, "queries": 1, "keys": 53, **PAGED, "kv8": 1}, "bfloat16")


def product(kind: str, dtype: str, bias: int = 1, **more: int) -> Problem:
    return Problem(f"linear_{kind}", {"rows": 5, "in_features": 256, "out_features": 256, "bias": bias, **more}, dtype)


PROBLEMS = (
    *(ENCODER, PROMPT, CHUNK, DECODE, INT8_KV),
    *(product(kind, dtype) for kind in ("int8", "w8a8", "nf4") for dtype in ("bfloat16", "float16")),
    *(product("int4", dtype, group=group) for dtype in ("bfloat16", "float16") for group in (64, 128)),
    product("int4", "float16", bias=0, group=128),
)
COVERED = {
    "flash-attn": [ENCODER, PROMPT, CHUNK, DECODE],
    "flash-attn-3": [ENCODER, PROMPT, CHUNK, DECODE],
    "flash-attn-4": [ENCODER, PROMPT, CHUNK, DECODE],
    "flashinfer": [PROMPT, CHUNK, DECODE],
    "sageattention": [ENCODER, PROMPT],
    "cudnn": [ENCODER, PROMPT, CHUNK, DECODE],
    "torch-causal-bias": [PROMPT, CHUNK],
    "bitsandbytes": [one for one in PROBLEMS if one.operation in ("linear_int8", "linear_w8a8", "linear_nf4")],
    "torchao": [product("int8", "bfloat16"), product("int8", "float16")]
    + [product("int4", "bfloat16", group=group) for group in (64, 128)],
    "gemlite": [one for one in PROBLEMS if one.operation in ("linear_int8", "linear_w8a8")],
    "vllm-marlin": [one for one in PROBLEMS if one.operation == "linear_int4"],
    "marlin": [product("int4", "float16", group=128), product("int4", "float16", bias=0, group=128)],
}
BY_NAME = {library.name: library for library in LIBRARIES}


def agrees(library: Library, problem: Problem) -> None:
    arguments = problem.arguments(CPU, seed=5)
    theirs = library.prepare(problem, arguments)()
    expected = rivals._torch(problem, arguments).call()
    assert theirs.shape == expected.shape
    assert theirs.dtype == expected.dtype
    assert (found := compare_outputs(expected, theirs, problem.tolerance)).agrees, found.reason


@pytest.mark.parametrize("name", BY_NAME)
def test_a_library_covers_what_its_source_says(name: str) -> None:
    assert [one.name for one in PROBLEMS if BY_NAME[name].covers(one)] == [one.name for one in COVERED[name]]


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - {"bitsandbytes", "cudnn", "torch-causal-bias"}))
def test_libraries_for_gpus_are_called_by_their_signatures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, make in MODULES.items():
        monkeypatch.setitem(sys.modules, module, make())
    for problem in COVERED[name]:
        agrees(BY_NAME[name], problem)


@pytest.mark.parametrize("problem", COVERED["bitsandbytes"], ids=lambda problem: problem.name)
def test_bitsandbytes_on_a_cpu(problem: Problem) -> None:
    pytest.importorskip("bitsandbytes")
    agrees(BY_NAME["bitsandbytes"], problem)


@pytest.mark.parametrize("problem", COVERED["torchao"][:2], ids=lambda problem: problem.name)
def test_torchaos_int8_product_on_a_cpu(problem: Problem) -> None:
    pytest.importorskip("torchao.quantization")
    agrees(BY_NAME["torchao"], problem)


def test_torchs_masks_and_cudnn_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for problem in COVERED["torch-causal-bias"]:
        agrees(BY_NAME["torch-causal-bias"], problem)
    asked: list[Any] = []
    real = libraries.sdpa_kernel
    monkeypatch.setattr(
        libraries, "sdpa_kernel", lambda backend: asked.append(backend) or real(torch.nn.attention.SDPBackend.MATH)
    )
    for problem in COVERED["cudnn"]:
        agrees(BY_NAME["cudnn"], problem)
    assert asked == [torch.nn.attention.SDPBackend.CUDNN_ATTENTION] * len(COVERED["cudnn"])


def test_every_library_but_one_covers_a_problem_of_the_model() -> None:
    """Marlin's own package has no groups of 64, which the recipes use; vLLM's has."""
    found = [*problems(), *problems(dtype="float16")]
    unused = [library.name for library in LIBRARIES if not any(library.covers(problem) for problem in found)]
    assert unused == ["marlin"]


def test_a_missing_library_is_named_and_a_missing_parent_is_no_error() -> None:
    assert not available("no_such_library.part")
    missing = {library.name for library in LIBRARIES if not available(library.module)}
    assert "cudnn" not in missing
    assert set(rivals.absent(PROMPT)) == missing & {name for name, covered in COVERED.items() if PROMPT in covered}
