"""The trial of a candidate, in the process that imports it: correct first, then compiled, timed, and in the model.

Each finding is an event, a JSON object that is written at once, so that a candidate that ends the process leaves what
was found before and which problem it was at. `lab.py` starts this process and reads the events.
"""

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...kernels.configs import targeting
from ...kernels.triton_language import AVAILABLE as TRITON_AVAILABLE
from ..core.ceilings import measured_ceilings
from ..core.processes import end_with_parent
from ..core.timing import clock_for, compare_outputs, measure_interleaved
from . import rivals
from .accuracy import Verdict, check
from .candidate import check_signature, load_candidate, swapped_in, within_guards
from .inputs import Arguments
from .problems import Problem, odd_problems, problems
from .specs import Spec, spec
from .worth import wholes, worth

CANDIDATE = "candidate"
CPU = torch.device("cpu")
Emit = Callable[..., None]


@dataclass(frozen=True)
class Request:
    """A trial's settings.

    candidate: FILE.py:FUNCTION or an entry point; operation, dtype, device, seed: of the problems; timed: names of the
    problems to time, none when empty; repeats, max_time (seconds): of each; targets: chips to compile Triton kernels
    for, such as sm_90; in_model: "" or the model to run with the candidate swapped in; worth: measure the whole prefill
    or decode step.
    """

    candidate: str
    operation: str
    dtype: str = "bfloat16"
    device: str = "cpu"
    seed: int = 0
    timed: list[str] = field(default_factory=list)
    repeats: int = 5
    max_time: float = 6.0
    targets: list[str] = field(default_factory=list)
    in_model: str = ""
    worth: bool = True


def run(request: Request, emit: Emit) -> None:
    """Test the candidate and pass all findings to `emit`. A fault ends the trial: wrong kernels are not timed."""
    device, entry = torch.device(request.device), spec(request.operation)
    odd = odd_problems(request.operation, request.dtype)
    emit("start", problem="import")
    try:
        function = load_candidate(request.candidate)
        check_signature(function, entry, odd[0].arguments(torch.device("meta")))
    except Exception as error:
        emit("verdict", **asdict(Verdict("import", fault="import", diagnosis=_raised(error))))
        return
    launched = _check_all(odd, function, entry, device, request.seed, emit)
    if launched is None:
        return
    interpreted = launched and device.type == "cpu"
    if launched and request.targets:
        _compile(request, function, emit)
    if request.timed and not interpreted:
        _time_all(request, function, device, emit)
    elif request.timed:
        emit("note", text="a Triton candidate on the CPU runs in the interpreter, so it is not timed")
    if request.in_model:
        _in_model(request, function, entry, interpreted, emit)


def _check_all(
    odd: list[Problem], function: Callable[..., Any], entry: Spec, device: torch.device, seed: int, emit: Emit
) -> bool | None:
    """Whether the candidate launches Triton kernels, or None if it has a fault."""
    launches = False
    for problem in odd:
        emit("start", problem=problem.name)
        with _launches(device) as counted:
            guards = within_guards(function, entry) if device.type == "cpu" else function
            verdict = _judge(problem, guards, device, seed)
        if counted and device.type == "cpu":  # the interpreter checks bounds itself, and knows tensors by their memory
            with _launches(device):
                verdict = _judge(problem, function, device, seed)
        launches |= bool(counted)
        emit("verdict", **asdict(verdict))
        if verdict.fault:
            return None
    return launches


def _judge(problem: Problem, function: Callable[..., Any], device: torch.device, seed: int) -> Verdict:
    try:
        with _interpreter(device), torch.inference_mode():
            return check(problem, function, device, seed)
    except Exception as error:
        kind = {"OutOfBoundsError": "out of bounds", "RaceError": "race"}.get(type(error).__name__, "raised")
        return Verdict(problem.name, fault=kind, diagnosis=str(error) if kind != "raised" else _raised(error))


