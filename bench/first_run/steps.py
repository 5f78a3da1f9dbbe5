"""The steps of a first run, the most important first. Each step is a list of items, and each item gives a record.

`run.py` starts this module once for a step, in a process of its own, as a kernel that reads or writes where it must not
leaves a GPU unusable for its process. A step goes on with the items that have no record yet.

    environment   machine, driver, clocks, versions, memory
    kernels       each operation on its odd variants in bfloat16, by the accuracy rule
    graphs        recorded decode steps (CUDA graphs) answer as eager ones do
    answers       the bundled model answers on the device as on the CPU
    end to end    every stage at full width with two layers of each kind, beside transformers if it is installed
    timings       each operation at the model's shapes, beside torch and installed libraries
    schemes       end to end with packed weights
    dtypes        the kernels again in float16 and float32
"""

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...kernels.device_state import free_memory
from ...quant.scheme import SchemeError
from ..core.machine import machine
from ..core.processes import end_with_parent
from ..core.record import Record, append, finished

BENCH, RECORDS, CURRENT = "first-run", "first-run.jsonl", "current.json"
PASS, FAIL, SKIP, CRASH = "pass", "FAIL", "skipped", "CRASHED"

# The operations by what they decide of the model's time.
ORDER = (
    *("decode_attention", "attention", "kv_write", "linear_int4", "linear_int4_swiglu", "linear_int8"),
    *("linear_int8_swiglu", "linear", "linear_swiglu", "rms_norm", "add_rms_norm", "swiglu", "greedy", "sample"),
    *("penalize", "log_mel", "conv_stem", "layer_norm", "add_layer_norm", "gelu", "pool_norm_rotate", "rotary"),
    *("linear_w8a8", "linear_w8a8_swiglu", "linear_w4a8", "linear_w4a8_swiglu", "quantize_rows", "linear_nf4"),
    *("linear_nf4_swiglu", "linear_int8_groups", "linear_int8_groups_swiglu", "linear_fp8", "linear_fp8_swiglu"),
    *("linear_int3", "linear_int3_swiglu", "linear_nvfp4", "linear_nvfp4_swiglu", "linear_norm"),
)


