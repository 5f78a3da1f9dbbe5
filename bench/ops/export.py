"""Exports the problems to other harnesses: FlashInfer-Bench's trace set, and a folder of KernelBench's files.

    flashinfer-bench   definitions/OP/NAME.json, workloads/OP/NAME.jsonl with indices in blob/, and
                       traces/afnext/OP/NAME.jsonl of trials
    kernelbench        OP/NAME.py with `Model`, `get_inputs` and `get_init_inputs`, one for each problem

References are source code from `exported.py`, so neither format needs this package. A definition covers all problems
that differ only in variable axes. Packed codes are int8, because FlashInfer-Bench's schema has no uint8: references
view the bits.
"""

import ast
import inspect
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...kernels.conv_stem import conv_length
from ...kernels.packed_weight import Packed
from ...kernels.rote import pooled_length
from . import exported
from .problems import Problem, problems
from .rivals import BASELINE, OURS
from .specs import FLOATS
from .trial import CANDIDATE

FORMATS = ("flashinfer-bench", "kernelbench")
META = torch.device("meta")
_NAMESPACE = uuid.UUID("7a1f0e0c-5f0e-4a53-9a3f-6d2f3b0c7c11")
_HEADER = "import torch\nfrom torch import Tensor, nn\nfrom torch.nn import functional as F\n"
_FREE = ("rows", "batch", "tokens", "before", "queries", "keys", "windows")  # names of variable axes
_Sizes = tuple[int, ...]


def write(found: Sequence[Problem], folder: Path, form: str) -> list[Path]:
    """Write the problems into `folder` in one of `FORMATS`; return the files."""
    return _write_kernelbench(found, folder) if form == "kernelbench" else _write_flashinfer(found, folder)


