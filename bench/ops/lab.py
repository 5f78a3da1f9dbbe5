"""`afnext bench ops --candidate`: tests a user's kernel in a separate process, and reports the results."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import afnext

from ..report import labels
from .problems import Problem
from .trial import CANDIDATE, Request

Event = dict[str, Any]


def try_candidate(
    request: Request, timeout: float = 1800.0, started: Callable[[str], None] = lambda _: None
) -> list[Event]:
    """Run the trial in a child process; return its events, without those of starting.

    timeout: seconds for all of it; started: called with the name of each problem as it begins. A candidate that ends
    the process or runs too long is a verdict with the problem that it was at.
    """
    with tempfile.TemporaryDirectory(prefix="afnext-lab-") as folder:
        asked, events, output = (Path(folder) / name for name in ("request.json", "events.jsonl", "output.txt"))
        asked.write_text(json.dumps(asdict(request)), encoding="utf-8")
        events.touch()
        root = str(Path(afnext.__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "afnext.bench.ops.trial", str(asked), str(events), str(os.getpid())]
        with output.open("wb") as sink:
            child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=sink, stderr=sink)
            try:
                code: int | None = _followed(child, events, timeout, started)
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        found = _read(events)
        said = output.read_text(encoding="utf-8", errors="replace").strip()
    at = next((event["problem"] for event in reversed(found) if event["event"] == "start"), "the start")
    if not found or found[-1]["event"] != "done":
        kind, text = _end(code, timeout, said)
        found.append(
            {"event": "verdict", "problem": at, "error": 0.0, "allowed": 0.0, "fault": kind, "diagnosis": text}
        )
    return [event for event in found if event["event"] not in ("start", "done")]


def _followed(
    child: "subprocess.Popen[bytes]", events: Path, timeout: float, started: Callable[[str], None]
) -> int | None:
    """Wait for the child, and report each problem it begins; return its exit code, or None after the timeout."""
    seen, waited = 0, 0.0
    while True:
        try:
            return child.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            waited += 0.2
        for event in _read(events)[seen:]:
            seen += 1
            if event["event"] == "start":
                started(event["problem"])
        if waited >= timeout:
            return None


def _read(events: Path) -> list[Event]:
    lines = events.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _end(code: int | None, timeout: float, said: str) -> tuple[str, str]:
    """Kind and diagnosis of a process that ended before the end of its trial."""
    if code is None:
        return "too slow", f"the trial did not end within {timeout:g} s and was stopped"
    last = f"; it wrote: {said[-300:]}" if said else ""
    if code < 0:
        name = signal.Signals(-code).name
        hint = ": memory outside the tensors was touched" if name in ("SIGSEGV", "SIGBUS") else ""
        return "crashed", f"the candidate ended its process with {name}{hint}{last}"
    return "crashed", f"the candidate ended its process with exit code {code}{last}"


def fault_of(events: list[Event]) -> Event | None:
    """The verdict with a fault, if there is one."""
    return next((event for event in events if event["event"] == "verdict" and event["fault"]), None)


def defaults_to_time(found: list[Problem]) -> list[str]:
    """The names of the smallest, the middle and the largest of these problems, by bytes and FLOPs."""
    ordered = sorted(found, key=lambda problem: problem.least_bytes + problem.work.flops / 100)
    return list(dict.fromkeys(ordered[i].name for i in (0, len(ordered) // 2, -1)))


def show(events: list[Event], console: Console) -> None:
    """Print the results of a trial."""
    verdicts = [event for event in events if event["event"] == "verdict"]
    fault = fault_of(events)
    sound = sum(not verdict["fault"] for verdict in verdicts)
    if fault is None:
        worst = max(verdicts, key=lambda v: v["error"] / (v["allowed"] or 1.0))
        console.print(
            f"[green]correct[/] on {sound} odd problems: relative RMS error up to {worst['error']:.3g}, where "
            f"{worst['allowed']:.3g} is allowed ({worst['problem']})"
        )
    else:
        console.print(f"[red]{fault['fault']}[/] at {escape(fault['problem'])}, after {sound} sound problems")
        console.print(f"  {escape(fault['diagnosis'])}", "  Wrong kernels are not timed.", sep="\n")
    _show_compiled([event for event in events if event["event"] == "compiled"], console)
    _show_times([event for event in events if event["event"] == "time"], console)
    for event in events:
        if event["event"] == "worth":
            verb = "saves" if event["percent"] >= 0 else "costs"
            calls = f"{event['launches']:,.0f} of its calls"
            if event["covered"] < event["launches"]:
                calls = f"{event['covered']:,.0f} of {calls}; at the others the candidate was not timed"
            console.print(
                f"It {verb} {abs(event['percent']):.2g} % of {event['whole']}, whose operations take "
                f"{labels.seconds(event['total'])} here ({calls})."
            )
        elif event["event"] == "model":
            first = event["first_difference"]
            same = "the same tokens" if first is None else f"other tokens from {first} on"
            console.print(
                f"In {event['model']}: {event['calls']} calls, {event['same']} of {event['tokens']} tokens: {same}."
            )
        elif event["event"] == "note":
            console.print(f"[dim]{escape(event['text'])}[/]")


def _show_compiled(compiled: list[Event], console: Console) -> None:
    if not compiled:
        return
    table = Table(
        "kernel", "chip", "registers", "shared", "occupancy", "instructions", "faults", box=None, pad_edge=False
    )
    for event in compiled:
        numbers = [str(event.get(name, "")) for name in ("registers", "shared")]
        occupancy = f"{event['occupancy']:.0%}" if "occupancy" in event else ""
        instructions = ", ".join(f"{count} {name}" for name, count in (event.get("instructions") or {}).items())
        faults = "; ".join(event["violations"]) or "none"
        table.add_row(event["kernel"], event["target"], *numbers, occupancy, instructions, faults)
    console.print(table)


def _show_times(times: list[Event], console: Console) -> None:
    if not times:
        return
    table = Table(box=None, pad_edge=False)
    for name in ("problem", "subject", "median", "TFLOP/s", "GB/s", "% of roofline", "limit", "candidate"):
        table.add_column(name, justify="left" if name in ("problem", "subject", "limit") else "right", no_wrap=True)
    candidates = {event["problem"]: event["seconds"] for event in times if event["subject"] == CANDIDATE}
    for event in times:
        faster = event["seconds"] / candidates[event["problem"]]
        table.add_row(
            event["problem"],
            event["subject"],
            labels.seconds(event["seconds"]),
            f"{event['tflops_per_s']:.3g}",
            f"{event['gb_per_s']:.3g}",
            f"{event['percent_of_ceiling']:.3g}",
            event["limit"],
            "" if event["subject"] == CANDIDATE else f"{faster:.2f}x as fast",
        )
    console.print(table)