@dataclass(frozen=True)
class Place:
    """The folder and device of a run. folder: of its results."""

    folder: Path
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU; a CPU rehearses with small sizes."""
        return self.device.type == "cuda"

    def record(self, step: str, item: str, state: str, text: str, **values: Any) -> Record:
        """The record of an item."""
        found = {"state": state, "text": text, **values}
        return Record(BENCH, step, item, {"device": self.device.type}, found, machine=machine(self.device))


Values = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """name; items: in order; run: does one, and returns values with a `text`; it raises where the item fails. limit:
    seconds that an item may take before it counts as hanging; module: what runs it, as `main` here does."""

    name: str
    items: Sequence[str]
    run: Callable[[Place, str], Values]
    limit: float = 180.0
    module: str = "afnext.bench.first_run.steps"


class FaultError(Exception):
    """An item was computed with a wrong result."""


class MissingError(Exception):
    """An item cannot be done on this machine."""


def _environment(place: Place, item: str) -> Values:
    here = machine(place.device)
    gpu = here["gpu"] or {}
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items() if version)
    name = gpu.get("name") or here["cpu"]
    text = f"{name}, {free_memory(place.device):,} bytes free; {versions}"
    if gpu:
        text += f"; capability {gpu['capability']}, CUDA {gpu['cuda']}, driver {gpu.get('driver')}"
    return {"text": text}


def _kernels(place: Place, item: str, dtype: str = "bfloat16") -> Values:
    from ..ops.accuracy import check
    from ..ops.problems import odd_problems
    from ..ops.specs import spec

    entry = spec(item)
    dtype = dtype if dtype in entry.dtypes else entry.dtypes[0]
    found = [check(problem, entry.function, place.device) for problem in odd_problems(item, dtype)]
    for verdict in found:
        if verdict.fault:
            raise FaultError(f"{verdict.problem}: {verdict.fault}: {verdict.diagnosis}")
    error = max(verdict.error for verdict in found)
    return {"text": f"{len(found)} odd problems in {dtype}, relative RMS error up to {error:.2g}", "error": error}


def _in_other_dtypes(place: Place, item: str) -> Values:
    operation, _, dtype = item.partition(" ")
    return _kernels(place, operation, dtype)


def _tiny(place: Place, device: torch.device, dtype: str) -> Any:
    from ...runtime.app.api import load

    return load(device=device, dtype=dtype, prefix_cache_bytes=0, encoder_cache_bytes=0)


RECORDING = Path(__file__).parents[1] / "data" / "scene.flac"
QUESTION = "Describe the audio with timestamps."


def _graphs(place: Place, item: str) -> Values:
    """Several answers at once, with recorded steps and without, greedily."""
    from ...runtime.app.api import Model
    from ...runtime.app.generation_config import GenerationDefaults

    loaded = _tiny(place, place.device, "float32")
    content = [{"type": "audio", "audio": str(RECORDING)}, {"type": "text", "text": QUESTION}]
    conversations = [[{"role": "user", "content": content}]] * int(item.partition(" ")[0])
    answers = []
    for recorded in (True, False):
        options = replace(loaded.options, cuda_graphs=recorded)
        defaults = GenerationDefaults()
        model = Model(loaded.network, loaded.tokenizer, loaded.template, options, defaults, loaded.prompts)
        answered = model.chat(conversations, temperature=0.0, max_new_tokens=48)
        answers.append([answer.token_ids for answer in answered])
    if answers[0] != answers[1]:
        raise FaultError(f"recorded steps answer {answers[0]}, eager ones {answers[1]}")
    return {"text": f"the same {sum(map(len, answers[0]))} tokens recorded and eager"}


def _answers(place: Place, item: str) -> Values:
    expected = _tiny(place, torch.device("cpu"), "float32").ask(RECORDING, QUESTION, temperature=0.0)
    actual = _tiny(place, place.device, item).ask(RECORDING, QUESTION, temperature=0.0)
    if actual.token_ids != expected.token_ids:
        raise FaultError(f"{actual.text!r} instead of the CPU's {expected.text!r}")
    return {"text": f"{actual.text!r}, as on the CPU in float32"}


def _end_to_end(place: Place, item: str) -> Values:
    """item: a scheme."""
    from ..model.e2e import run_e2e

    reference = item == "bf16" and importlib.util.find_spec("transformers") is not None
    try:
        records = run_e2e(
            out=place.folder / "e2e.jsonl",
            random="full-width:2,2" if place.on_gpu else "tiny",
            baseline="transformers" if reference else "none",
            audio_seconds=(30.0,) if place.on_gpu else (5.0,),
            schemes=(item,),
            new_tokens=16 if place.on_gpu else 2,
            repeats=5 if place.on_gpu else 1,
            device=str(place.device),
            quiet=True,
        )
    except SchemeError as misfit:  # of the small shape that a CPU rehearses with
        raise MissingError(str(misfit)) from None
    wrong = [record for record in records if record.values.get("agrees") is False]
    if wrong:
        raise FaultError("; ".join(f"{record.name}: {record.values['reason']}" for record in wrong))
    ours = [record for record in records if record.subject.startswith("afnext") and "median_s" in record.values]
    times = ", ".join(f"{record.name} {1000 * record.values['median_s']:.3g} ms" for record in ours)
    return {"text": times or "measured in an earlier run"}


def _timings(place: Place, item: str) -> Values:
    from ..ops.kernels import run_kernels

    records = run_kernels(
        place.folder / "kernels.jsonl",
        device=str(place.device),
        operations=(item,),
        quick=not place.on_gpu,
        repeats=5 if place.on_gpu else 2,
        max_time=2.0,
        min_time=0.05,
        progress=False,
    )
    ours = [record for record in records if record.subject.startswith("afnext")]
    faster = [record.values["speedup"] for record in ours if record.values.get("speedup")]
    middle = f", {sorted(faster)[len(faster) // 2]:.2f}x torch in the median" if faster else ""
    best = max((record.values["percent_of_ceiling"] for record in ours), default=0.0)
    shapes = "" if place.on_gpu else " at small shapes, which say nothing about the model"
    return {"text": f"{len(ours)} problems{shapes}{middle}, up to {best:.0f} % of the roofline"}


STEPS = (
    Step("environment", ("machine",), _environment),
    Step("kernels", ORDER, _kernels),
    Step("graphs", ("1 sequence", "3 sequences"), _graphs),
    Step("answers", ("float32", "bfloat16"), _answers),
    Step("end to end", ("bf16",), _end_to_end, limit=240.0),
    Step("timings", ORDER, _timings, limit=240.0),
    Step("schemes", ("int4", "int8", "int8-w8a8", "fp8", "int4-w4a8", "nf4"), _end_to_end, limit=240.0),
    Step("dtypes", tuple(f"{name} {dtype}" for dtype in ("float16", "float32") for name in ORDER), _in_other_dtypes),
)


def run_step(step: Step, place: Place) -> None:
    """Run the items of a step that have no record. The error of an item becomes its record."""
    path, current = place.folder / RECORDS, place.folder / CURRENT
    done = finished(path)
    for item in step.items:
        if place.record(step.name, item, "", "").key in done:
            continue
        current.write_text(json.dumps({"step": step.name, "item": item, "since": time.time()}), encoding="utf-8")
        start = time.monotonic()
        try:
            values = dict(step.run(place, item))
            state, text = PASS, str(values.pop("text"))
        except (MissingError, ImportError) as missing:
            state, text, values = SKIP, str(missing), {}
        except FaultError as fault:
            state, text, values = FAIL, str(fault), {}
        except Exception as error:
            state, text, values = FAIL, f"{type(error).__name__}: {' '.join(str(error).split())[:600]}", {}
        seconds = time.monotonic() - start
        append(path, place.record(step.name, item, state, text, seconds=seconds, **values))
        if state == FAIL and place.on_gpu:
            # After an illegal access every later call of this process fails, too.
            try:
                torch.cuda.synchronize(place.device)
            except RuntimeError:
                sys.exit(3)
    current.unlink(missing_ok=True)


def main(steps: Sequence[Step] = STEPS) -> None:
    """Run the step named first, in the folder named second, on the device named third, for the process named fourth."""
    end_with_parent(int(sys.argv[4]))
    step = next(one for one in steps if one.name == sys.argv[1])
    run_step(step, Place(Path(sys.argv[2]), torch.device(sys.argv[3])))


if __name__ == "__main__":
    main()
