"""The first run: ordered, resumable, and no item takes the others with it, whatever it does."""

import json
import os
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from afnext.bench.core.record import read
from afnext.bench.first_run import steps as module
from afnext.bench.first_run.run import ARCHIVE, SUMMARY, first_run
from afnext.bench.first_run.steps import CRASH, FAIL, ORDER, PASS, RECORDS, SKIP, STEPS, Place, Step, run_step
from afnext.bench.ops import accuracy
from afnext.bench.ops.specs import specs
from afnext.quant.scheme import SchemeError

CPU = torch.device("cpu")
FAKE = """
import os, time
from afnext.bench.first_run.steps import FaultError, MissingError, Step, main

def run(place, item):
    if item == "missing":
        raise MissingError("no such library")
    if item == "fault":
        raise FaultError("off by one")
    if item == "raises":
        raise ValueError("of a library")
    if item == "exits":
        print("last words", flush=True)
        os._exit(9)
    if item == "hangs":
        time.sleep(600)
    return {"text": f"{item} is well"}

STEPS = (
    Step("first", ("good",), run, module="fake_steps"),
    Step("second", ("missing", "fault", "exits", "hangs", "raises", "good"), run, limit=1.0, module="fake_steps"),
    Step("third", ("good",), run, module="fake_steps"),
)
if __name__ == "__main__":
    main(STEPS)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Step, ...]:
    """Two steps whose items do what their names say, in a module that child processes can run."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "fake_steps.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    scope: dict[str, Any] = {"__name__": "fake_steps"}
    exec(compile(FAKE, "fake_steps.py", "exec"), scope)
    found: tuple[Step, ...] = scope["STEPS"]
    return found


def states(out: Path) -> dict[tuple[str, str], str]:
    return {(record.name, record.subject): record.values["state"] for record in read(out / RECORDS)}