def _raised(error: BaseException) -> str:
    """The error and the line of the candidate that raised it."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "afnext" not in Path(frame.filename).parts
    ]
    own = [frame for frame in frames if "site-packages" not in frame.filename and "<" not in frame.filename]
    where = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}{where}: {' '.join(str(error).split())[:400]}"


def _interpreter(device: torch.device) -> AbstractContextManager[Any]:
    if not TRITON_AVAILABLE or device.type != "cpu":
        return nullcontext()
    from .interpreter import interpreted

    return interpreted()


@contextmanager
def _launches(device: torch.device) -> Iterator[list[str]]:
    """Yields a list of the Triton kernels launched inside the block.

    On the CPU, where they are interpreted or compiled ahead of time, autotuned kernels take their first config: there
    is nothing to time them on.
    """
    names: list[str] = []
    if not TRITON_AVAILABLE:
        yield names
        return
    if device.type != "cpu":
        with _counted(names):
            yield names
        return
    from triton.runtime.autotuner import Autotuner

    from . import interpreter

    real_launch, real_tuned = interpreter._launch, Autotuner.run

    def launch(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.__name__)
        real_launch(kernel, *args, **options)

    interpreter._launch = launch  # type: ignore[assignment]
    Autotuner.run = _first_config
    try:
        yield names
    finally:
        interpreter._launch, Autotuner.run = real_launch, real_tuned


@contextmanager
def _counted(names: list[str]) -> Iterator[None]:
    """Add the names of compiled kernels that are launched inside the block."""
    from triton.runtime.jit import JITFunction

    real = JITFunction.run

    def run(kernel: Any, *args: Any, **options: Any) -> Any:
        names.append(kernel.__name__)
        return real(kernel, *args, **options)

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = real


def _first_config(tuner: Any, *args: Any, **options: Any) -> Any:
    return tuner.fn.run(*args, **options, **tuner.configs[0].all_kwargs())


def _compile(request: Request, function: Callable[..., Any], emit: Emit) -> None:
    """Compile what the candidate launches at the model's shapes for each target, and audit the machine code."""
    from ..codegen.compiled import compile_all, violations
    from ..codegen.trace import recorded_launches

    shown = [problem for problem in problems(dtype=request.dtype) if problem.operation == request.operation]
    wanted = [problem for problem in shown if not request.timed or problem.name in request.timed][:3]
    for problem in wanted:
        emit("start", problem=problem.name)
        arguments = problem.arguments(torch.device("meta"))
        for target in request.targets:
            with targeting(target.replace("_", "")), _launches(CPU), recorded_launches(problem.context) as recording:
                try:
                    with torch.inference_mode():
                        function(**arguments)
                except Exception as error:
                    emit(
                        "note",
                        text=f"{problem.name} is not compiled: its host code fails on meta tensors: {_raised(error)}",
                    )
                    break
            jobs = [(launch.specialization, target) for launch in recording.launches]
            for (digest, chip), resources in compile_all(jobs, workers=0).items():
                kernel = next(one.kernel for one, _ in jobs if one.digest == digest).__name__
                found = violations(resources, chip)
                emit(
                    "compiled",
                    problem=problem.name,
                    kernel=kernel,
                    target=chip,
                    violations=found,
                    **resources.as_dict(chip),
                )


def _time_all(request: Request, function: Callable[..., Any], device: torch.device, emit: Emit) -> None:
    ceilings = measured_ceilings(device)
    wanted = {problem.name: problem for problem in problems(dtype=request.dtype)}
    medians: dict[Problem, dict[str, float]] = {}
    for name in request.timed:
        problem = wanted[name]
        emit("start", problem=name)
        try:
            timed = _time(problem, function, device, request)
        except torch.OutOfMemoryError:
            emit("note", text=f"{name} does not fit into the memory of this device")
            continue
        if isinstance(timed, Verdict):
            emit("verdict", **asdict(timed))
            return
        flops, moved = problem.work.flops, problem.least_bytes
        for subject, seconds in timed["median"].items():
            emit(
                "time",
                problem=name,
                subject=subject,
                seconds=seconds,
                spread=timed["spread"][subject],
                tflops_per_s=flops / seconds / 1e12,
                gb_per_s=moved / seconds / 1e9,
                percent_of_ceiling=ceilings.percent(seconds, flops, moved, problem.work.dtype),
                limit=ceilings.least_seconds(flops, moved, problem.work.dtype)[1],
            )
        for left_out in timed["failed"]:
            emit("note", text=left_out)
        medians[problem] = timed["median"]
    if request.worth and medians:
        _worth(medians, function, device, request, emit)
    emit("note", text=f"not installed here: {', '.join(rivals.absent(wanted[request.timed[0]])) or 'nothing'}")