def read(folder: Path, form: str) -> list[Problem]:
    """The problems that a folder written by `write` holds, in any order."""
    by_name = {one.name: one for dtype in FLOATS for one in problems(dtype=dtype)}
    if form == "kernelbench":
        texts = (path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
        return [by_name[str(re.search(r'^PROBLEM = "(.*)"$', text, re.MULTILINE)[1])] for text in texts]  # type: ignore[index]
    by_id = {_uuid(one): one for one in by_name.values()}
    lines = (line for path in (folder / "workloads").rglob("*.jsonl") for line in path.read_text().splitlines())
    return [by_id[json.loads(line)["workload"]["uuid"]] for line in lines]


def function_of(problem: Problem) -> str:
    """The function of `exported.py` that solves the problem."""
    suffix = "_int8" if problem.shape.get("kv8") else ""
    if problem.operation == "kv_write":
        return f"kv_write{suffix}"
    if "attention" in problem.operation:
        return f"paged_attention{suffix}" if "keys" in problem.shape else "encoder_attention"
    return "linear_int8_swiglu" if problem.operation == "linear_int8_groups_swiglu" else problem.operation


def flat(arguments: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and constants by the names that the functions of `exported.py` take them by."""
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            tensors[name] = value.view(torch.int8) if value.dtype == torch.uint8 else value
        elif isinstance(value, Packed):
            tensors |= flat(value.named(name))[0]
        elif is_dataclass(value):
            parts, numbers = flat(vars(value))
            tensors |= {f"{name}_{key}": part for key, part in parts.items() if key != "cos_sin"}
            constants |= {f"{name}_{key}": number for key, number in numbers.items()}
        elif name not in ("causal", "dtype", "cos_sin"):
            constants[name] = value
    return tensors, constants


def source_of(function: str) -> str:
    """The source of a function of `exported.py` after those that it calls."""
    names, ordered = [function], list[str]()
    while names:
        name = names.pop()
        if name in ordered:
            ordered.remove(name)
        ordered.append(name)
        tree = ast.parse(inspect.getsource(getattr(exported, name)))
        called = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names += [one for one in sorted(called) if one != name and inspect.isfunction(getattr(exported, one, None))]
    return "\n\n".join(inspect.getsource(getattr(exported, name)) for name in reversed(ordered))


def _write_kernelbench(found: Sequence[Problem], folder: Path) -> list[Path]:
    paths = []
    for problem in found:
        tensors, constants = flat(problem.arguments(META))
        function, names = function_of(problem), ", ".join(tensors)
        passed = ", ".join([*(f"{name}={name}" for name in tensors), *(f"{k}={v!r}" for k, v in constants.items())])
        inputs = "\n".join(f"        {_expression(name, x, problem)}," for name, x in tensors.items())
        text = (
            f'"""{problem.operation}, {problem.label}, {problem.dtype}: {problem.work.flops:.6g} FLOPs, '
            f'{problem.least_bytes:.6g} bytes at least."""\n\n{_HEADER}\nPROBLEM = "{problem.name}"\n\n\n'
            f"{source_of(function)}\n\nclass Model(nn.Module):\n    def forward(self, {names}):\n"
            f"        return {function}({passed})\n\n\ndef get_inputs():\n    torch.manual_seed(0)\n"
            f"    return [\n{inputs}\n    ]\n\n\ndef get_init_inputs():\n    return []\n"
        )
        path = folder / problem.operation / f"{_file_name(problem)}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


def _file_name(problem: Problem) -> str:
    return problem.name.partition("/")[2].replace("-", "_")


def _fixed(x: Tensor, problem: Problem) -> dict[str, str]:
    """Python for the inputs that cannot be random, such as indices. x: the input asked for, whose shape it has."""
    s, shape, dtype = problem.shape, list(x.shape), str(x.dtype)
    page_size = s.get("page_size", 1)
    width = shape[-1] if shape else 1
    return {
        "key_lengths": f"torch.full({shape}, {s.get('keys', s.get('queries'))})",
        "page_table": f"torch.arange({x.numel()}, dtype={dtype}).view({shape})",
        "slots": f"torch.arange({s.get('batch', 1)})[:, None] * {_pages(s) * page_size} + {s.get('before', 0)} "
        f"+ torch.arange({s.get('tokens', 1)})",
        "windows": f"torch.arange({s.get('batch', 1)}) % {s.get('windows', 1)}",
        "seen": f"(torch.arange({s.get('vocab', 1)}) % {max(1, s.get('vocab', 1) // 1000)} == 0).expand({shape})"
        ".contiguous()",
        "rotation_positions": f"({s.get('before', 0)} + torch.arange({width})).float().expand({shape}).contiguous()",
        "rotation_frequencies": f"15300000.0 ** (-torch.arange({x.numel()}).float() / {x.numel()})",
        "rows_top_k": f"torch.full({shape}, {s.get('top_k', 0)})",
        **{f"rows_{key}": f"torch.full({shape}, {value})" for key, value in _SAMPLING.items()},
        "penalty": f"torch.full({shape}, 1.2)",
        "uniform": f"torch.rand({shape})",
    }


def _expression(name: str, x: Tensor, problem: Problem) -> str:
    """Python that makes an input alike: shape, dtype, and what indices must be."""
    s, shape, dtype = problem.shape, list(x.shape), str(x.dtype)
    fixed = _fixed(x, problem)
    if name in fixed:
        return fixed[name]
    if name in ("k_cache", "v_cache") or (name.endswith("_scales") and "before" in s):
        return f"torch.zeros({shape}, dtype={dtype})"
    if x.dtype == torch.int8:
        return f"torch.randint(-128, 128, {shape}, dtype=torch.int8)"
    if x.dtype == torch.float8_e4m3fn:
        return f"torch.randn({shape}).mul(150).clamp(-448, 448).to({dtype})"
    scale = s.get("in_features", 1) ** -0.5
    if "scales" in name:
        return f"torch.rand({shape}).mul({scale / 8:.6g}).to({dtype})"
    factor = scale if name in ("weight", "gate", "up") and "in_features" in s else 1.0
    return f"torch.randn({shape}).mul({factor:.6g}).to({dtype})"


_SAMPLING = {"temperature": 0.8, "top_p": 0.95, "min_p": 0.0}


def _pages(s: Mapping[str, int]) -> int:
    tokens = s["before"] + s["tokens"] if "before" in s else s.get("keys", 0)
    return -(-tokens // s.get("page_size", 1))


def _write_flashinfer(found: Sequence[Problem], folder: Path) -> list[Path]:
    paths = []
    for group in _groups(found):
        name, kind = definition_name(group[0]), group[0].operation
        definition, axes = _definition(group, name)
        path = folder / "definitions" / kind / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(definition, indent=1) + "\n", encoding="utf-8")
        given = [_saved(problem, folder, name) for problem in group]
        lines = [
            {"definition": name, "workload": {**workload, "inputs": inputs}, "solution": None, "evaluation": None}
            for workload, inputs in zip(_workloads(group, axes), given, strict=True)
        ]
        workloads = folder / "workloads" / kind / f"{name}.jsonl"
        workloads.parent.mkdir(parents=True, exist_ok=True)
        workloads.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        paths += [path, workloads]
    return paths


def _saved(problem: Problem, folder: Path, name: str) -> dict[str, dict[str, str]]:
    """The inputs of a workload: random ones, and those that cannot be, in a safetensors file."""
    tensors, _ = flat(problem.arguments(META))
    fixed = {
        key: eval(expression, {"torch": torch}).contiguous()  # of this module, with nothing from outside but sizes
        for key, x in tensors.items()
        if (expression := _fixed(x, problem).get(key))
    }
    inputs = {key: {"type": "random"} for key in tensors}
    if fixed:
        path = Path("blob", "workloads", problem.operation, name, f"{_uuid(problem)}.safetensors")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        save_file(fixed, folder / path)
        inputs |= {key: {"type": "safetensors", "path": path.as_posix(), "tensor_key": key} for key in fixed}
    return inputs


def definition_name(problem: Problem) -> str:
    """The name of the definition that a problem belongs to: what does not vary."""
    fixed = "_".join(f"{key}{value}" for key, value in problem.shape.items() if key not in _FREE)
    return "_".join(filter(None, [problem.operation, fixed, problem.dtype]))


def _groups(found: Sequence[Problem]) -> Iterator[list[Problem]]:
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in found:
        groups.setdefault((problem.operation, definition_name(problem)), []).append(problem)
    yield from groups.values()


def _definition(group: list[Problem], name: str) -> tuple[dict[str, Any], dict[str, _Sizes]]:
    """The definition of problems alike, and the axes with their size in each problem."""
    inputs = [flat(problem.arguments(META)) for problem in group]
    outputs = [_outputs(problem, tensors) for problem, (tensors, _) in zip(group, inputs, strict=True)]
    keys = {key: tuple(problem.shape[key] for problem in group) for key in group[0].shape}
    axes: dict[str, _Sizes] = {}

    def described(tensors: list[dict[str, tuple[_Sizes, str]]]) -> dict[str, dict[str, Any]]:
        found = {}
        for tensor, (shape, dtype) in tensors[0].items():
            sizes = [tuple(one[tensor][0][i] for one in tensors) for i in range(len(shape))]
            found[tensor] = {
                "shape": [_axis(axes, keys, size, f"{tensor}_dim{i}") for i, size in enumerate(sizes)],
                "dtype": dtype,
            }
        return found

    given = [{key: (tuple(x.shape), _dtype(x)) for key, x in tensors.items()} for tensors, _ in inputs]
    constants = "".join(f", {key}={value!r}" for key, value in inputs[0][1].items())
    names = ", ".join(inputs[0][0])
    passed = ", ".join(f"{key}={key}" for key in inputs[0][0])
    definition = {
        "name": name,
        "op_type": group[0].operation,
        "inputs": described(given),
        "outputs": described(outputs),
        "axes": {},
        "reference": f"{_HEADER}\n\n{source_of(function_of(group[0]))}\n\ndef run({names}):\n"
        f"    return {function_of(group[0])}({passed}{constants})\n",
        "tags": ["afnext", "model:audio-flamingo-next"],
        "description": inspect.getdoc(getattr(exported, function_of(group[0]))),
    }
    definition["axes"] = {
        axis: {"type": "const", "value": sizes[0]} if len(set(sizes)) == 1 else {"type": "var"}
        for axis, sizes in axes.items()
    }
    return definition, axes


def _axis(axes: dict[str, _Sizes], keys: dict[str, _Sizes], sizes: _Sizes, otherwise: str) -> str:
    """The name of the axis with these sizes: of the shape's key that has them, or of the first tensor with them."""
    known = next((name for name, taken in (*axes.items(), *keys.items()) if taken == sizes), otherwise)
    axes.setdefault(known, sizes)
    return known


def _workloads(group: list[Problem], axes: dict[str, _Sizes]) -> Iterator[dict[str, Any]]:
    variable = {axis: sizes for axis, sizes in axes.items() if len(set(sizes)) > 1}
    for i, problem in enumerate(group):
        tensors, _ = flat(problem.arguments(META))
        yield {
            "axes": {axis: sizes[i] for axis, sizes in variable.items()},
            "inputs": {name: {"type": "random"} for name in tensors},
            "uuid": _uuid(problem),
        }


def _outputs(problem: Problem, tensors: dict[str, Tensor]) -> dict[str, tuple[_Sizes, str]]:
    """Shapes and dtypes of the results."""
    s, first = problem.shape, next(iter(tensors.values()))
    alike = (tuple(first.shape), _dtype(first))
    if problem.operation == "log_mel":
        return {"mel": ((s["batch"], s["mel_bins"], s["samples"] // 160), "float32")}
    if problem.operation == "conv_stem":
        return {"out": ((s["batch"], conv_length(s["frames"]), s["hidden"]), problem.dtype)}
    if problem.operation == "pool_norm_rotate":
        return {"out": ((s["batch"], pooled_length(s["positions"]), s["channels"]), problem.dtype)}
    if problem.operation.startswith("add_"):
        return {"out": alike, "hidden": alike}
    if problem.operation == "kv_write":
        written = [key for key in ("k_cache", "v_cache", "k_scales", "v_scales") if key in tensors]
        return {"q_out": alike, **{f"{key}_out": (tuple(tensors[key].shape), _dtype(tensors[key])) for key in written}}
    if problem.operation == "quantize_rows":
        return {"codes": (alike[0], "int8"), "scales": (alike[0][:1], "float32")}
    if problem.operation in ("greedy", "sample"):
        return {"tokens": ((s["batch"],), "int64")}
    if "out_features" in s:
        return {"out": ((s["rows"], s["out_features"]), problem.dtype)}
    return {"out": alike}


def traces(events: Sequence[Mapping[str, Any]], candidate: str, machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a trial of `lab.py` found, as traces of FlashInfer-Bench: the problems timed, or the fault.

    reference_latency_ms is torch's.
    """
    by_name = {one.name: one for dtype in FLOATS for one in problems(dtype=dtype)}
    worst = max((event["error"] for event in events if event["event"] == "verdict"), default=0.0)
    found = []
    for name in dict.fromkeys(event["problem"] for event in events if event["event"] == "time"):
        seconds = {e["subject"]: e["seconds"] for e in events if e["event"] == "time" and e["problem"] == name}
        reference = seconds.get(BASELINE, seconds[OURS])
        group = [by_name[name]]
        _, axes = _definition(group, definition_name(group[0]))
        found.append(
            {
                "definition": definition_name(group[0]),
                "workload": next(_workloads(group, axes)),
                "solution": candidate,
                "evaluation": {
                    "status": "PASSED",
                    "environment": {
                        "hardware": str((machine.get("gpu") or {}).get("name") or machine.get("cpu") or "unknown"),
                        "libs": {key: str(value) for key, value in machine.get("versions", {}).items()},
                    },
                    "timestamp": str(machine.get("timestamp")),
                    "log": "",
                    "correctness": {"max_relative_error": worst, "max_absolute_error": 0.0},
                    "performance": {
                        "latency_ms": 1000 * seconds[CANDIDATE],
                        "reference_latency_ms": 1000 * reference,
                        "speedup_factor": reference / seconds[CANDIDATE],
                    },
                },
            }
        )
    return found


def write_traces(found: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Append traces to the files of their definitions in a trace set; return the files."""
    names = {definition_name(problem): problem.operation for dtype in FLOATS for problem in problems(dtype=dtype)}
    paths = []
    for trace in found:
        name = trace["definition"]
        path = folder / "traces" / "afnext" / names[name] / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(trace) + "\n")
        paths.append(path)
    return list(dict.fromkeys(paths))


def _uuid(problem: Problem) -> str:
    return str(uuid.uuid5(_NAMESPACE, problem.name))


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
