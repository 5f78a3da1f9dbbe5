"""`afnext ask`: one question about a recording."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    FromOption,
    LoadOptions,
    OutputOptions,
    SamplingOptions,
    SystemOption,
    TaskOption,
    ToOption,
    TruncateOption,
    grouped,
    question_text,
)
from .output import announce, log_to_stderr, open_output, progress, show_answer
from .sources import open_sources

if TYPE_CHECKING:
    from ..responder import AnswerOptions


@grouped
def ask(
    audio: Annotated[str, typer.Argument(help="An audio or video file; - reads standard input.")],
    loading: LoadOptions,
    sampling: SamplingOptions,
    show: OutputOptions,
    question: Annotated[
        str | None, typer.Argument(help="The question; omit it with --task.", callback=question_text)
    ] = None,
    task: TaskOption = None,
    to: ToOption = None,
    source: FromOption = None,
    also: Annotated[list[str] | None, typer.Option(help="Another recording; repeat for more.")] = None,
    system: SystemOption = None,
    truncate: TruncateOption = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the answer to this file instead of stdout.")
    ] = None,
) -> None:
    """Answer a question about a recording."""
    if (question is None) == (task is None):
        raise typer.BadParameter("give either a question or --task.", param_hint="QUESTION")
    log_to_stderr(show.verbose)
    with ExitStack() as stack:
        file = stack.enter_context(open_output(output))
        with progress(show.silent) as report:
            sources = open_sources([audio, *(also or [])], truncate=truncate)
            announce(loading.model, show.silent)
            model = loading.load(report)
            text = question or model.prompts.get(task or "", to=to, source=source)
            options: AnswerOptions = {**sampling.given(), "truncate": truncate, "progress": report}
            stream = model.stream(sources, text, system=system, **options)
            first = next(stream, None)
        show_answer(stream, first, show, output=file)
