"""`afnext bench ops`: the kernel lab on the command line."""

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ...runtime.app.cli.options import DeviceOption, JsonOption, dtype_name
from ...runtime.model.hub import BUNDLED

_WIDE = 200


def ops(
    op: Annotated[list[str] | None, typer.Option(help="Only this operation; repeat for more.")] = None,
    problem: Annotated[str, typer.Option(help="Only problems whose names match, as in '*8x1-of-45001*'.")] = "*",
    list_: Annotated[bool, typer.Option("--list", help="List the problems with their work (the default).")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write the problems, or a candidate's times, for other harnesses.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="Format of --export: flashinfer-bench or kernelbench.")
    ] = "kernelbench",
    candidate: Annotated[
        str | None, typer.Option(help="Kernel to test: FILE.py:FUNCTION, or an entry point of afnext.kernels.")
    ] = None,
    in_model: Annotated[bool, typer.Option("--in-model", help="Also run the whole model with the candidate.")] = False,
    model: Annotated[str, typer.Option("--model", "-m", help="Model for --in-model.")] = BUNDLED,
    target: Annotated[
        list[str] | None, typer.Option(help="Compile only for this chip (sm_90, ...); repeat for more.")
    ] = None,
    timing: Annotated[
        bool, typer.Option(help="Time a correct candidate against afnext, torch and other libraries.")
    ] = True,
    worth: Annotated[bool, typer.Option(help="Estimate what the candidate's time changes in a whole stage.")] = True,
    repeats: Annotated[int, typer.Option(help="Repetitions per problem.", min=1)] = 5,
    timeout: Annotated[float, typer.Option(help="Time limit of a trial, in seconds.", min=1.0)] = 1800.0,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
    dtype: Annotated[str, typer.Option(help="Dtype of weights and activations: fp32, bf16 or fp16.")] = "bf16",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """List or export problems of the real model, or test your kernel on them.

    A candidate has the signature of the operation's public function. It runs in a separate process, is first checked on
    odd shapes, and is timed only if it is correct. Exits with status 1 if it is not.
    """
    from . import listing

    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    found = listing.chosen(op or (), problem, dtype_name(dtype))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    if candidate is not None:
        from ..codegen.compiled import TARGETS
        from . import lab
        from .trial import Request

        if op is None or len(op) != 1:
            raise typer.BadParameter("name the one operation that the candidate implements", param_hint="--op")
        # The named problems, or three of very different sizes.
        timed = [one.name for one in found] if problem != "*" else lab.defaults_to_time(found)
        events = lab.try_candidate(
            Request(
                candidate=candidate,
                operation=op[0],
                dtype=dtype_name(dtype),
                device=str(place),
                seed=seed,
                timed=timed if timing else [],
                repeats=repeats,
                targets=target or [chip for chip in TARGETS if chip.startswith("sm")],
                in_model=model if in_model else "",
                worth=worth,
            ),
            timeout,
            started=lambda name: Console(stderr=True).print(f"[dim]{name}[/]") if sys.stderr.isatty() else None,
        )
        if export is not None:
            from ..core.machine import machine
            from .export import traces, write_traces

            write_traces(traces(events, candidate, machine(place)), export)
        if as_json:
            print(json.dumps(events))
        else:
            lab.show(events, console)
        if lab.fault_of(events):
            raise typer.Exit(1)
        return
    if export is not None:
        from .export import FORMATS, write

        if form not in FORMATS:
            raise typer.BadParameter(f"{form!r} is not one of {', '.join(FORMATS)}", param_hint="--format")
        paths = write(found, export, form)
        print(json.dumps([str(path) for path in paths]) if as_json else f"{len(paths)} files in {export}")
        return
    if as_json:
        from .problems import launches

        times = launches(dtype=dtype_name(dtype))
        print(json.dumps([{**one.to_dict(), "launches": times[one]} for one in found]))
        return
    console.print(listing.table(found, listing.roofline_of(place)))