def _time(
    problem: Problem, function: Callable[..., Any], device: torch.device, request: Request
) -> dict[str, Any] | Verdict:
    """Medians and spreads of the candidate, ours, torch and installed rivals, in turn with cold caches; or the verdict
    where the candidate's result at the model's shape is not ours."""
    subjects = rivals.subjects(problem, device)
    arguments: Arguments = problem.arguments(device)
    subjects = {CANDIDATE: rivals.ours(problem, arguments, function), **subjects}
    outputs, failed = {}, []
    for name, subject in list(subjects.items()):
        try:
            with torch.inference_mode():
                outputs[name] = subject.output(subject.call())
        except torch.OutOfMemoryError:
            if name in (CANDIDATE, rivals.OURS):
                raise
            failed.append(f"{name} is left out of {problem.name}: there is not enough memory")
            del subjects[name]
        except Exception as error:
            if name == rivals.OURS:
                raise
            if name == CANDIDATE:
                return Verdict(problem.name, fault="raised", diagnosis=_raised(error))
            failed.append(f"{name} is left out of {problem.name}: {_raised(error)}")
            del subjects[name]
    expected = outputs[rivals.OURS]
    agreement = compare_outputs(expected, outputs[CANDIDATE], problem.tolerance)
    if not agreement.agrees:
        text = f"at the model's shape the result is not that of afnext: {agreement.reason}"
        return Verdict(problem.name, agreement.error, problem.tolerance, "inaccurate", text)
    for name in [name for name in subjects if name not in (CANDIDATE, rivals.OURS)]:
        agreement = compare_outputs(expected, outputs[name], problem.tolerance)
        if not agreement.agrees:
            failed.append(f"{name} computes something else at {problem.name}: {agreement.reason}")
    del outputs
    with torch.inference_mode():
        samples = measure_interleaved(
            {name: subject.call for name, subject in subjects.items()},
            repeats=request.repeats,
            max_time=request.max_time,
            clock=clock_for(device),
            cold_cache=True,
        )
    medians = {name: taken.median for name, taken in samples.items()}
    return {"median": medians, "spread": {name: taken.spread for name, taken in samples.items()}, "failed": failed}


def _worth(
    medians: dict[Problem, dict[str, float]],
    function: Callable[..., Any],
    device: torch.device,
    request: Request,
    emit: Emit,
) -> None:
    """What the candidate saves of the wholes that make the calls that were timed.

    All of a whole's operations are measured as ours, and the candidate at all shapes that its operation has there.
    """
    seconds: dict[tuple[str, Problem], float | None] = {
        (subject, problem): times[subject] for problem, times in medians.items() for subject in (CANDIDATE, rivals.OURS)
    }

    def measured(subject: str, problem: Problem) -> float | None:
        if (subject, problem) not in seconds:
            call = rivals.ours(problem, problem.arguments(device), function if subject == CANDIDATE else None)
            try:
                seconds[subject, problem] = _seconds(call, device)
            except Exception as error:
                if subject == rivals.OURS:
                    raise
                emit("note", text=f"the candidate is not timed at {problem.name}: {_raised(error)}")
                seconds[subject, problem] = None
        return seconds[subject, problem]

    def ours(problem: Problem) -> float:
        taken = measured(rivals.OURS, problem)
        assert taken is not None
        return taken

    for whole in wholes(medians, request.dtype):
        emit("start", problem=f"the operations of {whole.name}")
        emit("worth", **asdict(worth(whole, request.operation, ours, partial(measured, CANDIDATE))))


def _seconds(subject: rivals.Subject, device: torch.device) -> float:
    with torch.inference_mode():
        taken = measure_interleaved(
            {"": subject.call}, repeats=2, max_time=2.0, clock=clock_for(device), cold_cache=True
        )
    return taken[""].median


def _in_model(request: Request, function: Callable[..., Any], entry: Spec, interpreted: bool, emit: Emit) -> None:
    """Answer a question about a recording greedily, by ours and with the candidate; compare the tokens."""
    from ...runtime.app.api import Model, load
    from ...runtime.app.generation_config import GenerationDefaults

    emit("start", problem=f"the model {request.in_model}")
    recording = Path(__file__).parents[1] / "data" / "scene.flac"
    loaded = load(request.in_model, device=request.device, encoder_cache_bytes=0, prefix_cache_bytes=0)
    # A recorded decode step would go on with the operation that it recorded.
    options = replace(loaded.options, cuda_graphs=False)
    model = Model(loaded.network, loaded.tokenizer, loaded.template, options, GenerationDefaults(), loaded.prompts)
    question, tokens = "Describe the audio with timestamps.", 8 if interpreted else 64
    expected = model.ask(recording, question, temperature=0.0, max_new_tokens=tokens).token_ids
    with _interpreter(torch.device(request.device)), swapped_in(function, entry) as calls:
        actual = model.ask(recording, question, temperature=0.0, max_new_tokens=tokens).token_ids
    same = sum(a == b for a, b in zip(expected, actual, strict=False))
    first = next((i for i, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b), None)
    emit("model", model=request.in_model, calls=len(calls), tokens=len(expected), same=same, first_difference=first)


def main() -> None:
    """Read a request from the file named first, write events to the one named second, for the process named third."""
    end_with_parent(int(sys.argv[3]))
    request = Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with Path(sys.argv[2]).open("a", encoding="utf-8") as events:

        def emit(event: str, **values: Any) -> None:
            events.write(json.dumps({"event": event, **values}, default=str) + "\n")
            events.flush()

        run(request, emit)
        emit("done")


if __name__ == "__main__":
    main()