def test_every_item_gets_its_verdict_and_the_archive_holds_all(fake: tuple[Step, ...], tmp_path: Path) -> None:
    out, lines = tmp_path / "out", list[str]()
    assert first_run(out, device="cpu", minutes=2, steps=fake[:2], say=lines.append) == 1
    second = {"missing": SKIP, "fault": FAIL, "exits": CRASH, "hangs": CRASH, "raises": FAIL, "good": PASS}
    assert states(out) == {("first", "good"): PASS, **{("second", item): state for item, state in second.items()}}
    texts = {record.subject: record.values["text"] for record in read(out / RECORDS)}
    assert "exit code 9: last words" in texts["exits"]
    assert "did not end within 1 s" in texts["hangs"]
    assert texts["raises"] == "ValueError: of a library"
    with zipfile.ZipFile(out / ARCHIVE) as archive:
        assert {RECORDS, SUMMARY, "output.txt"} <= set(archive.namelist())
        assert "| second | exits | CRASHED |" in archive.read(SUMMARY).decode()
    assert sum("is well" in line for line in lines) == 2
    before = (out / RECORDS).read_bytes()
    assert first_run(out, device="cpu", minutes=2, steps=fake[:2], say=lambda line: None) == 1
    assert (out / RECORDS).read_bytes() == before, "nothing is done twice"


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(fake: tuple[Step, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupt(line: str) -> None:
        if "first, good" in line:
            raise KeyboardInterrupt

    assert first_run(out, device="cpu", minutes=5, steps=fake, say=interrupt) == 130
    assert states(out) == {("first", "good"): PASS}
    assert zipfile.is_zipfile(out / ARCHIVE)
    with (out / RECORDS).open("ab") as records:
        records.write(b'{"bench": "first-run", "na')  # what a kill in the middle of a write leaves
    assert first_run(out, device="cpu", minutes=5, steps=(fake[0], fake[2]), say=lambda line: None) == 0
    assert states(out) == {("first", "good"): PASS, ("third", "good"): PASS}


def test_the_end_of_the_time_ends_a_step_that_is_under_way(fake: tuple[Step, ...], tmp_path: Path) -> None:
    times = iter([0.0, 0.0, *[1000.0] * 100])
    lines: list[str] = []
    assert first_run(tmp_path, device="cpu", minutes=1, steps=fake, say=lines.append, now=lambda: next(times)) == 0
    assert any("The time is over during 'first'" in line for line in lines)
    assert zipfile.is_zipfile(tmp_path / ARCHIVE)


def test_the_steps_are_in_the_order_that_is_promised() -> None:
    names = ["environment", "kernels", "graphs", "answers", "end to end", "timings", "schemes", "dtypes"]
    assert [step.name for step in STEPS] == names
    assert sorted(ORDER) == sorted(specs())
    page = (Path(__file__).parents[2] / "docs" / "first-run.md").read_text()
    at = [page.index(f"| {name} |") for name in names]
    assert at == sorted(at)


def test_the_kernels_are_judged_by_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gate

    monkeypatch.setattr("afnext.bench.ops.accuracy._computed", partial(computed, wrong, accuracy._computed))
    run_step(Step("kernels", ("gelu", "swiglu"), module._kernels), Place(tmp_path, CPU))
    assert states(tmp_path) == {("kernels", "gelu"): PASS, ("kernels", "swiglu"): FAIL}


def computed(wrong: Any, real: Any, problem: Any, function: Any, *rest: Any) -> Any:
    return real(problem, wrong if problem.operation == "swiglu" else function, *rest)


def test_recorded_steps_and_answers_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, CPU)
    assert "recorded and eager" in module._graphs(place, "1 sequence")["text"]

    class Model:
        def __init__(self, tokens: list[int]):
            self.token_ids, self.text = tokens, str(tokens)

        def ask(self, *args: Any, **options: Any) -> "Model":
            return self

    tiny = {"float32": Model([1, 2]), "bfloat16": Model([1, 3])}
    monkeypatch.setattr(module, "_tiny", lambda place, device, dtype: tiny[dtype])
    run_step(Step("answers", ("float32", "bfloat16"), module._answers), place)
    assert states(tmp_path) == {("answers", "float32"): PASS, ("answers", "bfloat16"): FAIL}


def test_a_scheme_that_does_not_fit_the_shape_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def misfit(**options: Any) -> None:
        raise SchemeError("96 inputs are not divisible by groups of 64")

    monkeypatch.setattr("afnext.bench.model.e2e.run_e2e", misfit)
    run_step(Step("schemes", ("int4",), module._end_to_end), Place(tmp_path, CPU))
    assert states(tmp_path) == {("schemes", "int4"): SKIP}


def test_a_gpu_that_a_fault_left_unusable_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def fault(place: Place, item: str) -> dict[str, Any]:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(module, "machine", lambda device: {})
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(SystemExit):
        run_step(Step("kernels", ("gelu", "swiglu"), fault), Place(tmp_path, torch.device("cuda")))
    assert states(tmp_path) == {("kernels", "gelu"): FAIL}


def test_the_environment_of_a_gpu_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "NVIDIA H200", "capability": "9.0", "cuda": "13.0", "driver": "580"}
    here = {"gpu": gpu, "cpu": "a CPU", "versions": {"torch": "2.11", "triton": "3.6"}}
    monkeypatch.setattr(module, "machine", lambda device: here)
    monkeypatch.setattr(module, "free_memory", lambda device: 10**9)
    text = module._environment(Place(tmp_path, torch.device("cuda")), "machine")["text"]
    assert text == (
        "NVIDIA H200, 1,000,000,000 bytes free; torch 2.11, triton 3.6; capability 9.0, CUDA 13.0, driver 580"
    )


@pytest.mark.slow
def test_torch_and_triton_alone_are_enough_for_the_kernels(tmp_path: Path) -> None:
    """In a process that can import nothing else of what afnext needs."""
    script = (
        "import sys, json, torch\n"
        "for name in ('rich', 'typer', 'av', 'soxr', 'transformers', 'jinja2', 'tokenizers', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "import afnext.bench.first_run.__main__\n"
        "from afnext.bench.first_run.steps import Place, Step, STEPS, run_step\n"
        "place = Place(Path(sys.argv[1]), torch.device('cpu'))\n"
        "run_step(Step('kernels', ('gelu',), STEPS[1].run), place)\n"
        "run_step(Step('answers', ('float32',), STEPS[3].run), place)\n"
    )
    root = str(Path(module.__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert states(tmp_path) == {("kernels", "gelu"): PASS, ("answers", "float32"): SKIP}
    (skipped,) = (record for record in read(tmp_path / RECORDS) if record.name == "answers")
    assert "import of" in skipped.values["text"]
    json.dumps(skipped.values)
