"""Runs the steps of a first run, each in a separate process, until all are done or the time is over.

Whatever ends a run, what was found stays: records are appended one by one, and the archive is made anew after each
step. The same command then goes on with what is left. A step that hangs or ends its process costs the item it was at.
"""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import afnext

from ..core.record import Record, append, finished, read
from .steps import CRASH, CURRENT, FAIL, PASS, RECORDS, SKIP, STEPS, Place, Step

ARCHIVE, SUMMARY = "first-run.zip", "summary.md"
_POLL = 0.2  # seconds
_START = 180.0  # seconds until a process has imported what it needs and begins its first item
_LEAST = 2.0  # seconds: with less than that left no step is started


def first_run(
    out: Path,
    *,
    device: str = "auto",
    minutes: float = 10.0,
    steps: Sequence[Step] = STEPS,
    say: Callable[[str], None] = print,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """Run the steps, and write records, summary and archive into the folder `out`.

    device: auto, cpu, cuda or cuda:N; minutes: for all of it; say: called with a line for each item. Returns the exit
    status: 0, 1 if an item failed, 130 after an interruption.
    """
    end = now() + 60 * minutes
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    out.mkdir(parents=True, exist_ok=True)
    place = Place(out.resolve(), torch.device(name))
    shown: set[str] = set()
    status = 0
    try:
        for step in steps:
            if not _run(step, place, end, shown, say, now):
                say(f"The time is over during '{step.name}'. The same command goes on from here.")
                break
    except KeyboardInterrupt:
        say("Interrupted. The same command goes on from here.")
        status = 130
    finally:
        records = _records(place)
        _archive(place, records)
        (place.folder / CURRENT).unlink(missing_ok=True)
    say(f"The results are in {place.folder / ARCHIVE}.")
    failed = any(record.values["state"] in (FAIL, CRASH) for record in records)
    return status or int(failed)


def _run(
    step: Step, place: Place, end: float, shown: set[str], say: Callable[[str], None], now: Callable[[], float]
) -> bool:
    """Run one step to its end, starting its process again after items that ended it. False if the time is over."""
    while _left(step, place):
        if end - now() < _LEAST:
            return False
        child = _started(step, place)
        try:
            reason = _watched(child, step, place, end, shown, say, now)
        finally:
            _stop(child)
        _report(place, shown, say)
        if reason == "time":
            return False
        if reason:
            _crashed(step, place, reason, child)
            _report(place, shown, say)
    _archive(place, _records(place))
    return True


def _left(step: Step, place: Place) -> list[str]:
    done = finished(place.folder / RECORDS)
    return [item for item in step.items if Record("first-run", step.name, item, _case(place), {}).key not in done]


def _case(place: Place) -> dict[str, str]:
    return {"device": place.device.type}


def _started(step: Step, place: Place) -> "subprocess.Popen[bytes]":
    root = str(Path(afnext.__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Nothing may wait for a network that is not there.
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    arguments = [step.name, str(place.folder), str(place.device), str(os.getpid())]
    command = [sys.executable, "-m", step.module, *arguments]
    (place.folder / CURRENT).unlink(missing_ok=True)
    with (place.folder / "output.txt").open("ab") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


def _watched(
    child: "subprocess.Popen[bytes]",
    step: Step,
    place: Place,
    end: float,
    shown: set[str],
    say: Callable[[str], None],
    now: Callable[[], float],
) -> str:
    """Wait for the child. Returns "" at its normal end, "time" when the time is over, or why its item ended it."""
    item, since = "", now()
    while True:
        try:
            code = child.wait(timeout=_POLL)
        except subprocess.TimeoutExpired:
            pass
        else:
            if code == 0:
                return ""
            return f"exit code {code}" if code > 0 else signal.Signals(-code).name
        _report(place, shown, say)
        if now() >= end:
            return "time"
        at = _current(place).get("item", "")
        if at != item:
            item, since = at, now()
        elif now() - since > (step.limit if item else _START):
            return f"it did not end within {step.limit if item else _START:g} s"


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """End the child and its processes."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _current(place: Place) -> dict[str, str]:
    try:
        found = json.loads((place.folder / CURRENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _crashed(step: Step, place: Place, reason: str, child: "subprocess.Popen[bytes]") -> None:
    """Record the item at which the child ended, or the first one where it ended before any."""
    left = _left(step, place)
    item = _current(place).get("item") or (left[0] if left else "")
    if item in left:
        text = f"the process ended with {reason}: {_last_words(place)}"
        append(place.folder / RECORDS, place.record(step.name, item, CRASH, text))


def _last_words(place: Place) -> str:
    try:
        lines = (place.folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return " | ".join(lines[-3:])[-500:]


def _report(place: Place, shown: set[str], say: Callable[[str], None]) -> None:
    for record in _records(place):
        if record.key not in shown:
            shown.add(record.key)
            say(f"{record.values['state']:8} {record.name}, {record.subject}: {record.values['text']}")


def _records(place: Place) -> list[Record]:
    path = place.folder / RECORDS
    if not path.is_file():
        return []
    return [record for record in read(path) if record.case == _case(place)]


def _archive(place: Place, records: Sequence[Record]) -> None:
    """Write the summary, and all results into one archive; an earlier one stays until the new one is whole."""
    (place.folder / SUMMARY).write_text(_summary(place, records), encoding="utf-8")
    unfinished = place.folder / f"{ARCHIVE}.part"
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(place.folder.iterdir()):
            if path.suffix in (".jsonl", ".md", ".txt"):
                archive.write(path, path.name)
    unfinished.replace(place.folder / ARCHIVE)


def _summary(place: Place, records: Sequence[Record]) -> str:
    counts = {state: sum(record.values["state"] == state for record in records) for state in (PASS, FAIL, CRASH, SKIP)}
    lines = [
        "# First run",
        "",
        ", ".join(f"{count} {state}" for state, count in counts.items()) + f" on {place.device}.",
        "",
        "| step | item | state | found |",
        "| --- | --- | --- | --- |",
    ]
    for record in records:
        text = " ".join(str(record.values["text"]).split()).replace("|", "\\|")
        lines.append(f"| {record.name} | {record.subject} | {record.values['state']} | {text} |")
    return "\n".join(lines) + "\n"
