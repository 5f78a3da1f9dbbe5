"""`afnext verify` on the command line."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ...runtime.app.cli.options import DENSE, RECIPES, DeviceOption, JsonOption, dtype_name


def verify(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or a name on the Hub.")],
    scheme: Annotated[
        list[str] | None, typer.Option(help=f"Only {DENSE}, {', '.join(RECIPES)}; repeat for more.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only this dense dtype; repeat for more.")] = None,
    stages: Annotated[bool, typer.Option(help="Time every stage beside transformers.")] = True,
    new_tokens: Annotated[int, typer.Option(help="Length of the answers that are compared.", min=1)] = 48,
    out: Annotated[Path | None, typer.Option(help="File for the checks as JSON.")] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Check that a model works here: files, settings, tokens and times beside transformers, memory beside the plan.

    Loads the model once for each dtype and scheme that fits. Ends with status 1 when a check fails.
    """
    from rich.console import Console

    from . import verify as checks

    errors = Console(stderr=True)
    report = checks.verify(
        model,
        device=device,
        schemes=scheme or checks.SCHEMES,
        dtypes=[dtype_name(name) for name in dtype] if dtype else checks.DTYPES,
        stages=stages,
        new_tokens=new_tokens,
        progress=lambda check: errors.print(f"[dim]{check}[/]") if errors.is_terminal else None,
    )
    if out is not None:
        out.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        checks.show(report, Console(highlight=False, width=None if sys.stdout.isatty() else 160))
    if not report.passed:
        raise typer.Exit(1)
