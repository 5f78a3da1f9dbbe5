"""Problems for other harnesses: what is written is self-contained, computes the reference, and reads back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from afnext.bench.ops import export, exported
from afnext.bench.ops.accuracy import Errors, _exact, _flat
from afnext.bench.ops.problems import Problem, odd_problems, problems
from afnext.bench.ops.specs import specs

CPU = torch.device("cpu")
INDICES = {
    *("key_lengths", "page_table", "slots", "windows", "seen", "rotation_positions", "rotation_frequencies"),
    *("rows_temperature", "rows_top_k", "rows_top_p", "rows_min_p", "penalty", "uniform"),
}
# Of FlashInfer-Bench's schema, those in use.
DTYPES = {"float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "int32", "int16", "int8", "bool"}


def every_operation() -> list[Problem]:
    """A few problems of every operation, with int8 KV where there is."""
    chosen: dict[tuple[str, int], list[Problem]] = {}
    for problem in problems():
        chosen.setdefault((problem.operation, problem.shape.get("kv8", 0)), []).append(problem)
    return [problem for alike in chosen.values() for problem in (alike[0], alike[-1])]


@pytest.mark.parametrize("operation", specs())
def test_exported_functions_are_the_reference(operation: str, seed: int) -> None:
    for problem in odd_problems(operation, "float32"):
        entry = problem.spec
        tensors, constants = export.flat(problem.arguments(CPU, seed))
        widened = problem.arguments(CPU, seed)
        exact = _flat(_exact(entry.function, widened))
        actual = _flat(getattr(exported, export.function_of(problem))(**tensors, **constants))
        if operation == "kv_write":
            exact += [widened[name] for name in ("k_cache", "v_cache", "k_scales", "v_scales") if name in widened]
        assert len(actual) == len(exact)
        for x, y in zip(actual, exact, strict=True):
            if x.is_floating_point():
                assert Errors.of(x, y.double(), y.float()).kept, problem.name
            else:
                assert int((x.long() - y.long()).abs().max()) == 0, problem.name


@pytest.mark.parametrize("form", export.FORMATS)
def test_what_is_written_reads_back(form: str, tmp_path: Path) -> None:
    chosen = every_operation()
    paths = export.write(chosen, tmp_path, form)
    assert all(path.is_file() for path in paths)
    assert {problem.name for problem in export.read(tmp_path, form)} == {problem.name for problem in chosen}


def test_definitions_and_workloads_keep_the_schema(tmp_path: Path) -> None:
    """The fields and rules of FlashInfer-Bench's published schema, checked here by hand."""
    chosen = every_operation()
    export.write(chosen, tmp_path, "flashinfer-bench")
    definitions = {}
    for path in (tmp_path / "definitions").rglob("*.json"):
        definition = json.loads(path.read_text())
        definitions[definition["name"]] = definition
        assert path == tmp_path / "definitions" / definition["op_type"] / f"{definition['name']}.json"
        assert set(definition) <= {
            "name",
            "op_type",
            "axes",
            "inputs",
            "outputs",
            "reference",
            "tags",
            "description",
            "constraints",
        }
        for axis in definition["axes"].values():
            assert (axis["type"], set(axis)) in (("var", {"type"}), ("const", {"type", "value"}))
        for tensor in (*definition["inputs"].values(), *definition["outputs"].values()):
            assert tensor["dtype"] in DTYPES
            assert set(tensor["shape"]) <= set(definition["axes"])
        scope: dict[str, Any] = {}
        exec(compile(definition["reference"], definition["name"], "exec"), scope)
        assert callable(scope["run"])
        assert "afnext" not in definition["reference"]
    found = 0
    for path in (tmp_path / "workloads").rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            trace = json.loads(line)
            found += 1
            definition, workload = definitions[trace["definition"]], trace["workload"]
            assert trace["solution"] is None
            assert trace["evaluation"] is None
            variable = {name for name, axis in definition["axes"].items() if axis["type"] == "var"}
            assert set(workload["axes"]) == variable
            assert set(workload["inputs"]) == set(definition["inputs"])
            for name, given in workload["inputs"].items():
                wanted = definition["inputs"][name]
                axes = [(definition["axes"][axis], axis) for axis in wanted["shape"]]
                sizes = [axis.get("value", workload["axes"].get(key)) for axis, key in axes]
                if given["type"] == "safetensors":
                    tensor = load_file(tmp_path / given["path"])[given["tensor_key"]]
                    assert list(tensor.shape) == sizes
                    assert str(tensor.dtype) == f"torch.{wanted['dtype']}"
                assert (given["type"] == "random") == (name not in INDICES)
    assert found == len(chosen)


def test_a_kernelbench_file_runs_without_the_package(tmp_path: Path) -> None:
    wanted = ("gelu/3000x3584", "decode_attention/1x1-of-1-int8", "linear_int4/1-rows-3584-to-512", "sample/top-p-1x")
    names = {want: next(one for one in problems() if one.name.startswith(want)) for want in wanted}
    for path in export.write(list(names.values()), tmp_path, "kernelbench"):
        text = path.read_text()
        assert "afnext" not in text
    found = []
    for path in sorted(tmp_path.rglob("*.py")):
        scope: dict[str, Any] = {}
        exec(compile(path.read_text(), str(path), "exec"), scope)
        out = scope["Model"](*scope["get_init_inputs"]())(*scope["get_inputs"]())
        found.append((scope["PROBLEM"], tuple(out.shape), bool(out.isfinite().all())))
    assert sorted(found) == [
        ("decode_attention/1x1-of-1-int8-kv-bfloat16", (1, 1, 28, 128), True),
        ("gelu/3000x3584-bfloat16", (3000, 3584), True),
        ("linear_int4/1-rows-3584-to-512-bias-bfloat16", (1, 512), True),
        ("sample/top-p-1x151672-float32", (1,), True),
    ]


def test_trials_become_traces(tmp_path: Path) -> None:
    name = next(one.name for one in problems() if one.operation == "gelu")
    events = [{"event": "verdict", "problem": "gelu/odd", "error": 0.002, "allowed": 0.01, "fault": ""}]
    events += [
        {"event": "time", "problem": name, "subject": subject, "seconds": seconds}
        for subject, seconds in (("candidate", 0.001), ("afnext", 0.003), ("torch", 0.002))
    ]
    (trace,) = export.traces(events, "my_gelu", {"cpu": "a CPU", "versions": {"torch": "2.13"}, "timestamp": "now"})
    assert trace["solution"] == "my_gelu"
    assert trace["evaluation"]["performance"] == {
        "latency_ms": 1.0,
        "reference_latency_ms": 2.0,
        "speedup_factor": 2.0,
    }
    (path,) = export.write_traces([trace], tmp_path)
    assert path.parent == tmp_path / "traces" / "afnext" / "gelu"
    assert json.loads(path.read_text()) == trace
    assert trace["evaluation"]["environment"] == {"hardware": "a CPU", "libs": {"torch": "2.13"}}
