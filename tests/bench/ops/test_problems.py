"""The problems of the lab: those of the model's own host code, solved by ours, counted once, the same for one seed."""

from collections import Counter
from typing import Any

import pytest
import torch

from afnext.bench.core.work import work_of
from afnext.bench.ops.accuracy import check
from afnext.bench.ops.problems import FULL, QUICK, Problem, Stage, odd_problems, problems, stages
from afnext.bench.ops.specs import UnknownOperationError, spec, specs
from afnext.kernels.dispatch import Operation, operations

CPU, META = torch.device("cpu"), torch.device("meta")


def test_every_operation_has_problems_and_odd_variants() -> None:
    registered = {operation.name for operation in operations()}
    assert set(specs()) == registered
    assert {problem.operation for problem in problems()} == registered
    assert all(len(entry.odd) >= 2 for entry in specs().values())


def test_names_are_unique_and_the_shapes_are_those_asked_for() -> None:
    names = [problem.name for problem in problems()]
    assert len(set(names)) == len(names)
    decode = {(p.shape["batch"], p.context, p.shape["kv8"]) for p in problems() if p.operation == "decode_attention"}
    assert decode == {(b, d + 1, kv8) for b in (1, 2, 4, 8, 32) for d in (0, 8192, 45_000) for kv8 in (0, 1)}
    prefill = {(p.context, p.shape["kv8"]) for p in problems() if p.operation == "attention" and "keys" in p.shape}
    assert prefill == {(d + 1024, kv8) for d in (0, 16_384, 45_000) for kv8 in (0, 1)}
    products = ("linear_int8", "linear_w8a8", "linear_fp8", "linear_int4", "linear_w4a8", "linear_nf4", "linear_nvfp4")
    for operation in products:
        assert {1, 2, 4, 8, 32, 1024} <= {p.shape["rows"] for p in problems() if p.operation == operation}


@pytest.mark.parametrize("operation", specs())
def test_ours_keeps_the_rule_on_the_odd_variants(operation: str, seed: int) -> None:
    entry = specs()[operation]
    for problem in odd_problems(operation, entry.dtypes[seed % len(entry.dtypes)]):
        verdict = check(problem, entry.function, CPU, seed)
        assert not verdict.fault, verdict


def test_the_same_seed_gives_the_same_inputs_and_another_seed_others(seed: int) -> None:
    problem = odd_problems("decode_attention", "bfloat16")[1]
    first, again, other = (problem.arguments(CPU, s) for s in (seed, seed, seed + 1))
    for name, value in first.items():
        assert torch.equal(value.nan_to_num(), again[name].nan_to_num())
    assert not torch.equal(first["q"], other["q"])
    assert first["k"].isnan().any(), "memory that must not be read is poisoned"


def test_meta_arguments_are_those_of_the_cpu_without_numbers() -> None:
    for problem in problems(QUICK):
        real, meta = problem.arguments(CPU), problem.arguments(META)
        assert real.keys() == meta.keys()
        for name, value in real.items():
            if isinstance(value, torch.Tensor):
                assert (value.shape, value.dtype) == (meta[name].shape, meta[name].dtype)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("encode 4 windows", Stage("encode", 4)),
        ("prefill 1024 at 45000", Stage("prefill", 1024, 45_000)),
        ("prefill 1024 at 0, int8 KV", Stage("prefill", 1024, 0, kv8=True)),
        ("decode 4 at 45000", Stage("decode", 4, 45_000)),
        ("decode 1 at 45000, int8 KV", Stage("decode", 1, 45_000, kv8=True)),
    ],
)
def test_the_calls_of_a_stage_are_those_of_the_runtime(
    name: str, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime's host code runs on meta tensors; what it calls is what the stage says, as often."""
    expected: Counter[tuple[str, float, float]] = Counter()
    for problem, count in stage.calls().items():
        expected[_key(problem)] += count
    called = _traced(name, False, monkeypatch)
    for key in [key for key in called if key[0] == "swiglu"]:  # part of a dense `linear_swiglu`
        del called[key]
    assert called == expected


@pytest.mark.parametrize("name", ["prefill 1024 at 45000", "decode 4 at 45000"])
def test_what_a_gpu_joins_is_a_problem(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(_traced(name, True, monkeypatch)) <= {_key(problem) for problem in problems(FULL)}


def _key(problem: Problem) -> tuple[str, float, float]:
    return problem.operation, problem.work.flops, sum(problem.work.touched.values())


def _traced(name: str, joined: bool, monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, float, float]]:
    """What the runtime calls in a stage of that name."""
    pytest.importorskip("triton")
    from afnext.bench.codegen import stages as traced
    from afnext.bench.codegen import trace

    called: Counter[tuple[str, float, float]] = Counter()

    def recorded(operation: str, arguments: Any, context: int) -> Any:
        work = work_of(operation, arguments, context)
        called[operation, work.flops, sum(work.touched.values())] += 1
        return work

    monkeypatch.setattr(trace, "work_of", recorded)
    model = traced.full_size_model(joined=joined)
    run = next(candidate for candidate in traced.stages(model) if candidate.name == name)
    with trace.recorded_launches(run.context), torch.inference_mode():
        run.run()
    return called


def test_stages_have_names_of_their_own() -> None:
    names = [stage.name for stage in stages(FULL)]
    assert len(set(names)) == len(names)
    assert "decode 8 at 45000, int4, int8 KV" in names


def test_a_recipe_decides_which_product_a_layer_takes() -> None:
    found = {problem.operation for problem in Stage("decode", 8, 8192, "int4-w4a8").calls()}
    assert {"linear_w4a8", "linear_w4a8_swiglu", "linear_int8"} <= found
    assert "linear" not in found
    encoding = {(p.operation, p.shape.get("out_features")) for p in Stage("encode", 4, scheme="small").calls()}
    width, inner = FULL.encoder_width, FULL.encoder_inner
    assert {("linear_int8", width), ("linear_int4", inner)} <= encoding
    assert ("linear_int8", inner) not in encoding


def test_problems_describe_themselves() -> None:
    problem = next(p for p in problems() if p.operation == "linear_int4_swiglu" and p.shape["rows"] == 8)
    described = problem.to_dict()
    assert described["inputs"]["gate"] == "Packed(codes uint8[18944, 1792], scales bfloat16[18944, 56])"
    assert described["flops"] == problem.work.flops > 0
    packed = 2 * 18_944 * (3584 // 2 + 2 * 3584 // 64)
    assert described["bytes"] == pytest.approx(packed + 2 * 8 * (3584 + 18_944))


def test_unknown_operations_are_refused() -> None:
    with pytest.raises(UnknownOperationError, match="unknown operation 'gulu'; there are add_layer_norm"):
        spec("gulu")


def test_no_operation_is_without_work() -> None:
    for problem in problems(QUICK):
        assert problem.work.flops > 0
        assert problem.least_bytes > 0
    assert work_of("nothing", {}, 0).flops == 0
    assert isinstance(spec("gelu").operation, Operation)


def test_problems_are_their_own_keys() -> None:
    first, again = (
        Problem("gelu", {"rows": 1, "channels": 2}, "float32"),
        Problem("gelu", {"rows": 1, "channels": 2}, "float32"),
    )
    assert {first: 1}[again] == 1
    assert first != Problem("gelu", {"rows": 1, "channels": 2}, "bfloat16")
